"""reward_model.py: its losses, scores and data; then whole runs, whose tags are computed again by hand."""

import math
import random
import shutil
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
from transformers import Gemma3TextConfig, RobertaConfig

import ppo_llm
import reward_model
from reward_model import Args, UserError, all_pairs_loss, bradley_terry_loss, load_classifier, make_rankings, pairwise
from reward_model import plackett_luce_loss, score_answers, share_right

FROZEN = 1e-12  # a learning rate that changes no weight by more than rounding
TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
SIZE = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
load = AutoModelForSequenceClassification.from_pretrained
CPU = torch.device("cpu")


def ranking(prompt, *answers, **columns):
    return {"prompt": prompt, "completions": [*answers], **columns}


TRAIN = [  # rankings of 2 to 4 answers of unequal lengths; pairs with and without a margin
    ranking("10+2=", "12", "-1", "1", "4444444"), ranking("3=", "3", "2 or 55555"), ranking("7+7+7=", "21", "210", "0"),
    ranking("a", "a b c", "c", "b", "bb"), ranking("1+", "1=2", "2", margin=0.5), ranking("2=", "2", "-"),
    ranking("1-1=", "0", "000", margin=-1), ranking("5=", "5", "6", margin=2),
]  # fmt: skip
HELD_OUT = [ranking("9+", "1=10", "9", "10=19 or not"), ranking("8=", "8", "9"),
            ranking("6=", "77777", "6", margin=0.3), ranking("4=", "4", "5")]  # fmt: skip


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
        margin, answers = row.get("margin", 0.0), row["completions"]
        ids = [torch.tensor([make_tokenizer().encode(row["prompt"] + answer) + [1]]) for answer in answers]  # EOS
        s = torch.cat([model(x).logits[0] for x in ids])
        pairs = [(i, j) for j in range(len(s)) for i in range(j)]
        if len(s) == 2:
            loss = -logsigmoid(s[0] - s[1] - margin)
        elif kind == "plackett_luce":
            loss = -sum(s[k:].log_softmax(0)[0] for k in range(len(s)))
        else:
            loss = sum((1 + (s[j] - s[i]).exp()).log() for i, j in pairs) / len(pairs)
        values["loss"].append(loss + center * s.sum() ** 2)
        values["mean_reward"] += s
        for i, j in pairs:
            longer = torch.tensor(float(len(answers[i]) - len(answers[j])))
            values["margin"].append(s[i] - s[j])
            values["accuracy"].append(((s[i] - s[j]).sign() + 1) / 2)
            values["accuracy_longer"].append((longer.sign() + 1) / 2)
    return {name: torch.stack(x).mean() for name, x in values.items()}


def check(values, expected, name):
    expected = {name.format(tag): pytest.approx(x.item(), rel=1e-3, abs=1e-5) for tag, x in expected.items()}
    assert {tag: values[tag] for tag in expected} == expected


def test_bradley_terry_by_hand():
    chosen, rejected, margin = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0]), torch.tensor([0.25, -1.0])
    loss = {d: math.log(1 + math.exp(-d)) for d in (0.5, -2, 0.25, -1)}
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx((loss[0.5] + loss[-2]) / 2)
    assert bradley_terry_loss(chosen, rejected, margin).item() == pytest.approx((loss[0.25] + loss[-1]) / 2)
    assert bradley_terry_loss(torch.tensor([0.0]), torch.tensor([200.0])).item() == pytest.approx(200.0)
    assert share_right(torch.tensor([2.0, 0.0, -1e-9])) == [1, 0.5, 0]


def test_all_pairs_is_the_mean_over_the_pairs_of_each_ranking():
    scores, mask = torch.tensor([[1.0, 0, 3], [2, 1, 9]]), torch.tensor([[True] * 3, [True, True, False]])
    loss = {d: math.log(1 + math.exp(-d)) for d in (1, -2, -3)}
    by_hand = ((loss[1] + loss[-2] + loss[-3]) / 3 + loss[1]) / 2
    assert all_pairs_loss(scores, mask).item() == pytest.approx(by_hand)
    leads, is_pair = pairwise(scores, mask)
    assert leads[is_pair].tolist() == [1, -2, -3, 1]


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
def test_scores_and_gradients_of_a_batch_are_the_models_own(architecture):
    model, rng = make_classifier(architecture), random.Random(0)
    answers = [rng.choices(range(1, 99), k=n) for n in (1, 9, 3, 20, 2, 5, 1, 8, 1)]
    own = torch.cat([model(torch.tensor([answer])).logits[0] for answer in answers])
    gradient = torch.autograd.grad(own.square().sum(), [*model.parameters()])
    scores = score_answers(Args(bf16=False), model, answers)
    assert scores.shape == (9,) and torch.allclose(scores, own, rtol=0, atol=1e-5)
    found = torch.autograd.grad(scores.square().sum(), [*model.parameters()])
    assert all(torch.allclose(one, two, rtol=1e-3, atol=1e-5) for one, two in zip(found, gradient))
    scores = score_answers(Args(bf16=True), model, answers)
    assert scores.dtype == torch.float32
    assert architecture == "bert" or (scores != scores.bfloat16().float()).any()  # the head is in fp32


