"""SIGKILL at random moments, and --resume: 50 kills a script, by hand (a quarter of an hour on one core).

    python tests/bench_robustness.py [--kills 50] [--scripts grpo_llm dpo ...]

A tiny run that saves a checkpoint after every step is killed at a moment drawn uniformly from the time that an unbroken
one takes. What has left a checkpoint is resumed, what has left none is started again, and killed again, until it ends.
Its last checkpoint, its metrics and the files of its model must be bit-equal to those of the unbroken run."""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch
from conftest import PROCESSES, SCRIPTS, run_folder, run_main, save_tiny_model, tiny_flags
from test_robustness import equal

LONGER = {"gail": {"total_timesteps": 1200}}
STEPS = {"max_steps": 10, "save_steps": 1}


def start(script: str, flags: dict, folder: Path):
    process = PROCESSES.Process(target=run_main, args=(script, flags, folder / "log"))
    process.start()
    return process


def outcome(folder: Path) -> tuple[dict, dict, dict[str, bytes]]:
    """What must be the same: the last checkpoint, the metrics, and the files of the model."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    return state, json.loads((folder / "summary.json").read_text()), files


def bench(script: str, kills: int, rng: random.Random, folder: Path) -> dict:
    """Counts of what happened in `kills` kills."""
    Args = import_module(script).Args
    flags = {**tiny_flags(script, folder, save_tiny_model(folder / "model"))}
    flags |= {"save_steps": 1, **(LONGER[script] if script in LONGER else STEPS)}
    for name in ("first", "second"):  # the first one may wait for the imports
        begin, flags["output_dir"] = time.time(), str(folder / name)
        process = start(script, flags, folder)
        process.join()
        seconds = time.time() - begin
        if process.exitcode:
            sys.exit((folder / "log").read_text())
    expected = outcome(run_folder(Args(**flags)))
    counts = {"kills": 0, "before the first checkpoint": 0, "runs": 0, "differ": 0}
    while counts["kills"] < kills:
        flags["output_dir"] = str(folder / f"run{counts['runs']}")
        resume = None
        while True:
            process = start(script, {"resume": resume} if resume else flags, folder)
            process.join(timeout=rng.uniform(0, seconds) if counts["kills"] < kills else None)
            if process.exitcode is None:
                process.kill()
                process.join()
                counts["kills"] += 1
            elif process.exitcode:
                sys.exit((folder / "log").read_text())
            else:
                break
            if resume is None:
                saved = list(Path(flags["output_dir"]).glob("*/checkpoint.pt"))
                resume = str(saved[0].parent) if saved else None
                counts["before the first checkpoint"] += not saved
                if not saved:
                    shutil.rmtree(flags["output_dir"], ignore_errors=True)
        counts["runs"] += 1
        counts["differ"] += not equal(outcome(run_folder(Args(**flags))), expected)
    return {"script": script, **counts, "seconds of an unbroken run": round(seconds, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for script in arguments.scripts:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(bench(script, arguments.kills, random.Random(arguments.seed), Path(folder))), flush=True)
