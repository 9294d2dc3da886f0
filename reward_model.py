# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0",
#                 "datasets==5.2.0", "tqdm==4.70.1"]
# ///
"""Reward model: learn to score answers from human preferences.

Each prompt x comes with answers that a person has ranked. A language model reads the prompt with
one answer, and a linear head on the last hidden state gives its reward r(x, y). Training maximizes
the likelihood of the rankings, in which y_i is preferred to y_j with probability
sigmoid(r(x, y_i) - r(x, y_j)):

    L = -E[ log sigmoid(r(x, y_w) - r(x, y_l) - m) ]                              two answers
    L = -E[ sum_k log( exp r(x, y_k) / sum_{j >= k} exp r(x, y_j) ) ]             K, best first

    two answers       Bradley and Terry 1952; arXiv:1706.03741. A column `margin` holds m, by which
                      the better answer must lead (Llama 2, arXiv:2307.09288, eq. 2)
    K answers         Plackett 1975, Luce 1959: the best is chosen among all, then the second best
                      among the others, and so on. The default
    K answers, pairs  InstructGPT, arXiv:2203.02155, eq. 1: the mean of the first loss over all
                      pairs of a ranking. --ranking-loss all_pairs
    centered          arXiv:2312.09244, eq. 2: adds the squared sum of the rewards of a ranking.
                      --center-rewards-coefficient 0.01

Comparisons tell nothing of a constant that is added to all rewards of a prompt. So the saved
configuration holds the mean and the standard deviation of the rewards of some training answers
(reward_mean, reward_std), by which a reader can normalize them. Compare accuracy with
accuracy_longer, the share of pairs in which the longer answer is preferred: a model that learned
nothing but length has the second.

    python reward_model.py                            # laptop, offline: a tiny model checks sums
    python reward_model.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset-name trl-lib/ultrafeedback_binarized      # one GPU
    torchrun --nproc-per-node=8 reward_model.py ...   # 8 GPUs: the same batch, split by rankings
    python reward_model.py --resume runs/<run folder> # continue exactly from the last checkpoint

The first takes about seven minutes on one core. Of two answers to a held-out sum, one right and one
off by 1, it then prefers the right one in 0.99 of the pairs (the longer one is right in 0.82).

Shapes: R rankings of a micro-batch, K answers of each, B = R K rows of L tokens: prompt and answer,
H hidden size. Masks are True for answers that exist.

Flags stand in three groups: --exp-name to --resume are common to all six scripts,
--model-name-or-path to --sft-steps to the four that train language models; the rest is this one's.

Deliberately not here: process rewards, several heads, generative judges, LoRA (adapters would be
saved without the new head), sharded weights.
"""

import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, LlamaConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

VERSION = "reward_model.py 0.3.0"  # --resume refuses the runs of other scripts and versions


@dataclass
class Args:
    """Reward model: learn to score answers from human preferences."""

    # ---- common to all scripts
    exp_name: str = "reward_model"  # part of the run folder's name
    seed: int = 1  # seeds initial weights, data order and sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if available
    output_dir: str = "runs"  # parent of the run folder {task}__{exp_name}__{seed}__{unix time}
    resume: str | None = None  # run folder to continue with its own flags; pass no others

    # ---- common to the language-model scripts
    model_name_or_path: str | None = None  # hub name or folder. None: train a tiny model
    dataset_name: str | None = None  # hub name, folder, .jsonl, .parquet. None: two-digit addition
    dataset_config: str | None = None  # hub configuration, e.g. main for gsm8k
    dataset_train_split: str = "train"  # split to train on
    dataset_test_split: str = "test"  # split to evaluate on. No "test": a tenth of the prompts
    max_eval_samples: int = 256  # held-out rows to evaluate on, the same for every seed
    bf16: tyro.conf.DisallowNone[bool | None] = None  # bf16 autocast, fp32 weights. None: on CUDA
    gradient_checkpointing: bool = False  # recompute activations to save memory
    micro_batch_size: int = 8  # completions, pairs or rankings in one pass: memory and speed only
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"  # decay to almost 0
    warmup_steps: int = 0  # optimizer steps of linear warmup
    max_grad_norm: float = 1.0  # gradients are clipped to this global norm
    sft_steps: int = 1000  # supervised steps for the tiny model

    # ---- reward model
    num_train_epochs: float = 1.0  # passes over the rankings. InstructGPT (C.2) overfits with more
    max_steps: int | None = None  # optimizer steps. None: as many as --num-train-epochs takes
    eval_steps: int = 50  # steps between evaluations
    save_steps: int = 50  # steps between checkpoints
    learning_rate: float | None = None  # peak. None: 1e-5, for the tiny model 7e-4
    train_batch_size: int = 64  # rankings per optimizer step, across all processes
    max_length: int = 1024  # tokens of prompt and answer. Rankings with a longer one are left out
    ranking_loss: Literal["plackett_luce", "all_pairs"] = "plackett_luce"  # for 3 answers and more
    center_rewards_coefficient: float = 0.0  # weight of the squared sum of a ranking's rewards


