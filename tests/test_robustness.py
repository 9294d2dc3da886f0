"""What goes wrong from outside: kills while a checkpoint is written, and bad input."""

import itertools
import json
import os
import shutil
import signal
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import datasets
import gymnasium
import numpy as np
import pytest
import torch
from conftest import PROCESSES, SCRIPTS, run_folder, run_main, scalars, tiny_flags, weights, with_digit_reward

def errors_of(script: str) -> tuple:
    """What the script prints in one line: UserError, and in the scripts that keep 0.2's form others too."""
    others = (ValueError, OSError, ImportError, gymnasium.error.Error, datasets.exceptions.DatasetsError)
    module = import_module(script)
    return (module.UserError,) if hasattr(module, "UserError") else others


# ---- SIGKILL


def die_at(moment: str, number: int) -> None:
    """This process will be killed around the number-th checkpoint, or before the trained model has got its name."""
    count, real_save, real_replace = 0, torch.save, os.replace

    def save(state, file):
        nonlocal count
        count += "step" in state
        if moment == "while writing" and count == number:
            real_save(state, file)
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real_save(state, file)

    def replace(aside, path):
        here = Path(path).name == "checkpoint.pt" and count == number
        model = Path(path).name == "model" and count == number
        if (here and moment == "before renaming") or (model and moment == "before the model's renaming"):
            os.kill(os.getpid(), signal.SIGKILL)
        real_replace(aside, path)
        if here and moment == "after renaming":
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save, os.replace = save, replace


