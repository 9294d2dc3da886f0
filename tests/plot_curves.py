"""Draws the README's curves from run folders: one picture a script or task, one line a run.

    for seed in 201 202 203; do python grpo_llm.py --seed $seed; python dpo.py --seed $seed; done   # and so on
    python tests/plot_curves.py runs/*          # writes tests/curves/<script>.png for the scripts among them

Runs of ppo_llm.py with a reward model on the embedded task are drawn apart (ppo_llm_reward_model.png: the learned
reward beside the gold one), and runs on a dataset by its name, the policy scripts' in one picture (<dataset>.png).
Of a table, the picture is maxent_irl.py's own maps, of the last run; of control (<script>_<env-id>.png), curves over
environment steps. Runs of the policy scripts with `--exp-name budget` make budget.png: right answers over the answers
that were sampled, or given in pairs, for each script the mean and the range of its seeds.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CURVES = {  # of each picture: tags, and what to write over them
    "grpo_llm": {
        "train/rewards/accuracy_reward/mean": "right answers, sampled, training",
        "eval/accuracy_greedy": "right answers, greedy, held-out",
        "train/rewards/format_reward/mean": "share that shows its work, sampled",
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
CONTROL = {
    "maxent_irl": {
        "charts/episodic_return": "true return of the trajectories",
        "train/expert_reward - train/policy_reward": "learned reward: expert's minus policy's",
        "train/effective_sample_size": "effective sample size",
    },
    "gail": {
        "charts/episodic_return": "true return of the trajectories",
        "eval/return": "true return of the policy's mode",  # with lines of expert, BC and random
        "train/reward": "learned reward of a step",
    },
}


def picture_and_label(saved: dict) -> tuple[str, str]:
    """The picture that a run belongs to, and what its line is called there."""
    script, args = Path(saved["script"]).stem, saved["args"]
    if args["exp_name"] == "budget":
        return "budget", script
    if "env_id" in args:
        return f"{script}_{args['env_id']}", f"seed {args['seed']}"
    if args.get("dataset_name"):
        return Path(args["dataset_name"]).stem, f"{script}, seed {args['seed']}"
    if script == "ppo_llm" and args["reward_model_path"]:
        return "ppo_llm_reward_model", f"--kl-coef {args['kl_coef']:g}, seed {args['seed']}"
    return script, f"seed {args['seed']}"


def curve(events: EventAccumulator, tag: str, over: str | None) -> list[tuple[float, float]]:
    """Points of a tag, or of the difference of two, over the step, or over another tag that counts something."""
    first, *second = ([(event.step, event.value) for event in events.Scalars(name)] for name in tag.split(" - "))
    points = [(step, value - (dict(second[0])[step] if second else 0.0)) for step, value in first]
    count = {0: 0} | ({event.step: event.value for event in events.Scalars(over)} if over else {})
    return [(count[step] if over else step, value) for step, value in points]


def draw_budget(runs: list[tuple[str, EventAccumulator]], answers_a_step: dict[str, int]) -> Figure:
    """Right answers of the scripts' runs, all on the same task, over the answers that they learned from."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for script in sorted({script for script, _ in runs}):
        curves = [dict(curve(events, "eval/accuracy", None)) for name, events in runs if name == script]
        steps = sorted(curves[0])
        values = [[points[step] for points in curves] for step in steps]
        x = [step * answers_a_step[script] for step in steps]
        axes.plot(x, [sum(column) / len(column) for column in values], marker=".", label=script)
        axes.fill_between(x, list(map(min, values)), list(map(max, values)), alpha=0.2)
    axes.set(title="right answers, sampled, held-out", xlabel="answers sampled (grpo_llm, ppo_llm) or given (dpo)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(folders: list[Path]) -> None:
    answers_a_step = {}
    pictures = defaultdict(list)
    if not any((folder / "args.json").is_file() for folder in folders):
        sys.exit("no run folder among the arguments")
    for folder in folders:
        if (folder / "args.json").is_file():
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
            events.Reload()
            saved = json.loads((folder / "args.json").read_text())
            picture, label = picture_and_label(saved)
            args = saved["args"]
            answers = args.get("generation_batch_size") or 2 * args.get("train_batch_size", 0)
            answers_a_step[Path(saved["script"]).stem] = answers
            if "maps/sampled" in events.Tags()["images"]:
                image = events.Images("maps/sampled")[-1].encoded_image_string
                (Path(__file__).parent / "curves" / "maxent_irl.png").write_bytes(image)
                continue
            pictures[picture].append((label, events))
    for picture, runs in pictures.items():
        path = Path(__file__).parent / "curves" / f"{picture}.png"
        if picture == "budget":
            draw_budget(runs, answers_a_step).savefig(path, dpi=110)
            print(path)
            continue
        control = CONTROL.get(picture.rpartition("_")[0])
        curves = control or CURVES.get(picture, DATASET)
        over = "train/num_tokens" if curves is DATASET else None  # control: the step counts environment steps
        colors = {kind: f"C{i}" for i, kind in enumerate(sorted({label.split(",")[0] for label, _ in runs}))}
        figure = Figure(figsize=(11, 3), layout="constrained")
        for axes, (tag, title) in zip(figure.subplots(1, len(curves)), curves.items()):
            for label, events in sorted(runs, key=lambda run: run[0]):
                points = curve(events, tag, over)
                options = {"color": colors[label.split(",")[0]]} if "," in label else {}
                if tag == "eval/return" and label == min(label for label, _ in runs):
                    for name, style in (("expert", "-"), ("bc", "--"), ("random", ":")):
                        if f"eval/{name}_return" in events.Tags()["scalars"]:
                            height = events.Scalars(f"eval/{name}_return")[-1].value
                            axes.axhline(height, color="gray", linewidth=1, linestyle=style, label=name)
                axes.plot(*zip(*points), linewidth=1, marker="." if len(points) < 20 else None, label=label, **options)
            unit = "environment steps" if control else "tokens, prompts included" if over else "step"
            axes.set(title=title, xlabel=unit)
            axes.locator_params(axis="x", nbins=5)
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
        figure.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
