"""Draws the README's curves from run folders: one picture a script or task, one line a run.

    for seed in 201 202 203; do python grpo_llm.py --seed $seed; python dpo.py --seed $seed; done   # and so on
    python tests/plot_curves.py runs/*          # writes tests/curves/<script>.png for the scripts among them

Runs of ppo_llm.py with a reward model on the embedded task are drawn apart (ppo_llm_reward_model.png: the learned
reward beside the gold one), and runs on a dataset by its name, the policy scripts' in one picture (<dataset>.png).
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CURVES = {  # of each picture: tags, and what to write over them
    "grpo_llm": {
        "eval/accuracy": "right answers, held-out",
        "train/rewards/format_reward/mean": "share that shows its work",
        "train/completions/mean_length": "tokens a completion",
    },
    "ppo_llm": {
        "eval/accuracy": "right answers, held-out",
        "train/rewards/format_reward/mean": "share that shows its work",
        "objective/kl": "KL to the supervised model, nats",
    },
    "ppo_llm_reward_model": {
        "eval/reward": "learned reward, held-out",
        "eval/accuracy": "gold reward: right answers, held-out",
        "eval/kl": "KL to the supervised model, nats",
    },
    "dpo": {
        "eval/accuracy": "right answers, sampled, held-out",
        "train/rewards/accuracies": "preference accuracy",
        "train/logps/chosen": "log-probability of chosen answers",
    },
    "reward_model": {
        "eval/accuracy": "accuracy, held-out pairs",
        "eval/calibration_error": "expected calibration error",
        "train/loss": "loss",
    },
}
DATASET = {"eval/reward": "reward, held-out", "eval/kl": "KL to the initial model, nats"}


def picture_and_label(saved: dict) -> tuple[str, str]:
    """The picture that a run belongs to, and what its line is called there."""
    script, args = Path(saved["script"]).stem, saved["args"]
    if args["dataset_name"]:
        return Path(args["dataset_name"]).stem, f"{script}, seed {args['seed']}"
    if script == "ppo_llm" and args["reward_model_path"]:
        return "ppo_llm_reward_model", f"--kl-coef {args['kl_coef']:g}, seed {args['seed']}"
    return script, f"seed {args['seed']}"


def main(folders: list[Path]) -> None:
    pictures = defaultdict(list)
    for folder in folders:
        if (folder / "args.json").is_file():
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
            events.Reload()
            picture, label = picture_and_label(json.loads((folder / "args.json").read_text()))
            pictures[picture].append((label, events))
    if not pictures:
        sys.exit("no run folder among the arguments")
    for picture, runs in pictures.items():
        curves = CURVES.get(picture, DATASET)
        colors = {kind: f"C{i}" for i, kind in enumerate(sorted({label.split(",")[0] for label, _ in runs}))}
        figure = Figure(figsize=(11, 3), layout="constrained")
        for axes, (tag, title) in zip(figure.subplots(1, len(curves)), curves.items()):
            for label, events in sorted(runs, key=lambda run: run[0]):
                points = [(event.step, event.value) for event in events.Scalars(tag)]
                if curves is DATASET:  # tokens make runs of several scripts comparable
                    tokens = {0: 0} | {event.step: event.value for event in events.Scalars("train/num_tokens")}
                    points = [(tokens[step], value) for step, value in points]
                options = {"color": colors[label.split(",")[0]]} if "," in label else {}
                axes.plot(*zip(*points), linewidth=1, marker="." if len(points) < 20 else None, label=label, **options)
            axes.set(title=title, xlabel="tokens sampled" if curves is DATASET else "step")
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
        path = Path(__file__).parent / "curves" / f"{picture}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
