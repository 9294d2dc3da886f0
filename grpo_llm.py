# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0",
#                 "datasets==5.2.0", "tqdm==4.70.1", "peft==0.21.2"]
# ///
"""GRPO: train a language model by reinforcement learning with verifiable rewards.

For each prompt q the policy samples G completions o_1..o_G, which Python functions score. The
advantage of a completion is its reward relative to the other completions of the same prompt, so
there is no value network. The objective, to be maximized:

    A_i    = (r_i - mean(r_1..r_G)) / std(r_1..r_G)
    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)
    J      = sum_i sum_t w_i [ min(rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i)
                               - beta KL_it(pi || pi_ref) ]

w_i is the weight of each token of completion i, in a batch of M completions of |o_i| tokens:

    DAPO     arXiv:2503.14476   w_i = 1 / sum_j |o_j|      the default; eps_high > eps_low, beta 0
    GRPO     arXiv:2402.03300   w_i = 1 / (M |o_i|)        --loss-type grpo --epsilon-high 0.2
                                                           --beta 0.04; the KL is k2 times rho
                                                           where the paper has k3 (see grpo_loss)
    Dr. GRPO arXiv:2503.20783   w_i = 1 / (M T_max)        --loss-type dr_grpo --epsilon-high 0.2
                                                           --scale-rewards none
    CISPO    arXiv:2506.13585   w_i = 1 / sum_j |o_j|      --loss-type cispo --num-iterations 2; a
                                                           token's term is min(rho_it, 1 + eps_high)
                                                           A_i log pi, no gradient through rho_it
    GSPO     arXiv:2507.18071   w_i = 1 / (M |o_i|)        --importance-sampling-level sequence
                                                           --loss-type grpo --num-iterations 2
                                                           --epsilon 3e-4 --epsilon-high 4e-4; rho
                                                           of a completion, to the power 1 / |o_i|

The weight matters. With GRPO's, the longer a wrong answer is, the less each of its tokens is
punished, so wrong answers grow. With DAPO's, all tokens count alike, so long completions count
more. Dividing by the standard deviation of the rewards gives more weight to prompts that are nearly
always or nearly never solved. DAPO also has --mask-truncated-completions, and dynamic sampling,
which is not here.

With --num-iterations 1, the default, each rollout serves one optimizer step. Then rho is 1, so
clipping never acts, and the method is REINFORCE with the advantages A_i: CISPO's gradient equals
DAPO's, and GSPO's equals GRPO's. Only --num-iterations 2 or more makes them differ.

    python grpo_llm.py                             # laptop, offline: a tiny model learns to add
    python grpo_llm.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset-name openai/gsm8k --dataset-config main --max-completion-length 512   # one GPU
    torchrun --nproc-per-node=8 grpo_llm.py ...    # 8 GPUs: the same batch, split by prompts
    python grpo_llm.py --resume runs/<run folder>  # continue exactly from the last checkpoint

The first takes about two minutes on two cores. Sampled accuracy on held-out sums rises from 0.45 to
0.98, greedy accuracy from 0.56 to 1.00 (means of seeds 301 to 303).

Shapes: P prompts of this process, G completions of each, C completions that are still being
generated, B completions of a micro-batch, L prompt tokens, T completion tokens, N completion tokens
of a whole micro-batch, V vocabulary. logprobs[:, t] belongs to token t of the completion. Masks are
True for tokens that count. The last token of a completion is its stop token, unless it was cut off.

Flags stand in three groups: --exp-name to --resume are common to all six scripts,
--model-name-or-path to --sft-steps to the four that train language models; the rest is GRPO's.

Deliberately not here: inference servers, dynamic sampling, tools, images, sharded weights.
"""

import asyncio
import inspect
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
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

VERSION = "grpo_llm.py 0.3.0"  # --resume refuses the runs of other scripts and versions


@dataclass
class Args:
    """GRPO for language models with verifiable rewards."""

    # ---- common to all scripts
    exp_name: str = "grpo_llm"  # part of the run folder's name
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

    # ---- GRPO
    max_steps: int = 200  # rollouts (--num-iterations optimizer steps each)
    eval_steps: int | None = None  # steps between evaluations. None: 50, for the tiny model 5
    save_steps: int = 50  # steps between checkpoints
    learning_rate: float | None = None  # peak. None: 1e-6, for the tiny model 5e-4; LoRA: 10 times
    lora_r: int = 0  # train adapters of this rank instead of all weights. 0: off
    generation_batch_size: int = 256  # completions per rollout across all processes
    rollout_batch_size: int | None = None  # completions decoded at a time; memory only. None: all
    num_generations: int = 8  # G, completions per prompt
    max_completion_length: int = 256  # longest completion, in tokens
    temperature: float = 1.0  # divides the logits in sampling and loss, not in evaluation
    eval_generations: int = 8  # completions per held-out prompt, the k of pass@k
    loss_type: Literal["dapo", "grpo", "dr_grpo", "cispo"] = "dapo"  # see the top of this file
    scale_rewards: Literal["group", "none"] = "group"  # divide advantages by the group's std
    importance_sampling_level: Literal["token", "sequence"] = "token"  # sequence: GSPO
    epsilon: float = 0.2  # clips the probability ratio below, at 1 - epsilon (not in cispo)
    epsilon_high: float = 0.28  # clips the probability ratio above, at 1 + epsilon_high
    beta: float = 0.0  # weight of the per-token KL to the initial model
    num_iterations: int = 1  # optimizer steps per rollout (mu in GRPO); 1: on-policy
    mask_truncated_completions: bool = False  # no loss on cut-off completions (DAPO)


