"""reward_model.py: losses, scores, calibration; then the whole script on a tiny model."""

import json
import math
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import CONFIGS, PAIRS, make_model, make_tokenizer, run_folder, scalars, weights, write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, MistralConfig

import grpo_llm
import reward_model
from reward_model import (
    Args,
    agreement,
    all_pairs_loss,
    bradley_terry_loss,
    calibration,
    choose_scores_fn,
    encode_rankings,
    give_own_pad_token,
    load_model,
    main,
    packed_scores,
    plackett_luce_loss,
    real_pairs,
    score_rankings,
    separate_scores,
)

SIZE = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def classifier(architecture: str = "llama", seed: int = 0):
    torch.manual_seed(seed)
    config = CONFIGS[architecture]
    config = config.__class__(**{**config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def bert():
    torch.manual_seed(0)
    config = BertConfig(**SIZE, max_position_embeddings=64, num_labels=1, pad_token_id=0)
    return AutoModelForSequenceClassification.from_config(config).eval()


# ---- losses


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0])
    by_hand = [-math.log(1 / (1 + math.exp(-d))) for d in (0.5, -2.0)]
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(sum(by_hand) / 2)
    margin = torch.tensor([0.25, -1.0])
    by_hand = [-math.log(1 / (1 + math.exp(-d))) for d in (0.25, -1.0)]
    assert bradley_terry_loss(chosen, rejected, margin).item() == pytest.approx(sum(by_hand) / 2)
    label = torch.tensor([0.5, 0.8])
    p = [1 / (1 + math.exp(-d)) for d in (0.5, -2.0)]
    by_hand = [-l * math.log(x) - (1 - l) * math.log(1 - x) for l, x in zip(label.tolist(), p)]
    assert bradley_terry_loss(chosen, rejected, label=label).item() == pytest.approx(sum(by_hand) / 2)
    assert bradley_terry_loss(torch.tensor([0.0]), torch.tensor([200.0])).item() == pytest.approx(200.0)


def test_swapping_the_answers_and_the_label_changes_nothing():
    chosen, rejected, margin = torch.tensor([0.0, 1.0]), torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.5])
    label = torch.tensor([0.0, 0.7])
    there = bradley_terry_loss(chosen, rejected, margin, label)
    assert there.item() == pytest.approx(bradley_terry_loss(rejected, chosen, margin, 1 - label).item())


def test_a_tie_pulls_the_two_rewards_together():
    scores = torch.tensor([1.0, -1.0], requires_grad=True)
    gradient = torch.autograd.grad(bradley_terry_loss(scores[:1], scores[1:], label=torch.tensor([0.5])), scores)[0]
    assert gradient[0] > 0 > gradient[1]


def test_plackett_luce_by_hand_and_for_two_answers():
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -1.0]])
    e = [[math.exp(s) for s in row] for row in scores.tolist()]
    by_hand = [-math.log(a / (a + b + c)) - math.log(b / (b + c)) for a, b, c in e]
    assert plackett_luce_loss(scores).item() == pytest.approx(sum(by_hand) / 2)
    assert plackett_luce_loss(scores[:, :2]).item() == pytest.approx(
        bradley_terry_loss(scores[:, 0], scores[:, 1]).item()
    )
    shorter = torch.tensor([[True, True, True], [True, True, False]])
    by_hand[1] = -math.log(e[1][0] / (e[1][0] + e[1][1]))
    assert plackett_luce_loss(scores, shorter).item() == pytest.approx(sum(by_hand) / 2)
    scores = (1000 * scores).requires_grad_()
    assert torch.autograd.grad(plackett_luce_loss(scores, shorter), scores)[0].isfinite().all()


def test_plackett_luce_is_a_probability_of_the_order():
    from itertools import permutations

    scores = torch.randn(4, generator=torch.Generator().manual_seed(0))
    total = sum(math.exp(-plackett_luce_loss(scores[list(order)][None]).item()) for order in permutations(range(4)))
    assert total == pytest.approx(1.0, abs=1e-5)


