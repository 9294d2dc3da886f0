"""dpo.py: the losses, the pairs and the reference; then the whole script on a tiny model."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import PAIRS, make_model, make_tokenizer, run_folder, scalars, weights, write_rows
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig

import dpo
from dpo import Args, dpo_loss, encode_answer, encode_pairs, main, packed_states, pair_logps, prompt_and_answers

CHOSEN, REJECTED = torch.tensor([-2.0, -5.0, -1.0]), torch.tensor([-4.0, -3.0, -1.5])
REF_CHOSEN, REF_REJECTED = torch.tensor([-3.0, -4.0, -1.0]), torch.tensor([-3.5, -3.5, -1.0])
H = [0.1 * ((-2 + 3) - (-4 + 3.5)), 0.1 * ((-5 + 4) - (-3 + 3.5)), 0.1 * ((-1 + 1) - (-1.5 + 1))]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("loss_type, smoothing, by_hand", [
    ("sigmoid", 0.0, lambda h: -math.log(sigmoid(h))),
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


def test_an_unknown_loss_is_an_error():
    with pytest.raises(ValueError, match="unknown loss_type 'kto'"):
        dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.1, "kto", 0.0)


def test_robust_is_the_unbiased_estimate_under_flipped_labels():
    """Its expectation, when a share e of the preferences is flipped, is the clean loss; cDPO's is not."""
    e = 0.3
    clean, _, _ = dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.1, "sigmoid", 0.0)
    right, _, _ = dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.1, "robust", e)
    flipped, _, _ = dpo_loss(REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN, 0.1, "robust", e)
    assert torch.allclose((1 - e) * right + e * flipped, clean, atol=1e-6)


def test_losses_are_finite_for_large_differences_and_rewards_have_no_gradient():
    policy = torch.tensor([-3000.0], requires_grad=True)
    losses, chosen, _ = dpo_loss(policy, torch.tensor([0.0]), torch.zeros(1), torch.zeros(1), 1.0, "sigmoid", 0.0)
    assert losses.item() == pytest.approx(3000.0) and torch.autograd.grad(losses, policy)[0].item() == -1.0
    assert not chosen.requires_grad


def test_ipo_means_over_tokens_do_not_depend_on_the_length():
    """The optimum's gap of log ratios is 1/(2 beta): of sums, so that answers of twice the length need half the gap a
    token; of means a token, whatever the length."""
    beta, zeros = 0.25, torch.zeros(1)
    for length in (5, 10):
        per_token = torch.tensor([1 / (2 * beta)])
        mean_loss, _, _ = dpo_loss(per_token, zeros, zeros, zeros, beta, "ipo", 0.0)
        sum_loss, _, _ = dpo_loss(per_token * length, zeros, zeros, zeros, beta, "ipo", 0.0)
        assert mean_loss.item() == 0.0
        assert sum_loss.item() == pytest.approx(((length - 1) / (2 * beta)) ** 2)


# ---- data


def test_answers_are_the_rest_of_the_whole_and_end_with_eos():
    tokenizer = make_tokenizer()
    query = dpo.encode_prompt("1+1=", tokenizer)
    ids = encode_answer("1+1=", "2", query, tokenizer)
    assert ids == [*tokenizer("2").input_ids, 1] and query + ids[:-1] == tokenizer("1+1=2").input_ids
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + m['content'] + '=' }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    query = dpo.encode_prompt([{"role": "b", "content": "1+1"}], tokenizer)
    ids = encode_answer([{"role": "b", "content": "1+1"}], "2", query, tokenizer)
    assert tokenizer.decode(query + ids) == "b1+1=a2=" and tokenizer.decode(ids) == "2="
    tokenizer.chat_template = tokenizer.chat_template.replace("%}a{%", "%}c{%")  # the prompt alone renders otherwise
    query = dpo.encode_prompt([{"role": "b", "content": "1+1"}], tokenizer)
    assert encode_answer([{"role": "b", "content": "1+1"}], "2", query, tokenizer) == [*tokenizer("2").input_ids, 1]


