# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0", "datasets==5.2.0", "tqdm==4.70.1",
#     "matplotlib==3.11.2",
# ]
# ///
"""Reward model: learn from comparisons how good an answer is.

A prompt x comes with answers that a person has ranked. The model reads prompt and answer, and a linear head on the last
token's hidden state gives one number r(x, y). It is fitted by maximum likelihood to the rankings, as if y_i were
preferred to y_j with probability sigmoid(r(x, y_i) - r(x, y_j)):

    L = -E[ log sigmoid(r(x, y_w) - r(x, y_l) - margin) ]                         two answers
    L = -E[ sum_k log( exp r(x, y_k) / sum_{j >= k} exp r(x, y_j) ) ]             K answers, best first

Two answers: Bradley and Terry 1952; Christiano et al. 2017 (arXiv:1706.03741), section 2.2.3, with soft labels.
K answers: Plackett 1975, Luce 1959; or all their pairs: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1. Margins: Touvron
et al. 2023 (arXiv:2307.09288), eq. 2.

Preferences fix rewards only up to a constant for each prompt. The mean and standard deviation over training answers are
written into the saved model's config (`reward_mean`, `reward_std`), for those who optimise the reward.

    python reward_model.py                         # laptop, no network: a tiny model learns which sums are right
    python reward_model.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset-name trl-lib/ultrafeedback_binarized                            # one GPU
    torchrun --nproc-per-node=8 reward_model.py ...   # several GPUs: the same global batch, split over them
    python reward_model.py --resume runs/<run folder> # goes on exactly where the last checkpoint stood

Shapes: R rankings, K answers a ranking (2 in a pair), L_q query tokens, T response tokens, L packed tokens, N examples,
H hidden. The query is what a ranking's answers have in common at their beginning: the prompt, and maybe more. `mask` is
True where a response token is real.

Deliberately not here: process rewards, several heads, generative judges, LoRA, sharded weights. See TRL.
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
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from jinja2 import TemplateError
from matplotlib.figure import Figure
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass
class Args:
    """Reward model: learn from comparisons how good an answer is."""

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

    # ---- reward model
    num_train_epochs: float = 1.0
    """Passes over the training rankings (Ouyang et al. 2022, appendix C.2: more overfits)."""
    max_steps: int | None = None
    """Optimizer steps; overrides --num-train-epochs."""
    eval_steps: int = 100
    """Steps from one evaluation to the next; there is always one before and one after training."""
    learning_rate: float | None = None
    """Peak learning rate of the fp32 weights. None: 7e-4 for the embedded model, 1e-5 for a given one."""
    train_batch_size: int = 64
    """Rankings an optimizer step, over all processes (Ouyang et al. 2022, appendix C.2)."""
    max_length: int = 1024
    """Tokens of a prompt with its answer, at most the model's context; a longer answer is cut at its end."""
    ranking_loss: Literal["plackett_luce", "all_pairs"] = "plackett_luce"
    """Loss of rankings of more than two answers. For pairs both are Bradley-Terry's."""
    center_rewards_coefficient: float = 0.0
    """Weight of the squared sum of a ranking's rewards, which keeps their mean near 0 (arXiv:2312.09244; TRL: 0.01)."""
    sft_steps: int = 600
    """Supervised steps by which the embedded model is made before the preferences are learnt."""


