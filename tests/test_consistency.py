"""What holds across the scripts: they share no module, and still do not drift apart."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest
from conftest import ROOT, SCRIPTS, run_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# In the form of version 0.3. The other language-model scripts will follow; until then their shared functions differ.
NEW_FORM = ("grpo_llm", "dpo", "reward_model")
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
GLOSSARY = (ROOT / "tests" / "README.md").read_text()
# Flags of a run of seconds that writes every tag of its script.
TINY = {
    "grpo_llm": {
        "sft_steps": 1, "max_steps": 1, "generation_batch_size": 8, "num_generations": 4, "max_completion_length": 8,
        "max_eval_samples": 4, "beta": 0.1,
    },
    "ppo_llm": {
        "sft_steps": 1, "max_steps": 1, "generation_batch_size": 8, "max_completion_length": 8, "max_eval_samples": 4,
    },
    "dpo": {"sft_steps": 40, "max_steps": 1, "max_eval_samples": 4},  # some answers must be right
    "reward_model": {"sft_steps": 1, "max_steps": 1, "max_eval_samples": 4},
    "maxent_irl": {"max_steps": 1, "exact_steps": 1},
    "gail": {"constant_action": 0, "total_timesteps": 1, "bc_epochs": 1},
}  # fmt: skip
# A second one, where one run does not write them all.
TINY_TOO = {
    "maxent_irl": {
        "env_id": "CartPole-v1", "horizon": 20, "max_steps": 1, "expert_steps": 1, "num_trajectories": 2,
        "num_demos": 2, "eval_episodes": 2,
    },
}  # fmt: skip


def top_level(source: str) -> dict[str, str]:
    """Source of each function, class and constant, with its decorators and with the comments above and inside it."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        else:
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while lines[first - 1].startswith("#") and not lines[first - 1].startswith("# ----"):
            first -= 1
        for name in names:
            found[name] = "\n".join(lines[first : node.end_lineno])
    return found


def test_the_same_name_has_the_same_source():
    seen: dict[tuple[bool, str], tuple[str, str]] = {}
    for script in SCRIPTS:
        for name, source in top_level(SOURCES[script]).items():
            if name not in ("Args", "main", "VERSION", "evaluate", "check_args"):  # each script has its own
                other, expected = seen.setdefault((script in NEW_FORM, name), (script, source))
                assert source == expected, f"{name} differs between {other}.py and {script}.py"
        assert {"Args", "main"} <= set(top_level(SOURCES[script]))


