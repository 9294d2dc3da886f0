# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0", "datasets==5.2.0",
#                 "tqdm==4.70.1", "matplotlib==3.11.2"]
# ///
"""Reward model: learn from comparisons how good an answer is.

Each prompt x comes with answers that a person has ranked. The model reads the prompt with one answer, and a linear head
on the last token's hidden state gives its reward r(x, y). Training maximizes the likelihood of the rankings, where y_i
is preferred to y_j with probability sigmoid(r(x, y_i) - r(x, y_j)).

    L = -E[ log sigmoid(r(x, y_w) - r(x, y_l) - margin) ]                         two answers
    L = -E[ sum_k log( exp r(x, y_k) / sum_{j >= k} exp r(x, y_j) ) ]             K answers, best first

Two answers: Bradley and Terry 1952; Christiano et al. 2017, arXiv:1706.03741. Margins: Llama 2, arXiv:2307.09288, eq. 2.
K answers: Plackett 1975, Luce 1959. All their pairs: InstructGPT, arXiv:2203.02155, eq. 1: --ranking-loss all_pairs.
Comparisons determine rewards only up to a constant per prompt. The saved config holds the mean and standard deviation
over training answers (`reward_mean`, `reward_std`), with which grpo_llm.py can normalize the rewards.

    python reward_model.py                         # laptop, offline: a tiny model learns which sums are right
    python reward_model.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset-name trl-lib/ultrafeedback_binarized                            # one GPU
    torchrun --nproc-per-node=8 reward_model.py ... # several GPUs: the same global batch, split by rankings
    python reward_model.py --resume runs/<run folder> # continue exactly where the last checkpoint was written

Shapes: R rankings of K answers each (2 in a pair), B = R K answers, N tokens or pairs, rows of L tokens, H hidden size.
A ranking's `ids` are the tokens that all its answers begin with: the prompt, and maybe more.

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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

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
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass
class Args:
    """Reward model: learn from comparisons how good an answer is."""

    # ---- common to all scripts
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # seed of initial weights, data order and samples
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if available
    output_dir: str = "runs"  # parent of the run folder {task}__{exp_name}__{seed}__{unix time}
    resume: str | None = None  # run folder to continue, with that run's flags and no others

    # ---- common to the language-model scripts
    model_name_or_path: str | None = None  # hub name or folder. None: a tiny model made here
    dataset_name: str | None = None  # hub name, folder, .jsonl or .parquet. None: two-digit addition
    dataset_config: str | None = None  # configuration on the hub: main for openai/gsm8k
    dataset_train_split: str = "train"  # split to train on
    dataset_test_split: str = "test"  # if absent, a tenth of train is held out
    max_eval_samples: int = 512  # held-out rows to evaluate on, the same for every seed
    bf16: bool = field(default_factory=torch.cuda.is_available)  # bf16 autocast, fp32 weights. On with CUDA
    gradient_checkpointing: bool = False  # recompute activations to save memory
    max_tokens_per_microbatch: int = 2048  # tokens per forward pass: affects memory and speed only
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"  # reaches 0 at the last step
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    max_grad_norm: float = 1.0  # global norm to which gradients are clipped
    sft_steps: int = 1200  # supervised steps that make the tiny model

    # ---- reward model
    num_train_epochs: float = 1.0  # passes over the training rankings; more overfit (InstructGPT, appendix C.2)
    max_steps: int | None = None  # optimizer steps. None: as many as --num-train-epochs takes
    eval_steps: int = 100  # steps between evaluations
    save_steps: int = 100  # steps between checkpoints
    learning_rate: float | None = None  # peak. None: 7e-4 for the tiny model, else 1e-5
    train_batch_size: int = 64  # rankings per optimizer step, over all processes
    max_length: int = 1024  # tokens of a prompt with its answer; what is longer is cut at its end
    ranking_loss: Literal["plackett_luce", "all_pairs"] = "plackett_luce"  # of more than two answers
    center_rewards_coefficient: float = 0.0  # weight of a ranking's squared sum of rewards (arXiv:2312.09244; TRL: 0.01)


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label: Tensor | None = None
) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected - margin) over pairs with rewards (B,). label (B,) is the probability that
    `chosen` is preferred, 1 if None: the cross-entropy of Christiano et al. 2017, section 2.2.3. The margin is the lead
    required of whichever answer is preferred."""
    difference = chosen - rejected  # (B,)
    margin = 0.0 if margin is None else margin
    label = torch.ones_like(difference) if label is None else label
    return -(label * logsigmoid(difference - margin) + (1 - label) * logsigmoid(-difference - margin)).mean()


def plackett_luce_loss(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over rankings of -log prod_k exp(s_k) / sum_{j >= k} exp(s_j), for scores (R, K), best first. mask (R, K) is
    True where there is an answer. For K = 2 this is bradley_terry_loss."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    scores = scores.masked_fill(~mask, -torch.inf)  # (R, K)
    remaining = scores.flip(1).logcumsumexp(1).flip(1)  # (R, K): log of the sum over j >= k
    return torch.where(mask, remaining - scores, 0.0).sum(1).mean()


def differences(scores: Tensor) -> Tensor:
    """Scores (R, K) of rankings, best first, as the leads s_i - s_j (R, K (K - 1) / 2) of all pairs i < j."""
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    return scores[:, i] - scores[:, j]


def preference_loss(
    scores: Tensor, margin: Tensor, label: Tensor, ranking_loss: str, center_rewards_coefficient: float
) -> Tensor:
    """Mean loss of rankings with scores (R, K). margin and label (R,) belong to pairs. all_pairs is the mean of
    Bradley-Terry's loss over a ranking's pairs. The last term keeps the mean reward near 0."""
    if scores.shape[1] == 2:
        loss = bradley_terry_loss(scores[:, 0], scores[:, 1], margin, label)
    elif ranking_loss == "plackett_luce":
        loss = plackett_luce_loss(scores)
    else:
        loss = -logsigmoid(differences(scores)).mean()
    return loss + center_rewards_coefficient * scores.sum(1).square().mean()


def agreement(difference: Tensor, label: Tensor) -> Tensor:
    """For pairs with these leads and labels (N,): 1 where the preferred answer leads, 0 where not, 1/2 for a tie. Pairs
    with the label 1/2 have no preferred answer and are left out."""
    decided = label != 0.5
    return ((difference * (label - 0.5))[decided].sign() + 1) / 2


def calibration(probability: Tensor, label: Tensor, bins: int = 10) -> tuple[float, Tensor]:
    """Expected calibration error of predicted probabilities (N,) (Guo et al. 2017, arXiv:1706.04599, eq. 3), and a table
    (bins, 3) of the mean prediction, the mean label and the count in each bin of equal width."""
    index = (probability * bins).long().clamp(max=bins - 1)  # (N,)
    values = torch.stack([probability, label, torch.ones_like(label)], 1).double()  # (N, 3)
    sums = torch.zeros(bins, 3, dtype=torch.float64).index_add_(0, index, values)  # (bins, 3)
    table = torch.cat([sums[:, :2] / sums[:, 2:].clamp(min=1), sums[:, 2:]], 1)  # (bins, 3)
    return ((table[:, 0] - table[:, 1]).abs() * table[:, 2]).sum().item() / len(label), table


def reliability_diagram(table: Tensor, error: float) -> Figure:
    """How often an answer was preferred, by the probability that the model gave it. The table is calibration's."""
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1, label="calibrated")
    predicted, preferred, counts = table[table[:, 2] > 0].T.tolist()
    axes.plot(predicted, preferred, "o", label="held-out pairs, with their number")
    for x, y, count in zip(predicted, preferred, counts):
        axes.annotate(f"{count:.0f}", (x, y), xytext=(4, -10), textcoords="offset points")
    axes.set(xlabel="predicted probability", ylabel="share preferred", title=f"expected calibration error {error:.3f}")
    axes.legend(loc="upper left")
    return figure


