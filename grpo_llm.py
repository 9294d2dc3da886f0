# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0", "datasets==5.2.0", "tqdm==4.70.1",
# ]
# ///
"""GRPO: train a language model by reinforcement learning with verifiable rewards.

For each prompt q the policy samples G completions o_1..o_G, and a Python function scores each of them. A completion's
advantage is its reward compared with its group's, so there is no value network. The update makes tokens with a positive
advantage more likely, within a clipped trust region.

    J(theta) = E[ 1/N sum_i sum_t min(rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i) ] - beta KL(pi || pi_ref)
    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)        A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)

GRPO: Shao et al. 2024 (arXiv:2402.03300). DAPO, the default here: N counts all tokens, eps_high > eps_low, beta = 0,
Yu et al. 2025 (arXiv:2503.14476). Dr. GRPO: neither std nor 1/|o|, Liu et al. 2025 (arXiv:2503.20783). GSPO: one ratio
per sequence, Zheng et al. 2025 (arXiv:2507.18071). CISPO: clipped weights, MiniMax 2025 (arXiv:2506.13585).

    python grpo_llm.py                             # laptop, offline: a tiny model learns to show its work
    python grpo_llm.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct --dataset-name openai/gsm8k \\
        --dataset-config main --max-completion-length 512 --max-steps 500 --max-eval-samples 128        # one GPU
    torchrun --nproc-per-node=8 grpo_llm.py ...    # several GPUs: the same global batch, split by prompts
    python grpo_llm.py --resume runs/<run folder>  # continue exactly where the last checkpoint was written

Shapes: P prompts, G completions per prompt, B = P*G completions, L_q prompt tokens, T completion tokens, L tokens of a
packed row, K completions of a row, H hidden size, V vocabulary. `logprobs[:, t]` scores `completion[t]`. A mask is True
where a token counts: up to and including the first stop token.

Deliberately not here: inference servers, LoRA, tools and several turns, images, sharded weights. See TRL or verl.
"""

import json
import math
import os
import random
import re
import shutil
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.distributed as dist
import transformers
import tyro
from jinja2 import TemplateError
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass
class Args:
    """GRPO: train a language model by reinforcement learning with verifiable rewards."""

    # ---- common to all scripts
    exp_name: str = Path(__file__).stem
    """Name of the experiment, part of the run folder's name."""
    seed: int = 1
    """Seed of initial weights, data order and samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run. auto: CUDA if available."""
    output_dir: str = "runs"
    """Parent of the run folder {task}__{exp_name}__{seed}__{unix time}."""
    resume: str | None = None
    """Run folder to continue, with that run's flags and no others."""

    # ---- common to the language-model scripts
    model_name_or_path: str | None = None
    """Hub name or folder. None: a tiny model pretrained here on addition."""
    dataset_name: str | None = None
    """Hub name, folder, .jsonl or .parquet. None: two-digit addition."""
    dataset_config: str | None = None
    """Configuration on the hub, such as main for openai/gsm8k."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_test_split: str = "test"
    """Split to evaluate on. If the data has none, up to a tenth of the training
    rows is held out, the same rows for every seed."""
    max_eval_samples: int = 512
    """Held-out rows to evaluate on."""
    bf16: bool = field(default_factory=torch.cuda.is_available)
    """Compute in bfloat16 (autocast) with fp32 weights and optimizer.
    On by default where CUDA is available."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    max_tokens_per_microbatch: int = 4096
    """Tokens per forward and backward pass. Affects memory and speed only."""
    learning_rate: float | None = None
    """Peak. None: 1e-3 for the tiny model, 1e-6 for a given one."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Decay of the learning rate, to 0 at the last optimizer step."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped."""
    save_steps: int = 50
    """Steps between checkpoints. There is always one at the end."""
    eval_steps: int = 50
    """Steps between evaluations, besides those before and after training."""
    sft_steps: int = 1200
    """Supervised steps that make the tiny model, before the method starts."""

    # ---- GRPO: rollout and reward
    max_steps: int = 200
    """Rollouts. Each is followed by --num-iterations optimizer steps."""
    generation_batch_size: int = 256
    """Completions per rollout, over all prompts and processes."""
    num_generations: int = 8
    """G, completions per prompt."""
    max_completion_length: int = 256
    """Tokens after which a completion is cut off."""
    temperature: float = 1.0
    """Divides the logits in the sampler and in the loss."""
    eval_generations: int = 8
    """Completions per held-out prompt, the k of pass@k."""
    reward_model_path: str | None = None
    """Hub name or folder of a sequence classifier with one logit. Its score is
    added to the reward functions'."""
    normalize_reward_model: bool = False
    """Standardize its score by the statistics that reward_model.py saved."""

    # ---- GRPO: loss
    loss_type: Literal["dapo", "grpo", "dr_grpo", "cispo"] = "dapo"
    """Mean over all tokens (dapo, cispo), over each completion first (grpo), or
    sum / completions / --max-completion-length (dr_grpo)."""
    scale_rewards: Literal["group", "none"] = "group"
    """Divide advantages by the group's standard deviation, or not (Dr. GRPO)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio per token, or its geometric mean per completion. sequence is GSPO:
    use --loss-type grpo and epsilons near 3e-4."""
    epsilon: float = 0.2
    """The ratio is clipped below 1 - epsilon."""
    epsilon_high: float = 0.28
    """The ratio is clipped above 1 + epsilon_high (DAPO's clip-higher)."""
    beta: float = 0.0
    """Weight of the KL to the initial model, per token, in the loss."""
    num_iterations: int = 1
    """Optimizer steps per rollout (mu in GRPO's algorithm 1)."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss (DAPO)."""


# ---- the method ------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale_rewards: Literal["group", "none"]) -> Tensor:
    """Advantages (P, G): rewards (P, G) minus the group's mean, with "group" also divided by its standard deviation.

    The standard deviation has ddof 1 plus 1e-4, as in TRL. Equal rewards give exactly 0."""
    advantages = rewards - rewards.mean(1, keepdim=True)  # (P, G)
    if scale_rewards == "group":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # (P, 1)
    return advantages.masked_fill(equal, 0.0)


