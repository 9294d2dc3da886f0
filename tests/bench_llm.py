"""How long a training step takes here and in the usual library: ours and TRL's trainer, interleaved in one run.

    python tests/bench_llm.py --method grpo --size M                   # both from this interpreter
    python tests/bench_llm.py --method grpo --size M --bf16 --peer-python ~/venvs/trl/bin/python
    python tests/bench_llm.py --method dpo --size qwen2.5-0.5b --bf16 --device cuda
    python tests/bench_llm.py --method ppo --size M --peer-python ~/venvs/trl-1.12/bin/python   # the last with PPO

Both run the real thing (`main(Args(...))` of our script; TRL's trainer with the same settings, without gradient
checkpointing) on one random-weight Qwen2 model and one file of data. The learning rate is too small to change a weight,
so that all steps are alike.

grpo: 8 prompts of 64 tokens x 8 completions of at most 64 a step, temperature 1. Each token is the last with a chance
of about 1/32, by the way the model is made; the measured mean lengths (27.8 tokens are expected) show that both did the
same work. With few steps they differ by chance, and the ratio with them.
dpo: 8 pairs a step, prompts of 128 tokens, answers of 64; the reference's log-probabilities are computed before, in
both. reward: the same (TRL reads one token more, as it ends an answer with EOS).
ppo: as grpo, with 64 prompts x 1 completion, or 8 x 8 with --num-generations 8 (ours; to TRL's trainer 64 prompts are
distinct anyway), 4 epochs of 4 minibatches and a value network that starts from the policy; TRL samples 64 tokens for
every prompt, and cuts them at EOS then. --share-value-backbone: ours reads the values off the policy, which is another
algorithm than TRL's.

Each side is a process of its own, which does one step when it is told to and then reports. The two take turns, so that
a slow minute of the machine hits both. On the CPU both have the same single core and one thread, and seconds are the
process's CPU seconds, of all its threads; on CUDA they are the time between CUDA events. A step lasts until the next
one's entry: rollout (generation, decoding to text), reward, update (forward, backward, clipping), optimizer, other
(logging, the next batch). The first steps warm up and are not counted; medians are reported. The last line of the
output is one JSON object. Linux only. On the CPU, TRL takes about 7 GB at the sizes M and L.
"""

import argparse
import json
import os
import random
import signal
import string
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from statistics import mean, median
from typing import NoReturn

SIZES = {  # layers, hidden, MLP, heads, key-value heads, vocabulary; the last two are the published models' shapes
    "S": (4, 128, 512, 4, 4, 64),
    "M": (6, 256, 1024, 4, 4, 32000),
    "L": (6, 256, 1024, 4, 4, 151936),
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 151936),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 151936),
}
PROMPTS, GENERATIONS = 8, 8  # of grpo and ppo
PPO_EPOCHS, PPO_MINIBATCHES = 4, 4
PAIRS = 8  # of dpo and reward
EOS_CHANCE = 1 / 32
LEARNING_RATE = 1e-10  # no weight moves visibly. 0 means "the default" to some flags; with 1e-30 the value head, zero at
# first, would send back gradients below 1e-38, which a CPU multiplies ten times as slowly
PHASES = ("rollout", "reward", "update", "optimizer", "other")


# ---- the model and the data that both sides load ---------------------------------------------------------------------


