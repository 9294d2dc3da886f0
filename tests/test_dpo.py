"""dpo.py: losses and log-probabilities; then whole runs on a tiny model, checked by hand and by what they leave."""

import gc
import json
import math
import random
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    PAIRS, make_model, make_tokenizer, run_folder, save_tiny_model, scalars, tiny_flags, weights, write_rows,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GraniteConfig, MistralConfig

import dpo
from dpo import Args, UserError, dpo_loss, main, make_pairs, pair_logps

TEST = PAIRS[24:30]
FROZEN = 1e-12  # a learning rate that changes no weight by more than rounding
DATE = "01 Dec 2026"
load = AutoModelForCausalLM.from_pretrained


def row_of(chosen, rejected, prompt) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def pairs_of(rows, max_length=128):
    return make_pairs(rows, make_tokenizer(), max_length, DATE, rank=0)


# ---- losses

CHOSEN, REJECTED = torch.tensor([-2.0, -5.0, -1.0]), torch.tensor([-4.0, -3.0, -1.5])
REF_CHOSEN, REF_REJECTED = torch.tensor([-3.0, -4.0, -1.0]), torch.tensor([-3.5, -3.5, -1.0])
H = [0.1 * ((-2 + 3) - (-4 + 3.5)), 0.1 * ((-5 + 4) - (-3 + 3.5)), 0.1 * ((-1 + 1) - (-1.5 + 1))]

def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("loss_type, smoothing, by_hand", [
    ("sigmoid", 0.0, lambda h: -math.log(sigmoid(h))),
    ("sigmoid_norm", 0.0, lambda h: -math.log(sigmoid(h))),
    ("sigmoid", 0.2, lambda h: -0.8 * math.log(sigmoid(h)) - 0.2 * math.log(sigmoid(-h))),
    ("robust", 0.2, lambda h: (-0.8 * math.log(sigmoid(h)) + 0.2 * math.log(sigmoid(-h))) / 0.6),
    ("hinge", 0.0, lambda h: max(0.0, 1 - h)),
    ("ipo", 0.0, lambda h: (h / 0.1 - 1 / 0.2) ** 2),
])  # fmt: skip
def test_losses_by_hand(loss_type, smoothing, by_hand):
    losses, chosen, rejected = dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.1, loss_type, smoothing)
    assert losses.tolist() == pytest.approx([by_hand(h) for h in H], rel=1e-5)
    assert chosen.tolist() == pytest.approx([0.1, -0.1, 0.0], abs=1e-7)
    assert rejected.tolist() == pytest.approx([-0.05, 0.05, -0.05], abs=1e-7)


def test_losses_against_other_formulas():
    c, r, ref_c, ref_r = torch.randn(4, 50, dtype=torch.float64)
    strengths = [(x - ref).exp() ** 0.7 for x, ref in ((c, ref_c), (r, ref_r))]  # Bradley-Terry
    clean = dpo_loss(c, r, ref_c, ref_r, 0.7, "sigmoid", 0.0)[0]
    assert torch.allclose(clean.neg().exp(), strengths[0] / sum(strengths))
    flips = [dpo_loss(*logps, 0.7, "robust", 0.3)[0] for logps in ((c, r, ref_c, ref_r), (r, c, ref_r, ref_c))]
    assert torch.allclose(0.7 * flips[0] + 0.3 * flips[1], clean)  # unbiased if 30% of the labels are flipped
    for length in (5, 10):  # IPO: the best gap is 1 / (2 beta), of means whatever the length, of sums it is not
        zeros, gaps = torch.zeros(2), torch.tensor([2.0, 2.0 * length])
        losses = dpo_loss(gaps, zeros, zeros, zeros, 0.25, "ipo", 0.0)[0]
        assert losses.tolist() == pytest.approx([0.0, (2.0 * length - 2.0) ** 2])
        lengths = torch.tensor([1.0, length])
        means = dpo_loss(gaps, zeros, zeros, zeros, 0.25, "ipo", 0.0, chosen_lengths=lengths, rejected_lengths=lengths)
        assert means[0].tolist() == pytest.approx([0.0, 0.0])