def equal(one, two) -> bool:
    """Bit-equal states of two checkpoints, but for the time that they took."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return set(one) == set(two) and all(equal(one[key], two[key]) for key in one if "seconds" not in str(key))
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two or one != one and two != two


CARTPOLE = {
    "env_id": "CartPole-v1", "num_trajectories": 4, "eval_episodes": 4, "expert_steps": 2, "num_demos": 3, "horizon": 60
}  # fmt: skip
PENDULUM = {**CARTPOLE, "env_id": "Pendulum-v1", "reward_inputs": "state", "horizon": 10, "segment_length": 10}
LLM = {"max_steps": 6, "eval_steps": 3}
GSPO = {"num_iterations": 2, "loss_type": "grpo", "importance_sampling_level": "sequence"}
STREAKS = {"seed": 8, "max_kl": 1.0}  # with these, GAIL's score exceeds 0.95, falls below it and exceeds it again
WRITING, RENAMING, RENAMED = "while writing", "before renaming", "after renaming"
MODEL = "before the model's renaming"
# What is run, the moment of its death, at which checkpoint, and the step of the last one that is whole. The control
# scripts' first checkpoint precedes the loop.
KILLS = [
    ("grpo_llm", {**LLM, "warmup_steps": 3}, WRITING, 2, 2),
    ("grpo_llm", {**LLM, **GSPO}, RENAMING, 2, 2),
    ("grpo_llm", {**LLM, "lr_scheduler_type": "cosine"}, RENAMED, 2, 4),
    ("grpo_llm", LLM, MODEL, 2, 2),
    ("ppo_llm", {**LLM, "num_mini_batches": 2}, WRITING, 2, 2),
    ("ppo_llm", {**LLM, "share_value_backbone": True, "lr_scheduler_type": "cosine"}, RENAMING, 2, 2),
    ("ppo_llm", {**LLM, "whiten_rewards": True, "target_kl": 1e-3}, RENAMED, 2, 4),
    ("ppo_llm", LLM, MODEL, 2, 2),
    ("dpo", {**LLM, "warmup_steps": 2}, WRITING, 2, 2),
    ("dpo", {**LLM, "loss_type": "ipo"}, RENAMING, 2, 2),
    ("dpo", {**LLM, "rpo_alpha": 0.1}, RENAMED, 2, 4),
    ("dpo", LLM, MODEL, 2, 2),
    ("reward_model", {**LLM, "warmup_steps": 2}, WRITING, 2, 2),
    ("reward_model", {**LLM, "center_rewards_coefficient": 0.1}, RENAMING, 2, 2),
    ("reward_model", {**LLM, "lr_scheduler_type": "constant"}, RENAMED, 2, 4),
    ("reward_model", LLM, MODEL, 2, 2),
    ("maxent_irl", {"estimator": "both"}, WRITING, 3, 2),
    ("maxent_irl", {**CARTPOLE, "segment_length": 7}, RENAMING, 3, 2),
    ("maxent_irl", PENDULUM, RENAMED, 1, 0),
    ("gail", {"gradient_penalty": 1.0, "eval_steps": 1, **STREAKS}, WRITING, 3, 4),
    ("gail", {"env_id": "Pendulum-v1", "bc_warm_start": True}, RENAMING, 2, 2),
    ("gail", {"discriminator_steps": 2}, RENAMED, 2, 4),
]  # fmt: skip


@pytest.mark.parametrize("script, flags, moment, number, step", KILLS, ids=[f"{k[0]} {k[2]}" for k in KILLS])
def test_a_killed_run_resumes_exactly(script, flags, moment, number, step, model_folder, tmp_path, monkeypatch):
    """After SIGKILL and --resume: the last checkpoint, the metrics, the curves and what is saved at the end are
    bit-equal to those of an unbroken run, and nothing that preceded the checkpoint is done again."""
    module = import_module(script)
    if hasattr(module, "REWARDS"):
        monkeypatch.setattr(module, "REWARDS", with_digit_reward(script))
    flags = {**tiny_flags(script, tmp_path, model_folder), **flags}
    runs = [{**flags, "output_dir": str(tmp_path / name)} for name in ("whole", "killed")]
    expected = module.main(module.Args(**runs[0]))
    log = tmp_path / "log"
    process = PROCESSES.Process(target=run_main, args=(script, runs[1], log, partial(die_at, moment, number)))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL, log.read_text()[-2000:]
    unbroken, folder = (run_folder(module.Args(**run)) for run in runs)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == step and not (folder / "summary.json").exists()
    if moment == WRITING and "model" in checkpoint:
        assert equal(weights(folder), {name: checkpoint["model"][name] for name in weights(folder)})
    if moment == WRITING and "trained" in checkpoint:
        assert equal(weights(folder), {name: checkpoint["trained"][name] for name in weights(folder)})
    refused = r"leave out .*seed|and no other flags \(got: --seed\)"
    with pytest.raises(errors_of(script), match=refused):
        module.main(module.Args(resume=str(folder), seed=2))
    speeds = scalars(folder).get("charts/SPS", [])[:step]
    demonstrated = [path.stat().st_mtime_ns for path in folder.glob("demos.npz")]
    time.sleep(1 - time.time() % 1)  # TensorBoard orders files by the second in their names
    metrics = module.main(module.Args(resume=str(folder)))
    assert equal(metrics, expected) and equal(json.loads((folder / "summary.json").read_text()), expected)
    assert equal(*(torch.load(x / "checkpoint.pt", weights_only=True) for x in (folder, unbroken)))
    files = [path.relative_to(unbroken) for path in unbroken.rglob("*.safetensors")]
    assert files and all((folder / file).read_bytes() == (unbroken / file).read_bytes() for file in files)
    resumed, curves = scalars(folder), scalars(unbroken)
    assert set(resumed) == set(curves) and resumed.get("charts/SPS", [])[:step] == speeds
    assert [path.stat().st_mtime_ns for path in folder.glob("demos.npz")] == demonstrated
    for tag in set(curves) - {"charts/SPS", "charts/cpu_seconds"}:
        assert resumed[tag] == curves[tag]  # each step once, also those that were repeated


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_runs_of_one_second_do_not_share_a_folder(script, tmp_path, model_folder, monkeypatch):
    module = import_module(script)
    args = module.Args(**tiny_flags(script, tmp_path, model_folder))
    monkeypatch.setattr(time, "time", itertools.count(10**9, 1e-6).__next__)
    module.main(args)
    with pytest.raises(errors_of(script), match="exists"):
        module.main(args)


# ---- bad input


def rows(*rows: dict, text: str | None = None):
    """The file of --dataset-name, made in the test's folder: these rows 20 times, or the text as it stands."""

    def write(folder: Path, model_folder: str) -> str:
        path = folder / "bad.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) * 20 if text is None else text)
        return str(path)

    return write


