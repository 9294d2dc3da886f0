"""reward_model.py: its losses, scores and data; then whole runs, whose tags are computed again by hand."""

import math
import random
import string
from collections import defaultdict
from itertools import permutations
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import CONFIGS, make_model, run_folder, scalars, tiny_flags, weights, write_rows
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, MistralConfig

import ppo_llm
import reward_model
from reward_model import bradley_terry_loss, completion_scores, encode_rankings, load_classifier, pack_rankings
from reward_model import plackett_luce_loss, preference_loss

FROZEN = 1e-12  # a learning rate that changes no weight by more than rounding
TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
SIZE = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
load = AutoModelForSequenceClassification.from_pretrained


def ranking(prompt, *answers, **columns):
    return {"prompt": prompt, "completions": [*answers], **columns}


TRAIN = [  # rankings of 2 to 4 answers of unequal lengths; pairs with a margin, with a soft label, without a preference
    ranking("10+2=", "12", "-1", "1", "4444444"), ranking("3=", "3", "2 or 55555"), ranking("7+7+7=", "21", "210", "0"),
    ranking("a", "a b c", "c", "b", "bb"), ranking("1+", "1=2", "2", margin=0.5), ranking("2=", "2", "-", label=0.5),
    ranking("1-1=", "0", "000", label=0.8, margin=-1), ranking("5=", "5", "6", label=0.1, margin=2),
]  # fmt: skip
HELD_OUT = [ranking("9+", "1=10", "9", "10=19 or not"), ranking("8=", "8", "9"),
            ranking("6=", "77777", "6", label=0.2, margin=0.3), ranking("4=", "4", "5", label=0.5)]  # fmt: skip


def make_tokenizer(template=None, pad="<pad>"):
    tokenizer = conftest.make_tokenizer([*string.printable[:95], "\n\n"])
    tokenizer.chat_template, tokenizer.pad_token = template, pad
    return tokenizer


def make_classifier(architecture="llama"):
    torch.manual_seed(0)
    extra = {"sliding_window": 4} if architecture == "mistral" else {}
    kinds = {"mistral": MistralConfig, "bert": BertConfig} | {name: type(config) for name, config in CONFIGS.items()}
    config = kinds[architecture](**SIZE, num_labels=1, pad_token_id=0, **extra)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def run(tmp_path):
    """Does a tiny run on rows. Returns its metrics, its tags' values and its folder."""

    def run(rows=TRAIN, held_out=HELD_OUT, architecture="llama", template=None, **flags):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        (folder / "data").mkdir(parents=True)
        for split, split_rows in (("train", rows), ("test", held_out)):
            if split_rows:
                write_rows(folder / "data" / f"{split}.jsonl", split_rows)
        model = make_classifier(architecture) if architecture else make_model("llama", vocab_size=128)  # without a head
        for part in (model, make_tokenizer(template)):
            part.save_pretrained(folder / "model")
        own = {"dataset_name": str(folder / "data"), "max_eval_samples": 50}
        args = reward_model.Args(**{**tiny_flags("reward_model", folder, str(folder / "model")), **own, **flags})
        torch.seed()  # main's own seed must suffice
        metrics, path = reward_model.main(args), run_folder(args)
        tags = {tag: [value for _, value in points] for tag, points in scalars(path).items()}
        return SimpleNamespace(metrics=metrics, folder=path, tags=tags)

    return run


