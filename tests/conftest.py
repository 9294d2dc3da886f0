"""Fixtures that the tests of every script use."""

import copy
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub; a missing name fails at once instead of after retries
os.environ["OMP_NUM_THREADS"] = "1"  # threads of several test processes would wait for each other on a busy machine

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # real models and data, where they are at hand; they are no part of the repository
SCRIPTS = ("dpo", "gail", "grpo_llm", "maxent_irl", "ppo_llm", "reward_model")  # a user's own may stand beside them
sys.path.insert(0, str(ROOT))
# Event files of one second and one process are read in the order of this counter as text: "10" before "9".
# A test that resumes a run within its second needs counts of the same length.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)

SIZE = {
    "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZE, intermediate_size=64, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZE, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=20, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=1),
    "gpt_neox": GPTNeoXConfig(**SIZE, intermediate_size=64, bos_token_id=1, eos_token_id=1),
}

# The data of tiny runs of the language-model scripts.
SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(5)]
MORE_SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(5)]  # a tenth is held out
PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": f"{a}" * (1 + b % 3), "rejected": f"-{b}=" * (1 + a % 2)}
    for a in range(6)
    for b in range(6)
]


def make_model(architecture: str = "llama", seed: int = 0, scale: float = 0.2, **changes):
    """A tiny random model in evaluation mode, its weights large enough for distributions far from uniform."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[architecture])  # saving changes a config
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def make_tokenizer(alphabet: str = "0123456789+-= abc") -> PreTrainedTokenizerFast:
    """Characters, ids as in the embedded task with 4 to spare: pad 0, eos 1."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")


def save_tiny_model(folder: Path, alphabet: str = "0123456789+-= abc") -> str:
    """A tiny model and its tokenizer, in Hugging Face layout."""
    model = make_model("llama", scale=0.05, vocab_size=max(20, len(alphabet) + 2))
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    make_tokenizer(alphabet).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real models and data are not at hand")
    return SHARED


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_folder(args) -> Path:
    """The one run folder below --output-dir."""
    (folder,) = (path.parent for path in Path(args.output_dir).glob("*/args.json"))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def tiny_flags(script: str, folder: Path, model_folder: str) -> dict:
    """Flags of a run of a second or two below folder, with checkpoints after every other step."""
    flags = {"output_dir": str(folder / "runs"), "device": "cpu", "save_steps": 2}
    if script == "maxent_irl":
        return {**flags, "max_steps": 6, "num_trajectories": 32}
    if script == "gail":
        return {
            **flags, "num_envs": 4, "num_steps": 30, "total_timesteps": 720, "expert_timesteps": 240, "bc_epochs": 5,
            "eval_episodes": 4, "eval_steps": 2, "subsample": 5,
        }  # fmt: skip
    rows = {"grpo_llm": MORE_SUMS, "ppo_llm": SUMS}.get(script, PAIRS)
    flags |= {"model_name_or_path": model_folder, "dataset_name": write_rows(folder / "rows.jsonl", rows)}
    flags |= {"max_steps": 4, "learning_rate": 1e-2, "bf16": False}
    if rows is PAIRS:
        return {**flags, "train_batch_size": 8, "max_eval_samples": 6}
    flags |= {"generation_batch_size": 16, "max_completion_length": 6, "max_eval_samples": 4}
    return {**flags, "num_generations": 4, "beta": 0.1} if script == "grpo_llm" else flags


@pytest.fixture
def tiny(request, tmp_path, model_folder) -> Callable:
    """Args of a tiny run of the script that the test's file is about, some of them overridden."""
    script = request.module.__name__.removeprefix("test_")
    flags = tiny_flags(script, tmp_path, model_folder)
    return lambda **others: import_module(script).Args(**{**flags, **others})


def digit_reward(prompt: str, completion: str, answer: str | None) -> float:
    """A reward that a random model gets now and then: the share of digits in its completion."""
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


def digit_rewards(prompts: list, completions: list, answer: list, **columns) -> list[float]:
    """digit_reward with TRL's signature."""
    return [digit_reward(*row) for row in zip(prompts, completions, answer)]


def with_digit_reward(script: str):
    """REWARDS of a script with digit_reward before them."""
    rewards = import_module(script).REWARDS
    if isinstance(rewards, dict):
        return {"digits": (digit_rewards, 1.0), **rewards}
    return ((digit_reward, 1.0), *rewards)


# Processes are forked from one that has imported the scripts and done nothing: that saves seconds for each of them, and
# no thread is lost in the fork.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["conftest", *SCRIPTS])


def run_main(
    script: str, flags: dict, log: Path, patch: Callable | None = None, environment: dict | None = None
) -> None:
    """main in a process of its own, on digit_reward where the script has REWARDS, what it says in the file log. patch
    is called first; under torchrun's environment there is one thread a process."""
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    os.environ.update(environment or {})
    if environment:
        torch.set_num_threads(1)
    if patch:
        patch()
    module = import_module(script)
    if hasattr(module, "REWARDS"):
        module.REWARDS = with_digit_reward(script)
    module.main(module.Args(**flags))
