# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0", "datasets==5.2.0",
#                 "tqdm==4.70.1"]
# ///
"""GRPO: train a language model by reinforcement learning with verifiable rewards.

For each prompt q the policy samples G completions o_1..o_G, scored by Python functions. A completion's advantage is its
reward relative to its group's mean, so there is no value network.

    J(theta) = E[ 1/N sum_i sum_t min(rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i) ] - beta KL(pi || pi_ref)
    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)        A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)

GRPO: arXiv:2402.03300. The default loss is DAPO's, arXiv:2503.14476: N counts all tokens, eps_high > eps_low, beta = 0.
Dr. GRPO, arXiv:2503.20783: --loss-type dr_grpo --scale-rewards none. CISPO, arXiv:2506.13585: --loss-type cispo. GSPO,
arXiv:2507.18071: --loss-type grpo --importance-sampling-level sequence --epsilon 3e-4 --epsilon-high 4e-4.

    python grpo_llm.py                             # laptop, offline: a tiny model learns to show its work
    python grpo_llm.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct --dataset-name openai/gsm8k \\
        --dataset-config main --max-completion-length 512 --max-steps 500 --max-eval-samples 128        # one GPU
    torchrun --nproc-per-node=8 grpo_llm.py ...    # several GPUs: the same global batch, split by prompts
    python grpo_llm.py --resume runs/<run folder>  # continue exactly from the last checkpoint

Shapes: P prompts per process, G completions per prompt (k in evaluation), B completions (in main: of all processes),
L_q prompt tokens, T completion tokens, R rows of L tokens, K completions per row, N tokens in a micro-batch, H hidden
size, V vocabulary. logprobs[:, t] belongs to completion token t. `mask` is True up to the first stop token, inclusive.

Deliberately not here: inference servers, dynamic sampling, LoRA, tools, images, sharded weights. See TRL or verl.
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
from typing import Callable, Literal

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
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast


@dataclass
class Args:
    """GRPO for language models with verifiable rewards."""

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

    # ---- GRPO
    max_steps: int = 200  # rollouts (--num-iterations optimizer steps each)
    eval_steps: int = 50  # steps between evaluations
    save_steps: int = 50  # steps between checkpoints
    learning_rate: float | None = None  # peak. None: 1e-3 for the tiny model, else 1e-6
    generation_batch_size: int = 256  # completions per rollout across all processes
    num_generations: int = 8  # G, completions per prompt
    max_completion_length: int = 256  # longest completion, in tokens
    temperature: float = 1.0  # divides the logits in sampling and loss, not in evaluation; above 0
    eval_generations: int = 8  # completions per held-out prompt, the k of pass@k
    reward_model_path: str | None = None  # one-logit sequence classifier; adds its score to the functions' rewards
    normalize_reward_model: bool = False  # standardize scores by reward_mean, reward_std of the model's config
    loss_type: Literal["dapo", "grpo", "dr_grpo", "cispo"] = "dapo"  # dapo: token mean. grpo: mean of completion means
    scale_rewards: Literal["group", "none"] = "group"  # divide advantages by the group's std. none: don't (Dr. GRPO)
    importance_sampling_level: Literal["token", "sequence"] = "token"  # ratio per token or completion (GSPO)
    epsilon: float = 0.2  # clips the probability ratio below, at 1 - epsilon (not in cispo)
    epsilon_high: float = 0.28  # clips the probability ratio above, at 1 + epsilon_high (DAPO's clip-higher)
    beta: float = 0.0  # weight of the per-token KL to the initial model
    num_iterations: int = 1  # optimizer steps per rollout (mu in GRPO); 1: on-policy
    mask_truncated_completions: bool = False  # no loss on cut-off completions (DAPO)


def group_advantages(rewards: Tensor, scale_rewards: str) -> Tensor:
    """Rewards (P, G) minus their group's mean; "group" also divides by its std (ddof 1) + 1e-4, as in TRL."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale_rewards == "group":
        advantages /= rewards.std(1, keepdim=True) + 1e-4
    return advantages.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0)  # exactly 0, no rounding noise