def demos(**changes):
    """The file of --demos: six steps on CartPole in two episodes, with changes (None: without that key)."""

    def write(folder: Path, model_folder: str) -> str:
        data = {"obs": np.zeros((6, 4), np.float32), "act": np.zeros(6, np.int64), "lengths": np.array([2, 4])}
        np.savez(folder / "bad.npz", **{key: x for key, x in {**data, **changes}.items() if x is not None})
        return str(folder / "bad.npz")

    return write


def damaged(file: str, content: bytes | None):
    """A copy of the model's folder in which a file has other content, or is missing."""

    def write(folder: Path, model_folder: str) -> str:
        shutil.copytree(model_folder, folder / "damaged")
        (folder / "damaged" / file).unlink()
        if content is not None:
            (folder / "damaged" / file).write_bytes(content)
        return str(folder / "damaged")

    return write


def run_of_model():
    """A folder in which the model's is one called model."""

    def write(folder: Path, model_folder: str) -> str:
        shutil.copytree(model_folder, folder / "run" / "model")
        return str(folder / "run")

    return write


def file(name: str, content: bytes):
    """A file in the test's folder."""

    def write(folder: Path, model_folder: str) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


class Actions(gymnasium.Env):
    """An environment whose actions the policies do not support."""

    def __init__(self, space: str) -> None:
        spaces, self.observation_space = gymnasium.spaces, gymnasium.spaces.Box(-1, 1, (2,))
        self.action_space = {
            "from 1": spaces.Discrete(2, start=1), "binary": spaces.MultiBinary(2),
            "unbounded": spaces.Box(-np.inf, np.inf, (1,)), "integers": spaces.Box(0, 3, (1,), np.int64),
            "single": spaces.Box(1, 1, (1,)),
        }[space]  # fmt: skip