@pytest.mark.parametrize("title", ["common to all scripts", "common to the language-model scripts"])
def test_the_common_flags_are_the_same(title):
    blocks = {True: {}, False: {}}
    for script, source in SOURCES.items():
        block = re.search(rf"    # ---- {title}\n(.*?)\n    # ----", source, re.DOTALL)
        if block is not None:
            blocks[script in NEW_FORM][script] = block.group(1).replace(f'"{script}"', "Path(__file__).stem")
    assert len(blocks[True]) == 3
    assert len(set(blocks[True].values())) == len(set(blocks[False].values())) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_documented(script):
    tree = ast.parse(SOURCES[script])
    (definition,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args")
    read = {
        node.attr
        for part in tree.body if part is not definition
        for node in ast.walk(part)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }  # fmt: skip
    for flag in definition.body[1:]:  # after the docstring
        above, line = SOURCES[script].splitlines()[flag.lineno - 2 : flag.lineno]
        text = line.partition("  # ")[2] or above.partition("    # ")[2]
        assert len(text) > 10, f"--{flag.target.id} has no help text"
        assert flag.target.id in read, f"no line of {script}.py reads --{flag.target.id}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script):
    command = [sys.executable, ROOT / f"{script}.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    for flag in fields(import_module(script).Args):
        assert f"--{flag.name.replace('_', '-')}" in shown.stdout


@pytest.mark.parametrize("script", NEW_FORM)
def test_runs_of_other_scripts_and_versions_are_refused(script, tmp_path):
    module = import_module(script)
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    for saved in ({"script": f"{script}.py", "args": {}}, {"version": "ppo_llm.py 0.3.0", "args": {"nonsense": 1}}):
        (tmp_path / "args.json").write_text(json.dumps(saved))
        with pytest.raises(module.UserError, match=f"is no run of {script}.py 0.3.0"):
            module.main(module.Args(resume=str(tmp_path)))
    with pytest.raises(module.UserError, match="leave out .'seed'"):
        module.main(module.Args(resume=str(tmp_path), seed=5))


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in NEW_FORM])
def test_only_runs_of_the_script_itself_are_resumed(script, tmp_path):
    module, other = import_module(script), SCRIPTS[SCRIPTS.index(script) - 1]
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    (tmp_path / "args.json").write_text(json.dumps({"script": f"{other}.py", "args": {"nonsense": 1}}))
    with pytest.raises(ValueError, match=f"use {other}.py and no other flags"):
        module.main(module.Args(resume=str(tmp_path)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_has_no_side_effects(script, tmp_path):
    code = "import os, sys, gymnasium, torch.utils.tensorboard;"  # these set variables of the environment themselves
    code += "from transformers import AutoModelForCausalLM, LlamaConfig;"
    code += "sys.argv = ['x', '--nonsense'];"
    code += f"before = dict(os.environ); import {script}; assert dict(os.environ) == before;"
    code += "import torch; assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_nothing_of_one_another(script):
    for node in ast.walk(ast.parse(SOURCES[script])):
        names = (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in getattr(node, "names", []) if isinstance(node, ast.Import)]
        )
        assert not set(names) & set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_pep_723_header_has_the_pins_of_requirements_txt(script):
    pins = set((ROOT / "requirements.txt").read_text().split())
    header = re.search(r"# /// script\n(.*?)# ///\n", SOURCES[script], re.DOTALL).group(1)
    assert 'requires-python = ">=3.10"' in header
    needed = set(re.findall(r'"([\w\[\]-]+==[^"]+)"', header))
    assert needed and needed <= pins


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_glossary_explains_exactly_the_tags_that_are_written(script, tmp_path, monkeypatch):
    module, written = import_module(script), set()
    if script == "dpo":  # which samples 32 answers to each sum
        train, held_out = module.addition_rows()
        monkeypatch.setattr(module, "addition_rows", lambda: (train[:300], held_out[:60]))
    fp32 = {"bf16": False} if "bf16" in SOURCES[script] else {}
    for run, flags in enumerate([TINY[script], *([TINY_TOO[script]] if script in TINY_TOO else [])]):
        folder = str(tmp_path / str(run))
        module.main(module.Args(**flags, **fp32, output_dir=folder, device="cpu"))
        events = EventAccumulator(str(run_folder(module.Args(output_dir=folder))))
        events.Reload()
        written |= {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
        written |= {*events.Tags()["scalars"], *events.Tags()["images"]}
    written -= {"custom_scalars__config__"}  # says which tags TensorBoard draws in one chart
    section = GLOSSARY.split("## Tags")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \|(.+?)\|", section, re.MULTILINE)
    explained = {
        tag for tags, scripts in rows if script in scripts or "all" in scripts for tag in re.findall(r"`([^`]+)`", tags)
    }
    # A tag with <reward> in it stands for one tag a reward function, one with <estimator> for two.
    estimators = {"exact", "sampled"}
    explained = {
        tag.replace("<estimator>", name) for tag in explained for name in (estimators if "<estimator>" in tag else [""])
    }
    rewards = getattr(module, "REWARDS", ())
    rewards = list(rewards) if isinstance(rewards, dict) else [function.__name__ for function, _ in rewards]
    expanded = {
        tag.replace("<reward>", name.removesuffix("_reward") if tag.startswith("eval/") else name)
        for tag in explained
        for name in (rewards if "<reward>" in tag else [""])
    }
    expanded = {tag.replace("<k>", str(getattr(module.Args(), "eval_generations", ""))) for tag in expanded}
    assert written == expanded