def test_pairs_come_as_texts_and_as_conversations():
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "1+1="), ("assistant", "2"), ("assistant", "3")))
    for row in (
        {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        {"prompt": "1+1=", "completions": ["2", "3"]},
        {"prompt": "1+1=", "chosen": [user, good], "rejected": [user, bad]},
    ):
        assert prompt_and_answers(row) == ("1+1=", ["2", "3"])
    for row in ({"prompt": [user], "chosen": [good], "rejected": [bad]},
                {"chosen": [user, good], "rejected": [user, bad]}):  # fmt: skip
        assert prompt_and_answers(row) == ([user], ["2", "3"])


def test_what_is_dropped_and_cut_is_counted(capsys):
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}, {"prompt": "1+1=", "chosen": "2", "rejected": "2"},
            {"prompt": "1+1=", "chosen": "2", "rejected": " "}, {"prompt": "1" * 9, "chosen": "2", "rejected": "3"},
            {"prompt": "1+1=", "chosen": "22222", "rejected": "3"},
            {"prompt": "1+1=", "chosen": "22223", "rejected": "22224"}]  # fmt: skip
    examples = encode_pairs(rows, "training", make_tokenizer(), 8)
    assert [len(e["query"]) + max(map(len, e["responses"])) for e in examples] == [6, 8]
    assert capsys.readouterr().out == (
        "of 6 training pairs: 2 with an empty or the same answer left out, 1 with too long a prompt left out, 1 the "
        "same once cut left out, 2 cut (--max-length 8)\n"
    )


# ---- log-probabilities


def test_pair_logps_are_the_naive_sums_whatever_the_batch():
    model, tokenizer = make_model(), make_tokenizer()
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "345"}, {"prompt": "12+12=", "chosen": "24", "rejected": "2"}]
    examples = encode_pairs(rows, "training", tokenizer, 50)
    together, lengths = pair_logps(packed_states, model, examples, 0)
    assert lengths.tolist() == [[2, 4], [3, 2]]
    for example, logps in zip(examples, together):
        alone = pair_logps(packed_states, model, [example], 13)[0][0]
        assert torch.allclose(alone, logps, atol=1e-5)
        for response, logp in zip(example["responses"], logps):
            ids = torch.tensor([example["query"] + response])
            logits = model(input_ids=ids).logits[0, len(example["query"]) - 1 : -1].log_softmax(-1)
            assert logp.item() == pytest.approx(logits.gather(1, ids[0, -len(response) :, None]).sum().item(), abs=1e-4)


