# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0", "datasets==5.2.0", "tqdm==4.70.1",
# ]
# ///
"""DPO: train a language model on preferences, without a reward model and without sampling.

For each prompt x there are two answers, y_w preferred to y_l. The reward that a policy pi is optimal for, under a KL
penalty beta to a reference, is beta log pi / pi_ref plus a term of x alone; put into the Bradley-Terry model of the
preferences, that term cancels, and the likelihood of the preferences is a loss for the policy itself:

    L(theta) = -E[ log sigmoid( beta (log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x)) ) ]

DPO: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7. Label smoothing: cDPO, Mitchell 2023, eq. 3. `robust`: Chowdhury
et al. 2024 (arXiv:2403.00409). `ipo`: Azar et al. 2024 (arXiv:2310.12036), eq. 17. `hinge`: SLiC's, on log ratios as
in RSO, Liu et al. 2024 (arXiv:2309.06657). `--rpo-alpha`: Pang et al. 2024 (arXiv:2404.19733).

The reference's log-probabilities are computed once and kept on disk: it is not in memory while the policy trains.

    python dpo.py                                  # laptop, no network: a tiny model learns to show its work
    python dpo.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct --dataset-name trl-lib/ultrafeedback_binarized \\
        --learning-rate 5e-7                       # one GPU
    torchrun --nproc-per-node=8 dpo.py ...         # several GPUs: the same global batch, split over them
    python dpo.py --resume runs/<run folder>       # goes on exactly where the last checkpoint stood

Shapes: R pairs, K = 2 answers (chosen, rejected), L_q query tokens, T response tokens, L packed tokens, B = R*K
sequences, N tokens, H hidden, V vocabulary. `logprobs[:, t]` scores `response[:, t]`. `mask` is True where a response
token counts: all of them, the EOS at the end included. `logps` are sums over a response's tokens, in nats.

Deliberately not here: sampling new pairs (online DPO), unpaired preferences (KTO), LoRA, sharded weights. See TRL.
"""

import hashlib
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
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass
class Args:
    """DPO: train a language model on preferences, without a reward model and without sampling."""

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

    # ---- DPO
    ref_model_name_or_path: str | None = None
    """Hub name or folder of the reference model. None: the model that training starts from."""
    num_train_epochs: float = 1.0
    """Passes over the training pairs."""
    max_steps: int | None = None
    """Optimizer steps; overrides --num-train-epochs."""
    eval_steps: int = 50
    """Steps from one evaluation to the next; there is always one before and one after training."""
    learning_rate: float | None = None
    """Peak learning rate of the fp32 weights. None: 1e-3 for the embedded model, 1e-6 (as in TRL) for a given one."""
    train_batch_size: int = 64
    """Pairs an optimizer step, over all processes (the paper's 64)."""
    max_length: int = 1024
    """Tokens of a prompt with its answer, at most the model's context; a longer answer is cut at its end."""
    beta: float | None = None
    """Strength of the KL penalty to the reference. Under ipo it is tau, and log-probabilities are means over tokens.
    None: 0.3 for the embedded model, 0.1 (the paper's and TRL's) for a given one."""
    loss_type: Literal["sigmoid", "ipo", "robust", "hinge"] = "sigmoid"
    """sigmoid (DPO; cDPO with --label-smoothing), ipo, robust (unbiased under that smoothing), or hinge (SLiC)."""
    label_smoothing: float = 0.0
    """Share of the preferences that are taken to be the wrong way round, below 0.5; for sigmoid and robust."""
    rpo_alpha: float = 0.0
    """Weight of the chosen answer's negative log-likelihood, per token of the answer."""
    sft_steps: int = 1200
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


def encode_prompt(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a prompt: through the chat template where the tokenizer has one, as plain text else."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt_text(prompt)).input_ids
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)


