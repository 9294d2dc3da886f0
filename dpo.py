# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0",
#                 "datasets==5.2.0", "tqdm==4.70.1", "peft==0.21.2"]
# ///
"""DPO: train a language model on preferences, without a reward model and without sampling.

Each prompt x has two answers, of which y_w was preferred to y_l. Suppose that a policy pi maximizes
a reward r under a KL penalty, E[r] - beta KL(pi || pi_ref). Then r = beta log(pi / pi_ref) plus a
term in x alone, which cancels when two answers to x are compared. So the policy can be trained
directly, by maximizing the Bradley-Terry likelihood of the preferences:

    h = log(pi(y_w|x) / pi_ref(y_w|x)) - log(pi(y_l|x) / pi_ref(y_l|x))
    L = -E[ log sigmoid(beta h) ]

    DPO        arXiv:2305.18290   -log sigmoid(beta h)               the default
    cDPO       ericmitchell.ai/cdpo.pdf                              --label-smoothing 0.1
    robust DPO arXiv:2403.00409   unbiased if labels are flipped     --loss-type robust
                                                                     --label-smoothing 0.1
    IPO        arXiv:2310.12036   (h - 1 / (2 beta))^2, h per token  --loss-type ipo
    norm. DPO  arXiv:2411.15124   -log sigmoid(beta h), h per token  --loss-type sigmoid_norm
                                                                     --beta 5
    hinge      arXiv:2309.06657   max(0, 1 - beta h), SLiC's         --loss-type hinge
    RPO        arXiv:2404.19733   adds -log pi(y_w|x) per token      --rpo-alpha 1

"Per token" means that the log-ratio of an answer is divided by its number of tokens. DPO compares:
log pi(y_w|x) may fall, as long as log pi(y_l|x) falls more. Watch logps/chosen; RPO's term holds it
up. Whatever the loss, rewards/* are beta log(pi / pi_ref) of whole answers, as TRL logs them.

    python dpo.py                                  # laptop, offline: a tiny model learns to add
    python dpo.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset-name trl-lib/ultrafeedback_binarized   # one GPU
    torchrun --nproc-per-node=8 dpo.py ...         # 8 GPUs: the same batch, split by pairs
    python dpo.py --resume runs/<run folder>       # continue exactly from the last checkpoint

The first takes about five minutes on two cores. The pairs are answers of the tiny model itself to
the same sum, a right and a wrong one. Sampled accuracy on held-out sums rises from 0.44 to 0.93
(means of seeds 301 to 303).

Shapes: R pairs of a micro-batch, B = 2R rows of prompt and answer, L prompt tokens, T answer
tokens, N answer tokens of a whole micro-batch, V vocabulary. `logps` are sums over the tokens of an
answer, in nats. Masks are True for tokens that count.

Flags stand in three groups: --exp-name to --resume are common to all six scripts,
--model-name-or-path to --sft-steps to the four that train language models; the rest is DPO's.

Deliberately not here: online DPO (new samples), KTO (unpaired preferences), images, sharded
weights.
"""

import hashlib
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
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm, trange
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import LlamaConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

VERSION = "dpo.py 0.3.0"  # --resume refuses the runs of other scripts and versions


@dataclass
class Args:
    """DPO: train a language model on preferences."""

    # ---- common to all scripts
    exp_name: str = "dpo"  # part of the run folder's name
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

    # ---- DPO
    ref_model_name_or_path: str | None = None  # the reference. None: where training starts
    num_train_epochs: float = 1.0  # passes over the training pairs
    max_steps: int | None = None  # optimizer steps. None: as many as --num-train-epochs takes
    eval_steps: int = 20  # steps between evaluations
    save_steps: int = 50  # steps between checkpoints
    learning_rate: float | None = None  # peak. None: 1e-6, for the tiny model 2e-4; LoRA: 10 times
    lora_r: int = 0  # train adapters of this rank instead of all weights. 0: off
    train_batch_size: int = 64  # pairs per optimizer step, across all processes
    max_length: int = 1024  # tokens of prompt and answer. Longer answers lose their end
    beta: float | None = None  # weight of the KL penalty; more per token. None: 0.1, tiny model 1
    # the loss of a pair, see the top of this file
    loss_type: Literal["sigmoid", "sigmoid_norm", "ipo", "robust", "hinge"] = "sigmoid"
    label_smoothing: float = 0.0  # assumed share of wrong labels, below 0.5 (sigmoids and robust)
    rpo_alpha: float = 0.0  # weight of the chosen answers' negative log-likelihood per token