def test_all_pairs_by_hand_and_for_two_answers():
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -1.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])

    def loss(d: float) -> float:
        return math.log(1 + math.exp(-d))

    by_hand = ((loss(1) + loss(2) + loss(1)) / 3 + loss(-3)) / 2
    assert all_pairs_loss(scores, mask).item() == pytest.approx(by_hand)
    assert all_pairs_loss(scores[:, :2]).item() == pytest.approx(bradley_terry_loss(scores[:, 0], scores[:, 1]).item())


def test_real_pairs_are_all_pairs_of_answers_that_are_there():
    row, first, second = real_pairs(torch.tensor([[True, True, True], [True, True, False]]))
    assert list(zip(*(x.tolist() for x in (row, first, second)))) == [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 1)]


def test_calibration_and_agreement_by_hand():
    probabilities, labels = torch.tensor([0.85, 0.83, 0.12, 0.55]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    error, table = calibration(probabilities, labels)
    assert error == pytest.approx((2 * abs(0.84 - 0.5) + abs(0.12 - 0) + abs(0.55 - 1)) / 4)
    assert table[8].tolist() == pytest.approx([0.84, 0.5, 2]) and table[3].tolist() == [0, 0, 0]
    assert calibration(torch.tensor([1.0]), torch.tensor([1.0]))[0] == 0
    assert agreement(torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([1.0, 0.2, 1.0, 0.0])) == pytest.approx(2.5 / 4)


# ---- scores

ROWS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "345"},
    {"prompt": "12+12=", "chosen": "24", "rejected": "25"},
    {"prompt": "7=", "completions": ["7", "8", "-1234"]},
]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_packed_scores_are_the_models_own_whatever_the_batch(architecture):
    model, tokenizer = classifier(architecture), make_tokenizer()
    examples = encode_rankings(ROWS, "training", tokenizer, 60)
    together, mask = score_rankings(packed_scores, model, examples, 0)
    separate, _ = score_rankings(separate_scores, model, examples, 0)
    assert mask.tolist() == [[True, True, False], [True, True, False], [True] * 3]
    for i, row in enumerate(ROWS):
        for k, answer in enumerate(row.get("completions") or [row["chosen"], row["rejected"]]):
            own = model(**tokenizer(row["prompt"] + answer, return_tensors="pt")).logits.item()
            assert together[i, k].item() == pytest.approx(own, abs=1e-4)
            assert separate[i, k].item() == pytest.approx(own, abs=1e-4)


def test_gradients_of_packed_and_separate_scores_agree():
    model = classifier()
    examples = encode_rankings(ROWS[:2], "training", make_tokenizer(), 60)
    gradients = []
    for scores_fn in (packed_scores, separate_scores):
        scores, _ = score_rankings(scores_fn, model, examples, 0)
        loss = bradley_terry_loss(scores[:, 0], scores[:, 1])
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, theirs in zip(*gradients):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


def test_encoders_and_sliding_windows_read_every_answer_separately():
    assert choose_scores_fn(classifier(), [3, 4, 5]) is packed_scores
    assert choose_scores_fn(bert(), [3, 4, 5]) is separate_scores
    config = MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=4, num_labels=1, pad_token_id=0)
    assert choose_scores_fn(AutoModelForSequenceClassification.from_config(config), [3, 4, 5]) is separate_scores
    model, tokenizer = bert(), make_tokenizer()
    examples = encode_rankings(ROWS[:2], "training", tokenizer, 60)
    scores, _ = score_rankings(separate_scores, model, examples, 0)
    own = model(**tokenizer("12+12=25", return_tensors="pt")).logits.item()
    assert scores[1, 1].item() == pytest.approx(own, abs=1e-5)


def test_the_query_is_what_the_answers_have_in_common(capsys):
    (example,) = encode_rankings(
        [{"prompt": "1+1=", "chosen": "123", "rejected": "12"}], "training", make_tokenizer(), 9
    )
    assert make_tokenizer().decode(example["query"]) == "1+1=1"  # and each response has a token of its own
    assert [make_tokenizer().decode(r) for r in example["responses"]] == ["23", "2"]
    cut = encode_rankings([{"prompt": "1+1=", "chosen": "1234567", "rejected": "4"}], "training", make_tokenizer(), 9)
    assert make_tokenizer().decode(cut[0]["responses"][0]) == "12345"
    assert capsys.readouterr().out == "of 1 training rankings: 1 cut (--max-length 9)\n"
    rows = [{"prompt": "1=", "chosen": "2222", "rejected": "2223"}, {"prompt": "1=", "chosen": "2", "rejected": "2"},
            {"prompt": "1=", "chosen": "2", "rejected": "3"}]  # fmt: skip
    assert len(encode_rankings(rows, "training", make_tokenizer(), 5)) == 1
    assert capsys.readouterr().out == (
        "of 3 training rankings: 1 with an empty or the same answer left out, 1 the same once cut left out, 1 cut "
        "(--max-length 5)\n"
    )