def test_long_and_short_rows_fit_a_context_that_each_of_them_fits():
    """Padding has no position beyond the context of a model with learnt positions, though the packed row is longer."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    examples = [
        {"query": [3] * 4, "responses": [[4] * 20, [5] * 20]},
        {"query": [6] * 28, "responses": [[7] * 2, [8] * 3]},
    ]
    packed, _ = pair_logps(packed_states, model, examples, 0)
    padded = torch.cat([pair_logps(dpo.padded_states, model, [example], 0)[0] for example in examples])
    assert torch.allclose(packed, padded, atol=1e-4)


def test_a_reference_with_a_sliding_window_is_not_packed(tiny, monkeypatch):
    torch.manual_seed(0)
    size = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    other = MistralConfig(**size, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    args = tiny(max_steps=1)
    args.ref_model_name_or_path = str(Path(args.output_dir).parent / "mistral")
    AutoModelForCausalLM.from_config(other).save_pretrained(args.ref_model_name_or_path)
    used = []
    for name in ("packed_states", "padded_states"):
        real = getattr(dpo, name)

        def spy(model, *inputs, real=real, name=name):
            used.append((type(model).__name__[:5], name))
            return real(model, *inputs)

        monkeypatch.setattr(dpo, name, spy)
    main(args)
    assert set(used) == {("Llama", "packed_states"), ("Mistr", "padded_states")}


def test_a_damaged_cache_is_computed_again(tiny):
    args = tiny(max_steps=1)
    first = main(args)
    (file,) = (Path(args.output_dir) / ".reference_logps").iterdir()
    file.write_bytes(b"torn")
    again = main(tiny(max_steps=1, exp_name="again"))
    assert again["eval/loss"] == first["eval/loss"] and torch.load(file, weights_only=True)["logps"].shape == (36, 2)


# ---- the whole script on a tiny model


def test_a_run_learns_logs_and_saves(tiny, capsys):
    args = tiny(max_steps=20)
    metrics = main(args)
    folder = run_folder(args)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert json.loads((folder / "summary.json").read_text()) == metrics
    assert metrics["eval/loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["eval/rewards/margins_before"] == pytest.approx(0, abs=1e-5)
    assert metrics["eval/rewards/accuracies"] > 0.9 and metrics["eval/rewards/margins"] > 0.5
    tags = scalars(folder)
    assert tags["train/loss"][0][1] == pytest.approx(math.log(2), abs=1e-6)
    assert len(tags["train/rewards/margins"]) == 20 and tags["train/rewards/margins"][-1][1] > 0.5
    assert tags["charts/learning_rate"][-1][1] == pytest.approx(1e-3) and tags["train/epoch"][-1][1] > 5
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.vocab_size == 20


@pytest.mark.parametrize("flags", [
    {"loss_type": "ipo"}, {"loss_type": "hinge"}, {"loss_type": "robust", "label_smoothing": 0.1},
    {"label_smoothing": 0.1}, {"rpo_alpha": 1.0}, {"beta": 0.5},
])  # fmt: skip
def test_the_loop_passes_every_flag_of_the_loss(tiny, flags):
    """The first step's loss, when the reference is another model, by hand from log-probabilities."""
    args = tiny(max_steps=1, **flags)
    other = Path(args.output_dir).parent / "other"
    make_model("llama", seed=5, scale=0.1).save_pretrained(other)
    args.ref_model_name_or_path = str(other)
    main(args)
    tokenizer = make_tokenizer()
    examples = encode_pairs(PAIRS[:-6], "training", tokenizer, 128)
    batch = [examples[i] for i in dpo.data_order(0, 8, len(examples), 1)]
    logps, ref_logps = (
        pair_logps(packed_states, AutoModelForCausalLM.from_pretrained(name).float().eval(), batch, 0)[0].detach()
        for name in (args.model_name_or_path, other)
    )
    lengths = torch.tensor([[len(r) for r in example["responses"]] for example in batch])
    beta, counts = flags.get("beta", 0.1), lengths if flags.get("loss_type") == "ipo" else 1
    losses, chosen, _ = dpo_loss(
        *(logps / counts).T, *(ref_logps / counts).T, beta, flags.get("loss_type", "sigmoid"),
        flags.get("label_smoothing", 0.0),
    )  # fmt: skip
    losses = losses - flags.get("rpo_alpha", 0.0) * (logps / lengths)[:, 0]
    tags = scalars(run_folder(args))
    assert tags["train/loss"][0][1] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert tags["train/rewards/chosen"][0][1] == pytest.approx(chosen.mean().item(), rel=1e-3, abs=1e-5)
    assert tags["train/logps/rejected"][0][1] == pytest.approx(logps[:, 1].mean().item(), rel=1e-4)


def test_the_reference_is_computed_once_and_found_again(tiny, monkeypatch):
    calls = []
    real = dpo.all_logps

    def spy(logps_fn, model, examples, *rest):
        calls.append(len(examples))
        return real(logps_fn, model, examples, *rest)

    monkeypatch.setattr(dpo, "all_logps", spy)
    main(tiny(max_steps=1))
    assert calls == [36, 6, 6]  # the reference of all pairs, then the evaluations
    main(tiny(max_steps=1, exp_name="second", learning_rate=1e-3))
    assert calls[3:] == [6, 6]
    main(tiny(max_steps=1, exp_name="third", max_length=7))  # other tokens: another key
    assert 36 in calls[5:]
    with_other_model = tiny(max_steps=1, exp_name="fourth")
    other = Path(with_other_model.output_dir).parent / "other"
    make_model("llama", seed=5, scale=0.1).save_pretrained(other)
    with_other_model.ref_model_name_or_path = str(other)
    calls.clear()
    main(with_other_model)
    assert calls == [36, 6, 6]