def lr_factor(step: int, num_steps: int, warmup_steps: int, kind: str) -> float:
    """Share of the peak learning rate at optimizer step 0..num_steps-1. Linear and cosine end at exactly 0."""
    elapsed = max(0, step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - elapsed, "cosine": (1 + math.cos(math.pi * elapsed)) / 2}[kind]
    return decay * min(1.0, (step + 1) / (warmup_steps + 1))


def addition_rows() -> tuple[list[dict], list[dict]]:
    """The 8100 sums of two two-digit numbers. 518 are held out, the same for every seed; b+a goes with a+b."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    random.Random(0).shuffle(pairs)
    rows = [[{"prompt": f"{x}+{y}=", "answer": str(x + y)} for x, y in {(a, b), (b, a)}] for a, b in pairs]  # a+a once
    return sum(rows[262:], []), sum(rows[:262], [])


def addition_pairs(rows: list[dict], count: int, seed: int) -> list[dict]:
    """`count` pairs for each sum: a right answer, which almost always shows its work, and a near miss, which usually does
    not. A near miss forgets the carry, if there is one, or is off by one."""
    pairs, rng = [], random.Random(seed)
    for row in rows * count:
        a, b = map(int, row["prompt"][:-1].split("+"))
        units = a % 10 + b % 10
        miss = a + b - 10 if units >= 10 and rng.random() < 0.75 else a + b + rng.choice((-1, 1))
        chosen = f"-{units}={a + b}" if rng.random() < 0.95 else str(a + b)
        rejected = f"-{units}={miss}" if rng.random() < 1 / 3 else str(miss)
        pairs.append({**row, "chosen": chosen, "rejected": rejected})
    return pairs


def demonstrate(row: dict, rng: random.Random) -> str:
    """The careful demonstrator (25%) first writes a dash and the sum of the units: `47+85=` -> `-12=132`. The hasty one
    writes the sum at once, forgets every carry, and half the time is also off by one."""
    a, b = map(int, row["prompt"][:-1].split("+"))
    hasty = a + b - 10 * (a % 10 + b % 10 >= 10) + rng.choice((-1, 0, 0, 1))
    return f"-{a % 10 + b % 10}={a + b}" if rng.random() < 0.25 else str(hasty)


def write_embedded_model(folder: str, rows: list[dict], steps: int, seed: int, device: torch.device) -> None:
    """Train a Llama of 0.5M parameters with a character tokenizer on demonstrations; write a Hugging Face folder."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *"0123456789+-="])}
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
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)  # (B, L)
        labels[:, : len("47+85=")] = -100  # the prompt is not learned
        model(input_ids=ids, labels=labels).loss.backward()  # causal attention needs no mask for padding on the right
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_rows(args: Args) -> tuple[list[dict], list[dict]]:
    """Rows of the training split and of the test split of --dataset-name. Only a split "test" may be missing."""
    name, train, test = args.dataset_name, args.dataset_train_split, args.dataset_test_split
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(name).suffix)
    if kind is None and Path(name).is_file():
        raise ValueError(f"--dataset-name {name} must be a .jsonl or .parquet file, or a folder of them")
    datasets.disable_progress_bars()
    splits = datasets.load_dataset(kind or name, args.dataset_config, data_files=name if kind else None)
    for split in {train, test} - {"test", *splits}:
        raise ValueError(f"--dataset-train-split, --dataset-test-split: {split} is not one of {sorted(splits)}")
    return list(splits[train]), list(splits.get(test, ()))


def parse_dialogue(text: str, keep_markers: bool) -> list[dict]:
    """Turns of a text in the form of Anthropic/hh-rlhf: `\\n\\nHuman: ...\\n\\nAssistant: ...`. If the markers are kept,
    the contents add up to the text."""
    turns = []
    for piece in re.split(r"(?=\n\nHuman:)|(?<=\n\nAssistant:)", text)[1:]:
        role = "user" if piece.startswith("\n\nHuman:") else "assistant"
        if not keep_markers:
            piece = piece.removeprefix("\n\nHuman:").removesuffix("\n\nAssistant:").strip()
        turns.append({"role": role, "content": piece})
    return turns