def test_a_pad_token_that_is_eos_is_replaced():
    """transformers scores the last token that is not pad: with pad == eos, an answer's EOS would not be read."""
    model, tokenizer = classifier(), make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    for rows in (20, 19):  # the embeddings have a row for the new token, or get one
        model.resize_token_embeddings(rows)
        give_own_pad_token(model, tokenizer)
        assert tokenizer.pad_token_id == model.config.pad_token_id == 19
        assert model.get_input_embeddings().num_embeddings == 20
        tokenizer.pad_token = tokenizer.eos_token
    give_own_pad_token(model, tokenizer)
    ids = tokenizer("1+1=2").input_ids + [tokenizer.eos_token_id]
    alone = model(input_ids=torch.tensor([ids])).logits
    padded = model(input_ids=torch.tensor([ids + [19, 19], [3] * 8])).logits[0]
    assert torch.allclose(alone[0], padded, atol=1e-5)
    assert not torch.allclose(model(input_ids=torch.tensor([ids[:-1]])).logits[0], padded, atol=1e-3)


def test_a_new_head_has_the_published_spread(tmp_path):
    """Standard deviation 1/sqrt(hidden + 1), over seeds; everything else is the backbone's."""
    make_model("llama").save_pretrained(tmp_path)
    heads = []
    for seed in range(40):
        torch.manual_seed(seed)
        model = load_model(str(tmp_path), "--x", AutoModelForSequenceClassification, new_head=True, num_labels=1)
        heads.append(model.score.weight.detach().flatten())
    assert torch.cat(heads).std().item() == pytest.approx(33**-0.5, rel=0.05)
    expected = make_model("llama").model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, expected)


def test_scores_under_autocast_are_not_rounded_to_bf16():
    examples = encode_rankings(ROWS, "training", make_tokenizer(), 60)
    with torch.autocast("cpu", torch.bfloat16):
        scores, mask = score_rankings(packed_scores, classifier(), examples, 0)
    assert (scores[mask] != scores[mask].bfloat16().float()).any()


@pytest.mark.parametrize("architecture", ["DistilBert", "Roberta"])
def test_other_encoders_get_a_head(tmp_path, architecture):
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=20, hidden_size=32, dim=32, hidden_dim=64, intermediate_size=64, num_hidden_layers=2, n_layers=2,
        num_attention_heads=4, n_heads=4, max_position_embeddings=34, pad_token_id=0,
    )  # fmt: skip
    getattr(transformers, f"{architecture}Model")(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "--x", AutoModelForSequenceClassification, new_head=True, num_labels=1)
    examples = encode_rankings(ROWS, "training", make_tokenizer(), 60)
    scores, mask = score_rankings(choose_scores_fn(model, [3, 4, 5]), model, examples, 0)
    assert scores[mask].isfinite().all() and scores[mask].std() > 1e-4


# ---- the whole script on a tiny model