def grpo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, epsilon_low: float, epsilon_high: float,
    loss_type: str, ref_logprobs: Tensor | None = None, beta: float = 0.0, max_completion_length: int | None = None,
    importance_sampling_level: str = "token", num_tokens: float | None = None, num_sequences: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimize, and statistics (means over tokens). Inputs are (B, T), advantages (B,).
    num_tokens and num_sequences count the whole update, so that losses of micro-batches and processes add up.
    On-policy the loss is minus the mean advantage, about 0 (CISPO's is not), but its gradient is not 0.
    The KL term is k2 (joschu.net/blog/kl-approx), log(pi / pi_ref)^2 / 2, times the detached ratio: its gradient is
    the per-token reverse KL's, even off-policy (k1's and k3's are not). Effects on later tokens' KL are ignored."""
    num_tokens = mask.sum().clamp(min=1) if num_tokens is None else num_tokens
    num_sequences = len(mask) if num_sequences is None else num_sequences
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # (B, T)
    ratio = log_ratio.exp()
    if importance_sampling_level == "sequence":
        ratio = (log_ratio.sum(1, keepdim=True) / lengths).exp().expand_as(mask)  # GSPO eq. 7
    advantages = advantages[:, None]  # (B, 1)
    too_low = (ratio < 1 - epsilon_low) & (advantages < 0)
    too_high = (ratio > 1 + epsilon_high) & (advantages > 0)
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)
    if loss_type == "cispo":  # MiniMax-M1, eq. 4 and 5: detached weight, no lower bound
        too_low, too_high = torch.zeros_like(mask), ratio > 1 + epsilon_high
        losses = -ratio.clamp(max=1 + epsilon_high).detach() * advantages * logprobs
    if beta:
        log_ratio_ref = torch.where(mask, logprobs - ref_logprobs, 0.0)
        losses += beta * log_ratio.detach().exp() * log_ratio_ref.square() / 2  # the token's ratio, also in GSPO
    losses = torch.where(mask, losses, 0.0)
    if loss_type == "grpo":
        loss = (losses / lengths).sum() / num_sequences  # GRPO eq. 3
    elif loss_type == "dr_grpo":
        loss = losses.sum() / (num_sequences * max_completion_length)  # Dr. GRPO, appendix C
    else:
        loss = losses.sum() / num_tokens  # DAPO eq. 8
    stats = {
        "policy/approxkl_avg": log_ratio.exp() - 1 - log_ratio,  # k3 estimate of KL(pi_old || pi)
        "train/clip_ratio/low_mean": too_low, "train/clip_ratio/high_mean": too_high,
        "train/clip_ratio/region_mean": too_low | too_high,
    }
    if beta:
        stats["train/kl"] = torch.exp(-log_ratio_ref) - 1 + log_ratio_ref  # k3, as TRL logs it
    return loss, {name: torch.where(mask, x.detach(), 0.0).sum() / num_tokens for name, x in stats.items()}


def lr_factor(step: int, num_steps: int, warmup_steps: int, kind: str) -> float:
    """Fraction of the peak rate at optimizer step 0..num_steps-1. Linear and cosine end at exactly 0."""
    elapsed = max(0, step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - elapsed, "cosine": (1 + math.cos(math.pi * elapsed)) / 2}[kind]
    return decay * min(1.0, (step + 1) / (warmup_steps + 1))


# ---- Rewards: edit these. Each returns a number, or None where it does not apply.
NUMBER = r"(?:(?<![\d.)])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"  # 7, -3, 1,200.5, .5
MARKED = re.compile(r"####(?![#\s*]*(?:[^\W\d_]|\d+[.)] +\S))\s*(.*)|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")  # #### 12
SHOWN_WORK = re.compile(r"\S.*?(?:####|\\boxed\{|=)\s*\\?\$?\s*-?\d", re.DOTALL)  # 7+5=12, so #### 12


def extract_number(text: str) -> float | None:
    """The number in the last answer marked by `#### N` or `\\boxed{N}` (a unit may follow), else the last number.
    None if there is none or the marked answer is a formula."""
    text = text.replace("\u2212", "-").replace("{,}", ",")
    found = re.findall(NUMBER, text)
    if marked := MARKED.findall(text):
        content = re.sub(r"\\text|[$\u20ac\\*{}]", "", "".join(marked[-1])).strip()
        found = re.findall(rf"^({NUMBER})\s*%?(?:\s[^\d+*/^=]*)?[.,]?$", content)
    return float(found[-1].replace(",", "")) if found else None


def accuracy_reward(prompt: str, completion: str, answer: str | None) -> float | None:
    """1 if the completion's final number is the answer's, else 0. None if the answer neither is nor marks a number."""
    has_number = answer and (MARKED.search(answer) or re.fullmatch(NUMBER, answer.strip()))
    expected = extract_number(answer) if has_number else None
    return None if expected is None else float(extract_number(completion) == expected)


def format_reward(prompt: str, completion: str, answer: str | None) -> float | None:
    """1 if the completion shows work before a result marked by `####`, `\\boxed{` or `=`, else 0."""
    return float(bool(SHOWN_WORK.match(completion.strip())))


REWARDS = ((accuracy_reward, 1.0), (format_reward, 0.0))  # (function, weight); weight 0 only logs


def score_completions(samples: list[dict], reward_model: Callable | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Rewards (B,) of samples {prompt, text, answer, ...}, and each function's by name (B,), nan for None."""
    parts = {}
    for function, _ in REWARDS:
        values = [function(s["prompt"], s["text"], s["answer"]) for s in samples]
        parts[function.__name__] = torch.tensor([math.nan if x is None else float(x) for x in values])
    weighted = [weight * parts[function.__name__] for function, weight in REWARDS if weight]
    if reward_model:
        parts["reward_model"] = reward_model(samples)
        weighted.append(parts["reward_model"])
    table = torch.stack(weighted)  # (rewards, B)
    for i in (table.isnan().all(0) | table.isinf().any(0)).nonzero():
        raise ValueError("no finite reward for {prompt!r}; its column `answer`: {answer!r}".format(**samples[i]))
    return table.nansum(0), parts


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


def encode_rows(rows: list[dict], tokenizer: PreTrainedTokenizerFast, max_length: float) -> list[dict]:
    """Examples {prompt, turns, answer, ids} from TRL's columns (`prompt` or `messages`, `answer` or `solution`) or
    GSM8K's (`question`, `answer`), without prompts that are too long or have unknown characters."""
    examples = []
    unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, None}
    for number, row in enumerate(rows, 1):
        turns = next((row[key] for key in ("prompt", "question", "messages") if row.get(key) is not None), None)
        turns = turns if isinstance(turns, list) else [{"role": "user", "content": turns}]
        if not all(isinstance(x, dict) and "role" in x and isinstance(x.get("content"), str) for x in turns):
            raise ValueError(f"--dataset-name: row {number} with columns {sorted(row)} needs a `prompt`: text or turns")
        if turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]  # `messages` may include the answer
        prompt = "\n".join(turn["content"] for turn in turns)
        if turns and tokenizer.chat_template is not None:
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        else:
            ids = tokenizer(prompt).input_ids
            ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers append EOS
        answer = next((str(row[key]) for key in ("answer", "solution") if row.get(key) is not None), None)
        if prompt.strip() and len(ids) <= max_length and not unknown & {*ids}:
            examples.append({"prompt": prompt, "turns": turns, "answer": answer, "ids": ids})
    if (left_out := len(rows) - len(examples)) and int(os.environ.get("RANK", 0)) == 0:
        print(f"{left_out} of {len(rows)} prompts are left out: empty, over {max_length} tokens, or not encodable")
    return examples


