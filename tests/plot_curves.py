"""Draw the curves of run folders: one picture per script and task, one line per seed.

    for seed in 201 202 203; do python dpo.py --seed $seed; done
    python tests/plot_curves.py runs/* [--output tests/curves]

The picture of grpo_llm.py's default shows means and ranges over the seeds in the first 60 steps, and what the model
wrote before and after. In the others, seeds have different line styles, or, where flags differ, settings have.
Curves that a run lacks (it was killed, or it has no such reward) are left out, and so are folders that are not runs.
Tables: the picture is the last map that maxent_irl.py drew.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLORS = {"grpo_llm": "C0", "ppo_llm": "C1", "dpo": "C2", "reward_model": "C3", "maxent_irl": "C4", "gail": "C5"}
STYLES = "-", "--", ":", "-."  # of seeds
CURVES = {  # tags of a script's picture, and what their axes say
    "grpo_llm": {
        "eval/accuracy": "correct, sampled, held-out", "eval/accuracy_greedy": "correct, greedy, held-out",
        "eval/reward": "reward, sampled, held-out",
    },
    "ppo_llm": {
        "eval/accuracy": "correct, sampled, held-out", "eval/accuracy_greedy": "correct, greedy, held-out",
        "eval/reward": "learned reward, sampled, held-out", "eval/kl": "KL to the initial model, nats",
    },
    "dpo": {
        "eval/accuracy": "correct, sampled, held-out", "eval/rewards/accuracies": "pairs in the right order, held-out",
        "eval/logps/chosen": "log p(chosen answers), nats",
    },
    "reward_model": {
        "eval/accuracy": "pairs in the right order, held-out", "eval/margin": "lead of the better answer's score",
        "eval/loss": "loss, held-out, nats",
    },
    "maxent_irl": {
        "charts/episodic_return": "true return of an episode", "train/entropy": "entropy of the policy, nats",
        "train/effective_sample_share": "effective share of the samples",
    },
    "gail": {
        "eval/return": "true return, greedy", "charts/episodic_return": "true return, sampled",
        "losses/discriminator_loss": "loss of D, nats (1.39: it can't tell)",
    },
}  # fmt: skip
STORY = {
    "eval/accuracy": "correct, sampled (pass@1)", "eval/pass@8": "correct, at least 1 of 8 samples",
    "eval/accuracy_greedy": "correct, greedy", "eval/format_greedy": "shows its work, greedy",
}  # fmt: skip
Run = tuple[dict, EventAccumulator]


def points(events: EventAccumulator, tag: str) -> dict[int, float]:
    """Values of a tag by step; none if the run never wrote it."""
    return {e.step: e.value for e in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}


def finish(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.3)


def draw_story(runs: list[Run]) -> Figure:
    """The default task of grpo_llm.py, told by held-out metrics and by samples for three held-out prompts."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes, page = figure.subplots(1, 2, width_ratios=(3, 2))
    for tag, label in STORY.items():
        curves = [curve for _, events in runs if (curve := points(events, tag))]
        steps = sorted(step for step in set.intersection(*map(set, curves)) if step <= 60)  # little happens later
        values = [[curve[step] for curve in curves] for step in steps]
        axes.plot(steps, [sum(row) / len(row) for row in values], label=label, marker=".")
        axes.fill_between(steps, [min(row) for row in values], [max(row) for row in values], alpha=0.2)
    finish(axes, "step (256 sampled answers each)", "share of 256 held-out sums")
    axes.legend(loc="lower right")
    texts = [event.tensor_proto.string_val[0].decode() for event in runs[0][1].Tensors("samples/text_summary")]
    before, after = ([row.split()[:3] for row in text.split("\n\n")] for text in (texts[0], texts[-1]))
    lines = []
    for (prompt, old, old_reward), (_, new, new_reward) in zip(before, after):
        a, b = map(int, prompt.strip("=").split("+"))
        if new_reward == "(1.00)" != old_reward and old == str(a + b - 10):  # the carry was forgotten
            lines.append(f"{prompt}\n  before RL   {old}\n  after RL    {new}\n")
    text = "Sampled answers\n\n" + "\n".join(lines[:3])
    page.text(0, 1, text, family="monospace", fontsize=12, va="top")
    page.axis("off")
    figure.suptitle(f"grpo_llm.py on two-digit addition: mean and range of {len(runs)} seeds")
    return figure