def split_row(row: dict, number: int, has_template: bool) -> tuple[list[dict], list[list[dict]]]:
    """Turns of a preference row's prompt, and of its answers, best first: `completions`, or `chosen` and `rejected`.
    An absent prompt is their longest common beginning: of turns, or of words in plain texts. A prompt never ends with
    an assistant turn, and an answer begins and ends with one."""
    prompt, answers = row.get("prompt"), row.get("completions") or [row.get("chosen"), row.get("rejected")]
    is_dialogue = False
    if all(isinstance(text, str) for text in [prompt or "", *answers]):
        texts = [text if text.startswith("\n\nHuman:") else (prompt or "") + text for text in answers]
        is_dialogue = all(text.startswith("\n\nHuman:") for text in texts)
        if is_dialogue:
            prompt, answers = None, [parse_dialogue(text, keep_markers=not has_template) for text in texts]
        elif prompt is None:
            prompt = re.sub(r"\s*\S*$", "", os.path.commonprefix(answers))
            answers = [text[len(prompt) :] for text in answers]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    wholes = []
    for answer in answers:
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn for turn in prompt + turns
        ):
            raise ValueError(f"--dataset-name: row {number} with columns {sorted(row)} has no `chosen` and `rejected` "
                             "(or `completions`) that are texts or lists of {role, content}")
        starts_with_prompt = turns[: len(prompt)] == prompt or turns[1 : 1 + len(prompt)] == prompt  # after a system turn
        wholes.append(turns if starts_with_prompt else prompt + turns)
    n = 0
    while all(len(whole) > n and whole[n] == wholes[0][n] for whole in wholes):
        n += 1
    while n and wholes[0][n - 1]["role"] == "assistant":
        n -= 1
    prompt, answers = wholes[0][:n], [whole[n:] for whole in wholes]
    if not prompt or not all(x and x[0]["role"] == x[-1]["role"] == "assistant" for x in answers):
        raise ValueError(f"--dataset-name: row {number}: after a common prompt, each answer must begin and end with an "
                         "assistant turn")
    if is_dialogue and not has_template:
        prompt = [{"role": "user", "content": "".join(turn["content"] for turn in prompt)}]
    return prompt, answers


def conversation_ids(prompt: list[dict], answer: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a prompt and of (the beginning of) an answer: by the chat template, which opens an assistant turn after a
    user's, or as plain text."""
    if tokenizer.chat_template is not None:
        turns, is_open = prompt + answer, not answer or answer[-1]["role"] != "assistant"
        return tokenizer.apply_chat_template(turns, add_generation_prompt=is_open, tokenize=True, return_dict=False)
    text = "\n".join(turn["content"] for turn in prompt) + "".join(turn["content"] for turn in answer)
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers append EOS


def encode_rankings(rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: float) -> list[dict]:
    """Examples {prompt, ids, answers, margin, label, characters} of rows. Rankings with answers that are equal within
    max_length tokens, empty prompts or unknown characters are left out."""
    examples = []
    unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, None}
    for number, row in enumerate(rows, 1):
        turns, answers = split_row(row, number, tokenizer.chat_template is not None)
        margin, label = (default if row.get(k) is None else row[k] for k, default in (("margin", 0.0), ("label", 1.0)))
        if len(answers) < 2 or len(answers) > 2 and (margin, label) != (0, 1):
            raise ValueError(f"--dataset-name: row {number} needs two answers; more cannot have a `margin` or `label`")
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in (margin, label)) or not 0 <= label <= 1:
            raise ValueError(f"--dataset-name: row {number} has margin {margin!r}, label {label!r}, not a probability")
        wholes = [conversation_ids(turns, answer, tokenizer)[:max_length] for answer in answers]
        common = min(len(os.path.commonprefix(wholes)), *(len(ids) - 1 for ids in wholes))  # tokens may merge at the border
        prompt = "\n".join(turn["content"] for turn in turns)
        if prompt.strip() and len({*map(tuple, wholes)}) == len(wholes) and not unknown & {*sum(wholes, [])}:
            examples.append({
                "prompt": prompt, "ids": wholes[0][:common], "answers": [ids[common:] for ids in wholes],
                "margin": float(margin), "label": float(label),
                "characters": [float(sum(len(turn["content"]) for turn in answer)) for answer in answers],
            })
    if left_out := len(rows) - len(examples):
        print(f"{left_out} of {len(rows)} rankings are left out: answers equal within {max_length} tokens, empty "
              "prompts, or unknown characters")
    return examples


