# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "tyro==1.0.17", "tensorboard==2.21.0", "datasets==5.2.0",
#                 "tqdm==4.70.1"]
# ///
"""PPO: train a language model by reinforcement learning from human feedback (RLHF), with a learned value function.

The policy samples a response to each prompt, and Python functions or a reward model score the whole response. A
per-token KL penalty keeps the policy near the initial model. A value network predicts the rewards still to come, and
the clipped update raises or lowers each token's probability according to its advantage over that prediction.

    r_t = -beta log(pi_old(y_t | x, y_<t) / pi_ref(y_t | x, y_<t)),  plus score(x, y) at the last token
    A_t = sum_l (gamma lambda)^l delta_(t+l),   delta_t = r_t + gamma V(x, y_<=t) - V(x, y_<t),   R_t = A_t + V(x, y_<t)
    L(theta) = -E[min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)]                          (A_t whitened)
               + c E[max((V - R_t)^2, (clip(V, V_old - eps_v, V_old + eps_v) - R_t)^2)] / 2,   rho_t = pi / pi_old

PPO: Schulman et al. 2017, arXiv:1707.06347, eq. 7 and 9. GAE: Schulman et al. 2016, arXiv:1506.02438, eq. 16. RLHF:
Ziegler et al. 2019, arXiv:1909.08593; Stiennon et al. 2020, arXiv:2009.01325; Ouyang et al. 2022, arXiv:2203.02155.
Details: Huang et al. 2024, arXiv:2403.17031 ("N+ implementation details").

    python ppo_llm.py                              # laptop, offline: a tiny model learns to show its work
    python reward_model.py --output-dir rm         # with a learned reward: first a reward model ...
    python ppo_llm.py --reward-model-path rm/<run folder>/model --normalize-reward-model --kl-coef 0.2   # ... then RL
    python ppo_llm.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct --dataset-name trl-lib/ultrafeedback-prompt \\
        --reward-model-path <run folder of reward_model.py>/model --max-eval-samples 128                   # one GPU
    torchrun --nproc-per-node=8 ppo_llm.py ...     # several GPUs: the same global batch, split by prompts
    python ppo_llm.py --resume runs/<run folder>   # continue exactly from the last checkpoint

Shapes: P prompts per process, G completions per prompt (k in evaluation), B completions (in main: of all processes),
L_q prompt tokens, T completion tokens, R rows of L tokens, K completions per row, N tokens in a micro-batch, H hidden
size, V vocabulary. logprobs[:, t] belongs to completion token t, values[:, t] to the state before it. `mask` is True up
to the first stop token, inclusive.

Deliberately not here: inference servers, LoRA, tools, an adaptive KL coefficient, a mixed-in pretraining loss, sharded
weights. See TRL 1.12 (the last release with PPO) or verl.
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
    """PPO: train a language model by reinforcement learning from human feedback, with a learned value function."""

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

    # ---- PPO
    max_steps: int = 60  # rollouts, each followed by --num-ppo-epochs passes over it
    eval_steps: int = 20  # steps between evaluations
    save_steps: int = 20  # steps between checkpoints
    learning_rate: float | None = None  # peak, of both networks. None: 1e-3 for the tiny model, else 3e-6
    generation_batch_size: int = 256  # completions per rollout across all processes
    num_generations: int = 1  # G, completions per prompt. One is enough for PPO; if more, the prompt is read only once
    max_completion_length: int = 256  # longest completion, in tokens
    temperature: float = 1.0  # divides the logits in sampling and loss, not in evaluation; above 0
    eval_generations: int = 8  # completions per held-out prompt, the k of pass@k
    reward_model_path: str | None = None  # one-logit classifier; replaces the reward functions, then only logged
    normalize_reward_model: bool = False  # standardize scores by reward_mean, reward_std of the model's config
    num_ppo_epochs: int = 4  # passes over each rollout (Ziegler et al. 2019)
    num_mini_batches: int = 1  # optimizer steps per pass. A prompt's completions stay together
    target_kl: float | None = None  # stop a rollout's passes after one with a mean KL per token above this
    kl_coef: float = 0.05  # beta: reward penalty per nat of log pi / pi_ref (default of Huang et al. 2024)
    gamma: float = 1.0  # discount per token (Ziegler et al. 2019)
    lam: float = 0.95  # lambda of GAE (Ziegler et al. 2019)
    epsilon: float = 0.2  # the ratio is clipped to 1 +- epsilon
    cliprange_value: float = 0.2  # the value loss keeps new values this close to the rollout's
    vf_coef: float = 0.1  # weight of the value loss. Matters with --share-value-backbone; else Adam cancels it
    ent_coef: float = 0.0  # weight of the entropy bonus
    whiten_rewards: bool = False  # scale token rewards to unit variance; their mean stays
    missing_eos_penalty: float = 0.0  # subtracted from the score of a training completion without a stop token
    share_value_backbone: bool = False  # value head on the policy: saves memory, but its loss also trains the policy


def token_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, T): -kl_coef * log_ratio, where log_ratio (B, T) is log pi / pi_ref of the sampled tokens (its mean
    is the KL), plus the score (B,) at the last real token (Ouyang et al. 2022, eq. 2). 0 where mask is False."""
    rewards = torch.where(mask, -kl_coef * log_ratio, 0.0)  # (B, T)
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16): advantages and returns, each (B, T), of rewards
    and values (B, T). The returns are advantages + values; both are 0 where mask is False. A response is an episode:
    nothing follows its last token, even if it was cut off."""
    advantages = torch.zeros_like(rewards)  # (B, T)
    advantage = next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, values: Tensor, old_values: Tensor, returns: Tensor,
    mask: Tensor, epsilon: float, cliprange_value: float, vf_coef: float, ent_coef: float = 0.0,
    num_tokens: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimize (PPO's clipped surrogate plus vf_coef times the clipped value loss) and statistics. Tensors
    are (B, T); results are means over tokens.

    num_tokens (None: those in mask) counts the whole minibatch, so that losses of micro-batches and processes add up.
    On-policy, the policy loss is minus the mean advantage (0 if whitened), but its gradient is not 0.
    The entropy term has the right gradient, estimated from the sampled tokens, but its value is not the entropy."""
    num_tokens = mask.sum().clamp(min=1) if num_tokens is None else num_tokens
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # (B, T)
    ratio = log_ratio.exp()
    unclipped = -ratio * advantages  # (B, T)
    clipped = -ratio.clamp(1 - epsilon, 1 + epsilon) * advantages  # (B, T)
    values_clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)  # (B, T)
    errors, errors_clipped = (values - returns).square(), (values_clipped - returns).square()  # (B, T)

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum() / num_tokens

    policy_loss = mean(torch.max(unclipped, clipped))  # eq. 7, negated
    value_loss = mean(torch.max(errors, errors_clipped)) / 2
    loss = policy_loss + vf_coef * value_loss  # eq. 9
    if ent_coef != 0.0:
        loss = loss + ent_coef * mean(ratio.detach() * logprobs.square() / 2)  # gradient: that of -H
    stats = {
        "loss/policy_avg": policy_loss,
        "loss/value_avg": value_loss,
        "policy/approxkl_avg": mean(ratio - 1 - log_ratio),  # k3 estimate of KL(pi_old || pi)
        "policy/clipfrac_avg": mean((clipped > unclipped).float()),
        "val/clipfrac_avg": mean((errors_clipped > errors).float()),
        "val/ratio": mean(ratio),
    }
    return loss, {name: value.detach() for name, value in stats.items()}


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
        for row in ids if plain else ():  # as reward_model.py reads texts
            row += [tokenizer.eos_token_id] * (tokenizer.eos_token_id not in (None, row[-1]) and len(row) < max_length)
        scores, lengths = torch.zeros(len(ids)), torch.tensor([*map(len, ids)])
        for mb in lengths.argsort().split(max(1, args.max_tokens_per_microbatch // int(lengths.max()))):
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in mb]}, padding_side="right", return_tensors="pt")
            scores[mb] = model(**inputs.to(device)).logits[:, 0].cpu()
        return (scores - config.reward_mean) / config.reward_std if args.normalize_reward_model else scores

    return score