def test_an_encoder_reads_as_many_tokens_as_it_has_positions(tmp_path):
    """RoBERTa's positions begin after its padding id: it reads 12 tokens in 14 positions."""
    sizes = {**SIZE, "max_position_embeddings": 14}
    del sizes["num_key_value_heads"]
    config = RobertaConfig(**sizes, num_labels=1, pad_token_id=1, bos_token_id=None, eos_token_id=None)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert reward_model.context_length(model) == 12
    score_answers(Args(bf16=False), model, [[5] * 12, [6] * 3])
    assert reward_model.context_length(make_classifier("bert")) == reward_model.context_length(make_classifier()) == 128


def test_a_new_head_has_the_published_spread_and_the_backbone_stays(tmp_path):
    source = make_model("llama", vocab_size=128, attention_dropout=0.1)
    source.save_pretrained(tmp_path / "llama")
    BertModel(BertConfig(**SIZE), add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    for name in ("llama", "bert"):
        make_tokenizer().save_pretrained(tmp_path / name)
    heads = []
    for seed in range(40):
        model, _ = load_classifier(str(tmp_path / "llama"), Args(seed=seed), CPU)
        heads.append(model.score.weight.detach())
    assert torch.cat(heads).std().item() == pytest.approx(33**-0.5, rel=0.05) and model.config.attention_dropout == 0
    assert all(torch.equal(x, model.model.state_dict()[name]) for name, x in source.model.state_dict().items())
    again, _ = load_classifier(str(tmp_path / "llama"), Args(seed=seed), CPU)
    assert torch.equal(again.score.weight, model.score.weight) and not torch.equal(heads[0], heads[1])
    encoder, _ = load_classifier(str(tmp_path / "bert"), Args(), CPU)
    assert encoder.classifier.bias.tolist() == [0] and encoder.classifier.weight.std() > 0.1
    state = {name: x.contiguous() for name, x in source.state_dict().items() if "up_proj" not in name}
    source.save_pretrained(tmp_path / "llama", state_dict=state)
    with pytest.raises(UserError, match="--model-name-or-path .* lacks weights: .*up_proj"):
        load_classifier(str(tmp_path / "llama"), Args(), CPU)


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_the_pad_token_is_the_classifiers_own(tmp_path, pad):
    for part in (make_classifier(), make_tokenizer(pad=pad)):
        part.save_pretrained(tmp_path)
    model, tokenizer = load_classifier(str(tmp_path), Args(), CPU)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 98
    rows = torch.tensor([[5, 6, 1, 98, 98], [5, 6, 7, 8, 9]])
    assert torch.allclose(model(rows).logits[0], model(rows[:1, :3]).logits[0], atol=1e-5)  # the EOS, 1, is read


def test_the_pad_id_stands_where_the_model_looks_for_it_also_after_saving(run, tmp_path):
    """Configurations inside a configuration hold one too; without it a saved classifier reads the padding."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3TextConfig(**small, vocab_size=128, num_key_value_heads=2, head_dim=8, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "gemma")
    make_tokenizer(pad="<eos>").save_pretrained(tmp_path / "gemma")
    result = run(model_name_or_path=str(tmp_path / "gemma"), max_steps=1)
    saved = load(result.folder / "model")
    pad_id = AutoTokenizer.from_pretrained(result.folder / "model").pad_token_id
    assert saved.config.pad_token_id == saved.config.get_text_config().pad_token_id == pad_id == 98
    rows = torch.tensor([[5, 6, 1, pad_id, pad_id], [5, 6, 7, 8, 9]])
    assert torch.allclose(saved(rows).logits[0], saved(rows[:1, :3]).logits[0], atol=1e-5)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_ppo_reads_the_saved_folder_with_the_same_scores(run, template):
    result = run(template=template, max_steps=3)
    path, saved = result.folder / "model", torch.load(result.folder / "checkpoint.pt", weights_only=True)["model"]
    model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
    assert all(torch.equal(x, saved[name]) for name, x in model.state_dict().items()) and "score.weight" in saved
    rankings = make_rankings(TRAIN, tokenizer, 128, "01 Dec 2026", rank=0)
    scores = torch.cat([score_answers(Args(bf16=False), model, ranking.answers) for ranking in rankings])
    samples = [{"prompt": row["prompt"], "turns": [{"role": "user", "content": row["prompt"]}], "text": answer}
               for row in TRAIN for answer in row["completions"]]  # fmt: skip
    for normalize in (False, True):  # by the mean and standard deviation of the answers that there are
        args = ppo_llm.Args(reward_model_path=str(path), normalize_reward_model=normalize)
        found = ppo_llm.load_reward_model(args, CPU)(samples)
        wanted = (scores - scores.mean()) / scores.std() if normalize else scores
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5 if normalize else 1e-6)


@pytest.mark.parametrize("flags", [
    {"micro_batch_size": 1}, {"micro_batch_size": 3, "ranking_loss": "all_pairs"},
    {"micro_batch_size": 5, "center_rewards_coefficient": 0.1}, {"micro_batch_size": 99, "gradient_checkpointing": True},
])  # fmt: skip
def test_the_tags_of_a_run_are_those_computed_by_hand(run, flags):
    result, model = run(max_steps=4, eval_steps=2, train_batch_size=16, **flags), make_classifier()
    options = flags.get("ranking_loss", "plackett_luce"), flags.get("center_rewards_coefficient", 0.0)
    values = expected(model, TRAIN, *options)  # a batch is TRAIN twice
    gradient = torch.autograd.grad(values["loss"], [*model.parameters()])
    values["grad_norm"] = sum(g.square().sum() for g in gradient).sqrt()
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
    whole, half = (run(train_batch_size=3, num_train_epochs=n, max_steps=None).tags["train/loss"] for n in (3, 1.5))
    assert len(whole) == 8 and len(half) == 4
    with pytest.raises(UserError, match="8 of 8 rows cannot be used; row 1: an answer ends after --max-length 2"):
        run(max_length=2)


def test_the_learning_rate_follows_its_schedule_and_gradients_are_clipped(run):
    rates = run(warmup_steps=2, max_steps=5, learning_rate=3e-3).tags["charts/learning_rate"]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 2e-3, 1e-3], abs=1e-9)
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


def test_held_out_prompts_are_the_same_for_every_seed_and_never_trained_on(run, monkeypatch):
    prompts, real = [], reward_model.ranking_losses

    def watched(args, model, rankings):
        prompts.append(({ranking.prompt for ranking in rankings}, torch.is_grad_enabled()))
        return real(args, model, rankings)

    monkeypatch.setattr(reward_model, "ranking_losses", watched)
    rows = [ranking(f"{n}=", f"{n}" * k, "-") for n in range(20) for k in range(1, 3)]
    sides = []
    for seed in (1, 2):
        prompts.clear()
        run(rows, None, seed=seed, train_batch_size=6, max_steps=None, num_train_epochs=1)
        train = set().union(*(names for names, trains in prompts if trains))
        sides.append(set().union(*(names for names, trains in prompts if not trains)))
        assert len(sides[-1]) == 2 and train == {row["prompt"] for row in rows} - sides[-1]
    assert sides[0] == sides[1]


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
    assert states[0].pop("date_string") == states[1].pop("date_string")
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (cut / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert scalars(cut) == scalars(whole)
    shutil.rmtree(cut)


def test_the_tiny_model_learns_which_sums_are_right(run, monkeypatch):
    rows = [row[:400] for row in reward_model.addition_rows()]
    monkeypatch.setattr(reward_model, "addition_rows", lambda: rows)
    for split, pairs in zip(rows, reward_model.addition_pairs()):
        assert {pair["prompt"] for pair in pairs} == {row["prompt"] for row in split}
        for pair in pairs:
            chosen, rejected = (int(pair[key].split(";")[-1]) for key in ("chosen", "rejected"))
            assert chosen == sum(map(int, pair["prompt"][:-1].split("+"))) and abs(rejected - chosen) == 1
    flags = {"dataset_name": None, "model_name_or_path": None, "sft_steps": 20, "train_batch_size": 64, "max_steps": 40}
    metrics = run(**flags, learning_rate=2e-3, max_eval_samples=200).metrics
    assert metrics["eval/accuracy"] > 0.7 > metrics["eval/accuracy_before"] + 0.05
