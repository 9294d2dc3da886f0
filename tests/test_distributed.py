"""Several processes on one machine, with gloo: any number of them gives the same run."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MORE_SUMS, PROCESSES, ROOT, run_folder, run_main, scalars, tiny_flags, weights, write_rows

from grpo_llm import Args


def keep_first_checkpoint() -> None:
    """A later checkpoint does not replace the first one's copy."""
    real_replace = os.replace

    def replace(aside, path):
        real_replace(aside, path)
        copy = Path(path).with_name("first.pt")
        if Path(path).name == "checkpoint.pt" and not copy.exists():
            shutil.copy(path, copy)

    os.replace = replace


def run_processes(script: str, flags: dict, count: int, folder: Path) -> None:
    """main in count processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    logs = [folder / f"log{rank}" for rank in range(count)]
    processes = []
    for rank, log in enumerate(logs):
        environment = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (script, flags, log, keep_first_checkpoint, environment)
        processes.append(PROCESSES.Process(target=run_main, args=arguments, daemon=True))
        processes[-1].start()
    for process, log in zip(processes, logs):
        process.join(timeout=120)
        assert process.exitcode == 0, log.read_text()[-2000:]


RUNS = [
    ("grpo_llm", {"beta": 0.0}),
    ("grpo_llm", {"num_iterations": 2, "loss_type": "grpo"}),
    ("ppo_llm", {"num_mini_batches": 2, "whiten_rewards": True}),
    ("ppo_llm", {"share_value_backbone": True, "num_generations": 4, "target_kl": 1e-4}),
    ("dpo", {"train_batch_size": 6}),  # unequal shares in 4 processes
    ("reward_model", {"train_batch_size": 6, "learning_rate": 3e-4}),
]
# Per process, or a maximum over micro-batches that another number of processes composes otherwise.
NOT_THE_SAME = {"charts/SPS", "train/sampling/sampling_logp_difference/max"}


@pytest.mark.parametrize("script, flags", RUNS)
def test_two_and_four_processes_equal_one(script, flags, model_folder, tmp_path):
    """The same parameters to 1e-5 after three updates, and the same curves; and so with a checkpoint of four processes
    that two go on from."""
    flags = {**tiny_flags(script, tmp_path, model_folder), "max_steps": 3, "learning_rate": 1e-3, **flags}
    # With 3 held-out prompts, 2 processes have unequal shares, and one of 4 has none. The form of 0.2 needs a multiple.
    flags["max_eval_samples"] = 4 if script == "ppo_llm" else 3
    sums = [(a, b) for a in range(8) for b in range(8)]
    pairs = [{"prompt": f"{a}+{b}=", "chosen": f"{a}" * (1 + b % 3), "rejected": f"-{b}"} for a, b in sums]
    write_rows(tmp_path / "rows.jsonl", MORE_SUMS if "llm" in script else pairs)  # one is held out for each process
    folders = []
    for count in (1, 2, 4):
        run = {**flags, "output_dir": str(tmp_path / str(count))}
        run_processes(script, run, count, tmp_path)
        folders.append(run_folder(Args(output_dir=run["output_dir"])))
    four = folders[-1]
    resumed = Path(shutil.copytree(four, tmp_path / "resumed"))
    os.replace(resumed / "first.pt", resumed / "checkpoint.pt")
    assert torch.load(resumed / "checkpoint.pt", weights_only=True)["step"] == 2
    shutil.rmtree(resumed / "model")
    run_processes(script, {"resume": str(resumed)}, 2, tmp_path)
    expected, curves = weights(folders[0]), scalars(folders[0])
    for folder in (*folders[1:], resumed):
        found = weights(folder)
        assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-5) for name in expected)
        logs = scalars(folder)
        assert set(logs) == set(curves)
        for tag in set(curves) - NOT_THE_SAME:
            values = [dict(log[tag]) for log in (logs, curves)]
            assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5), tag


def test_torchrun_as_the_readme_says(model_folder, tmp_path):
    flags = {**tiny_flags("grpo_llm", tmp_path, model_folder), "max_steps": 1}
    del flags["bf16"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-endpoint=localhost:0",
               "--rdzv-backend=c10d", str(ROOT / "grpo_llm.py"), "--no-bf16"]  # fmt: skip
    command += [word for name, x in flags.items() for word in (f"--{name.replace('_', '-')}", str(x))]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.splitlines()[-1] == str(run_folder(Args(output_dir=flags["output_dir"])))
