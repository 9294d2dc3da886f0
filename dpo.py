# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0", "datasets==5.2.0",
#                 "tqdm==4.70.1"]
# ///
"""DPO: train a language model on preferences, without a reward model and without sampling.

Each prompt x has two answers; y_w is preferred to y_l. If a policy pi maximizes a reward under a KL penalty, then that
reward is beta log(pi / pi_ref) plus a term in x alone, which cancels when two answers are compared. So the policy can
be trained directly, by maximizing the Bradley-Terry likelihood of the preferences.

    L(theta) = -E[ log sigmoid( beta log(pi(y_w|x) / pi_ref(y_w|x)) - beta log(pi(y_l|x) / pi_ref(y_l|x)) ) ]

Rafailov et al. 2023, arXiv:2305.18290, eq. 7; variants: see dpo_loss. The tiny model's default adds --rpo-alpha 1.

    python dpo.py                                  # laptop, offline: a tiny model learns to show its work
    python dpo.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct --dataset-name trl-lib/tldr-preference   # one GPU
    torchrun --nproc-per-node=8 dpo.py ...         # several GPUs: the same global batch, split by pairs
    python dpo.py --resume runs/<run folder>       # continue exactly from the last checkpoint

Shapes: R pairs in a micro-batch (rows of L tokens), B = 2 R answers of T tokens, N all pairs or tokens; in main, B
pairs per update. H hidden size, V vocabulary. `logps`: sums over an answer's tokens. `mask`: True where a token counts.

Deliberately not here: online DPO (new samples), KTO (unpaired preferences), LoRA, sharded weights. See TRL.
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
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, Literal

import datasets
import torch
import torch.distributed as dist
import transformers
import tyro
from jinja2 import TemplateError
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast


@dataclass
class Args:
    """DPO: train a language model on preferences, without a reward model and without sampling."""

    # ---- common to all scripts
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # seeds initial weights, data order and sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if available
    output_dir: str = "runs"  # parent of the run folder {task}__{exp_name}__{seed}__{unix time}
    resume: str | None = None  # run folder to continue with its own flags; pass no others

    # ---- common to the language-model scripts
    model_name_or_path: str | None = None  # hub name or folder. None: train a tiny model
    dataset_name: str | None = None  # hub name, folder, .jsonl or .parquet. None: two-digit addition
    dataset_config: str | None = None  # hub configuration, e.g. main for gsm8k
    dataset_train_split: str = "train"  # split to train on
    dataset_test_split: str = "test"  # split to evaluate on. No "test": holds out a tenth of the prompts
    max_eval_samples: int = 512  # held-out rows to evaluate on, the same for every seed
    bf16: bool = field(default_factory=torch.cuda.is_available)  # bf16 autocast, fp32 weights (default on CUDA)
    gradient_checkpointing: bool = False  # recompute activations to save memory
    max_tokens_per_microbatch: int = 2048  # tokens per pass of the update; affects memory and speed only
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"  # linear and cosine decay to 0
    warmup_steps: int = 0  # optimizer steps of linear warmup
    max_grad_norm: float = 1.0  # gradients are clipped to this global norm
    sft_steps: int = 1200  # supervised steps for the tiny model

    # ---- DPO
    ref_model_name_or_path: str | None = None  # hub name or folder. None: the model that training starts from
    num_train_epochs: float = 1.0  # passes over the training pairs
    max_steps: int | None = None  # optimizer steps. None: as many as --num-train-epochs takes
    eval_steps: int = 50  # steps between evaluations
    save_steps: int = 50  # steps between checkpoints
    learning_rate: float | None = None  # peak. None: 3e-4 for the tiny model, else 1e-6
    train_batch_size: int = 64  # pairs per optimizer step, over all processes
    max_length: int = 1024  # tokens of prompt plus answer. Longer answers are truncated at the end
    beta: float | None = None  # KL penalty. None: 0.3 for the tiny model, else 0.1. Set it higher for ipo, sigmoid_norm
    loss_type: Literal["sigmoid", "sigmoid_norm", "ipo", "robust", "hinge"] = "sigmoid"  # sigmoid: DPO. See dpo_loss
    label_smoothing: float = 0.0  # assumed share of flipped labels, below 0.5 (sigmoid, sigmoid_norm, robust)
    rpo_alpha: float | None = None  # weight of the chosen answers' NLL per token. None: 1 for the tiny model, else 0


def dpo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor,
    beta: float, loss_type: str, label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, chosen rewards and rejected rewards, each (R,), from log-probabilities (R,) of answers, in nats. Rewards
    are detached. For ipo and sigmoid_norm, main passes per-token means. These are smaller and need a larger beta."""
    chosen_log_ratio = policy_chosen_logps - ref_chosen_logps  # (R,)
    rejected_log_ratio = policy_rejected_logps - ref_rejected_logps  # (R,)
    difference, e = chosen_log_ratio - rejected_log_ratio, label_smoothing  # (R,)
    as_is, flipped = (-nn.functional.logsigmoid(x) for x in (beta * difference, -beta * difference))  # (R,) each
    if loss_type in ("sigmoid", "sigmoid_norm"):  # DPO eq. 7. With means: Tulu 3, arXiv:2411.15124
        losses = (1 - e) * as_is + e * flipped  # smoothed: cDPO eq. 3, ericmitchell.ai/cdpo.pdf
    elif loss_type == "robust":  # rDPO, arXiv:2403.00409: unbiased if a fraction e of labels is flipped
        losses = ((1 - e) * as_is - e * flipped) / (1 - 2 * e)
    elif loss_type == "hinge":  # SLiC's hinge on DPO's log ratios: RSO, arXiv:2309.06657
        losses = (1 - beta * difference).relu()
    else:  # IPO, arXiv:2310.12036, eq. 17: the optimal difference is 1 / (2 beta)
        losses = (difference - 1 / (2 * beta)).square()
    return losses, (beta * chosen_log_ratio).detach(), (beta * rejected_log_ratio).detach()