def expected(model, rows, kind="plackett_luce", center=0.0):
    """Metrics of rows, from the classifier's own logits for each text: no batch, no padding, no mask."""
    values = defaultdict(list)
    for row in rows:
        label, margin, answers = row.get("label", 1.0), row.get("margin", 0.0), row["completions"]
        ids = [torch.tensor([make_tokenizer().encode(row["prompt"] + answer)]) for answer in answers]
        s = torch.cat([model(x).logits[0] for x in ids])
        pairs = [(i, j) for j in range(len(s)) for i in range(j)]
        if len(s) == 2:
            loss = -label * logsigmoid(s[0] - s[1] - margin) - (1 - label) * logsigmoid(s[1] - s[0] - margin)
        elif kind == "plackett_luce":
            loss = -sum(s[k:].log_softmax(0)[0] for k in range(len(s)))
        else:
            loss = sum((1 + (s[j] - s[i]).exp()).log() for i, j in pairs) / len(pairs)
        values["loss"].append(loss + center * s.sum() ** 2)
        values["mean_reward"] += s
        for i, j in pairs if label != 0.5 else ():  # of the preferred answer
            sign, longer = 1 if label > 0.5 else -1, torch.tensor(float(len(answers[i]) - len(answers[j])))
            values["margin"].append((s[i] - s[j]) * sign)
            values["accuracy"].append(((s[i] - s[j]).sign() * sign + 1) / 2)
            values["accuracy_longer"].append((longer.sign() * sign + 1) / 2)
    sure = torch.tensor(values["margin"]).abs().sigmoid()
    right = torch.tensor(values["accuracy"])
    tenths = [(sure >= low / 10) & (sure < low / 10 + 0.1) for low in range(5, 10)]
    gaps = [(sure[tenth].mean() - right[tenth].mean()).abs() * tenth.float().mean() for tenth in tenths if tenth.any()]
    means = {name: torch.stack(x).mean() for name, x in values.items() if x}
    return means | ({"calibration_error": sum(gaps)} if gaps else {})


def check(values, expected, name):
    expected = {name.format(tag): pytest.approx(x.item(), rel=1e-3, abs=1e-5) for tag, x in expected.items()}
    assert {tag: values[tag] for tag in expected} == expected


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0])
    margin, label = torch.tensor([0.25, -1.0]), torch.tensor([0.5, 0.8])
    loss = {d: math.log(1 + math.exp(-d)) for d in (0.5, -0.5, 2, -2, 0.25, -1, -0.75, 3)}
    for options, total in (
        ({}, loss[0.5] + loss[-2]), ({"margin": margin}, loss[0.25] + loss[-1]),
        ({"label": label}, (loss[0.5] + loss[-0.5]) / 2 + 0.8 * loss[-2] + 0.2 * loss[2]),
        ({"margin": margin, "label": label}, (loss[0.25] + loss[-0.75]) / 2 + 0.8 * loss[-1] + 0.2 * loss[3]),
    ):  # fmt: skip
        assert bradley_terry_loss(chosen, rejected, **options).item() == pytest.approx(total / 2)
    assert bradley_terry_loss(torch.tensor([0.0]), torch.tensor([200.0])).item() == pytest.approx(200.0)
    scores, label = torch.tensor([[1.0, 1], [2, 0], [0, 3], [5, 0]]), torch.tensor([1.0, 0.1, 0.2, 0.5])
    _, stats = preference_loss(scores, torch.zeros(4), label, "plackett_luce", 0.0)
    assert stats["accuracy"].tolist() == [0.5, 0, 1] and stats["margin"].tolist() == [0, -2, 3]


def test_plackett_luce_is_the_probability_of_the_order():
    scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    total = sum(math.exp(-plackett_luce_loss(scores[:1, list(order)])) for order in permutations(range(4)))
    assert total == pytest.approx(1, abs=1e-5)
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])  # of the first choices, each among those that are left
    p = [[scores[r, k].exp() / scores[r, k:end].exp().sum() for k in range(end)] for r, end in ((0, 4), (1, 3))]
    by_hand = pytest.approx(-sum(math.log(x) for row in p for x in row) / 2, abs=1e-5)
    assert plackett_luce_loss(scores, mask).item() == by_hand
    far = (1000 * scores).requires_grad_()
    assert torch.autograd.grad(plackett_luce_loss(far, mask), far)[0].isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "mistral", "bert"])
