"""The README's recipes do what they say, in a folder of a newcomer's: the scripts and what the recipe adds."""

import importlib
import json
import re
import shlex
import shutil
import string
import subprocess
import sys
import textwrap

import datasets
import pytest
import torch
from conftest import MORE_SUMS, ROOT, make_tokenizer, save_tiny_model, write_rows
from transformers import AutoModelForSequenceClassification, BertConfig, ByT5Tokenizer

import dpo
import grpo_llm
import reward_model

README = (ROOT / "README.md").read_text()
ROLLOUT = "--max-steps 1 --generation-batch-size 8 --max-completion-length 8 --max-eval-samples 8"
SMALL = {  # what makes a recipe's command a matter of seconds
    "gail.py": "--total-timesteps 300 --expert-timesteps 300 --bc-epochs 1 --eval-episodes 2 --num-envs 2",
    "my_reward.py": f"--sft-steps 1 {ROLLOUT}",
    "grpo_llm.py": ROLLOUT,
}


def test_the_recipes_run(tmp_path):
    """Each is at most eleven lines of Python, or a few functions of a few lines."""
    model_folder = save_tiny_model(tmp_path / "model", string.digits + string.ascii_letters + " ?+-=.")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    section = README.split("## Recipes")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    assert [language for language, _ in blocks].count("bash") == 3
    for language, text in blocks:
        if language == "python":
            name, code = re.fullmatch(r"# (\w+\.py)\n(.*)", text, re.DOTALL).groups()
            lines = [line for line in code.splitlines() if line]
            assert len(lines) / max(1, sum(line.startswith("def ") for line in lines)) <= 11
            (tmp_path / name).write_text(code)
            continue
        for command in text.strip().splitlines():
            python, script, *words = shlex.split(command, comments=True)
            words = [model_folder if word.startswith("Qwen/") else word for word in words]
            words += SMALL.get(script, "").split()
            call = [sys.executable, script, *words]
            done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert python == "python" and done.returncode == 0, done.stderr[-2000:]
            if script not in ("my_preferences.py", "my_demos.py"):
                folder = tmp_path / done.stdout.splitlines()[-1]
                assert (folder / "summary.json").is_file()
                if script == "my_reward.py":
                    assert "eval/short" in (folder / "summary.json").read_text() and "__my_reward__" in folder.name
                    subprocess.run([sys.executable, script, "--resume", folder], cwd=tmp_path, timeout=300, check=True)


def python_block(name: str) -> str:
    (code,) = re.findall(rf"```python\n *# {name}\n(.*?)```", README, re.DOTALL)
    return textwrap.dedent(code)