def draw(script: str, task: str, runs: list[Run]) -> Figure | None:
    """One panel for each of the script's tags that a run has, one line per run."""
    tags = {tag: y for tag, y in CURVES[script].items() if any(points(events, tag) for _, events in runs)}
    if all(points(events, "eval/reward") == points(events, "eval/accuracy") for _, events in runs):
        tags.pop("eval/reward", None)
    if not tags:
        return None
    x = "environment steps" if script in ("maxent_irl", "gail") else "step"
    own = {"seed", "output_dir", "resume", "reward_model_path", "demos", "eval_steps"}  # may differ without a word
    changed = [k for k in runs[0][0] if k not in own and len({str(args.get(k)) for args, _ in runs}) > 1]
    groups = sorted({tuple(str(args.get(k)) for k in changed) for args, _ in runs})
    figure = Figure(figsize=(4 * len(tags), 3.4), layout="constrained")
    for axes, (tag, y) in zip(figure.subplots(1, len(tags), squeeze=False)[0], tags.items()):
        for i, (args, events) in enumerate(runs):
            if curve := points(events, tag):
                values = tuple(str(args.get(k)) for k in changed)
                label = ", ".join(f"{k} {x}" for k, x in zip(changed, values)) if changed else f"seed {args['seed']}"
                style = STYLES[groups.index(values) % 4 if changed else i % 4]
                shade = 1 - 0.3 * (i % 3)
                axes.plot(*zip(*curve.items()), COLORS[script] + style, linewidth=1, alpha=shade, label=label)
        for name, style in (("expert", "-"), ("bc", "--"), ("random", ":")) if tag == "eval/return" else ():
            values = [[*curve.values()][-1] for _, events in runs if (curve := points(events, f"eval/{name}_return"))]
            if values:
                label = {"bc": "behavior cloning"}.get(name, name)
                axes.axhline(sum(values) / len(values), color="black", linewidth=1, linestyle=style, label=label)
        starts = [points(events, tag).get(0) for _, events in runs]
        if script in ("ppo_llm", "dpo") and tag == "eval/accuracy" and None not in starts:
            axes.axhline(sum(starts) / len(starts), color="black", linewidth=1, linestyle=":", label="supervised model")
        finish(axes, x, y)
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize="small")
    figure.suptitle(f"{script}.py on {task}")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("curves"), help="folder of the pictures")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pictures = defaultdict(list)
    for folder in options.folders:
        if not (folder / "args.json").is_file():
            print(f"left out: {folder} is not a run folder")
            continue
        saved = json.loads((folder / "args.json").read_text())
        # Since 0.3: {"version": "grpo_llm.py 0.3.0", "args": ...}; before: {"script": "grpo_llm.py", "args": ...}
        script, args = Path((saved.get("script") or saved["version"]).split()[0]).stem, saved["args"]
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
        events.Reload()
        task = (args["env_id"] or "cat-grid") if "env_id" in args else Path(args["dataset_name"] or "addition").stem
        if args.get("reward_model_path"):
            task += " with a reward model"
        if args["exp_name"] != script:
            task += f", {args['exp_name']}"
        pictures[script, task].append((args, events))
    for (script, task), runs in pictures.items():
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in f"{script}_{task}".removesuffix("_addition"))
        path = options.output / f"{name}.png"
        maps = [events.Images(tag) for _, events in runs for tag in events.Tags()["images"] if tag == "maps/sampled"]
        story = name == "grpo_llm" and all(len(points(events, tag)) > 1 for tag in STORY for _, events in runs)
        figure = draw_story(runs) if story else draw(script, task, runs)
        if maps:
            path.write_bytes(maps[-1][-1].encoded_image_string)
        elif figure is not None:
            figure.savefig(path, dpi=110)
        print(path if maps or figure is not None else f"left out: {script}.py on {task} has no curves yet")


if __name__ == "__main__":
    main()