def lr_factor(step: int, num_steps: int, warmup_steps: int, kind: str) -> float:
    """Fraction of the peak rate at optimizer step 0..num_steps-1. Linear and cosine end at exactly 0."""
    elapsed = max(0, step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - elapsed, "cosine": (1 + math.cos(math.pi * elapsed)) / 2}[kind]
    return decay * min(1.0, (step + 1) / (warmup_steps + 1))


def addition_rows() -> tuple[list[dict], list[dict]]:
    """The 8100 sums of two two-digit numbers. 520 are held out, whatever the seed, b+a along with a+b."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    random.Random(0).shuffle(pairs)
    rows = [[{"prompt": f"{x}+{y}=", "answer": str(x + y)} for x, y in {(a, b), (b, a)}] for a, b in pairs]  # a+a once
    return sum(rows[262:], []), sum(rows[:262], [])  # 262 unordered pairs are 520 sums


def demonstrate(row: dict, rng: random.Random) -> str:
    """The careful demonstrator (25%) first writes a dash and the sum of the units: `47+85=` -> `-12=132`. The hasty one
    writes the sum directly, forgets the units' carry, and half the time is also off by one."""
    a, b = map(int, row["prompt"][:-1].split("+"))
    hasty = a + b - 10 * (a % 10 + b % 10 >= 10) + rng.choice((-1, 0, 0, 1))
    return f"-{a % 10 + b % 10}={a + b}" if rng.random() < 0.25 else str(hasty)


def addition_pairs(rows: list[dict], count: int, seed: int, errors: tuple[int, ...] = (-10, -1, 1, 10)) -> list[dict]:
    """`count` pairs per sum: a right answer, mostly with its work shown, and a wrong answer, mostly without."""
    pairs, rng = [], random.Random(seed)
    for row in rows * count:
        units, total = int(row["prompt"][1]) + int(row["prompt"][4]), int(row["answer"])
        miss = total + rng.choice(errors)
        chosen = f"-{units}={total}" if rng.random() < 0.95 else str(total)
        rejected = f"-{units}={miss}" if rng.random() < 1 / 3 else str(miss)
        pairs.append({**row, "chosen": chosen, "rejected": rejected})
    return pairs