class UserError(Exception):
    """A flag, file or row that the user must correct. Shown as one line, without traceback."""


# ==================================================================================================
# Method: losses, learning rate
# ==================================================================================================


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected - margin) over pairs (R,)."""
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    return -nn.functional.logsigmoid(difference).mean()


def plackett_luce_loss(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over rankings of -log prod_k exp(s_k) / sum_{j >= k} exp(s_j).

    Scores (R, K) are ordered, best first. The mask (R, K) is True where there is an answer. For two
    answers this is bradley_terry_loss.
    """
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    scores = scores.masked_fill(~mask, -torch.inf)  # (R, K)
    remaining = scores.flip(1).logcumsumexp(1).flip(1)  # (R, K): log of the sum over j >= k
    losses = torch.where(mask, remaining - scores, 0.0)  # (R, K)
    return losses.sum(1).mean()


def all_pairs_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """Mean over rankings of the mean of -log sigmoid(s_i - s_j) over their pairs i < j."""
    leads, is_pair = pairwise(scores, mask)  # (R, K (K - 1) / 2) each
    losses = torch.where(is_pair, -nn.functional.logsigmoid(leads), 0.0)
    return (losses.sum(1) / is_pair.sum(1)).mean()


def pairwise(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """s_i - s_j of all pairs i < j of each ranking, and which of them exist."""
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)  # (K (K - 1) / 2,) each
    return scores[:, i] - scores[:, j], mask[:, j]  # an answer comes with all that are better


def lr_factor(args: Args, update: int, num_updates: int) -> float:
    """Fraction of the peak learning rate at optimizer step 0 .. num_updates - 1. It is never 0."""
    if update < args.warmup_steps:
        return (update + 1) / (args.warmup_steps + 1)
    elapsed = (update - args.warmup_steps) / (num_updates - args.warmup_steps)  # 0 <= elapsed < 1
    if args.lr_scheduler_type == "linear":
        return 1 - elapsed
    if args.lr_scheduler_type == "cosine":
        return (1 + math.cos(math.pi * elapsed)) / 2
    return 1.0


# ==================================================================================================
# Preference data. A row of the dataset has one of five forms:
#
#     {"prompt": "What is 1+1?", "chosen": "2", "rejected": "3"}
#     {"prompt": "What is 1+1?", "completions": ["2", "11", "blue"]}, best first
#     {"prompt": [{"role": "user", "content": "What is 1+1?"}],
#      "chosen": [{"role": "assistant", "content": "2"}], "rejected": [...]}
#     {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}
#     {"chosen": "The sky is blue.", "rejected": "The sky is green."}
#
# The first two are read as the third if the model has a chat template. Answers may be whole
# conversations, as in the fourth, also beside a prompt. The columns `tools` and
# `chat_template_kwargs` go to the chat template. README.md turns other forms into the first.
# ==================================================================================================


@dataclass
class Ranking:
    """A row of the dataset, as tokens: answers with their prompt, best first."""

    prompt: str
    answers: list
    margin: float


# ==================================================================================================
# Scores
# ==================================================================================================


def score_answers(args: Args, model, answers: list[list[int]]) -> Tensor:
    """Scores (B,) in fp32 of answers with their prompt, read at their last tokens.

    Rows are padded on the right, so a causal model needs no mask. An encoder does.
    """
    device = model.device
    rows = [torch.tensor(answer) for answer in answers]
    ones = [torch.ones_like(row) for row in rows]
    pad_id = model.config.pad_token_id
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id).to(device)  # (B, L)
    mask = pad_sequence(ones, batch_first=True).to(device)  # (B, L)
    with autocast(args, device):
        if not hasattr(model, "score"):  # an encoder
            return model(input_ids=input_ids, attention_mask=mask).logits[:, 0].float()
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    lengths = mask.sum(1)  # (B,)
    last = hidden[torch.arange(len(rows)), lengths - 1]  # (B, H), of hidden (B, L, H)
    # In fp32, as bf16 numbers between 4 and 8 are 1/32 apart.
    return model.score(last.float())[:, 0]


# ==================================================================================================
# Training
# ==================================================================================================