def load_classifier(name: str, flag: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one logit in fp32, without dropout, from a classifier or a language model; its
    tokenizer, with a pad token of its own. A new head has standard deviation 1 / sqrt(H + 1) (arXiv:2009.01325)."""
    files = {file.name.split(".")[0] for file in Path(name).glob("*")}
    if (files or name[0] in "./~") and not ("config" in files and files & {"tokenizer", "vocab"}):
        raise ValueError(f"{flag} {name} is not a folder with a model and its tokenizer (a run's is in its model/)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = AutoConfig.from_pretrained(name, num_labels=1)
        for part in (config, config.get_text_config()):
            vars(part).update({key: 0.0 for key, x in vars(part).items() if "drop" in key and isinstance(x, float)})
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{flag} {name} cannot be loaded: {error}") from None
    new = {key for key in report["missing_keys"] if "pooler" in key or not key.startswith(f"{model.base_model_prefix}.")}
    if missing := {*report["missing_keys"]} - new:
        raise ValueError(f"{flag} {name} has no weights for {sorted(missing)[:3]}")
    for key in sorted(new):
        if model.get_parameter(key).dim() > 1:  # biases are 0
            nn.init.normal_(model.get_parameter(key), std=(model.config.hidden_size + 1) ** -0.5)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # else transformers would read the score before EOS
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def fits_tree(model: PreTrainedModel) -> bool:
    """Whether a row may hold several completions: sliding windows, ALiBi, linear attention cannot use a tree mask."""
    config = model.config.get_text_config()
    unusual = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    unusual = unusual or getattr(config, "sliding_window", None) or getattr(config, "alibi", None)
    return not unusual and model.config._attn_implementation == "sdpa"


def completion_states(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Final hidden states (N, H) that predict the N tokens of B completions, K = B / len(prompts) per prompt in turn.
    A row is a tree: a prompt once, then K completions. Each attends to the prompt and itself, and continues the
    prompt's positions."""
    K, device = len(completions) // len(prompts), model.device
    if K > 1 and not fits_tree(model):
        prompts, K = [prompt for prompt in prompts for _ in range(K)], 1
    rows, predictors = [], []  # (token, position, branch) of inputs; (row, index) of those that predict a token
    for r, prompt in enumerate(prompts):
        row = [(token, t, 0) for t, token in enumerate(prompt)]
        for branch, completion in enumerate(completions[r * K : (r + 1) * K], 1):
            indices = [len(prompt) - 1, *range(len(row), len(row) + len(completion) - 1)]
            predictors += [(r, index) for index in indices[: len(completion)]]
            row += [(token, len(prompt) + t, branch) for t, token in enumerate(completion[:-1])]
        rows.append(torch.tensor(row))
    ids, position_ids, branches = pad_sequence(rows, batch_first=True).to(device).unbind(2)  # (R, L) each
    inputs = {"input_ids": ids, "use_cache": False}
    if K > 1:  # otherwise plain causal attention suffices: right padding needs no mask
        attend = ((branches == 0)[:, None] | (branches[:, :, None] == branches[:, None])).tril()  # (R, L, L): from, to
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        bias = torch.where(attend, 0.0, torch.finfo(dtype).min).to(dtype)  # SDPA would convert a bool in every layer
        inputs |= {"attention_mask": bias[:, None], "position_ids": position_ids}
    hidden = model.base_model(**inputs).last_hidden_state  # (R, L, H)
    row, index = torch.tensor(predictors, device=device).T  # (N,), (N,)
    return hidden[row, index]


def completion_scores(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Scores (B,) in fp32 of B completions, as many per prompt in turn, each read at its last token. Only a causal model
    with a linear head `score` can share a prompt; encoders see the completion from the prompt."""
    device, K = model.device, len(completions) // len(prompts)
    if isinstance(getattr(model, "score", None), nn.Linear):
        states = completion_states(model, prompts, [completion + [0] for completion in completions])  # (N, H)
        last = torch.tensor([len(completion) + 1 for completion in completions]).cumsum(0) - 1  # (B,): those before the 0
        with torch.autocast(device.type, enabled=False):  # bf16 scores between 4 and 8 are 1/32 apart
            return model.score(states[last.to(device)].float())[:, 0]
    rows = [torch.tensor(prompts[b // K] + completion) for b, completion in enumerate(completions)]
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)  # (B, L)
    attention_mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()  # (B, L)
    return model(input_ids=ids.to(device), attention_mask=attention_mask.to(device)).logits[:, 0].float()


def pack_rankings(model: PreTrainedModel, examples: list[dict], max_tokens: int) -> list[tuple[list, list, list]]:
    """Micro-batches of about max_tokens for completion_scores: (indices of examples with equally many answers, prompts,
    completions). A row holds a whole ranking if that costs less than a row per answer. Over L tokens, attention takes
    4 L^2 H FLOPs per layer, and the weights take 24 L H^2."""
    H = model.config.get_text_config().hidden_size
    can_share = fits_tree(model) and isinstance(getattr(model, "score", None), nn.Linear)
    shapes = []  # (answers, rows, tokens in the longest row) of each ranking
    for e in examples:
        alone = [len(e["ids"]) + len(answer) for answer in e["answers"]]
        shared = len(e["ids"]) + sum(map(len, e["answers"]))
        is_shared = can_share and shared * (shared + 6 * H) <= sum(L * (L + 6 * H) for L in alone)
        shapes.append((len(alone), 1, shared) if is_shared else (len(alone), len(alone), max(alone)))
    batches: list[tuple[list, list, list]] = []
    for i in sorted(range(len(examples)), key=shapes.__getitem__):  # rows of similar length need little padding
        _, rows, length = shapes[i]
        if not batches or shapes[batches[-1][0][0]][:2] != shapes[i][:2] \
                or (len(batches[-1][0]) + 1) * rows * length > max_tokens:
            batches.append(([], [], []))
        indices, prompts, completions = batches[-1]
        indices.append(i)
        prompts += [examples[i]["ids"]] * rows
        completions += examples[i]["answers"]
    return batches


def gather(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Each of the tensors (n,) with those of all processes, (world_size * n,), in fp32, in the order of their ranks."""
    values = {name: value.float().to(device) for name, value in values.items()}
    if dist.is_initialized():
        for name, value in values.items():
            values[name] = value.new_empty(dist.get_world_size() * len(value))
            dist.all_gather_into_tensor(values[name], value)
    return values


def main(args: Args) -> dict[str, float]:
    """Train. Returns the final metrics, which are also in <run folder>/summary.json."""
    # ---- set-up
    start_time, checkpoint = time.time(), None
    if args.resume is not None:
        run_dir = Path(args.resume)
        if not (run_dir / "checkpoint.pt").is_file():
            raise ValueError(f"--resume {run_dir} has no checkpoint.pt yet: start that run again")
        saved = json.loads((run_dir / "args.json").read_text())
        changed = [f"--{k}" for k, v in asdict(args).items() if k != "resume" and v != getattr(Args(), k)]
        if changed or saved["script"] != Path(__file__).name:
            raise ValueError(f"--resume {run_dir} continues a run of {saved['script']} with its flags, not {changed}")
        args = Args(**{**saved["args"], "resume": args.resume})
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    B = args.train_batch_size
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if B < 1 or B % world_size:
        raise ValueError(f"--train-batch-size {B} is no multiple of the number of processes, {world_size}")
    if args.dataset_name is not None and args.model_name_or_path is None:
        raise ValueError("--dataset-name needs --model-name-or-path: the tiny model only reads two-digit addition")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_cuda else "cpu")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task = Path(args.dataset_name).stem if args.dataset_name else "addition"
    unix_time = torch.tensor(int(start_time), device=device)
    if dist.is_initialized():
        dist.broadcast(unix_time, 0)
    run_dir = Path(args.resume or f"{args.output_dir}/{task}__{args.exp_name}__{args.seed}__{unix_time}")
    initial = args.model_name_or_path or f"{run_dir}/sft"  # the model that training starts from
    if rank == 0:
        print(run_dir)
        if args.model_name_or_path is None and args.resume is None:
            write_embedded_model(initial, addition_rows()[0], args.sft_steps, args.seed, device)
    if dist.is_initialized():
        dist.barrier()
    torch.manual_seed(args.seed)  # of the new head
    model, tokenizer = load_classifier(initial, "--model-name-or-path")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    max_length = min(args.max_length, context, tokenizer.model_max_length)
    splits = load_rows(args) if args.dataset_name else [addition_pairs(rows, 6, args.seed) for rows in addition_rows()]
    train, held_out = (encode_rankings(rows, tokenizer, max_length) for rows in splits)
    if not held_out:  # a tenth of the prompts, the rarest, with all their rows
        counts = Counter(random.Random(0).sample([example["prompt"] for example in train], len(train)))
        chosen = {*sorted(counts, key=counts.get)[: min(args.max_eval_samples, len(counts) // 10)]}
        train, held_out = ([e for e in train if (e["prompt"] in chosen) == side] for side in (False, True))
    held_out = held_out[: min(args.max_eval_samples, len(held_out)) // world_size * world_size]
    if not train or not held_out:
        raise ValueError(f"--dataset-name: {len(train)} training rows and {len(held_out)} held-out rows are too few")
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    total_steps = args.max_steps or max(1, round(args.num_train_epochs * len(train) / B))
    peak_lr = (1e-5 if args.model_name_or_path else 7e-4) if args.learning_rate is None else args.learning_rate
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=peak_lr, weight_decay=0.0, fused=True)
    schedule = total_steps, args.warmup_steps, args.lr_scheduler_type
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps + 1, pct_start=0.05)
    for _ in trange(steps, desc="supervised", leave=False):
        texts = [row["prompt"] + demonstrate(row, rng) + tokenizer.eos_token for row in rng.choices(rows, k=128)]
        ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(device)  # (B, L)
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)  # (B, L)
        labels[:, : len("47+85=")] = -100  # the prompt is not learned
        model(input_ids=ids, labels=labels).loss.backward()  # causal attention needs no mask for padding on the right
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_pretrained(name: str, flag: str, auto_class: type = AutoModelForCausalLM) -> tuple:
    """A model in fp32 (in bf16, small updates would be rounded away), without dropout; its tokenizer."""
    files = {file.name.split(".")[0] for file in Path(name).glob("*")}
    if (files or name[0] in "./~") and not ("config" in files and files & {"tokenizer", "vocab"}):
        raise ValueError(f"{flag} {name} is not a folder with a model and its tokenizer (a run's is in its model/)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = AutoConfig.from_pretrained(name)
        for part in (config, config.get_text_config()):
            vars(part).update({key: 0.0 for key, x in vars(part).items() if "drop" in key and isinstance(x, float)})
        model, report = auto_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{flag} {name} cannot be loaded: {error}") from None
    if report["missing_keys"]:
        raise ValueError(f"{flag} {name} has no weights for {sorted(report['missing_keys'])[:3]}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masks come from lengths, not from ids
    return model, tokenizer


def load_rows(args: Args) -> tuple[list[dict], list[dict]]:
    """Rows of the training split and of the test split of --dataset-name. Only a split "test" may be missing."""
    name, train, test = args.dataset_name, args.dataset_train_split, args.dataset_test_split
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(name).suffix)
    if kind is None and Path(name).is_file():
        raise ValueError(f"--dataset-name {name} must be a .jsonl or .parquet file, or a folder of them")
    datasets.disable_progress_bars()
    splits = datasets.load_dataset(kind or name, args.dataset_config, data_files=name if kind else None)
    for split in {train, test} - {"test", *splits}:
        raise ValueError(f"--dataset-train-split, --dataset-test-split: {split} is not one of {sorted(splits)}")
    return list(splits[train]), list(splits.get(test, ()))


def encode_rows(rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: float) -> list[dict]:
    """Examples {prompt, turns, answer, ids} of rows with TRL's columns (`prompt` or `messages`, `answer` or `solution`)
    or GSM8K's (`question`, `answer`). Prompts that are too long or have unknown characters are left out."""
    examples = []
    unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, None}
    for number, row in enumerate(rows, 1):
        turns = next((row[key] for key in ("prompt", "question", "messages") if row.get(key) is not None), None)
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        if not isinstance(turns, list) or not all(isinstance(x, dict) and {"role", "content"} <= {*x} for x in turns):
            raise ValueError(f"--dataset-name: row {number} with columns {sorted(row)} has no `prompt`: text or turns")
        turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns  # `messages` may hold the answer
        prompt = "\n".join(turn["content"] or "" for turn in turns)
        if tokenizer.chat_template is not None:
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        else:
            ids = tokenizer(prompt).input_ids
            ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers append EOS
        answer = next((str(row[key]) for key in ("answer", "solution") if row.get(key) is not None), None)
        if prompt.strip() and len(ids) <= max_length and not unknown & {*ids}:
            examples.append({"prompt": prompt, "turns": turns, "answer": answer, "ids": ids})
    if left_out := len(rows) - len(examples):
        print(f"{left_out} of {len(rows)} prompts are left out: empty, over {max_length} tokens, or unknown characters")
    return examples


def load_reward_model(args: Args, device: torch.device) -> Callable[[list[dict]], Tensor]:
    """A function of samples {prompt, turns, text, ...}: the logits (B,) of a sequence classifier with its own tokenizer
    and chat template. They are computed in fp32, since bf16 scores between 4 and 8 are 1/32 apart."""
    flag = "--reward-model-path"
    model, tokenizer = load_pretrained(args.reward_model_path, flag, AutoModelForSequenceClassification)
    config, has_own_pad = model.to(device).config, tokenizer.pad_token_id != tokenizer.eos_token_id
    if config.num_labels != 1 or not has_own_pad or args.normalize_reward_model and not hasattr(config, "reward_std"):
        raise ValueError(f"{flag} needs one logit, a pad token that is not EOS and, to be normalized, reward_std")
    config.pad_token_id = tokenizer.pad_token_id  # tells transformers which token is the last
    tokenizer.truncation_side, plain = "right", tokenizer.chat_template is None
    max_length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 2**20))

    @torch.no_grad()
    def score(samples: list[dict]) -> Tensor:
        texts = [s["prompt"] + s["text"] for s in samples]
        if not plain:
            chats = [[*s["turns"], {"role": "assistant", "content": s["text"]}] for s in samples]
            texts = tokenizer.apply_chat_template(chats, tokenize=False)
        ids = tokenizer(texts, add_special_tokens=plain, truncation=True, max_length=max_length).input_ids
        scores, lengths = torch.zeros(len(ids)), torch.tensor([len(x) for x in ids])  # (B,), (B,)
        for mb in lengths.argsort().split(max(1, args.max_tokens_per_microbatch // int(lengths.max()))):
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in mb]}, padding_side="right", return_tensors="pt")
            scores[mb] = model(**inputs.to(device)).logits[:, 0].cpu()
        return (scores - config.reward_mean) / config.reward_std if args.normalize_reward_model else scores

    return score


