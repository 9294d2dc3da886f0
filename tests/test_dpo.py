"""dpo.py: losses, pairs, log-probabilities; then whole runs on a tiny model, checked by hand and by what they leave."""

import gc
import json
import math
import random
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    PAIRS, make_model, make_tokenizer, run_folder, save_tiny_model, scalars, tiny_flags, weights, write_rows,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteConfig, LlamaForCausalLM, MistralConfig

import dpo
from dpo import Args, conversation_ids, dpo_loss, encode_pairs, main, pair_logps, split_row

TEST = PAIRS[24:30]
FROZEN = 1e-12  # a learning rate that changes no weight by more than rounding
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LETTERS = [chr(code) for code in range(32, 127)] + ["\n", "\n\n", "<|im_start|>", "<|im_end|>"]
load = AutoModelForCausalLM.from_pretrained


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def row_of(chosen, rejected, prompt=None) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat_tokenizer(template: str | None):
    tokenizer = make_tokenizer(LETTERS)
    tokenizer.add_special_tokens({"additional_special_tokens": LETTERS[-2:]})
    tokenizer.chat_template = template
    return tokenizer


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


# ---- data

HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: name?\n\nAssistant:"
BRANCHED = [" a\n\nHuman: and?\n\nAssistant: b", " c\n\nHuman: so?\n\nAssistant: d"]  # answers of several turns


def test_pairs_of_every_kind_have_one_prompt_and_whole_answers():
    system, q, x, y = {"role": "system", "content": "S"}, user("q"), assistant("x"), assistant("y")
    for row in (
        row_of("x", "y", "q"), {"prompt": "q", "completions": ["x", "y"]}, row_of([q, x], [q, y], "q"),
        row_of([x], "y", [q]), row_of([q, x], [q, y]),
    ):  # fmt: skip
        assert split_row(row, 1, True) == split_row(row, 1, False) == ([q], [[x], [y]])
    assert split_row(row_of([system, q, x], [system, q, y], "q"), 1, True)[0] == [system, q]
    own_history = split_row(row_of([q, x, q, y], [q, x, user("z"), x]), 1, True)
    assert own_history == ([q], [[x, q, y], [x, user("z"), x]])
    assert split_row(row_of("the cat sat", "the cat slept"), 1, True)[0] == [user("the cat")]


def test_texts_in_the_form_of_hh_become_turns_and_stay_the_same_text_without_a_template():
    row, branched = row_of(HH + " Bo", HH + " no"), row_of(HH + BRANCHED[0], HH + BRANCHED[1])
    turns = [user("hi"), assistant("yes?"), user("name?")]
    assert split_row(row, 1, True) == (turns, [[assistant("Bo")], [assistant("no")]])
    assert split_row(row, 1, False) == ([user(HH)], [[assistant(" Bo")], [assistant(" no")]])
    prompt, answers = split_row(branched, 1, False)
    assert [[turn["role"] for turn in answer] for answer in answers] == [["assistant", "user", "assistant"]] * 2
    assert prompt[0]["content"] + "".join(turn["content"] for turn in answers[1]) == branched["rejected"]


@pytest.mark.parametrize("row", [
    row_of([user("p"), assistant("x")], [user("q"), assistant("y")], "p"), row_of(2, "y", "p"), row_of("x", "y", 5),
    row_of([user("p"), assistant("x"), user("z")], [user("p"), assistant("y")]), {"prompt": "p", "chosen": "x"},
    row_of([user("p"), assistant("x")], [user("q"), assistant("y")]), {"prompt": "p", "completions": ["x", "y", "z"]},
    {"prompt": "p", "completions": "xy"}, {"prompt": "p", "completions": 5}, {"text": "z"},
    row_of(HH + " a", "\n\nHuman: other\n\nAssistant: b"),
])  # fmt: skip
def test_a_row_that_is_no_pair_is_refused_by_its_number(row):
    with pytest.raises(ValueError, match="row 2"):
        encode_pairs([row_of("2", "3", "1"), row], make_tokenizer(), 99)