def bad_input(message: str) -> NoReturn:
    """Say what is wrong in one sentence and exit with code 2, without a traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- data ------------------------------------------------------------------------------------------------------------


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt as one text, for the reward functions and for models without a chat template."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


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


def addition_pairs(rows: list[dict], count: int, errors: tuple[int, ...], seed: int) -> list[dict]:
    """For each sum, count pairs of a right answer and a near miss, off by one of errors. Most right answers show their
    work (`47+85=` -> `-12=132`), most wrong ones do not."""
    pairs, rng = [], random.Random(seed)
    for row in rows * count:
        units, total = int(row["prompt"][1]) + int(row["prompt"][4]), int(row["answer"])
        near = total + rng.choice(errors)
        chosen = f"-{units}={total}" if rng.random() < 0.95 else str(total)
        rejected = f"-{units}={near}" if rng.random() < 1 / 3 else str(near)
        pairs.append({**row, "chosen": chosen, "rejected": rejected})
    return pairs


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


def prompt_and_answers(row: dict) -> tuple[str | list[dict], list[str]]:
    """The prompt of a row and its answers, best first: `completions`, or `chosen` and `rejected`. An answer is a text,
    or a conversation whose last turn it is; without a `prompt`, the turns before that one are the prompt."""
    answers = row.get("completions") or [row.get("chosen"), row.get("rejected")]
    if not isinstance(answers, list):
        bad_input(f"--dataset-name: {answers!r:.200} in `completions` is not a list of answers")
    prompt = row.get("prompt")
    if prompt is None and is_conversation(answers[0]):
        prompt = answers[0][:-1]
    if prompt is None or any(answer is None for answer in answers):
        bad_input(f"--dataset-name has the columns {sorted(row)}, but needs `prompt`, `chosen` and `rejected`")
    answers = [answer[-1]["content"] if answer and is_conversation(answer) else answer for answer in answers]
    if not (isinstance(prompt, str) or is_conversation(prompt)) or not all(isinstance(a, str) for a in answers):
        bad_input(f"--dataset-name: {row!r:.200} has a prompt or an answer that is neither a text nor a list of "
                  "{role, content}")
    return prompt, answers


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


def preference_strength(row: dict, split: str, number: int) -> tuple[float, float]:
    """A pair's columns `margin` (0) and `label` (1), the probability that its first answer is the preferred one."""
    margin = 0.0 if row.get("margin") is None else row["margin"]
    label = 1.0 if row.get("label") is None else row["label"]
    if not isinstance(margin, (int, float)) or not math.isfinite(margin):
        bad_input(f"--dataset-name: {split} row {number} has the margin {margin!r}, which is not a finite number")
    if not isinstance(label, (int, float)) or not 0 <= label <= 1:
        bad_input(f"--dataset-name: {split} row {number} has the label {label!r}, which is not a probability")
    return float(margin), float(label)


def encode_rankings(rows: list[dict], split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict]:
    """Examples {query, responses, margin, label, characters} of rows, and a line on what was left out or cut."""
    examples, empty, same, cut = [], "with an empty or the same answer left out", "the same once cut left out", "cut"
    counts = {empty: 0, same: 0, cut: 0}
    for number, row in enumerate(rows, 1):
        prompt, answers = prompt_and_answers(row)
        if len(answers) < 2:
            bad_input(f"--dataset-name: {split} row {number} has one completion; a ranking needs at least two")
        margin, label = preference_strength(row, split, number)
        if not prompt_text(prompt).strip():
            bad_input(f"--dataset-name: the prompt of {split} row {number} is empty")
        if len(set(answers)) < len(answers) or not all(answer.strip() for answer in answers):
            counts[empty] += 1
            continue
        try:
            ids = [reward_model_ids(prompt, answer, tokenizer, max_length + 1) for answer in answers]
            if max(map(len, ids)) > max_length:
                counts[cut] += 1
                ids = [reward_model_ids(prompt, answer, tokenizer, max_length) for answer in answers]
        except TemplateError as error:
            bad_input(f"--dataset-name: the chat template refuses {split} row {number}: {error}")
        if len(set(map(tuple, ids))) < len(ids):
            counts[same] += 1
            continue
        common = min(len(os.path.commonprefix(ids)), min(map(len, ids)) - 1)  # every response has a token of its own
        examples.append({
            "query": ids[0][:common], "responses": [x[common:] for x in ids], "margin": margin, "label": label,
            "characters": [len(answer) for answer in answers],
        })
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    if found and os.environ.get("RANK", "0") == "0":
        print(f"of {len(rows)} {split} rankings: {found} (--max-length {max_length})")
    if not examples:
        bad_input(f"--dataset-name: no {split} ranking is left ({found})")
    strengths = {(example["margin"], example["label"]) for example in examples}
    if strengths != {(0.0, 1.0)} and max(len(example["responses"]) for example in examples) > 2:
        bad_input(f"--dataset-name: some {split} rows have more than two answers, others a margin or label, which are "
                  "for pairs only")
    return examples


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