def test_lengths_divide_each_answer_by_its_own_and_only_in_ipo_and_sigmoid_norm():
    lengths = {"chosen_lengths": torch.tensor([2.0, 5, 1]), "rejected_lengths": torch.tensor([4.0, 1, 3])}
    for loss_type in ("ipo", "sigmoid_norm", "sigmoid", "hinge", "robust"):
        found = dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.5, loss_type, 0.0, **lengths)
        is_mean = loss_type in ("ipo", "sigmoid_norm")
        n, m = lengths.values() if is_mean else (1, 1)
        scaled = (CHOSEN / n, REJECTED / m, REF_CHOSEN / n, REF_REJECTED / m)
        assert torch.allclose(found[0], dpo_loss(*scaled, 0.5, loss_type, 0.0)[0])
        whole = 0.5 * (CHOSEN - REF_CHOSEN), 0.5 * (REJECTED - REF_REJECTED)  # rewards are of sums, as TRL's
        assert torch.allclose(found[1], whole[0]) and torch.allclose(found[2], whole[1])


def test_rpo_adds_the_chosen_answers_negative_logprob_per_token_and_unknown_names_raise():
    same = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.1)
    lengths = {"chosen_lengths": torch.tensor([2.0, 5, 1]), "rejected_lengths": torch.tensor([4.0, 1, 3])}
    added = dpo_loss(*same, "sigmoid", rpo_alpha=0.5, **lengths)[0] - dpo_loss(*same, "sigmoid")[0]
    assert added.tolist() == pytest.approx([0.5, 0.5, 0.5])  # 0.5 x (2/2, 5/5, 1/1)
    with pytest.raises(ValueError, match="unknown loss_type 'dpo'"):
        dpo_loss(*same, "dpo")


# ---- log-probabilities


def naive_logps(model, pair) -> list:
    """Sums over an answer's tokens, one sequence at a time, without padding or a mask, from whole logits."""
    sums = []
    for answer in (pair.chosen_ids, pair.rejected_ids):
        ids = torch.tensor(pair.prompt_ids + answer)
        logprobs = model(input_ids=ids[None]).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
        sums.append(logprobs.gather(1, ids[len(pair.prompt_ids) :, None]).sum())
    return sums


SIZE = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "mistral": MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=4),
    "gemma2": Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, sliding_window=4),
    "granite": GraniteConfig(**SIZE, logits_scaling=0.1),
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2", "granite"])
def test_pair_logps_are_the_naive_sums_of_the_models_own_logits(architecture):
    torch.manual_seed(0)
    if architecture in CONFIGS:  # windows, caps, scales
        model = AutoModelForCausalLM.from_config(CONFIGS[architecture]).eval()
    else:
        model = make_model(architecture)
    pairs = pairs_of([row_of("2", "345", "1+1="), row_of("24", "2", "12+12="), row_of("12" * 40, "4" * 30, "3")])
    args = Args(bf16=False)
    with torch.no_grad():
        expected = torch.tensor([naive_logps(model, pair) for pair in pairs])
        logps, lengths = pair_logps(args, model, pairs)
        assert torch.allclose(logps, expected, atol=1e-3)
        assert lengths.tolist() == [[2, 4], [3, 2], [81, 31]]


# ---- whole runs