def test_packed_scores_and_gradients_are_the_models_own(architecture):
    model, rng = make_classifier(architecture), random.Random(0)
    sizes = (7, 12, 1), (1, 9, 3, 20, 2, 5, 1, 8, 1)
    prompts, answers = ([rng.choices(range(1, 99), k=n) for n in lengths] for lengths in sizes)
    repeated = [prompt for prompt in prompts for _ in range(3)]
    own = torch.cat([model(torch.tensor([prompt + answer])).logits[0] for prompt, answer in zip(repeated, answers)])
    gradient = torch.autograd.grad(own.square().sum(), [*model.parameters()])
    for trees in (prompts, repeated):
        scores = completion_scores(model, trees, answers)
        assert scores.shape == (9,) and torch.allclose(scores, own, rtol=0, atol=1e-5)
        found = torch.autograd.grad(scores.square().sum(), [*model.parameters()])
        assert all(torch.allclose(one, two, rtol=1e-3, atol=1e-5) for one, two in zip(found, gradient))
    with torch.autocast("cpu", torch.bfloat16):
        scores = completion_scores(model, prompts, answers)
    assert architecture == "bert" or (scores != scores.bfloat16().float()).any()  # the head is in fp32


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_micro_batches_hold_whole_rankings_within_the_budget(architecture):
    model, rng = make_classifier(architecture), random.Random(0)
    examples = [{"ids": [n] * rng.choice((2, 30)), "answers": [[n, k] * rng.choice((1, 9)) for k in range(2 + n % 3)]}
                for n in range(60)]  # fmt: skip
    batches, shared = pack_rankings(model, examples, 200), 0
    assert sorted(i for indices, *_ in batches for i in indices) == [*range(60)] and len(batches) < 40
    for indices, prompts, answers in batches:
        K = len(answers) // len(prompts)
        rows = [len(prompt) + sum(map(len, answers[r * K : (r + 1) * K])) for r, prompt in enumerate(prompts)]
        assert len(indices) == 1 or len(rows) * max(rows) <= 200
        shared += len(indices) * (K > 1)
    assert shared > 30 if architecture == "llama" else shared == 0
    (batch,) = pack_rankings(model, [{"ids": [5], "answers": [[6] * 2000, [7] * 2000]}], 100)
    assert batch[1] == [[5], [5]]  # attention over one row of 4001 tokens would cost more


def test_common_tokens_are_read_once_and_rankings_that_teach_nothing_are_left_out(capsys):
    rows = ranking("1+1=", "123", "12"), ranking("1+1=", "1234567", "4", "44")
    one, two = ([make_tokenizer().decode(ids) for ids in (e["ids"], *e["answers"])]
                for e in encode_rankings(rows, make_tokenizer(), 9))  # fmt: skip
    assert one == ["1+1=1", "23", "2"] and two == ["1+1=", "12345", "4", "44"] and capsys.readouterr().out == ""
    good, rejected = {"prompt": "1=", "chosen": "2", "rejected": "3"}, {"chosen": "2222", "rejected": "2223"}
    bad = [{"prompt": "1=", **rejected}, {**good, "prompt": " "}, {**good, "chosen": "3"}, {**good, "chosen": "\u00e9"},
           {**good, "prompt": "1" * 9}, ranking("1=", "2", "3", "2")]  # fmt: skip
    assert len(encode_rankings([good, *bad, {"prompt": "1", **rejected}], make_tokenizer(), 5)) == 2
    assert capsys.readouterr().out.startswith("6 of 8 rankings")


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_dialogues_in_hhs_format_are_scored_whole(run, template):
    q, z, y = "\n\nHuman: q\n\nAssistant:", " a\n\nHuman: z\n\nAssistant: ", " b\n\nHuman: y\n\nAssistant: "
    rows = [(q + " yes", q + " no"), (q + z + "so", q + z + "because"), (q + y + "good", q + z + "bad")]
    hh = [{"chosen": one, "rejected": two} for one, two in rows]
    result = run(hh, hh, template=template, train_batch_size=3, max_steps=1, max_tokens_per_microbatch=100)
    if template is not None:
        rows = [[text.replace("\n\nHuman: ", "<user>").replace("\n\nAssistant: ", "<assistant>") for text in row]
                for row in rows]  # fmt: skip
    values = expected(make_classifier(), [ranking("", *row) for row in rows])
    del values["accuracy_longer"], values["calibration_error"]
    check(result.metrics, values, "eval/{}_before")
    check({tag: x[0] for tag, x in result.tags.items()}, values, "train/{}")


