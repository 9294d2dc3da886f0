"""Fixtures that the tests of every script use."""

import copy
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub; a missing name fails at once instead of after retries

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
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
sys.path.insert(0, str(ROOT))

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


def make_model(architecture: str = "llama", seed: int = 0, scale: float = 0.2):
    """A tiny random model in evaluation mode, its weights large enough for distributions far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[architecture])).eval()  # saving changes a config
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, ids as in the embedded task with 4 to spare: pad 0, eos 1."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *"0123456789+-= abc"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    """A folder with a tiny model and its tokenizer, in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("model")
    model = make_model("llama", scale=0.05)
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


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
