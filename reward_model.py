# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0", "datasets==5.2.0",
#                 "tqdm==4.70.1", "matplotlib==3.11.2"]
# ///
"""Reward model: learn to score answers from human preferences.

Each prompt x comes with answers that a person has ranked. The model reads the prompt with one answer, and a linear head
on the last token's hidden state gives its reward r(x, y). Training maximizes the likelihood of the rankings, where y_i
is preferred to y_j with probability sigmoid(r(x, y_i) - r(x, y_j)).

    L = -E[ log sigmoid(r(x, y_w) - r(x, y_l) - margin) ]                         two answers
    L = -E[ sum_k log( exp r(x, y_k) / sum_{j >= k} exp r(x, y_j) ) ]             K answers, best first

Two answers: Bradley and Terry 1952; Christiano et al., arXiv:1706.03741. Margins: Llama 2, arXiv:2307.09288, eq. 2.
K answers: Plackett 1975, Luce 1959. --ranking-loss all_pairs: InstructGPT, arXiv:2203.02155, eq. 1.
Comparisons determine rewards only up to a constant per prompt. The saved config holds their mean and standard deviation
over a sample of training answers (`reward_mean`, `reward_std`), by which the policy scripts can normalize scores.

    python reward_model.py                         # laptop, offline: a tiny model learns which sums are right
    python reward_model.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset-name trl-lib/ultrafeedback_binarized                            # one GPU
    torchrun --nproc-per-node=8 reward_model.py ... # several GPUs: the same global batch, split by rankings
    python reward_model.py --resume runs/<run folder> # continue exactly from the last checkpoint

Shapes: R rankings of K answers (2 in a pair), B = R K answers; in main, B rankings per update. N tokens or pairs, rows
of L tokens, H hidden size.

Deliberately not here: process rewards, several heads, generative judges, LoRA, sharded weights. See TRL.
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
from matplotlib.figure import Figure
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast


@dataclass
class Args:
    """Reward model: learn to score answers from human preferences."""

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

    # ---- reward model
    num_train_epochs: float = 1.0  # passes over the rankings. InstructGPT (C.2) overfits with more than one
    max_steps: int | None = None  # optimizer steps. None: as many as --num-train-epochs takes
    eval_steps: int = 100  # steps between evaluations
    save_steps: int = 100  # steps between checkpoints
    learning_rate: float | None = None  # peak. None: 7e-4 for the tiny model, else 1e-5
    train_batch_size: int = 64  # rankings per optimizer step, over all processes
    max_length: int = 1024  # tokens of prompt plus answer. Longer answers are truncated at the end
    ranking_loss: Literal["plackett_luce", "all_pairs"] = "plackett_luce"  # loss for rankings of three or more answers
    center_rewards_coefficient: float = 0.0  # weight of a centering penalty: (sum of a ranking's rewards)^2, e.g. 0.01


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label: Tensor | float = 1.0
) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected - margin) over pairs; arguments broadcast. label is the probability that
    `chosen` is preferred (Christiano et al., section 2.2.3). margin is the lead required of the preferred answer."""
    difference = chosen - rejected
    margin = 0.0 if margin is None else margin
    return -(label * logsigmoid(difference - margin) + (1 - label) * logsigmoid(-difference - margin)).mean()


def plackett_luce_loss(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over rankings of -log prod_k exp(s_k) / sum_{j >= k} exp(s_j), for scores (R, K), best first. mask (R, K) is
    True where there is an answer. For K = 2 this is bradley_terry_loss."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    scores = scores.masked_fill(~mask, -torch.inf)  # (R, K)
    remaining = scores.flip(1).logcumsumexp(1).flip(1)  # (R, K): log of the sum over j >= k
    return torch.where(mask, remaining - scores, 0.0).sum(1).mean()


def preference_loss(scores: Tensor, margin: Tensor, label: Tensor, kind: str, center: float) -> tuple[Tensor, dict]:
    """Mean loss of R rankings with scores (R, K), best first, and statistics, one value per ranking, pair or answer.
    margin and label (R,) are for pairs (K = 2). kind "all_pairs" averages over all pairs (InstructGPT, eq. 1). center
    weighs the squared sum of a ranking's scores. Accuracy counts ties as half and leaves out pairs with label 0.5."""
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], 1)  # all pairs i < j
    if scores.shape[1] > 2 and kind == "plackett_luce":
        loss = plackett_luce_loss(scores)
    else:
        loss = bradley_terry_loss(scores[:, i], scores[:, j], margin[:, None], label[:, None])
    loss = loss + center * scores.sum(1).square().mean()
    lead = (scores[:, i] - scores[:, j]).detach() * (label - 0.5).sign()[:, None]  # (R, K (K - 1) / 2)
    lead = lead[label != 0.5].flatten()  # (N,): score of the preferred answer minus the other's
    stats = {"accuracy": (lead.sign() + 1) / 2, "margin": lead, "mean_reward": scores.detach().flatten()}
    return loss, stats | {"loss": loss.detach().expand(len(scores))}


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