def load_reward_model(args: Args, device: torch.device) -> Callable:
    """A function from samples {prompt, turns, text, ...} to the logits (B,) of a sequence classifier, with its own
    tokenizer and chat template, in fp32: bf16 scores between 4 and 8 are 1/32 apart."""
    flag = "--reward-model-path"
    model, tokenizer = load_pretrained(args.reward_model_path, flag, AutoModelForSequenceClassification)
    config, has_own_pad = model.to(device).config, tokenizer.pad_token_id != tokenizer.eos_token_id
    if config.num_labels != 1 or not has_own_pad or (args.normalize_reward_model and not hasattr(config, "reward_std")):
        raise ValueError(f"{flag} needs one logit, a pad token besides EOS and, to normalize, reward_std in its config")
    config.pad_token_id = tokenizer.pad_token_id  # so that transformers finds the last token
    tokenizer.truncation_side = "right"
    plain = tokenizer.chat_template is None
    max_length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 2**20))

    @torch.no_grad()
    def score(samples: list[dict]) -> Tensor:
        texts = [s["prompt"] + s["text"] for s in samples]
        if not plain:
            chats = [[*s["turns"], {"role": "assistant", "content": s["text"]}] for s in samples]
            texts = tokenizer.apply_chat_template(chats, tokenize=False)
        ids = tokenizer(texts, add_special_tokens=plain, truncation=True, max_length=max_length).input_ids
        scores, lengths = torch.zeros(len(ids)), torch.tensor([*map(len, ids)])
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
    logprob at temperature 1. Inverts the CDF at uniform (B,), so draws do not depend on the batch: first a chunk of 128
    tokens, then a token in it. fp64 keeps the tail of a large vocabulary. Overwrites logits (B, V)."""
    if logits.shape[1] % 128:
        logits = nn.functional.pad(logits, (0, -logits.shape[1] % 128), value=-torch.inf)
    logits = logits.float().div_(temperature or 1.0)
    probs = logits.sub_(logits.amax(1, keepdim=True)).exp_()  # (B, V), up to a factor
    chunks = probs.unflatten(1, (-1, 128))  # (B, C, 128)
    sums = chunks.sum(2).double()  # (B, C)
    cdf = sums.cumsum(1)
    goal = uniform[:, None] * cdf[:, -1:]  # (B, 1)
    chunk = torch.searchsorted(cdf, goal, right=True).clamp(max=cdf.shape[1] - 1)  # (B, 1)
    inside = chunks.take_along_dim(chunk[:, :, None], 1)[:, 0].double().cumsum(1)  # (B, 128)
    share = ((goal - cdf.gather(1, chunk)) / sums.gather(1, chunk) + 1).clamp(0, 1 - 1e-15)  # (B, 1), inside the chunk
    token = 128 * chunk + torch.searchsorted(inside, share * inside[:, -1:], right=True)
    if temperature == 0:
        token = probs.argmax(1, keepdim=True)
    return token[:, 0], (probs.gather(1, token) / cdf[:, -1:]).log()[:, 0].float()


@torch.no_grad()
def sample(
    model: PreTrainedModel, query: Tensor, attention_mask: Tensor, G: int, T: int, temperature: float,
    stop_ids: list[int], pad_id: int, generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample G completions of each left-padded prompt in query (P, L_q) from softmax(logits / temperature),
    ignoring the generation config, up to and including a stop id, or to T tokens.
    Returns response, logprobs (fp32) and mask (P*G, T), grouped by prompt."""
    model.eval()  # in training mode, gradient checkpointing drops the cache
    B, device = len(query) * G, query.device
    uniform = torch.rand(B, T, dtype=torch.float64, generator=generator).to(device)
    response, logprobs = torch.full((B, T), pad_id, device=device), torch.zeros(B, T, device=device)
    mask, stop = torch.zeros(B, T, dtype=torch.bool, device=device), torch.tensor(stop_ids, device=device)
    cache, ids, padded = KeyValueCache(config=model.config), query, not attention_mask.all()
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (P, L_q)
    active = torch.arange(B, device=device)  # (b,), unfinished
    for t in range(T):
        logits = model(
            input_ids=ids, attention_mask=attention_mask if padded else None, position_ids=position_ids,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # (b, V), at t = 0 (P, V)
        if t == 0:  # prompts were read once; now repeat them
            source = active // G  # (B,)
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
        ids, position_ids = token[:, None], position_ids + 1  # (b, 1) each
        attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)  # (b, L_q + t + 1)
    return response[:, : t + 1], logprobs[:, : t + 1], mask[:, : t + 1]


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


