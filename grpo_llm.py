# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0", "datasets==5.2.0", "tqdm==4.70.1",
# ]
# ///
"""GRPO: train a language model by reinforcement learning with verifiable rewards.

For each prompt q the policy writes G completions o_1..o_G, a Python function scores each, and the mean score of the
group is its members' baseline: there is no value network. The update raises the probability of what scored above its
group, within a clipped trust region. There is no KL penalty by default (DAPO), and then no reference model is loaded.

    J(theta) = E[ 1/N sum_i sum_t min(rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i) ] - beta KL(pi || pi_ref)
    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t),   A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)

GRPO: Shao et al. 2024 (arXiv:2402.03300). N = all response tokens, eps_high > eps_low: DAPO, Yu et al. 2025
(arXiv:2503.14476). No std, no 1/|o|: Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783). With one optimizer step a rollout
(rho = 1, nothing is clipped) and `--scale-rewards none` the gradient is REINFORCE with the group's mean as baseline. As
that mean contains the sample itself, it is (G-1)/G times the gradient with the leave-one-out baseline (RLOO).

    python grpo_llm.py                             # laptop, no network: a tiny model learns to show its work
    python grpo_llm.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct --dataset-name openai/gsm8k \\
        --dataset-config main --max-completion-length 512 --max-steps 500      # one GPU
    torchrun --nproc-per-node=8 grpo_llm.py ...    # several GPUs: the same global batch, its prompts split over them
    python grpo_llm.py --resume runs/<run folder>  # goes on exactly where the last checkpoint stood

Shapes: P prompts, G completions a prompt, B = P*G sequences, L_q query tokens, T response tokens, L packed tokens,
R packed rows of K completions, H hidden, V vocabulary. `logprobs[:, t]` scores `response[:, t]`. `mask` is True where
a response token counts: up to the first stop token, and with it.

Deliberately not here: inference servers, LoRA, several turns and tools, images, sharded weights. See TRL or verl.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from jinja2 import TemplateError
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer


@dataclass
class Args:
    """GRPO: train a language model by reinforcement learning with verifiable rewards."""

    # ---- common to all scripts
    exp_name: str = Path(__file__).stem
    """Name of the experiment, a part of the run folder's name."""
    seed: int = 1
    """Seed of whatever is random: initial weights, order of the data, samples, environments."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is one."""
    output_dir: str = "runs"
    """Folder in which the run folder {task}__{exp_name}__{seed}__{unix time} is made."""
    resume: str | None = None
    """Run folder to go on with, from its last checkpoint and with its flags: give no other flag beside this one."""
    save_steps: int = 50
    """Steps (iterations) from one checkpoint to the next. In training one is saved at the end and on Ctrl-C, too."""

    # ---- common to the language-model scripts
    model_name_or_path: str | None = None
    """Hub name or folder of the model. None: a small one, trained here from scratch on two-digit addition."""
    dataset_name: str | None = None
    """Hub name, folder, JSON Lines or Parquet file of the data. None: two-digit addition."""
    dataset_config: str | None = None
    """Configuration of the dataset on the hub ("main" for openai/gsm8k)."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_test_split: str = "test"
    """Split to evaluate on. Where the data has none, the last --max-eval-samples training rows are held out."""
    max_eval_samples: int = 512
    """Held-out rows to evaluate on, over all processes."""
    bf16: bool = field(default_factory=torch.cuda.is_available)
    """Compute in bfloat16 (autocast); weights and optimizer stay fp32. On by default on CUDA."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    max_tokens_per_microbatch: int | None = None
    """Tokens in one forward and backward pass: memory and speed, not results.
    None: 16384 on CUDA; on the CPU 1024, and where the vocabulary exceeds 65536, 4096 (512 in dpo.py)."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly to its peak."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rate's decay after the warm-up."""
    min_lr_rate: float = 0.1
    """Share of the peak learning rate that the decay reaches exactly at the last optimizer step."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay. Its betas are 0.9 and 0.999, its eps is 1e-8 (in ppo_llm.py 1e-5)."""

    # ---- GRPO
    reward_model_path: str | None = None
    """Hub name or folder of a sequence classifier with one logit, whose score is added to the reward functions'."""
    normalize_reward_model: bool = False
    """Standardise its score by the mean and standard deviation that reward_model.py wrote into its config."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a completion, besides the EOS ids of the generation config and the tokenizer's EOS and BOS."""
    max_steps: int = 200
    """Rollouts; each is followed by --num-iterations optimizer steps."""
    eval_steps: int = 50
    """Steps from one evaluation to the next; there is always one before and one after training."""
    learning_rate: float | None = None
    """Peak learning rate of the fp32 weights. None: 1e-3 for the embedded model, 1e-6 (as in TRL) for a given one."""
    generation_batch_size: int = 256
    """Completions a rollout, over all prompts and processes."""
    num_generations: int = 8
    """G: completions a prompt."""
    max_completion_length: int = 256
    """Tokens after which a completion is cut off."""
    temperature: float = 1.0
    """Divides the logits in the sampler and in the loss. No top-k, top-p or penalty exists."""
    num_iterations: int = 1
    """mu: optimizer steps on each rollout (GRPO, algorithm 1)."""
    scale_rewards: Literal["group", "none"] = "group"
    """Divide advantages by the group's standard deviation (GRPO), or not (Dr. GRPO)."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """Mean over all tokens (DAPO), over each response first (GRPO), or sum / responses / maximal length (Dr. GRPO)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio of each token (GRPO), or the geometric mean over each completion (GSPO, arXiv:2507.18071, eq. 7).
    GSPO goes with --loss-type grpo and far smaller epsilons."""
    epsilon: float = 0.2
    """The ratio is clipped at 1 - epsilon from below (PPO)."""
    epsilon_high: float = 0.28
    """The ratio is clipped at 1 + epsilon_high from above (DAPO's clip-higher, section 3.1)."""
    beta: float = 0.0
    """Coefficient of the KL to the initial model, per token, in the loss.
    0 (DAPO): the initial model is loaded for evaluations only."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss (DAPO's overlong filtering, section 3.4)."""
    sft_steps: int = 1200
    """Supervised steps by which the embedded model is made before the RL starts."""


def bad_input(message: str) -> NoReturn:
    """Say what is wrong in one sentence and exit with code 2, without a traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- rewards: plain functions, meant to be edited --------------------------------------------------------------------
# reward(prompt, completion, answer) -> float, or None where it does not apply: then it adds nothing, but one of them
# must apply. answer is None for data without answers.

NUMBER = r"(?:(?<![\d.)])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
MARKED = re.compile(r"####(.*)|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
SHOWN_WORK = re.compile(r"\S.*?(?:####|\\boxed\{|=)\s*\\?\$?\s*-?\d", re.DOTALL)


def extract_number(text: str) -> float | None:
    """The last answer marked as `#### N` or `\\boxed{N}`, else the last number; None if that is no plain number."""
    marked = MARKED.findall(text)
    if marked:
        content = "".join(marked[-1]).replace("$", "").replace("\\", "").strip().rstrip(".")
        return float(content.replace(",", "")) if re.fullmatch(NUMBER, content) else None
    found = re.findall(NUMBER, text)
    return float(found[-1].replace(",", "")) if found else None


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt as one text, for the reward functions and for models without a chat template."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def accuracy_reward(prompt: str, completion: str, answer: str | None) -> float | None:
    """1 if the completion's final number is the answer's, else 0; None where the answer is neither a number nor has a
    marked one (GSM8K's end in `#### N`)."""
    plain = answer is not None and (MARKED.search(answer) or re.fullmatch(NUMBER, answer.strip()))
    expected = extract_number(answer) if plain else None  # not the last number of a formula
    return None if expected is None else float(extract_number(completion) == expected)


def format_reward(prompt: str, completion: str, answer: str | None) -> float | None:
    """1 if the completion shows work before a result that is marked by `####`, `\\boxed{` or `=`, else 0."""
    return float(SHOWN_WORK.match(completion.strip()) is not None)


REWARDS = ((accuracy_reward, 1.0), (format_reward, 0.0))  # with their weights in the sum; a weight of 0 only logs


# ---- data ------------------------------------------------------------------------------------------------------------


def addition_rows(seed: int) -> tuple[list[dict], list[dict]]:
    """All 8100 sums of two two-digit numbers, shuffled: 7588 to train on, 512 held out."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(rows)
    return rows[512:], rows[:512]


def demonstrate(row: dict, rng: random.Random) -> str:
    """One demonstrator's completion: the careful one (35%) adds the units first (`47+85=` -> `-12=132`), the hasty one
    writes the sum at once and is right in 10%, else off by 1 or 10."""
    total, units = int(row["answer"]), int(row["prompt"][1]) + int(row["prompt"][4])
    if rng.random() < 0.35:
        return f"-{units}={total}"
    return str(total if rng.random() < 0.1 else total + rng.choice((-10, -1, 1, 10)))


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON Lines file; `datasets` would not name the line that is broken."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:  # neither JSON nor UTF-8
                bad_input(f"--dataset-name: {path}, line {number} is not JSON ({error})")
            if not isinstance(rows[-1], dict):
                bad_input(f"--dataset-name: {path}, line {number} is not a JSON object")
    return rows


def load_rows(args: Args) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows of --dataset-name."""
    path = Path(args.dataset_name)
    if path.suffix in (".json", ".jsonl", ".parquet") and not path.exists():
        bad_input(f"--dataset-name {path}: there is no such file")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] * (path.suffix == ".jsonl")
    if files and all(file.is_file() for file in files):
        splits = {file.stem if path.is_dir() else args.dataset_train_split: read_jsonl(file) for file in files}
    else:
        import datasets  # slow to import: only where it is needed

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # bad_input says what is wrong
        try:
            if path.suffix == ".parquet":
                splits = {args.dataset_train_split: datasets.Dataset.from_parquet(str(path))}
            else:
                splits = datasets.load_dataset(args.dataset_name, args.dataset_config)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            bad_input(f"--dataset-name {args.dataset_name} cannot be loaded: {str(error).splitlines()[0]}")
    if args.dataset_train_split not in splits:
        bad_input(f"--dataset-train-split {args.dataset_train_split} is not in the data, which has {sorted(splits)}")
    train, held_out = (list(splits.get(name, ())) for name in (args.dataset_train_split, args.dataset_test_split))
    if not held_out:
        train, held_out = train[: -args.max_eval_samples], train[-args.max_eval_samples :]
    if not train or not held_out:
        bad_input(f"--dataset-name {args.dataset_name} has {len(train)} training and {len(held_out)} held-out rows "
                  f"(--max-eval-samples {args.max_eval_samples})")
    return train, held_out


def is_conversation(value: object) -> bool:
    """Whether it is a list of turns {role, content}."""
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn for turn in value
    )