gymnasium.register("Actions-v0", Actions, max_episode_steps=5)
PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
POLES, NAN = {"env_id": "CartPole-v1"}, np.full((6, 4), np.nan, np.float32)
WEIGHTS = "model.safetensors"
# Script, flags, and words of the sentence: main raises, and the handler of __main__ prints it.
BAD_INPUTS = [
    ("grpo_llm", {"num_generations": 1}, "--num-generations"),
    ("grpo_llm", {"generation_batch_size": 18}, "--generation-batch-size"),
    ("grpo_llm", {"device": "cuda"}, "--device cuda"),
    ("grpo_llm", {"output_dir": "/dev/null/runs"}, "/dev/null/runs"),
    ("grpo_llm", {"resume": "nowhere"}, "--resume nowhere has no checkpoint.pt"),
    ("grpo_llm", {"temperature": 0.0}, "--temperature"),
    ("grpo_llm", {"temperature": float("nan")}, "--temperature"),
    ("grpo_llm", {"max_grad_norm": -1.0}, "--max-grad-norm"),  # torch would turn the gradient around
    ("grpo_llm", {"beta": -0.1}, "--beta"),
    ("grpo_llm", {"eval_steps": 0}, "--eval-steps must be at least 1"),
    ("grpo_llm", {"model_name_or_path": None}, "--dataset-name needs --model-name-or-path"),
    ("ppo_llm", {"temperature": 0.0}, "--temperature 0.0 is too small"),
    ("reward_model", {"eval_steps": 0}, "--eval-steps must be at least 1"),
    ("reward_model", {"max_steps": 0}, "--max-steps must be at least 1"),
    ("reward_model", {"center_rewards_coefficient": -1.0}, "--center-rewards-coefficient"),
    ("reward_model", {"dataset_name": None}, "give both, or none"),
    ("maxent_irl", {"save_steps": 0}, "--save-steps 0 is too small"),
    ("ppo_llm", {"num_generations": 0}, "--num-generations 0 is too small"),
    ("ppo_llm", {"kl_coef": -0.1}, "--kl-coef -0.1 is too small"),
    ("dpo", {"rpo_alpha": -1.0}, "--rpo-alpha at least 0"),
    ("dpo", {"loss_type": "robust", "label_smoothing": 0.5}, "--label-smoothing must be at least 0 and below 0.5"),
    ("dpo", {"loss_type": "ipo", "label_smoothing": 0.1}, "--label-smoothing has no effect with --loss-type ipo"),
    ("dpo", {"loss_type": "hinge", "label_smoothing": 0.1}, "--label-smoothing has no effect"),
    ("dpo", {"micro_batch_size": 0}, "--micro-batch-size must be at least 1"),
    ("dpo", {"train_batch_size": 0}, "--train-batch-size"),
    ("dpo", {"max_grad_norm": -1.0}, "--max-grad-norm"),
    ("dpo", {"model_name_or_path": None}, "give both, or none"),
    ("dpo", {"output_dir": "/dev/null/runs"}, "/dev/null/runs"),
    ("maxent_irl", {"max_grad_norm": 0.0}, "--max-grad-norm 0.0 is too small"),
    ("gail", {"max_kl": 0.0}, "--max-kl 0.0 is too small"),
    ("gail", {"gae_lambda": 97.0}, "--gae-lambda at most 1"),
    ("ppo_llm", {"num_mini_batches": 3}, "--num-mini-batches 3"),
    ("ppo_llm", {"num_generations": 8, "num_mini_batches": 4}, "--num-generations 8"),
    ("ppo_llm", {"reward_model_path": "no/such-model"}, "--reward-model-path no/such-model"),
    ("dpo", {"beta": 0.0, "loss_type": "ipo"}, "--beta"),
    ("dpo", {"resume": "nowhere"}, "--resume nowhere has no checkpoint.pt"),
    ("reward_model", {"resume": "nowhere"}, "--resume nowhere has no checkpoint.pt"),
    ("gail", {"gamma": 1.0}, "--gamma must be below 1"),
    ("gail", {"num_demos": 0}, "--num-demos 0 is too small"),
    ("gail", {"resume": "nowhere"}, "--resume nowhere has no checkpoint.pt"),
    ("gail", {"output_dir": "/dev/null/runs"}, "/dev/null/runs"),
    ("gail", {"env_id": "Nothing-v0"}, "`Nothing`"),
    ("gail", {"env_id": "no_module:Walk-v0"}, "no_module"),
    ("gail", {"env_id": "FrozenLake-v1"}, "has observations Discrete(16)"),
    ("gail", {"env_id": "Blackjack-v1"}, "has observations Tuple"),
    ("gail", {"constant_action": 2}, "--constant-action 2 needs no --demos and must be in Discrete(2)"),
    ("gail", {"env_id": "Pendulum-v1", "constant_action": 0}, "must be in Box"),
    ("gail", {"demos": demos(), "constant_action": 0}, "--constant-action 0 needs no --demos"),
    ("gail", {"demos": "missing.npz"}, "--demos missing.npz cannot be read"),
    ("gail", {"demos": file("text.npz", b"obs act lengths")}, "text.npz cannot be read as .npz"),
    ("gail", {"demos": file("torn.npz", b"PK\x03\x04")}, "torn.npz cannot be read as .npz"),
    ("gail", {"demos": demos(obs=None)}, "obs is not a file in the archive"),
    ("gail", {"demos": demos(lengths=None)}, "lengths is not a file in the archive"),
    ("gail", {"demos": demos(lengths=np.array([2, 3]))}, "obs must be finite, of shape (5, 4); got shape (6, 4)"),
    ("gail", {"demos": demos(lengths=np.array([[2], [4]]))}, "lengths must hold the number of steps"),
    ("gail", {"demos": demos(lengths=np.array([6, 0]))}, "lengths must hold the number of steps"),
    ("gail", {"demos": demos(obs=np.zeros((6, 3)))}, "of shape (6, 4); got shape (6, 3)"),
    ("gail", {"demos": demos(act=np.zeros((6, 2)))}, "act must be finite, of shape (6,); got shape (6, 2)"),
    ("gail", {"demos": demos(act=np.array([0, 1, 2, 0, 0, 0]))}, "act has 2, which is not in Discrete(2)"),
    ("gail", {"demos": demos(act=np.array([0, 0.5, 1, 0, 0, 0]))}, "act has 0.5, which is not in Discrete(2)"),
    ("gail", {"demos": demos(act=np.array(list("abcdef")))}, "cannot be read as .npz"),
    ("gail", {"demos": demos(obs=NAN)}, "obs must be finite, of shape (6, 4)"),
    ("gail", {"demos": demos(rew=np.zeros(5))}, "rew must be finite, of shape (6,); got shape (5,)"),
    ("gail", {"demos": demos(), "num_demos": 3}, "--num-demos 3: --demos"),
    ("gail", {"demos": demos(), "env_id": "Pendulum-v1"}, "obs must be finite, of shape (6, 3); got shape (6, 4)"),
    ("maxent_irl", {"resume": "nowhere"}, "--resume nowhere has no checkpoint.pt"),
    ("maxent_irl", {"env_id": "Nothing-v0"}, "`Nothing`"),
    ("maxent_irl", {"env_id": "CliffWalking-v1"}, "--horizon must be set"),
    ("maxent_irl", {**POLES, "estimator": "exact"}, "has no table"),
    ("maxent_irl", {**POLES, "transfer": "{}"}, "has no table"),
    ("maxent_irl", {"env_id": "Blackjack-v1", "horizon": 5}, "needs 1-D Box; Discrete or bounded Box"),
    ("maxent_irl", {"env_id": "Actions-v0", "env_kwargs": '{"space": "from 1"}'}, "Discrete(2, start=1)"),
    ("maxent_irl", {"env_id": "Actions-v0", "env_kwargs": '{"space": "binary"}'}, "MultiBinary(2)"),
    ("maxent_irl", {"env_id": "Actions-v0", "env_kwargs": '{"space": "unbounded"}'}, "Box(-inf, inf"),
    ("maxent_irl", {"env_id": "Actions-v0", "env_kwargs": '{"space": "integers"}'}, "Box(0, 3, (1,), int64)"),
    ("maxent_irl", {"env_id": "Actions-v0", "env_kwargs": '{"space": "single"}'}, "Box(1.0, 1.0, (1,)"),
    ("maxent_irl", {"env_kwargs": '{"slipp": 0.1}'}, "slipp"),
    ("maxent_irl", {"env_kwargs": "[1]"}, "--env-kwargs"),
    ("maxent_irl", {"env_kwargs": "slip=1"}, "--env-kwargs"),
    ("maxent_irl", {"env_id": "FrozenLake-v1", "env_kwargs": '{"map_name": "9x9"}'}, "9x9"),
    ("maxent_irl", {"transfer": '{"slipp": 0.1}'}, "slipp"),
    ("maxent_irl", {"env_kwargs": '{"slip": 2}'}, "negative or do not sum to 1"),
    ("maxent_irl", {"env_id": "FrozenLake-v1", "env_kwargs": '{"success_rate": 2}'}, "negative or do not sum to 1"),
    ("maxent_irl", {"env_id": "FrozenLake-v1", "transfer": '{"map_name": "8x8"}'}, "(64, 4), not (16, 4)"),
    ("maxent_irl", {**POLES, "demos": "missing.npz"}, "--demos missing.npz cannot be read"),
    ("maxent_irl", {**POLES, "demos": demos(obs=np.zeros((6, 3)))}, "of shape (6, 4); got shape (6, 3)"),
]  # fmt: skip