@pytest.mark.parametrize("template", [CHATML, None])
def test_only_the_assistants_tokens_count(template):
    tokenizer = chat_tokenizer(template)
    row = row_of(HH + BRANCHED[0], HH + BRANCHED[1])
    (pair,) = encode_pairs([row], tokenizer, 999)
    whole = tokenizer.decode(pair["ids"] + pair["completions"][1])
    counted = tokenizer.decode([id for id, counts in zip(pair["completions"][1], pair["masks"][1]) if counts])
    if template is None:
        assert whole == row["rejected"].replace(" c", " c<eos>") + "<eos>" and counted == " c<eos> d<eos>"
        return
    chat = [user("hi"), assistant("yes?"), user("name?"), assistant("c"), user("so?"), assistant("d")]
    assert pair["ids"] + pair["completions"][1] == tokenizer.apply_chat_template(chat, return_dict=False)
    assert counted == "c<|im_end|>\nd<|im_end|>\n"
    assert tokenizer.decode(pair["ids"]).endswith("name?<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_changes_earlier_turns_is_refused_only_where_it_matters():
    tokenizer = chat_tokenizer(CHATML.replace("+ m['content'] +", "+ (m['content'] if loop.last else '') +"))
    (pair,) = encode_pairs([row_of("x", "y", "q")], tokenizer, 99)
    assert tokenizer.decode(pair["completions"][0]) == "x<eos>"
    with pytest.raises(ValueError, match="row 1: the chat template rewrites earlier turns"):
        encode_pairs([row_of(HH + BRANCHED[0], HH + BRANCHED[1])], tokenizer, 999)


def test_answers_are_cut_at_their_end_and_what_is_left_out_is_counted(capsys):
    rows = [("2", "3", "1+1="), ("2", "2", "1+1="), ("2", "3", "1" * 8), ("22222", "3", "1+1="), ("2", "3", " ")]
    rows = [row_of(*row) for row in rows + [("22223", "22224", "1+1="), ("2", "3", "1?"), ("2", "", "1")]]
    pairs = encode_pairs(rows, make_tokenizer(), 8)
    assert [list(map(len, pair["completions"])) for pair in pairs] == [[2, 2], [4, 2], [2, 1]]
    assert pairs[1]["completions"][0] == make_tokenizer()("2222").input_ids
    assert "5 of 8 pairs" in capsys.readouterr().out


# ---- log-probabilities


def naive_logps(model, pair: dict) -> list[float]:
    """Sums over counted tokens, one sequence at a time, without padding or a mask, from whole logits."""
    sums = []
    for completion, mask in zip(pair["completions"], pair["masks"]):
        ids = torch.tensor(pair["ids"] + completion)
        logprobs = model(input_ids=ids[None]).logits[0, len(pair["ids"]) - 1 : -1].log_softmax(-1)
        sums.append(logprobs.gather(1, ids[len(pair["ids"]) :, None])[torch.tensor(mask), 0].sum())
    return sums


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_pair_logps_are_the_naive_sums_in_every_batch(architecture):
    if architecture == "mistral":  # a sliding window: no tree
        torch.manual_seed(0)
        config = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config = MistralConfig(**config, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    model = make_model(architecture) if architecture != "mistral" else AutoModelForCausalLM.from_config(config).eval()
    rows = [row_of("2", "345", "1+1="), row_of("24", "2", "12+12="), row_of("12" * 40, "4" * 50, "3")]  # 2: no tree
    rows.insert(2, row_of([user("1"), assistant("2"), user("33"), assistant("4")], [user("1"), assistant("5")]))
    pairs = encode_pairs(rows, make_tokenizer(), 100)
    assert sum(pairs[2]["masks"][0]) == 4 and len(pairs[2]["masks"][0]) == 6
    with torch.no_grad():
        expected = torch.tensor([naive_logps(model, pair) for pair in pairs])
        for max_tokens in (1, 30, 1000):
            batches = list(pair_logps(model, pairs, max_tokens, nullcontext()))
            assert sorted(i for mb, _ in batches for i in mb) == [0, 1, 2, 3]
            assert all(torch.allclose(logps, expected[mb], atol=1e-3) for mb, logps in batches)


# ---- whole runs


@pytest.fixture
def run(tmp_path, model_folder):
    """Does a tiny run. Returns its metrics, its tags' values, its folder and Args."""

    def run(train=PAIRS[:24], test=TEST, folder=None, **flags):
        folder = folder or tmp_path / str(len([*tmp_path.iterdir()]))
        (folder / "data").mkdir(parents=True, exist_ok=True)
        write_rows(folder / "data" / "train.jsonl", train)
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
    found, total = [], 0.0
    for pair in encode_pairs(rows, make_tokenizer(), args.max_length):
        (c, r), (ref_c, ref_r) = naive_logps(model, pair), (x.item() for x in naive_logps(reference, pair))
        beta = args.beta or 0.1
        n, m = (sum(mask) if args.loss_type in ("ipo", "sigmoid_norm") else 1 for mask in pair["masks"])
        chosen, rejected = beta * (c - ref_c) / n, beta * (r - ref_r) / m
        h, e = chosen - rejected, args.label_smoothing
        right, wrong = (1 + (-h).exp()).log(), (1 + h.exp()).log()
        loss = {
            "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e), "hinge": (1 - h).clamp(min=0),
            "ipo": (h / beta - 0.5 / beta) ** 2,
        }.get(args.loss_type, (1 - e) * right + e * wrong)  # fmt: skip
        total = total + (loss - (args.rpo_alpha or 0.0) * c / sum(pair["masks"][0])) / len(rows)
        tie = 0.5 if abs(h) < 1e-5 else float(h > 0)
        found.append([chosen.item(), rejected.item(), h.item(), tie, c.item(), r.item()])
    gradient = torch.autograd.grad(total, list(model.parameters()))
    names = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    names += ["logps/chosen", "logps/rejected"]
    means = dict(zip(names, torch.tensor(found).mean(0).tolist()))
    return {"loss": total.item(), **means}, torch.stack([g.norm() for g in gradient]).norm().item()


@pytest.mark.parametrize("flags", [
    {"beta": 0.5, "max_tokens_per_microbatch": 40}, {"loss_type": "ipo", "max_tokens_per_microbatch": 24, "beta": 0.7},
    {"loss_type": "hinge", "gradient_checkpointing": True, "beta": 2.}, {"loss_type": "robust", "label_smoothing": 0.1},
    {"label_smoothing": 0.2, "max_tokens_per_microbatch": 1}, {"rpo_alpha": 0.7, "max_tokens_per_microbatch": 48},
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
    assert result.metrics["eval/loss_before"] == result.tags["eval/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
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
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 1.5e-3, 0.0], abs=1e-9)
    for max_grad_norm, expected in ((1e6, 5e-3), (1e-12, 0.0)):  # Adam's first step is the learning rate
        result = run(max_steps=1, warmup_steps=1, max_grad_norm=max_grad_norm)
        before, after = load(model_folder).state_dict(), weights(result.folder)
        change = max((before[name] - value).abs().max().item() for name, value in after.items())
        assert change == pytest.approx(expected, rel=1e-2, abs=1e-5)


def test_an_epoch_visits_each_pair_once_in_the_seeds_order(run):
    flags = {"max_steps": None, "num_train_epochs": 1.5, "train_batch_size": 4, "learning_rate": FROZEN}
    first, again, other = (run(seed=seed, **flags).tags["train/logps/chosen"] for seed in (1, 1, 2))
    whole = run(max_steps=1, train_batch_size=24, learning_rate=FROZEN).tags["train/logps/chosen"][0]
    for logps in (first, other):
        assert len(logps) == 9 and sum(logps[:6]) / 6 == pytest.approx(whole, rel=1e-5) and logps[6:] != logps[:3]
    assert first == again and first[:3] != other[:3]


def test_the_reference_is_gone_when_training_starts_and_is_never_a_stale_one(tmp_path, monkeypatch):
    reference, loaded, alive = save_tiny_model(tmp_path / "reference"), [], []
    real_load, real_trange = dpo.load_pretrained, dpo.trange

    def load_pretrained(*args):
        pair = real_load(*args)
        loaded.append(weakref.ref(pair[0]))
        return pair

    def trange(*args, **kwargs):
        if not alive:
            gc.collect()
            alive.extend(model() is not None for model in loaded)
        return real_trange(*args, **kwargs)

    for function in (load_pretrained, trange):
        monkeypatch.setattr(dpo, function.__name__, function)

    def loss_before(number: int) -> float:
        flags = {**tiny_flags("dpo", tmp_path, reference), "exp_name": str(number), "max_steps": 1}
        return main(Args(**flags))["eval/loss_before"]

    ln2 = pytest.approx(math.log(2), abs=1e-6)
    assert loss_before(0) == ln2 and alive == [True, False]  # the policy, the reference
    file = Path(reference) / "model.safetensors"  # other weights, in place
    save_file({name: 1.1 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert loss_before(1) == ln2


def test_rows_in_the_form_of_hh_run_through_main_with_and_without_a_template(run, tmp_path):
    rows = [row_of(HH + f" {a}" * (1 + a % 3), HH + f" no{a}") for a in range(6)]
    rows += [row_of(HH + BRANCHED[0] + str(a), HH + BRANCHED[1] + str(a)) for a in range(6)]
    for template in (None, CHATML):
        folder = save_tiny_model(tmp_path / f"model{template is None}", LETTERS)
        chat_tokenizer(template).save_pretrained(folder)
        result = run(rows, rows[3:9], model_name_or_path=folder, train_batch_size=4, max_steps=9, learning_rate=3e-3)
        assert result.tags["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
        assert result.metrics["eval/rewards/accuracies"] == 1.0
        pairs = encode_pairs(rows[3:9], AutoTokenizer.from_pretrained(folder), 128)
        logps = torch.tensor([naive_logps(load(folder), pair) for pair in pairs])
        assert result.metrics["eval/logps/rejected_before"] == pytest.approx(logps[:, 1].mean().item(), rel=1e-4)


def test_held_out_rows_share_no_prompt_with_training(tiny, monkeypatch):
    seen, real = [], dpo.pair_logps

    def watched(model, pairs, *others):
        seen.append({pair["prompt"] for pair in pairs})
        return real(model, pairs, *others)

    monkeypatch.setattr(dpo, "pair_logps", watched)
    for seed in (1, 2):
        main(tiny(seed=seed, max_steps=1, exp_name=str(seed)))
    assert len(seen[0]) == 36 and len(seen[1]) == 3 and len(seen) == 8  # reference, evaluation, training, evaluation
    assert not seen[1] & (seen[2] | seen[6]) and seen[1] == seen[3] == seen[5] == seen[7]


def test_the_embedded_run_learns_and_samples_at_temperature_1(tmp_path, monkeypatch):
    options, real, (train, held_out) = [], LlamaForCausalLM.generate, dpo.addition_rows()

    def generate(model, ids, **flags):
        options.append(flags)
        if len(options) > 1:
            return real(model, ids, **flags)
        tokenizer = AutoTokenizer.from_pretrained(run_folder(args) / "sft")
        sums = [eval(prompt[:-1]) for prompt in tokenizer.batch_decode(ids)]
        texts = [f"-9={total + (i >= 16)}<eos>" for i, total in enumerate(sums)]  # 16 are right
        return torch.cat([ids, torch.tensor(tokenizer(texts).input_ids)], 1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    held_out = [row for row in held_out if int(row["answer"]) < 99]
    monkeypatch.setattr(dpo, "addition_rows", lambda: (train[:500], held_out))
    args = Args(output_dir=str(tmp_path), sft_steps=2, max_steps=20, max_eval_samples=64, device="cpu", bf16=False)
    metrics = main(args)
    assert metrics["eval/accuracy_before"] == 0.25 and metrics["eval/rewards/accuracies"] > 0.6
    assert options == [{"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 16}] * 2
    assert b"| prompt | completion | reward |" in next(run_folder(args).glob("events*")).read_bytes()


def test_right_answers_and_near_misses_of_the_embedded_pairs():
    for pair in dpo.addition_pairs(dpo.addition_rows()[0][:500], 2, 1):
        total, (units, _, right) = eval(pair["prompt"][:-1]), pair["chosen"].rpartition("=")
        assert int(right) == total and units in ("", f"-{sum(map(int, pair['prompt'][1:5:3]))}")
        assert int(pair["rejected"].split("=")[-1]) - total in (-10, -1, 1, 10)


def test_the_first_twenty_losses_and_rewards_are_trls(run, shared, tmp_path):
    trl, name = pytest.importorskip("trl"), str(shared / "models/stories260K")
    import datasets
    from torch.utils.data import SequentialSampler

    tokenizer, rows = AutoTokenizer.from_pretrained(name), []
    for row in map(json.loads, (shared / "data/ultrafeedback_1k/train.jsonl").read_text().splitlines()):
        query = conversation_ids([user(row["prompt"])], [], tokenizer)
        wholes = [tokenizer(row["prompt"] + row[k]).input_ids for k in ("chosen", "rejected")]
        # TRL cuts a prompt whose end merges with the answer's beginning.
        if wholes[0] != wholes[1] and len(query) < 200 and all(w[: len(query)] == query for w in wholes):
            rows.append({key: row[key] for key in ("prompt", "chosen", "rejected")})
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
    data = datasets.Dataset.from_list(random.Random("1 0").sample(rows[:160], 160))  # the order of our first epoch
    Trainer(name, args=config, train_dataset=data, processing_class=tokenizer).train()
    for tag, bound in (("loss", 1e-5), ("rewards/chosen", 1e-4), ("rewards/rejected", 1e-4)):
        theirs = [entry[tag] for entry in logs if tag in entry][:20]
        assert ours.tags[f"train/{tag}"] == pytest.approx(theirs, abs=bound)


def test_a_model_that_changes_its_logits_after_the_head_is_refused(run, tmp_path):
    config = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(GraniteConfig(**config, num_attention_heads=4, logits_scaling=0.1))
    model.save_pretrained(tmp_path / "granite")
    make_tokenizer().save_pretrained(tmp_path / "granite")
    with pytest.raises(ValueError, match="GraniteForCausalLM is not supported"):
        run(model_name_or_path=str(tmp_path / "granite"))