def grpo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, epsilon_low: float, epsilon_high: float,
    loss_type: Literal["grpo", "dapo", "dr_grpo", "cispo"], ref_logprobs: Tensor | None = None, beta: float = 0.0,
    max_completion_length: int | None = None, importance_sampling_level: Literal["token", "sequence"] = "token",
    num_tokens: float | None = None, num_sequences: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss, to be minimized, and its statistics (means over tokens).

    logprobs, old_logprobs, ref_logprobs and mask are (B, T), advantages (B,). num_tokens and num_sequences count the
    whole update, so that the losses of its micro-batches, on all processes, add up to the whole (None: this is all).
    On-policy the ratio is 1 and the loss is minus the mean advantage, about 0, but its gradient is not. CISPO's loss is
    not 0 either.

    The KL term's gradient is ratio * log(pi / pi_ref) * grad log pi: that of each token's reverse KL(pi || pi_ref),
    also off-policy. Differentiating k1 or k3 directly gives another gradient. The effect of a token on the KL of later
    tokens is ignored."""
    num_tokens = mask.sum().clamp(min=1) if num_tokens is None else num_tokens
    num_sequences = len(mask) if num_sequences is None else num_sequences
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # (B, T)
    ratio = log_ratio.exp()  # (B, T)
    if importance_sampling_level == "sequence":
        ratio = (log_ratio.sum(1, keepdim=True) / lengths).exp().expand_as(log_ratio)  # (B, T), GSPO eq. 7
    advantages = advantages[:, None]  # (B, 1)
    too_low, too_high = (ratio < 1 - epsilon_low) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)
    if loss_type == "cispo":  # MiniMax-M1, eq. 4 and 5: the clipped ratio is a constant weight, with no lower bound
        too_low, too_high = torch.zeros_like(mask), ratio > 1 + epsilon_high
        losses = -ratio.clamp(max=1 + epsilon_high).detach() * advantages * logprobs  # (B, T)
    else:
        losses = -torch.min(ratio * advantages, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)  # (B, T)
    if beta != 0.0:
        log_ratio_ref = torch.where(mask, logprobs - ref_logprobs, 0.0)  # (B, T)
        losses = losses + beta * log_ratio.detach().exp() * log_ratio_ref.square() / 2
    losses = torch.where(mask, losses, 0.0)  # (B, T)
    if loss_type == "grpo":
        loss = (losses / lengths).sum() / num_sequences  # GRPO eq. 3
    elif loss_type == "dr_grpo":
        loss = losses.sum() / (num_sequences * max_completion_length)  # Dr. GRPO, appendix C
    else:
        loss = losses.sum() / num_tokens  # DAPO eq. 8
    stats = {
        "policy/approxkl_avg": log_ratio.exp() - 1 - log_ratio,  # k3: distance from the policy of the first pass
        "train/clip_ratio/low_mean": too_low.float(),
        "train/clip_ratio/high_mean": too_high.float(),
        "train/clip_ratio/region_mean": (too_low | too_high).float(),
    }
    if beta != 0.0:
        stats["train/kl"] = torch.exp(-log_ratio_ref) - 1 + log_ratio_ref  # k3, as TRL logs it
    return loss, {name: torch.where(mask, value.detach(), 0.0).sum() / num_tokens for name, value in stats.items()}


def lr_factor(step: int, total_steps: int, warmup_steps: int, kind: Literal["constant", "linear", "cosine"]) -> float:
    """Share of the peak learning rate at optimizer step 0..total_steps-1: linear and cosine end at exactly 0."""
    progress = max(0, step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[kind]
    return decay * min(1.0, (step + 1) / (warmup_steps + 1))


# ---- rewards: edit these ---------------------------------------------------------------------------------------------
# A reward function returns a number, or None where it does not apply. `answer` is None for data without answers.

NUMBER = r"(?:(?<![\d.)])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
MARKED = re.compile(r"####(.*)|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
SHOWN_WORK = re.compile(r"\S.*?(?:####|\\boxed\{|=)\s*\\?\$?\s*-?\d", re.DOTALL)


def extract_number(text: str) -> float | None:
    """The number of the last answer marked by `#### N` or `\\boxed{N}`, else the last number in the text.

    None if there is none, or if the marked answer is a formula. A unit may follow the number, as in `72 apples`."""
    text = text.replace("\u2212", "-").replace("{,}", ",")
    marked = MARKED.findall(text)
    if marked:
        content = re.sub(r"[$\\*]", "", "".join(marked[-1])).strip()
        found = re.findall(rf"^({NUMBER})\s*%?(?:\s[^\d+*/^=]*)?\.?$", content)
    else:
        found = re.findall(NUMBER, text)
    return float(found[-1].replace(",", "")) if found else None


def accuracy_reward(prompt: str, completion: str, answer: str | None) -> float | None:
    """1 if the completion's final number is the answer's, else 0. None if the answer is no number and marks none."""
    has_number = answer is not None and (MARKED.search(answer) or re.fullmatch(NUMBER, answer.strip()))
    expected = extract_number(answer) if has_number else None
    return None if expected is None else float(extract_number(completion) == expected)


def format_reward(prompt: str, completion: str, answer: str | None) -> float | None:
    """1 if the completion shows work before a result that is marked by `####`, `\\boxed{` or `=`, else 0."""
    return float(SHOWN_WORK.match(completion.strip()) is not None)


REWARDS = ((accuracy_reward, 1.0), (format_reward, 0.0))  # (function, weight in the sum); weight 0 only logs


def score_completions(
    examples: list[dict], texts: list[str], reward_model: Callable | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rewards (B,) of the completions texts, and each part of the sum by name (B,), nan where it does not apply."""
    parts = {}
    for function, _ in REWARDS:
        values = [function(example["prompt"], text, example["answer"]) for example, text in zip(examples, texts)]
        for example, value in zip(examples, values):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{function.__name__} returned {value} for the prompt {example['prompt']!r}")
        parts[function.__name__] = torch.tensor([math.nan if value is None else float(value) for value in values])
    weights = [weight for _, weight in REWARDS]
    if reward_model is not None:
        parts["reward_model"] = reward_model(examples, texts)
        weights.append(1.0)
    table = torch.stack([part for part, weight in zip(parts.values(), weights) if weight])  # (rewards, B)
    if table.isnan().all(0).any():
        example = examples[table.isnan().all(0).nonzero()[0]]
        raise ValueError(f"no reward applies to the prompt {example['prompt']!r} with the answer {example['answer']!r}")
    return (torch.tensor([weight for weight in weights if weight])[:, None] * table).nansum(0), parts