def test_a_reward_model_is_a_reward_function(tmp_path):
    model_folder = save_tiny_model(tmp_path / "model")
    shutil.copy(ROOT / "grpo_llm.py", tmp_path)
    (tmp_path / "my_judge.py").write_text(python_block("my_judge.py"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_labels=1
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "judge")
    make_tokenizer().save_pretrained(tmp_path / "judge")
    write_rows(tmp_path / "rows.jsonl", MORE_SUMS)
    words = f"--model-name-or-path {model_folder} --dataset-name rows.jsonl {ROLLOUT}".split()
    command = [sys.executable, "my_judge.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / done.stdout.splitlines()[-1] / "summary.json").read_text())
    assert summary["eval/reward"] == summary["eval/judge"] != 0 and "eval/accuracy" not in summary


def test_formulas_are_compared_by_math_verify(tmp_path):
    pytest.importorskip("trl.rewards")
    pytest.importorskip("math_verify")
    model_folder = save_tiny_model(tmp_path / "model", string.printable)
    shutil.copy(ROOT / "grpo_llm.py", tmp_path)
    (tmp_path / "my_formulas.py").write_text(python_block("my_formulas.py"))
    rows = [{"problem": f"What is 1/{n}?", "solution": f"$\\frac{{1}}{{{n}}}$"} for n in range(40)]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = f"--model-name-or-path {model_folder} --dataset-name rows.jsonl {ROLLOUT}".split()
    command = [sys.executable, "my_formulas.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


FOREIGN = {  # rows as these data sets have them, and the prompt that must be read
    "anthropic_hh": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: And?\n\nAssistant: Good.",
         "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: And?\n\nAssistant: Bad."}, "user:Hi|assistant:Yes?|user:And?|"),
    "orca": ({"system": "Be brief.", "question": "And?", "chosen": "Good.", "rejected": "Bad."}, "user:Be brief.\nAnd?|"),
    "ultra_interact": (
        {"trajectory": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yes?"},
                        {"from": "user", "value": "And?"}], "chosen": "Good.", "rejected": "Bad."},
        "user:Hi|assistant:Yes?|user:And?|"),
    "llama_factory": ({"instruction": "And?", "input": "", "chosen": "Good.", "rejected": "Bad."}, "user:And?|"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_preferences_in_other_columns_are_read_after_their_recipe(name, tmp_path, monkeypatch):
    (tmp_path / "my_preferences.py").write_text(python_block("my_preferences.py"))
    monkeypatch.syspath_prepend(tmp_path)
    recipe = getattr(importlib.import_module("my_preferences"), name)
    row, prompt = FOREIGN[name]
    rows = datasets.Dataset.from_list([row] * 3).map(recipe).to_list()
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '|' }}{% endfor %}"
    dpo.check_columns(rows, ("prompt", "chosen", "rejected"), rank=0)
    for pair in dpo.make_pairs(rows, tokenizer, 999, "01 Dec 2026", rank=0):
        texts = [tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
        assert texts == [prompt, "assistant:Good.|", "assistant:Bad.|"]
    (ranking, *_) = reward_model.make_rankings(rows, tokenizer, 999, "01 Dec 2026", rank=0)
    assert tokenizer.decode(ranking.answers[1]) == prompt + "assistant:Bad.|"


def test_merged_adapters_are_a_model(tmp_path):
    model_folder = save_tiny_model(tmp_path / "model")
    (tmp_path / "merge.py").write_text(python_block("merge.py"))
    args = grpo_llm.Args(lora_r=2)
    model, tokenizer = grpo_llm.load_model(model_folder, args, torch.device("cpu"))
    grpo_llm.add_adapters(model, args)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    model.save_pretrained(tmp_path / "adapters")
    tokenizer.save_pretrained(tmp_path / "adapters")
    command = [sys.executable, "merge.py", "adapters", "merged"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    merged, _ = grpo_llm.load_model(str(tmp_path / "merged"), grpo_llm.Args(), torch.device("cpu"))
    ids = torch.tensor([[3, 4, 5]])
    assert torch.allclose(merged(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-4)


SHOWN = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv
class Shown(CartPoleEnv):  # draws nothing, as pygame may be absent
    def step(self, action):
        print(self.render_mode)
        return super().step(action)
gymnasium.register("Shown-v0", Shown, max_episode_steps=500)
"""


def test_a_saved_policy_is_watched_as_the_readme_says(tmp_path):
    """In the environment of its args.json, drawn as asked for."""
    (tmp_path / "shown.py").write_text(SHOWN)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    section = README.split("## What a run leaves")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n# watch.py\n(.*?)```", section, re.DOTALL)
    (tmp_path / "watch.py").write_text(code)
    words = [*SMALL["gail.py"].split(), "--constant-action", "0", "--env-id", "shown:Shown-v0"]

    def lines(*command: str) -> list[str]:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    folder = lines("gail.py", *words)[-1]
    *shown, steps = lines("watch.py", folder, "rgb_array")
    assert shown == ["rgb_array"] * int(steps) and 1 <= int(steps) <= 500
    assert {*lines("watch.py", folder)[:-1]} == {"None"}