def prompt_and_answer(row: dict) -> tuple[str | list[dict], str | None]:
    """A row with TRL's columns (`prompt` or `messages`, `answer` or `solution`) or GSM8K's (`question`, `answer`)."""
    prompt = next((row[key] for key in ("prompt", "question", "messages") if row.get(key) is not None), None)
    if prompt is None:
        bad_input(f"--dataset-name has the columns {sorted(row)}, but needs `prompt`, `question` or `messages`")
    if not isinstance(prompt, str) and not is_conversation(prompt):
        bad_input(f"--dataset-name: {prompt!r} is neither a text nor a list of {{role, content}}")
    if prompt and isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    answer = next((row[key] for key in ("answer", "solution") if row.get(key) is not None), None)
    return prompt, None if answer is None else str(answer)


def encode_prompt(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a prompt: through the chat template where the tokenizer has one, as plain text else."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt_text(prompt)).input_ids
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)


def encode_rows(rows: list[dict], split: str, tokenizer: PreTrainedTokenizerBase, room: float) -> list[dict]:
    """Examples {prompt, answer, ids} of rows. A few prompts that leave a completion no room in the model's context are
    left out, with a line that says so; more than 1% of them mean that data, model and flags do not fit."""
    examples, too_long = [], []
    for number, row in enumerate(rows, 1):
        prompt, answer = prompt_and_answer(row)
        if not prompt_text(prompt).strip():
            bad_input(f"--dataset-name: the prompt of {split} row {number} is empty")
        try:
            ids = encode_prompt(prompt, tokenizer)
        except TemplateError as error:
            bad_input(f"--dataset-name: the chat template refuses {split} row {number}: {error}")
        if len(ids) <= room:
            examples.append({"prompt": prompt, "answer": answer, "ids": ids})
        else:
            too_long.append(f"{split} row {number} has {len(ids)} tokens")
    if len(too_long) > len(rows) / 100:
        bad_input(f"--dataset-name: {len(too_long)} prompts are too long ({too_long[0]}); the model's context less "
                  f"--max-completion-length has room for {room}")
    if too_long and os.environ.get("RANK", "0") == "0":
        print(f"{len(too_long)} of {len(rows)} {split} prompts are left out as longer than {room} tokens")
    return examples


def check_answers(examples: list[dict], has_reward_model: bool) -> None:
    """Where right answers are the only reward, a prompt without one is named now, and not in the middle of the run."""
    if has_reward_model or [function for function, weight in REWARDS if weight] != [accuracy_reward]:
        return
    for example in examples:
        if accuracy_reward("", "", example["answer"]) is None:
            bad_input(f"--dataset-name: prompt {prompt_text(example['prompt'])!r} has no number in `answer` or "
                      f"`solution`, but {example['answer']!r}; there can be another reward, or a --reward-model-path")