class UserError(Exception):
    """A flag, file or row that the user must correct. Shown as one line, without traceback."""


# ==================================================================================================
# Method: loss, learning rate
# ==================================================================================================


def dpo_loss(
    policy_chosen_logps: Tensor,  # (R,), sums over the tokens of an answer
    policy_rejected_logps: Tensor,  # (R,)
    ref_chosen_logps: Tensor,  # (R,)
    ref_rejected_logps: Tensor,  # (R,)
    beta: float,
    loss_type: str,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,  # (R,), tokens of the answers
    rejected_lengths: Tensor | None = None,  # (R,)
    rpo_alpha: float = 0.0,  # needs chosen_lengths
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (R,) of pairs, and rewards (R,) of the chosen and of the rejected answers, detached.

    With lengths, ipo and sigmoid_norm compare means over tokens; without, the log-probabilities as
    they are given. A reward is beta log(pi / pi_ref). Where the policy is the reference, the losses
    are log 2 (sigmoid, sigmoid_norm, robust), 1 (hinge) or 1 / (4 beta^2) (ipo).
    """
    chosen_log_ratio = policy_chosen_logps - ref_chosen_logps  # (R,)
    rejected_log_ratio = policy_rejected_logps - ref_rejected_logps  # (R,)
    chosen_rewards = beta * chosen_log_ratio.detach()  # (R,)
    rejected_rewards = beta * rejected_log_ratio.detach()  # (R,)
    if loss_type in ("ipo", "sigmoid_norm") and chosen_lengths is not None:
        chosen_log_ratio = chosen_log_ratio / chosen_lengths
        rejected_log_ratio = rejected_log_ratio / rejected_lengths
    h = chosen_log_ratio - rejected_log_ratio  # (R,)

    as_labeled = -nn.functional.logsigmoid(beta * h)  # (R,), DPO, eq. 7
    flipped = -nn.functional.logsigmoid(-beta * h)  # (R,), the loss if the label is wrong
    if loss_type in ("sigmoid", "sigmoid_norm"):  # smoothed: cDPO, eq. 3
        losses = (1 - label_smoothing) * as_labeled + label_smoothing * flipped
    elif loss_type == "robust":  # robust DPO, eq. 10
        losses = (1 - label_smoothing) * as_labeled - label_smoothing * flipped
        losses = losses / (1 - 2 * label_smoothing)
    elif loss_type == "ipo":  # IPO, eq. 17: the best h is 1 / (2 beta)
        losses = (h - 1 / (2 * beta)).square()
    elif loss_type == "hinge":  # RSO, section 3.3
        losses = torch.relu(1 - beta * h)
    else:
        raise ValueError(f"unknown loss_type {loss_type!r}")

    if rpo_alpha > 0:  # RPO, eq. 1
        losses = losses - rpo_alpha * policy_chosen_logps / chosen_lengths
    return losses, chosen_rewards, rejected_rewards


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
# Preference data. A row of the dataset has one of four forms:
#
#     {"prompt": "What is 1+1?", "chosen": "2", "rejected": "3"}
#     {"prompt": [{"role": "user", "content": "What is 1+1?"}],
#      "chosen": [{"role": "assistant", "content": "2"}], "rejected": [...]}
#     {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}
#     {"chosen": "The sky is blue.", "rejected": "The sky is green."}
#
# The first is read as the second if the model has a chat template. Answers may be whole
# conversations, as in the third, also beside a prompt. The columns `tools` and
# `chat_template_kwargs` go to the chat template. README.md turns other forms into the first.
# ==================================================================================================


@dataclass
class Pair:
    """A row of the dataset, as tokens: the prompt, and two answers with their ends."""

    prompt: str
    prompt_ids: list
    chosen_ids: list
    rejected_ids: list


# ==================================================================================================
# Log-probabilities
# ==================================================================================================


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


def pair_logps(args: Args, model, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and lengths (R, 2) of the chosen and the rejected answers."""
    prompts = []
    answers = []
    for pair in pairs:
        prompts += [pair.prompt_ids, pair.prompt_ids]
        answers += [pair.chosen_ids, pair.rejected_ids]
    batch = make_batch(prompts, answers, model.device)
    with autocast(args, model.device):
        logprobs = completion_logprobs(model, batch, temperature=1.0)  # (2R, T)
    logps = logprobs.sum(1)  # (2R,)
    lengths = batch["mask"].sum(1)  # (2R,)
    return logps.view(-1, 2), lengths.view(-1, 2)


def pair_length(pair: Pair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def split_by_length(args: Args, pairs: list[Pair], indices: list[int]) -> list[list[int]]:
    """Micro-batches: the indices of pairs of similar lengths, which need little padding."""
    by_length = sorted(indices, key=lambda i: pair_length(pairs[i]))
    starts = range(0, len(by_length), args.micro_batch_size)
    return [by_length[start : start + args.micro_batch_size] for start in starts]


@torch.no_grad()
def reference_logps(
    args: Args, reference, pairs: list[Pair], indices: list[int], rank: int, world_size: int
) -> Tensor:
    """Log-probabilities (all pairs, 2) of those pairs that indices name, under the reference.

    Each process computes a share. They are needed once, so training holds no second model.
    """
    reference.eval()
    logps = torch.zeros(len(pairs), 2, device=reference.device)
    microbatches = split_by_length(args, pairs, indices[rank::world_size])
    for rows in tqdm(microbatches, desc="reference", leave=False, disable=rank > 0):
        logps[rows], _ = pair_logps(args, reference, [pairs[i] for i in rows])
    return total(logps)


# ==================================================================================================
# Training
# ==================================================================================================


def pair_losses(args: Args, model, pairs: list[Pair], ref_logps: Tensor):
    """Losses (R,) of pairs, from ref_logps (R, 2); and what is logged of them, by name, (R,)."""
    logps, lengths = pair_logps(args, model, pairs)  # (R, 2) each
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy_chosen_logps=logps[:, 0],
        policy_rejected_logps=logps[:, 1],
        ref_chosen_logps=ref_logps[:, 0],
        ref_rejected_logps=ref_logps[:, 1],
        beta=args.beta,
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        rpo_alpha=args.rpo_alpha,
    )
    margins = chosen_rewards - rejected_rewards  # (R,)

    # A margin of 0 up to the rounding of the log-probabilities is a tie, which counts half. The
    # errors of T tokens are independent, so their sum grows with the square root of T.
    precision = torch.bfloat16 if args.bf16 else torch.float32
    rounding = torch.finfo(precision).eps * logps.detach().abs() / lengths.sqrt()  # (R, 2)
    is_tie = margins.abs() <= args.beta * rounding.sum(1)  # (R,)
    accuracies = torch.where(is_tie, 0.5, (margins > 0).float())  # (R,)
    stats = {
        "loss": losses.detach(),
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": accuracies,
        "logps/chosen": logps[:, 0].detach(),
        "logps/rejected": logps[:, 1].detach(),
    }
    return losses, stats


@torch.no_grad()
def evaluate(
    args: Args,
    model,
    tokenizer,
    pairs: list[Pair],
    indices: list[int],  # of the held-out pairs that this process evaluates
    ref_logps: Tensor,  # (all pairs, 2)
    step: int,
    writer: SummaryWriter | None,
) -> dict[str, float]:
    """Means over the held-out pairs. For the tiny model also the accuracy of its answers."""
    model.eval()
    values = defaultdict(list)
    for rows in split_by_length(args, pairs, indices):
        _, stats = pair_losses(args, model, [pairs[i] for i in rows], ref_logps[rows])
        for name, numbers in stats.items():
            values[f"eval/{name}"] += numbers.tolist()
    if args.model_name_or_path is None:
        _, sums = addition_rows()
        prompts = [tokenizer(row["prompt"]).input_ids for row in sums]
        answers = sample_answers(args, model, tokenizer, prompts, num_answers=1, max_tokens=16)
        for row, answer in zip(sums, answers, strict=True):
            values["eval/accuracy"].append(is_right(answer, row))
    metrics = means(gather(values))
    if writer is not None:
        write_logs(writer, metrics, step)
        shown = [pairs[i] for i in indices if len(pairs[i].prompt_ids) + 64 <= args.max_length]
        shown = shown[:8]
        prompts = [pair.prompt_ids for pair in shown]
        answers = sample_answers(args, model, tokenizer, prompts, num_answers=1, max_tokens=64)
        texts = [pair.prompt + answer for pair, answer in zip(shown, answers, strict=True)]
        writer.add_text("samples", "\n\n".join(texts), step)
    return metrics


@torch.no_grad()
def sample_answers(
    args: Args, model, tokenizer, prompts: list[list[int]], num_answers: int, max_tokens: int
) -> list[str]:
    """Texts, num_answers for each prompt, sampled at temperature 1. The same for each call."""
    model.eval()
    torch.manual_seed(named_seed(args.seed, "answers", 0))  # training draws none
    answers = []
    for start in range(0, len(prompts), 256):
        input_ids, mask = pad_left(prompts[start : start + 256], model.device)  # (P, L)
        with autocast(args, model.device):
            ids = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=num_answers,
                max_new_tokens=max_tokens,
                pad_token_id=tokenizer.eos_token_id,
            )
        answers += tokenizer.batch_decode(ids[:, input_ids.shape[1] :], skip_special_tokens=True)
    return answers


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
        args.learning_rate = 2e-4 if args.model_name_or_path is None else 1e-6
        if args.lora_r > 0:
            args.learning_rate *= 10
    if args.beta is None:
        args.beta = 1.0 if args.model_name_or_path is None else 0.1
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
            write_tiny_pairs(run_dir, args, device)
        if world_size > 1:
            dist.barrier()
    model, tokenizer = load_model(initial, args, device)
    if args.lora_r > 0:
        add_adapters(model, args)

    # ---- data, shuffled anew in each epoch
    context = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    args.max_length = min(args.max_length, context)
    train, held_out = load_pairs(args, tokenizer, run_dir, date_string, rank)
    pairs = train + held_out
    if args.max_steps is None:
        args.max_steps = max(1, round(args.num_train_epochs * len(train) / args.train_batch_size))
    order = []
    while len(order) < args.max_steps * args.train_batch_size:
        rng = random.Random(named_seed(args.seed, "order", len(order)))
        order += rng.sample(range(len(train)), len(train))
    order = order[: args.max_steps * args.train_batch_size]
    eval_indices = list(range(len(train), len(pairs)))

    # ---- reference: its log-probabilities are computed once, of the pairs that are used
    data_hash = hash_pairs(pairs)
    if checkpoint is None:
        reference = model  # before training; with LoRA, adapters add 0 at first
        if args.ref_model_name_or_path is not None:
            reference, ref_tokenizer = load_model(
                args.ref_model_name_or_path, args, device, flag="--ref-model-name-or-path"
            )
            if ref_tokenizer.get_vocab() != tokenizer.get_vocab():
                raise UserError("--ref-model-name-or-path: its tokenizer differs from the model's")
        used = sorted(set(order)) + eval_indices
        ref_logps = reference_logps(args, reference, pairs, used, rank, world_size)
        del reference
    else:
        if checkpoint["data_hash"] != data_hash:
            raise UserError(f"--resume {run_dir}: its data or its tokenizer have changed")
        ref_logps = checkpoint["ref_logps"].to(device)

    # ---- optimizer, checkpoint
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0, fused=True)
    first_step = 0
    if checkpoint is not None:
        first_step = checkpoint["step"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for name, p in trained.items():
            p.data.copy_(checkpoint["trained"][name])
    writer = None
    if rank == 0:
        writer = SummaryWriter(run_dir, purge_step=first_step + 1)

    # ---- loop
    eval_indices = eval_indices[rank::world_size]
    if checkpoint is None:
        before = evaluate(
            args, model, tokenizer, pairs, eval_indices, ref_logps, step=0, writer=writer
        )
        metrics = before
    else:
        before = checkpoint["before"]
        metrics = checkpoint["metrics"]
    bar = trange(
        first_step, args.max_steps, initial=first_step, total=args.max_steps, disable=rank > 0
    )
    for step in bar:
        # ---- update. Gradients add up over all micro-batches and processes
        batch = order[step * args.train_batch_size : (step + 1) * args.train_batch_size]
        model.train()  # all dropout is off; gradient checkpointing acts in this mode only
        values = defaultdict(list)
        for rows in split_by_length(args, pairs, batch[rank::world_size]):
            losses, stats = pair_losses(args, model, [pairs[i] for i in rows], ref_logps[rows])
            loss = losses.sum() / args.train_batch_size
            loss.backward()
            for name, numbers in stats.items():
                values[f"train/{name}"] += numbers.tolist()
        for p in trained.values():
            if p.grad is not None:
                total(p.grad)
        grad_norm = nn.utils.clip_grad_norm_(
            trained.values(), args.max_grad_norm, error_if_nonfinite=True
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
        bar.set_postfix(loss=logs["train/loss"], accuracy=logs["train/rewards/accuracies"])
        if writer is not None:
            write_logs(writer, logs, step + 1)

        # ---- evaluate, save
        is_last = step + 1 == args.max_steps
        if is_last or (step + 1) % args.eval_steps == 0:
            metrics = evaluate(
                args, model, tokenizer, pairs, eval_indices, ref_logps, step=step + 1, writer=writer
            )
        if rank == 0 and (is_last or (step + 1) % args.save_steps == 0):
            writer.flush()
            state = {
                "step": step + 1,
                "date_string": date_string,
                "data_hash": data_hash,
                "ref_logps": ref_logps,
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
# Supporting code: numbers, logs
# ==================================================================================================


def named_seed(seed: int, purpose: str, number: int) -> int:
    """Random numbers are functions of (seed, purpose, number): --resume has no state to restore."""
    return random.Random(f"{seed} {purpose} {number}").getrandbits(63)


def autocast(args: Args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


def pad_left(prompts: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Token ids (P, L), padded with id 0, which all models have; and the mask of the real ones."""
    rows = [torch.tensor(ids) for ids in prompts]
    ones = [torch.ones_like(row) for row in rows]
    input_ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    return input_ids.to(device), mask.to(device)


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


def render_pair(row: dict, has_turns: bool, tokenizer, date_string: str) -> list[str]:
    """The prompt, and the prompt with the chosen and with the rejected answer, as texts."""
    check_label(row)
    answers = [row.get("chosen"), row.get("rejected")]
    if not has_turns:
        prompt, wholes = read_texts(row, answers)
        return [prompt] + wholes
    prompt, wholes = read_conversations(row, answers)
    if not prompt or prompt[-1]["role"] == "assistant":
        raise UserError("its answers are the same, or have no common prompt of a user")
    texts = [render(prompt, row, tokenizer, date_string, is_prompt=True)]
    for whole in wholes:
        roles = {turn["role"] for turn in whole[len(prompt) :]}
        if roles != {"assistant"}:  # turns of a user would be trained
            raise UserError("an answer has turns of others than the assistant, or none of its own")
        texts.append(render(whole, row, tokenizer, date_string, is_prompt=False))
    return texts


def make_pairs(rows, tokenizer, max_length: int, date_string: str, rank: int) -> list[Pair]:
    """The rows that can be used, as tokens. What is left out or cut is counted in print."""
    has_turns = uses_turns(rows, tokenizer)
    texts = []  # three for each row in `numbers`
    numbers = []
    reasons = []
    for number, row in enumerate(rows, start=1):
        try:
            texts += render_pair(row, has_turns, tokenizer, date_string)
            numbers.append(number)
        except (UserError, TemplateError) as error:
            reasons.append(f"row {number}: {error!r}")
    ids = tokenize(texts, has_turns, tokenizer)

    # A prompt ends where its ids and those of both whole texts part. That may be before its own
    # end: an open prompt may end in `<think>`, where the answers have none; or a token may span the
    # seam, as `=1` in `1+1=` + `12`.
    pairs = []
    num_cut = 0
    for i, number in enumerate(numbers):
        prompt_ids = ids[3 * i]
        chosen_ids = ids[3 * i + 1]
        rejected_ids = ids[3 * i + 2]
        start = common_length(prompt_ids, chosen_ids)
        start = min(start, common_length(prompt_ids, rejected_ids))
        if start == 0 or start >= max_length:
            reasons.append(f"row {number}: its prompt has 0 or more than {max_length} tokens")
        elif chosen_ids[:max_length] == rejected_ids[:max_length]:
            reasons.append(f"row {number}: its answers have the same first {max_length} tokens")
        else:
            if max(len(chosen_ids), len(rejected_ids)) > max_length:
                num_cut += 1
            pair = Pair(
                prompt=texts[3 * i],
                prompt_ids=prompt_ids[:start],
                chosen_ids=chosen_ids[start:max_length],
                rejected_ids=rejected_ids[start:max_length],
            )
            pairs.append(pair)
    report_left_out(reasons, len(rows), rank)
    if num_cut > 0 and rank == 0:
        print(f"{num_cut} of {len(pairs)} pairs have an answer that is cut at {max_length} tokens")
    return pairs


def load_pairs(args: Args, tokenizer, run_dir: Path, date_string: str, rank: int):
    """Pairs to train on, and pairs to evaluate on, which share no prompt."""
    if args.model_name_or_path is None:
        train_rows, test_rows = json.loads((run_dir / "pairs.json").read_text())
    else:
        train_rows, test_rows = load_rows(args)
    used = ("prompt", "chosen", "rejected", "label", "tools", "chat_template_kwargs")
    check_columns(train_rows, used, rank)
    if "margin" in train_rows[0]:
        raise UserError("--dataset-name has a `margin`, which DPO does not use: remove the column")
    train = make_pairs(train_rows, tokenizer, args.max_length, date_string, rank)
    held_out = make_pairs(test_rows, tokenizer, args.max_length, date_string, rank)
    return separate(args, train, held_out, rank)


def hash_pairs(pairs: list[Pair]) -> str:
    """The log-probabilities of the reference are saved in the order of the pairs."""
    digest = hashlib.sha256()
    for pair in pairs:
        ids = [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]
        digest.update(json.dumps(ids).encode())
    return digest.hexdigest()


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
    if args.max_steps is not None and args.max_steps < 1:
        raise UserError("--max-steps must be at least 1")
    for name in ("eval_steps", "save_steps", "micro_batch_size"):
        if vars(args)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.train_batch_size < world_size:
        raise UserError("--train-batch-size must be at least the number of processes")
    if not (args.beta > 0 and args.max_grad_norm > 0 and args.rpo_alpha >= 0):
        raise UserError("--beta and --max-grad-norm must be above 0, --rpo-alpha at least 0")
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError("--label-smoothing must be at least 0 and below 0.5")
    if args.label_smoothing > 0 and args.loss_type in ("ipo", "hinge"):
        raise UserError(f"--label-smoothing has no effect with --loss-type {args.loss_type}")
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


def is_right(answer: str, row: dict) -> bool:
    return answer.split(";")[-1] == row["answer"]


def write_tiny_pairs(run_dir: Path, args: Args, device) -> None:
    """Sample answers of the tiny model, and pair right answers to a sum with wrong ones.

    Of 32 answers, the longest make at most 4 pairs: wrong answers that show their work are rare,
    but the only ones to teach that work must also be right.
    """
    model, tokenizer = load_model(str(run_dir / "sft"), args, device)
    splits = []
    for rows in addition_rows():
        prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
        answers = sample_answers(args, model, tokenizer, prompts, num_answers=32, max_tokens=16)
        pairs = []
        for i, row in enumerate(rows):
            own = sorted(answers[32 * i : 32 * i + 32], key=len, reverse=True)
            right = [answer for answer in own if is_right(answer, row)]
            wrong = [answer for answer in own if not is_right(answer, row)]
            for chosen, rejected in zip(right[:4], wrong):
                pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
        splits.append(pairs)
    (run_dir / "pairs.json").write_text(json.dumps(splits))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