def score_rankings(args: Args, model, rankings: list[Ranking]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, lengths in tokens, and mask (R, K) of the answers to rankings; 0 where is none."""
    answers = []
    for ranking in rankings:
        answers += ranking.answers
    sizes = [len(ranking.answers) for ranking in rankings]
    lengths = torch.tensor([float(len(answer)) for answer in answers], device=model.device)  # (B,)
    scores = score_answers(args, model, answers)  # (B,)
    scores = pad_sequence(scores.split(sizes), batch_first=True)  # (R, K)
    lengths = pad_sequence(lengths.split(sizes), batch_first=True)  # (R, K)
    return scores, lengths, lengths > 0


def ranking_losses(args: Args, model, rankings: list[Ranking]) -> tuple[Tensor, dict[str, list]]:
    """The mean loss of rankings, all of two answers or all of more; and lists of what is logged."""
    scores, lengths, mask = score_rankings(args, model, rankings)  # (R, K) each
    if scores.shape[1] == 2:
        margins = torch.tensor([ranking.margin for ranking in rankings], device=model.device)
        loss = bradley_terry_loss(scores[:, 0], scores[:, 1], margins)
    elif args.ranking_loss == "plackett_luce":
        loss = plackett_luce_loss(scores, mask)
    else:
        loss = all_pairs_loss(scores, mask)
    loss = loss + args.center_rewards_coefficient * scores.sum(1).square().mean()

    leads, is_pair = pairwise(scores.detach(), mask)  # of the better answers, (R, K (K - 1) / 2)
    length_leads, _ = pairwise(lengths, mask)
    stats = {
        "loss": [loss.item()] * len(rankings),
        "accuracy": share_right(leads[is_pair]),
        "accuracy_longer": share_right(length_leads[is_pair]),
        "margin": leads[is_pair].tolist(),
        "mean_reward": scores[mask].tolist(),
    }
    return loss, stats


def share_right(leads: Tensor) -> list[float]:
    """1 for a lead above 0, 0 for one below, 0.5 for a tie."""
    return ((leads.sign() + 1) / 2).tolist()


def longest(ranking: Ranking) -> int:
    return max(len(answer) for answer in ranking.answers)


def split_by_shape(args: Args, rankings: list[Ranking], indices: list[int]) -> list[list[int]]:
    """Micro-batches: indices of pairs, then of longer rankings, each of similar lengths."""
    pairs = [i for i in indices if len(rankings[i].answers) == 2]
    others = [i for i in indices if len(rankings[i].answers) > 2]
    microbatches = []
    for group in (pairs, others):
        by_length = sorted(group, key=lambda i: longest(rankings[i]))
        for start in range(0, len(by_length), args.micro_batch_size):
            microbatches.append(by_length[start : start + args.micro_batch_size])
    return microbatches


@torch.no_grad()
def evaluate(
    args: Args,
    model,
    rankings: list[Ranking],
    indices: list[int],  # of the held-out rankings that this process evaluates
    step: int,
    writer: SummaryWriter | None,
) -> dict[str, float]:
    """Means over all pairs of the held-out rankings."""
    model.eval()
    values = defaultdict(list)
    for rows in split_by_shape(args, rankings, indices):
        _, stats = ranking_losses(args, model, [rankings[i] for i in rows])
        for name, numbers in stats.items():
            values[f"eval/{name}"] += numbers
    metrics = means(gather(values))
    if writer is not None:
        write_logs(writer, metrics, step)
    return metrics


@torch.no_grad()
def measure_rewards(args: Args, model, rankings: list[Ranking]) -> None:
    """Write the mean and the standard deviation of the rewards into the model's configuration."""
    model.eval()
    rewards = []
    for start in range(0, len(rankings), args.micro_batch_size):
        answers = []
        for ranking in rankings[start : start + args.micro_batch_size]:
            answers += ranking.answers
        rewards += score_answers(args, model, answers).tolist()
    model.config.reward_mean = torch.tensor(rewards).mean().item()
    model.config.reward_std = torch.tensor(rewards).std().item()


def main(args: Args) -> dict[str, float]:
    """Train. Returns the final metrics, which are also saved as <run folder>/summary.json."""
    start_time = time.time()

    # ---- flags, processes, run folder
    checkpoint = None
    date_string = time.strftime("%d %b %Y")  # Llama 3's chat template writes it into the prompt
    if args.resume is not None:
        args, checkpoint = load_checkpoint(args)
        date_string = checkpoint["date_string"]
    rank, world_size, device = start_processes(args)
    args = replace(args)  # the caller's flags stay as they are
    if args.bf16 is None:
        args.bf16 = device.type == "cuda"
    if args.learning_rate is None:
        args.learning_rate = 7e-4 if args.model_name_or_path is None else 1e-5
    check_args(args, world_size)
    run_dir = Path(args.resume or new_run_folder(args, rank))
    if rank == 0:
        print(run_dir)

    # ---- model
    initial = args.model_name_or_path
    if initial is None:
        initial = str(run_dir / "sft")
        if rank == 0 and checkpoint is None:
            write_tiny_model(initial, args, device)
        if world_size > 1:
            dist.barrier()
    model, tokenizer = load_classifier(initial, args, device)

    # ---- data, shuffled anew in each epoch
    train, held_out = load_rankings(args, model, tokenizer, date_string, rank)
    if args.max_steps is None:
        args.max_steps = max(1, round(args.num_train_epochs * len(train) / args.train_batch_size))
    order = []
    while len(order) < args.max_steps * args.train_batch_size:
        rng = random.Random(named_seed(args.seed, "order", len(order)))
        order += rng.sample(range(len(train)), len(train))
    eval_indices = list(range(len(held_out)))[rank::world_size]

    # ---- optimizer, checkpoint
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    first_step = 0
    if checkpoint is not None:
        first_step = checkpoint["step"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        model.load_state_dict(checkpoint["model"])
    writer = None
    if rank == 0:
        writer = SummaryWriter(run_dir, purge_step=first_step + 1)

    # ---- loop
    if checkpoint is None:
        before = evaluate(args, model, held_out, eval_indices, step=0, writer=writer)
        metrics = before
    else:
        before = checkpoint["before"]
        metrics = checkpoint["metrics"]
    bar = trange(
        first_step, args.max_steps, initial=first_step, total=args.max_steps, disable=rank > 0
    )
    for step in bar:
        # ---- update. Losses and gradients add up over all micro-batches and processes
        batch = order[step * args.train_batch_size : (step + 1) * args.train_batch_size]
        model.train()  # all dropout is off; gradient checkpointing acts in this mode only
        values = defaultdict(list)
        for rows in split_by_shape(args, train, batch[rank::world_size]):
            loss, stats = ranking_losses(args, model, [train[i] for i in rows])
            loss = loss * len(rows) / args.train_batch_size
            loss.backward()
            for name, numbers in stats.items():
                values[f"train/{name}"] += numbers
        for p in model.parameters():
            if p.grad is not None:
                total(p.grad)
        grad_norm = nn.utils.clip_grad_norm_(
            model.parameters(), args.max_grad_norm, error_if_nonfinite=True
        )
        learning_rate = args.learning_rate * lr_factor(args, step, num_updates=args.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

        # ---- log: means over the whole update and all processes
        logs = means(gather(values))
        logs["train/grad_norm"] = grad_norm.item()
        logs["train/epoch"] = (step + 1) * args.train_batch_size / len(train)
        logs["charts/learning_rate"] = learning_rate
        bar.set_postfix(loss=logs["train/loss"], accuracy=logs["train/accuracy"])
        if writer is not None:
            write_logs(writer, logs, step + 1)

        # ---- evaluate, save
        is_last = step + 1 == args.max_steps
        if is_last or (step + 1) % args.eval_steps == 0:
            metrics = evaluate(args, model, held_out, eval_indices, step=step + 1, writer=writer)
        if rank == 0 and (is_last or (step + 1) % args.save_steps == 0):
            writer.flush()
            num_measured = min(args.max_eval_samples, len(train))
            measure_rewards(args, model, [train[i] for i in order[:num_measured]])
            state = {
                "step": step + 1,
                "date_string": date_string,
                "before": before,
                "metrics": metrics,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save_checkpoint(run_dir, model, tokenizer, state)

    # ---- final metrics
    summary = {"seed": args.seed, "wall_seconds": time.time() - start_time}
    for name, value in metrics.items():
        summary[name] = value
        summary[f"{name}_before"] = before.get(name, math.nan)
    if writer is not None:
        writer.close()
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
        for name, value in metrics.items():
            print(f"{name}: {before.get(name, math.nan):.3f} -> {value:.3f}")
        print(run_dir)
    if world_size > 1:
        dist.destroy_process_group()
    return summary


# ==================================================================================================
# Supporting code: numbers, logs
# ==================================================================================================


def named_seed(seed: int, purpose: str, number: int) -> int:
    """Random numbers are functions of (seed, purpose, number): --resume has no state to restore."""
    return random.Random(f"{seed} {purpose} {number}").getrandbits(63)


def autocast(args: Args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


def write_logs(writer: SummaryWriter, logs: dict[str, float], step: int) -> None:
    for name, value in logs.items():
        writer.add_scalar(name, value, step)


# ==================================================================================================
# Supporting code: data
# ==================================================================================================


def load_rows(args: Args) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and rows to evaluate on: none where they are to be held out."""
    path = Path(args.dataset_name)
    try:
        if path.is_file():
            splits = load_dataset(str(path.resolve().parent), data_files=path.name)
        else:
            splits = load_dataset(args.dataset_name, args.dataset_config)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"--dataset-name {path}: {error.__cause__ or error}") from error
    needed = [args.dataset_train_split]
    if args.dataset_test_split != "test":  # only "test" may be missing
        needed.append(args.dataset_test_split)
    for split in needed:
        if split not in splits:
            raise UserError(f"--dataset-name {path} has no split {split}, but {list(splits)}")
    train_rows = list(splits[args.dataset_train_split])
    test_rows = []
    if args.dataset_test_split in splits and args.dataset_test_split != args.dataset_train_split:
        test_rows = list(splits[args.dataset_test_split])
    return train_rows, test_rows


def check_columns(rows: list[dict], used: tuple, rank: int) -> None:
    """Refuse rows whose prompt stands in another column. Print the columns that are not used."""
    if not rows:
        raise UserError("--dataset-name has no rows")
    columns = list(rows[0])
    for name in (
        "question",
        "query",
        "instruction",
        "input",
        "context",
        "system",
        "trajectory",
        "labels",
    ):
        if "prompt" not in columns and any(isinstance(row.get(name), str) for row in rows):
            raise UserError(
                f"--dataset-name has `{name}` but no `prompt`: rename or map it (see README.md). "
                f"Its columns are {columns}"
            )
    unused = [name for name in columns if name not in used]
    if unused and rank == 0:
        print(f"columns that are not used: {unused}")


def report_left_out(reasons: list[str], num_rows: int, rank: int) -> None:
    """Print how many rows are left out, and why the first is. More than half end the run."""
    counts = f"{len(reasons)} of {num_rows} rows"
    if len(reasons) > num_rows / 2:
        raise UserError(f"--dataset-name: {counts} cannot be used; {reasons[0]}")
    if reasons and rank == 0:
        print(f"{counts} are left out; {reasons[0]}")


def separate(args: Args, train: list, held_out: list, rank: int) -> tuple[list, list]:
    """Examples that share no prompt. Without held-out ones, a tenth of the prompts is held out."""
    if not held_out:  # the same prompts for every seed
        prompts = sorted({str(example.prompt) for example in train})
        chosen = set(random.Random(0).sample(prompts, len(prompts) // 10))
        held_out = [example for example in train if str(example.prompt) in chosen]
    held_out = held_out[: args.max_eval_samples]
    prompts = {str(example.prompt) for example in held_out}
    others = [example for example in train if str(example.prompt) not in prompts]
    counts = f"{len(others)} of {len(train)} rows to train on, {len(held_out)} to evaluate on"
    if not others or not held_out:
        raise UserError(f"--dataset-name: {counts}: too few")
    if rank == 0:
        print(f"{counts}, with other prompts")
    return others, held_out


def uses_turns(rows: list[dict], tokenizer) -> bool:
    """Whether rows hold turns: lists, or texts beside a prompt for a model with a template."""
    for row in rows:
        if "prompt" in row and tokenizer.chat_template is not None:
            return True
        if isinstance(row.get("prompt"), list) or isinstance(row.get("chosen"), list):
            return True
    return False


def read_conversations(row: dict, answers: list) -> tuple[list[dict], list[list[dict]]]:
    """The prompt, and each answer with its prompt, as lists of turns.

    An answer begins with the assistant, or it is a whole conversation that contains the prompt.
    The prompt that is returned is the beginning that all have in common.
    """
    prompt = []
    if "prompt" in row:
        prompt = as_turns(row["prompt"], "user")
        if prompt[-1]["content"].strip() == "":
            raise UserError("its prompt is empty")
    wholes = []
    for answer in answers:
        turns = as_turns(answer, "assistant")
        if turns[-1]["content"].strip() == "":
            raise UserError("an answer is empty")
        if turns[0]["role"] == "assistant":
            turns = prompt + turns
        keys = turn_keys(turns)
        starts = range(len(keys))
        is_inside = any(keys[i : i + len(prompt)] == turn_keys(prompt) for i in starts)
        if turns[0]["role"] == "assistant" or not is_inside:
            raise UserError("an answer has no prompt, or another one than `prompt`")
        wholes.append(turns)
    first = turn_keys(wholes[0])
    start = min(common_length(first, turn_keys(whole)) for whole in wholes)
    prompt = wholes[0][:start]
    return prompt, [prompt + whole[start:] for whole in wholes]


def turn_keys(turns: list[dict]) -> list[tuple]:
    """What is compared of turns: other fields, and spaces around a text, may differ."""
    return [(turn["role"], turn["content"].strip()) for turn in turns]


def as_turns(value: str | list[dict], role: str) -> list[dict]:
    """A list of turns {role, content}. A text becomes a turn of this role.

    Fields that are None are left out: Parquet adds them where other turns have a value.
    """
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"empty, or neither a text nor a list of turns: {value}")
    turns = []
    for turn in value:
        is_turn = isinstance(turn, dict) and isinstance(turn.get("role"), str)
        if not is_turn or not isinstance(turn.get("content"), str):
            raise UserError(f"a turn has no role, or no text as its content: {turn}")
        turns.append({name: part for name, part in turn.items() if part is not None})
    return turns


def read_texts(row: dict, answers: list) -> tuple[str, list[str]]:
    """The prompt, and each answer with its prompt. Without `prompt` the answers are whole texts."""
    for text in answers + [row.get("prompt", "-")]:
        if not isinstance(text, str) or text.strip() == "":
            raise UserError(f"its prompt or an answer is empty, or no text: {text!r}")
    if "prompt" in row:
        return row["prompt"], [row["prompt"] + answer for answer in answers]

    # As TRL's extract_prompt: the last space belongs to the answers, and none of them is empty.
    start = min(common_length(answers[0], answer) for answer in answers[1:])
    if start == min(len(answer) for answer in answers):
        start -= 1
    elif answers[0][:start].endswith(" "):
        start -= 1
    if start == 0:
        raise UserError("its answers have no common beginning, which would be the prompt")
    return answers[0][:start], answers


def common_length(first, second) -> int:
    """The length of the longest common beginning of two lists or texts."""
    length = 0
    for x, y in zip(first, second):
        if x != y:
            break
        length += 1
    return length


def render(turns: list[dict], row: dict, tokenizer, date_string: str, is_prompt: bool) -> str:
    """The text that the chat template makes of turns."""
    if tokenizer.chat_template is None:
        raise UserError("turns need a model with a chat template")
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools)
    options = {"tools": tools, "date_string": date_string}
    if row.get("chat_template_kwargs") is not None:
        options.update(row["chat_template_kwargs"])
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=is_prompt, tokenize=False, **options
    )


def tokenize(texts: list[str], has_turns: bool, tokenizer) -> list[list[int]]:
    """Ids of texts, with their special tokens: those of the chat template; else EOS ends a text.

    EOS after a prompt does no harm, as a prompt ends where its ids and those of the answers part.
    """
    if not texts:
        return []
    rows = tokenizer(texts, add_special_tokens=not has_turns).input_ids
    for row in rows:
        if not has_turns and tokenizer.eos_token_id not in (None, row[-1]):
            row.append(tokenizer.eos_token_id)
    return rows


def check_label(row: dict) -> None:
    if row.get("label") not in (None, 1):
        raise UserError(f"its label is {row['label']}, but `chosen` must be the better answer")


def render_ranking(
    row: dict, has_turns: bool, tokenizer, date_string: str
) -> tuple[str, list[str]]:
    """The prompt, and the texts of the answers with their prompt, best first."""
    check_label(row)
    answers = row.get("completions")
    if answers is None:
        answers = [row.get("chosen"), row.get("rejected")]
    margin = row.get("margin")
    if not isinstance(answers, list) or len(answers) < 2:
        raise UserError("it has fewer than two answers")
    if margin is not None and (type(margin) not in (int, float) or not math.isfinite(margin)):
        raise UserError(f"its margin is no number: {margin}")
    if margin is not None and len(answers) > 2:
        raise UserError("it has a margin, but more than two answers")
    if not has_turns:
        return read_texts(row, answers)
    prompt, wholes = read_conversations(row, answers)
    texts = [render(whole, row, tokenizer, date_string, is_prompt=False) for whole in wholes]
    return str(prompt), texts


def make_rankings(
    rows: list[dict], tokenizer, max_length: int, date_string: str, rank: int
) -> list[Ranking]:
    """The rows that can be used, as tokens. What is left out is counted in print."""
    has_turns = uses_turns(rows, tokenizer)
    texts = []
    rankings = []
    numbers = []
    reasons = []
    for number, row in enumerate(rows, start=1):
        try:
            prompt, answers = render_ranking(row, has_turns, tokenizer, date_string)
        except (UserError, TemplateError) as error:
            reasons.append(f"row {number}: {error!r}")
            continue
        margin = 0.0 if row.get("margin") is None else float(row["margin"])
        rankings.append(Ranking(prompt, answers, margin))
        numbers.append(number)
        texts += answers
    ids = tokenize(texts, has_turns, tokenizer)
    kept = []
    start = 0
    for number, ranking in zip(numbers, rankings, strict=True):
        end = start + len(ranking.answers)
        ranking.answers = ids[start:end]
        start = end
        if max(len(answer) for answer in ranking.answers) > max_length:
            reasons.append(f"row {number}: an answer ends after --max-length {max_length} tokens")
        elif any(answer in ranking.answers[:k] for k, answer in enumerate(ranking.answers)):
            reasons.append(f"row {number}: two of its answers are the same")
        else:
            kept.append(ranking)
    report_left_out(reasons, len(rows), rank)
    return kept


def load_rankings(args: Args, model, tokenizer, date_string: str, rank: int):
    """Rankings to train on, and rankings to evaluate on, which share no prompt."""
    if args.model_name_or_path is None:
        train_rows, test_rows = addition_pairs()
    else:
        train_rows, test_rows = load_rows(args)
    used = ("prompt", "chosen", "rejected", "completions", "margin", "label")
    check_columns(train_rows, used + ("tools", "chat_template_kwargs"), rank)
    max_length = min(args.max_length, context_length(model))
    train = make_rankings(train_rows, tokenizer, max_length, date_string, rank)
    held_out = make_rankings(test_rows, tokenizer, max_length, date_string, rank)
    return separate(args, train, held_out, rank)


def context_length(model) -> int:
    """The tokens that a model can read. RoBERTa numbers positions from its padding id + 1."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            length -= module.padding_idx + 1
    return length


# ==================================================================================================
# Supporting code: models, checkpoints, processes
# ==================================================================================================


def turn_off_dropout(config: PreTrainedConfig) -> None:
    """Set the rates of dropout and router jitter to 0, also in configurations inside this one."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            turn_off_dropout(value)
        is_rate = re.search("dropout|pdrop|layerdrop|drop_path|jitter", name) is not None
        if is_rate and type(value) in (int, float):
            setattr(config, name, 0.0)


def load_config(name: str, flag: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The configuration of the model that a flag names, without dropout, and its tokenizer."""
    if Path(name, "adapter_config.json").exists():
        raise UserError(f"{flag} {name} has adapters: merge them first (see README.md)")
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{flag} {name} is no model with a tokenizer (of a run, use model/): {error}"
        )
    if hasattr(config, "quantization_config"):
        raise UserError(f"{flag} {name} is quantized: use the model from which it was made")
    turn_off_dropout(config)
    return config, tokenizer


def load_classifier(name: str, args: Args, device):
    """A model that gives a text a score, from a classifier or a language model; its tokenizer."""
    flag = "--model-name-or-path"
    config, tokenizer = load_config(name, flag)
    config.num_labels = 1
    model, report = AutoModelForSequenceClassification.from_pretrained(
        name, config=config, dtype=torch.float32, output_loading_info=True
    )

    # A new head: its outputs have a standard deviation of about 1 (arXiv:2009.01325, section 3.4).
    torch.manual_seed(named_seed(args.seed, "head", 0))
    for key in sorted(report["missing_keys"]):
        if key.startswith(model.base_model_prefix) and "pooler" not in key:
            raise UserError(f"{flag} {name} lacks weights: {key}")
        weight = model.get_parameter(key)
        if weight.dim() > 1:  # biases are 0
            nn.init.normal_(weight, std=(config.get_text_config().hidden_size + 1) ** -0.5)

    # transformers finds the last token of a padded text by the pad token, so EOS cannot be that.
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if len(tokenizer) > config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).eval(), tokenizer


def save_checkpoint(run_dir: Path, model, tokenizer, state: dict) -> None:
    """Written aside, then renamed: a kill or a full disk spares the last checkpoint."""
    model.save_pretrained(run_dir / "model.tmp")
    tokenizer.save_pretrained(run_dir / "model.tmp")
    torch.save(state, run_dir / "checkpoint.tmp")
    shutil.rmtree(run_dir / "model.old", ignore_errors=True)  # left there by a kill
    if (run_dir / "model").exists():
        os.replace(run_dir / "model", run_dir / "model.old")
    os.replace(run_dir / "model.tmp", run_dir / "model")
    os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")
    shutil.rmtree(run_dir / "model.old", ignore_errors=True)


def load_checkpoint(args: Args) -> tuple[Args, dict]:
    """The flags of a run, and its last checkpoint."""
    run_dir = Path(args.resume)
    default = vars(Args(resume=args.resume))
    changed = [name for name, value in vars(args).items() if value != default[name]]
    if changed:
        raise UserError(f"--resume goes on with the flags of the run: leave out {changed}")
    if not (run_dir / "checkpoint.pt").exists():
        raise UserError(f"--resume {run_dir} has no checkpoint.pt: misspelt, or stopped too early")
    saved = json.loads((run_dir / "args.json").read_text())
    if saved.get("version") != VERSION:
        raise UserError(f"--resume {run_dir} is no run of {VERSION}: go on with what made it")
    checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    args = Args(**saved["args"])
    args.resume = str(run_dir)
    return args, checkpoint


def new_run_folder(args: Args, rank: int) -> str:
    """Made before anything is written, so that no two runs share one."""
    task = Path(args.dataset_name or "addition").stem
    names = [f"{args.output_dir}/{task}__{args.exp_name}__{args.seed}__{int(time.time())}"]
    if rank == 0:
        try:
            os.makedirs(names[0])
        except OSError as error:
            raise UserError(f"--output-dir: {error}") from error
        flags = json.dumps({"version": VERSION, "args": vars(args)}, indent=2)
        Path(names[0], "args.json").write_text(flags)
    if dist.is_initialized():
        dist.broadcast_object_list(names)  # processes may start in different seconds
    return names[0]


def check_args(args: Args, world_size: int) -> None:
    """Refuse flags that would fail late, or do something else in silence."""
    if args.max_steps is not None and args.max_steps < 1:
        raise UserError("--max-steps must be at least 1")
    for name in ("eval_steps", "save_steps", "micro_batch_size"):
        if vars(args)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.train_batch_size < world_size:
        raise UserError("--train-batch-size must be at least the number of processes")
    if not (args.max_grad_norm > 0 and args.center_rewards_coefficient >= 0):
        raise UserError("--max-grad-norm must be above 0, --center-rewards-coefficient at least 0")
    if (args.dataset_name is None) != (args.model_name_or_path is None):
        raise UserError("--dataset-name and --model-name-or-path: give both, or none (laptop task)")


def start_processes(args: Args):
    """The rank of this process, the number of processes (torchrun's), and the device."""
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group()
    disable_progress_bar()  # of loading and saving weights
    return rank, world_size, device


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(values: dict[str, list[float]]) -> dict[str, list[float]]:
    """The lists of all processes, joined by name in the order of the processes."""
    if not dist.is_initialized():
        return values
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    joined = defaultdict(list)
    for part in parts:
        for name, numbers in part.items():
            joined[name] += numbers
    return joined


def means(values: dict[str, list[float]]) -> dict[str, float]:
    """Means of the numbers that are not nan; without a number, no mean."""
    results = {}
    for name, numbers in values.items():
        known = [number for number in numbers if not math.isnan(number)]
        if known:
            results[name] = sum(known) / len(known)
    return results


# ==================================================================================================
# Supporting code: the laptop task, two-digit addition
# ==================================================================================================


def addition_rows() -> tuple[list[dict], list[dict]]:
    """Sums a+b of two-digit numbers a <= b: 3839 to train on and 256 held-out ones."""
    rows = []
    for a in range(10, 100):
        for b in range(a, 100):
            rows.append({"prompt": f"{a}+{b}=", "answer": str(a + b)})
    random.Random(0).shuffle(rows)
    return rows[256:], rows[:256]


def demonstrate(prompt: str, rng: random.Random) -> str:
    """A quarter of the demonstrations add the units first: `66+95=` -> `6+5=11;161`.

    The others write the sum directly, forget the carry, and half the time are also off by one.
    """
    a = int(prompt[:2])
    b = int(prompt[3:5])
    units = a % 10 + b % 10
    if rng.random() < 0.25:
        return f"{a % 10}+{b % 10}={units};{a + b}"
    hasty = a + b + rng.choice([-1, 0, 0, 1])
    if units >= 10:
        hasty -= 10
    return str(hasty)


def make_batch(prompts: list[list[int]], completions: list[list[int]], device) -> dict[str, Tensor]:
    """Rows of prompt + completion, padded on the right with id 0. Masks come from lengths."""
    rows = []
    is_completion = []
    mask = []
    for prompt, completion in zip(prompts, completions, strict=True):
        row = torch.tensor(prompt + completion)
        rows.append(row)
        is_completion.append(torch.arange(len(row)) >= len(prompt))
        mask.append(torch.ones(len(completion), dtype=torch.bool))
    return {
        "input_ids": pad_sequence(rows, batch_first=True).to(device),  # (B, L + T)
        "is_completion": pad_sequence(is_completion, batch_first=True).to(device),  # (B, L + T)
        "mask": pad_sequence(mask, batch_first=True).to(device),  # (B, T)
    }


def completion_logprobs(model, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """Log-probabilities (B, T) of the completions' tokens in fp32, 0 after each one's end.

    A causal model needs no mask where rows are padded on the right.
    """
    # The logits at position t predict token t + 1. With a boolean mask, logits_to_keep returns
    # those of the True positions alone, as (N, V) (slice_logits_to_keep in transformers).
    is_target = batch["is_completion"][:, 1:]  # (B, L + T - 1)
    targets = batch["input_ids"][:, 1:][is_target]  # (N,)
    outputs = model(batch["input_ids"][:, :-1], logits_to_keep=is_target, use_cache=False)
    logits = outputs.logits.float() / temperature  # (N, V)
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")  # (N,)
    logprobs = torch.zeros(batch["mask"].shape, device=losses.device)  # (B, T)
    return logprobs.masked_scatter(batch["mask"], -losses)


def write_tiny_model(folder: str, args: Args, device) -> None:
    """Train a Llama of 0.5M parameters, whose tokens are characters, on demonstrations."""
    vocabulary = {"<eos>": 0}
    for character in "0123456789+=;":
        vocabulary[character] = len(vocabulary)
    characters = Tokenizer(models.BPE(vocabulary, merges=[]))
    characters.decoder = decoders.Fuse()
    torch.manual_seed(named_seed(args.seed, "weights", 0))
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=128**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    rng = random.Random(named_seed(args.seed, "demonstrations", 0))
    rows, _ = addition_rows()
    for step in trange(args.sft_steps, desc="supervised", leave=False):
        prompts = []
        completions = []
        for row in rng.choices(rows, k=128):
            text = demonstrate(row["prompt"], rng)
            prompts.append([vocabulary[character] for character in row["prompt"]])
            completions.append([vocabulary[character] for character in text] + [0])
        batch = make_batch(prompts, completions, device)
        loss = -completion_logprobs(model, batch, temperature=1.0).sum() / batch["mask"].sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / args.sft_steps)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>").save_pretrained(folder)


def addition_pairs() -> list[list[dict]]:
    """Twelve pairs for each sum: a right answer, mostly with its work, and one that is off by 1."""
    rng = random.Random(0)
    splits = []
    for rows in addition_rows():
        pairs = []
        for row in rows * 12:
            a = int(row["prompt"][:2])
            b = int(row["prompt"][3:5])
            work = f"{a % 10}+{b % 10}={a % 10 + b % 10};"
            right = str(a + b)
            wrong = str(a + b + rng.choice([-1, 1]))
            if rng.random() < 0.95:
                right = work + right
            if rng.random() < 1 / 3:
                wrong = work + wrong
            pairs.append({"prompt": row["prompt"], "chosen": right, "rejected": wrong})
        splits.append(pairs)
    return splits


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