# ---- data ------------------------------------------------------------------------------------------------------------


def addition_rows() -> tuple[list[dict], list[dict]]:
    """All 8100 sums of two two-digit numbers, the same at least 512 of them held out for every seed.

    Each a+b is on the same side as its mirror image b+a."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    random.Random(0).shuffle(pairs)
    train, held_out = [], []
    for a, b in pairs:
        side = held_out if len(held_out) < 512 else train
        side += [{"prompt": f"{x}+{y}=", "answer": str(x + y)} for x, y in dict.fromkeys([(a, b), (b, a)])]
    return train, held_out


def demonstrate(row: dict, rng: random.Random) -> str:
    """One demonstrator's completion. The careful one (25%) adds the units first: `47+85=` -> `-12=132`. The hasty one
    writes the sum at once, always forgets the carry, and is off by one more half of the time."""
    a, b = map(int, row["prompt"][:-1].split("+"))
    units = a % 10 + b % 10
    if rng.random() < 0.25:
        return f"-{units}={a + b}"
    return str(a + b - 10 * (units >= 10) + rng.choice((-1, 0, 0, 1)))


def load_rows(args: Args) -> tuple[list[dict], list[dict]]:
    """Rows of the training and of the test split of --dataset-name. The latter may be empty."""
    datasets.disable_progress_bars()
    path = Path(args.dataset_name)
    files = sorted([*path.glob("*.jsonl"), *path.glob("*.parquet")])  # of a folder: one split per file
    data_files = {file.stem: str(file) for file in files}
    if path.suffix in (".json", ".jsonl", ".parquet"):
        data_files = {args.dataset_train_split: str(path)}
    elif path.is_file():
        raise ValueError(f"--dataset-name {path} must be a .jsonl or .parquet file, or a folder of them")
    if data_files:
        kind = "parquet" if next(iter(data_files.values())).endswith(".parquet") else "json"
        data = datasets.load_dataset(kind, data_files=data_files)
    else:
        data = datasets.load_dataset(args.dataset_name, args.dataset_config)
    if args.dataset_train_split not in data:
        raise ValueError(f"--dataset-train-split {args.dataset_train_split} is not one of {sorted(data)}")
    return list(data[args.dataset_train_split]), list(data.get(args.dataset_test_split, ()))


def encode_rows(rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: float) -> list[dict]:
    """Examples {prompt, turns, answer, ids} of rows with the columns of TRL (`prompt` or `messages`; `answer` or
    `solution`) or GSM8K (`question`, `answer`). A prompt is a string or a list of {role, content}.

    Raises ValueError for a row without a prompt, and if more than 1% of the prompts have over max_length tokens or
    characters that the tokenizer does not know. Fewer are left out."""
    examples, left_out = [], []
    unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, None}
    for number, row in enumerate(rows, 1):
        turns = next((row[key] for key in ("prompt", "question", "messages") if row.get(key)), None)
        answer = next((str(row[key]) for key in ("answer", "solution") if row.get(key) is not None), None)
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) and turn.get("content") for turn in turns):
            raise ValueError(f"--dataset-name: row {number} has the columns {sorted(row)}; it needs `prompt`, `question` "
                             "or `messages`, a text or a list of {role, content}")
        if turns[-1]["role"] == "assistant":  # `messages` may include the answer
            turns = turns[:-1]
        prompt = "\n".join(turn["content"] for turn in turns)
        if tokenizer.chat_template is None:
            ids = tokenizer(prompt).input_ids
            ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers end every text
        else:
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        if len(ids) > max_length or unknown & set(ids):
            left_out.append(f"row {number} has {len(ids)} tokens, {len(unknown & set(ids))} of them unknown")
        else:
            examples.append({"prompt": prompt, "turns": turns, "answer": answer, "ids": ids})
    if len(left_out) > len(rows) / 100:
        raise ValueError(f"--dataset-name: {len(left_out)} of {len(rows)} prompts are longer than {max_length} tokens "
                         f"or have characters that the tokenizer does not know: {left_out[0]}")
    if left_out and os.environ.get("RANK", "0") == "0":
        print(f"{len(left_out)} of {len(rows)} prompts are left out: {left_out[0]}")
    return examples


def hold_out(examples: list[dict], max_count: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out examples: at most max_count and at most a tenth. Rows of one prompt stay together."""
    groups = defaultdict(list)
    for example in examples:
        groups[tuple(example["ids"])].append(example)
    train, held_out = [], []
    for group in reversed(groups.values()):
        fits = len(held_out) + len(group) <= min(max_count, len(examples) // 10)
        (held_out if fits else train).extend(group)
    if not held_out:
        raise ValueError(f"--dataset-name has {len(examples)} rows with {len(groups)} prompts and no test split: too "
                         "few to hold out a tenth")
    return train, held_out


def data_order(start: int, count: int, size: int, seed: int) -> list[int]:
    """Row indices at positions start..start+count-1 of endless passes over size rows, each epoch in a new order.

    There is no state: a resumed run only needs its step."""
    positions = range(start, start + count)
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(range(size), size) for epoch in {p // size for p in positions}}
    return [orders[p // size][p % size] for p in positions]


# ---- model -----------------------------------------------------------------------------------------------------------

SFT_BATCH_SIZE, SFT_LEARNING_RATE = 128, 4e-3  # found by trial


def write_embedded_model(folder: str, rows: list[dict], steps: int, seed: int, device: torch.device) -> None:
    """Train a Llama of 0.5M parameters with a character tokenizer on demonstrations; write a Hugging Face folder."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *"0123456789+-="])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=128**-0.5, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )).to(device)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LEARNING_RATE, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, 50, "cosine"))
    for _ in trange(steps, desc="supervised", leave=False):
        batch = rng.choices(rows, k=SFT_BATCH_SIZE)
        texts = [row["prompt"] + demonstrate(row, rng) + tokenizer.eos_token for row in batch]
        ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(device)  # (B, L)
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        labels[:, : len("47+85=")] = -100  # the prompt is not learned
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss  # causal attention: padding needs no mask
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_pretrained(
    name: str, flag: str, auto_class: type = AutoModelForCausalLM
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in fp32 (bf16 weights would swallow updates of a small learning rate) without dropout; its tokenizer."""
    folder = Path(name)
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"{flag} {name}: there is no such folder")
    if folder.is_dir() and not ((folder / "config.json").is_file() and [*folder.glob("*token*"), *folder.glob("vocab*")]):
        raise ValueError(f"{flag} {name} must hold config.json and a tokenizer's files. A run's model is in its model/")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = AutoConfig.from_pretrained(name)
        for part in (config, config.get_text_config()):
            for key, value in vars(part).items():
                if isinstance(value, float) and ("dropout" in key or "pdrop" in key):
                    setattr(part, key, 0.0)
        model, report = auto_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{flag} {name} cannot be loaded: {error}") from error
    if report["missing_keys"]:
        raise ValueError(f"{flag} {name} has no weights for {sorted(report['missing_keys'])[:3]}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks come from lengths, not from ids
    return model, tokenizer


def make_microbatches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Row indices in batches of similar length with rows * longest row <= max_tokens. A longer row goes alone."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):  # ascending: the newest row is the longest
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def load_reward_model(
    name: str, normalize: bool, max_tokens: int, device: torch.device, bf16: bool
) -> Callable[[list[dict], list[str]], Tensor]:
    """A function score(examples, texts) -> (B,): the logit of a sequence classifier for each prompt with its completion.

    It reads them through its own tokenizer, and its chat template if it has one, cut at the classifier's context."""
    model, tokenizer = load_pretrained(name, "--reward-model-path", AutoModelForSequenceClassification)
    if model.config.num_labels != 1:
        raise ValueError(f"--reward-model-path {name} must have one logit, not {model.config.num_labels}")
    if normalize and not hasattr(model.config, "reward_std"):
        raise ValueError(f"--normalize-reward-model: {name} has no reward_mean and reward_std in its config")
    model.to(device)
    model.config.pad_token_id = tokenizer.pad_token_id  # tells transformers which token is the last
    tokenizer.truncation_side = "right"
    max_length = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 2**20))
    options = {"truncation": True, "max_length": max_length}

    @torch.no_grad()
    def score(examples: list[dict], texts: list[str]) -> Tensor:
        if tokenizer.chat_template is None:
            ids = [tokenizer(e["prompt"] + text, **options).input_ids for e, text in zip(examples, texts)]
        else:
            chats = [[*e["turns"], {"role": "assistant", "content": text}] for e, text in zip(examples, texts)]
            ids = [tokenizer.apply_chat_template(c, tokenize=True, return_dict=False, **options) for c in chats]
        scores = torch.zeros(len(ids))
        for mb in make_microbatches([len(x) for x in ids], max_tokens):
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in mb]}, padding_side="right", return_tensors="pt")
            inputs = {key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}  # (b, L)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                if not isinstance(getattr(model, "score", None), nn.Linear):
                    scores[mb] = model(**inputs).logits[:, 0].float().cpu()
                    continue
                hidden = model.base_model(**inputs).last_hidden_state  # (b, L, H)
            last = inputs["attention_mask"].sum(1) - 1  # (b,)
            scores[mb] = model.score(hidden[range(len(mb)), last].float())[:, 0].cpu()  # in bf16 it would be rounded
        return (scores - model.config.reward_mean) / model.config.reward_std if normalize else scores

    return score