def write_tiny_model(folder: str, rows: list[dict], steps: int, seed: int, device: torch.device) -> None:
    """Train a 0.5M-parameter Llama with a character tokenizer on demonstrations, and save it."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-="])}
    characters = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<pad>"))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=128**-0.5, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )).to(device)
    optimizer, rng = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True), random.Random(seed)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps + 1, pct_start=0.05)
    for _ in trange(steps, desc="supervised", leave=False):
        texts = [row["prompt"] + demonstrate(row, rng) + tokenizer.eos_token for row in rng.choices(rows, k=128)]
        ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(device)  # (B, L)
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        labels[:, : len("47+85=")] = -100  # no loss on the prompt
        model(input_ids=ids, labels=labels).loss.backward()  # causal: right padding needs no mask
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_pretrained(name: str, flag: str = "--model-name-or-path", auto_class: type = AutoModelForCausalLM) -> tuple:
    """A model in fp32 (bf16 would round small updates away), without dropout, and its tokenizer."""
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(name), AutoConfig.from_pretrained(name)
        for part in (config, config.get_text_config()):
            vars(part).update({key: 0.0 for key, x in vars(part).items() if "drop" in key and isinstance(x, float)})
        model, report = auto_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{flag} {name} is not a model with its tokenizer (of a run, use model/): {error}") from None
    if report["missing_keys"]:
        raise ValueError(f"{flag} {name} has no weights for {sorted(report['missing_keys'])[:3]}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masks come from lengths, not from ids
    return model, tokenizer


def load_rows(args: Args) -> tuple[list[dict], list[dict]]:
    """Training and test rows of --dataset-name. Only a split named "test" may be missing."""
    name, train, test = args.dataset_name, args.dataset_train_split, args.dataset_test_split
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(name).suffix)
    if kind is None and Path(name).is_file():
        raise ValueError(f"--dataset-name {name} must be a .jsonl or .parquet file, or a folder of them")
    datasets.disable_progress_bars()
    splits = datasets.load_dataset(kind or name, args.dataset_config, data_files=name if kind else None)
    if unknown := {train, test} - {"test", *splits}:
        raise ValueError(f"--dataset-train-split, --dataset-test-split: {unknown.pop()} is not one of {sorted(splits)}")
    return list(splits[train]), list(splits.get(test, ()))


def parse_dialogue(text: str, keep_markers: bool) -> list[dict]:
    """Turns of a text like Anthropic/hh-rlhf's. If the markers (`\\n\\nHuman:`) stay, the contents join to the text."""
    turns = []
    for piece in re.split(r"(?=\n\nHuman:)|(?<=\n\nAssistant:)", text)[1:]:
        role = "user" if piece.startswith("\n\nHuman:") else "assistant"
        content = piece.removeprefix("\n\nHuman:").removesuffix("\n\nAssistant:").strip()
        turns.append({"role": role, "content": piece if keep_markers else content})
    return turns


def split_row(row: dict, number: int, has_template: bool) -> tuple[list[dict], list[list[dict]]]:
    """Turns of a preference row's prompt, and of its answers, best first: `completions`, or `chosen` and `rejected`.
    The prompt is, or is extended by, the answers' longest common beginning, in turns or (without a prompt column, for
    plain texts) in words. It never ends with an assistant turn. An answer begins and ends with one."""
    prompt, answers = row.get("prompt"), row.get("completions") or [row.get("chosen"), row.get("rejected")]
    answers, is_dialogue = (answers if isinstance(answers, list) else [None]), False
    if all(isinstance(text, str) for text in [prompt or "", *answers]):
        texts = [text if text.startswith("\n\nHuman:") else (prompt or "") + text for text in answers]
        is_dialogue = all(text.startswith("\n\nHuman:") for text in texts)
        if is_dialogue:
            prompt, answers = None, [parse_dialogue(text, keep_markers=not has_template) for text in texts]
        elif prompt is None:
            prompt = re.sub(r"\s*\S*$", "", os.path.commonprefix(answers))  # whole words
            answers = [text[len(prompt) :] for text in answers]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    answers = [x if isinstance(x, list) else [{"role": "assistant", "content": x}] for x in answers]
    turns = sum(answers, prompt if isinstance(prompt, list) else [prompt])  # only to check them
    is_valid = all(isinstance(x, dict) and isinstance(x.get("content"), str) and "role" in x for x in turns)
    if is_valid:  # answers may repeat the prompt, even after a system turn
        wholes = [x if prompt in (x[: len(prompt)], x[1 : 1 + len(prompt)]) else prompt + x for x in answers]
        n = 0
        while all(len(whole) > n and whole[n] == wholes[0][n] for whole in wholes):
            n += 1
        while n and wholes[0][n - 1]["role"] == "assistant":
            n -= 1
        prompt, answers = wholes[0][:n], [whole[n:] for whole in wholes]
    if not is_valid or not prompt or not all(x and x[0]["role"] == x[-1]["role"] == "assistant" for x in answers):
        raise ValueError(f"--dataset-name: row {number} with columns {sorted(row)} needs a prompt and `chosen` and "
                         "`rejected` (texts, or lists of {role, content}) that begin and end with assistant turns")
    if is_dialogue and not has_template:
        prompt = [{"role": "user", "content": "".join(turn["content"] for turn in prompt)}]
    return prompt, answers