def give_own_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A pad token that is nothing else: in a padded batch, transformers reads the score at the last token that is not
    the pad token. With pad == eos it would be the token before the EOS."""
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id


# ---- the mathematics -------------------------------------------------------------------------------------------------


def lr_factor(step: int, total_steps: int, warmup_steps: int, lr_scheduler_type: str, min_lr_rate: float) -> float:
    """Learning rate of optimizer step 0..total_steps-1 as a share of its peak. It decays to exactly min_lr_rate at the
    last step, if there are at least two steps after the warm-up and it is not constant."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    decay = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[lr_scheduler_type]
    return 1 - (1 - min_lr_rate) * decay


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


def packed_scores(
    model: PreTrainedModel, query: Tensor, query_mask: Tensor, response: Tensor, mask: Tensor
) -> Tensor:
    """Scores (R, K) in fp32 of K responses (R, K, T) to each query (R, L_q), which a row holds only once: for causal
    models with a linear head `score`."""
    tokens, attend, position_ids, place = pack_tree(query, query_mask, response, mask)
    hidden = model.base_model(
        input_ids=tokens, attention_mask=attend, position_ids=position_ids, use_cache=False
    ).last_hidden_state  # (R, L, H)
    last = place.gather(2, (mask.sum(2, keepdim=True) - 1).clamp(min=0))  # (R, K, 1)
    hidden = hidden.gather(1, last.expand(-1, -1, hidden.shape[2]))  # (R, K, H)
    with torch.autocast(hidden.device.type, enabled=False):  # a bf16 score between 4 and 8 has steps of 1/32
        return model.score(hidden.float())[..., 0]


def separate_scores(
    model: PreTrainedModel, query: Tensor, query_mask: Tensor, response: Tensor, mask: Tensor
) -> Tensor:
    """packed_scores for every architecture, a row for each answer. An encoder's prompt attends to the answer, so that
    two answers cannot share it; sliding windows do not fit a tree. Under autocast the scores are rounded to bf16."""
    R, K, T = response.shape
    trees = (query.repeat_interleave(K, 0), query_mask.repeat_interleave(K, 0), response.view(-1, 1, T))
    ids = pack_tree(*trees, mask.view(-1, 1, T))[0]  # (R*K, L): real tokens first, padding behind them
    lengths = trees[1].sum(1) + mask.sum(2).flatten()  # (R*K,)
    attention_mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (R*K, L)
    ids = torch.where(attention_mask, ids, model.config.pad_token_id)
    return model(input_ids=ids, attention_mask=attention_mask).logits.view(R, K).float()