class UserError(Exception):
    """A flag, file or row that the user must correct. Shown as one line, without traceback."""


# ==================================================================================================
# Method: advantages, loss, learning rate
# ==================================================================================================


def group_advantages(rewards: Tensor, scale_rewards: str) -> Tensor:
    """Rewards (P, G) relative to the mean of their group.

    "group" also divides by the group's standard deviation (ddof 1) + 1e-4, as TRL does.
    """
    rewards = rewards.double()  # sums of equal rewards are exact, so their advantages are exactly 0
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    elif scale_rewards != "none":
        raise ValueError(f"unknown scale_rewards {scale_rewards!r}")
    return advantages.float()


def grpo_loss(
    logprobs: Tensor,  # (B, T), of the policy, with gradient
    old_logprobs: Tensor,  # (B, T), before the first update on this rollout
    advantages: Tensor,  # (B,)
    mask: Tensor,  # (B, T), True for the tokens that count
    epsilon_low: float,
    epsilon_high: float,
    loss_type: str,
    ref_logprobs: Tensor | None = None,  # (B, T), of the initial model; needed if beta > 0
    beta: float = 0.0,
    max_completion_length: int | None = None,  # needed by dr_grpo
    importance_sampling_level: str = "token",
    num_tokens: Tensor | float | None = None,  # divisor: the tokens of the whole update
    num_sequences: int | None = None,  # divisor: the completions of the whole update
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimize, and statistics by name, which are means over tokens.

    The divisors count the whole update, over all micro-batches and processes, whose losses and
    statistics then add up. Without divisors, this micro-batch is the update.
    The value of the loss is no measure of progress: on-policy, dapo's is minus the mean advantage
    of a token, about 0. Only its gradient matters.
    """
    if num_tokens is None:
        num_tokens = mask.sum().clamp(min=1)
    if num_sequences is None:
        num_sequences = len(mask)
    advantages = advantages.unsqueeze(1)  # (B, 1)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # (B, T)
    lower = 1 - epsilon_low
    upper = 1 + epsilon_high

    # The ratio of probabilities: of a token, or the geometric mean of a completion (GSPO, eq. 7).
    if importance_sampling_level == "token":
        ratio = log_ratio.exp()  # (B, T)
    elif importance_sampling_level == "sequence":
        mean_log_ratio = log_ratio.sum(1, keepdim=True) / lengths  # (B, 1)
        ratio = mean_log_ratio.exp().expand_as(mask)  # (B, T)
    else:
        raise ValueError(f"unknown importance_sampling_level {importance_sampling_level!r}")

    # The loss of each token.
    if loss_type == "cispo":  # MiniMax-M1, eq. 4 and 5: a detached weight, no lower bound
        losses = -ratio.clamp(max=upper).detach() * advantages * logprobs  # (B, T)
        too_low = torch.zeros_like(mask)
        too_high = ratio > upper
    else:
        clipped = ratio.clamp(lower, upper)
        losses = -torch.min(ratio * advantages, clipped * advantages)  # (B, T)
        too_low = (ratio < lower) & (advantages < 0)
        too_high = (ratio > upper) & (advantages > 0)
    stats = {
        "policy/approxkl_avg": log_ratio.exp() - 1 - log_ratio,  # k3 estimate of KL(pi_old || pi)
        "train/entropy": -logprobs,  # estimated from the sampled tokens, so of the old policy's
        "train/clip_ratio/low_mean": too_low,
        "train/clip_ratio/high_mean": too_high,
    }

    # The KL term is k2, log(pi / pi_ref)^2 / 2, times the detached ratio. Its gradient is that of
    # the reverse KL of a token, also off-policy. GRPO's paper has k3 here, whose gradient is that
    # of the forward KL (joschu.net/blog/kl-approx; arXiv:2510.01555).
    if beta > 0:
        log_ratio_ref = torch.where(mask, logprobs - ref_logprobs, 0.0)  # (B, T)
        kl = log_ratio.detach().exp() * log_ratio_ref.square() / 2
        losses = losses + beta * kl
        stats["train/kl"] = torch.exp(-log_ratio_ref) - 1 + log_ratio_ref  # k3, as TRL logs it

    # The weight of each token: see the table at the top of this file.
    losses = torch.where(mask, losses, 0.0)
    if loss_type == "grpo":  # GRPO, eq. 3
        loss = (losses / lengths).sum() / num_sequences
    elif loss_type == "dr_grpo":  # Dr. GRPO, appendix C
        loss = losses.sum() / (num_sequences * max_completion_length)
    elif loss_type in ("dapo", "cispo"):  # DAPO, eq. 8
        loss = losses.sum() / num_tokens
    else:
        raise ValueError(f"unknown loss_type {loss_type!r}")

    for name, values in stats.items():
        stats[name] = torch.where(mask, values.detach(), 0.0).sum() / num_tokens
    stats["train/loss"] = loss.detach()
    return loss, stats


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
# Prompts and rewards: edit these.
#
# A reward function has TRL's signature. It gets lists with one entry for each completion: prompts,
# completions, completion_ids and every column of the dataset. It returns a list of numbers, with
# None where it does not apply. Prompts and completions are texts, or lists of turns {"role",
# "content"} where make_prompt returns such lists. Among the keywords are also trainer_state (with
# global_step and max_steps), log_metric(name, value) for a curve, log_extra(column, values) for
# the sample texts, and evaluation, True where held-out prompts are scored. A function that learns
# must not learn then, and what it has learned is not saved: --resume is exact without such a state.
# ==================================================================================================


@dataclass
class Policy:
    """What samples: a model with its tokenizer, and the tokens that end a completion."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list


@dataclass
class Example:
    """A row of the dataset, ready to be sampled from."""

    row: dict
    prompt: str | list
    prompt_ids: list


@dataclass
class Sample:
    """A completion of an example."""

    example: Example
    completion: str | list
    completion_ids: list
    is_truncated: bool  # at the maximal length, without a stop token


def make_prompt(row: dict) -> str | list[dict]:
    """The prompt of a row. A text is the turn of a user if the model has a chat template."""
    if row.get("prompt") is not None:
        return row["prompt"]
    if row.get("question") is not None:  # GSM8K
        return row["question"] + "\nThink step by step. Write the final answer in \\boxed{}."
    if row.get("messages"):  # a conversation whose last turn may be the answer
        messages = as_turns(row["messages"], "user")
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return messages
    raise UserError(f"it has no `prompt`, `question` or `messages`, but {sorted(row)}")


def accuracy_reward(completions, answer=None, solution=None, **columns) -> list[float | None]:
    """1 if the number that a completion ends with is the answer, else 0.

    None if the column `answer` (or `solution`) holds no number.
    """
    if answer is None:
        answer = solution
    if answer is None:
        answer = [None] * len(completions)
    rewards = []
    for completion, reference in zip(completions, answer, strict=True):
        expected = reference_number(reference)
        reward = None
        if expected is not None:
            reward = float(completion_number(to_text(completion)) == expected)
        rewards.append(reward)
    return rewards


def format_reward(completions, **columns) -> list[float]:
    """1 if a completion shows work before its result, as in `6+5=11;161` or `... #### 161`."""
    rewards = []
    for completion in completions:
        text = to_text(completion)
        rewards.append(float(re.search(r"\S\s*(=|####|\\boxed|<answer>)", text) is not None))
    return rewards


REWARDS = {  # name: (function, weight); weight 0 only logs
    "accuracy": (accuracy_reward, 1.0),
    "format": (format_reward, 0.0),
}


class RewardLog:
    """What reward functions log beside their rewards."""

    def __init__(self):
        self.metrics = defaultdict(list)  # numbers by name
        self.columns = {}  # of the sample texts: values by name, one for each completion

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[name].append(float(value))

    def log_extra(self, column: str, values: list) -> None:
        self.columns[column] = values


def score(
    args: Args, samples: list[Sample], step: int, evaluation: bool
) -> tuple[Tensor, dict[str, Tensor], RewardLog]:
    """Call the reward functions.

    Returns the weighted sums of rewards (P * G,), where None counts 0; the rewards by function
    (P * G,), nan for None; and the RewardLog.
    """
    columns = {}
    for name in samples[0].example.row:
        columns[name] = [sample.example.row[name] for sample in samples]
    log = RewardLog()
    rewards = torch.zeros(len(samples))
    is_missing = torch.ones(len(samples), dtype=torch.bool)
    by_name = {}
    for name, (function, weight) in REWARDS.items():
        values = function(
            prompts=[sample.example.prompt for sample in samples],
            completions=[sample.completion for sample in samples],
            completion_ids=[sample.completion_ids for sample in samples],
            trainer_state=SimpleNamespace(global_step=step, max_steps=args.max_steps),
            log_metric=log.log_metric,
            log_extra=log.log_extra,
            evaluation=evaluation,
            **columns,
        )
        if inspect.iscoroutine(values):  # an async function
            values = asyncio.run(values)
        numbers = [math.nan if value is None else float(value) for value in values]
        by_name[name] = torch.tensor(numbers)  # (P * G,)
        is_none = torch.tensor([value is None for value in values])
        if len(numbers) != len(samples) or not (by_name[name].isfinite() | is_none).all():
            raise UserError(f"REWARDS: {name} must return a finite number or None per completion")
        if weight != 0:
            rewards += weight * by_name[name].nan_to_num()
            is_missing &= by_name[name].isnan()
    if is_missing.any():
        raise UserError(
            f"REWARDS: none of {list(REWARDS)} with a weight applies to some completion"
        )
    return rewards, by_name, log


# ==================================================================================================
# Sampling and log-probabilities
# ==================================================================================================


def pick_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Tokens (C,) drawn from softmax(logits (C, V) / temperature); the best if temperature is 0.

    Inverts the cumulative distribution at uniform (C,), so a draw does not depend on the rest of
    the batch. fp64 keeps the tail of a large vocabulary.
    """
    if temperature == 0:
        return logits.argmax(1)
    probs = (logits.float() / temperature).softmax(1)  # (C, V)
    cdf = probs.double().cumsum(1)  # (C, V)
    mass = cdf[:, -1:]  # (C, 1), 1 up to rounding
    if mass.isnan().any():
        raise UserError(
            "the model's logits are not numbers: lower --learning-rate, or use --no-bf16"
        )
    below_mass = torch.nextafter(mass, torch.zeros_like(mass))
    goal = torch.minimum(uniform.unsqueeze(1) * mass, below_mass)  # (C, 1)
    return torch.searchsorted(cdf, goal, right=True).squeeze(1)


@torch.no_grad()
def generate(
    model, prompts: list[list[int]], uniform: Tensor, temperature: float, stop_ids: list[int]
) -> list[list[int]]:
    """Sample G completions of each prompt, those of a prompt together.

    The shape of the random numbers, uniform (P, G, T), says how many and how long: a completion
    ends with its first stop token, or after T tokens. The model's generation settings are ignored.
    """
    model.eval()  # in training mode, gradient checkpointing drops the cache
    device = model.device
    num_prompts, num_generations, max_length = uniform.shape
    uniform = uniform.flatten(0, 1).to(device)  # (P * G, T)
    stop = torch.tensor(stop_ids, device=device)
    completions = [[] for _ in range(num_prompts * num_generations)]
    active = torch.arange(len(completions), device=device)  # (C,), the completions that go on
    cache = DynamicCache(config=model.config)
    input_ids, mask = pad_left(prompts, device)  # (P, L)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)  # (P, L)
    for t in range(max_length):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # (C, V); at t = 0 (P, V)
        if t == 0:  # each prompt was read once: repeat it for its completions
            source = active // num_generations  # (C,)
            cache.reorder_cache(source)
            logits = logits[source]  # (C, V)
            mask = mask[source]  # (C, L)
            position_ids = position_ids[source, -1:]  # (C, 1)
        tokens = pick_tokens(logits, uniform[active, t], temperature)  # (C,)
        for i, token in zip(active.tolist(), tokens.tolist()):
            completions[i].append(token)

        # Completions leave the batch when they end.
        goes_on = ~torch.isin(tokens, stop)  # (C,)
        if not goes_on.any():
            break
        if not goes_on.all():
            kept = goes_on.nonzero().squeeze(1)
            cache.reorder_cache(kept)
            active = active[kept]
            tokens = tokens[kept]
            mask = mask[kept]
            position_ids = position_ids[kept]
        input_ids = tokens.unsqueeze(1)  # (C, 1)
        position_ids = position_ids + 1  # (C, 1)
        mask = nn.functional.pad(mask, (0, 1), value=1)  # (C, L + t + 1)
    return completions


def pad_left(prompts: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Token ids (P, L), padded with id 0, which all models have; and the mask of the real ones."""
    rows = [torch.tensor(ids) for ids in prompts]
    ones = [torch.ones_like(row) for row in rows]
    input_ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    return input_ids.to(device), mask.to(device)


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


@torch.no_grad()
def reference_logprobs(model, reference, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """Those of the initial model. With LoRA (reference None), the policy without its adapters."""
    if reference is not None:
        return completion_logprobs(reference, batch, temperature)
    model.disable_adapters()
    logprobs = completion_logprobs(model, batch, temperature)
    model.enable_adapters()
    return logprobs


# ==================================================================================================
# Training
# ==================================================================================================


def rollout(
    args: Args,
    policy: Policy,
    examples: list[Example],
    indices: range,  # of the examples to sample from
    purpose: str,  # with --seed and the index of an example, it seeds the random numbers
    num_generations: int,
    temperature: float,
) -> list[Sample]:
    """Sample completions of examples, those of an example together."""
    prompts_at_once = max(1, args.rollout_batch_size // num_generations)
    completions = []
    for start in range(0, len(indices), prompts_at_once):
        prompts = []
        uniform = []
        for index in indices[start : start + prompts_at_once]:
            prompts.append(examples[index].prompt_ids)
            generator = torch.Generator().manual_seed(named_seed(args.seed, purpose, index))
            shape = (num_generations, args.max_completion_length)
            uniform.append(torch.rand(shape, dtype=torch.float64, generator=generator))
        with autocast(args, policy.model.device):
            completions += generate(
                policy.model,
                prompts=prompts,
                uniform=torch.stack(uniform),  # (P, G, T)
                temperature=temperature,
                stop_ids=policy.stop_ids,
            )

    samples = []
    for i, completion_ids in enumerate(completions):
        example = examples[indices[i // num_generations]]
        completion = decode(policy.tokenizer, example.prompt_ids, completion_ids)
        if isinstance(example.prompt, list):
            completion = [{"role": "assistant", "content": completion}]
        is_truncated = completion_ids[-1] not in policy.stop_ids
        samples.append(Sample(example, completion, completion_ids, is_truncated))
    return samples


def num_ids(sample: Sample) -> int:
    return len(sample.example.prompt_ids) + len(sample.completion_ids)


def make_microbatches(
    args: Args,
    model,
    reference,  # the initial model, where --beta needs it; None with LoRA
    samples: list[Sample],
    advantages: Tensor,  # (P * G,)
) -> list[dict[str, Tensor]]:
    """Batches of samples of similar lengths, which need little padding, for all iterations."""
    by_length = sorted(range(len(samples)), key=lambda i: num_ids(samples[i]))
    microbatches = []
    for start in range(0, len(samples), args.micro_batch_size):
        rows = by_length[start : start + args.micro_batch_size]
        batch = make_batch(
            prompts=[samples[i].example.prompt_ids for i in rows],
            completions=[samples[i].completion_ids for i in rows],
            device=model.device,
        )
        batch["advantages"] = advantages[rows].to(model.device)  # (B,)
        batch["loss_mask"] = batch["mask"]  # (B, T)
        if args.mask_truncated_completions:
            is_whole = torch.tensor([[not samples[i].is_truncated] for i in rows])  # (B, 1)
            batch["loss_mask"] = batch["mask"] & is_whole.to(model.device)  # (B, T)
        if args.beta > 0:
            with autocast(args, model.device):
                batch["ref_logprobs"] = reference_logprobs(
                    model, reference, batch, args.temperature
                )
        microbatches.append(batch)
    return microbatches


def evaluate(
    args: Args,
    policy: Policy,
    examples: list[Example],
    indices: range,  # of the examples that this process evaluates
    step: int,
    writer: SummaryWriter | None,
) -> dict[str, float]:
    """Mean rewards of the held-out examples: sampled at temperature 1, and greedy."""
    metrics = {}
    for suffix, k, temperature in [("_greedy", 1, 0.0), ("", args.eval_generations, 1.0)]:
        samples = rollout(
            args,
            policy,
            examples=examples,
            indices=indices,
            purpose="evaluation",
            num_generations=k,
            temperature=temperature,
        )
        values = {}
        if samples:  # where processes outnumber the examples, some have none
            rewards, by_name, log = score(args, samples, step=step, evaluation=True)
            values["reward"] = rewards.tolist()
            values["mean_length"] = [len(sample.completion_ids) for sample in samples]
            for name, tensor in by_name.items():
                values[name] = tensor.tolist()
            if "accuracy" in by_name and k > 1:
                solved = by_name["accuracy"].view(-1, k).amax(1)  # (P,)
                values[f"pass@{k}"] = solved.tolist()
            for name, numbers in log.metrics.items():
                add_metric(values, name, numbers)
            if writer is not None and temperature > 0:
                write_texts(writer, samples, rewards.tolist(), log.columns, k, step)
        for name, mean in means(gather(values)).items():
            metrics[f"eval/{name}{suffix}"] = mean
    if writer is not None:
        write_logs(writer, metrics, step)
    return metrics


def main(args: Args) -> dict[str, float]:
    """Train. Returns the final metrics, which are also saved as <run folder>/summary.json."""
    start_time = time.time()

    # ---- flags, processes, run folder
    checkpoint = None
    if args.resume is not None:
        args, checkpoint = load_checkpoint(args)
    rank, world_size, device = start_processes(args)
    args = replace(args)  # the caller's flags stay as they are
    if args.bf16 is None:
        args.bf16 = device.type == "cuda"
    if args.eval_steps is None:
        args.eval_steps = 5 if args.model_name_or_path is None else 50
    if args.rollout_batch_size is None:
        args.rollout_batch_size = args.generation_batch_size // world_size
    if args.learning_rate is None:
        args.learning_rate = 5e-4 if args.model_name_or_path is None else 1e-6
        if args.lora_r > 0:
            args.learning_rate *= 10
    check_args(args, world_size)
    run_dir = Path(args.resume or new_run_folder(args, rank))
    if rank == 0:
        print(run_dir)

    # ---- models
    initial = args.model_name_or_path
    if initial is None:
        initial = str(run_dir / "sft")
        if rank == 0 and checkpoint is None:
            write_tiny_model(initial, args, device)
        if world_size > 1:
            dist.barrier()
    model, tokenizer = load_model(initial, args, device)
    policy = Policy(model, tokenizer, find_stop_ids(model, tokenizer))
    reference = None  # with LoRA, the policy without its adapters
    if args.lora_r > 0:
        add_adapters(model, args)
    elif args.beta > 0:
        reference, _ = load_model(initial, args, device)

    # ---- data, shuffled anew in each epoch. A process takes every world_size-th prompt
    train, held_out = load_examples(args, tokenizer, model.config, rank)
    num_prompts = args.generation_batch_size // args.num_generations  # of all processes
    order = []
    while len(order) < args.max_steps * num_prompts:
        rng = random.Random(named_seed(args.seed, "order", len(order)))
        order += rng.sample(train, len(train))
    eval_indices = range(rank, len(held_out), world_size)

    # ---- optimizer, checkpoint
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0, fused=True)
    first_step = 0
    tokens_seen = 0
    if checkpoint is not None:
        first_step = checkpoint["step"]
        tokens_seen = checkpoint["tokens_seen"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for name, p in trained.items():
            p.data.copy_(checkpoint["trained"][name])
    writer = None
    if rank == 0:
        writer = SummaryWriter(run_dir, purge_step=first_step + 1)

    # ---- loop
    if checkpoint is None:
        before = evaluate(args, policy, held_out, eval_indices, step=0, writer=writer)
        metrics = before
    else:
        before = checkpoint["before"]
        metrics = checkpoint["metrics"]
    bar = trange(
        first_step, args.max_steps, initial=first_step, total=args.max_steps, disable=rank > 0
    )
    for step in bar:
        # ---- rollout
        samples = rollout(
            args,
            policy,
            examples=order,
            indices=range(step * num_prompts, (step + 1) * num_prompts)[rank::world_size],
            purpose="rollout",
            num_generations=args.num_generations,
            temperature=args.temperature,
        )

        # ---- reward, advantage
        rewards, by_name, log = score(args, samples, step=step, evaluation=False)
        groups = rewards.view(-1, args.num_generations)  # (P, G)
        advantages = group_advantages(groups, args.scale_rewards).flatten()  # (P * G,)

        # ---- update. Losses and gradients add up over all micro-batches and processes
        microbatches = make_microbatches(args, policy.model, reference, samples, advantages)
        num_tokens = sum(batch["loss_mask"].sum() for batch in microbatches)
        num_tokens = total(num_tokens).clamp(min=1)
        model.train()  # all dropout is off; gradient checkpointing acts in this mode only
        stats = defaultdict(float)  # means over --num-iterations
        grad_norms = []
        for iteration in range(args.num_iterations):
            for batch in microbatches:
                with autocast(args, device):
                    logprobs = completion_logprobs(model, batch, args.temperature)  # (B, T)
                if iteration == 0:
                    # Before the first update of this rollout. The sampler's own would differ by
                    # the rounding of bf16, by more than GSPO's epsilons.
                    batch["old_logprobs"] = logprobs.detach()
                loss, batch_stats = grpo_loss(
                    logprobs,
                    old_logprobs=batch["old_logprobs"],
                    advantages=batch["advantages"],
                    mask=batch["loss_mask"],
                    epsilon_low=args.epsilon,
                    epsilon_high=args.epsilon_high,
                    loss_type=args.loss_type,
                    ref_logprobs=batch.get("ref_logprobs"),
                    beta=args.beta,
                    max_completion_length=args.max_completion_length,
                    importance_sampling_level=args.importance_sampling_level,
                    num_tokens=num_tokens,
                    num_sequences=args.generation_batch_size,
                )
                loss.backward()
                for name, value in batch_stats.items():
                    stats[name] += value / args.num_iterations
            for p in trained.values():
                if p.grad is not None:
                    total(p.grad)
            grad_norm = nn.utils.clip_grad_norm_(
                trained.values(), args.max_grad_norm, error_if_nonfinite=True
            )
            grad_norms.append(grad_norm.item())
            learning_rate = args.learning_rate * lr_factor(
                args,
                update=step * args.num_iterations + iteration,
                num_updates=args.max_steps * args.num_iterations,
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()

        # ---- log: means over the whole update and all processes
        lengths = [len(sample.completion_ids) for sample in samples]
        values = {
            "train/reward": rewards.tolist(),
            "train/frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).tolist(),
            "train/completions/mean_length": lengths,
            "train/completions/clipped_ratio": [sample.is_truncated for sample in samples],
            "train/num_tokens": [num_ids(sample) for sample in samples],
        }
        for name, numbers in stats.items():
            values[name] = [total(numbers).item()]
        for name, tensor in by_name.items():
            values[f"train/rewards/{name}/mean"] = tensor.tolist()
        for name, numbers in log.metrics.items():
            add_metric(values, f"train/{name}", numbers)
        values = gather(values)
        tokens_seen += sum(values["train/num_tokens"])
        logs = means(values)
        logs["train/num_tokens"] = tokens_seen  # so far
        logs["train/reward_std"] = torch.tensor(values["train/reward"]).std().item()
        logs["train/grad_norm"] = sum(grad_norms) / args.num_iterations
        logs["charts/learning_rate"] = learning_rate
        bar.set_postfix(reward=logs["train/reward"], length=logs["train/completions/mean_length"])
        if writer is not None:
            write_logs(writer, logs, step + 1)

        # ---- evaluate, save
        is_last = step + 1 == args.max_steps
        if is_last or (step + 1) % args.eval_steps == 0:
            metrics = evaluate(args, policy, held_out, eval_indices, step=step + 1, writer=writer)
        if rank == 0 and (is_last or (step + 1) % args.save_steps == 0):
            writer.flush()
            state = {
                "step": step + 1,
                "tokens_seen": tokens_seen,
                "before": before,
                "metrics": metrics,
                "trained": {name: p.data for name, p in trained.items()},
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
# Supporting code: numbers, texts, logs
# ==================================================================================================


def named_seed(seed: int, purpose: str, number: int) -> int:
    """Random numbers are functions of (seed, purpose, number): --resume has no state to restore."""
    return random.Random(f"{seed} {purpose} {number}").getrandbits(63)


def autocast(args: Args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


def decode(tokenizer, prompt_ids: list[int], completion_ids: list[int]) -> str:
    """The text that a completion adds to its prompt. Decoded alone, it may lose its first space."""
    prompt, whole = tokenizer.batch_decode(
        [prompt_ids, prompt_ids + completion_ids],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return whole[len(prompt) :]


def add_metric(values: dict, name: str, numbers: list[float]) -> None:
    """Add what a reward function has logged."""
    if name in values:
        raise UserError(f"log_metric: {name} is the name of another metric")
    values[name] = numbers


def write_texts(writer, samples, rewards: list, columns: dict, k: int, step: int) -> None:
    """The first of the k completions of some prompts, with its reward and the extra columns."""
    texts = []
    for i in range(0, min(len(samples), 10 * k), k):
        extra = {column: values[i] for column, values in columns.items()}
        texts.append(
            f"{samples[i].example.prompt} {samples[i].completion} ({rewards[i]:.2f}) {extra}"
        )
    writer.add_text("samples", "\n\n".join(texts), step)


def write_logs(writer: SummaryWriter, logs: dict[str, float], step: int) -> None:
    for name, value in logs.items():
        writer.add_scalar(name, value, step)


# ==================================================================================================
# Supporting code: answers. A number is read whole or not at all
# ==================================================================================================

NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+|(?<=\d)\.?)(e[+-]?\d+)?", re.IGNORECASE)
BOXED = re.compile(r"((?:[^{}]|\{[^{}]*\})*)\}")  # what follows \boxed{
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")  # \mathbf{42}, \text{cm}
SYMBOLS = re.compile(
    r"\\[,;! ]|\^\{?\\circ\}?|\\?[$%]|[*\u00a3\u20ac\u00b0]"
)  # 5\,cm, 90^\circ, \$5


def to_text(message: str | list[dict]) -> str:
    if isinstance(message, str):
        return message
    return "\n".join(turn["content"] for turn in message)


def marked_answer(text: str) -> str | None:
    """The last answer in `\\boxed{7}`, `#### 7`, `<answer>7</answer>`. None if there is no mark.

    <answer> may hold one of the others, and \\boxed goes before ####, which also begins headings.
    """
    answer = None
    if "<answer>" in text:
        answer = text.rpartition("<answer>")[2].partition("</answer>")[0]
        text = answer
    if "\\boxed{" in text:
        box = BOXED.match(text.rpartition("\\boxed{")[2])
        answer = ""  # cut off, or three braces deep
        if box is not None:
            answer = box[1]
    elif "####" in text:
        answer = text.rpartition("####")[2].partition("\n")[0]
    return answer


def to_number(text: str) -> float | None:
    """The number that a text is as a whole; a name and a unit may stand beside it. Else None.

    7  -3  +3  1,200.5  .5  1e-05  $18  18 km/h  x = 42  90^\\circ  5\\,\\text{cm}  **72**  15%
    """
    text = text.replace("\u2212", "-").replace("{,}", ",")  # a minus sign; 1{,}234
    text = TEXT_COMMAND.sub(r" \1", text)
    text = SYMBOLS.sub(" ", text)
    name, _, value = text.rpartition("=")
    number, _, unit = value.strip().replace("- ", "-").partition(" ")
    unit = re.sub(r"\^\{?[23]\}?", "", unit)  # cm^2
    number = number.rstrip(",.")
    is_number = NUMBER.fullmatch(number) is not None
    if not is_number or re.search(r"[<>=!]", name) or re.search(r"[\d+*^<>\\]", unit):
        return None  # 3/4, 2x; x >= 3; 3 + x, 12 or 13
    return float(number.replace(",", ""))


def reference_number(answer) -> float | None:
    """The number of a dataset's answer: `18`, `... #### 18`, `\\boxed{18}`. None if it is none."""
    marked = marked_answer(str(answer))
    if marked is None:
        marked = str(answer)
    return to_number(marked)


def completion_number(text: str) -> float | None:
    """The marked answer; without a mark the last number. None if that is not plainly a number."""
    marked = marked_answer(text)
    if marked is not None:
        return to_number(marked)
    words = re.sub("[=;]", " ", text).split()  # 6+5=11;161
    positions = [i for i, word in enumerate(words) if re.search(r"\d", word)]
    if not positions:
        return None
    last = positions[-1]
    if last > 0 and words[last - 1] in ("+", "-", "*", "/", "^", "or"):  # 12 or 13, 3 / 4
        return None
    return to_number(words[last].strip("()!?,:'\""))


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


def make_example(row: dict, tokenizer, max_length: int) -> Example:
    """Raises an error with the reason if the row cannot be used."""
    prompt = make_prompt(row)
    turns = as_turns(prompt, "user")
    if to_text(turns).strip() == "":
        raise UserError("its prompt is empty")
    if tokenizer.chat_template is None:
        prompt_ids = tokenizer(to_text(turns)).input_ids
        if prompt_ids[-1] == tokenizer.eos_token_id:  # some tokenizers append it
            prompt_ids.pop()
    else:
        is_begun = turns[-1]["role"] == "assistant"  # the completion goes on with this turn
        prompt_ids = tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=not is_begun,
            continue_final_message=is_begun,
            return_dict=False,
        )
    if len(prompt_ids) > max_length:
        raise UserError(f"its prompt has more than {max_length} tokens")
    answer = row.get("answer", row.get("solution"))
    rewarded = [function for function, weight in REWARDS.values() if weight != 0]
    # Without a number, such a row would teach nothing, unless another function rewards it.
    if rewarded == [accuracy_reward] and reference_number(answer) is None:
        raise UserError(f"its answer is no number: {answer}")
    return Example(row, prompt, prompt_ids)


def make_examples(rows: list[dict], tokenizer, max_length: int, rank: int) -> list[Example]:
    """The rows that can be used."""
    examples = []
    reasons = []
    for number, row in enumerate(rows, start=1):
        try:
            examples.append(make_example(row, tokenizer, max_length))
        except (UserError, TemplateError) as error:
            reasons.append(f"row {number}: {error!r}")
    report_left_out(reasons, len(rows), rank)
    return examples


def report_left_out(reasons: list[str], num_rows: int, rank: int) -> None:
    """Print how many rows are left out, and why the first is. More than half end the run."""
    counts = f"{len(reasons)} of {num_rows} rows"
    if len(reasons) > num_rows / 2:
        raise UserError(f"--dataset-name: {counts} cannot be used; {reasons[0]}")
    if reasons and rank == 0:
        print(f"{counts} are left out; {reasons[0]}")


def load_examples(args: Args, tokenizer, config, rank: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and examples to evaluate on, which share no prompt."""
    if args.dataset_name is None:
        train_rows, test_rows = addition_rows()
    else:
        train_rows, test_rows = load_rows(args)
    context = getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)
    max_length = context - args.max_completion_length
    train = make_examples(train_rows, tokenizer, max_length, rank)
    held_out = make_examples(test_rows, tokenizer, max_length, rank)
    return separate(args, train, held_out, rank)


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


def load_model(name: str, args: Args, device, flag: str = "--model-name-or-path"):
    """A model and its tokenizer.

    Weights are fp32, as bf16 would round small updates away; those that LoRA freezes may be bf16.
    """
    if Path(name).is_dir():
        name = str(Path(name).resolve())  # adapters record the path of their model
    config, tokenizer = load_config(name, flag)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {name}: its tokenizer has no eos_token, set one")
    dtype = torch.float32
    if args.lora_r > 0 and device.type == "cuda" and args.bf16:
        dtype = torch.bfloat16
    model, report = AutoModelForCausalLM.from_pretrained(
        name, config=config, dtype=dtype, output_loading_info=True
    )
    if report["missing_keys"]:
        raise UserError(f"{flag} {name} lacks weights: {report['missing_keys']}")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device), tokenizer


def find_stop_ids(model, tokenizer) -> list[int]:
    """EOS, BOS (some models, as tinyllamas, end a text with it), and the end of a chat's turn."""
    eos_ids = model.generation_config.eos_token_id
    if not isinstance(eos_ids, list):  # a number or None
        eos_ids = [eos_ids]
    stop_ids = set(eos_ids + [tokenizer.eos_token_id, tokenizer.bos_token_id])
    stop_ids.discard(None)
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "ANSWER"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        after = text.rpartition("ANSWER")[2].strip()  # <|im_end|>
        after_ids = tokenizer(after, add_special_tokens=False).input_ids
        if after_ids and after_ids[0] in tokenizer.added_tokens_decoder:
            stop_ids.add(after_ids[0])
    return sorted(stop_ids)


def add_adapters(model, args: Args) -> None:
    """LoRA, arXiv:2106.09685: freeze the weights, and train low-rank additions to them in fp32."""
    torch.manual_seed(named_seed(args.seed, "adapters", 0))  # the same ones in all processes
    model.add_adapter(
        LoraConfig(
            r=args.lora_r,
            lora_alpha=2 * args.lora_r,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    )
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()


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
    for name in ("max_steps", "eval_steps", "save_steps", "num_iterations", "micro_batch_size"):
        if vars(args)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.max_completion_length < 1 or args.eval_generations < 1:
        raise UserError("--max-completion-length and --eval-generations must be at least 1")
    if args.num_generations < 2:
        raise UserError("--num-generations: an advantage takes at least 2 completions of a prompt")
    if args.generation_batch_size % (args.num_generations * world_size) != 0:
        raise UserError("--generation-batch-size: no multiple of --num-generations x processes")
    if not (args.temperature > 0 and args.max_grad_norm > 0 and args.beta >= 0):
        raise UserError("--temperature and --max-grad-norm must be above 0, --beta at least 0")
    if args.dataset_name is not None and args.model_name_or_path is None:
        raise UserError("--dataset-name needs --model-name-or-path: the tiny model can only add")


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


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