# These are found when they are read: the run folder holds nothing but the flags then.
BAD_FILES = [
    ("grpo_llm", {"model_name_or_path": "no/such-model"}, "--model-name-or-path no/such-model is no model"),
    ("grpo_llm", {"model_name_or_path": "./no-such-folder"}, "--model-name-or-path ./no-such-folder is no model"),
    ("grpo_llm", {"model_name_or_path": damaged("tokenizer.json", None)}, "is no model with a tokenizer"),
    ("grpo_llm", {"model_name_or_path": damaged("config.json", None)}, "is no model with a tokenizer"),
    ("grpo_llm", {"model_name_or_path": damaged("config.json", b"{")}, "--model-name-or-path"),
    ("grpo_llm", {"model_name_or_path": damaged("config.json", b'{"model_type": "none"}')}, "--model-name-or-path"),
    ("grpo_llm", {"model_name_or_path": run_of_model()}, "(of a run, use model/)"),
    ("grpo_llm", {"dataset_name": "no-such-file.jsonl"}, "--dataset-name no-such-file.jsonl"),
    ("grpo_llm", {"dataset_name": "no/such-data"}, "--dataset-name no/such-data"),
    ("grpo_llm", {"dataset_train_split": "training"}, "no split training, but ['train']"),
    ("grpo_llm", {"dataset_name": rows(text="[1, 2]\n")}, "--dataset-name"),
    ("grpo_llm", {"dataset_name": rows({"text": "1"})}, "row 1"),
    ("grpo_llm", {"dataset_name": rows({"prompt": " ", "answer": "1"})}, "its prompt is empty"),
    ("grpo_llm", {"dataset_name": rows({"prompt": "1+1=", "answer": "Paris"})}, "its answer is no number: Paris"),
    ("grpo_llm", {"dataset_name": rows({"prompt": "1+1=", "answer": "2"})}, "too few"),
    ("grpo_llm", {"max_completion_length": 127}, "more than 1 tokens"),
    ("dpo", {"model_name_or_path": "no/such-model"}, "--model-name-or-path no/such-model is no model"),
    ("dpo", {"ref_model_name_or_path": "no/such"}, "--ref-model-name-or-path no/such is no model"),
    ("dpo", {"dataset_name": rows({"prompt": "1", "chosen": "2"})}, "20 of 20 rows cannot be used; row 1"),
    ("dpo", {"dataset_name": rows(PAIR), "max_length": 4}, "its prompt has 0 or more than 4 tokens"),
    ("dpo", {"dataset_name": rows(PAIR)}, "too few"),
    ("reward_model", {"model_name_or_path": "no/such-model"}, "--model-name-or-path no/such-model is no model"),
    ("reward_model", {"dataset_name": "no/such-data"}, "--dataset-name no/such-data"),
    ("reward_model", {"dataset_name": rows({"prompt": "1", "completions": ["1"]})}, "fewer than two answers"),
    ("reward_model", {"dataset_name": rows({"prompt": "1", "completions": 5})}, "fewer than two answers"),
    ("reward_model", {"dataset_name": rows({**PAIR, "margin": "big"})}, "its margin is no number: big"),
    ("reward_model", {"dataset_name": rows({"prompt": "1", "completions": ["1", "2", "3"], "margin": 1})}, "a margin"),
    ("reward_model", {"dataset_name": rows({**PAIR, "label": 1.5})}, "its label is 1.5"),
    ("reward_model", {"dataset_name": rows({**PAIR, "rejected": "2"})}, "two of its answers are the same"),
]  # fmt: skip