def pack(model: PreTrainedModel, samples: list[dict], G: int, max_tokens: int) -> list[tuple]:
    """Micro-batches of about max_tokens for completion_logprobs: (indices of samples, prompts, completions).
    K of a prompt's G completions share a row, which computes the prompt once, but attention is dense over its
    L = L_q + K T tokens: 4 L^2 H FLOPs per layer, plus 24 L H^2 for weights. K = best_K is cheapest per completion."""
    L_q, T = (sum(len(s[key]) for s in samples) / len(samples) for key in ("ids", "completion"))
    best_K = math.sqrt(L_q * (L_q + 6 * model.config.get_text_config().hidden_size)) / T if fits_tree(model) else 1
    K = max(K for K in range(1, G + 1) if K == 1 or (G % K == 0 and K <= best_K and L_q + K * T <= max_tokens))
    rows = [samples[i : i + K] for i in range(0, len(samples), K)]
    lengths = [len(row[0]["ids"]) + sum(len(s["completion"]) for s in row) for row in rows]
    batches = []
    for r in sorted(range(len(rows)), key=lengths.__getitem__):  # similar lengths need little padding
        if not batches or (len(batches[-1][1]) + 1) * lengths[r] > max_tokens:
            batches.append(([], [], []))
        indices, prompts, completions = batches[-1]
        indices += range(r * K, r * K + K)
        prompts.append(rows[r][0]["ids"])
        completions += [s["completion"] for s in rows[r]]
    return batches