def test_a_new_head_has_the_published_spread_and_the_backbone_stays(tmp_path):
    source = make_model("llama", attention_dropout=0.1)
    source.save_pretrained(tmp_path / "llama")
    BertModel(BertConfig(**SIZE), add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    for name in ("llama", "bert"):
        make_tokenizer().save_pretrained(tmp_path / name)
    heads = []
    for seed in range(40):
        torch.manual_seed(seed)
        model, _ = load_classifier(str(tmp_path / "llama"), "--x")
        heads.append(model.score.weight.detach())
    assert torch.cat(heads).std().item() == pytest.approx(33**-0.5, rel=0.05) and model.config.attention_dropout == 0
    assert all(torch.equal(x, model.model.state_dict()[name]) for name, x in source.model.state_dict().items())
    encoder, _ = load_classifier(str(tmp_path / "bert"), "--x")
    assert encoder.classifier.bias.tolist() == [0] and encoder.classifier.weight.std() > 0.1
    state = {name: x.contiguous() for name, x in source.state_dict().items() if "up_proj" not in name}
    source.save_pretrained(tmp_path / "llama", state_dict=state)
    with pytest.raises(ValueError, match="--x .* has no weights for .*up_proj"):
        load_classifier(str(tmp_path / "llama"), "--x")


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_the_pad_token_is_the_classifiers_own(tmp_path, pad):
    for part in (make_classifier(), make_tokenizer(pad=pad)):
        part.save_pretrained(tmp_path)
    model, tokenizer = load_classifier(str(tmp_path), "--x")
    assert tokenizer.pad_token_id == model.config.pad_token_id == 98
    rows = torch.tensor([[5, 6, 1, 98, 98], [5, 6, 7, 8, 9]])
    assert torch.allclose(model(rows).logits[0], model(rows[:1, :3]).logits[0], atol=1e-5)  # the EOS, 1, is read


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_ppo_reads_the_saved_folder_with_the_same_scores(run, template):
    result = run(template=template, max_steps=3, bf16=template is None)  # scores, their mean and std are fp32
    path, saved = result.folder / "model", torch.load(result.folder / "checkpoint.pt", weights_only=True)["model"]
    model, examples = load(path), encode_rankings(TRAIN, AutoTokenizer.from_pretrained(path), 128)
    assert all(torch.equal(x, saved[name]) for name, x in model.state_dict().items()) and "score.weight" in saved
    scores = torch.cat([completion_scores(model, [e["ids"]], e["answers"]) for e in examples])
    samples = [{"prompt": row["prompt"], "turns": [{"role": "user", "content": row["prompt"]}], "text": answer}
               for row in TRAIN for answer in row["completions"]]  # fmt: skip
    for normalize in (False, True):  # by the mean and standard deviation of the answers that there are
        args = ppo_llm.Args(reward_model_path=str(path), normalize_reward_model=normalize)
        found = ppo_llm.load_reward_model(args, torch.device("cpu"))(samples)
        wanted = (scores - scores.mean()) / scores.std() if normalize else scores
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5 if normalize else 1e-6)


@pytest.mark.parametrize("flags", [
    {"max_tokens_per_microbatch": 24}, {"max_tokens_per_microbatch": 48, "ranking_loss": "all_pairs"},
    {"max_tokens_per_microbatch": 40, "center_rewards_coefficient": 0.1}, {"gradient_checkpointing": True},
])  # fmt: skip
def test_the_tags_of_a_run_are_those_computed_by_hand(run, flags):
    result, model = run(max_steps=4, eval_steps=2, train_batch_size=16, **flags), make_classifier()
    options = flags.get("ranking_loss", "plackett_luce"), flags.get("center_rewards_coefficient", 0.0)
    values = expected(model, TRAIN, *options)  # a batch is TRAIN twice
    gradient = torch.autograd.grad(values["loss"], [*model.parameters()])
    values["grad_norm"] = sum(g.square().sum() for g in gradient).sqrt()
    del values["accuracy_longer"], values["calibration_error"]
    check({tag: x[0] for tag, x in result.tags.items()}, values, "train/{}")
    check(result.metrics, expected(model, HELD_OUT, *options), "eval/{}_before")
    check(result.metrics, expected(load(result.folder / "model"), HELD_OUT, *options), "eval/{}")
    assert len(result.tags["eval/loss"]) == 3 and result.tags["train/epoch"] == [2, 4, 6, 8]