def test_a_run_learns_logs_and_saves_what_others_load(tiny, capsys):
    args = tiny(max_steps=20)
    metrics = main(args)
    folder = run_folder(args)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert json.loads((folder / "summary.json").read_text()) == metrics
    assert metrics["eval/accuracy"] == 1.0 and metrics["eval/loss"] < metrics["eval/loss_before"]
    assert {"eval/accuracy_before", "eval/accuracy_longer", "eval/calibration_error", "seed"} <= set(metrics)
    assert metrics["eval/accuracy_longer"] != 0.5
    tags = scalars(folder)
    assert len(tags["train/loss"]) == 20 and tags["train/accuracy"][-1][1] > 0.9
    events = EventAccumulator(str(folder))
    events.Reload()
    assert len(events.Images("calibration")) >= 1
    # a fresh process scores bit-equal, and the policy scripts standardise by the config's figures
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("1+1=1", return_tensors="pt")
    code = (
        "import sys, torch; from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T;"
        "m = M.from_pretrained(sys.argv[1]).eval(); t = T.from_pretrained(sys.argv[1]);"
        "print(m(**t('1+1=1', return_tensors='pt')).logits.item().hex())"
    )
    fresh = subprocess.run([sys.executable, "-c", code, folder / "model"], capture_output=True, text=True, timeout=120)
    assert float.fromhex(fresh.stdout) == model(**ids).logits.item()
    rows = PAIRS[:-6]
    answers = [(r["prompt"], a) for r in rows for a in (r["chosen"], r["rejected"]) if r["chosen"] != r["rejected"]]
    flags = grpo_llm.Args(reward_model_path=str(folder / "model"), normalize_reward_model=True)
    score = grpo_llm.load_reward_model(flags, torch.device("cpu"))
    scores = score([{"prompt": p, "turns": [{"role": "user", "content": p}], "text": text} for p, text in answers])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("ranking_loss", ["plackett_luce", "all_pairs"])
def test_rankings_are_learnt(tiny, tmp_path, ranking_loss):
    rows = [
        {"prompt": f"{a}=", "completions": ["1" * (a % 3 + 1), "2" * 3, "3" * 2, "4"][: 3 + a % 2]} for a in range(30)
    ]
    data = write_rows(tmp_path / "rankings.jsonl", rows)
    args = tiny(dataset_name=data, ranking_loss=ranking_loss, max_steps=50, center_rewards_coefficient=0.1)
    metrics = main(args)
    assert metrics["eval/accuracy"] > 0.9 and abs(metrics["eval/mean_reward"]) < 0.5


def test_margins_labels_and_centring_reach_the_loss(tiny, tmp_path):
    rows = [{**row, "margin": 0.5, "label": 0.9} for row in PAIRS]
    args = tiny(dataset_name=write_rows(tmp_path / "strength.jsonl", rows), max_steps=1, center_rewards_coefficient=0.1)
    main(args)
    torch.manual_seed(1)
    model = load_model(
        args.model_name_or_path, "--x", AutoModelForSequenceClassification, new_head=True, num_labels=1, pad_token_id=0
    )
    examples = encode_rankings(rows[:-6], "training", make_tokenizer(), 128)
    batch = [examples[i] for i in reward_model.data_order(0, 8, len(examples), 1)]
    scores, _ = score_rankings(packed_scores, model, batch, 0)
    expected = bradley_terry_loss(*scores.T, torch.full((8,), 0.5), torch.full((8,), 0.9))
    expected = expected + 0.1 * scores.sum(1).square().mean()
    assert scalars(run_folder(args))["train/loss"][0][1] == pytest.approx(expected.item(), rel=1e-4)


def test_microbatches_and_gradient_checkpointing_do_not_change_the_result(tiny, tmp_path):
    found = []
    for number, flags in enumerate(({}, {"max_tokens_per_microbatch": 1}, {"gradient_checkpointing": True})):
        args = tiny(output_dir=str(tmp_path / str(number)), max_steps=2, learning_rate=1e-3, **flags)
        main(args)
        found.append((weights(run_folder(args)), scalars(run_folder(args))["train/grad_norm"]))
    for other, norms in found[1:]:
        assert all(torch.allclose(found[0][0][name], other[name], atol=1e-5) for name in other)
        assert [n for _, n in norms] == pytest.approx([n for _, n in found[0][1]], rel=1e-4)


def test_an_encoder_is_trained_too(tiny, tmp_path, capsys):
    bert().base_model.save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    metrics = main(tiny(model_name_or_path=str(tmp_path / "bert"), max_steps=30, max_length=64))
    assert "every answer is read together with its own prompt" in capsys.readouterr().out
    assert metrics["eval/accuracy"] > 0.9


def test_the_embedded_run_learns(tmp_path):
    metrics = main(Args(output_dir=str(tmp_path), sft_steps=60, max_steps=60, max_eval_samples=64, device="cpu",
                        bf16=False))  # fmt: skip
    assert metrics["eval/accuracy"] > 0.6 and metrics["eval/loss"] < metrics["eval/loss_before"]