@pytest.fixture
def run(tmp_path, model_folder):
    """Does a tiny run. Returns its metrics, its tags' values, its folder and Args."""

    def run(train=PAIRS[:24], test=TEST, folder=None, **flags):
        folder = folder or tmp_path / str(len([*tmp_path.iterdir()]))
        (folder / "data").mkdir(parents=True, exist_ok=True)
        write_rows(folder / "data" / "train.jsonl", train)
        if test:
            write_rows(folder / "data" / "test.jsonl", test)
        args = Args(**{**tiny_flags("dpo", folder, model_folder), "dataset_name": str(folder / "data"), **flags})
        metrics = main(args)
        tags = {tag: [value for _, value in points] for tag, points in scalars(Path(run_folder(args))).items()}
        return SimpleNamespace(metrics=metrics, tags=tags, folder=run_folder(args), args=args)

    return run


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reference")
    make_model("llama", seed=5, scale=0.1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def figures(model, reference, rows, args):
    """Mean loss, its gradient's norm and means of the other logged values, one pair at a time in plain Python."""
    found, total, beta = [], 0.0, 0.1 if args.beta is None else args.beta
    for pair in pairs_of(rows, args.max_length):
        (c, r), (ref_c, ref_r) = naive_logps(model, pair), (x.item() for x in naive_logps(reference, pair))
        is_mean = args.loss_type in ("ipo", "sigmoid_norm")
        n, m = (len(ids) if is_mean else 1 for ids in (pair.chosen_ids, pair.rejected_ids))
        h, e = beta * ((c - ref_c) / n - (r - ref_r) / m), args.label_smoothing
        right, wrong = (1 + (-h).exp()).log(), (1 + h.exp()).log()
        loss = {
            "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e), "hinge": (1 - h).clamp(min=0),
            "ipo": (h / beta - 0.5 / beta) ** 2,
        }.get(args.loss_type, (1 - e) * right + e * wrong)  # fmt: skip
        total = total + (loss - args.rpo_alpha * c / len(pair.chosen_ids)) / len(rows)
        chosen, rejected = beta * (c - ref_c), beta * (r - ref_r)
        tie = 0.5 if abs(chosen - rejected) < 1e-5 else float(chosen > rejected)
        found.append([chosen.item(), rejected.item(), (chosen - rejected).item(), tie, c.item(), r.item()])
    gradient = torch.autograd.grad(total, list(model.parameters()))
    names = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    names += ["logps/chosen", "logps/rejected"]
    means = dict(zip(names, torch.tensor(found).mean(0).tolist()))
    return {"loss": total.item(), **means}, torch.stack([g.norm() for g in gradient]).norm().item()


@pytest.mark.parametrize("flags", [
    {"beta": 0.5, "micro_batch_size": 5}, {"loss_type": "ipo", "micro_batch_size": 3, "beta": 0.7},
    {"loss_type": "hinge", "gradient_checkpointing": True, "beta": 2.}, {"loss_type": "robust", "label_smoothing": 0.1},
    {"label_smoothing": 0.2, "micro_batch_size": 1}, {"rpo_alpha": 0.7, "micro_batch_size": 99},
    {"loss_type": "sigmoid_norm", "beta": 3.0, "label_smoothing": 0.1, "rpo_alpha": 0.3}, {"max_length": 5},
])  # fmt: skip
def test_what_a_step_and_an_evaluation_log_is_computed_by_hand(run, model_folder, reference_folder, flags):
    flags |= {"ref_model_name_or_path": reference_folder, "train_batch_size": 24, "max_steps": 2}
    result = run(learning_rate=FROZEN, **flags)
    model, reference = load(model_folder), load(reference_folder)
    expected, grad_norm = figures(model, reference, PAIRS[:24], result.args)
    for tag, value in {**expected, "grad_norm": grad_norm}.items():
        assert result.tags[f"train/{tag}"] == pytest.approx([value] * 2, rel=1e-3, abs=1e-5), tag
    for tag, value in figures(model, reference, TEST, result.args)[0].items():
        for name in (f"eval/{tag}_before", f"eval/{tag}"):
            assert result.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_run_learns_against_its_initial_model_and_leaves_what_it_says(run, model_folder, capsys):
    result = run(max_steps=20, learning_rate=1e-3, eval_steps=8)
    assert capsys.readouterr().out.splitlines()[-1] == str(result.folder)
    assert json.loads((result.folder / "summary.json").read_text()) == result.metrics
    assert result.metrics["eval/loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.tags["eval/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert result.tags["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert result.metrics["eval/rewards/accuracies_before"] == result.tags["train/rewards/accuracies"][0] == 0.5
    assert result.metrics["eval/rewards/accuracies"] > 0.9 and result.metrics["eval/rewards/margins"] > 0.2
    assert [step for step, _ in scalars(result.folder)["eval/loss"]] == [0, 8, 16, 20]
    assert [step for step, _ in scalars(result.folder)["train/loss"]] == [*range(1, 21)]
    expected, _ = figures(load(result.folder / "model"), load(model_folder), TEST, result.args)
    for name, value in expected.items():
        assert result.metrics[f"eval/{name}"] == pytest.approx(value, rel=1e-3), name
    AutoTokenizer.from_pretrained(result.folder / "model")
    frozen = run(max_steps=20, learning_rate=FROZEN)
    assert abs(frozen.metrics["eval/rewards/margins"]) < 1e-4 and frozen.metrics["eval/rewards/accuracies"] == 0.5


def test_the_learning_rate_follows_its_schedule_and_is_the_one_applied(run, model_folder):
    rates = run(warmup_steps=2, max_steps=5, learning_rate=3e-3).tags["charts/learning_rate"]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 2e-3, 1e-3], abs=1e-9)
    for max_grad_norm, expected in ((1e6, 5e-3), (1e-12, 0.0)):  # Adam's first step is the learning rate
        result = run(max_steps=1, warmup_steps=1, max_grad_norm=max_grad_norm)
        before, after = load(model_folder).state_dict(), weights(result.folder)
        change = max((before[name] - value).abs().max().item() for name, value in after.items())
        assert change == pytest.approx(expected, rel=1e-2, abs=1e-5)


def test_an_epoch_visits_each_pair_once_in_the_seeds_order(run):
    flags = {"max_steps": None, "num_train_epochs": 1.5, "train_batch_size": 4, "learning_rate": FROZEN}
    first, again, other = (run(seed=seed, **flags).tags["train/logps/chosen"] for seed in (1, 1, 2))
    epochs = run(max_steps=3, train_batch_size=12, learning_rate=FROZEN).tags["train/epoch"]
    assert epochs == [0.5, 1.0, 1.5]
    whole = run(max_steps=1, train_batch_size=24, learning_rate=FROZEN).tags["train/logps/chosen"][0]
    for logps in (first, other):
        assert len(logps) == 9 and sum(logps[:6]) / 6 == pytest.approx(whole, rel=1e-5) and logps[6:] != logps[:3]
    assert first == again and first[:3] != other[:3]


def test_the_reference_is_gone_when_training_starts_and_is_never_a_stale_one(tmp_path, monkeypatch):
    reference, loaded, alive = save_tiny_model(tmp_path / "reference"), [], []
    other = tmp_path / "other"
    make_model("llama", seed=5, scale=0.1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    real_load, real_trange = dpo.load_model, dpo.trange

    def load_model(*args, **flag):
        pair = real_load(*args, **flag)
        loaded.append(weakref.ref(pair[0]))
        return pair

    def trange(*args, **kwargs):
        gc.collect()
        alive.append([model() is not None for model in loaded])
        return real_trange(*args, **kwargs)

    for function in (load_model, trange):
        monkeypatch.setattr(dpo, function.__name__, function)

    def loss_before(number: int, **more) -> float:
        flags = {**tiny_flags("dpo", tmp_path, reference), "exp_name": str(number), "max_steps": 1, **more}
        loaded.clear()
        return main(Args(**flags))["eval/loss_before"]

    ln2 = pytest.approx(math.log(2), abs=1e-6)
    assert loss_before(0) == ln2 and alive[-1] == [True]  # the policy alone
    assert loss_before(1, ref_model_name_or_path=str(other)) != ln2 and alive[-1] == [True, False]
    file = Path(reference) / "model.safetensors"  # other weights, in place
    save_file({name: 1.1 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert loss_before(2) == ln2


def test_only_the_pairs_that_some_step_uses_are_read_by_the_reference(run, monkeypatch):
    seen, real = [], dpo.pair_logps
    monkeypatch.setattr(dpo, "pair_logps", lambda args, model, pairs: seen.append(len(pairs)) or real(args, model, pairs))
    run(max_steps=2, train_batch_size=4, eval_steps=9, micro_batch_size=1)
    assert sum(seen) == (8 + 6) + 6 + 8 + 6  # reference, evaluation, two steps, evaluation


def test_held_out_rows_share_no_prompt_with_training_over_a_whole_epoch(run, monkeypatch):
    """A prompt that stands twice is on one side, also where the data have a test split with prompts of the first."""
    prompts, real = [], dpo.pair_losses

    def watched(args, model, pairs, ref_logps):
        prompts.append(({pair.prompt for pair in pairs}, torch.is_grad_enabled()))
        return real(args, model, pairs, ref_logps)

    monkeypatch.setattr(dpo, "pair_losses", watched)
    rows = PAIRS + [row_of("9", "8", row["prompt"]) for row in PAIRS]
    for test in (None, rows[10:14]):
        sides = []
        for seed in (1, 2):
            prompts.clear()
            run(rows, test, seed=seed, max_steps=None, num_train_epochs=1, eval_steps=99, train_batch_size=4)
            train = set().union(*(names for names, trains in prompts if trains))
            held_out = set().union(*(names for names, trains in prompts if not trains))
            assert len(held_out) == (3 if test is None else 4) and train == {r["prompt"] for r in PAIRS} - held_out
            sides.append(held_out)
        assert sides[0] == sides[1]


def test_equal_models_tie_also_in_bf16_and_real_differences_do_not(run, model_folder, tmp_path):
    rows = [row_of(f"{a}" * 9, f"{b}" * 40, f"{a}+{b}=") for a in range(6) for b in range(8)]
    for flags in ({"bf16": True}, {"bf16": True, "loss_type": "ipo", "beta": 0.01}, {"beta": 0.01}):
        result = run(rows, rows[:30], train_batch_size=16, micro_batch_size=3, max_steps=2, learning_rate=FROZEN, **flags)
        accuracies = result.tags["eval/rewards/accuracies"] + result.tags["train/rewards/accuracies"]
        assert accuracies == pytest.approx([0.5] * 4, abs=0.04), flags
    learned = run(max_steps=20, learning_rate=1e-3, loss_type="ipo", beta=0.01)
    assert learned.metrics["eval/rewards/accuracies"] > 0.9


def test_resume_with_other_data_is_refused_and_with_another_day_is_not(run, tmp_path, monkeypatch):
    model = save_tiny_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ date_string[1] }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if not add_generation_prompt %}{{ '<eos>' }}{% endif %}"
    )
    tokenizer.save_pretrained(model)
    rows = [{**row, "prompt": row["prompt"] + str(i)} for i, row in enumerate(PAIRS)]
    folder = tmp_path / "first"
    first = run(rows, folder=folder, model_name_or_path=model, max_steps=2)
    before = (first.folder / "model/model.safetensors").read_bytes()
    monkeypatch.setattr(dpo.time, "strftime", lambda form: "29 Feb 2028")
    assert main(Args(resume=str(first.folder)))["eval/loss"] == first.metrics["eval/loss"]
    swapped = [row_of(row["rejected"], row["chosen"], row["prompt"]) for row in rows]
    write_rows(folder / "data" / "train.jsonl", swapped)
    with pytest.raises(UserError, match="--resume .*: its data or its tokenizer have changed"):
        main(Args(resume=str(first.folder)))
    assert (first.folder / "model/model.safetensors").read_bytes() == before


def test_a_run_that_is_cut_off_resumes_bit_equal(run, tmp_path, monkeypatch, reference_folder):
    flags = {"max_steps": 6, "eval_steps": 3, "warmup_steps": 1, "ref_model_name_or_path": reference_folder}
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", PAIRS)
    whole, save = run(dataset_name=str(data), **flags).folder, torch.save
    monkeypatch.setattr(torch, "save", lambda state, path: 1 / 0 if state["step"] == 6 else save(state, path))
    with pytest.raises(ZeroDivisionError):
        run(dataset_name=str(data), output_dir=str(tmp_path / "cut"), **flags)
    monkeypatch.undo()
    (cut,) = (tmp_path / "cut").glob("*")
    main(Args(resume=str(cut)))
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (cut, whole)]
    assert states[0].pop("data_hash") == states[1].pop("data_hash")
    assert states[0].pop("date_string") == states[1].pop("date_string")
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (cut / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert scalars(cut) == scalars(whole)
    shutil.rmtree(tmp_path / "cut")


def test_sample_texts_are_of_held_out_prompts_that_leave_room(run):
    """The model holds 128 positions; an answer takes up to 64."""
    rows = [row_of("2", "3", "1" * n + "+1=") for n in (3, 100, 7)]
    result = run(PAIRS, rows, max_steps=1)
    events = EventAccumulator(str(result.folder))
    events.Reload()
    (first, _) = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
    assert [text[: text.index("=") + 1] for text in first.split("\n\n")] == ["111+1=", "1111111+1="]


# ---- the laptop task


def test_the_embedded_run_pairs_its_own_answers_and_never_sees_held_out_sums(tmp_path, monkeypatch):
    train, held_out = dpo.addition_rows()
    seen, real = [], dpo.make_batch

    def watched(prompts, completions, device):
        seen.extend(prompts)
        return real(prompts, completions, device)

    monkeypatch.setattr(dpo, "addition_rows", lambda: (train[:120], held_out[:40]))
    real_tiny, demonstrated = dpo.write_tiny_model, []

    def write_tiny_model(*args):
        monkeypatch.setattr(dpo, "make_batch", watched)
        real_tiny(*args)
        demonstrated.extend(map(tuple, seen))
        monkeypatch.setattr(dpo, "make_batch", real)

    monkeypatch.setattr(dpo, "write_tiny_model", write_tiny_model)
    answers = {row["prompt"]: row["answer"] for row in train[:120] + held_out[:40]}
    tokenizers = []

    def sample_answers(args, model, tokenizer, prompts, num_answers, max_tokens):
        tokenizers.append(tokenizer)
        texts = [tokenizer.decode(ids) for ids in prompts for _ in range(num_answers)]
        return [answers[text] if i % 3 else "4+4=8;7" for i, text in enumerate(texts)]  # two of three are right

    monkeypatch.setattr(dpo, "sample_answers", sample_answers)
    args = Args(output_dir=str(tmp_path), sft_steps=3, max_steps=3, max_eval_samples=20, device="cpu", bf16=False)
    metrics = main(args)
    assert metrics["eval/accuracy_before"] == metrics["eval/accuracy"] == pytest.approx(26 / 40)
    train_pairs, test_pairs = json.loads((run_folder(args) / "pairs.json").read_text())
    for pairs, rows in ((train_pairs, train[:120]), (test_pairs, held_out[:40])):
        assert pairs and {pair["prompt"] for pair in pairs} <= {row["prompt"] for row in rows}
        for pair in pairs:
            assert pair["chosen"] == answers[pair["prompt"]] and pair["rejected"] == "4+4=8;7"
    assert {tokenizers[0].decode(ids) for ids in demonstrated} <= {row["prompt"] for row in train[:120]}


def test_answers_are_sampled_at_temperature_1_and_the_same_at_every_evaluation():
    model, tokenizer = make_model(), make_tokenizer()
    model.generation_config.temperature, model.generation_config.top_k = 0.01, 1  # a model's own settings do not count
    prompts = [[3, 4], [5], [6, 7, 8]] * 100
    args = Args(bf16=False)
    first, second = (dpo.sample_answers(args, model, tokenizer, prompts, num_answers=8, max_tokens=9) for _ in range(2))
    assert first == second and len(first) == 2400
    assert dpo.sample_answers(Args(seed=2, bf16=False), model, tokenizer, prompts, num_answers=8, max_tokens=9) != first
    with torch.no_grad():
        probs = model(torch.tensor([prompts[1]])).logits[0, -1].softmax(0)
    own = [text for i, text in enumerate(first) if i // 8 % 3 == 1]
    best = tokenizer.decode([probs.argmax()])
    share = sum(text.startswith(best) for text in own) / len(own)
    assert share == pytest.approx(probs.max().item(), abs=0.06) and 0.1 < share < 0.9


def test_the_first_twenty_losses_and_rewards_are_trls(run, shared, tmp_path):
    trl, name = pytest.importorskip("trl"), str(shared / "models/stories260K")
    import datasets
    from torch.utils.data import SequentialSampler

    tokenizer = AutoTokenizer.from_pretrained(name)
    lines = (shared / "data/ultrafeedback_1k/train.jsonl").read_text().splitlines()
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in map(json.loads, lines)]
    rows = [row for row in rows if len(tokenizer(row["prompt"]).input_ids) < 200 and row["chosen"] != row["rejected"]]
    same = {"max_steps": 20, "beta": 0.1, "max_length": 256, "learning_rate": 1e-5, "lr_scheduler_type": "constant"}
    ours = run(rows[:160], rows[160:200], model_name_or_path=name, train_batch_size=8, max_eval_samples=40, **same)
    logs = []

    class Trainer(trl.DPOTrainer):
        def _get_train_sampler(self, *arguments):
            return SequentialSampler(self.train_dataset)

        def log(self, entry, *arguments):
            super().log(entry, *arguments)
            logs.append(entry)

    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), save_strategy="no", report_to="none", logging_steps=1, use_cpu=True,
        model_init_kwargs={"dtype": "float32"}, bf16=False, per_device_train_batch_size=8, optim="adamw_torch_fused",
        gradient_checkpointing=False, **same,
    )  # fmt: skip
    order = random.Random(dpo.named_seed(1, "order", 0)).sample(range(160), 160)  # of our first epoch
    data = datasets.Dataset.from_list([rows[i] for i in order])
    Trainer(name, args=config, train_dataset=data, processing_class=tokenizer).train()
    for tag, bound in (("loss", 1e-5), ("rewards/chosen", 1e-4), ("rewards/rejected", 1e-4)):
        theirs = [entry[tag] for entry in logs if tag in entry][:20]
        assert ours.tags[f"train/{tag}"] == pytest.approx(theirs, abs=bound)