def test_microbatches_and_gradient_checkpointing_do_not_change_the_result(tiny, tmp_path):
    found = []
    for number, flags in enumerate(({}, {"max_tokens_per_microbatch": 1}, {"gradient_checkpointing": True})):
        args = tiny(output_dir=str(tmp_path / str(number)), max_steps=2, learning_rate=1e-3, **flags)
        main(args)
        found.append((weights(run_folder(args)), scalars(run_folder(args))["train/grad_norm"]))
    for other, norms in found[1:]:
        assert all(torch.allclose(found[0][0][name], other[name], atol=1e-5) for name in other)
        assert [n for _, n in norms] == pytest.approx([n for _, n in found[0][1]], rel=1e-4)


def test_the_embedded_run_learns_its_preferences(tmp_path):
    metrics = main(Args(output_dir=str(tmp_path), sft_steps=60, max_steps=30, max_eval_samples=64, device="cpu",
                        bf16=False))  # fmt: skip
    assert {"eval/accuracy", "eval/accuracy_before"} <= set(metrics)
    assert metrics["eval/rewards/accuracies"] > 0.6  # it prefers answers that show their work by then


def test_sampled_accuracy_counts_final_results(monkeypatch):
    model, tokenizer = make_model(), make_tokenizer()
    texts = ["-2=12", "12", "12=2", "-12=3"]  # the answer to all is 12
    response, _ = dpo.pad_sequences([tokenizer(text).input_ids + [1] for text in texts], 0, "right")

    def generate(input_ids, attention_mask, **options):
        assert (options["do_sample"], options["temperature"], options["top_k"], options["top_p"]) == (True, 1.0, 0, 1.0)
        return torch.cat([input_ids, response], 1)

    monkeypatch.setattr(model, "generate", generate)
    examples = [{"prompt": "5+7=", "query": tokenizer("5+7=").input_ids, "answer": "12"}] * 4
    accuracy, table = dpo.sampled_accuracy(model, tokenizer, examples, seed=1)
    assert accuracy == 0.5 and "| 5+7= | -2=12 | 1.00 |" in table and "| 5+7= | 12=2 | 0.00 |" in table


def test_the_first_twenty_losses_and_rewards_are_trls(shared, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets
    from torch.utils.data import SequentialSampler

    name = str(shared / "models/stories260K")
    tokenizer = dpo.load_tokenizer(name, "--model-name-or-path")
    lines = (shared / "data/ultrafeedback_1k/train.jsonl").read_text().splitlines()
    rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in map(json.loads, lines)]

    def fits(row):  # TRL cuts a prompt whose end merges with the answer's beginning
        query = dpo.encode_prompt(row["prompt"], tokenizer)
        wholes = [tokenizer(row["prompt"] + row[k]).input_ids for k in ("chosen", "rejected")]
        return wholes[0] != wholes[1] and len(query) < 200 and all(w[: len(query)] == query for w in wholes)

    rows = [row for row in rows if fits(row)][:200]
    train, order = rows[:160], dpo.data_order(0, 160, 160, 1)
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", train)
    write_rows(tmp_path / "data" / "test.jsonl", rows[160:])
    args = Args(
        model_name_or_path=name, dataset_name=str(tmp_path / "data"), device="cpu", bf16=False, max_steps=20,
        train_batch_size=8, max_length=256, learning_rate=1e-5, lr_scheduler_type="constant",
        output_dir=str(tmp_path / "runs"),
    )  # fmt: skip
    main(args)
    logs = []

    class Trainer(trl.DPOTrainer):
        def _get_train_sampler(self, *arguments):
            return SequentialSampler(self.train_dataset)

        def log(self, entry, *arguments):
            super().log(entry, *arguments)
            logs.append(entry)

    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), save_strategy="no", report_to="none", logging_steps=1, max_steps=20,
        model_init_kwargs={"dtype": "float32"}, bf16=False, use_cpu=True, per_device_train_batch_size=8,
        gradient_checkpointing=False, optim="adamw_torch_fused", learning_rate=1e-5, lr_scheduler_type="constant",
        max_length=256, beta=0.1,
    )  # fmt: skip
    data = datasets.Dataset.from_list([train[i] for i in order])
    Trainer(name, args=config, train_dataset=data, processing_class=tokenizer).train()
    ours = scalars(run_folder(args))
    for tag in ("loss", "rewards/chosen", "rewards/rejected"):
        theirs = [entry[tag] for entry in logs if tag in entry][:20]
        assert [value for _, value in ours[f"train/{tag}"]] == pytest.approx(theirs, abs=1e-4)