def build(spec: dict) -> None:
    """Write the model's folder and the prompts' file into the working folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    layers, hidden, mlp, heads, kv_heads, vocabulary = SIZES[spec["size"]]
    letters = string.ascii_letters + string.digits  # prompts are made of them, one token each, as there are no merges
    words = ["<pad>", "<eos>", *letters, *(f"<{i}>" for i in range(vocabulary - len(letters) - 2))]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Qwen2Tokenizer(vocab=ids, merges=[], unk_token="<pad>", pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained("model")
    rng = random.Random(0)
    with open("prompts.jsonl", "w") as file:
        for _ in range(PROMPTS * GENERATIONS * (spec["steps"] + spec["warmup"] + 2)):
            prompt = "".join(rng.choices(letters, k=spec["prompt_length"]))
            file.write(json.dumps({"prompt": prompt, "answer": "0"}) + "\n")
    with open("pairs.jsonl", "w") as file:
        for _ in range(PAIRS * (spec["steps"] + spec["warmup"] + 2)):
            lengths = {
                "prompt": spec["prompt_length"],
                "chosen": spec["completion_length"] - 1,
                "rejected": spec["completion_length"] - 1,
            }  # + EOS
            file.write(json.dumps({key: "".join(rng.choices(letters, k=k)) for key, k in lengths.items()}) + "\n")

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
        max_position_embeddings=32768, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip
    with torch.no_grad():
        # A vector added to all embeddings shifts all logits alike, so it changes no probability, but it gives all final
        # hidden states a common direction; the EOS embedding moved along it makes EOS about equally likely everywhere.
        # (Moving it changes nothing else: EOS is never read, as nothing follows it.)
        embeddings = model.get_input_embeddings().weight  # (V, H), also the head's
        embeddings += 5 * embeddings.std() * torch.randn(hidden)
        states = model.model(torch.randint(2, vocabulary, (16, 64))).last_hidden_state[:, -16:].flatten(0, 1)  # (N, H)
        direction = states.mean(0) / states.mean(0).norm()  # (H,)
        logits = model.lm_head(states)  # (N, V)
        eos = logits[:, 1].clone()
        logits[:, 1] = -torch.inf
        others, low, high = logits.logsumexp(1), -100.0, 100.0
        for _ in range(60):
            shift = (low + high) / 2
            chance = torch.sigmoid(eos + shift * (states @ direction) - others).mean()
            low, high = (low, shift) if chance > EOS_CHANCE else (shift, high)
        embeddings[1] += shift * direction
    model.save_pretrained("model")


def reward(completion: str) -> float:
    """Cheap, and different for all completions of a group: no group is without a gradient."""
    return zlib.crc32(completion.encode()) % 1000 / 1000


# ---- a worker: one side in its own process ---------------------------------------------------------------------------


class Stopwatch:
    """Waits for the parent's word before each step and then reports the seconds of its phases."""

    def __init__(self, spec: dict, reports):
        import torch
        from torch.optim import optimizer

        self.torch, self.cuda, self.reports = torch, spec["device"] == "cuda", reports
        self.steps_left, self.marks, self.lengths, self.equal = spec["steps"] + spec["warmup"], [], [], 0.0
        optimizer.register_optimizer_step_pre_hook(lambda *_: self.mark("update"))
        optimizer.register_optimizer_step_post_hook(lambda *_: self.mark("optimizer"))

    def mark(self, phase: str) -> None:
        """What was done since the last mark belongs to this phase. Outside a step (evaluation) nothing is noted."""
        if self.marks or phase == "start":
            self.marks.append((phase, self.torch.cuda.Event(enable_timing=True) if self.cuda else time.process_time()))
            if self.cuda:
                self.marks[-1][1].record()

    def next_step(self) -> None:
        """A step's entry, which is also the end of the step before."""
        if self.marks:
            self.mark("other")
            if self.cuda:
                self.torch.cuda.synchronize()
            phases = dict.fromkeys(PHASES, 0.0)
            for (_, start), (phase, end) in zip(self.marks, self.marks[1:]):
                phases[phase] += start.elapsed_time(end) / 1000 if self.cuda else end - start
            self.report(phases=phases, lengths=self.lengths, equal=self.equal)
            self.steps_left -= 1
        else:
            self.loaded_mb = self.memory_mb("VmRSS")
            self.report(ready=True)
        if self.steps_left == 0:
            peak = self.memory_mb("VmHWM")
            self.report(peak_mb=peak, peak_extra_mb=peak - self.loaded_mb)
            os._exit(0)  # no final evaluation, no checkpoint
        if sys.stdin.readline() != "go\n":
            sys.exit("the parent is gone")
        self.marks = []
        self.mark("start")

    def memory_mb(self, field: str) -> float:
        """Memory now (VmRSS) or at its peak (VmHWM; ru_maxrss would do, were it not inherited from the parent): on the
        CPU the whole process's, libraries included, on CUDA that of the tensors."""
        if self.cuda:
            cuda = self.torch.cuda
            return (cuda.memory_allocated() if field == "VmRSS" else cuda.max_memory_allocated()) / 2**20
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(field + ":"))) / 1024

    def report(self, **values) -> None:
        print(json.dumps(values), file=self.reports, flush=True)