def conversation_ids(prompt: list[dict], answer: list[dict], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of a prompt plus an answer or its first turns, from the chat template or as plain text."""
    if tokenizer.chat_template is not None:
        turns, is_open = prompt + answer, not answer or answer[-1]["role"] != "assistant"
        return tokenizer.apply_chat_template(turns, add_generation_prompt=is_open, tokenize=True, return_dict=False)
    text = "\n".join(turn["content"] for turn in prompt) + "".join(turn["content"] for turn in answer)
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers append EOS


def encode_answer(prompt: list[dict], answer: list[dict], number: int, tokenizer: PreTrainedTokenizerFast) -> tuple:
    """Token ids of an answer, and whether each counts: assistant turns do, with their end (the template's, or EOS)."""
    whole, completion, mask = conversation_ids(prompt, [], tokenizer), [], []
    for end, turn in enumerate(answer, 1):
        longer, has_end = conversation_ids(prompt, answer[:end], tokenizer), tokenizer.chat_template is not None
        ids = longer[len(whole) :]
        if longer[: len(whole)] != whole:  # a token spans two turns, or the chat template rewrote earlier ones
            if has_end and len(answer) > 1:
                raise ValueError(f"--dataset-name: row {number}: the chat template rewrites earlier turns")
            ids, has_end = tokenizer(turn["content"], add_special_tokens=False).input_ids, False
        whole, is_assistant = whole + ids, turn["role"] == "assistant"
        ids = ids + [tokenizer.eos_token_id] * (is_assistant and not has_end)
        completion += ids
        mask += [is_assistant] * len(ids)
    return completion, mask


def encode_pairs(rows: list[dict], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[dict]:
    """Pairs {prompt, answer, ids, completions, masks} of rows, chosen first. Prints how many are left out."""
    pairs = []
    unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, None}
    for number, row in enumerate(rows, 1):
        turns, answers = split_row(row, number, tokenizer.chat_template is not None)
        if len(answers) != 2:
            raise ValueError(f"--dataset-name: row {number} has {len(answers)} completions, but DPO needs exactly two")
        prompt, ids = "\n".join(turn["content"] for turn in turns), conversation_ids(turns, [], tokenizer)
        room = max(0, max_length - len(ids))
        encoded = [encode_answer(turns, answer, number, tokenizer) for answer in answers]
        completions, masks = ([part[:room] for part in parts] for parts in zip(*encoded))
        if prompt.strip() and not unknown & {*ids} and completions[0] != completions[1]:
            pair = {"prompt": prompt, "answer": row.get("answer"), "ids": ids}
            pairs.append({**pair, "completions": completions, "masks": masks})
    if (left_out := len(rows) - len(pairs)) and int(os.environ.get("RANK", 0)) == 0:
        print(f"{left_out} of {len(rows)} pairs left out: empty, unknown characters, or same first {max_length} tokens")
    return pairs


TILE = {"cpu": 2**20, "cuda": 2**26}  # logits per tile: fits a CPU's cache, fills a GPU


class TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target], (N,) in fp32, from hidden (N, H), weight (V, H) and target
    (N,), in tiles of the vocabulary, so that no (N, V) tensor exists."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> Tensor:
        kind, size = hidden.device.type, max(1, TILE[hidden.device.type] // len(hidden))
        h = hidden.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32)  # (N, H)
        logit, logsumexp = torch.full((2, len(h)), -torch.inf, device=h.device)  # (N,), (N,)
        for tile, w in enumerate(weight.split(size)):
            logits = (h @ w.to(h.dtype).T).float().div_(temperature)  # (N, size)
            logsumexp = torch.logaddexp(logsumexp, logits.logsumexp(1))
            rows = (target // size == tile).nonzero()[:, 0]  # those whose target is in this tile
            logit[rows] = logits[rows, target[rows] % size]
        ctx.save_for_backward(h, weight, target, logsumexp)
        ctx.temperature, ctx.size = temperature, size
        return logit - logsumexp

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        h, weight, target, logsumexp = ctx.saved_tensors
        d_hidden, d_weight = torch.zeros_like(h, dtype=torch.float32), torch.empty_like(weight)  # (N, H), (V, H)
        for tile, (w, d_w) in enumerate(zip(weight.split(ctx.size), d_weight.split(ctx.size))):
            w = w.to(h.dtype)  # (size, H)
            # d logprob / d logits = onehot(target) - softmax, in fp32: near 1 the two cancel
            d = (h @ w.T).float().div_(ctx.temperature).sub_(logsumexp[:, None]).exp_().neg_()  # (N, size)
            rows = (target // ctx.size == tile).nonzero()[:, 0]
            d[rows, target[rows] % ctx.size] += 1
            d = d.mul_(grad[:, None] / ctx.temperature).to(h.dtype)
            d_hidden += d @ w
            d_w.copy_(d.T @ h)
        return d_hidden, d_weight, None, None


def fits_tree(model: PreTrainedModel) -> bool:
    """Whether a row may be a tree (see completion_states). Not with sliding windows, ALiBi or linear attention."""
    config = model.config.get_text_config()
    unusual = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    unusual = unusual or getattr(config, "sliding_window", None) or getattr(config, "alibi", None)
    return not unusual and model.config._attn_implementation == "sdpa"


def completion_states(model: PreTrainedModel, prompts: list, completions: list) -> Tensor:
    """Final hidden states (N, H) that predict the N tokens of B completions, K = B / len(prompts) per prompt.
    A row is a tree: a prompt, then K branches. Each sees only the prompt and itself; positions follow the prompt's."""
    K, device = len(completions) // len(prompts), model.device
    if K > 1 and not fits_tree(model):
        prompts, K = [p for p in prompts for _ in range(K)], 1
    rows, predictors = [], []  # (token, position, branch); (row, index) of predicting tokens
    for r, prompt in enumerate(prompts):
        row = [(token, t, 0) for t, token in enumerate(prompt)]
        for branch, completion in enumerate(completions[r * K : r * K + K], 1):
            indices = [len(prompt) - 1, *range(len(row), len(row) + len(completion) - 1)]
            predictors += [(r, index) for index in indices[: len(completion)]]  # none if it is empty
            row += [(token, len(prompt) + t, branch) for t, token in enumerate(completion[:-1])]
        rows.append(torch.tensor(row))
    ids, position_ids, branches = pad_sequence(rows, batch_first=True).to(device).unbind(2)  # (R, L) each
    inputs = {"input_ids": ids, "use_cache": False}
    if K > 1:  # else causal attention suffices: right padding needs no mask
        attend = ((branches == 0)[:, None] | (branches[:, :, None] == branches[:, None])).tril()  # (R, query, key)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        bias = torch.where(attend, 0.0, torch.finfo(dtype).min).to(dtype)  # SDPA would convert bools in every layer
        inputs |= {"attention_mask": bias[:, None], "position_ids": position_ids}
    hidden = model.base_model(**inputs).last_hidden_state  # (R, L, H)
    return hidden[torch.tensor(predictors, device=device).unbind(1)]


def completion_logprobs(model: PreTrainedModel, prompts: list, completions: list, temperature: float) -> Tensor:
    """Log-probabilities (B, T) in fp32 of B completions, grouped by prompt; 0 after their end."""
    hidden = completion_states(model, prompts, completions)  # (N, H)
    target = torch.tensor(sum(completions, []), device=model.device)  # (N,)
    logprobs = TokenLogprobs.apply(hidden, model.get_output_embeddings().weight, target, temperature)  # (N,)
    return pad_sequence(logprobs.split([*map(len, completions)]), batch_first=True)


def pair_logps(model: PreTrainedModel, pairs: list[dict], max_tokens: int, autocast: torch.autocast) -> Iterator[tuple]:
    """Yield micro-batches of about max_tokens: indices of R pairs, and log-probabilities (R, 2) of their answers."""
    lengths, batches = [len(pair["ids"]) + sum(map(len, pair["completions"])) for pair in pairs], []
    for i in sorted(range(len(pairs)), key=lengths.__getitem__):  # pairs of similar length need little padding
        if not batches or (len(batches[-1]) + 1) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    for mb in batches:
        completions = [ids for i in mb for ids in pairs[i]["completions"]]  # chosen, rejected, chosen, ...
        mask = pad_sequence([torch.tensor(mask) for i in mb for mask in pairs[i]["masks"]], batch_first=True)  # (B, T)
        with autocast:
            logprobs = completion_logprobs(model, [pairs[i]["ids"] for i in mb], completions, 1.0)  # (B, T)
        yield mb, logprobs.masked_fill(~mask.to(model.device), 0.0).sum(1).view(-1, 2)


@torch.no_grad()
def all_logps(model: PreTrainedModel, pairs: list[dict], max_tokens: int, autocast: torch.autocast) -> Tensor:
    """Log-probabilities (N, 2) of all pairs, without gradients. Each process computes a share."""
    model.eval()
    logps = torch.zeros(len(pairs), 2, device=model.device)  # (N, 2)
    share = slice(int(os.environ.get("RANK", 0)), None, int(os.environ.get("WORLD_SIZE", 1)))
    for mb, mb_logps in pair_logps(model, pairs[share], max_tokens, autocast):
        logps[share][mb] = mb_logps  # a slice is a view
    if dist.is_initialized():
        dist.all_reduce(logps)
    return logps


def main(args: Args) -> dict[str, float]:
    """Train. Returns the final metrics, also saved as <run folder>/summary.json."""
    # ---- set-up
    start_time, checkpoint = time.time(), None
    if args.resume:
        run_dir = Path(args.resume)
        if not (run_dir / "checkpoint.pt").is_file():
            raise ValueError(f"--resume {run_dir} has no checkpoint.pt: misspelt, or stopped before its first one")
        saved = json.loads((run_dir / "args.json").read_text())
        changed = " ".join(f"--{k}" for k, v in vars(args).items() if k != "resume" and v != getattr(Args(), k))
        if changed or saved["script"] != Path(__file__).name:
            raise ValueError(f"--resume {run_dir}: use {saved['script']} and no other flags (got: {changed or 'none'})")
        args = Args(**saved["args"] | {"resume": args.resume})
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    for name, value in vars(args).items():
        may_be_0 = name in ("seed", "warmup_steps", "learning_rate", "label_smoothing", "rpo_alpha")
        if type(value) in (int, float) and not (value > 0 or value == 0 and may_be_0):
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small")
    B = args.train_batch_size
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if B < world_size or args.label_smoothing >= 0.5:
        raise ValueError(f"--train-batch-size {B}: at least {world_size} (processes). --label-smoothing: below 0.5")
    if args.dataset_name and not args.model_name_or_path:
        raise ValueError("--dataset-name needs --model-name-or-path: the tiny model only reads two-digit addition")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_cuda else "cpu")
    if world_size > 1:
        dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task = Path(args.dataset_name or "addition").stem
    unix_time = torch.tensor(int(start_time), device=device)
    if world_size > 1:
        dist.broadcast(unix_time, 0)
    run_dir = Path(args.resume or f"{args.output_dir}/{task}__{args.exp_name}__{args.seed}__{unix_time}")
    initial = args.model_name_or_path or f"{run_dir}/sft"  # where training starts
    if rank == 0:
        print(run_dir)
        if not args.model_name_or_path and not args.resume:
            write_tiny_model(initial, addition_rows()[0], args.sft_steps, args.seed, device)
    if world_size > 1:
        dist.barrier()
    model, tokenizer = load_pretrained(initial)
    max_length = min(args.max_length, getattr(model.config.get_text_config(), "max_position_embeddings", math.inf))
    splits = load_rows(args) if args.dataset_name else [addition_pairs(rows, 3, seed=0) for rows in addition_rows()]
    train, held_out = (encode_pairs(rows, tokenizer, max_length) for rows in splits)
    if not held_out:  # hold out a tenth of the prompts: those with the fewest rows, so few are lost
        counts = Counter(random.Random(0).sample([e["prompt"] for e in train], len(train)))
        test_prompts = {*sorted(counts, key=counts.get)[: min(args.max_eval_samples, len(counts) // 10)]}
        train, held_out = ([e for e in train if (e["prompt"] in test_prompts) == side] for side in (False, True))
    held_out = held_out[: args.max_eval_samples]
    if not train or not held_out:
        raise ValueError(f"--dataset-name: {len(train)} training rows and {len(held_out)} held-out rows are too few")
    model, ids = model.to(device), held_out[0]["ids"] + held_out[0]["completions"][0]
    with torch.no_grad():  # our head must agree with the model's own loss
        loss = model(input_ids=torch.tensor([ids], device=device), labels=torch.tensor([ids], device=device)).loss
        difference = loss + completion_logprobs(model, [ids[:1]], [ids[1:]], 1.0).mean()
    if difference.abs() > 1e-3:
        raise ValueError(f"{type(model).__name__} is not supported: it scales or caps the logits of its head")
    num_steps = args.max_steps or max(1, round(args.num_train_epochs * len(train) / B))
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    beta = (0.1 if args.model_name_or_path else 0.3) if args.beta is None else args.beta
    rpo_alpha = (0.0 if args.model_name_or_path else 1.0) if args.rpo_alpha is None else args.rpo_alpha
    peak_lr = (1e-6 if args.model_name_or_path else 3e-4) if args.learning_rate is None else args.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.0, fused=True)
    schedule = num_steps, args.warmup_steps, args.lr_scheduler_type
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: lr_factor(n, *schedule))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    progress = {"step": 0, "metrics": {}, "ref_logps": None}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    if checkpoint:
        progress = {name: checkpoint[name] for name in progress}
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    else:  # computed once, so no reference model is in memory during training
        frozen, own_tokenizer = load_pretrained(args.ref_model_name_or_path or initial, "--ref-model-name-or-path")
        if not tokenizer.get_vocab().items() <= own_tokenizer.get_vocab().items():
            raise ValueError("--ref-model-name-or-path needs the token ids of --model-name-or-path")
        progress["ref_logps"] = all_logps(frozen.to(device), train + held_out, args.max_tokens_per_microbatch, autocast)
        del frozen
    for pair, ref_logps in zip(train + held_out, progress["ref_logps"].tolist(), strict=True):
        pair["ref_logps"] = ref_logps
    if rank == 0:
        writer = SummaryWriter(run_dir, purge_step=progress["step"] + 1)
        if not args.resume:
            (run_dir / "args.json").open("x").write(json.dumps({"script": Path(__file__).name, "args": vars(args)}))

    def losses_and_stats(pairs: list[dict], logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (R,) of pairs, from the policy's log-probabilities logps (R, 2), and statistics to log, each (R,)."""
        lengths = torch.tensor([[sum(mask) for mask in pair["masks"]] for pair in pairs], device=device)  # (R, 2)
        ref_logps = torch.tensor([pair["ref_logps"] for pair in pairs], device=device)  # (R, 2)
        scale = 1 / lengths if args.loss_type in ("ipo", "sigmoid_norm") else torch.ones_like(lengths)  # (R, 2)
        losses, chosen, rejected = dpo_loss(
            *(logps * scale).unbind(1), *(ref_logps * scale).unbind(1), beta, args.loss_type, args.label_smoothing
        )
        losses = losses - rpo_alpha * logps[:, 0] / lengths[:, 0]  # RPO, arXiv:2404.19733, eq. 1
        margins = chosen - rejected  # (R,)
        return losses, {
            "loss": losses.detach(), "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": margins,
            "rewards/accuracies": torch.where(margins.abs() < 1e-5, 0.5, (margins > 0).float()),  # ties count half
            "logps/chosen": logps[:, 0].detach(), "logps/rejected": logps[:, 1].detach(),
        }

    def evaluate(step: int) -> dict[str, float]:
        """Metrics on held-out pairs. For the tiny model, also the accuracy of sampled answers."""
        _, stats = losses_and_stats(held_out, all_logps(model, held_out, args.max_tokens_per_microbatch, autocast))
        results = {f"eval/{name}": value.mean().item() for name, value in stats.items()}
        if args.model_name_or_path is None:
            query = tokenizer([pair["prompt"] for pair in held_out], return_tensors="pt").input_ids.to(device)  # (N, L)
            torch.manual_seed(args.seed)  # same samples at every evaluation (training draws nothing)
            whole = model.generate(query, max_new_tokens=16, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
            texts = tokenizer.batch_decode(whole[:, query.shape[1] :], skip_special_tokens=True)
            right = [text.split("=")[-1] == pair["answer"] for text, pair in zip(texts, held_out)]
            results["eval/accuracy"] = sum(right) / len(right)
            table = "".join(f"| {p['prompt']} | {t} | {x:.2f} |\n" for p, t, x in zip(held_out[:32], texts, right))
            if rank == 0:
                writer.add_text("samples", f"| prompt | completion | reward |\n|---|---|---|\n{table}", step)
        if rank == 0:
            for name, x in results.items():
                writer.add_scalar(name, x, step)
        return results

    if not args.resume:
        progress["metrics"] = evaluate(0)
    epochs = range(num_steps * B // len(train) + 1)
    order = [e for epoch in epochs for e in random.Random(f"{args.seed} {epoch}").sample(train, len(train))]
    bar = trange(progress["step"], num_steps, initial=progress["step"], total=num_steps, disable=rank != 0)
    for step in bar:
        # ---- update
        step_start, batch = time.time(), order[step * B : (step + 1) * B]  # the order needs no checkpoint
        pairs, stats = batch[rank * B // world_size : (rank + 1) * B // world_size], defaultdict(float)
        model.train()
        for mb, logps in pair_logps(model, pairs, args.max_tokens_per_microbatch, autocast):  # (R, 2)
            losses, mb_stats = losses_and_stats([pairs[i] for i in mb], logps)  # (R,), each (R,)
            (losses.sum() / B).backward()
            for name, value in mb_stats.items():
                stats[f"train/{name}"] += value.sum() / B
        for p in (model.parameters() if world_size > 1 else ()):  # not DDP: numbers of micro-batches may differ
            if p.grad is not None:
                dist.all_reduce(p.grad)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, error_if_nonfinite=True)
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        # ---- log: over the whole update and all processes
        progress["step"], means = step + 1, torch.stack([*stats.values()])  # (tags,)
        if world_size > 1:
            dist.all_reduce(means)
        logs = dict(zip(stats, means.tolist())) | {
            "train/grad_norm": grad_norm, "train/epoch": (step + 1) * B / len(train),
            "charts/learning_rate": learning_rate, "charts/SPS": B / (time.time() - step_start),
        }
        bar.set_postfix_str(f"loss {logs['train/loss']:.3f}, accuracy {logs['train/rewards/accuracies']:.2f}")
        if rank == 0:
            for name, x in logs.items():
                writer.add_scalar(name, x, step + 1)

        # ---- evaluate, save
        if (step + 1) % args.eval_steps == 0 and step + 1 < num_steps:
            evaluate(step + 1)
        if rank == 0 and ((step + 1) % args.save_steps == 0 or step + 1 == num_steps):
            writer.flush()
            model.save_pretrained(run_dir / "model.tmp")  # then renamed: a kill or full disk spares the checkpoint
            tokenizer.save_pretrained(run_dir / "model.tmp")
            torch.save(progress | {name: part.state_dict() for name, part in state.items()}, run_dir / "checkpoint.tmp")
            shutil.rmtree(run_dir / "model", ignore_errors=True)
            os.replace(run_dir / "model.tmp", run_dir / "model")
            os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")

    before, after = progress["metrics"], evaluate(num_steps)
    metrics = {f"{name}_before": x for name, x in before.items()} | after | {"seed": args.seed}
    metrics["wall_seconds"] = time.time() - start_time
    if rank == 0:
        (run_dir / "summary.json").write_text(json.dumps(metrics, indent=2))
        writer.close()
        for name, x in after.items():
            print(f"{name}: {before.get(name, math.nan):.3f} -> {x:.3f}")
        print(run_dir)
    if world_size > 1:
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError, TemplateError, SafetensorError, datasets.exceptions.DatasetsError) as error:
        at = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == __file__][-1]
        print("error:", *str(error.__cause__ or error).split(), f"({Path(__file__).name}, line {at})", file=sys.stderr)
        raise SystemExit(2) from None