def gather(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Each tensor (n,) from all processes in rank order, (world_size * n,), in fp32."""
    values = {name: x.float().to(device) for name, x in values.items()}
    if dist.is_initialized():
        for name, x in values.items():
            values[name] = x.new_empty(dist.get_world_size() * len(x))
            dist.all_gather_single(values[name], x)
    return values


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
        may_be_0 = name in ("seed", "warmup_steps", "learning_rate", "beta")
        if type(value) in (int, float) and not (value > 0 or value == 0 and may_be_0):
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small")
    B, G = args.generation_batch_size, args.num_generations
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if G < 2 or B % (G * world_size):
        raise ValueError(f"--generation-batch-size {B} must be a multiple of --num-generations {G} (>= 2) x processes")
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
    reward_model = load_reward_model(args, device) if args.reward_model_path else None
    if rank == 0:
        print(run_dir)
        if not args.model_name_or_path and not args.resume:
            write_tiny_model(initial, addition_rows()[0], args.sft_steps, args.seed, device)
    if world_size > 1:
        dist.barrier()
    model, tokenizer = load_pretrained(initial)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    splits = load_rows(args) if args.dataset_name else addition_rows()
    train, held_out = (encode_rows(rows, tokenizer, context - args.max_completion_length) for rows in splits)
    if not held_out:  # hold out a tenth of the prompts: those with the fewest rows, so few are lost
        counts = Counter(random.Random(0).sample([e["prompt"] for e in train], len(train)))
        test_prompts = {*sorted(counts, key=counts.get)[: min(args.max_eval_samples, len(counts) // 10)]}
        train, held_out = ([e for e in train if (e["prompt"] in test_prompts) == side] for side in (False, True))
    held_out = held_out[: min(args.max_eval_samples, len(held_out)) // world_size * world_size]
    if not train or not held_out:
        raise ValueError(f"--dataset-name: {len(train)} training rows and {len(held_out)} held-out rows are too few")
    if not reward_model and [f for f, weight in REWARDS if weight] == [accuracy_reward]:  # fail early
        score_completions([e | {"text": ""} for e in train + held_out], None)
    ref_model = load_pretrained(initial)[0].to(device) if args.beta else None
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    eos = model.generation_config.eos_token_id  # an id, a list, or None
    eos_ids = eos if isinstance(eos, list) else [eos]
    stop_ids = [*{*eos_ids, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}]  # some models end texts with BOS
    peak_lr = (1e-6 if args.model_name_or_path else 1e-3) if args.learning_rate is None else args.learning_rate
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=peak_lr, weight_decay=0.0, fused=True)
    schedule = args.max_steps * args.num_iterations, args.warmup_steps, args.lr_scheduler_type
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: lr_factor(n, *schedule))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    progress = {"step": 0, "num_tokens": 0, "metrics": {}}
    if checkpoint:
        progress = {name: checkpoint[name] for name in progress}
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    if rank == 0:
        writer = SummaryWriter(run_dir, purge_step=progress["step"] + 1)
        if not args.resume:
            (run_dir / "args.json").open("x").write(json.dumps({"script": Path(__file__).name, "args": vars(args)}))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)

    def rollout(examples: list[dict], k: int, temperature: float, seed: int, skip: int = 0) -> tuple:
        """k samples {..., completion, text} per example of this rank; logprobs, mask (P*k, T). skip: prompts before."""
        P, rng = len(examples) // world_size, torch.Generator().manual_seed(seed)
        examples = examples[rank * P : (rank + 1) * P]
        prompts = {"input_ids": [e["ids"] for e in examples]}
        query = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(device)
        torch.rand((skip + rank * P) * k, args.max_completion_length, dtype=torch.float64, generator=rng)  # skipped
        with autocast:
            response, logprobs, mask = sample(
                model, query.input_ids, query.attention_mask, k, args.max_completion_length,
                temperature, stop_ids, tokenizer.pad_token_id, rng,
            )
        samples = []
        for i, (ids, kept) in enumerate(zip(response.cpu(), mask.cpu())):
            e, completion = examples[i // k], ids[kept].tolist()
            # Decoded alone, some completions would lose their first space.
            prompt, text = tokenizer.decode([e["ids"], e["ids"] + completion], skip_special_tokens=True)
            samples.append(e | {"completion": completion, "text": text[len(prompt) :]})
        return samples, logprobs, mask

    def evaluate(step: int) -> dict[str, float]:
        """Metrics on held-out prompts: at temperature 1, always with the same random numbers, and greedy."""
        reference = ref_model or load_pretrained(initial)[0].to(device)  # not kept, to save memory
        values, text = defaultdict(list), "| prompt | completion | reward |\n|---|---|---|\n"
        at_once = max(1, B // max(G, args.eval_generations) // world_size) * world_size  # prompts, as in a rollout
        for start in range(0, len(held_out), at_once):
            for k, temperature, suffix in ((args.eval_generations, 1.0, ""), (1, 0.0, "_greedy")):
                samples, logprobs, mask = rollout(held_out[start : start + at_once], k, temperature, args.seed, start)
                rewards, by_name = score_completions(samples, reward_model)  # (P*k,) each
                figures = {"reward": rewards} | {name.removesuffix("_reward"): x for name, x in by_name.items()}
                if temperature:
                    kl = logprobs.sum(1)  # (P*k,): log pi; log pi_ref is subtracted below
                    for mb, *inputs in pack(model, samples, k, args.max_tokens_per_microbatch):
                        with torch.no_grad(), autocast:
                            kl[mb] -= completion_logprobs(reference, *inputs, 1.0).sum(1)
                    figures |= {"kl": kl, "mean_length": mask.sum(1)}
                    if "accuracy" in figures:
                        figures[f"pass@{k}"] = figures["accuracy"].view(-1, k).amax(1)  # (P,)
                    for s, reward in zip(samples[::k], rewards[::k] if start == 0 else ()):
                        text += f"| {s['prompt']} | {s['text']} | {reward:.2f}".replace("\n", " ") + " |\n"
                for name, x in figures.items():
                    values[f"eval/{name}{suffix}"].append(x)
        values = gather({name: torch.cat(x) for name, x in values.items()}, device)
        results = {name: x.nanmean().item() for name, x in values.items() if not x.isnan().all()}
        if rank == 0:
            writer.add_text("samples", text, step)
            for name, x in results.items():
                writer.add_scalar(name, x, step)
        return results

    if not args.resume:
        progress["metrics"] = evaluate(0)
    epochs = range(args.max_steps * B // G // len(train) + 1)
    order = [e for epoch in epochs for e in random.Random(f"{args.seed} {epoch}").sample(train, len(train))]
    bar = trange(progress["step"], args.max_steps, initial=progress["step"], total=args.max_steps, disable=rank != 0)
    for step in bar:
        # ---- rollout
        step_start, seed = time.time(), args.seed * 1_000_000 + step  # seed depends only on step: no RNG state to save
        samples, sampler_logprobs, mask = rollout(order[step * B // G : (step + 1) * B // G], G, args.temperature, seed)
        stopped = torch.tensor([s["completion"][-1] in stop_ids for s in samples], device=device)  # (P*G,)

        # ---- reward
        rewards, by_name = score_completions(samples, reward_model)  # (P*G,) each

        # ---- advantage
        advantages = group_advantages(rewards.view(-1, G), args.scale_rewards).flatten().to(device)  # (P*G,)

        # ---- update
        loss_mask = mask & stopped[:, None] if args.mask_truncated_completions else mask  # (P*G, T)
        num_loss_tokens = gather({"all": loss_mask.sum(1)}, device)["all"].sum().clamp(min=1)
        microbatches, stats = pack(model, samples, G, args.max_tokens_per_microbatch), defaultdict(float)
        old_logprobs, ref_logprobs = torch.zeros(2, *mask.shape, device=device)  # (P*G, T)
        model.train()
        for iteration in range(args.num_iterations):
            for mb, *inputs in microbatches:
                with autocast:
                    logprobs = completion_logprobs(model, *inputs, args.temperature)  # (b, T)
                T = logprobs.shape[1]
                if iteration == 0:  # not the sampler's: in bf16 they differ by more than GSPO's epsilons
                    old_logprobs[mb, :T] = logprobs.detach()
                if iteration == 0 and ref_model:
                    with torch.no_grad(), autocast:
                        ref_logprobs[mb, :T] = completion_logprobs(ref_model, *inputs, args.temperature)
                loss, mb_stats = grpo_loss(
                    logprobs, old_logprobs[mb, :T], advantages[mb], loss_mask[mb, :T], args.epsilon,
                    args.epsilon_high, args.loss_type, ref_logprobs[mb, :T], args.beta, args.max_completion_length,
                    args.importance_sampling_level, num_loss_tokens, B,
                )
                loss.backward()
                for name, x in {"train/loss": loss.detach(), **mb_stats}.items():
                    stats[name] += x[None] / args.num_iterations  # (1,) for gather, which is summed below
            for p in (model.parameters() if world_size > 1 else ()):  # not DDP: numbers of micro-batches may differ
                if p.grad is not None:
                    dist.all_reduce(p.grad)
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, error_if_nonfinite=True)
            stats["train/grad_norm"] += norm[None] / args.num_iterations / world_size
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()  # frees memory for the next rollout

        # ---- log: over the whole update and all processes
        gap = (old_logprobs - sampler_logprobs).abs() * mask  # (P*G, T)
        figures = gather({
            "reward": rewards, "stopped": stopped, "length": mask.sum(1), "logprobs": sampler_logprobs.sum(1),
            "prompt_length": torch.tensor([len(s["ids"]) for s in samples]),
            "gap": gap.sum(1), "max_gap": gap.amax(1),
        }, device)  # (B,) each
        groups, num_tokens = figures["reward"].view(-1, G), figures["length"].sum()
        mean_gap = figures["gap"].sum() / num_tokens
        progress["num_tokens"] += int(num_tokens + figures["prompt_length"].sum())
        progress["step"] = step + 1
        logs = {name: x.sum() for name, x in gather(stats, device).items()}
        logs |= {f"train/rewards/{name}/mean": x.nanmean() for name, x in gather(by_name, device).items()}
        logs |= {
            "train/reward": groups.mean(), "train/reward_std": figures["reward"].std(),
            "train/frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean(),
            "train/entropy": -figures["logprobs"].sum() / num_tokens,  # estimated from the samples
            "train/completions/mean_length": num_tokens / B, "train/num_tokens": progress["num_tokens"],
            "train/completions/clipped_ratio": 1 - figures["stopped"].mean(),
            "train/sampling/sampling_logp_difference/mean": mean_gap,
            "train/sampling/sampling_logp_difference/max": figures["max_gap"].max(),
            "charts/learning_rate": learning_rate, "charts/SPS": num_tokens / (time.time() - step_start),
        }
        if step == 0 and mean_gap > (0.05 if args.bf16 else 1e-3):
            raise ValueError(f"{type(model).__name__} is not supported: it may scale or cap the logits of its head")
        bar.set_postfix_str(f"reward {groups.mean():.2f}, length {num_tokens / B:.1f}")
        if rank == 0:
            for name, x in logs.items():
                writer.add_scalar(name, x, step + 1)

        # ---- evaluate, save
        if (step + 1) % args.eval_steps == 0 and step + 1 < args.max_steps:
            evaluate(step + 1)
        if rank == 0 and ((step + 1) % args.save_steps == 0 or step + 1 == args.max_steps):
            writer.flush()
            model.save_pretrained(run_dir / "model.tmp")  # then renamed: a kill or full disk spares the checkpoint
            tokenizer.save_pretrained(run_dir / "model.tmp")
            torch.save(progress | {name: part.state_dict() for name, part in state.items()}, run_dir / "checkpoint.tmp")
            shutil.rmtree(run_dir / "model", ignore_errors=True)
            os.replace(run_dir / "model.tmp", run_dir / "model")
            os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")

    before, after = progress["metrics"], evaluate(args.max_steps)
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