def microbatch_flag(spec: dict) -> dict:
    """The keywords of Args, where --micro-batch-size or, for ppo, --max-tokens-per-microbatch was given."""
    names = ("max_tokens_per_microbatch", "micro_batch_size")
    return {name: spec[name] for name in names if spec[name]}


def grpo_ours(spec: dict, watch: Stopwatch) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import grpo_llm

    generate, score = grpo_llm.generate, grpo_llm.score

    def watched_generate(model, prompts, uniform, **kwargs):
        training = uniform.shape[1] == GENERATIONS  # evaluation: one completion a prompt
        if training:
            watch.next_step()
        completions = generate(model, prompts, uniform, **kwargs)
        if training:
            watch.lengths = [len(completion) for completion in completions]
        return completions

    def watched_score(*args, **kwargs):
        watch.mark("rollout")
        result = score(*args, **kwargs)
        watch.mark("reward")
        if len(result[0]) == PROMPTS * GENERATIONS:
            rewards = result[0].view(PROMPTS, GENERATIONS)
            watch.equal = (rewards.amax(1) == rewards.amin(1)).float().mean().item()
        return result

    def crc_reward(completions: list[str], **columns) -> list[float]:
        return [reward(completion) for completion in completions]

    grpo_llm.generate, grpo_llm.score = watched_generate, watched_score
    grpo_llm.REWARDS = {"crc": (crc_reward, 1.0)}
    steps = watch.steps_left + 1  # the stopwatch ends the process at the entry of the last one
    grpo_llm.main(grpo_llm.Args(
        model_name_or_path="model", dataset_name="prompts.jsonl", device=spec["device"], bf16=spec["bf16"],
        max_steps=steps, eval_steps=steps, save_steps=steps, max_eval_samples=PROMPTS, learning_rate=LEARNING_RATE,
        generation_batch_size=PROMPTS * GENERATIONS, num_generations=GENERATIONS, eval_generations=1,
        max_completion_length=spec["completion_length"], seed=spec["seed"],
    ))  # fmt: skip


def ppo_ours(spec: dict, watch: Stopwatch) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import ppo_llm as script

    generations = spec["num_generations"]
    prompts = PROMPTS * GENERATIONS // generations
    sample, score_completions = script.sample, script.score_completions

    def watched_sample(model, query, attention_mask, num_generations, *args, **kwargs):
        training = num_generations == generations and len(query) == prompts  # evaluation, start-up checks: fewer
        if training:
            watch.next_step()
        result = sample(model, query, attention_mask, num_generations, *args, **kwargs)
        if training:
            watch.lengths = result[2].sum(1).tolist()
        return result

    def watched_score_completions(*args, **kwargs):
        watch.mark("rollout")
        result = score_completions(*args, **kwargs)
        watch.mark("reward")
        if len(result[0]) == prompts * generations:
            rewards = result[0].view(prompts, generations)
            watch.equal = (rewards.amax(1) == rewards.amin(1)).float().mean().item()
        return result

    def crc_reward(prompt: str, completion: str, answer: str | None) -> float:
        return reward(completion)

    script.sample, script.score_completions = watched_sample, watched_score_completions
    script.REWARDS = ((crc_reward, 1.0),)
    steps = watch.steps_left + 1  # the stopwatch ends the process at the entry of the last one
    flags = {"eval_generations": 1}  # fewer than in training, so that the stopwatch tells them apart
    flags |= microbatch_flag(spec)
    flags |= {
        "num_ppo_epochs": PPO_EPOCHS, "num_mini_batches": PPO_MINIBATCHES,
        "share_value_backbone": spec["share_value_backbone"],
    }  # fmt: skip
    script.main(script.Args(
        model_name_or_path="model", dataset_name="prompts.jsonl", device=spec["device"], bf16=spec["bf16"],
        max_steps=steps, eval_steps=steps, save_steps=steps, max_eval_samples=PROMPTS, learning_rate=LEARNING_RATE,
        generation_batch_size=PROMPTS * GENERATIONS, num_generations=generations, max_completion_length=spec["completion_length"],
        seed=spec["seed"], **flags,
    ))  # fmt: skip