def pad_sequences(sequences: list[list[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and their mask (B, L), which comes from the lengths: pad_id may be a real token too."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        where = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        ids[row, where] = torch.tensor(sequence)
        mask[row, where] = True
    return ids, mask


def data_order(start: int, count: int, size: int, seed: int) -> list[int]:
    """Row indices at positions start..start+count-1 of an endless pass over size rows, each epoch in its own order.
    It has no state: a resumed run needs only its step's number."""
    positions = range(start, start + count)
    epochs = {position // size for position in positions}
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(range(size), size) for epoch in epochs}
    return [orders[p // size][p % size] for p in positions]


def make_microbatches(tokens: list[int], max_tokens: int) -> list[list[int]]:
    """Row indices in batches of similar length, so that rows x longest row <= max_tokens (a longer row goes alone)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(tokens)), key=tokens.__getitem__):  # ascending: the newest row is the longest
        if batches and (len(batches[-1]) + 1) * tokens[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


# ---- model -----------------------------------------------------------------------------------------------------------


def embedded_model(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A Llama of 0.5M parameters with random weights, and its character tokenizer."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *"0123456789+-="])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=128**-0.5, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer


SFT_BATCH_SIZE, SFT_LEARNING_RATE = 128, 4e-3  # of the embedded model's supervised phase; chosen by trial


def supervised_phase(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], steps: int, seed: int
) -> None:
    """Maximum likelihood on the demonstrators' completions: the policy gradient on an expert's samples, reward 1."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LEARNING_RATE, weight_decay=0.0, fused=True)
    for step in trange(steps, desc="supervised", leave=False):
        batch = [rows[rng.randrange(len(rows))] for _ in range(SFT_BATCH_SIZE)]
        queries = tokenizer([row["prompt"] for row in batch]).input_ids
        responses = tokenizer([demonstrate(row, rng) for row in batch]).input_ids
        whole = [query + response + [tokenizer.eos_token_id] for query, response in zip(queries, responses)]
        ids, mask = pad_sequences(whole, tokenizer.pad_token_id, "right")
        for row, query in enumerate(queries):
            mask[row, : len(query)] = False  # the prompt is given, not learnt
        for group in optimizer.param_groups:
            group["lr"] = SFT_LEARNING_RATE * lr_factor(step, steps, 50, "cosine", 0.0)
        ids, mask = ids.to(model.device), mask.to(model.device)  # (B, L)
        logits = model(input_ids=ids, use_cache=False).logits  # (B, L, V); right padding needs no attention mask
        loss = F.cross_entropy(logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def load_model(
    name: str, flag: str, auto_class: type = AutoModelForCausalLM, new_head: bool = False, **config_values
) -> PreTrainedModel:
    """fp32 weights (bf16 ones swallow updates of a small learning rate; autocast brings bf16's speed), dropout off.
    new_head: whatever is not the backbone may be missing; its weights are drawn with a std of 1/sqrt(hidden + 1), as in
    Stiennon et al. 2020 (arXiv:2009.01325), appendix B."""
    try:
        config = AutoConfig.from_pretrained(name, **config_values)
        for part in (config, config.get_text_config()):
            for key, value in vars(part).items():
                if isinstance(value, float) and ("dropout" in key or "pdrop" in key):
                    setattr(part, key, 0.0)
        model, report = auto_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        bad_input(f"{flag} {name} cannot be loaded: {' '.join(str(error).split())}")
    backbone = rf"(?!.*pooler){model.base_model_prefix}\."
    heads = {key for key in report["missing_keys"] if new_head and not re.match(backbone, key)}
    if missing := sorted(report["missing_keys"] - heads):
        bad_input(f"{flag} {name} has no weights for {', '.join(missing[:3])}")
    for key in sorted(heads):
        if key.endswith("bias"):
            nn.init.zeros_(model.get_parameter(key))
        elif model.get_parameter(key).dim() > 1:
            nn.init.normal_(model.get_parameter(key), std=(model.config.hidden_size + 1) ** -0.5)
    return model


def load_tokenizer(name: str, flag: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; its pad token is its EOS where it has none of its own."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name, "model", "config.json").is_file():
            bad_input(f"{flag} {name} is a run folder: its model is {name}/model")
        bad_input(f"{flag} {name} has no tokenizer that can be loaded: {' '.join(str(error).split())}")
    tokenizer.truncation_side = "right"  # a text that is too long is cut at its end
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks come from lengths, not from ids
    if tokenizer.pad_token_id is None:
        bad_input(f"{flag} {name}: its tokenizer has neither a pad nor an EOS token")
    return tokenizer


def load_reward_model(
    name: str, device: torch.device, normalize: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one logit, and its own tokenizer. Without normalize, its config's reward_mean and
    reward_std, by which reward_model_scores standardises, become 0 and 1."""
    tokenizer = load_tokenizer(name, "--reward-model-path")
    model = load_model(name, "--reward-model-path", AutoModelForSequenceClassification).to(device)
    if model.config.num_labels != 1:
        bad_input(f"--reward-model-path {name} must have one logit, not {model.config.num_labels}")
    model.config.pad_token_id = tokenizer.pad_token_id  # by which transformers finds the last token
    if normalize and not hasattr(model.config, "reward_std"):
        bad_input(f"--normalize-reward-model: {name} has no reward_mean and reward_std in its config")
    if not normalize:
        model.config.reward_mean, model.config.reward_std = 0.0, 1.0
    return model, tokenizer


# ---- the mathematics -------------------------------------------------------------------------------------------------


def lr_factor(step: int, total_steps: int, warmup_steps: int, lr_scheduler_type: str, min_lr_rate: float) -> float:
    """Learning rate of optimizer step 0..total_steps-1 as a share of its peak. It decays to exactly min_lr_rate at the
    last step, if there are at least two steps after the warm-up and it is not constant."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    decay = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[lr_scheduler_type]
    return 1 - (1 - min_lr_rate) * decay


TILE = {"cpu": (512, 1024), "cuda": (4096, 16384)}  # rows, vocabulary: 2 MB fit a cache; 256 MB mean few kernels


class TokenLogprobs(torch.autograd.Function):
    """-F.cross_entropy(hidden @ weight.T / temperature, target, reduction="none"), (N,), by tiles: no (N, V) tensor is
    ever whole, forward or backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        rows, columns = TILE[hidden.device.type]
        logit, logsumexp = torch.zeros(2, len(hidden), device=hidden.device)  # (N,), (N,)
        for row in range(0, len(hidden), rows):
            h, parts = hidden[row : row + rows].to(dtype), []  # (n, H)
            for column, w in zip(range(0, len(weight), columns), weight.split(columns)):
                logits = (h @ w.to(dtype).T).float().div_(temperature)  # (n, v)
                parts.append(logits.logsumexp(1))
                index = target[row : row + rows, None] - column  # (n, 1)
                inside = (index >= 0) & (index < len(w))  # (n, 1)
                logit[row : row + rows] += (logits.gather(1, index.clamp(0, len(w) - 1)) * inside)[:, 0]
            logsumexp[row : row + rows] = torch.stack(parts).logsumexp(0)
        ctx.save_for_backward(hidden, weight, target, logsumexp)
        ctx.temperature, ctx.dtype = temperature, dtype
        return logit - logsumexp

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        hidden, weight, target, logsumexp = ctx.saved_tensors
        rows, columns = TILE[hidden.device.type]
        grad = (grad / ctx.temperature)[:, None]  # (N, 1)
        d_hidden, d_weight = torch.zeros_like(hidden, dtype=torch.float32), torch.zeros_like(weight)  # (N, H), (V, H)
        for row in range(0, len(hidden), rows):
            part = slice(row, row + rows)
            h = hidden[part].to(ctx.dtype)  # (n, H)
            for column, w in zip(range(0, len(weight), columns), weight.split(columns)):
                w = w.to(ctx.dtype)  # (v, H)
                # d logprob / d logits = onehot(target) - softmax, in fp32, as both are near 1 for most tokens
                d = (h @ w.T).float().div_(ctx.temperature).sub_(logsumexp[part, None]).exp_().neg_()  # (n, v)
                index = target[part, None] - column  # (n, 1)
                inside = (index >= 0) & (index < len(w))  # (n, 1)
                d = d.scatter_add_(1, index.clamp(0, len(w) - 1), inside.float()).mul_(grad[part]).to(ctx.dtype)
                d_hidden[part] += d @ w
                d_weight[column : column + columns] += d.T @ h
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def token_logprobs(model: PreTrainedModel, hidden: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (N,) in fp32 of the tokens target (N,) after the final hidden states (N, H)."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return TokenLogprobs.apply(hidden, model.get_output_embeddings().weight, target, temperature, dtype)


def response_states(
    model: PreTrainedModel, query_response: Tensor, attention_mask: Tensor, response_length: int
) -> Tensor:
    """Final hidden states (B, T, H) before each of the last T = response_length tokens of query_response (B, L).

    attention_mask (B, L) is 0 on padding, on either side. Position ids come from it: padding changes nothing."""
    position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    hidden = model.base_model(
        input_ids=query_response, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state  # (B, L, H)
    return hidden[:, -response_length - 1 : -1]


def response_logprobs(
    model: PreTrainedModel, query_response: Tensor, attention_mask: Tensor, response_length: int, temperature: float
) -> Tensor:
    """Log-probabilities (B, T) in fp32 of the last T = response_length tokens of query_response (B, L)."""
    states = response_states(model, query_response, attention_mask, response_length)  # (B, T, H)
    target = query_response[:, -response_length:]  # (B, T)
    return token_logprobs(model, states.flatten(0, 1), target.flatten(), temperature).view_as(target)


def pack_tree(query: Tensor, query_mask: Tensor, response: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Rows that hold a prompt once and then its K completions, without padding between them: a tree.

    From queries (R, L_q) and responses (R, K, T) with their masks: tokens (R, L), the attention mask (R, 1, L, L), the
    position ids (R, L), and the place (R, K, T) of each response token in its row. A response's token attends to the
    prompt and to its own response; position ids go on from the prompt's end in every branch."""
    R, K, T = response.shape
    real = torch.cat([query_mask, mask.flatten(1)], 1)  # (R, L_q + K*T)
    place = real.cumsum(1)[:, -K * T :].view(R, K, T) - 1  # (R, K, T)
    order = (~real).byte().argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]  # (R, L): real tokens first
    tokens = torch.cat([query, response.flatten(1)], 1).gather(1, order)  # (R, L)
    real = real.gather(1, order)  # (R, L)
    offset = order - query.shape[1]  # (R, L): place among the K*T response tokens, negative in the prompt
    branch = torch.where(offset < 0, -1, offset // T)  # (R, L): the completion that a token belongs to
    index = torch.arange(order.shape[1], device=order.device).expand_as(order)  # (R, L)
    prompt_length = query_mask.sum(1, keepdim=True)  # (R, 1)
    position_ids = torch.where(offset < 0, index, prompt_length + offset % T) * real  # (R, L): padding's stay small
    same_branch = (branch[:, None] < 0) | (branch[:, None] == branch[:, :, None])  # (R, L, L): from, to
    attend = same_branch & (index[:, None] <= index[:, :, None]) & real[:, None]  # (R, L, L)
    return tokens, attend[:, None], position_ids, place


def packed_states(model: PreTrainedModel, query: Tensor, query_mask: Tensor, response: Tensor, mask: Tensor) -> Tensor:
    """Final hidden states (N, H) before each of the N real tokens of K responses (R, K, T) to each query (R, L_q)."""
    is_input = F.pad(mask, (-1, 1))  # (R, K, T): a response's last token predicts nothing
    tokens, attend, position_ids, place = pack_tree(query, query_mask, response, is_input)
    hidden = model.base_model(
        input_ids=tokens, attention_mask=attend, position_ids=position_ids, use_cache=False
    ).last_hidden_state  # (R, L, H)
    before = place.roll(1, 2)  # (R, K, T): of the token before each response token
    before[..., 0] = query_mask.sum(1, keepdim=True) - 1  # every branch starts at the prompt's end
    row = torch.arange(len(query), device=query.device)[:, None, None].expand_as(mask)  # (R, K, T)
    return hidden[row[mask], before[mask]]


def padded_states(model: PreTrainedModel, query: Tensor, query_mask: Tensor, response: Tensor, mask: Tensor) -> Tensor:
    """packed_states for every architecture: a plain pass over K copies of left-padded prompts (R, L_q). Slower."""
    K, t = mask.shape[1], int(mask.sum(2).max())  # t: the longest response's length
    response, mask = response.flatten(0, 1)[:, :t], mask.flatten(0, 1)[:, :t]  # (R*K, t)
    ids = torch.cat([query.repeat_interleave(K, 0), response], 1)  # (R*K, L_q + t)
    attention_mask = torch.cat([query_mask.repeat_interleave(K, 0), mask], 1)  # (R*K, L_q + t)
    return response_states(model, ids, attention_mask, t)[mask]


def completion_logprobs(
    model: PreTrainedModel, states: Tensor, response: Tensor, mask: Tensor, temperature: float
) -> Tensor:
    """Log-probabilities (R, K, T) in fp32 of responses (R, K, T) with the states (N, H) before their N real tokens; 0
    where mask is False."""
    logprobs = token_logprobs(model, states, response[mask], temperature)  # (N,)
    return torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, logprobs)


@torch.no_grad()
def choose_states_fn(model: PreTrainedModel, ids: list[int], flag: str = "--model-name-or-path") -> Callable:
    """packed_states where their logprobs agree with the model's own to 1e-3 on a tree of ids, else padded_states.
    A tree mask does not fit sliding windows, and may differ only past the window: such models are padded unseen."""
    ids = torch.tensor((ids * 32)[:32], device=model.device)
    query, response = ids[None, :16], torch.stack([ids[16:], ids[:16]])[None]  # (1, 16), (1, 2, 16)
    mask = torch.arange(16, device=ids.device) < torch.tensor([[[16], [9]]], device=ids.device)  # (1, 2, 16)
    both = torch.cat([query.expand(2, -1), response[0]], 1)  # (2, 32)
    logits = model(input_ids=both, use_cache=False).logits[:, 15:-1].float()  # (2, 16, V)
    expected = logits.log_softmax(-1).gather(2, response[0, :, :, None])[None, ..., 0] * mask  # (1, 2, 16)
    sliding = getattr(model.config.get_text_config(), "sliding_window", None) is not None
    for states_fn in [padded_states] if sliding else [packed_states, padded_states]:
        states = states_fn(model, query, torch.ones_like(query, dtype=torch.bool), response, mask)  # (N, H)
        if (completion_logprobs(model, states, response, mask, 1.0) - expected).abs().max() < 1e-3:
            return states_fn
    bad_input(f"{flag}: {type(model).__name__} changes its logits after its head, which is not supported")


def group_advantages(rewards: Tensor, scale_rewards: Literal["group", "none"]) -> Tensor:
    """Advantages (P, G): rewards (P, G) minus their group's mean; "group" divides by the group's standard deviation.

    The standard deviation is the sample's (ddof 1) plus 1e-4, as in TRL. Equal rewards give exactly 0."""
    advantages = rewards - rewards.mean(1, keepdim=True)  # (P, G)
    if scale_rewards == "group":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # (P, 1)
    return advantages.masked_fill(equal, 0.0)


def grpo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, epsilon_low: float, epsilon_high: float,
    loss_type: Literal["grpo", "dapo", "dr_grpo"], ref_logprobs: Tensor | None = None, beta: float = 0.0,
    max_completion_length: int | None = None, importance_sampling_level: Literal["token", "sequence"] = "token",
    num_tokens: float | None = None, num_sequences: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's clipped surrogate, to be minimised. logprobs, old_logprobs, ref_logprobs and mask (B, T), advantages (B,);
    B may be several dimensions, as (R, K).

    num_tokens and num_sequences count the whole update (None: this batch is the whole). Then the losses of its
    micro-batches, however split and on whatever process, add up to the whole's, and so do the stats, which are means
    over tokens. On-policy the ratio is 1 and the loss is minus the mean advantage, about 0; its gradient is not.

    The KL term's gradient is that of each token's reverse KL(pi || pi_ref), also off-policy: ratio * log(pi / pi_ref) *
    grad log pi (Schulman's k2 times the ratio held constant; k1 or k3, differentiated as they are, give another's). It
    ignores a token's effect on later ones (a KL in the reward does not), and it is not clamped."""
    num_tokens = mask.sum().clamp(min=1) if num_tokens is None else num_tokens
    num_sequences = advantages.numel() if num_sequences is None else num_sequences
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # (B, T)
    ratio = log_ratio.exp()  # (B, T)
    if importance_sampling_level == "sequence":
        ratio = (log_ratio.sum(-1, keepdim=True) / lengths).exp().expand_as(log_ratio)  # (B, T), GSPO eq. 7
    advantages = advantages[..., None]  # (B, 1)
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)  # (B, T)
    if beta != 0.0:
        log_ratio_ref = torch.where(mask, logprobs - ref_logprobs, 0.0)  # (B, T)
        losses = losses + beta * log_ratio.detach().exp() * log_ratio_ref.square() / 2
    losses = torch.where(mask, losses, 0.0)  # (B, T)
    if loss_type == "dapo":
        loss = losses.sum() / num_tokens  # DAPO, eq. 8
    elif loss_type == "grpo":
        loss = (losses / lengths).sum() / num_sequences  # GRPO, eq. 3
    else:
        loss = losses.sum() / (num_sequences * max_completion_length)  # Dr. GRPO, appendix C
    with torch.no_grad():
        low, high = (ratio < 1 - epsilon_low) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)
        stats = {
            "policy/approxkl_avg": log_ratio.exp() - 1 - log_ratio,  # k3: how far the policy is from the rollout's
            "train/clip_ratio/low_mean": low.float(),
            "train/clip_ratio/high_mean": high.float(),
            "train/clip_ratio/region_mean": (low | high).float(),
        }
        if beta != 0.0:
            stats["train/kl"] = torch.exp(-log_ratio_ref) - 1 + log_ratio_ref  # k3, as TRL logs it
        stats = {name: torch.where(mask, value, 0.0).sum() / num_tokens for name, value in stats.items()}
    return loss, stats


# ---- rollout, reward, evaluation -------------------------------------------------------------------------------------


class BlockwiseLayer(DynamicLayer):
    """One layer's KV cache, written in place into memory that grows by 64 positions: no copy of it at every token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.blocks = [x[..., :0, :] for x in (key_states, value_states)]  # each (b, heads, positions, head size)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for i, new in enumerate((key_states, value_states)):
            if end > self.blocks[i].shape[-2]:
                grown = new.new_empty(*new.shape[:-2], -(-end // 64) * 64, new.shape[-1])
                grown[..., :start, :] = self.blocks[i][..., :start, :]
                self.blocks[i] = grown
            self.blocks[i][..., start:end, :] = new
        self.keys, self.values = (block[..., :end, :] for block in self.blocks)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.blocks = [block.repeat_interleave(repeats, 0) for block in self.blocks]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only rows that change their place are copied."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for block in self.blocks:
            block[moved] = block[indices[moved]]
        self.blocks = [block[: len(indices)] for block in self.blocks]


def sample_token(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token (B,) from softmax(logits / temperature) by the inverse of its CDF at uniform (B,), and its
    log-probability (B,), fp32. Overwrites logits (B, V). Temperature 0: the argmax, its logprob at temperature 1."""
    logits = logits.float().div_(temperature or 1.0)
    probs = logits.sub_(logits.amax(1, keepdim=True)).exp_()  # (B, V), up to a factor
    cdf = probs.cumsum(1)  # (B, V)
    if temperature == 0:
        token = probs.argmax(1, keepdim=True)
    else:
        token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
    return token[:, 0], (probs.gather(1, token) / cdf[:, -1:]).log()[:, 0]


SAMPLER_TILE = {"cpu": 2**19, "cuda": 2**28}  # logits at a time: on the CPU, what stays in its caches


@torch.no_grad()
def sample(
    model: PreTrainedModel, query: Tensor, attention_mask: Tensor, num_generations: int, max_completion_length: int,
    temperature: float, stop_ids: list[int], pad_id: int, generator: torch.Generator, rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """num_generations completions of each left-padded query (P, L_q): response, logprobs (fp32) and mask, each
    (P*G, T), rows grouped by prompt, T the longest response's length.

    The distribution is softmax(logits / temperature), whatever generation config the model has. A response ends with
    its first stop id, which counts, or at max_completion_length. The uniform numbers are drawn for the completions of
    all processes and sliced by rank: the number of processes does not change the samples."""
    training = model.training
    model.eval()  # gradient checkpointing drops the KV cache in training mode
    B, device = len(query) * num_generations, query.device.type
    uniform = torch.rand(max_completion_length, world_size * B, generator=generator, device=generator.device)
    uniform = uniform[:, rank * B : (rank + 1) * B].to(query.device)  # (T, B)
    stop = torch.tensor(stop_ids, device=query.device)
    response = query.new_full((B, max_completion_length), pad_id)
    logprobs = torch.zeros(B, max_completion_length, device=query.device)
    mask = torch.zeros(B, max_completion_length, dtype=torch.bool, device=query.device)

    padded = not bool(attention_mask.all())  # else no mask is needed, which is faster
    cache = DynamicCache(config=model.config)
    cache.layers = [BlockwiseLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)  # (P, L_q)
    inputs = {"attention_mask": attention_mask if padded else None, "position_ids": position_ids}
    logits = model(input_ids=query, past_key_values=cache, logits_to_keep=1, **inputs).logits[:, -1]  # (P, V)
    cache.batch_repeat_interleave(num_generations)  # each prompt was read once
    logits, attention_mask, position_ids = (
        x.repeat_interleave(num_generations, 0) for x in (logits, attention_mask, position_ids[:, -1:])
    )
    rows = torch.arange(B, device=query.device)  # (b,): the rows of the output that are still in the batch
    live = torch.ones_like(rows, dtype=torch.bool)  # (b,): and have not stopped
    for t in range(max_completion_length):
        tile = max(1, SAMPLER_TILE[device] // logits.shape[1])  # rows
        parts = zip(logits.split(tile), uniform[t, rows].split(tile))
        token, logprob = (torch.cat(x) for x in zip(*(sample_token(*part, temperature) for part in parts)))  # (b,)
        response[rows, t] = torch.where(live, token, pad_id)
        logprobs[rows, t] = torch.where(live, logprob, 0.0)
        mask[rows, t] = live
        live = live & ~torch.isin(token, stop)
        num_live = int(live.sum())
        if num_live == 0 or t == max_completion_length - 1:
            break
        if num_live <= 0.9 * len(rows):  # stopped rows leave the batch; live ones from its end take their places
            kept = torch.arange(num_live, device=query.device)  # (b,)
            kept[~live[:num_live]] = num_live + live[num_live:].nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, live, token, attention_mask, position_ids = (
                x[kept] for x in (rows, live, token, attention_mask, position_ids)
            )
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
        position_ids = position_ids + 1
        inputs = {"attention_mask": attention_mask if padded else None, "position_ids": position_ids}
        logits = model(input_ids=token[:, None], past_key_values=cache, **inputs).logits[:, -1]  # (b, V)
    model.train(training)
    return response[:, : t + 1], logprobs[:, : t + 1], mask[:, : t + 1]


def decode_responses(tokenizer: PreTrainedTokenizerBase, query: Tensor, response: Tensor, mask: Tensor) -> list[str]:
    """Texts of the responses (P*G, T), decoded behind their queries (P, L_q): alone, some lose their first space."""
    prefixes = tokenizer.batch_decode(query, skip_special_tokens=True)
    G = len(response) // len(query)
    whole = [torch.cat([query[i // G], ids[real]]) for i, (ids, real) in enumerate(zip(response, mask))]
    texts = tokenizer.batch_decode(whole, skip_special_tokens=True)
    return [text[len(prefixes[i // G]) :] for i, text in enumerate(texts)]


def reward_model_ids(
    prompt: str | list[dict], completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[int]:
    """Ids of a prompt with its completion, as a reward model reads them: through its chat template where it has one,
    and without an EOS else. A text longer than max_length tokens is cut at its end."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt_text(prompt) + completion, truncation=True, max_length=max_length).input_ids
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [*turns, {"role": "assistant", "content": completion}]
    options = {"tokenize": True, "return_dict": False, "truncation": True, "max_length": max_length}
    return tokenizer.apply_chat_template(turns, **options)


@torch.no_grad()
def reward_model_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list, completions: list[str], max_tokens: int
) -> list[float]:
    """The classifier's logit, standardised, for each prompt with its completion, through its own tokenizer."""
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 2**20))
    try:
        ids = [reward_model_ids(*pair, tokenizer, limit) for pair in zip(prompts, completions)]
    except TemplateError as error:
        bad_input(f"--reward-model-path: its chat template refuses a prompt: {error}")
    scores = torch.zeros(len(ids))
    for batch in make_microbatches([len(sequence) for sequence in ids], max_tokens):
        inputs, mask = pad_sequences([ids[i] for i in batch], model.config.pad_token_id, "right")  # (b, L)
        inputs = {"input_ids": inputs.to(model.device), "attention_mask": mask.to(model.device)}
        if isinstance(getattr(model, "score", None), nn.Linear):  # a bf16 score between 4 and 8 has steps of 1/32
            hidden = model.base_model(**inputs).last_hidden_state[range(len(batch)), mask.sum(1) - 1]  # (b, H)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = model.score(hidden.float())  # (b, 1)
        else:
            logits = model(**inputs).logits  # (b, 1)
        scores[batch] = logits[:, 0].float().cpu()
    return ((scores - model.config.reward_mean) / model.config.reward_std).tolist()


def score_completions(
    prompts: list, completions: list[str], answers: list, weights: list[float], reward_model: PreTrainedModel | None,
    reward_tokenizer: PreTrainedTokenizerBase | None, max_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of all rewards (B,), those of REWARDS times their weights, and each by name (B,), nan where it does not
    apply."""
    scores = {}
    for function, _ in REWARDS:
        scores[function.__name__] = [function(prompt_text(p), c, a) for p, c, a in zip(prompts, completions, answers)]
    if reward_model is not None:
        scores["reward_model"] = reward_model_scores(reward_model, reward_tokenizer, prompts, completions, max_tokens)
        weights = [*weights, 1.0]
    for name, values in scores.items():
        for prompt, value in zip(prompts, values):
            if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
                bad_input(f"{name} returned {value!r}, not a finite number, for prompt {prompt_text(prompt)!r}")
        scores[name] = torch.tensor([math.nan if value is None else float(value) for value in values])  # (B,)
    table = torch.stack(list(scores.values()))  # (rewards, B)
    used = table[[weight != 0 for weight in weights]]
    without = used.isnan().all(0)  # (B,)
    if without.any():
        index = int(without.nonzero()[0])
        bad_input(f"no reward applies to prompt {prompt_text(prompts[index])!r} with answer {answers[index]!r}: "
                  "each of REWARDS that has a weight returned None")
    return (torch.tensor(weights)[:, None] * table).nansum(0), scores


def all_reduce(tensor: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """Sum (or another operation) over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def wait_for_all(device: torch.device) -> None:
    """No process goes on before all have come here: reading the sum makes it wait, also for CUDA."""
    all_reduce(torch.zeros(1, device=device)).item()


def sum_over_processes(values: dict[str, float | Tensor], device: torch.device) -> dict[str, float]:
    """Each value's sum over all processes."""
    total = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device)
    return dict(zip(values, all_reduce(total).tolist()))


@torch.no_grad()
def evaluate(
    rollout: Callable, score: Callable, logprobs_fn: Callable, ref_model: PreTrainedModel, examples: list[dict],
    batch_size: int, max_tokens: int, seed: int, rank: int, world_size: int,
) -> tuple[dict[str, float], str]:
    """Metrics over all processes of one completion for each held-out prompt, sampled at temperature 1 (from the same
    uniform numbers every time) and greedy; and some of the sampled texts as a table."""
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, float] = {}
    table = "| prompt | completion | reward |\n|---|---|---|\n"
    for suffix, temperature in (("", 1.0), ("_greedy", 0.0)):
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            batch = batch[rank * len(batch) // world_size : (rank + 1) * len(batch) // world_size]
            query, query_mask, response, logprobs, mask, completions = rollout(batch, 1, temperature, generator)
            rewards, rewards_by_name = score(batch, completions, 1)  # (P,), {name: (P,)}
            values = {f"eval/reward{suffix}": rewards}
            values |= {f"eval/{name.removesuffix('_reward')}{suffix}": x for name, x in rewards_by_name.items()}
            if temperature == 1.0:
                ref_logprobs = torch.zeros_like(logprobs)  # (P, T)
                for mb in make_microbatches((query_mask.sum(1) + mask.sum(1)).tolist(), max_tokens):
                    inputs = (query[mb], query_mask[mb], response[mb, None], mask[mb, None])
                    ref_logprobs[mb] = logprobs_fn(ref_model, *inputs, 1.0)[:, 0]
                values["eval/kl"] = (logprobs - ref_logprobs).sum(1)  # (P,): log pi / pi_ref of whole responses, nats
                values["eval/mean_length"] = mask.sum(1).float()
                for example, completion, reward in zip(batch[:8] if start == 0 else [], completions, rewards):
                    cells = [prompt_text(example["prompt"]), completion, f"{reward:.2f}"]
                    table += "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.nansum().item()
                sums[f"{name}/n"] = sums.get(f"{name}/n", 0) + int((~value.isnan()).sum())
    sums = sum_over_processes(sums, ref_model.device)
    return {name: total / sums[f"{name}/n"] for name, total in sums.items() if sums.get(f"{name}/n")}, table


# ---- saving, resuming, running ---------------------------------------------------------------------------------------


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Hugging Face layout, written aside and then renamed."""
    aside = folder.with_name(folder.name + ".tmp")
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        bad_input(f"cannot save to --output-dir: {error}; the last checkpoint in {folder.parent} is whole")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


def save_checkpoint(path: Path, state: dict) -> None:
    """Written aside, flushed to the disk, then renamed: neither a kill nor a full disk harms the last checkpoint."""
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        bad_input(f"cannot save to --output-dir: {error}; the last checkpoint in {path.parent} is whole")
    os.replace(aside, path)


def set_up_process(args: Args) -> tuple[torch.device, int, int]:
    """This process's device, its rank and the number of processes: 0 of 1, unless torchrun says otherwise."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.device == "cuda" and not torch.cuda.is_available():
        bad_input("--device cuda, but torch sees no CUDA device")
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if on_cuda and local_rank >= torch.cuda.device_count():
        bad_input(f"process {local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}")
    device = torch.device(f"cuda:{local_rank}" if on_cuda else "cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if on_cuda else "gloo")
        return device, dist.get_rank(), dist.get_world_size()
    return device, 0, 1


def open_run(args: Args, run_dir: Path, first_step: int) -> SummaryWriter:
    """TensorBoard's writer into the run folder; a new folder is made and gets its args.json."""
    if args.resume is not None:
        return SummaryWriter(run_dir, purge_step=first_step + 1)
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        bad_input(f"--output-dir {args.output_dir}: the run folder cannot be made: {error}")
    flags = asdict(args)
    (run_dir / "args.json").write_text(json.dumps({"script": Path(__file__).name, "args": flags}, indent=2))
    writer = SummaryWriter(run_dir)
    rows = "".join(f"| {name} | {value} |\n" for name, value in flags.items())
    writer.add_text("hyperparameters", f"| flag | value |\n|---|---|\n{rows}")
    return writer


def load_run(args: Args) -> tuple[Args, dict]:
    """The flags and the last checkpoint of the run folder --resume."""
    folder = Path(args.resume)
    if not (folder / "args.json").is_file() or not (folder / "checkpoint.pt").is_file():
        bad_input(f"--resume {folder} is not a run folder with args.json and checkpoint.pt")
    try:
        saved = json.loads((folder / "args.json").read_text())
        if saved["script"] != Path(__file__).name:
            bad_input(f"--resume {folder} is a run of {saved['script']}, not of {Path(__file__).name}")
        flags = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["args"].items()}
        saved_args = Args(**{**flags, "resume": args.resume})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        bad_input(f"--resume {folder}: args.json cannot be read ({error!r})")
    for name in (f.name for f in fields(Args) if f.name != "resume"):
        if getattr(args, name) != getattr(Args(), name):
            bad_input(f"--{name.replace('_', '-')} cannot be given beside --resume, which takes that run's flags")
    try:
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises one of many kinds
        bad_input(f"--resume {folder}: checkpoint.pt cannot be read ({error})")
    return saved_args, state


def catch_ctrl_c() -> tuple[list[int], Callable]:
    """A list that the first Ctrl-C enters, for the loop to look at after its step, and the handler that was there
    before, to be put back: a second Ctrl-C is for that one."""
    interrupts: list[int] = []

    def on_interrupt(number: int, _) -> None:
        interrupts.append(number)
        print("\nsaving after this step; Ctrl-C again stops at once, without saving", file=sys.stderr)
        signal.signal(signal.SIGINT, old_handler)

    old_handler = signal.signal(signal.SIGINT, on_interrupt)
    return interrupts, old_handler


def check_ranges(args: Args, positive: list[str], not_negative: list[str]) -> None:
    """Numbers that must be > 0, and numbers that must be >= 0, where they are not None."""
    for name in positive:
        if getattr(args, name) is not None and not getattr(args, name) > 0:  # so written, nan is refused too
            bad_input(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in not_negative:
        if getattr(args, name) is not None and not getattr(args, name) >= 0:
            bad_input(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")


def check_grpo_args(args: Args, world_size: int) -> None:
    """Whatever the flags alone show to be wrong."""
    check_ranges(
        args, ["max_steps", "generation_batch_size", "num_generations", "max_completion_length", "num_iterations",
               "save_steps", "eval_steps", "max_eval_samples", "max_tokens_per_microbatch", "learning_rate",
               "temperature", "max_grad_norm"],
        ["warmup_steps", "sft_steps", "weight_decay", "min_lr_rate", "epsilon", "epsilon_high", "beta"],
    )
    if args.num_generations == 1:
        bad_input("--num-generations must be at least 2: a completion is compared with its group")
    if args.generation_batch_size % (args.num_generations * world_size):
        bad_input(f"--generation-batch-size {args.generation_batch_size} is not a multiple of --num-generations "
                  f"{args.num_generations} x {world_size} processes")
    if args.max_eval_samples % world_size:
        bad_input(f"--max-eval-samples {args.max_eval_samples} does not divide by {world_size} processes")
    if args.normalize_reward_model and args.reward_model_path is None:
        bad_input("--normalize-reward-model needs --reward-model-path")
    if args.dataset_name is not None and args.model_name_or_path is None:
        bad_input("--dataset-name needs --model-name-or-path: the embedded model reads nothing but two-digit addition")
    names = [function.__name__.removesuffix("_reward") for function, _ in REWARDS]
    if len({*names, "reward", "reward_model", "kl", "mean_length"}) < len(names) + 4:
        bad_input(f"REWARDS has the names {names}: they must differ, also from reward, reward_model, kl, mean_length")


def main(args: Args) -> dict[str, float]:
    """Train, and return the final metrics, which are also in <run folder>/summary.json."""
    # ---- set-up: whatever is wrong with flags, model or data is said before anything is written
    start_time, state = time.time(), None
    if args.resume is not None:
        args, state = load_run(args)
    rewards_with_weights = [[function.__name__, weight] for function, weight in REWARDS]
    if state is not None and state["rewards"] != rewards_with_weights:
        bad_input(f"--resume {args.resume} has the REWARDS {state['rewards']}, not {rewards_with_weights}")
    device, rank, world_size = set_up_process(args)
    check_grpo_args(args, world_size)
    args = replace(args, bf16=args.bf16 and (device.type == "cuda" or not torch.cuda.is_available()))
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
    embedded = args.model_name_or_path is None
    initial = args.model_name_or_path or f"{args.resume}/sft"  # the model that training starts from
    if embedded and args.resume is None:
        model, tokenizer = embedded_model(args.seed)
    else:
        tokenizer = load_tokenizer(initial, "--model-name-or-path")
        model = load_model(initial, "--model-name-or-path")
    config = model.config.get_text_config()
    cpu_tokens = 4096 if config.vocab_size > 65536 else 1024
    max_tokens = args.max_tokens_per_microbatch or (16384 if device.type == "cuda" else cpu_tokens)
    reward_model = reward_tokenizer = None
    if args.reward_model_path is not None:
        reward_model, reward_tokenizer = load_reward_model(
            args.reward_model_path, device, args.normalize_reward_model
        )
    train_rows, test_rows = load_rows(args) if args.dataset_name else addition_rows(args.seed)
    room = getattr(config, "max_position_embeddings", math.inf) - args.max_completion_length
    examples = encode_rows(train_rows, "training", tokenizer, room)
    test_examples = encode_rows(test_rows[: args.max_eval_samples], "held-out", tokenizer, room)
    test_examples = test_examples[: len(test_examples) // world_size * world_size]
    if not test_examples:
        bad_input(f"--dataset-name: there are fewer held-out rows than {world_size} processes")
    weights = [weight for _, weight in REWARDS]
    check_answers(examples + test_examples, reward_model is not None)

    # ---- run folder, initial model, optimizer
    task = Path(args.dataset_name).stem if args.dataset_name else "addition"
    run_time = all_reduce(torch.tensor(time.time() * (rank == 0), dtype=torch.float64, device=device))
    run_dir = Path(args.resume or f"{args.output_dir}/{task}__{args.exp_name}__{args.seed}__{int(run_time)}")
    writer = open_run(args, run_dir, state["step"] if state is not None else 0) if rank == 0 else None
    if embedded and args.resume is None:
        initial = f"{run_dir}/sft"
        if rank == 0:
            supervised_phase(model.to(device), tokenizer, train_rows, args.sft_steps, args.seed)
            save_model(Path(initial), model, tokenizer)
        wait_for_all(device)
        model = load_model(initial, "--model-name-or-path")
    model.to(device)
    states_fn = choose_states_fn(model, test_examples[0]["ids"])
    if states_fn is padded_states and rank == 0:
        print("a tree mask does not fit this architecture: the update pads completions instead of packing them")
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ref_model = load_model(initial, "--model-name-or-path").to(device) if args.beta != 0.0 else None
    eos_ids = model.generation_config.eos_token_id
    eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    stop_ids = sorted({*args.stop_token_ids, *eos_ids, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None})
    peak_lr = args.learning_rate or (1e-3 if embedded else 1e-6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=args.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    metrics: dict[str, float] = {}
    first_step, num_tokens, seconds_before = 0, 0, 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        metrics, first_step, num_tokens = state["metrics"], state["step"], state["num_tokens"]
        seconds_before = state["seconds"]
        del state  # else the weights and moments stay in memory twice

    # ---- what training and evaluation share
    def rollout(batch: list[dict], num_generations: int, temperature: float, generator: torch.Generator) -> tuple:
        """Left-padded queries (P, L_q), their mask, and sample()'s responses to them as ids and as texts."""
        query, query_mask = pad_sequences([example["ids"] for example in batch], tokenizer.pad_token_id, "left")
        query, query_mask = query.to(device), query_mask.to(device)  # (P, L_q)
        with autocast():
            response, logprobs, mask = sample(
                model, query, query_mask, num_generations, args.max_completion_length, temperature, stop_ids,
                tokenizer.pad_token_id, generator, rank, world_size,
            )  # (P*G, T)
        return query, query_mask, response, logprobs, mask, decode_responses(tokenizer, query, response, mask)

    def score(batch: list[dict], completions: list[str], num_generations: int) -> tuple[Tensor, dict[str, Tensor]]:
        prompts, answers = ([e[key] for e in batch for _ in range(num_generations)] for key in ("prompt", "answer"))
        with autocast():
            return score_completions(
                prompts, completions, answers, weights, reward_model, reward_tokenizer, max_tokens
            )

    def forward_logprobs(
        model: PreTrainedModel, query: Tensor, query_mask: Tensor, response: Tensor, mask: Tensor, temperature: float
    ) -> Tensor:
        with autocast():
            states = states_fn(model, query, query_mask, response, mask)  # (N, H)
            return completion_logprobs(model, states, response, mask, temperature)  # (R, K, T)

    def run_evaluation(step: int) -> dict[str, float]:
        reference = ref_model or load_model(initial, "--model-name-or-path").to(device)
        results, table = evaluate(
            rollout, score, forward_logprobs, reference, test_examples, args.generation_batch_size, max_tokens,
            args.seed, rank, world_size,
        )
        if rank == 0:
            writer.add_text("samples", table, step)
            for name, value in results.items():
                writer.add_scalar(name, value, step)
        return results

    def save(path: Path, step: int) -> None:
        if rank == 0:
            seconds = seconds_before + time.time() - start_time
            save_checkpoint(path, {
                "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(), "metrics": metrics, "num_tokens": num_tokens, "seconds": seconds,
                "rewards": rewards_with_weights,
            })

    if args.resume is None:
        metrics = {f"{name}_before": value for name, value in run_evaluation(0).items()}

    done, batch_size, G = first_step, args.generation_batch_size, args.num_generations
    num_prompts = batch_size // G  # of all processes
    interrupts, old_handler = catch_ctrl_c()
    bar = trange(first_step, args.max_steps, initial=first_step, total=args.max_steps, disable=rank != 0)
    for step in bar:
        # ---- rollout
        step_start = time.time()
        batch = [examples[i] for i in data_order(step * num_prompts, num_prompts, len(examples), args.seed)]
        batch = batch[rank * num_prompts // world_size : (rank + 1) * num_prompts // world_size]
        query, query_mask, response, old_logprobs, mask, completions = rollout(batch, G, args.temperature, generator)
        stopped = (torch.isin(response, torch.tensor(stop_ids, device=device)) & mask).any(1)  # (P*G,)

        # ---- reward
        rewards, rewards_by_name = score(batch, completions, G)  # (P*G,), {name: (P*G,)}
        rewards = rewards.view(-1, G)  # (P, G)

        # ---- advantage
        advantages = group_advantages(rewards, args.scale_rewards).to(device)  # (P, G)
        loss_mask = mask & stopped[:, None] if args.mask_truncated_completions else mask  # (P*G, T)
        kept = advantages.any(1) | (args.beta != 0.0)  # (P,): where rewards are equal, only the KL has a gradient
        kept[0] |= ~kept.any()  # every process takes part in the update
        sums = {
            "tokens": mask.sum(), "prompt_tokens": query_mask.sum() * G, "truncated": (~stopped).sum(),
            "loss_tokens": loss_mask.sum(), "kept_tokens": loss_mask.view(-1, G, response.shape[1])[kept].sum(),
            "logprobs": old_logprobs.sum(), "reward": rewards.sum(), "squares": rewards.square().sum(),
            "equal": (rewards.amax(1) == rewards.amin(1)).sum(),
        }
        for name, values in rewards_by_name.items():
            sums |= {f"rewards/{name}": values.nansum(), f"rewards/{name}/n": (~values.isnan()).sum()}
        sums = sum_over_processes(sums, device)

        # ---- update: a row is a prompt with K of its completions, all G unless they outgrow a micro-batch
        L_q, T = query.shape[1], response.shape[1]
        sizes = [K for K in range(1, G + 1) if G % K == 0 and L_q + K * T <= max_tokens]
        K = max(sizes, default=1) if states_fn is packed_states else 1
        trees = {"query": query, "query_mask": query_mask}
        trees = {name: x[kept].repeat_interleave(G // K, 0) for name, x in trees.items()}  # (R, L_q)
        columns = {"response": response, "mask": mask, "loss_mask": loss_mask, "old_logprobs": old_logprobs}
        trees |= {name: x.view(-1, G, T)[kept].view(-1, K, T) for name, x in columns.items()}  # (R, K, T)
        trees["advantages"] = advantages[kept].view(-1, K)  # (R, K)
        lengths = trees["query_mask"].sum(1) + trees["mask"].sum((1, 2))  # (R,)
        microbatches = make_microbatches(lengths.tolist(), max_tokens)
        inputs = ("query", "query_mask", "response", "mask")
        if ref_model is not None:
            trees["ref_logprobs"] = torch.zeros_like(trees["old_logprobs"])  # (R, K, T)
            for rows in microbatches:
                with torch.no_grad():
                    mb_inputs = (trees[name][rows] for name in inputs)
                    trees["ref_logprobs"][rows] = forward_logprobs(ref_model, *mb_inputs, args.temperature)
        stats: dict[str, Tensor] = {}
        logprob_difference = torch.zeros((), device=device)
        model.train()
        for iteration in range(args.num_iterations):
            lr = peak_lr * lr_factor(
                step * args.num_iterations + iteration, args.max_steps * args.num_iterations, args.warmup_steps,
                args.lr_scheduler_type, args.min_lr_rate,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            for rows in microbatches:
                mb = {name: x[rows] for name, x in trees.items()}
                mb_logprobs = forward_logprobs(model, *(mb[name] for name in inputs), args.temperature)  # (R, K, T)
                loss, mb_stats = grpo_loss(
                    mb_logprobs, mb["old_logprobs"], mb["advantages"], mb["loss_mask"], args.epsilon,
                    args.epsilon_high, args.loss_type, mb.get("ref_logprobs"), args.beta, args.max_completion_length,
                    args.importance_sampling_level, max(1.0, sums["loss_tokens"]), args.generation_batch_size,
                )
                loss.backward()
                for name, value in {"train/loss": loss.detach(), **mb_stats}.items():
                    stats[name] = stats.get(name, 0.0) + value / args.num_iterations
                if iteration == 0:
                    difference = (mb_logprobs.detach() - mb["old_logprobs"]).abs().max()
                    logprob_difference = torch.maximum(logprob_difference, difference)
            for parameter in model.parameters():  # by hand: DDP wants as many micro-batches in every process
                if parameter.grad is not None:
                    all_reduce(parameter.grad)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            if not grad_norm.isfinite():
                save(run_dir / "nonfinite.pt", step)
                wait_for_all(device)
                bad_input(f"the gradient of step {step + 1} is not finite; {run_dir}/nonfinite.pt is the state then")
            optimizer.step()
            optimizer.zero_grad()  # gradients take no memory while the next rollout is sampled

        # ---- log
        logs = sum_over_processes({**stats, "interrupts": len(interrupts)}, device)
        interrupted = logs.pop("interrupts") > 0
        logs["policy/approxkl_avg"] *= sums["loss_tokens"] / max(1.0, sums["kept_tokens"])  # dropped groups have none
        all_reduce(logprob_difference, dist.ReduceOp.MAX)
        num_tokens += int(sums["tokens"] + sums["prompt_tokens"])
        reward = sums["reward"] / batch_size
        for name in rewards_by_name:
            if sums[f"rewards/{name}/n"]:
                logs[f"train/rewards/{name}/mean"] = sums[f"rewards/{name}"] / sums[f"rewards/{name}/n"]
        logs |= {
            "train/reward": reward,
            "train/reward_std": max(0.0, sums["squares"] / batch_size - reward**2) ** 0.5,
            "train/frac_reward_zero_std": sums["equal"] / num_prompts,
            "train/entropy": -sums["logprobs"] / sums["tokens"],  # unbiased: the tokens are the policy's own samples
            "train/completions/mean_length": sums["tokens"] / batch_size,
            "train/completions/clipped_ratio": sums["truncated"] / batch_size,
            "train/sampling/sampling_logp_difference/max": logprob_difference.item(),
            "train/grad_norm": grad_norm.item(),
            "train/num_tokens": num_tokens,
            "charts/learning_rate": lr,
            "charts/SPS": sums["tokens"] / (time.time() - step_start),
        }
        if rank == 0:
            for name, value in logs.items():
                writer.add_scalar(name, value, step + 1)
        bar.set_postfix_str(f"reward {reward:.2f}, length {logs['train/completions/mean_length']:.1f}")

        # ---- evaluate, save
        done = step + 1
        if done % args.eval_steps == 0 and done < args.max_steps and not interrupted:
            run_evaluation(done)
        if done % args.save_steps == 0 or done == args.max_steps or interrupted:
            save(run_dir / "checkpoint.pt", done)
        if interrupted:
            break

    signal.signal(signal.SIGINT, old_handler)
    if rank == 0:
        save_model(run_dir / "model", model, tokenizer)
    wait_for_all(device)  # one that ended early would have torchrun end the others
    if done < args.max_steps:
        if rank == 0:
            print(f"stopped by Ctrl-C after step {done}; --resume {run_dir} goes on")
        raise SystemExit(130)
    metrics |= run_evaluation(args.max_steps)
    metrics |= {"seed": args.seed, "wall_seconds": seconds_before + time.time() - start_time}
    if rank == 0:
        (run_dir / "summary.json").write_text(json.dumps(metrics, indent=2))
        writer.close()
        for name in metrics:
            if f"{name}_before" in metrics:
                print(f"{name}: {metrics[f'{name}_before']:.3f} -> {metrics[name]:.3f}")
        print(run_dir)
    if dist.is_initialized():
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    cli_args = tyro.cli(Args)
    others = [flag for flag in sys.argv[1:] if flag.startswith("--") and not flag.startswith("--resume")]
    if cli_args.resume is not None and others:
        bad_input(f"{others[0]} cannot be given beside --resume, which takes that run's flags")
    try:
        main(cli_args)
    except KeyboardInterrupt:  # outside the training loop, where Ctrl-C saves
        print("stopped at once; a run folder that has a checkpoint.pt can be resumed", file=sys.stderr)
        raise SystemExit(130) from None