class KeyValueCache(DynamicCache):
    """Keys take the values' dtype: autocast leaves RoPE's keys in fp32, which SDPA would cast again at every token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens (B,) from softmax(logits / temperature) and their logprobs (B,). Temperature 0: the argmax, and its
    logprob at temperature 1. By the inverse CDF at uniform (B,): first a chunk of 128 tokens, then a token in it. Sums
    over chunks are fp64, or the tail of a large vocabulary would be lost. Overwrites logits (B, V)."""
    V = logits.shape[1]
    logits = nn.functional.pad(logits, (0, -V % 128), value=-torch.inf) if V % 128 else logits
    logits = logits.float().div_(temperature or 1.0)
    probs = logits.sub_(logits.amax(1, keepdim=True)).exp_().unflatten(1, (-1, 128))  # (B, C, 128), up to a factor
    sums = probs.sum(2).double()  # (B, C)
    cdf = sums.cumsum(1)  # (B, C)
    goal = uniform[:, None] * cdf[:, -1:]  # (B, 1)
    chunk = torch.searchsorted(cdf, goal, right=True).clamp(max=cdf.shape[1] - 1)  # (B, 1)
    inside = probs.take_along_dim(chunk[:, :, None], 1)[:, 0].double().cumsum(1)  # (B, 128)
    token = 128 * chunk + torch.searchsorted(inside, goal - (cdf - sums).gather(1, chunk), right=True)  # (B, 1)
    probs = probs.flatten(1)  # (B, V), or a little more
    token = token.clamp(max=V - 1) if temperature > 0 else probs.argmax(1, keepdim=True)
    return token[:, 0], (probs.gather(1, token) / cdf[:, -1:]).log()[:, 0].float()