def grpo_peer(spec: dict, watch: Stopwatch) -> None:
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            watch.next_step()

    def crc_reward(completions: list[str], **kwargs) -> list[float]:
        return [reward(completion) for completion in completions]

    trainer = GRPOTrainer(
        model="model",
        reward_funcs=crc_reward,
        train_dataset=Dataset.from_list([json.loads(line) for line in open("prompts.jsonl")]),
        callbacks=[Turns()],
        args=GRPOConfig(
            output_dir="peer", save_strategy="no", report_to="none", logging_steps=1, max_steps=watch.steps_left + 1,
            model_init_kwargs={"dtype": "float32"}, bf16=spec["bf16"], use_cpu=spec["device"] == "cpu",
            per_device_train_batch_size=PROMPTS * GENERATIONS, gradient_accumulation_steps=1,
            gradient_checkpointing=False, optim="adamw_torch_fused", learning_rate=LEARNING_RATE, max_grad_norm=1.0,
            num_generations=GENERATIONS, max_completion_length=spec["completion_length"], temperature=1.0, top_k=0, top_p=1.0,
            beta=0.0, loss_type="dapo", epsilon=0.2, epsilon_high=0.28, seed=spec["seed"],
        ),
    )  # fmt: skip
    calculate_rewards = trainer._calculate_rewards

    def watched_calculate_rewards(inputs, prompts, completions, completion_ids):
        watch.mark("rollout")
        watch.lengths = [len(ids) for ids in completion_ids]
        result = calculate_rewards(inputs, prompts, completions, completion_ids)
        watch.mark("reward")
        return result

    trainer._calculate_rewards = watched_calculate_rewards
    trainer.train()