@torch.no_grad()
def choose_scores_fn(model: PreTrainedModel, ids: list[int]) -> Callable:
    """packed_scores where it agrees with the model's own logits to 1e-3 on a tree made of ids, else separate_scores."""
    ids = torch.tensor((ids * 32)[:32], device=model.device)
    query, response = ids[None, :16], torch.stack([ids[16:], ids[:16]])[None]  # (1, 16), (1, 2, 16)
    mask = torch.arange(16, device=ids.device) < torch.tensor([[[16], [9]]], device=ids.device)  # (1, 2, 16)
    inputs = (model, query, torch.ones_like(query, dtype=torch.bool), response, mask)
    fits = hasattr(model, "score") and getattr(model.config.get_text_config(), "sliding_window", None) is None
    if fits and (packed_scores(*inputs) - separate_scores(*inputs)).abs().max() < 1e-3:
        return packed_scores
    return separate_scores


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label: Tensor | None = None
) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected - margin) over pairs, rewards (B,). label (B,) is the probability mu(1)
    that `chosen` is preferred, 1 if it is None: the cross-entropy of Christiano et al. 2017, section 2.2.3. The margin
    is asked of whichever answer is preferred."""
    difference = chosen - rejected  # (B,)
    margin = 0.0 if margin is None else margin
    label = torch.ones_like(difference) if label is None else label
    return -(label * F.logsigmoid(difference - margin) + (1 - label) * F.logsigmoid(-difference - margin)).mean()


def plackett_luce_loss(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over rankings of -log prod_k exp(s_k) / sum_{j >= k} exp(s_j); scores (B, K), best first, mask (B, K) True
    where there is an answer (Plackett 1975; Luce 1959). For K = 2 it is bradley_terry_loss."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    scores = scores.masked_fill(~mask, -torch.inf)  # (B, K)
    remaining = scores.flip(1).logcumsumexp(1).flip(1)  # (B, K): log of the sum over j >= k
    return torch.where(mask, remaining - scores, 0.0).sum(1).mean()


def all_pairs_loss(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over rankings of the mean of -log sigmoid(s_i - s_j) over their K(K-1)/2 pairs i < j; scores (B, K), best
    first, mask (B, K) True where there is an answer (Ouyang et al. 2022, eq. 1)."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    pairs = (mask[:, :, None] & mask[:, None]).triu(1)  # (B, K, K)
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None])  # (B, K, K)
    return (torch.where(pairs, losses, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)).mean()


def real_pairs(mask: Tensor) -> tuple[Tensor, ...]:
    """Row, first answer and second answer, each (N,), of all pairs i < j in rankings; mask (B, K) as above."""
    return (mask[:, :, None] & mask[:, None]).triu(1).nonzero().unbind(1)


def agreement(difference: Tensor, label: Tensor) -> float:
    """Share of pairs (N,) whose sign of the difference is that of the preference label - 1/2; ties count half."""
    return ((difference.sign() * (label - 0.5).sign() + 1) / 2).mean().item()


def calibration(probabilities: Tensor, labels: Tensor, bins: int = 10) -> tuple[float, Tensor]:
    """Expected calibration error of predicted probabilities (N,) against labels (N,), and for each bin of equal width
    its mean prediction, its mean label and its count, (bins, 3) (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    index = (probabilities * bins).long().clamp(max=bins - 1)  # (N,)
    sums = torch.zeros(bins, 3, dtype=torch.float64)
    sums.index_add_(0, index, torch.stack([probabilities, labels, torch.ones_like(labels)], 1).double())
    table = torch.cat([sums[:, :2] / sums[:, 2:].clamp(min=1), sums[:, 2:]], 1)  # (bins, 3)
    return ((table[:, 0] - table[:, 1]).abs() * table[:, 2]).sum().item() / len(labels), table


# ---- scores, evaluation ----------------------------------------------------------------------------------------------


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


def score_rankings(
    scores_fn: Callable, model: PreTrainedModel, examples: list[dict], pad_id: int
) -> tuple[Tensor, Tensor]:
    """Scores (R, K) of examples, and a mask (R, K) that is False where a ranking has fewer than K answers."""
    K = max(len(example["responses"]) for example in examples)
    query, query_mask = pad_sequences([example["query"] for example in examples], pad_id, "left")  # (R, L_q)
    responses = [x for e in examples for x in e["responses"] + [[]] * (K - len(e["responses"]))]
    response, mask = pad_sequences(responses, pad_id, "right")  # (R*K, T)
    response, mask = (x.view(len(examples), K, -1) for x in (response, mask))  # (R, K, T)
    inputs = (x.to(model.device) for x in (query, query_mask, response, mask))
    return scores_fn(model, *inputs), mask.any(2).to(model.device)


def example_lengths(examples: list[dict], packed: bool) -> list[int]:
    """Tokens of each example: in a packed row the query once and all responses, else a padded copy of it for each."""
    if packed:
        return [len(example["query"]) + sum(map(len, example["responses"])) for example in examples]
    return [len(e["responses"]) * (len(e["query"]) + max(map(len, e["responses"]))) for e in examples]


@torch.no_grad()
def all_scores(
    scores_fn: Callable, model: PreTrainedModel, examples: list[dict], lengths: list[int], max_tokens: int, rank: int,
    world_size: int,
) -> tuple[Tensor, Tensor]:
    """Scores (N, K) of all examples, of these lengths, on the CPU, computed by all processes together; and a mask
    (N, K) that is False where there is no answer."""
    K = max(len(example["responses"]) for example in examples)
    scores = torch.zeros(len(examples), K, device=model.device)
    for number, batch in enumerate(make_microbatches(lengths, max_tokens)):
        if number % world_size == rank:
            found, _ = scores_fn(model, [examples[i] for i in batch])  # (R, k)
            scores[batch, : found.shape[1]] = found
    counts = torch.tensor([len(example["responses"]) for example in examples])  # (N,)
    return all_reduce(scores).cpu(), torch.arange(K) < counts[:, None]


def reliability_diagram(table: Tensor, error: float) -> Figure:
    """How often the first answer was preferred, by the probability that the model gave it; table as of calibration."""
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1, label="calibrated")
    real = table[table[:, 2] > 0].tolist()
    axes.plot(*list(zip(*real))[:2], "o", label="held-out pairs, with their number")
    for predicted, preferred, count in real:
        axes.annotate(f"{count:.0f}", (predicted, preferred), xytext=(4, -10), textcoords="offset points")
    axes.set(xlabel="predicted probability", ylabel="share preferred", title=f"expected calibration error {error:.3f}")
    axes.legend(loc="upper left")
    return figure


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