def demonstrate(row: dict, rng: random.Random) -> str:
    """The careful demonstrator (25%) first writes a dash and the sum of the units: `47+85=` -> `-12=132`. The hasty one
    writes the sum directly, forgets the units' carry, and half the time is also off by one."""
    a, b = map(int, row["prompt"][:-1].split("+"))
    hasty = a + b - 10 * (a % 10 + b % 10 >= 10) + rng.choice((-1, 0, 0, 1))
    return f"-{a % 10 + b % 10}={a + b}" if rng.random() < 0.25 else str(hasty)


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


def encode_rankings(rows: list[dict], tokenizer: PreTrainedTokenizerFast, max_length: float) -> list[dict]:
    """Examples {prompt, ids, answers, ...}: ids are the texts' common start, answers the rest. Left out: empty prompts,
    unknown characters, and answers that are equal once truncated to max_length tokens."""
    examples, is_plain = [], tokenizer.chat_template is None
    tokenizer.truncation_side = "right"
    unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, None}
    for number, row in enumerate(rows, 1):
        turns, answers = split_row(row, number, has_template=not is_plain)
        margin = 0.0 if row.get("margin") is None else row["margin"]
        label = 1.0 if row.get("label") is None else row["label"]
        is_valid = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (margin, label)) and 0 <= label <= 1
        if not is_valid or len(answers) < 2 or (len(answers) > 2 and (margin, label) != (0, 1)):
            raise ValueError(f"--dataset-name: row {number} needs at least two answers (has {len(answers)}); `margin` "
                             f"({margin!r}) must be a number, `label` ({label!r}) in [0, 1], and both only with pairs")
        prompt = "\n".join(turn["content"] for turn in turns)
        texts = [prompt + "".join(turn["content"] for turn in answer) for answer in answers]
        if not is_plain:
            texts = tokenizer.apply_chat_template([turns + answer for answer in answers], tokenize=False)
        # Tokenized as in load_reward_model of the policy scripts.
        wholes = tokenizer(texts, add_special_tokens=is_plain, truncation=True, max_length=max_length).input_ids
        common = min(len(os.path.commonprefix(wholes)), *(len(ids) - 1 for ids in wholes))  # at least a token is left
        if prompt.strip() and len({*map(tuple, wholes)}) == len(wholes) and not unknown & {*sum(wholes, [])}:
            examples.append({
                "prompt": prompt, "ids": wholes[0][:common], "answers": [ids[common:] for ids in wholes],
                "margin": float(margin), "label": float(label),
                "characters": [float(sum(len(turn["content"]) for turn in answer)) for answer in answers],
            })
    if (left_out := len(rows) - len(examples)) and int(os.environ.get("RANK", 0)) == 0:
        print(f"{left_out} of {len(rows)} rankings left out: empty, unknown characters, same first {max_length} tokens")
    return examples