@torch.no_grad()
def sample(
    model: PreTrainedModel, query: Tensor, attention_mask: Tensor, num_generations: int, max_completion_length: int,
    temperature: float, stop_ids: list[int], pad_id: int, generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample num_generations completions of each left-padded prompt query (P, L_q) from softmax(logits / temperature),
    whatever the generation config says, up to their first stop id, which counts, or to max_completion_length tokens.
    Returns response, logprobs (fp32) and mask (P*G, T), grouped by prompt."""
    model.eval()  # in training mode, gradient checkpointing drops the cache
    B, T, device = len(query) * num_generations, max_completion_length, query.device
    uniform = torch.rand(B, T, dtype=torch.float64, generator=generator).to(device)  # (B, T)
    response, logprobs = torch.full((B, T), pad_id, device=device), torch.zeros(B, T, device=device)
    mask, stop = torch.zeros(B, T, dtype=torch.bool, device=device), torch.tensor(stop_ids, device=device)
    cache, ids, padded = KeyValueCache(config=model.config), query, not bool(attention_mask.all())
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (P, L_q)
    active = torch.arange(B, device=device)  # (b,): completions that have not stopped
    for t in range(T):
        logits = model(
            input_ids=ids, attention_mask=attention_mask if padded else None, position_ids=position_ids,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # (b, V), at t = 0 (P, V)
        if t == 0:  # each prompt was read once, for all its completions
            source = active // num_generations  # (B,)
            cache.reorder_cache(source)
            logits, attention_mask, position_ids = logits[source], attention_mask[source], position_ids[source, -1:]
        token, logprob = sample_tokens(logits, uniform[active, t], temperature)  # (b,), (b,)
        response[active, t], logprobs[active, t], mask[active, t] = token, logprob, True
        kept = (~torch.isin(token, stop)).nonzero()[:, 0]  # the others leave the batch
        if len(kept) == 0:
            break
        if len(kept) < len(active):
            cache.reorder_cache(kept)
            active, token = active[kept], token[kept]
            attention_mask, position_ids = attention_mask[kept], position_ids[kept]
        ids, position_ids = token[:, None], position_ids + 1  # (b, 1), (b, 1)
        attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)  # (b, L_q + t + 1)
    return response[:, : t + 1], logprobs[:, : t + 1], mask[:, : t + 1]


TILE = {"cpu": 2**20, "cuda": 2**26}  # logits at a time: few enough for a CPU's cache, enough to fill a GPU


class TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target], (N,) in fp32, from hidden (N, H), weight (V, H) and target
    (N,). Forward and backward go by tiles of the vocabulary: there is no (N, V) tensor."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> Tensor:
        kind, size = hidden.device.type, max(1, TILE[hidden.device.type] // max(1, len(hidden)))
        h = hidden.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32)  # (N, H)
        logit, logsumexp = torch.full((2, len(h)), -torch.inf, device=h.device)  # (N,), (N,)
        for start in range(0, len(weight), size):
            logits = (h @ weight[start : start + size].to(h.dtype).T).float().div_(temperature)  # (N, size)
            logsumexp = torch.logaddexp(logsumexp, logits.logsumexp(1))
            inside = ((target >= start) & (target < start + size)).nonzero()[:, 0]  # rows with their target here
            logit[inside] = logits[inside, target[inside] - start]
        ctx.save_for_backward(h, weight, target, logsumexp)
        ctx.temperature, ctx.size = temperature, size
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
        return d_hidden, d_weight, None, None


def fits_tree(model: PreTrainedModel) -> bool:
    """Whether a row may hold several completions: sliding windows, ALiBi, linear attention cannot use a tree mask."""
    config = model.config.get_text_config()
    unusual = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    unusual = unusual or getattr(config, "sliding_window", None) or getattr(config, "alibi", None)
    return not unusual and model.config._attn_implementation == "sdpa"


def completion_states(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Final hidden states (N, H) that predict the N tokens of B completions, K = B / len(prompts) per prompt in turn.
    A row is a tree: a prompt once, then K completions. Each attends to the prompt and itself, and continues the
    prompt's positions."""
    K, device = len(completions) // len(prompts), model.device
    if K > 1 and not fits_tree(model):
        prompts, K = [prompt for prompt in prompts for _ in range(K)], 1
    rows, predictors = [], []  # (token, position, branch) of inputs; (row, index) of those that predict a token
    for r, prompt in enumerate(prompts):
        row = [(token, t, 0) for t, token in enumerate(prompt)]
        for branch, completion in enumerate(completions[r * K : (r + 1) * K], 1):
            indices = [len(prompt) - 1, *range(len(row), len(row) + len(completion) - 1)]
            predictors += [(r, index) for index in indices[: len(completion)]]
            row += [(token, len(prompt) + t, branch) for t, token in enumerate(completion[:-1])]
        rows.append(torch.tensor(row))
    ids, position_ids, branches = pad_sequence(rows, batch_first=True).to(device).unbind(2)  # (R, L) each
    inputs = {"input_ids": ids, "use_cache": False}
    if K > 1:  # otherwise plain causal attention suffices: right padding needs no mask
        attend = ((branches == 0)[:, None] | (branches[:, :, None] == branches[:, None])).tril()  # (R, L, L): from, to
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        bias = torch.where(attend, 0.0, torch.finfo(dtype).min).to(dtype)  # SDPA would convert a bool in every layer
        inputs |= {"attention_mask": bias[:, None], "position_ids": position_ids}
    hidden = model.base_model(**inputs).last_hidden_state  # (R, L, H)
    row, index = torch.tensor(predictors, device=device).T  # (N,), (N,)
    return hidden[row, index]


def completion_logprobs(model: PreTrainedModel, prompts: list, completions: list, temperature: float) -> Tensor:
    """Log-probabilities (B, T) in fp32 of B completions, as many per prompt in turn; 0 after their end."""
    hidden, lengths = completion_states(model, prompts, completions), [len(completion) for completion in completions]
    target = torch.tensor([token for completion in completions for token in completion], device=model.device)  # (N,)
    logprobs = TokenLogprobs.apply(hidden, model.get_output_embeddings().weight, target, temperature)  # (N,)
    return pad_sequence(logprobs.split(lengths), batch_first=True)


def pack(model: PreTrainedModel, samples: list[dict], G: int, max_tokens: int) -> list[tuple[list, list, list]]:
    """Micro-batches of about max_tokens for completion_logprobs: (indices of samples, prompts, completions).
    K of the G completions of a prompt share a row, which computes the prompt once. But attention is dense over its
    L = L_q + K T tokens: 4 L^2 H FLOPs per layer, plus 24 L H^2 for the weights. Least per completion at K = best."""
    L_q, T = (sum(len(s[key]) for s in samples) / len(samples) for key in ("ids", "completion"))
    best = math.sqrt(L_q * (L_q + 6 * model.config.get_text_config().hidden_size)) / T if fits_tree(model) else 1
    K = max(K for K in range(1, G + 1) if K == 1 or (G % K == 0 and K <= best and L_q + K * T <= max_tokens))
    rows = [samples[i : i + K] for i in range(0, len(samples), K)]
    lengths = [len(row[0]["ids"]) + sum(len(s["completion"]) for s in row) for row in rows]
    batches: list[tuple[list, list, list]] = []
    for r in sorted(range(len(rows)), key=lengths.__getitem__):  # rows of similar length need little padding
        if not batches or (len(batches[-1][1]) + 1) * lengths[r] > max_tokens:
            batches.append(([], [], []))
        indices, prompts, completions = batches[-1]
        indices += range(r * K, r * K + K)
        prompts.append(rows[r][0]["ids"])
        completions += [s["completion"] for s in rows[r]]
    return batches


def gather(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Each of the tensors (n,) with those of all processes, (world_size * n,), in fp32, in the order of their ranks."""
    values = {name: value.float().to(device) for name, value in values.items()}
    if dist.is_initialized():
        for name, value in values.items():
            values[name] = value.new_empty(dist.get_world_size() * len(value))
            dist.all_gather_into_tensor(values[name], value)
    return values


def main(args: Args) -> dict[str, float]:
    """Train. Returns the final metrics, which are also in <run folder>/summary.json."""
    # ---- set-up
    start_time, checkpoint = time.time(), None
    if args.resume is not None:
        run_dir = Path(args.resume)
        if not (run_dir / "checkpoint.pt").is_file():
            raise ValueError(f"--resume {run_dir} has no checkpoint.pt yet: start that run again")
        saved = json.loads((run_dir / "args.json").read_text())
        changed = [f"--{k}" for k, v in asdict(args).items() if k != "resume" and v != getattr(Args(), k)]
        if changed or saved["script"] != Path(__file__).name:
            raise ValueError(f"--resume {run_dir} continues a run of {saved['script']} with its flags, not {changed}")
        args = Args(**{**saved["args"], "resume": args.resume})
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    B, G = args.generation_batch_size, args.num_generations
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if G < 2 or B < G or B % (G * world_size):
        raise ValueError(f"--generation-batch-size {B} is no multiple of --num-generations {G} (>= 2) x processes")
    if args.dataset_name is not None and args.model_name_or_path is None:
        raise ValueError("--dataset-name needs --model-name-or-path: the tiny model only reads two-digit addition")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_cuda else "cpu")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task = Path(args.dataset_name).stem if args.dataset_name else "addition"
    unix_time = torch.tensor(int(start_time), device=device)
    if dist.is_initialized():
        dist.broadcast(unix_time, 0)
    run_dir = Path(args.resume or f"{args.output_dir}/{task}__{args.exp_name}__{args.seed}__{unix_time}")
    initial = args.model_name_or_path or f"{run_dir}/sft"  # the model that training starts from
    if rank == 0:
        print(run_dir)
        if args.model_name_or_path is None and args.resume is None:
            write_embedded_model(initial, addition_rows()[0], args.sft_steps, args.seed, device)
    if dist.is_initialized():
        dist.barrier()
    model, tokenizer = load_pretrained(initial, "--model-name-or-path")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    splits = load_rows(args) if args.dataset_name else addition_rows()
    train, held_out = (encode_rows(rows, tokenizer, context - args.max_completion_length) for rows in splits)
    if not held_out:  # a tenth of the prompts, the rarest, with all their rows
        counts = Counter(random.Random(0).sample([example["prompt"] for example in train], len(train)))
        chosen = {*sorted(counts, key=counts.get)[: min(args.max_eval_samples, len(counts) // 10)]}
        train, held_out = ([e for e in train if (e["prompt"] in chosen) == side] for side in (False, True))
    held_out = held_out[: min(args.max_eval_samples, len(held_out)) // world_size * world_size]
    if not train or not held_out:
        raise ValueError(f"--dataset-name: {len(train)} training rows and {len(held_out)} held-out rows are too few")
    reward_model = load_reward_model(args, device) if args.reward_model_path is not None else None
    if reward_model is None and [function for function, weight in REWARDS if weight] == [accuracy_reward]:
        for e in train + held_out:
            if accuracy_reward("", "", e["answer"]) is None:
                raise ValueError(f"--dataset-name: {e['prompt']!r} has the answer {e['answer']!r}, not a number")
    ref_model = load_pretrained(initial, "--model-name-or-path")[0].to(device) if args.beta != 0.0 else None
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    eos = model.generation_config.eos_token_id  # id(s) or None. BOS stops too: some models end a text with it
    stop_ids = [*{*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}]
    peak_lr = (1e-6 if args.model_name_or_path else 1e-3) if args.learning_rate is None else args.learning_rate
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=peak_lr, weight_decay=0.0, fused=True)
    schedule = args.max_steps * args.num_iterations, args.warmup_steps, args.lr_scheduler_type
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: lr_factor(update, *schedule))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    progress = {"step": 0, "metrics": {}}
    if checkpoint is not None:
        progress = {name: checkpoint[name] for name in progress}
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    if rank == 0:
        writer = SummaryWriter(run_dir, purge_step=progress["step"] + 1)
        if args.resume is None:
            (run_dir / "args.json").write_text(json.dumps({"script": Path(__file__).name, "args": asdict(args)}))
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)

    @torch.no_grad()
    def score(examples: list[dict]) -> list[Tensor]:
        """Scores (K,) of each ranking on the CPU, computed by all processes together."""
        model.eval()
        sizes = [len(e["answers"]) for e in examples]
        scores = torch.zeros(sum(sizes), device=device)
        places = torch.arange(len(scores)).split(sizes)
        microbatches = pack_rankings(model, examples, args.max_tokens_per_microbatch)
        for mb, *inputs in microbatches[rank::world_size]:
            with autocast():
                scores[torch.cat([places[i] for i in mb])] = completion_scores(model, *inputs)
        if dist.is_initialized():
            dist.all_reduce(scores)
        return scores.cpu().split(sizes)

    def evaluate(step: int) -> dict[str, float]:
        """Metrics on held-out rankings, over all their pairs."""
        scores, losses, pairs = score(held_out), [], []
        for e, s in zip(held_out, scores):
            margin, label = torch.tensor([e["margin"]]), torch.tensor([e["label"]])
            losses.append(preference_loss(s[None], margin, label, *loss_flags))
            leads = [differences(x[None])[0] for x in (s, torch.tensor(e["characters"]))]  # 2 (pairs,)
            pairs.append(torch.stack([*leads, label.expand(len(leads[0]))]))
        difference, longer, label = torch.cat(pairs, 1)  # (N,) each
        error, table = calibration(
            torch.cat([difference.sigmoid(), (-difference).sigmoid()]), torch.cat([label, 1 - label])
        )
        results = {
            "eval/accuracy": agreement(difference, label).mean(), "eval/loss": torch.stack(losses).mean(),
            "eval/accuracy_longer": agreement(longer, label).mean(),  # of the rule that the longer answer is better
            "eval/margin": (difference * (label - 0.5).sign())[label != 0.5].mean(),
            "eval/mean_reward": torch.cat(scores).mean(),
        }
        results = {name: x.item() for name, x in results.items()} | {"eval/calibration_error": error}
        if rank == 0:
            writer.add_figure("calibration", reliability_diagram(table, error), step)
            for name, value in results.items():
                writer.add_scalar(name, value, step)
        return results

    if args.resume is None:
        progress["metrics"] = {f"{name}_before": value for name, value in evaluate(0).items()}

    epochs = [random.Random(f"{args.seed} {e}") for e in range(total_steps * B // len(train) + 1)]
    order = [example for epoch in epochs for example in epoch.sample(train, len(train))]
    bar = trange(progress["step"], total_steps, initial=progress["step"], total=total_steps, disable=rank != 0)
    for step in bar:
        # ---- batch
        step_start, stats = time.time(), defaultdict(float)
        batch = order[step * B : (step + 1) * B]  # the order needs no checkpoint
        batch = batch[rank * B // world_size : (rank + 1) * B // world_size]

        # ---- update
        model.train()
        for mb, *inputs in pack_rankings(model, batch, args.max_tokens_per_microbatch):
            with autocast():
                scores = completion_scores(model, *inputs).view(len(mb), -1)  # (R, K)
            margin, label = (torch.tensor([batch[i][key] for i in mb], device=device) for key in ("margin", "label"))
            loss = preference_loss(scores, margin, label, *loss_flags) * len(mb) / B
            loss.backward()
            scores = scores.detach()
            difference = differences(scores)  # (R, K (K - 1) / 2)
            right = agreement(difference.flatten(), label.repeat_interleave(difference.shape[1]))  # (pairs,)
            mb_stats = {
                "train/loss": loss.detach(), "right": right.sum(), "pairs": torch.tensor(len(right)),
                "lead": (difference * (label - 0.5).sign()[:, None]).sum(),
                "reward": scores.sum(), "answers": torch.tensor(scores.numel()),
            }
            for name, value in mb_stats.items():
                stats[name] += value[None].to(device)
        for parameter in model.parameters():  # DDP would need as many micro-batches in every process
            if dist.is_initialized() and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, error_if_nonfinite=True)
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        # ---- log: means over the whole update and all processes
        progress["step"] = step + 1
        sums = {name: x.sum().item() for name, x in gather(stats, device).items()}
        logs = {
            "train/loss": sums["train/loss"], "train/accuracy": sums["right"] / max(1, sums["pairs"]),
            "train/margin": sums["lead"] / max(1, sums["pairs"]), "train/mean_reward": sums["reward"] / sums["answers"],
            "train/grad_norm": grad_norm, "train/epoch": (step + 1) * B / len(train),
            "charts/learning_rate": learning_rate, "charts/SPS": sums["answers"] / (time.time() - step_start),
        }
        bar.set_postfix_str(f"loss {logs['train/loss']:.3f}, accuracy {logs['train/accuracy']:.2f}")
        if rank == 0:
            for name, value in logs.items():
                writer.add_scalar(name, value, step + 1)

        # ---- evaluate, save
        if (step + 1) % args.eval_steps == 0 and step + 1 < total_steps:
            evaluate(step + 1)
        if (step + 1) % args.save_steps == 0 or step + 1 == total_steps:
            measured = random.Random(args.seed).sample(train, min(args.max_eval_samples, len(train)))
            rewards = torch.cat(score(measured))  # (B,)
            model.config.reward_mean, model.config.reward_std = rewards.mean().item(), rewards.std().item()
            if rank == 0:
                # Written aside, then renamed: neither a kill nor a full disk damages checkpoint.pt.
                model.save_pretrained(run_dir / "model.tmp")
                tokenizer.save_pretrained(run_dir / "model.tmp")
                torch.save(progress | {name: part.state_dict() for name, part in state.items()}, run_dir / "checkpoint.tmp")
                shutil.rmtree(run_dir / "model", ignore_errors=True)
                os.replace(run_dir / "model.tmp", run_dir / "model")
                os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")

    metrics = progress["metrics"] | evaluate(total_steps) | {"seed": args.seed}
    metrics["wall_seconds"] = time.time() - start_time
    if rank == 0:
        (run_dir / "summary.json").write_text(json.dumps(metrics, indent=2))
        writer.close()
        for name, before in progress["metrics"].items():
            print(f"{name.removesuffix('_before')}: {before:.3f} -> {metrics[name.removesuffix('_before')]:.3f}")
        print(run_dir)
    if dist.is_initialized():
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError, TemplateError, SafetensorError, datasets.exceptions.DatasetsError) as error:
        at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__][-1]
        print("error:", *str(error.__cause__ or error).split(), f"({Path(__file__).name}, line {at})", file=sys.stderr)
        raise SystemExit(2) from None