def check_reward_model_args(args: Args, world_size: int) -> None:
    """Whatever the flags alone show to be wrong."""
    check_ranges(
        args, ["num_train_epochs", "max_steps", "eval_steps", "save_steps", "max_eval_samples", "learning_rate",
               "train_batch_size", "max_length", "max_tokens_per_microbatch", "max_grad_norm"],
        ["warmup_steps", "sft_steps", "weight_decay", "min_lr_rate", "center_rewards_coefficient"],
    )
    if args.train_batch_size % world_size:
        bad_input(f"--train-batch-size {args.train_batch_size} does not divide by {world_size} processes")
    if args.dataset_name is not None and args.model_name_or_path is None:
        bad_input("--dataset-name needs --model-name-or-path: the embedded model reads nothing but two-digit addition")


NORMALISATION_ROWS = 2048  # training rankings over which the rewards' mean and standard deviation are taken


def main(args: Args) -> dict[str, float]:
    """Train, and return the final metrics, which are also in <run folder>/summary.json."""
    # ---- set-up: whatever is wrong with flags, model or data is said before anything is written
    start_time, state = time.time(), None
    if args.resume is not None:
        args, state = load_run(args)
    device, rank, world_size = set_up_process(args)
    check_reward_model_args(args, world_size)
    args = replace(args, bf16=args.bf16 and (device.type == "cuda" or not torch.cuda.is_available()))
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
    embedded = args.model_name_or_path is None
    initial = args.model_name_or_path or f"{args.resume}/sft"  # the model that training starts from
    load_classifier = partial(
        load_model, flag="--model-name-or-path", auto_class=AutoModelForSequenceClassification, new_head=True,
        num_labels=1,
    )
    torch.manual_seed(args.seed)  # of the head
    if embedded and args.resume is None:
        model, tokenizer = embedded_model(args.seed)
    else:
        tokenizer = load_tokenizer(initial, "--model-name-or-path")
        model = load_classifier(initial)
    config = model.config.get_text_config()
    cpu_tokens = 4096 if config.vocab_size > 65536 else 1024
    max_tokens = args.max_tokens_per_microbatch or (16384 if device.type == "cuda" else cpu_tokens)
    if args.dataset_name:
        train_rows, test_rows = load_rows(args)
    else:
        make_pairs = partial(addition_pairs, errors=(-1, 1), seed=args.seed)
        train_rows, test_rows = (make_pairs(rows, count) for rows, count in zip(addition_rows(args.seed), (6, 1)))
    context = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf))
    max_length = min(args.max_length, context)
    examples = encode_rankings(train_rows, "training", tokenizer, max_length)
    test_examples = encode_rankings(test_rows[: args.max_eval_samples], "held-out", tokenizer, max_length)
    if all(example["label"] == 0.5 for example in test_examples):
        bad_input("--dataset-name: every held-out pair is a tie")
    total_steps = args.max_steps or max(1, round(args.num_train_epochs * len(examples) / args.train_batch_size))

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
        model = load_classifier(initial)
    give_own_pad_token(model, tokenizer)
    model.to(device)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    choice = choose_scores_fn(model, test_examples[0]["query"] + test_examples[0]["responses"][0])
    if choice is separate_scores and rank == 0:
        print("a tree mask does not fit this architecture: every answer is read together with its own prompt")
    peak_lr = args.learning_rate or (7e-4 if embedded else 1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=args.weight_decay, fused=True)
    metrics: dict[str, float] = {}
    first_step, seconds_before = 0, 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        metrics, first_step, seconds_before = state["metrics"], state["step"], state["seconds"]
        del state  # else the weights and moments stay in memory twice

    # ---- what training and evaluation share
    def scores_fn(model: PreTrainedModel, batch: list[dict]) -> tuple[Tensor, Tensor]:
        with autocast():
            return score_rankings(choice, model, batch, tokenizer.pad_token_id)

    def ranking_loss(scores: Tensor, mask: Tensor, batch: list[dict]) -> Tensor:
        """Mean loss of a batch; scores and mask (R, K)."""
        if scores.shape[1] == 2:
            margin, label = (torch.tensor([e[key] for e in batch], device=scores.device) for key in ("margin", "label"))
            loss = bradley_terry_loss(scores[:, 0], scores[:, 1], margin, label)
        elif args.ranking_loss == "plackett_luce":
            loss = plackett_luce_loss(scores, mask)
        else:
            loss = all_pairs_loss(scores, mask)
        return loss + args.center_rewards_coefficient * torch.where(mask, scores, 0.0).sum(1).square().mean()

    def run_evaluation(step: int) -> dict[str, float]:
        model.eval()
        lengths = example_lengths(test_examples, choice is packed_scores)
        scores, mask = all_scores(scores_fn, model, test_examples, lengths, max_tokens, rank, world_size)  # (N, K)
        K = scores.shape[1]
        sizes = torch.tensor([e["characters"] + [0] * (K - len(e["characters"])) for e in test_examples])  # (N, K)
        row, first, second = real_pairs(mask)  # (pairs,)
        difference, longer = (x[row, first] - x[row, second] for x in (scores, sizes))  # (pairs,)
        label = torch.tensor([example["label"] for example in test_examples])[row]  # (pairs,)
        error, table = calibration(
            torch.cat([difference.sigmoid(), (-difference).sigmoid()]), torch.cat([label, 1 - label])
        )
        decided = label != 0.5
        results = {
            "eval/accuracy": agreement(difference[decided], label[decided]),
            "eval/accuracy_longer": agreement(longer[decided], label[decided]),
            "eval/loss": ranking_loss(scores, mask, test_examples).item(),
            "eval/calibration_error": error,
            "eval/margin": (difference * (label - 0.5).sign())[decided].mean().item(),
            "eval/mean_reward": scores[mask].mean().item(),
        }
        if rank == 0:
            writer.add_figure("calibration", reliability_diagram(table, error), step)
            for name, value in results.items():
                writer.add_scalar(name, value, step)
        return results

    def save(path: Path, step: int) -> None:
        if rank == 0:
            save_checkpoint(path, {
                "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "metrics": metrics,
                "seconds": seconds_before + time.time() - start_time,
            })

    if args.resume is None:
        metrics = {f"{name}_before": value for name, value in run_evaluation(0).items()}

    done, batch_size = first_step, args.train_batch_size
    interrupts, old_handler = catch_ctrl_c()
    bar = trange(first_step, total_steps, initial=first_step, total=total_steps, disable=rank != 0)
    for step in bar:
        # ---- batch
        step_start = time.time()
        batch = data_order(step * batch_size, batch_size, len(examples), args.seed)
        batch = batch[rank * batch_size // world_size : (rank + 1) * batch_size // world_size]
        lengths = example_lengths([examples[i] for i in batch], choice is packed_scores)
        microbatches = [[batch[i] for i in rows] for rows in make_microbatches(lengths, max_tokens)]

        # ---- update
        lr = peak_lr * lr_factor(step, total_steps, args.warmup_steps, args.lr_scheduler_type, args.min_lr_rate)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        sums = {"tokens": sum(lengths)}
        for mb in microbatches:
            mb = [examples[i] for i in mb]
            scores, mask = scores_fn(model, mb)  # (R, K)
            loss = ranking_loss(scores, mask, mb) * len(mb) / batch_size
            loss.backward()
            row, first, second = real_pairs(mask)  # (pairs,)
            preferred = torch.tensor([e["label"] for e in mb], device=device)[row].sub(0.5).sign()  # (pairs,)
            margin = (scores.detach()[row, first] - scores.detach()[row, second]) * preferred  # (pairs,), 0 for a tie
            stats = {
                "train/loss": loss.detach(), "right": ((margin.sign() + 1) / 2)[preferred != 0].sum(),
                "margins": margin.sum(), "pairs": (preferred != 0).sum(), "rewards": scores.detach()[mask].sum(),
                "answers": mask.sum(),
            }
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value
        for parameter in model.parameters():  # by hand: DDP wants as many micro-batches in every process
            if parameter.grad is not None:
                all_reduce(parameter.grad)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        if not grad_norm.isfinite():
            save(run_dir / "nonfinite.pt", step)
            wait_for_all(device)
            bad_input(f"the gradient of step {step + 1} is not finite; {run_dir}/nonfinite.pt is the state then")
        optimizer.step()
        optimizer.zero_grad()

        # ---- log
        logs = sum_over_processes({**sums, "interrupts": len(interrupts)}, device)
        tokens, interrupted = logs.pop("tokens"), logs.pop("interrupts") > 0
        pairs = max(1.0, logs.pop("pairs"))
        logs |= {
            "train/accuracy": logs.pop("right") / pairs,
            "train/margin": logs.pop("margins") / pairs,
            "train/mean_reward": logs.pop("rewards") / logs.pop("answers"),
            "train/grad_norm": grad_norm.item(),
            "train/epoch": (step + 1) * batch_size / len(examples),
            "charts/learning_rate": lr,
            "charts/SPS": tokens / (time.time() - step_start),
        }
        if rank == 0:
            for name, value in logs.items():
                writer.add_scalar(name, value, step + 1)
        bar.set_postfix_str(f"loss {logs['train/loss']:.3f}, accuracy {logs['train/accuracy']:.2f}")

        # ---- evaluate, save
        done = step + 1
        if done % args.eval_steps == 0 and done < total_steps and not interrupted:
            run_evaluation(done)
        if done % args.save_steps == 0 or done == total_steps or interrupted:
            save(run_dir / "checkpoint.pt", done)
        if interrupted:
            break

    signal.signal(signal.SIGINT, old_handler)
    model.eval()
    measured = random.Random(args.seed).sample(examples, min(NORMALISATION_ROWS, len(examples)))
    lengths = example_lengths(measured, choice is packed_scores)
    scores, mask = all_scores(scores_fn, model, measured, lengths, max_tokens, rank, world_size)  # (N, K)
    scores = scores[mask]
    model.config.reward_mean, model.config.reward_std = scores.mean().item(), scores.std().item()
    if rank == 0:
        save_model(run_dir / "model", model, tokenizer)
    wait_for_all(device)  # one that ended early would have torchrun end the others
    if done < total_steps:
        if rank == 0:
            print(f"stopped by Ctrl-C after step {done}; --resume {run_dir} goes on")
        raise SystemExit(130)
    metrics |= run_evaluation(total_steps)
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