def load_classifier(name: str, flag: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A one-logit sequence classifier in fp32, without dropout, from a classifier or a language model; its tokenizer,
    with a pad token other than EOS. A new head has std 1 / sqrt(H + 1) (Stiennon et al. 2020, arXiv:2009.01325)."""
    auto_class = AutoModelForSequenceClassification
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = AutoConfig.from_pretrained(name, num_labels=1)
        for part in (config, config.get_text_config()):
            vars(part).update({key: 0.0 for key, x in vars(part).items() if "drop" in key and isinstance(x, float)})
        model, report = auto_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{flag} {name} is not a model with its tokenizer (of a run, use model/): {error}") from None
    new = sorted(report["missing_keys"])
    if missing := [key for key in new if key.startswith(model.base_model_prefix) and "pooler" not in key]:
        raise ValueError(f"{flag} {name} has no weights for {missing[:3]}")
    for key in new:
        if model.get_parameter(key).dim() > 1:  # transformers sets biases to 0
            nn.init.normal_(model.get_parameter(key), std=(config.get_text_config().hidden_size + 1) ** -0.5)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # else transformers takes EOS for padding
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        model.resize_token_embeddings(max(len(tokenizer), config.get_text_config().vocab_size), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


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


def completion_scores(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Scores (B,) in fp32 of B completions, K per prompt, grouped by prompt, read at their last tokens. Only causal
    models with a linear head `score` share a prompt: in an encoder, the prompt attends to the completion."""
    device, K = model.device, len(completions) // len(prompts)
    if isinstance(getattr(model, "score", None), nn.Linear):
        # completion_states leaves out a completion's last token: append a dummy 0 for it to leave out.
        states = completion_states(model, prompts, [completion + [0] for completion in completions])  # (N, H)
        last = torch.tensor([len(completion) + 1 for completion in completions]).cumsum(0) - 1  # (B,)
        with torch.autocast(device.type, enabled=False):  # bf16 scores between 4 and 8 are 1/32 apart
            return model.score(states[last.to(device)].float())[:, 0]
    rows = [torch.tensor(prompts[b // K] + completion) for b, completion in enumerate(completions)]
    ids = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id).to(device)  # (B, L)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)  # (B, L)
    return model(input_ids=ids, attention_mask=attention_mask).logits[:, 0].float()


def pack_rankings(model: PreTrainedModel, examples: list[dict], max_tokens: int) -> list[tuple[list, list, list]]:
    """Micro-batches of about max_tokens for completion_scores: (indices of examples, prompts, completions), of equal
    K. A row holds a whole ranking where that costs fewer FLOPs than a row per answer: over L tokens, a layer takes
    4 L^2 H for attention plus 24 L H^2 for its weights."""
    H = model.config.get_text_config().hidden_size
    can_share, shapes = fits_tree(model) and isinstance(getattr(model, "score", None), nn.Linear), []
    for e in examples:
        alone = [len(e["ids"]) + len(answer) for answer in e["answers"]]
        shared = len(e["ids"]) + sum(map(len, e["answers"]))
        is_shared = can_share and shared * (shared + 6 * H) <= sum(L * (L + 6 * H) for L in alone)
        shapes.append((len(alone), is_shared, shared if is_shared else len(alone) * max(alone)))
    batches, kind = [], None
    for i in sorted(range(len(examples)), key=shapes.__getitem__):  # rows of similar length need little padding
        K, is_shared, size = shapes[i]
        if kind != (K, is_shared) or (len(batches[-1][0]) + 1) * size > max_tokens:
            batches.append(([], [], []))
        kind = K, is_shared
        indices, prompts, completions = batches[-1]
        indices.append(i)
        prompts += [examples[i]["ids"]] * (1 if is_shared else K)
        completions += examples[i]["answers"]
    return batches


def global_means(values: dict[str, list[Tensor]]) -> dict[str, float]:
    """Mean of each name's values, given as a list of 1-D tensors, over all processes."""
    columns = [torch.cat(x) for x in values.values()]
    table = torch.stack([torch.stack([x.sum(), x.new_tensor(len(x))]) for x in columns])
    if dist.is_initialized():
        dist.all_reduce(table)  # (names, 2)
    return dict(zip(values, (table[:, 0] / table[:, 1]).tolist()))


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
        may_be_0 = name in ("seed", "warmup_steps", "learning_rate", "center_rewards_coefficient")
        if type(value) in (int, float) and not (value > 0 or value == 0 and may_be_0):
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small")
    B = args.train_batch_size
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if B % world_size:
        raise ValueError(f"--train-batch-size {B} must be a multiple of the number of processes, {world_size}")
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
    torch.manual_seed(args.seed)  # for the new head
    model, tokenizer = load_classifier(initial, "--model-name-or-path")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    max_length = min(args.max_length, context, tokenizer.model_max_length)
    splits = load_rows(args) if args.dataset_name else [addition_pairs(x, 6, 0, (-1, 1)) for x in addition_rows()]
    train, held_out = (encode_rankings(rows, tokenizer, max_length) for rows in splits)
    if not held_out:  # hold out a tenth of the prompts: those with the fewest rows, so few are lost
        counts = Counter(random.Random(0).sample([e["prompt"] for e in train], len(train)))
        test_prompts = {*sorted(counts, key=counts.get)[: min(args.max_eval_samples, len(counts) // 10)]}
        train, held_out = ([e for e in train if (e["prompt"] in test_prompts) == side] for side in (False, True))
    held_out = held_out[: min(args.max_eval_samples, len(held_out)) // world_size * world_size]
    if not train or not held_out:
        raise ValueError(f"--dataset-name: {len(train)} training rows and {len(held_out)} held-out rows are too few")
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    num_steps = args.max_steps or max(1, round(args.num_train_epochs * len(train) / B))
    peak_lr = (1e-5 if args.model_name_or_path else 7e-4) if args.learning_rate is None else args.learning_rate
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=peak_lr, weight_decay=0.0, fused=True)
    loss_flags = args.ranking_loss, args.center_rewards_coefficient
    schedule = num_steps, args.warmup_steps, args.lr_scheduler_type
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: lr_factor(n, *schedule))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    progress = {"step": 0, "metrics": {}}
    if checkpoint:
        progress = {name: checkpoint[name] for name in progress}
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    if rank == 0:
        writer = SummaryWriter(run_dir, purge_step=progress["step"] + 1)
        if not args.resume:
            (run_dir / "args.json").open("x").write(json.dumps({"script": Path(__file__).name, "args": vars(args)}))

    def scored_batches(examples: list[dict], bf16: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield, per micro-batch, scores (R, K) with gradients, margin (R,), label (R,) and characters (R, K)."""
        for mb, *inputs in pack_rankings(model, examples, args.max_tokens_per_microbatch):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                scores = completion_scores(model, *inputs).view(len(mb), -1)  # (R, K)
            columns = ([examples[i][name] for i in mb] for name in ("margin", "label", "characters"))
            yield scores, *(torch.tensor(column, device=device) for column in columns)

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        """Metrics over all pairs of the held-out rankings. Calibration error: Guo et al., arXiv:1706.04599, eq. 3."""
        values, bins = defaultdict(list), torch.zeros(5, 3, device=device)  # sums of confidence and accuracy; counts
        model.eval()
        for scores, margin, label, characters in scored_batches(held_out[rank::world_size], args.bf16):
            _, stats = preference_loss(scores, margin, label, *loss_flags)
            _, length_stats = preference_loss(characters, margin, label, *loss_flags)  # as if length were the score
            stats["accuracy_longer"] = length_stats["accuracy"]
            for name, x in stats.items():
                values[f"eval/{name}"].append(x)
            confidence = stats["margin"].abs().sigmoid()  # (N,), from 0.5 to 1, in bins of width 0.1
            sums = torch.stack([confidence, stats["accuracy"], torch.ones_like(confidence)], 1)  # (N, 3)
            bins.index_add_(0, (confidence * 10 - 5).long().clamp(max=4), sums)
        if world_size > 1:
            dist.all_reduce(bins)
        error = (bins[:, 0] - bins[:, 1]).abs().sum() / bins[:, 2].sum()
        results = global_means(values) | {"eval/calibration_error": error.item()}
        if rank == 0:
            figure = Figure(figsize=(4, 4), layout="constrained")
            axes = figure.add_subplot(xlabel="confidence of the model", ylabel="share of pairs ranked right")
            confidence, accuracy = (bins[:, :2] / bins[:, 2:]).T.tolist()  # empty bins are nan
            axes.plot([0.5, 1], [0.5, 1], "--", confidence, accuracy, "o")
            writer.add_figure("calibration", figure, step)
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
        own, values = batch[rank * B // world_size : (rank + 1) * B // world_size], defaultdict(list)
        model.train()
        for scores, margin, label, _ in scored_batches(own, args.bf16):
            loss, stats = preference_loss(scores, margin, label, *loss_flags)
            (loss * len(scores) / B).backward()  # micro-batches add up to the mean over the batch
            for name, x in stats.items():
                values[f"train/{name}"].append(x)
        for p in (model.parameters() if world_size > 1 else ()):  # not DDP: numbers of micro-batches may differ
            if p.grad is not None:
                dist.all_reduce(p.grad)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, error_if_nonfinite=True)
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        # ---- log: over the whole update and all processes
        progress["step"] = step + 1
        logs = global_means(values) | {
            "train/grad_norm": grad_norm, "train/epoch": (step + 1) * B / len(train),
            "charts/learning_rate": learning_rate, "charts/SPS": B / (time.time() - step_start),
        }
        bar.set_postfix_str(f"loss {logs['train/loss']:.3f}, accuracy {logs['train/accuracy']:.2f}")
        if rank == 0:
            for name, x in logs.items():
                writer.add_scalar(name, x, step + 1)

        # ---- evaluate, save
        if (step + 1) % args.eval_steps == 0 and step + 1 < num_steps:
            evaluate(step + 1)
        if rank == 0 and ((step + 1) % args.save_steps == 0 or step + 1 == num_steps):
            model.eval()
            with torch.no_grad():  # for reward_mean and reward_std: a random sample of training rankings
                measured = scored_batches(order[: min(args.max_eval_samples, len(train))], bf16=False)
                rewards = torch.cat([scores.flatten() for scores, *_ in measured])  # (answers,)
            model.config.reward_mean, model.config.reward_std = rewards.mean().item(), rewards.std().item()
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