def test_each_epoch_visits_each_row_once_in_an_order_of_its_own(run):
    losses, orders = [expected(make_classifier(), [row])["loss"].item() for row in TRAIN], set()
    for seed in (1, 2):
        tags = run(train_batch_size=1, num_train_epochs=2, learning_rate=FROZEN, seed=seed, max_steps=None).tags
        order = [min(range(8), key=lambda i: abs(losses[i] - loss)) for loss in tags["train/loss"]]
        assert sorted(order[:8]) == sorted(order[8:]) == [*range(8)]
        orders |= {(*order[:8],), (*order[8:],)}
    assert len(orders) == 4
    with pytest.raises(ValueError, match="0 training rows"):
        run(max_length=2)


def test_the_learning_rate_follows_its_schedule_and_gradients_are_clipped(run):
    rates = run(warmup_steps=2, max_steps=5, learning_rate=3e-3).tags["charts/learning_rate"]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 1.5e-3, 0.0], abs=1e-9)
    before = make_classifier().state_dict()
    for max_grad_norm, change in ((1e6, 5e-3), (1e-12, 0.0)):  # Adam's first step is the learning rate
        after = weights(run(max_steps=1, warmup_steps=1, max_grad_norm=max_grad_norm).folder)
        largest = max((before[name] - x).abs().max().item() for name, x in after.items())
        assert largest == pytest.approx(change, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_run_learns_only_by_its_learning_rate(run, architecture):
    answers = [[f"{b}" * (1 + a % 2), "+", "-" * (1 + b % 3)][: 2 + a % 2] for a in range(6) for b in range(8)]
    rows = [ranking(f"{n}=", *texts) for n, texts in enumerate(answers)]
    learner, frozen = (run(rows, None, architecture, max_steps=30, learning_rate=x).metrics for x in (1e-2, FROZEN))
    assert learner["eval/accuracy"] > 0.95 and frozen["eval/accuracy"] < 0.8
    assert frozen["eval/loss"] == pytest.approx(frozen["eval/loss_before"], abs=1e-5)


def test_the_rarest_prompts_are_held_out_for_every_seed(run):
    rows = [ranking(f"{n}=", f"{n}" * k, "-") for n in range(10) for k in range(1, 2 + (n != 4))]
    train, rare = (expected(make_classifier(), [r for r in rows if (r["prompt"] == "4=") == x]) for x in (False, True))
    for seed in (1, 2):
        result = run(rows, None, seed=seed, train_batch_size=18, max_steps=1)
        check(result.metrics, rare, "eval/{}_before")
        assert result.tags["train/loss"][0] == pytest.approx(train["loss"].item(), abs=1e-5)


def test_a_run_that_is_cut_off_resumes_bit_equal(run, monkeypatch):
    flags = {"max_steps": 6, "train_batch_size": 3, "eval_steps": 3, "warmup_steps": 1, "architecture": None}
    whole, save = run(**flags).folder, torch.save
    monkeypatch.setattr(torch, "save", lambda state, path: 1 / 0 if state["step"] == 6 else save(state, path))
    with pytest.raises(ZeroDivisionError):
        run(**flags, output_dir=str(whole.parent / "cut"))
    monkeypatch.undo()
    (cut,) = (whole.parent / "cut").glob("*")
    reward_model.main(reward_model.Args(resume=str(cut)))
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (cut, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (cut / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert {**scalars(cut), "charts/SPS": 0} == {**scalars(whole), "charts/SPS": 0}


def test_the_tiny_model_learns_which_sums_are_right(run, monkeypatch):
    rows = [row[:400] for row in reward_model.addition_rows()]
    for row in reward_model.addition_pairs(rows[0], 1, 1, (-3, 10)):
        a, b = map(int, row["prompt"][:-1].split("+"))
        chosen, rejected = (int(row[key].split("=")[-1]) for key in ("chosen", "rejected"))
        assert chosen == a + b and rejected - chosen in (-3, 10)
    monkeypatch.setattr(reward_model, "addition_rows", lambda: rows)
    flags = {"dataset_name": None, "model_name_or_path": None, "sft_steps": 20, "train_batch_size": 64, "max_steps": 40}
    metrics = run(**flags, learning_rate=2e-3, max_eval_samples=200).metrics
    assert metrics["eval/accuracy"] > 0.7 > metrics["eval/accuracy_before"] + 0.05