# ---- log-probabilities -----------------------------------------------------------------------------------------------

TILE = {"cpu": 2**20, "cuda": 2**26}  # logits at a time: few enough for a CPU's cache, enough to fill a GPU


class TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target], (N,) in fp32, without an (N, V) tensor: by tiles of the
    vocabulary, in the forward and in the backward pass. hidden (N, H), weight (V, H), target (N,)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        h = hidden.to(dtype)  # (N, H)
        logit = torch.zeros(len(h), device=h.device)  # (N,)
        logsumexp = torch.full_like(logit, -torch.inf)  # (N,)
        size = max(1, TILE[h.device.type] // max(1, len(h)))
        for start in range(0, len(weight), size):
            logits = (h @ weight[start : start + size].to(dtype).T).float().div_(temperature)  # (N, size)
            logsumexp = torch.logaddexp(logsumexp, logits.logsumexp(1))
            inside = ((target >= start) & (target < start + size)).nonzero()[:, 0]  # rows with their target here
            logit[inside] = logits[inside, target[inside] - start]
        ctx.save_for_backward(h, weight, target, logsumexp)
        ctx.temperature, ctx.size, ctx.hidden_dtype = temperature, size, hidden.dtype
        return logit - logsumexp

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        h, weight, target, logsumexp = ctx.saved_tensors
        d_hidden, d_weight = torch.zeros_like(h, dtype=torch.float32), torch.empty_like(weight)  # (N, H), (V, H)
        for start in range(0, len(weight), ctx.size):
            w = weight[start : start + ctx.size].to(h.dtype)  # (size, H)
            # d logprob / d logits = onehot(target) - softmax, in fp32: both are near 1 for most tokens
            d = (h @ w.T).float().div_(ctx.temperature).sub_(logsumexp[:, None]).exp_().neg_()  # (N, size)
            inside = ((target >= start) & (target < start + ctx.size)).nonzero()[:, 0]
            d[inside, target[inside] - start] += 1
            d = d.mul_(grad[:, None] / ctx.temperature).to(h.dtype)
            d_hidden += d @ w
            d_weight[start : start + ctx.size] = d.T @ h
        return d_hidden.to(ctx.hidden_dtype), d_weight, None, None, None


def fits_tree(model: PreTrainedModel) -> bool:
    """Whether a row may hold several completions. Sliding windows and linear attention do not take a tree mask."""
    config = model.config.get_text_config()
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    return full and getattr(config, "sliding_window", None) is None and model.config._attn_implementation == "sdpa"


def completion_logprobs(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]], temperature: float
) -> Tensor:
    """Log-probabilities (B, T) in fp32 of the tokens of B completions, K for each of the B/K prompts in turn; 0 after
    a completion's end. T is the longest completion's length.

    A row of the forward pass holds a prompt once and then its K completions, a tree: each completion attends to the
    prompt and to itself, and its positions go on from the prompt's end."""
    K = len(completions) // len(prompts)
    if K > 1 and not fits_tree(model):
        prompts, K = [prompt for prompt in prompts for _ in range(K)], 1
    rows, before, targets = [], [], []  # before: (row, place) of the token before each target
    for r, prompt in enumerate(prompts):
        tokens, positions, branches = [*prompt], [*range(len(prompt))], [0] * len(prompt)
        for branch, completion in enumerate(completions[r * K : (r + 1) * K], 1):
            places = [len(prompt) - 1, *range(len(tokens), len(tokens) + len(completion) - 1)]
            before += [(r, place) for place in places[: len(completion)]]
            targets += completion
            tokens += completion[:-1]  # the last token predicts nothing
            positions += range(len(prompt), len(prompt) + len(completion) - 1)
            branches += [branch] * (len(completion) - 1)
        rows.append(torch.tensor([tokens, positions, branches]).T)
    ids, position_ids, branches = pad_sequence(rows, batch_first=True).to(model.device).unbind(2)  # (R, L) each
    dtype = torch.get_autocast_dtype(ids.device.type) if torch.is_autocast_enabled(ids.device.type) else torch.float32
    inputs = {}  # K = 1: causal attention, and padding on the right needs no mask
    if K > 1:
        attend = ((branches == 0)[:, None] | (branches[:, :, None] == branches[:, None])).tril()  # (R, L, L): from, to
        mask = torch.zeros(attend.shape, dtype=dtype, device=ids.device)  # SDPA would convert a bool one in each layer
        inputs = {"attention_mask": mask.masked_fill_(~attend, torch.finfo(dtype).min)[:, None],
                  "position_ids": position_ids}
    hidden = model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state  # (R, L, H)
    row, place = torch.tensor(before, device=ids.device).T  # (N,), (N,)
    targets = torch.tensor(targets, device=ids.device)  # (N,)
    head = model.get_output_embeddings().weight  # (V, H)
    logprobs = TokenLogprobs.apply(hidden[row, place], head, targets, temperature, dtype)  # (N,)
    lengths = torch.tensor([len(completion) for completion in completions], device=ids.device)  # (B,)
    mask = torch.arange(int(lengths.max()), device=ids.device) < lengths[:, None]  # (B, T)
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, logprobs)