def encode_answer(
    prompt: str | list[dict], answer: str, query: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Ids of an answer behind its prompt's ids: the rest of both tokenised together where the prompt's ids begin them,
    else of the answer alone. It ends with EOS, or as the chat template ends a turn."""
    if tokenizer.chat_template is None:
        whole, end = tokenizer(prompt_text(prompt) + answer).input_ids, [tokenizer.eos_token_id]
    else:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = [*turns, {"role": "assistant", "content": answer}]
        whole, end = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False), []
    if whole[: len(query)] != query:
        whole, end = query + tokenizer(answer, add_special_tokens=False).input_ids, [tokenizer.eos_token_id]
    return whole[len(query) :] + end


def encode_pairs(rows: list[dict], split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict]:
    """Examples {prompt, query, responses} of rows, and a line that counts what was left out or cut."""
    examples, empty, same, cut = [], "with an empty or the same answer left out", "the same once cut left out", "cut"
    long = "with too long a prompt left out"
    counts = {empty: 0, long: 0, same: 0, cut: 0}
    for number, row in enumerate(rows, 1):
        prompt, answers = prompt_and_answers(row)
        if len(answers) != 2:
            bad_input(f"--dataset-name: {split} row {number} has {len(answers)} completions, but DPO compares two")
        if not prompt_text(prompt).strip():
            bad_input(f"--dataset-name: the prompt of {split} row {number} is empty")
        if answers[0] == answers[1] or not all(answer.strip() for answer in answers):
            counts[empty] += 1
            continue
        try:
            query = encode_prompt(prompt, tokenizer)
            responses = [encode_answer(prompt, answer, query, tokenizer) for answer in answers]
        except TemplateError as error:
            bad_input(f"--dataset-name: the chat template refuses {split} row {number}: {error}")
        room = max_length - len(query)
        if room <= 0:
            counts[long] += 1
            continue
        counts[cut] += any(len(response) > room for response in responses)
        responses = [response[:room] for response in responses]
        if responses[0] == responses[1]:
            counts[same] += 1
            continue
        examples.append({"prompt": prompt, "answer": row.get("answer"), "query": query, "responses": responses})
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    if found and os.environ.get("RANK", "0") == "0":
        print(f"of {len(rows)} {split} pairs: {found} (--max-length {max_length})")
    if not examples:
        bad_input(f"--dataset-name: no {split} pair is left ({found})")
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


def dpo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor,
    beta: float, loss_type: Literal["sigmoid", "ipo", "robust", "hinge"], label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, chosen rewards and rejected rewards, each (R,), from log-probabilities (R,) of whole answers, in nats.

    The rewards, beta log pi / pi_ref, have no gradient. With h = the rewards' difference and e = label_smoothing:
    sigmoid: -(1-e) log sigmoid(h) - e log sigmoid(-h), DPO eq. 7 and, with e > 0, cDPO eq. 3;
    robust: (-(1-e) log sigmoid(h) + e log sigmoid(-h)) / (1-2e), the unbiased estimate under flips, rDPO;
    hinge: max(0, 1 - h), RSO's hinge-norm: the margin of the log ratios is 1/beta;
    ipo: (h/beta - 1/(2 beta))^2, IPO eq. 17. The optimum's gap of log ratios is 1/(2 beta), whatever the answers'
    lengths: given sums over tokens, beta means less for longer answers. main gives means over tokens, as TRL does."""
    chosen_log_ratio = policy_chosen_logps - ref_chosen_logps  # (R,)
    rejected_log_ratio = policy_rejected_logps - ref_rejected_logps  # (R,)
    difference = chosen_log_ratio - rejected_log_ratio  # (R,)
    right, wrong = -F.logsigmoid(beta * difference), -F.logsigmoid(-beta * difference)  # (R,)
    if loss_type == "sigmoid":
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
    elif loss_type == "robust":
        losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif loss_type == "hinge":
        losses = (1 - beta * difference).relu()
    elif loss_type == "ipo":
        losses = (difference - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"unknown loss_type {loss_type!r}")
    return losses, (beta * chosen_log_ratio).detach(), (beta * rejected_log_ratio).detach()


# ---- log-probabilities of pairs, the reference, evaluation -----------------------------------------------------------


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


def read_cache(path: Path, count: int, device: torch.device) -> Tensor | None:
    """The log-probabilities (count, 2) in a file that every process has; None where one has none that can be read."""
    try:
        logps = torch.load(path, weights_only=True)["logps"]
    except Exception:  # no file, or one that was damaged: it is computed again
        logps = torch.zeros(0)
    everywhere = all_reduce(torch.tensor(float(logps.shape == (count, 2)), device=device), dist.ReduceOp.MIN)
    return logps if everywhere else None


def pair_logps(
    states_fn: Callable, model: PreTrainedModel, examples: list[dict], pad_id: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (R, 2) of whole answers, chosen and rejected, and their lengths (R, 2)."""
    query, query_mask = pad_sequences([example["query"] for example in examples], pad_id, "left")  # (R, L_q)
    responses = [response for example in examples for response in example["responses"]]
    response, mask = pad_sequences(responses, pad_id, "right")  # (R*2, T)
    response, mask = (x.view(len(examples), 2, -1) for x in (response, mask))  # (R, 2, T)
    query, query_mask, response, mask = (x.to(model.device) for x in (query, query_mask, response, mask))
    states = states_fn(model, query, query_mask, response, mask)  # (N, H)
    return completion_logprobs(model, states, response, mask, 1.0).sum(2), mask.sum(2)


def example_lengths(examples: list[dict], packed: bool) -> list[int]:
    """Tokens of each example: in a packed row the query once and all responses, else a padded copy of it for each."""
    if packed:
        return [len(example["query"]) + sum(map(len, example["responses"])) for example in examples]
    return [len(e["responses"]) * (len(e["query"]) + max(map(len, e["responses"]))) for e in examples]


@torch.no_grad()
def all_logps(
    logps_fn: Callable, model: PreTrainedModel, examples: list[dict], lengths: list[int], max_tokens: int, rank: int,
    world_size: int,
) -> Tensor:
    """pair_logps (N, 2) of all examples, of these lengths, in fp32 on the CPU, computed by all processes together."""
    logps = torch.zeros(len(examples), 2, device=model.device)
    for number, batch in enumerate(make_microbatches(lengths, max_tokens)):
        if number % world_size == rank:
            logps[batch] = logps_fn(model, [examples[i] for i in batch])[0]
    return all_reduce(logps).cpu()


def fingerprint(model: PreTrainedModel, *described: list | str) -> str:
    """A hash of a model's weights and of what is computed with them."""
    digest = hashlib.sha256(json.dumps([str(model.config), *described]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


@torch.no_grad()
def sampled_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[dict], seed: int
) -> tuple[float, str]:
    """Share of the embedded task's held-out problems that a sampled answer solves, and some answers as a table."""
    torch.manual_seed(seed)
    query, query_mask = pad_sequences([example["query"] for example in examples], tokenizer.pad_token_id, "left")
    whole = model.generate(
        input_ids=query.to(model.device), attention_mask=query_mask.to(model.device), max_new_tokens=16, do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0,
    )  # (R, L_q + T): softmax(logits) and nothing else
    texts = tokenizer.batch_decode(whole[:, query.shape[1] :], skip_special_tokens=True)
    right = [text.split("=")[-1] == example["answer"] for text, example in zip(texts, examples)]
    rows = [f"| {example['prompt']} | {text} | {float(r):.2f} |\n" for example, text, r in zip(examples, texts, right)]
    return sum(right) / len(right), "| prompt | completion | reward |\n|---|---|---|\n" + "".join(rows[:8])


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


def check_dpo_args(args: Args, world_size: int) -> None:
    """Whatever the flags alone show to be wrong."""
    check_ranges(
        args, ["num_train_epochs", "max_steps", "eval_steps", "save_steps", "max_eval_samples", "learning_rate",
               "train_batch_size", "max_length", "max_tokens_per_microbatch", "max_grad_norm", "beta"],
        ["warmup_steps", "sft_steps", "weight_decay", "min_lr_rate", "label_smoothing", "rpo_alpha"],
    )
    if args.train_batch_size % world_size:
        bad_input(f"--train-batch-size {args.train_batch_size} does not divide by {world_size} processes")
    if args.loss_type not in ("sigmoid", "ipo", "robust", "hinge"):
        bad_input(f"--loss-type {args.loss_type} is none of sigmoid, ipo, robust, hinge")
    if args.label_smoothing >= 0.5:
        bad_input(f"--label-smoothing must be below 0.5, but is {args.label_smoothing}")
    if args.label_smoothing > 0 and args.loss_type not in ("sigmoid", "robust"):
        bad_input(f"--label-smoothing has no meaning for --loss-type {args.loss_type}")
    if args.dataset_name is not None and args.model_name_or_path is None:
        bad_input("--dataset-name needs --model-name-or-path: the embedded model reads nothing but two-digit addition")


def main(args: Args) -> dict[str, float]:
    """Train, and return the final metrics, which are also in <run folder>/summary.json."""
    # ---- set-up: whatever is wrong with flags, model or data is said before anything is written
    start_time, state = time.time(), None
    if args.resume is not None:
        args, state = load_run(args)
    device, rank, world_size = set_up_process(args)
    check_dpo_args(args, world_size)
    args = replace(args, bf16=args.bf16 and (device.type == "cuda" or not torch.cuda.is_available()))
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
    embedded = args.model_name_or_path is None
    initial = args.model_name_or_path or f"{args.resume}/sft"  # the model that training starts from
    if embedded and args.resume is None:
        model, tokenizer = embedded_model(args.seed)
    else:
        tokenizer = load_tokenizer(initial, "--model-name-or-path")
        model = load_model(initial, "--model-name-or-path")
    if tokenizer.eos_token_id is None:
        bad_input(f"--model-name-or-path {initial}: its tokenizer has no EOS token to end an answer with")
    ref_model = model  # also when resumed: its weights are still those that training started from
    if args.ref_model_name_or_path is not None:
        ref_model = load_model(args.ref_model_name_or_path, "--ref-model-name-or-path").to(device)
        if ref_model.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
            bad_input(f"--ref-model-name-or-path {args.ref_model_name_or_path} has another vocabulary than the model")
    if args.dataset_name:
        train_rows, test_rows = load_rows(args)
    else:
        make_pairs = partial(addition_pairs, errors=(-10, -1, 1, 10), seed=args.seed)
        train_rows, test_rows = (make_pairs(rows, count) for rows, count in zip(addition_rows(args.seed), (3, 1)))
    contexts = [getattr(m.config.get_text_config(), "max_position_embeddings", math.inf) for m in (model, ref_model)]
    max_length = min(args.max_length, *contexts)
    cpu_tokens = 512 if model.config.get_text_config().vocab_size > 65536 else 1024
    max_tokens = args.max_tokens_per_microbatch or (16384 if device.type == "cuda" else cpu_tokens)
    examples = encode_pairs(train_rows, "training", tokenizer, max_length)
    test_examples = encode_pairs(test_rows[: args.max_eval_samples], "held-out", tokenizer, max_length)
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
        model = load_model(initial, "--model-name-or-path")
        ref_model = ref_model if args.ref_model_name_or_path else model
    model.to(device)
    states_fn = choose_states_fn(model, test_examples[0]["query"])
    if states_fn is padded_states and rank == 0:
        print("a tree mask does not fit this architecture: answers are padded instead of packed behind their prompt")

    def logps_fn(model: PreTrainedModel, batch: list[dict], states_fn: Callable) -> tuple[Tensor, Tensor]:
        with autocast():
            return pair_logps(states_fn, model, batch, tokenizer.pad_token_id)

    # ---- the reference's log-probabilities, once: then it leaves memory
    flag = "--ref-model-name-or-path" if args.ref_model_name_or_path else "--model-name-or-path"
    ref_states_fn = choose_states_fn(ref_model, test_examples[0]["query"], flag)
    ids = [[example["query"], *example["responses"]] for example in examples + test_examples]
    settings = f"{ref_states_fn.__name__} {device.type} bf16={args.bf16} {max_tokens} tokens torch {torch.__version__}"
    ref_file = Path(args.output_dir) / ".reference_logps" / f"{fingerprint(ref_model, ids, settings)}.pt"
    ref_logps = read_cache(ref_file, len(ids), device)  # (N, 2)
    if ref_logps is None:
        lengths = example_lengths(examples + test_examples, ref_states_fn is packed_states)
        ref_logps_fn = partial(logps_fn, states_fn=ref_states_fn)
        ref_logps = all_logps(ref_logps_fn, ref_model, examples + test_examples, lengths, max_tokens, rank, world_size)
        if rank == 0:
            ref_file.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(run_dir / ref_file.name, {"logps": ref_logps})
            os.replace(run_dir / ref_file.name, ref_file)  # another run may be doing the same
    del ref_model
    ref_logps, test_ref_logps = ref_logps.to(device).split([len(examples), len(test_examples)])  # (N, 2)

    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    beta = args.beta or (0.3 if embedded else 0.1)
    peak_lr = args.learning_rate or (1e-3 if embedded else 1e-6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=args.weight_decay, fused=True)
    metrics: dict[str, float] = {}
    first_step, seconds_before = 0, 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        metrics, first_step, seconds_before = state["metrics"], state["step"], state["seconds"]
        del state  # else the weights and moments stay in memory twice

    # ---- what training and evaluation share
    def loss_and_stats(logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (R,) and what is logged of each pair, (R,); logps, ref_logps and lengths (R, 2)."""
        counts = lengths if args.loss_type == "ipo" else torch.ones_like(lengths)  # (R, 2)
        losses, chosen, rejected = dpo_loss(
            *(logps / counts).unbind(1), *(ref_logps / counts).unbind(1), beta, args.loss_type, args.label_smoothing
        )
        losses = losses - args.rpo_alpha * logps[:, 0] / lengths[:, 0]  # RPO
        return losses, {
            "loss": losses.detach(), "rewards/chosen": chosen, "rewards/rejected": rejected,
            # a tie counts one half: at the first step policy and reference are equal, but for rounding
            "rewards/accuracies": 0.5 + (chosen - rejected).sign() * ((chosen - rejected).abs() > 1e-5) / 2,
            "rewards/margins": chosen - rejected,
            "logps/chosen": logps[:, 0].detach(), "logps/rejected": logps[:, 1].detach(),
        }

    def run_evaluation(step: int) -> dict[str, float]:
        model.eval()
        lengths = example_lengths(test_examples, states_fn is packed_states)
        policy_logps_fn = partial(logps_fn, states_fn=states_fn)
        logps = all_logps(policy_logps_fn, model, test_examples, lengths, max_tokens, rank, world_size).to(device)
        lengths = torch.tensor([[len(r) for r in example["responses"]] for example in test_examples], device=device)
        _, stats = loss_and_stats(logps, test_ref_logps, lengths)
        results = {f"eval/{name}": value.mean().item() for name, value in stats.items()}
        if embedded:
            results["eval/accuracy"], table = sampled_accuracy(model, tokenizer, test_examples, args.seed)
        if rank == 0:
            if embedded:
                writer.add_text("samples", table, step)
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
        lengths = example_lengths([examples[i] for i in batch], states_fn is packed_states)
        microbatches = [[batch[i] for i in rows] for rows in make_microbatches(lengths, max_tokens)]

        # ---- update
        lr = peak_lr * lr_factor(step, total_steps, args.warmup_steps, args.lr_scheduler_type, args.min_lr_rate)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        sums = {"tokens": sum(lengths)}
        for mb in microbatches:
            logps, mb_lengths = logps_fn(model, [examples[i] for i in mb], states_fn)  # (R, 2)
            losses, stats = loss_and_stats(logps, ref_logps[mb], mb_lengths)  # (R,)
            (losses.sum() / batch_size).backward()
            for name, value in stats.items():
                sums[f"train/{name}"] = sums.get(f"train/{name}", 0.0) + value.sum() / batch_size
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
        logs |= {
            "train/grad_norm": grad_norm.item(),
            "train/epoch": (step + 1) * batch_size / len(examples),
            "charts/learning_rate": lr,
            "charts/SPS": tokens / (time.time() - step_start),
        }
        if rank == 0:
            for name, value in logs.items():
                writer.add_scalar(name, value, step + 1)
        bar.set_postfix_str(f"loss {logs['train/loss']:.3f}, accuracy {logs['train/rewards/accuracies']:.2f}")

        # ---- evaluate, save
        done = step + 1
        if done % args.eval_steps == 0 and done < total_steps and not interrupted:
            run_evaluation(done)
        if done % args.save_steps == 0 or done == total_steps or interrupted:
            save(run_dir / "checkpoint.pt", done)
        if interrupted:
            break

    signal.signal(signal.SIGINT, old_handler)
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
