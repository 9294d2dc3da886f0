"""--lora-r: adapters are trained and saved, and nothing else changes."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import MORE_SUMS, run_folder, scalars, tiny_flags, weights, with_digit_reward, write_rows
from safetensors.torch import load_file
from test_distributed import run_processes
from transformers import AutoModelForCausalLM

import dpo
import grpo_llm
from grpo_llm import Args, add_adapters, load_model, make_batch, reference_logprobs


@pytest.fixture
def run(tmp_path, model_folder, monkeypatch):
    """Does a tiny run with adapters. Returns its folder."""
    monkeypatch.setattr(grpo_llm, "REWARDS", with_digit_reward("grpo_llm"))

    def run(name="runs", script=grpo_llm, **flags):
        flags = {**tiny_flags(script.__name__, tmp_path, model_folder), "lora_r": 4, **flags}
        args = script.Args(**{**flags, "output_dir": str(tmp_path / name)})
        script.main(args)
        return run_folder(args)

    return run


@pytest.mark.parametrize("script", [grpo_llm, dpo])
def test_a_few_steps_move_the_adapters_and_nothing_else(script, run, model_folder, monkeypatch):
    models = []
    real = script.load_model
    monkeypatch.setattr(script, "load_model", lambda *args: models.append(real(*args)) or models[-1])
    folder = run(script=script, max_steps=3)
    ((model, _),) = models  # the reference is the policy without its adapters
    before = load_file(f"{model_folder}/model.safetensors")
    base = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora" not in name}
    assert all(torch.equal(base[name], value) for name, value in before.items())
    adapters = {name: p for name, p in model.named_parameters() if "lora" in name}
    assert len(adapters) == 2 * 2 * 7 and all(p.requires_grad and p.dtype == torch.float32 for p in adapters.values())
    assert all(p.abs().max() > 0 for name, p in adapters.items() if "lora_B" in name)  # zero at first
    assert set(torch.load(folder / "checkpoint.pt", weights_only=True)["trained"]) == set(adapters)
    assert not any("lm_head" in name for name in adapters)
    assert {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_alpha")} == {2}


def test_the_reference_is_the_untouched_base(run, model_folder):
    folder = run(beta=0.5, learning_rate=3e-2, max_steps=4)
    kl = [value for _, value in scalars(folder)["train/kl"]]
    assert abs(kl[0]) < 1e-6 and min(kl[1:]) > 1e-5
    args = Args(lora_r=4)
    model, _ = load_model(model_folder, args, torch.device("cpu"))
    batch = make_batch([[3, 4], [5]], [[6, 7], [8, 9, 1]], "cpu")
    with torch.no_grad():
        expected = grpo_llm.completion_logprobs(model, batch, 0.7)
        add_adapters(model, args)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
        assert not torch.allclose(grpo_llm.completion_logprobs(model, batch, 0.7), expected, atol=0.01)
        assert torch.equal(reference_logprobs(model, None, batch, 0.7), expected)
        assert not torch.allclose(grpo_llm.completion_logprobs(model, batch, 0.7), expected, atol=0.01)


def test_dpo_starts_at_the_base_and_ends_with_adapters_that_it_scored(run, model_folder):
    folder = run(script=dpo, max_steps=6, learning_rate=3e-2)
    losses = [value for _, value in scalars(folder)["train/loss"]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.6
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = torch.tensor([[3, 4, 5]])
    assert not torch.allclose(model(ids).logits, base(ids).logits, atol=1e-3)


@pytest.mark.parametrize("script", [grpo_llm, dpo])
def test_resume_is_bit_equal(script, run, tmp_path, monkeypatch):
    whole, save = run("whole", script=script, max_steps=4), torch.save
    monkeypatch.setattr(torch, "save", lambda state, path: 1 / 0 if state["step"] == 4 else save(state, path))
    with pytest.raises(ZeroDivisionError):
        run("cut", script=script, max_steps=4)
    monkeypatch.setattr(torch, "save", save)
    cut = run_folder(Args(output_dir=str(tmp_path / "cut")))
    script.main(script.Args(resume=str(cut)))
    one, other = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (whole, cut))
    assert one and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("script", ["grpo_llm", "dpo"])
def test_two_processes_equal_one(script, model_folder, tmp_path):
    flags = {**tiny_flags(script, tmp_path, model_folder), "max_steps": 3, "learning_rate": 1e-2, "lora_r": 4}
    if script == "grpo_llm":
        write_rows(tmp_path / "rows.jsonl", MORE_SUMS)
    adapters = []
    for count in (1, 2):
        run_processes(script, {**flags, "output_dir": str(tmp_path / str(count))}, count, tmp_path)
        folder = run_folder(Args(output_dir=str(tmp_path / str(count))))
        adapters.append(load_file(folder / "model" / "adapter_model.safetensors"))
    assert all(torch.allclose(adapters[1][name], x, rtol=0, atol=1e-5) for name, x in adapters[0].items())


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
AutoTokenizer.from_pretrained(sys.argv[1])
print(model(input_ids=torch.tensor([[3, 4, 5]])).logits[0].tolist())
"""


def test_the_saved_folder_loads_elsewhere_and_can_be_merged(run, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(model_folder)
    folder = run(max_steps=3, learning_rate=3e-2, model_name_or_path="base")  # a relative path
    ids = torch.tensor([[3, 4, 5]])
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    expected = model(input_ids=ids).logits[0]
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", LOAD, str(folder / "model")]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    assert not torch.allclose(base(input_ids=ids).logits[0], expected, atol=1e-3)
    with pytest.raises(grpo_llm.UserError, match="merge them first"):
        run(model_name_or_path=str(folder / "model"))


def test_the_default_rate_is_ten_times_the_full_ones(run):
    for flags, rate in (({}, 1e-5), ({"lora_r": 0}, 1e-6)):
        folder = run(str(flags), learning_rate=None, max_steps=1, **flags)
        ((_, value),) = scalars(folder)["charts/learning_rate"]
        assert math.isclose(value, rate, rel_tol=1e-5)
    assert weights(folder)