def pack(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]], max_tokens: int
) -> list[tuple[list[int], list[list[int]], list[list[int]]]]:
    """Micro-batches (indices of completions, prompts, completions) for completion_logprobs, each of about max_tokens.

    K completions share a row, so that their prompt is computed once. As attention to a tree is dense, with a cost of
    4 L^2 H per layer beside the 24 L H^2 of the weights, long completions share rows with fewer others."""
    G, H = len(completions) // len(prompts), model.config.get_text_config().hidden_size
    L_q, T = (sum(map(len, x)) / len(x) for x in (prompts, completions))
    longest = max(map(len, prompts)), max(map(len, completions))
    cost = {}
    for K in range(1, G + 1):
        L = L_q + K * T
        if K == 1 or (fits_tree(model) and G % K == 0 and longest[0] + K * longest[1] <= max_tokens):
            cost[K] = L / K * (1 + L / (6 * H))
    K = min(cost, key=cost.get)
    rows = range(len(completions) // K)
    lengths = [len(prompts[r * K // G]) + sum(map(len, completions[r * K : (r + 1) * K])) for r in rows]
    microbatches = []
    for batch in make_microbatches(lengths, max_tokens):
        indices = [i for r in batch for i in range(r * K, (r + 1) * K)]
        microbatches.append((indices, [prompts[r * K // G] for r in batch], [completions[i] for i in indices]))
    return microbatches


# ---- rollout ---------------------------------------------------------------------------------------------------------


class KeyValueCache(DynamicCache):
    """Keys take the values' dtype: autocast leaves RoPE's keys in fp32, and SDPA would cast all of them every token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens (B,) from softmax(logits / temperature) by the inverse of its CDF at uniform (B,) in fp64, and their
    log-probabilities (B,). Temperature 0: the argmax, with its log-probability at temperature 1.

    An fp32 sum or random number could not draw the tail of a large vocabulary."""
    tokens, logprobs = [], []
    size = max(1, TILE[logits.device.type] // logits.shape[1])
    for part, u in zip(logits.split(size), uniform.split(size)):  # (b, V), (b,)
        part = part.float() / (temperature or 1.0)
        probs = part.sub_(part.amax(1, keepdim=True)).exp_()  # (b, V), up to a factor
        cdf = probs.cumsum(1, dtype=torch.float64)  # (b, V)
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)  # (b, 1)
        token = probs.argmax(1, keepdim=True) if temperature == 0 else token
        tokens.append(token[:, 0])
        logprobs.append((probs.gather(1, token) / cdf[:, -1:]).log()[:, 0].float())
    return torch.cat(tokens), torch.cat(logprobs)


@torch.no_grad()
def sample(
    model: PreTrainedModel, query: Tensor, attention_mask: Tensor, num_generations: int, max_completion_length: int,
    temperature: float, stop_ids: list[int], pad_id: int, generator: torch.Generator, rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """num_generations completions of each left-padded prompt query (P, L_q): response, logprobs (fp32) and mask, each
    (P*G, T), grouped by prompt, T the longest completion's length.

    The distribution is softmax(logits / temperature), whatever the generation config says. A completion ends with its
    first stop id, which counts, or at max_completion_length. Random numbers are drawn for the completions of all
    processes, so that the samples do not depend on the number of processes."""
    training = model.training
    model.eval()  # in training mode, gradient checkpointing drops the cache
    B, device = len(query) * num_generations, query.device
    uniform = torch.rand(max_completion_length, world_size * B, dtype=torch.float64, generator=generator)
    uniform = uniform[:, rank * B : (rank + 1) * B].to(device)  # (T, B)
    response = torch.full((B, max_completion_length), pad_id, device=device)
    logprobs = torch.zeros(B, max_completion_length, device=device)
    mask = torch.zeros(B, max_completion_length, dtype=torch.bool, device=device)
    stop = torch.tensor(stop_ids, device=device)
    padded = not bool(attention_mask.all())  # if nothing is padded, attention is faster without a mask
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (P, L_q)
    cache, ids = KeyValueCache(config=model.config), query
    rows = torch.arange(B, device=device)  # (b,): the completions that are still computed
    for t in range(max_completion_length):
        logits = model(
            input_ids=ids, attention_mask=attention_mask if padded else None, position_ids=position_ids,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # (b, V); at t = 0 of the P prompts, each read once
        if t == 0:
            first = rows // num_generations  # (B,)
            cache.reorder_cache(first)
            logits, attention_mask, position_ids = logits[first], attention_mask[first], position_ids[first, -1:]
            live = torch.ones_like(rows, dtype=torch.bool)  # (b,): those that have not stopped
        token, logprob = sample_tokens(logits, uniform[t, rows], temperature)  # (b,), (b,)
        response[rows, t] = torch.where(live, token, pad_id)
        logprobs[rows, t] = torch.where(live, logprob, 0.0)
        mask[rows, t] = live
        live = live & ~torch.isin(token, stop)
        num_live = int(live.sum())
        if num_live == 0:
            break
        if num_live <= 0.8 * len(rows):  # now and then, completions that have stopped leave the batch
            kept = live.nonzero()[:, 0]
            cache.reorder_cache(kept)
            rows, live, token, attention_mask, position_ids = (
                x[kept] for x in (rows, live, token, attention_mask, position_ids)
            )
        ids, position_ids = token[:, None], position_ids + 1  # (b, 1), (b, 1)
        attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)  # (b, L_q + t + 1)
    model.train(training)
    return response[:, : t + 1], logprobs[:, : t + 1], mask[:, : t + 1]


def rollout(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], *options
) -> tuple[list[list[int]], list[str], Tensor, Tensor]:
    """sample() for lists of token ids: completions as ids and as texts, their logprobs (P*G, T) and mask (P*G, T)."""
    query = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_attention_mask=True, return_tensors="pt")
    query = query.to(model.device)
    response, logprobs, mask = sample(model, query.input_ids, query.attention_mask, *options)
    completions = [ids[real].tolist() for ids, real in zip(response.cpu(), mask.cpu())]
    # Decoded together with the prompt: some tokenizers drop the first space of a text.
    G = len(completions) // len(prompts)
    prefixes = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    wholes = [prompts[i // G] + completion for i, completion in enumerate(completions)]
    wholes = tokenizer.batch_decode(wholes, skip_special_tokens=True)
    return completions, [text[len(prefixes[i // G]) :] for i, text in enumerate(wholes)], logprobs, mask


def check_logprobs(model: PreTrainedModel, ids: list[int]) -> None:
    """Refuse a model whose sampler and completion_logprobs disagree, as when it changes logits after its head."""
    prompts = [(ids * 8)[:8], (ids * 8)[:5]]
    query = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]], device=model.device)
    attention_mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5], device=model.device)
    response, logprobs, _ = sample(model, query, attention_mask, 2, 8, 1.0, [], 0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (completion_logprobs(model, prompts, response.tolist(), 1.0) - logprobs).abs().max()
    if not difference < 1e-2:
        raise ValueError(f"--model-name-or-path: log-probabilities of {type(model).__name__} differ by {difference:.3g} "
                         "between its generation and its hidden states: it is not supported")


# ---- running ---------------------------------------------------------------------------------------------------------


def sum_over_processes(values: dict[str, float | Tensor], device: torch.device) -> dict[str, float]:
    """Each value's sum over all processes."""
    total = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def save(run_dir: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: dict) -> None:
    """Write model/ (Hugging Face layout) and then checkpoint.pt, each aside and renamed: neither a kill nor a full disk
    damages the last checkpoint."""
    model.save_pretrained(run_dir / "model.tmp")
    tokenizer.save_pretrained(run_dir / "model.tmp")
    shutil.rmtree(run_dir / "model", ignore_errors=True)
    os.replace(run_dir / "model.tmp", run_dir / "model")
    with open(run_dir / "checkpoint.tmp", "wb") as file:
        torch.save(state, file)
    os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")


def main(args: Args) -> dict[str, float]:
    """Train. Returns the final metrics, which are also in <run folder>/summary.json."""
    # ---- set-up: flags, device, processes
    start_time, checkpoint = time.time(), None
    if args.resume is not None:
        changed = [f.name for f in fields(Args) if f.name != "resume" and getattr(args, f.name) != getattr(Args(), f.name)]
        if changed:
            raise ValueError(f"--{changed[0].replace('_', '-')} cannot be given with --resume, which uses its run's flags")
        if not Path(args.resume, "checkpoint.pt").is_file():
            raise ValueError(f"--resume {args.resume}: there is no checkpoint.pt yet, so start the run again")
        saved = json.loads(Path(args.resume, "args.json").read_text())
        if saved["script"] != Path(__file__).name:
            raise ValueError(f"--resume {args.resume} is a run of {saved['script']}, not of {Path(__file__).name}")
        args = Args(**{**saved["args"], "resume": args.resume})
        checkpoint = torch.load(Path(args.resume, "checkpoint.pt"), map_location="cpu", weights_only=True, mmap=True)
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not on_cuda:
        raise ValueError("--device cuda: torch sees no CUDA device")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_cuda else "cpu")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if on_cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if on_cuda else "gloo")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("max_steps", "save_steps", "eval_steps", "temperature", "max_completion_length", "num_iterations"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    B, G = args.generation_batch_size, args.num_generations
    if G < 2 or B <= 0 or B % (G * world_size):
        raise ValueError(f"--generation-batch-size {B} must be a multiple of --num-generations {G} (at least 2) times "
                         f"{world_size} processes")
    if args.dataset_name is not None and args.model_name_or_path is None:
        raise ValueError("--dataset-name needs --model-name-or-path: the tiny model only reads two-digit addition")

    # ---- set-up: model, data, run folder, optimizer
    task = Path(args.dataset_name).stem if args.dataset_name else "addition"
    run_time = int(sum_over_processes({"time": start_time if rank == 0 else 0.0}, device)["time"])
    run_dir = Path(args.resume or f"{args.output_dir}/{task}__{args.exp_name}__{args.seed}__{run_time}")
    embedded = args.model_name_or_path is None
    initial = f"{run_dir}/sft" if embedded else args.model_name_or_path  # the model that training starts from
    if rank == 0:
        print(run_dir)
        if embedded and args.resume is None:
            write_embedded_model(initial, addition_rows()[0], args.sft_steps, args.seed, device)
    if dist.is_initialized():
        dist.barrier()
    model, tokenizer = load_pretrained(initial, "--model-name-or-path")
    model.to(device)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    rows = load_rows(args) if args.dataset_name else addition_rows()
    train, held_out = (encode_rows(x, tokenizer, context - args.max_completion_length) for x in rows)
    if not held_out:
        train, held_out = hold_out(train, args.max_eval_samples)
    held_out = held_out[: args.max_eval_samples // world_size * world_size]
    check_logprobs(model, train[0]["ids"])
    reward_model, autocast = None, partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
    if args.reward_model_path is not None:
        reward_model = load_reward_model(
            args.reward_model_path, args.normalize_reward_model, args.max_tokens_per_microbatch, device, args.bf16
        )
    elif [function for function, weight in REWARDS if weight] == [accuracy_reward]:
        for example in train + held_out:
            if accuracy_reward("", "", example["answer"]) is None:
                raise ValueError(f"--dataset-name: the prompt {example['prompt']!r} needs a number as its `answer` or "
                                 f"`solution`, not {example['answer']!r}; or use another reward")
    ref_model = load_pretrained(initial, "--model-name-or-path")[0].to(device) if args.beta != 0.0 else None
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    eos_ids = model.generation_config.eos_token_id
    eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    stop_ids = sorted({*eos_ids, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate or (1e-3 if embedded else 1e-6), weight_decay=0.0, fused=True
    )
    total, warmup = args.max_steps * args.num_iterations, args.warmup_steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, total, warmup, args.lr_scheduler_type)
    )
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    metrics, first_step, num_tokens, seconds_before = {}, 0, 0, 0.0
    if checkpoint is not None:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        metrics, first_step, num_tokens = checkpoint["metrics"], checkpoint["step"], checkpoint["num_tokens"]
        seconds_before = checkpoint["seconds"]
        del checkpoint
    if rank == 0:
        writer = SummaryWriter(run_dir, purge_step=first_step + 1)
        if args.resume is None:
            flags = json.dumps({"script": Path(__file__).name, "args": asdict(args)}, indent=2)
            (run_dir / "args.json").write_text(flags)
            writer.add_text("hyperparameters", f"```\n{flags}\n```")

    def evaluate(step: int) -> dict[str, float]:
        """Metrics on held-out prompts: --eval-generations samples at temperature 1, the same random numbers every time,
        and one greedy completion."""
        reference = ref_model or load_pretrained(initial, "--model-name-or-path")[0].to(device)
        generator = torch.Generator().manual_seed(args.seed)
        sums, table = defaultdict(float), "| prompt | completion | reward |\n|---|---|---|\n"
        for K, temperature, suffix in ((args.eval_generations, 1.0, ""), (1, 0.0, "_greedy")):
            for start in range(0, len(held_out), B // G):
                batch = held_out[start : start + B // G]
                batch = batch[rank * len(batch) // world_size : (rank + 1) * len(batch) // world_size]
                prompts = [example["ids"] for example in batch]
                with autocast():
                    completions, texts, logprobs, mask = rollout(
                        model, tokenizer, prompts, K, args.max_completion_length, temperature, stop_ids,
                        tokenizer.pad_token_id, generator, rank, world_size,
                    )  # logprobs, mask (P*K, T)
                examples = [example for example in batch for _ in range(K)]
                rewards, rewards_by_name = score_completions(examples, texts, reward_model)  # (P*K,), each (P*K,)
                values = {f"{name.removesuffix('_reward')}{suffix}": x for name, x in rewards_by_name.items()}
                values[f"reward{suffix}"] = rewards
                if temperature == 1.0:
                    values["mean_length"] = mask.sum(1).float()
                    if "accuracy" in values:
                        values[f"pass@{K}"] = values["accuracy"].view(-1, K).amax(1)  # (P,)
                    values["kl"] = logprobs.sum(1)  # (P*K,): log pi - log pi_ref of a whole completion
                    for mb, mb_prompts, mb_completions in pack(
                        model, prompts, completions, args.max_tokens_per_microbatch
                    ):
                        with torch.no_grad(), autocast():
                            ref_logprobs = completion_logprobs(reference, mb_prompts, mb_completions, 1.0)  # (b, T)
                        values["kl"][mb] -= ref_logprobs.sum(1)
                    for i in range(0, min(len(texts), 8 * K) if start == 0 else 0, K):
                        cells = [examples[i]["prompt"], texts[i], f"{rewards[i]:.2f}"]
                        table += "| " + " | ".join(x.replace("|", "\\|").replace("\n", " ") for x in cells) + " |\n"
                for name, x in values.items():
                    sums[f"eval/{name}"] += x.nansum()
                    sums[f"eval/{name}/n"] += (~x.isnan()).sum()
        sums = sum_over_processes(sums, device)
        results = {name: total / sums[f"{name}/n"] for name, total in sums.items() if sums.get(f"{name}/n")}
        if rank == 0:
            writer.add_text("samples", table, step)
            for name, value in results.items():
                writer.add_scalar(name, value, step)
        return results

    if args.resume is None:
        metrics = {f"{name}_before": value for name, value in evaluate(0).items()}

    bar = trange(first_step, args.max_steps, initial=first_step, total=args.max_steps, disable=rank != 0)
    for step in bar:
        # ---- rollout
        step_start = time.time()
        batch = [train[i] for i in data_order(step * (B // G), B // G, len(train), args.seed)]
        batch = batch[rank * len(batch) // world_size : (rank + 1) * len(batch) // world_size]
        prompts = [example["ids"] for example in batch]
        generator = torch.Generator().manual_seed(args.seed * 1_000_000 + step)  # no state to save
        with autocast():
            completions, texts, sampler_logprobs, mask = rollout(
                model, tokenizer, prompts, G, args.max_completion_length, args.temperature, stop_ids,
                tokenizer.pad_token_id, generator, rank, world_size,
            )  # sampler_logprobs, mask (P*G, T)
        stopped = torch.tensor([completion[-1] in stop_ids for completion in completions], device=device)  # (P*G,)

        # ---- reward
        examples = [example for example in batch for _ in range(G)]
        rewards, rewards_by_name = score_completions(examples, texts, reward_model)  # (P*G,), each (P*G,)
        rewards = rewards.view(-1, G)  # (P, G)

        # ---- advantage
        advantages = group_advantages(rewards, args.scale_rewards)  # (P, G)
        # A group of equal rewards has no gradient, so it skips the update, unless there is a KL to learn from.
        used = advantages.any(1) | (args.beta != 0.0)  # (P,)
        used[0] |= ~used.any()  # every process takes part in the update
        loss_mask = mask & stopped[:, None] if args.mask_truncated_completions else mask  # (P*G, T)
        totals = {"loss_tokens": loss_mask.sum(), "used_tokens": (loss_mask * used.repeat_interleave(G)[:, None]).sum()}
        for name, values in rewards_by_name.items():
            totals |= {name: values.nansum(), f"{name}/n": (~values.isnan()).sum()}
        totals = sum_over_processes(totals, device)

        # ---- update
        rows = used.repeat_interleave(G).nonzero()[:, 0].tolist()  # the U completions in the update
        advantages, loss_mask = advantages.flatten()[rows].to(device), loss_mask[rows]  # (U,), (U, T)
        update_prompts, update_completions = [prompts[i // G] for i in rows[::G]], [completions[i] for i in rows]
        microbatches = pack(model, update_prompts, update_completions, args.max_tokens_per_microbatch)
        old_logprobs, ref_logprobs, logs = [], [], defaultdict(float)
        difference_max = torch.zeros((), device=device)
        model.train()
        for iteration in range(args.num_iterations):
            for n, (mb, mb_prompts, mb_completions) in enumerate(microbatches):
                inputs = mb_prompts, mb_completions, args.temperature
                with autocast():
                    mb_logprobs = completion_logprobs(model, *inputs)  # (b, T)
                mb_mask = loss_mask[mb, : mb_logprobs.shape[1]]  # (b, T)
                if iteration == 0:
                    # The sampler's log-probabilities are rounded otherwise, by more than GSPO's epsilons in bf16.
                    old_logprobs.append(mb_logprobs.detach())
                    with torch.no_grad(), autocast():
                        ref_logprobs.append(completion_logprobs(ref_model, *inputs) if ref_model else None)
                    difference = (old_logprobs[n] - sampler_logprobs[rows][mb, : mb_logprobs.shape[1]]).abs()
                    difference_max = torch.maximum(difference_max, difference.max())
                    logs["train/sampling/sampling_logp_difference/mean"] += difference.sum() / totals["used_tokens"]
                loss, stats = grpo_loss(
                    mb_logprobs, old_logprobs[n], advantages[mb], mb_mask, args.epsilon, args.epsilon_high,
                    args.loss_type, ref_logprobs[n], args.beta, args.max_completion_length,
                    args.importance_sampling_level, max(1.0, totals["loss_tokens"]), B,
                )
                loss.backward()
                for name, value in {"train/loss": loss.detach(), **stats}.items():
                    logs[name] += value / args.num_iterations
            if dist.is_initialized():  # by hand: DDP needs the same number of micro-batches in every process
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, error_if_nonfinite=True)
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()  # so that gradients take no memory during the next rollout

        # ---- log: each value is this process's share of the mean over all processes
        logs["policy/approxkl_avg"] *= totals["loss_tokens"] / max(1.0, totals["used_tokens"])
        logs |= {
            "train/reward": rewards.sum() / B,
            "train/reward_std": rewards.std(1).sum() * G / B,
            "train/frac_reward_zero_std": (rewards.amax(1) == rewards.amin(1)).sum() * G / B,
            "train/completions/mean_length": mask.sum() / B,
            "train/completions/clipped_ratio": (~stopped).sum() / B,
            "entropy": -sampler_logprobs.sum(), "tokens": mask.sum(), "prompt_tokens": sum(map(len, prompts)) * G,
        }
        logs = sum_over_processes(logs, device)
        tokens = logs.pop("tokens")
        num_tokens += int(tokens + logs.pop("prompt_tokens"))
        for name in rewards_by_name:
            if totals[f"{name}/n"]:
                logs[f"train/rewards/{name}/mean"] = totals[name] / totals[f"{name}/n"]
        if dist.is_initialized():
            dist.all_reduce(difference_max, dist.ReduceOp.MAX)
        logs |= {
            "train/entropy": logs.pop("entropy") / tokens,  # unbiased: the tokens are the policy's own samples
            "train/sampling/sampling_logp_difference/max": difference_max.item(),
            "train/grad_norm": grad_norm.item(),
            "train/num_tokens": num_tokens,
            "charts/learning_rate": learning_rate,
            "charts/SPS": tokens / (time.time() - step_start),
        }
        bar.set_postfix_str(f"reward {logs['train/reward']:.2f}, length {logs['train/completions/mean_length']:.1f}")

        # ---- evaluate, save
        done = step + 1
        if rank == 0:
            for name, value in logs.items():
                writer.add_scalar(name, value, done)
        if done % args.eval_steps == 0 and done < args.max_steps:
            evaluate(done)
        if rank == 0 and (done % args.save_steps == 0 or done == args.max_steps):
            save(run_dir, model, tokenizer, {
                **{name: part.state_dict() for name, part in state.items()}, "metrics": metrics, "step": done,
                "num_tokens": num_tokens, "seconds": seconds_before + time.time() - start_time,
            })

    metrics |= evaluate(args.max_steps)
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
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError, TemplateError, SafetensorError, datasets.exceptions.DatasetsError) as error:
        where = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__][-1]
        if isinstance(error, datasets.exceptions.DatasetsError):  # its own message does not say what is wrong
            error = error.__cause__ or error
        print(f"error: {' '.join(str(error).split())} ({Path(__file__).name}, line {where})", file=sys.stderr)
        raise SystemExit(2) from None
