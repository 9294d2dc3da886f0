"""Draws the README's curves from run folders: one picture a script, one line a seed.

for seed in 201 202 203; do python grpo_llm.py --seed $seed; python dpo.py --seed $seed; done   # and so on
python tests/plot_curves.py runs/*          # writes tests/curves/<script>.png for the scripts among them
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CURVES = {  # of each script: tags, and what to write over them
    "grpo_llm.py": {
        "eval/accuracy": "right answers, held-out",
        "train/rewards/format_reward/mean": "share that shows its work",
        "train/completions/mean_length": "tokens a completion",
    },
    "dpo.py": {
        "eval/accuracy": "right answers, sampled, held-out",
        "train/rewards/accuracies": "preference accuracy",
        "train/logps/chosen": "log-probability of chosen answers",
    },
    "reward_model.py": {
        "eval/accuracy": "accuracy, held-out pairs",
        "eval/calibration_error": "expected calibration error",
        "train/loss": "loss",
    },
}


def main(folders: list[Path]) -> None:
    runs = defaultdict(list)
    for folder in folders:
        if (folder / "args.json").is_file():
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
            events.Reload()
            saved = json.loads((folder / "args.json").read_text())
            runs[saved["script"]].append((saved["args"]["seed"], events))
    if not runs:
        sys.exit("no run folder among the arguments")
    for script, seeds in runs.items():
        figure = Figure(figsize=(11, 3), layout="constrained")
        for axes, (tag, title) in zip(figure.subplots(1, 3), CURVES[script].items()):
            for seed, events in sorted(seeds, key=lambda run: run[0]):
                points = [(event.step, event.value) for event in events.Scalars(tag)]
                axes.plot(*zip(*points), linewidth=1, marker="." if len(points) < 20 else None, label=f"seed {seed}")
            axes.set(title=title, xlabel="step")
            axes.grid(alpha=0.3)
        axes.legend()
        path = Path(__file__).parent / "curves" / f"{Path(script).stem}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