def ppo_peer(spec: dict, watch: Stopwatch) -> None:
    import torch
    import transformers
    from datasets import Dataset
    from trl.experimental.ppo import ppo_trainer

    class Backbone(torch.nn.Module):
        """Its one hidden number is the cheap reward, at every token: what TRL's reward model is here."""

        def forward(self, input_ids, **kwargs):
            scores = [reward(str(row)) for row in input_ids.tolist()]
            hidden = torch.tensor(scores, device=input_ids.device)[:, None, None].expand(*input_ids.shape, 1)
            return transformers.modeling_outputs.BaseModelOutput(hidden_states=(hidden,))

    class CheapReward(torch.nn.Module):
        base_model_prefix = "model"

        def __init__(self):
            super().__init__()
            self.model, self.score = Backbone(), torch.nn.Identity()

    generate, first_true_indices = ppo_trainer.batch_generation, ppo_trainer.first_true_indices

    def watched_generation(*args):
        watch.next_step()
        result = generate(*args)
        watch.mark("rollout")
        return result

    def watched_indices(bools):
        index = first_true_indices(bools)
        if bools.shape[1] == spec["completion_length"]:  # of the padding in the responses
            watch.lengths = index.tolist()
        return index

    ppo_trainer.batch_generation, ppo_trainer.first_true_indices = watched_generation, watched_indices
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32) for _ in range(2)
    )
    value = transformers.AutoModelForSequenceClassification.from_pretrained("model", dtype=torch.float32, num_labels=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained("model", padding_side="left")
    rows = [tokenizer(json.loads(line)["prompt"]).input_ids for line in open("prompts.jsonl")]
    data = Dataset.from_dict({"input_ids": rows})
    batch = PROMPTS * GENERATIONS
    ppo_trainer.PPOTrainer(
        args=ppo_trainer.PPOConfig(
            output_dir="peer", save_strategy="no", report_to="none", num_sample_generations=0,
            total_episodes=batch * (watch.steps_left + 1), bf16=spec["bf16"], use_cpu=spec["device"] == "cpu",
            per_device_train_batch_size=batch, gradient_accumulation_steps=1, local_rollout_forward_batch_size=batch,
            num_ppo_epochs=PPO_EPOCHS, num_mini_batches=PPO_MINIBATCHES, gradient_checkpointing=False,
            optim="adamw_torch_fused", learning_rate=LEARNING_RATE, max_grad_norm=1.0, temperature=1.0,
            response_length=spec["completion_length"], stop_token="eos", seed=spec["seed"],
        ),
        processing_class=tokenizer, model=policy, ref_model=reference, reward_model=CheapReward(), value_model=value,
        train_dataset=data, eval_dataset=data.select(range(batch)),
    ).train()  # fmt: skip


def pairs_ours(spec: dict, watch: Stopwatch) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import dpo
    import reward_model

    script = dpo if spec["method"] == "dpo" else reward_model
    lr_factor = script.lr_factor

    def watched_lr_factor(*args, **keywords):  # asked for once a step, before its update
        watch.next_step()
        watch.lengths = [spec["completion_length"]] * 2 * PAIRS
        return lr_factor(*args, **keywords)

    script.lr_factor = watched_lr_factor
    steps = watch.steps_left + 2
    script.main(script.Args(
        model_name_or_path="model", dataset_name="pairs.jsonl", device=spec["device"], bf16=spec["bf16"],
        max_steps=steps, eval_steps=steps, save_steps=steps, max_eval_samples=PAIRS, learning_rate=LEARNING_RATE,
        train_batch_size=PAIRS, seed=spec["seed"], **microbatch_flag(spec),
    ))  # fmt: skip


def pairs_peer(spec: dict, watch: Stopwatch) -> None:
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            watch.next_step()
            watch.lengths = [spec["completion_length"]] * 2 * PAIRS

    settings = {
        "output_dir": "peer", "save_strategy": "no", "report_to": "none", "logging_steps": 1,
        "max_steps": watch.steps_left + 1, "model_init_kwargs": {"dtype": "float32"}, "bf16": spec["bf16"],
        "use_cpu": spec["device"] == "cpu", "per_device_train_batch_size": PAIRS, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False, "optim": "adamw_torch_fused", "learning_rate": LEARNING_RATE,
        "max_grad_norm": 1.0, "seed": spec["seed"],
    }  # fmt: skip
    data = {"train_dataset": Dataset.from_json("pairs.jsonl"), "callbacks": [Turns()]}
    if spec["method"] == "dpo":
        DPOTrainer("model", args=DPOConfig(**settings, precompute_ref_log_probs=True, beta=0.1), **data).train()
    else:
        RewardTrainer("model", args=RewardConfig(**settings), **data).train()


METHODS = {
    "grpo": (grpo_ours, grpo_peer),
    "ppo": (ppo_ours, ppo_peer),
    "dpo": (pairs_ours, pairs_peer),
    "reward": (pairs_ours, pairs_peer),
}


def work(side: str, spec: dict) -> None:
    """The body of a worker process. Its stdout carries reports only: whatever the libraries print goes to stderr."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.chdir(spec["folder"])
    if side == "build":
        return build(spec)
    if spec["device"] == "cpu":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the same for both sides, which take turns
        import torch

        torch.set_num_threads(1)
    METHODS[spec["method"]][side == "peer"](spec, Stopwatch(spec, reports))
    sys.exit("training ended before the last step")


# ---- the parent ------------------------------------------------------------------------------------------------------


class Worker:
    def __init__(self, python: str, side: str, spec: dict):
        self.side, self.errors = side, Path(spec["folder"], f"{side}.log")
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if spec["device"] == "cpu" else {}
        self.process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--worker", side, json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(self.errors, "w"), text=True,
            env={**os.environ, **one_thread, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def read(self) -> dict:
        return json.loads(self.process.stdout.readline() or self.fail())

    def step(self) -> dict:
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.fail()
        return self.read()

    def fail(self) -> NoReturn:
        code = self.process.wait()
        tail = "\n".join(self.errors.read_text(errors="replace").splitlines()[-30:])
        sys.exit(f"{tail}\nerror: the worker `{self.side}` ended with code {code}; its last words stand above")


def peer_version(python: str) -> str | None:
    code = "import importlib.metadata, trl; print('trl', importlib.metadata.version('trl'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return found.stdout.split("\n")[0] if found.returncode == 0 else None


def limits(options: argparse.Namespace, side: dict) -> dict[str, float]:
    """Tokens a second, and the share of the device's limits that they amount to: a decoding step has at least to read
    all weights; the update has at least to do 6 FLOP for each weight and token, each prompt once and no padding."""
    layers, hidden, mlp, heads, kv_heads, vocabulary = SIZES[options.size]
    head = vocabulary * hidden  # tied: it is also the embedding, which costs nothing to read
    body = layers * (hidden * hidden * (2 + 2 * kv_heads / heads) + 3 * hidden * mlp)
    rollout, update = side["phases"]["rollout"], side["phases"]["update"]
    if options.method in ("dpo", "reward"):
        tokens = 2 * PAIRS * options.completion_length
        head_tokens = tokens if options.method == "dpo" else 0
        flop = 6 * (body * (PAIRS * options.prompt_length + tokens) + head * head_tokens)
        return {
            "update_tokens_per_second": tokens / update,
            "update_share_of_flops": flop / options.peak_flops / update,
        }
    tokens = side["mean_length"] * PROMPTS * GENERATIONS
    read = side["longest"] * (body + head) * (2 if options.bf16 else 4)
    seen = PROMPTS * GENERATIONS // options.num_generations * options.prompt_length + tokens
    flop = 6 * (body * seen + head * tokens)
    if options.method == "ppo":  # and the value network, and both and the reference's forward pass before
        bodies = 1 if options.share_value_backbone else 2
        flop = PPO_EPOCHS * 6 * (bodies * body * seen + head * tokens) + 2 * (2 * body * seen + head * tokens)
    return {
        "rollout_tokens_per_second": tokens / rollout,
        "update_tokens_per_second": tokens / update,
        "rollout_share_of_bandwidth": read / options.peak_bytes / rollout,
        "update_share_of_flops": flop / options.peak_flops / update,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--bf16", action="store_true", help="autocast in both; weights stay fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each side")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that are not counted")
    parser.add_argument("--seed", type=int, default=2, help="of the samplers (default: 2)")
    parser.add_argument("--num-generations", type=int, help="completions a prompt (default: 8 for grpo, 1 for ppo)")
    parser.add_argument("--prompt-length", type=int, help="tokens (default: 64, in dpo and reward 128)")
    parser.add_argument("--completion-length", type=int, default=64, help="tokens at most (in dpo and reward: exactly)")
    parser.add_argument("--share-value-backbone", action="store_true", help="ppo, our side only")
    parser.add_argument("--max-tokens-per-microbatch", type=int, help="ppo, our side only (default: the script's)")
    parser.add_argument("--micro-batch-size", type=int, help="not ppo, our side only (default: the script's)")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--peak-flops", type=float, default=989e12, help="the GPU's FLOP/s (default: H200, bf16)")
    parser.add_argument("--peak-bytes", type=float, default=4.8e12, help="the GPU's memory bytes/s (default: H200)")
    options = parser.parse_args()
    options.num_generations = options.num_generations or (1 if options.method == "ppo" else GENERATIONS)
    options.prompt_length = options.prompt_length or (128 if options.method in ("dpo", "reward") else 64)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit, which ends the workers and clears the folder

    peer = peer_version(options.peer_python)
    pythons = {"ours": sys.executable, "peer": options.peer_python}
    if peer is None:
        print(f"{options.peer_python} cannot import trl: our side alone")
        del pythons["peer"]
    with tempfile.TemporaryDirectory() as folder:
        spec = {**vars(options), "folder": folder}
        builder = Worker(sys.executable, "build", spec)
        if builder.process.wait() != 0:
            builder.fail()
        workers = {}
        try:
            for side, python in pythons.items():
                workers[side] = Worker(python, side, spec)
                workers[side].read()  # ready
            reports = {side: [] for side in workers}
            for number in range(options.warmup + options.steps):
                for side, worker in workers.items():
                    reports[side].append(worker.step())
                took = ", ".join(f"{side} {sum(steps[-1]['phases'].values()):.3f} s" for side, steps in reports.items())
                print(f"step {number + 1}{' (warm-up)' * (number < options.warmup)}: {took}", flush=True)
            memory = {side: worker.read() for side, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.process.kill()
                worker.process.wait()

    sides = {}
    for side, steps in reports.items():
        steps = steps[options.warmup :]
        lengths = [length for step in steps for length in step["lengths"]]
        seconds = median(sum(step["phases"].values()) for step in steps)
        sides[side] = {
            "token_ms": 1000 * seconds / (sum(lengths) / len(steps)),
            "seconds": seconds,
            "phases": {phase: median(step["phases"][phase] for step in steps) for phase in PHASES},
            "mean_length": mean(lengths),
            "longest": mean(max(step["lengths"]) for step in steps),
            **memory[side],
        }
    ours, other = sides["ours"], sides.get("peer")
    rows = [("step, seconds", "seconds"), *((f"  {phase}", phase) for phase in PHASES)]
    print(f"\n{'':24}" + "".join(f"{name:>12}" for name in [*sides, *["peer/ours"] * (other is not None)]))
    rows += [("peak memory, MB", "peak_mb"), ("  beyond the loaded model", "peak_extra_mb")]
    rows += [("mean length, tokens", "mean_length"), ("milliseconds a token", "token_ms")]
    for label, key in rows:
        values = [{**side, **side["phases"]}[key] for side in sides.values()]
        ratio = f"{values[1] / values[0]:12.2f}" if other and values[0] else ""
        print(f"{label:24}" + "".join(f"{value:12.4g}" for value in values) + ratio)
    if options.method == "grpo":
        print(f"groups of equal rewards: {mean(step['equal'] for step in reports['ours']):.0%}")

    result = {
        "method": options.method, "size": options.size, "device": options.device,
        "precision": "bf16" if options.bf16 else "fp32", "peer": peer, "steps": options.steps,
        "prompt_length": options.prompt_length, "completion_length": options.completion_length,
        "num_generations": options.num_generations, "share_value_backbone": options.share_value_backbone,
        "max_tokens_per_microbatch": options.max_tokens_per_microbatch, "micro_batch_size": options.micro_batch_size,
        "ratio": other and other["seconds"] / ours["seconds"],
        "ratio_per_token": other and other["token_ms"] / ours["token_ms"],  # the lengths differ a little by chance
        "memory_ratio": other and ours["peak_mb"] / other["peak_mb"],
        "phases": {side: values["phases"] for side, values in sides.items()},
    }  # fmt: skip
    for side in ("ours", "peer"):
        for key in ("seconds", "peak_mb", "peak_extra_mb", "mean_length"):
            result[f"{side}_{key}"] = sides[side][key] if side in sides else None
    if options.device == "cuda":
        result["limits"] = {side: limits(options, values) for side, values in sides.items()}
        for side, values in result["limits"].items():
            print(f"{side}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