@pytest.mark.parametrize("script, flags, words", BAD_FILES, ids=[f"{s} {w}" for s, _, w in BAD_FILES])
def test_bad_files_are_named_before_training(script, flags, words, model_folder, tmp_path):
    module = import_module(script)
    flags = {name: x(tmp_path, model_folder) if callable(x) else x for name, x in flags.items()}
    args = module.Args(**{**tiny_flags(script, tmp_path, model_folder), **flags})
    with pytest.raises(module.UserError) as error:
        module.main(args)
    assert words in str(error.value)
    assert [path.name for path in run_folder(args).iterdir()] == ["args.json"]


@pytest.mark.parametrize("script, flags, words", BAD_INPUTS, ids=[f"{s} {w}" for s, _, w in BAD_INPUTS])
def test_bad_input_is_named_before_anything_is_written(script, flags, words, model_folder, tmp_path):
    if flags == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    module = import_module(script)
    flags = {name: x(tmp_path, model_folder) if callable(x) else x for name, x in flags.items()}
    flags = flags if "resume" in flags else {**tiny_flags(script, tmp_path, model_folder), **flags}
    with pytest.raises(errors_of(script)) as error:
        module.main(module.Args(**flags))
    assert words in str(error.value)
    assert not (tmp_path / "runs").exists()
