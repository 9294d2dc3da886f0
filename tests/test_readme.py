"""The README's recipes do what they say, in a folder of a newcomer's: the scripts and what the recipe adds."""

import re
import shlex
import shutil
import string
import subprocess
import sys

from conftest import ROOT, save_tiny_model

README = (ROOT / "README.md").read_text()
ROLLOUT = "--max-steps 1 --generation-batch-size 8 --max-completion-length 8 --max-eval-samples 8"
SMALL = {  # what makes a recipe's command a matter of seconds
    "gail.py": "--total-timesteps 300 --expert-timesteps 300 --bc-epochs 1 --eval-episodes 2 --num-envs 2",
    "my_reward.py": f"--sft-steps 1 {ROLLOUT}",
    "grpo_llm.py": ROLLOUT,
}


def test_the_recipes_run(tmp_path):
    """Each is at most ten lines of Python."""
    model_folder = save_tiny_model(tmp_path / "model", string.digits + string.ascii_letters + " ?+-=.")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    section = README.split("## Recipes")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "bash"] * 4
    for language, text in blocks:
        if language == "python":
            name, code = re.fullmatch(r"# (\w+\.py)\n(.*)", text, re.DOTALL).groups()
            assert len([line for line in code.splitlines() if line]) <= 10
            (tmp_path / name).write_text(code)
            continue
        for command in text.strip().splitlines():
            python, script, *words = shlex.split(command, comments=True)
            words = [model_folder if word.startswith("Qwen/") else word for word in words]
            words += SMALL.get(script, "").split()
            call = [sys.executable, script, *words]
            done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert python == "python" and done.returncode == 0, done.stderr[-2000:]
            if script not in ("my_data.py", "my_demos.py"):
                folder = tmp_path / done.stdout.splitlines()[-1]
                assert (folder / "summary.json").is_file()
                if script == "my_reward.py":
                    assert "eval/work" in (folder / "summary.json").read_text() and "__my_reward__" in folder.name
                    subprocess.run([sys.executable, script, "--resume", folder], cwd=tmp_path, timeout=300, check=True)


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