def load_value_model(
    args: Args, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, initial: str
) -> tuple[PreTrainedModel, nn.Linear]:
    """A value network and its head: the policy itself if shared; else a copy of the reward model (Stiennon et al. 2020,
    section 3.4) if its architecture and token ids match; else of the initial policy. A new head outputs 0."""
    head = nn.Linear(model.get_output_embeddings().weight.shape[1], 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if args.share_value_backbone:
        return model, head
    if args.reward_model_path is not None:
        name, flag = args.reward_model_path, "--reward-model-path"
        reward_model, own_tokenizer = load_pretrained(name, flag, AutoModelForSequenceClassification)
        keys = ("model_type", "hidden_size", "max_position_embeddings", "sliding_window")
        same = [getattr(reward_model.config, key, None) == getattr(model.config, key, None) for key in keys]
        if all(same) and tokenizer.get_vocab().items() <= own_tokenizer.get_vocab().items():
            config = reward_model.config
            mean, std = (config.reward_mean, config.reward_std) if args.normalize_reward_model else (0.0, 1.0)
            head.weight.data = reward_model.score.weight.data / std  # values on the scale of the scores
            head.bias.data.fill_(-mean / std)
            return reward_model, head
    return load_pretrained(initial)[0], head


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


def completion_values(
    value_model: PreTrainedModel, value_head: nn.Linear, prompts: list[list[int]], completions: list[list[int]]
) -> Tensor:
    """Values (B, T) of the states before each token of B completions; 0 past their ends. The head stays in fp32 under
    autocast: bf16 values between 4 and 8 are 1/32 apart."""
    hidden, lengths = completion_states(value_model, prompts, completions), [len(c) for c in completions]
    with torch.autocast(hidden.device.type, enabled=False):
        values = value_head(hidden.float())[:, 0]  # (N,)
    return pad_sequence(values.split(lengths), batch_first=True)


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


def total(x: Tensor) -> Tensor:
    """Sum of a tensor's elements over all processes."""
    return gather({"x": x.sum()[None]}, x.device)["x"].sum()


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale values (B, T) to a standard deviation of 1 (ddof 1, as in TRL) where mask is True, over all processes,
    and shift them to mean 0, or keep their mean if not shift_mean. 0 where mask is False."""
    real, count = values[mask], total(mask)  # (N,)
    mean = total(real) / count
    variance = total((real - mean).square()) / (count - 1).clamp(min=1)
    whitened = (values - mean) * (variance + 1e-8).rsqrt() + (0.0 if shift_mean else mean)  # (B, T)
    return torch.where(mask, whitened, 0.0)


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
        may_be_0 = "coef" in name or name in ("seed", "warmup_steps", "learning_rate", "lam", "missing_eos_penalty")
        if type(value) in (int, float) and not (value > 0 or value == 0 and may_be_0):
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small")
    B, G, M = args.generation_batch_size, args.num_generations, args.num_mini_batches
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if B % (G * M * world_size):
        raise ValueError(f"--generation-batch-size {B} must be a multiple of --num-generations {G} x "
                         f"--num-mini-batches {M} x {world_size} processes")
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
    ref_model = load_pretrained(initial)[0].to(device)
    value_model, value_head = load_value_model(args, model, tokenizer, initial)
    critic = value_head if args.share_value_backbone else nn.ModuleList([value_model, value_head])
    if args.gradient_checkpointing:
        for network in {model, value_model}:
            network.activation_checkpointing_enable({"use_reentrant": False})
    eos = model.generation_config.eos_token_id  # an id, a list, or None
    eos_ids = eos if isinstance(eos, list) else [eos]
    stop_ids = [*{*eos_ids, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}]  # some models end texts with BOS
    peak_lr = (3e-6 if args.model_name_or_path else 1e-3) if args.learning_rate is None else args.learning_rate
    parameters = [*model.to(device).parameters(), *critic.to(device).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, eps=1e-5, weight_decay=0.0, fused=True)
    schedule = args.max_steps * args.num_ppo_epochs * M, args.warmup_steps, args.lr_scheduler_type
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: lr_factor(n, *schedule))
    state = {"model": model, "critic": critic, "optimizer": optimizer, "scheduler": scheduler}
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
        values, text = defaultdict(list), "| prompt | completion | reward |\n|---|---|---|\n"
        at_once = max(1, B // max(G, args.eval_generations) // world_size) * world_size  # prompts, as in a rollout
        for start in range(0, len(held_out), at_once):
            for k, temperature, suffix in ((args.eval_generations, 1.0, ""), (1, 0.0, "_greedy")):
                samples, logprobs, mask = rollout(held_out[start : start + at_once], k, temperature, args.seed, start)
                rewards, by_name = score_completions(samples, reward_model)  # (P*k,) each
                rewards = by_name.get("reward_model", rewards)  # with a reward model, functions are only logged
                figures = {"reward": rewards} | {name.removesuffix("_reward"): x for name, x in by_name.items()}
                if temperature:
                    kl = logprobs.sum(1)  # (P*k,): log pi; log pi_ref is subtracted below
                    for mb, *inputs in pack(model, samples, k, args.max_tokens_per_microbatch):
                        with torch.no_grad(), autocast:
                            kl[mb] -= completion_logprobs(ref_model, *inputs, 1.0).sum(1)
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
        samples, old_logprobs, mask = rollout(order[step * B // G : (step + 1) * B // G], G, args.temperature, seed)
        stopped = torch.tensor([s["completion"][-1] in stop_ids for s in samples], device=device)  # (P*G,)
        num_tokens = total(mask)

        # ---- reward
        scores, by_name = score_completions(samples, reward_model)  # (P*G,) each
        scores = by_name.get("reward_model", scores).to(device)  # with a reward model, functions are only logged
        scores = scores - args.missing_eos_penalty * ~stopped  # (P*G,)
        ref_logprobs, old_values = torch.zeros(2, *mask.shape, device=device)  # (P*G, T)
        for mb, *inputs in pack(model, samples, G, args.max_tokens_per_microbatch):
            with torch.no_grad(), autocast:
                logprobs = completion_logprobs(ref_model, *inputs, args.temperature)  # (b, T)
                ref_logprobs[mb, : logprobs.shape[1]] = logprobs
                old_values[mb, : logprobs.shape[1]] = completion_values(value_model, value_head, *inputs)
        log_ratio = old_logprobs - ref_logprobs  # (P*G, T): log pi / pi_ref
        rewards = token_rewards(scores, log_ratio, mask, args.kl_coef)  # (P*G, T)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)

        # ---- advantage
        advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)  # (P*G, T)
        columns = {
            "old_logprobs": old_logprobs, "advantages": whiten(advantages, mask), "old_values": old_values,
            "returns": returns, "mask": mask,
        }  # (P*G, T) each

        # ---- update
        limits = {
            "epsilon": args.epsilon, "cliprange_value": args.cliprange_value, "vf_coef": args.vf_coef,
            "ent_coef": args.ent_coef,
        }
        stats, num_passes, pass_kl = defaultdict(float), 0, 0.0
        difference = torch.full_like(old_logprobs, math.nan)  # (P*G, T)
        shuffler = torch.Generator().manual_seed(seed)
        model.train()
        value_model.train()
        for epoch in range(args.num_ppo_epochs):
            if args.target_kl is not None and pass_kl > args.target_kl:
                break
            kl_before = float(stats["policy/approxkl_avg"])
            # Each minibatch takes one random prompt from every M consecutive ones: equal sizes in every process.
            within = torch.rand(B // G // M, M, generator=shuffler).argsort(1)  # (B/G/M, M)
            shuffled = M * torch.arange(B // G // M)[:, None] + within  # (B/G/M, M): prompts
            own = shuffled.chunk(world_size)[rank] - rank * (B // G // world_size)  # (P/M, M): this process's, from 0
            for minibatch, prompts in enumerate(own.T):
                chosen = (G * prompts[:, None] + torch.arange(G)).flatten()  # (P/M*G,)
                minibatch_tokens = total(mask[chosen])
                for mb, *inputs in pack(model, [samples[i] for i in chosen], G, args.max_tokens_per_microbatch):
                    with autocast:
                        logprobs = completion_logprobs(model, *inputs, args.temperature)  # (b, T)
                    rows, T = chosen[mb], logprobs.shape[1]
                    fixed = {name: x[rows, :T] for name, x in columns.items()} | limits
                    fixed["num_tokens"] = minibatch_tokens
                    if epoch == minibatch == 0:
                        gap = (logprobs.detach() - fixed["old_logprobs"]).abs()  # (b, T)
                        difference[rows, :T] = torch.where(fixed["mask"], gap, math.nan)
                    # Unlike GRPO's, old_logprobs are the sampler's. Recomputed here they would be wrong for M > 1: the
                    # policy has moved since the rollout. The sampler's rounding is small beside epsilon, even in bf16.
                    # Two backward passes, so that only one network's graph is in memory.
                    policy_loss, _ = ppo_loss(logprobs, values=fixed["old_values"], **fixed)  # value term constant
                    policy_loss.backward()
                    with autocast:
                        values = completion_values(value_model, value_head, *inputs)  # (b, T)
                    loss, mb_stats = ppo_loss(logprobs.detach(), values=values, **fixed)  # policy term constant
                    loss.backward()
                    for name, x in mb_stats.items():
                        stats[name] += x[None] * minibatch_tokens / num_tokens
                for p in (parameters if world_size > 1 else ()):  # not DDP: numbers of micro-batches may differ
                    if p.grad is not None:
                        dist.all_reduce(p.grad)
                for name, network in (("train/grad_norm", model), ("val/grad_norm", critic)):
                    norm = nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm, error_if_nonfinite=True)
                    stats[name] += norm[None] / M / world_size
                learning_rate = scheduler.get_last_lr()[0]
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()  # frees memory for the next rollout
            num_passes += 1
            pass_kl = total(stats["policy/approxkl_avg"] - kl_before)
        for _ in range((args.num_ppo_epochs - num_passes) * M):
            scheduler.step()  # skipped passes still advance the schedule

        # ---- log: over the whole update and all processes
        figures = gather({
            "score": scores, "stopped": stopped, "length": mask.sum(1), "kl": log_ratio.sum(1),
            "logprobs": old_logprobs.sum(1), "prompt_length": torch.tensor([len(s["ids"]) for s in samples]),
            "difference_max": difference.nan_to_num(0.0).amax(1),
        }, device)  # (B,) each
        score, kl = figures["score"].mean(), figures["kl"].mean()
        # Sums of squares about the mean. advantages = returns - old_values is what the values leave unexplained.
        unexplained, variance = (total((x - total(x) / num_tokens).square() * mask) for x in (advantages, returns))
        progress["num_tokens"] += int(num_tokens + figures["prompt_length"].sum())
        progress["step"] = step + 1
        logs = {name: x.sum() / num_passes for name, x in gather(stats, device).items()}
        logs |= {f"train/rewards/{name}/mean": x.nanmean() for name, x in gather(by_name, device).items()}
        logs |= {
            "objective/scores": score, "train/reward_std": figures["score"].std(correction=0),
            "objective/kl": kl, "objective/non_score_reward": -args.kl_coef * kl,
            "objective/rlhf_reward": score - args.kl_coef * kl,
            "objective/entropy": -figures["logprobs"].mean(),  # estimated from the samples
            "losses/explained_variance": 1 - unexplained / variance,
            "policy/epochs": num_passes,
            "train/completions/mean_length": num_tokens / B, "train/num_tokens": progress["num_tokens"],
            "train/completions/clipped_ratio": 1 - figures["stopped"].mean(),
            "train/sampling/sampling_logp_difference/mean": total(difference.nansum()) / total(~difference.isnan()),
            "train/sampling/sampling_logp_difference/max": figures["difference_max"].max(),
            "charts/learning_rate": learning_rate, "charts/SPS": num_tokens / (time.time() - step_start),
        }
        if step == 0 and logs["train/sampling/sampling_logp_difference/mean"] > (0.05 if args.bf16 else 1e-3):
            raise ValueError(f"{type(model).__name__} is not supported: it may scale or cap the logits of its head")
        bar.set_postfix_str(f"score {score:.2f}, KL {kl:.2f}, length {num_tokens / B:.1f}")
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
