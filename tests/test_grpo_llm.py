"""grpo_llm.py: sampler, log-probabilities, advantages and loss; then the whole script on a tiny model."""

import json
import math
import resource
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import CONFIGS, ROOT, digit_reward, make_model, make_tokenizer, run_folder, scalars, weights, write_rows
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    Gemma3Config,
    MistralConfig,
)

import grpo_llm
from grpo_llm import (
    Args,
    completion_logprobs,
    data_order,
    extract_number,
    format_reward,
    group_advantages,
    grpo_loss,
    lr_factor,
    main,
    make_microbatches,
    packed_states,
    pad_sequences,
    padded_states,
    response_logprobs,
    sample,
    sample_token,
)

ARCHITECTURES = ("llama", "qwen2", "gpt2", "gpt_neox")
PROMPTS = [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17, 3, 9]]


def tree_logprobs(states_fn, model, query, query_mask, response, mask, temperature):
    states = states_fn(model, query, query_mask, response, mask)
    return completion_logprobs(model, states, response, mask, temperature)


def draw(model, num_generations=4, length=20, temperature=0.7, stop_ids=(1, 2), pad_id=0, seed=0):
    """Queries and their sampled responses: query, query_mask, response, logprobs, mask."""
    query, query_mask = pad_sequences(PROMPTS, pad_id, "left")
    generator = torch.Generator().manual_seed(seed)
    return (
        query,
        query_mask,
        *sample(model, query, query_mask, num_generations, length, temperature, list(stop_ids), pad_id, generator),
    )


def naive_logprobs(model, prompt, response, temperature):
    """One sequence, no padding, no mask, full logits: what every other way must agree with."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


# ---- sampling and log-probabilities


def test_sample_token_inverts_the_cdf():
    logits = torch.tensor([[0.0, -math.inf, math.log(2.0), math.log(1.0)]]).repeat(6, 1)  # 1/4, 0, 1/2, 1/4
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24])
    token, logprob = sample_token(logits.clone(), uniform, 1.0)
    assert token.tolist() == [0, 0, 2, 2, 3, 3]
    assert torch.allclose(logprob.exp(), torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25, 0.25]))
    token, logprob = sample_token(logits.clone(), uniform, 0.0)
    assert token.tolist() == [2] * 6 and torch.allclose(logprob.exp(), torch.tensor(0.5))


def test_sampling_distribution_is_the_softmax_and_nothing_else():
    model = make_model()
    model.generation_config.top_k, model.generation_config.top_p = 2, 0.5
    model.generation_config.temperature, model.generation_config.repetition_penalty = 3.0, 2.0
    query = torch.tensor([PROMPTS[0]])
    response, logprobs, _ = sample(
        model, query, torch.ones_like(query), 20000, 1, 0.7, [1], 0, torch.Generator().manual_seed(0)
    )
    expected = (model(input_ids=query).logits[0, -1] / 0.7).softmax(-1)
    observed = torch.bincount(response[:, 0], minlength=20) / 20000
    assert (observed - expected).abs().sum() / 2 < 0.02  # total variation
    assert torch.allclose(logprobs[:, 0], expected.log()[response[:, 0]], atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampler_packed_padded_and_naive_logprobs_agree(architecture):
    model = make_model(architecture)
    query, query_mask, response, logprobs, mask = draw(model)
    assert mask.sum(1).unique().numel() > 2  # responses of several lengths, so that rows left the batch
    grouped = [x.view(3, 4, -1) for x in (response, mask)]
    packed = tree_logprobs(packed_states, model, query, query_mask, *grouped, 0.7).flatten(0, 1)
    padded = tree_logprobs(padded_states, model, query, query_mask, *grouped, 0.7).flatten(0, 1)
    for i in range(12):
        length = int(mask[i].sum())
        naive = naive_logprobs(model, PROMPTS[i // 4], response[i, :length].tolist(), 0.7)
        for other in (logprobs, packed, padded):
            assert (other[i, :length] - naive).abs().max() < 1e-4
            assert (other[i, length:] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("states_fn", [packed_states, padded_states])
def test_gradients_equal_the_naive_ones(architecture, states_fn, monkeypatch):
    monkeypatch.setitem(grpo_llm.TILE, "cpu", (30, 7))  # several tiles, the last ones not full
    model = make_model(architecture)
    query, query_mask, response, _, mask = draw(model)
    weights = torch.randn(mask.shape) * mask
    total = (
        tree_logprobs(states_fn, model, query, query_mask, response.view(3, 4, -1), mask.view(3, 4, -1), 0.7).flatten(
            0, 1
        )
        * weights
    ).sum()
    gradients = torch.autograd.grad(total, list(model.parameters()))
    rows = [
        naive_logprobs(model, PROMPTS[i // 4], response[i][mask[i]].tolist(), 0.7) @ weights[i][mask[i]]
        for i in range(12)
    ]
    for gradient, naive in zip(gradients, torch.autograd.grad(sum(rows), list(model.parameters()))):
        assert (gradient - naive).norm() <= 1e-4 * naive.norm() + 1e-6


def test_the_bf16_gradient_of_confident_tokens_is_as_good_as_autocasts():
    """1 - p must be taken in fp32: of a token with p = 0.9999, a rounded softmax term would leave nothing but noise."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=generator), torch.randn(50, 32, generator=generator)
    target = torch.arange(64) % 50
    hidden = (weight[target] * 0.4 + 0.1 * hidden).requires_grad_()  # the target's logit stands out
    weight.requires_grad_()
    values = {}
    for name in ("exact", "ours", "autocast"):
        if name == "ours":
            logprobs = grpo_llm.TokenLogprobs.apply(hidden, weight, target, 1.0, torch.bfloat16)
        else:
            dtype = torch.float64 if name == "exact" else torch.bfloat16
            logits = (hidden.to(dtype) @ weight.to(dtype).T).to(torch.float64 if name == "exact" else torch.float32)
            logprobs = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
        gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
        values[name] = (logprobs.detach(), *(gradient.double() for gradient in gradients))
    assert 0.97 < values["exact"][0].exp().median() < 1
    for i in (1, 2):
        error, plain = ((values[name][i] - values["exact"][i]).norm() for name in ("ours", "autocast"))
        assert error < 1.5 * plain + 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_response_logprobs_do_not_depend_on_padding(architecture):
    model = make_model(architecture)
    sequence = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    plain = response_logprobs(model, sequence, torch.ones_like(sequence), 4, 1.0)
    for pad_id in (0, 13):
        pad, zeros = torch.full((1, 6), pad_id), torch.zeros(1, 6, dtype=torch.long)
        left = torch.cat([pad, sequence], 1), torch.cat([zeros, torch.ones_like(sequence)], 1)
        assert (response_logprobs(model, *left, 4, 1.0) - plain).abs().max() < 1e-5
        right = torch.cat([sequence, pad], 1), torch.cat([torch.ones_like(sequence), zeros], 1)
        assert (response_logprobs(model, *right, 10, 1.0)[:, :4] - plain).abs().max() < 1e-5


def test_a_response_ends_with_its_first_stop_id_and_never_with_a_forced_one():
    model = make_model()
    for pad_id in (0, 1):  # pad may be a stop id: the mask comes from lengths
        _, _, response, _, mask = draw(model, num_generations=32, length=12, stop_ids=(1, 2), pad_id=pad_id)
        truncated = 0
        for ids, real in zip(response.tolist(), mask):
            length = int(real.sum())
            assert real[:length].all() and not real[length:].any()
            stops = [position for position, token in enumerate(ids[:length]) if token in (1, 2)]
            assert stops == [length - 1] or (stops == [] and length == 12)
            truncated += stops == []
        assert 0 < truncated < 96


def test_samples_do_not_depend_on_the_number_of_processes_or_on_who_shares_the_batch():
    model = make_model()
    query, query_mask, response, logprobs, mask = draw(model)
    for rank in range(3):
        own = slice(rank, rank + 1)
        part = sample(
            model, query[own], query_mask[own], 4, 20, 0.7, [1, 2], 0, torch.Generator().manual_seed(0), rank, 3
        )
        rows = slice(4 * rank, 4 * rank + 4)
        T = part[0].shape[1]
        assert torch.equal(part[0], response[rows, :T]) and torch.equal(part[2], mask[rows, :T])
        assert not mask[rows, T:].any()
        assert torch.allclose(part[1], logprobs[rows, :T], atol=1e-5)


def test_gradient_checkpointing_changes_neither_the_samples_nor_the_gradients():
    model = make_model()
    query, query_mask, *plain = draw(model, temperature=0.0)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    again = draw(model, temperature=0.0)[2:]
    assert all(torch.equal(x, y) for x, y in zip(plain, again))
    assert model.training
    inputs = (query, query_mask, plain[0].view(3, 4, -1), plain[2].view(3, 4, -1), 1.0)
    with_checkpointing = torch.autograd.grad(
        tree_logprobs(packed_states, model, *inputs).sum(), list(model.parameters())
    )
    model.activation_checkpointing_disable()
    without = torch.autograd.grad(tree_logprobs(packed_states, model, *inputs).sum(), list(model.parameters()))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(with_checkpointing, without))


def test_greedy_follows_the_argmax():
    model = make_model()
    _, _, response, _, mask = draw(model, num_generations=1, temperature=0.0)
    for prompt, ids, real in zip(PROMPTS, response, mask):
        tokens = list(prompt)
        for token in ids[real].tolist():
            assert token == model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()
            tokens.append(token)


def test_sliding_windows_take_the_padded_path():
    torch.manual_seed(0)
    size = {
        "vocab_size": 20,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = AutoModelForCausalLM.from_config(MistralConfig(**size, num_key_value_heads=2, sliding_window=4)).eval()
    assert grpo_llm.choose_states_fn(model, [3, 4, 5]) is padded_states
    for architecture in ARCHITECTURES:
        assert grpo_llm.choose_states_fn(make_model(architecture), [3, 4, 5]) is packed_states


def test_a_tree_mask_that_does_not_fit_and_a_head_that_is_not_a_plain_one_are_noticed(monkeypatch, capsys):
    model = make_model()
    forward = model.base_model.forward

    def without_the_tree(*arguments, attention_mask=None, **options):
        is_tree = attention_mask is not None and attention_mask.dim() == 4
        return forward(*arguments, attention_mask=None if is_tree else attention_mask, **options)

    with monkeypatch.context() as patch:
        patch.setattr(model.base_model, "forward", without_the_tree)
        assert grpo_llm.choose_states_fn(model, [3, 4, 5]) is padded_states
    model.lm_head.register_forward_hook(lambda head, inputs, logits: 2 * logits)
    with pytest.raises(SystemExit):
        grpo_llm.choose_states_fn(model, [3, 4, 5])
    assert "changes its logits after its head" in capsys.readouterr().err


# ---- advantages and loss


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    std = math.sqrt(4 * 0.25 / 3)  # ddof 1
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4])
    assert torch.equal(group_advantages(rewards, "none"), expected)
    assert torch.allclose(group_advantages(rewards, "group"), expected / (std + 1e-4))
    assert (group_advantages(torch.full((1, 7), 0.1), "group") == 0).all()


def loss_inputs(B=5, T=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=generator) * 2
    logprobs = (old + 0.4 * torch.randn(B, T, generator=generator)).requires_grad_()
    ref = old + 0.4 * torch.randn(B, T, generator=generator)
    mask = torch.arange(T) < torch.tensor([6, 1, 3, 0, 4])[:B, None]
    return logprobs, old, torch.randn(B, generator=generator), mask, ref


def test_loss_by_hand():
    logprobs = torch.log(torch.tensor([[0.5, 0.2, 0.9], [0.3, 0.1, 0.9]]))
    old = torch.log(torch.tensor([[0.25, 0.25, 0.9], [0.3, 0.2, 0.9]]))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages = torch.tensor([1.0, -2.0])
    # ratios 2, 0.8 | 1, 0.5, 1; clipped to [0.8, 1.28] where that is the smaller product
    terms = [[1.28, 0.8], [-2.0, -1.6, -2.0]]
    dapo, _ = grpo_loss(logprobs, old, advantages, mask, 0.2, 0.28, "dapo")
    assert dapo.item() == pytest.approx(-(sum(terms[0]) + sum(terms[1])) / 5, rel=1e-5)
    grpo, _ = grpo_loss(logprobs, old, advantages, mask, 0.2, 0.28, "grpo")
    assert grpo.item() == pytest.approx(-(sum(terms[0]) / 2 + sum(terms[1]) / 3) / 2, rel=1e-5)
    dr_grpo, stats = grpo_loss(logprobs, old, advantages, mask, 0.2, 0.28, "dr_grpo", max_completion_length=10)
    assert dr_grpo.item() == pytest.approx(-(sum(terms[0]) + sum(terms[1])) / 20, rel=1e-5)
    assert stats["train/clip_ratio/high_mean"].item() == pytest.approx(1 / 5)
    assert stats["train/clip_ratio/low_mean"].item() == pytest.approx(1 / 5)
    sequence, _ = grpo_loss(logprobs, old, advantages, mask, 0.2, 0.28, "grpo", importance_sampling_level="sequence")
    ratios = [min(1.28, math.sqrt(2 * 0.8)), max(0.8, 0.5 ** (1 / 3))]  # geometric means: 1.265, 0.794
    assert sequence.item() == pytest.approx(-(ratios[0] * 1.0 + ratios[1] * -2.0) / 2, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("size", [1, 2])
def test_microbatches_add_up_to_the_whole(loss_type, level, size):
    logprobs, old, advantages, mask, ref = loss_inputs()
    options = {"beta": 0.1, "max_completion_length": 8, "importance_sampling_level": level}
    whole, stats = grpo_loss(logprobs, old, advantages, mask, 0.2, 0.28, loss_type, ref, **options)
    (gradient,) = torch.autograd.grad(whole, logprobs)
    options |= {"num_tokens": int(mask.sum()), "num_sequences": 5}
    parts = [
        grpo_loss(
            *(x[i : i + size] for x in (logprobs, old, advantages, mask)),
            0.2,
            0.28,
            loss_type,
            ref[i : i + size],
            **options,
        )
        for i in range(0, 5, size)
    ]
    total = sum(loss for loss, _ in parts)
    assert torch.allclose(total, whole, rtol=1e-5)
    assert torch.allclose(torch.autograd.grad(total, logprobs)[0], gradient, rtol=1e-5, atol=1e-8)
    for name, value in stats.items():
        assert torch.allclose(sum(s[name] for _, s in parts), value, rtol=1e-5)


def test_masked_rows_and_infinite_padding_give_no_nan():
    logprobs, old, advantages, mask, ref = loss_inputs()
    old = torch.where(mask, old, -math.inf)
    for loss_type in ("dapo", "grpo", "dr_grpo"):
        for rows in (slice(0, 5), slice(3, 4)):  # row 3 is wholly masked
            inputs = (x[rows] for x in (logprobs, old, advantages, mask))
            loss, _ = grpo_loss(*inputs, 0.2, 0.28, loss_type, ref[rows], beta=0.1, max_completion_length=8)
            (gradient,) = torch.autograd.grad(loss, logprobs)
            assert loss.isfinite() and gradient.isfinite().all()
            assert (gradient[~mask] == 0).all()


def test_on_policy_the_loss_is_zero_and_the_gradient_is_not():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    logprobs = torch.full((4, 3), -1.0, requires_grad=True)
    mask = torch.ones(4, 3, dtype=torch.bool)
    loss, _ = grpo_loss(logprobs, logprobs.detach(), group_advantages(rewards, "group")[0], mask, 0.2, 0.28, "dapo")
    assert abs(loss.item()) < 1e-6
    assert torch.autograd.grad(loss, logprobs)[0].norm() > 0.1


def test_one_step_without_clipping_and_std_is_reinforce_with_the_group_baseline():
    """The gradient is REINFORCE's with the group's mean, and (G-1)/G of that with the leave-one-out mean (RLOO)."""
    model = make_model()
    query, query_mask, response, old_logprobs, mask = draw(model)
    rewards = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    inputs = (query, query_mask, response.view(3, 4, -1), mask.view(3, 4, -1), 0.7)
    logprobs = tree_logprobs(packed_states, model, *inputs).flatten(0, 1)
    advantages = group_advantages(rewards, "none").flatten()
    loss, _ = grpo_loss(logprobs, logprobs.detach(), advantages, mask, math.inf, math.inf, "dapo")
    gradient = torch.autograd.grad(-loss * mask.sum(), list(model.parameters()))
    leave_one_out = (rewards.sum(1, keepdim=True) - rewards) / 3
    for baseline, factor in ((rewards.mean(1, keepdim=True), 1.0), (leave_one_out, 3 / 4)):
        reinforce = sum(
            (rewards - baseline).flatten()[i]
            * naive_logprobs(model, PROMPTS[i // 4], response[i][mask[i]].tolist(), 0.7).sum()
            for i in range(12)
        )
        for ours, theirs in zip(gradient, torch.autograd.grad(reinforce, list(model.parameters()))):
            assert (ours - factor * theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kl_gradient_is_that_of_the_reverse_kl(shift):
    """Exact expectation over a 6-way softmax, on-policy and off-policy (the rollout's logits differ by noise)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    ref = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    old = (logits.detach() + shift * torch.randn(6, generator=generator, dtype=torch.float64)).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)
    mask, beta = torch.ones(1, 1, dtype=torch.bool), 0.3
    total = 0.0
    for action in range(6):  # each action's loss, weighted by its probability under the rollout's policy
        one = [x[action].view(1, 1) for x in (logprobs, old)]
        loss, _ = grpo_loss(*one, torch.zeros(1), mask, 0.2, 0.28, "dapo", ref[action].view(1, 1), beta)
        total = total + old[action].exp() * loss
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.allclose(gradient, beta * expected, atol=1e-10)


def test_a_large_kl_keeps_a_finite_gradient():
    logprobs = torch.tensor([[-0.1]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = grpo_loss(
        logprobs, logprobs.detach(), torch.zeros(1), mask, 0.2, 0.28, "dapo", torch.tensor([[-300.0]]), 1.0
    )
    assert torch.autograd.grad(loss, logprobs)[0].item() == pytest.approx(299.9)


def test_learning_rate_schedule_ends_exactly():
    for kind in ("linear", "cosine"):
        factors = [lr_factor(step, 10, 3, kind, 0.1) for step in range(10)]
        assert factors[:3] == [1 / 3, 2 / 3, 1.0] and factors[3] == 1.0
        assert factors[-1] == pytest.approx(0.1, abs=1e-12)
        assert all(a >= b for a, b in zip(factors[3:], factors[4:]))
    assert {lr_factor(step, 10, 0, "constant", 0.1) for step in range(10)} == {1.0}


# ---- data and rewards


@pytest.mark.parametrize("text, number", [
    ("-12=132", 132), ("48/2 = 24. So it is 72.", 72), ("so 3\n#### 1,000", 1000), ("\\boxed{\\$72.50} in 2 d", 72.5),
    ("\\boxed{\\frac{1}{2}}", None), ("\\boxed{3/4}", None), ("#### -$5", -5),
    ("#### .5", 0.5), ("\\boxed{.5}", 0.5), ("it is -.5.", -0.5),
    ("10-3=7", 7), ("it is -5", -5), ("#### -4", -4), ("none", None), ("", None), ("x-3", -3),
])  # fmt: skip
def test_extract_number(text, number):
    assert extract_number(text) == number


def test_rewards_by_hand():
    assert grpo_llm.accuracy_reward("", "I think 7.0", "... #### 7") == 1.0
    assert grpo_llm.accuracy_reward("", "no idea", "#### 7") == 0.0
    for formula in ("\\frac{1}{2}", "x^2", "3/2", "2 or 3"):
        assert grpo_llm.accuracy_reward("", "it is 2", formula) is None
    assert grpo_llm.accuracy_reward("", "it is 1000", " 1,000 ") == 1.0
    assert grpo_llm.accuracy_reward("", "Paris", "Paris") is None and grpo_llm.accuracy_reward("", "1", None) is None
    assert [format_reward("", c, None) for c in ("-12=132", "132", "#### 4", "2+2 is 4\n#### 4")] == [
        1.0,
        0.0,
        0.0,
        1.0,
    ]


def test_data_order_visits_every_row_once_an_epoch_and_depends_on_the_seed():
    order = data_order(0, 21, 7, seed=3)
    assert [sorted(order[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert order[:7] != order[7:14]
    assert data_order(5, 9, 7, seed=3) == order[5:14]
    assert data_order(0, 7, 7, seed=4) != order[:7]


def test_microbatches_hold_every_row_once_within_the_budget():
    tokens = [5, 90, 7, 30, 31, 8, 400]
    batches = make_microbatches(tokens, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(tokens[i] for i in batch) <= 100 for batch in batches)
    assert len(batches) == 4


def test_embedded_problems_and_demonstrations():
    train, test = grpo_llm.addition_rows(1)
    assert len(train) + len(test) == 8100 and not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    rng = grpo_llm.random.Random(0)
    texts = [grpo_llm.demonstrate({"prompt": "47+85=", "answer": "132"}, rng) for _ in range(4000)]
    careful = [text for text in texts if "=" in text]
    assert set(careful) == {"-12=132"} and set(texts) - set(careful) == {"132", "131", "133", "122", "142"}


def test_a_few_prompts_without_room_are_left_out_and_many_are_an_error(capsys):
    rows = [{"prompt": "1+1=", "answer": "2"}] * 199 + [{"prompt": "1" * 30, "answer": "2"}]
    assert len(grpo_llm.encode_rows(rows, "training", make_tokenizer(), 29)) == 199
    assert capsys.readouterr().out == "1 of 200 training prompts are left out as longer than 29 tokens\n"
    with pytest.raises(SystemExit):
        grpo_llm.encode_rows(rows[101:], "training", make_tokenizer(), 29)
    assert "training row 99 has 30 tokens" in capsys.readouterr().err


def test_chat_template_is_used_where_there_is_one():
    tokenizer = make_tokenizer()
    assert tokenizer.decode(grpo_llm.encode_prompt("1+1=", tokenizer)) == "1+1="
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    ids = grpo_llm.encode_prompt([{"role": "b", "content": "1+1="}], tokenizer)
    assert isinstance(ids, list) and isinstance(ids[0], int) and tokenizer.decode(ids) == "b1+1=a"
    row = {"messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "3"}], "solution": 3}
    assert grpo_llm.prompt_and_answer(row) == ([{"role": "user", "content": "2"}], "3")


def test_reward_model_scores_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=1,
        pad_token_id=0,
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    texts = ["1", "1+2=3", "a" * 40, "12345"]
    tokenizer = make_tokenizer()
    for template in (None, "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}"):
        tokenizer.chat_template = template
        together = grpo_llm.reward_model_scores(model, tokenizer, ["7="] * 4, texts, 32)
        alone = [grpo_llm.reward_model_scores(model, tokenizer, ["7="], [text], 32)[0] for text in texts]
        assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 4
        ids = tokenizer("7=1" if template is None else "u7=a1", return_tensors="pt")  # `u` is unknown, as in the batch
        assert together[0] == pytest.approx((model(**ids).logits.item() - 0.5) / 2, abs=1e-5)


def test_the_reward_models_standardisation_is_asked_for(tmp_path, capsys):
    config = CONFIGS["llama"].__class__(**{**CONFIGS["llama"].to_dict(), "num_labels": 1, "pad_token_id": 0})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        grpo_llm.load_reward_model(str(tmp_path), torch.device("cpu"), normalize=True)
    assert "--normalize-reward-model" in capsys.readouterr().err
    values = {**json.loads((tmp_path / "config.json").read_text()), "reward_mean": 3.0, "reward_std": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(values))
    raw, standardised = (
        grpo_llm.reward_model_scores(
            *grpo_llm.load_reward_model(str(tmp_path), torch.device("cpu"), normalize), ["1+1="], ["2"], 99
        )[0]
        for normalize in (False, True)
    )
    assert standardised == pytest.approx((raw - 3.0) / 0.5)


# ---- the whole script on a tiny model


@pytest.fixture(autouse=True)
def graded_reward(monkeypatch):
    monkeypatch.setattr(grpo_llm, "REWARDS", ((digit_reward, 1.0), *grpo_llm.REWARDS))


def test_a_run_learns_logs_and_saves(tiny, capsys):
    args = tiny(max_steps=30, beta=0.0)
    metrics = main(args)
    folder = run_folder(args)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert json.loads((folder / "summary.json").read_text()) == metrics
    assert metrics["eval/reward"] > metrics["eval/reward_before"] + 0.2
    assert {"eval/accuracy", "eval/accuracy_before", "eval/kl", "seed", "wall_seconds"} <= set(metrics)
    assert abs(metrics["eval/kl_before"]) < 1e-4 < metrics["eval/kl"]
    tags = scalars(folder)
    assert len(tags["train/reward"]) == 30 and tags["train/grad_norm"][0][1] > 0
    assert max(value for _, value in tags["train/sampling/sampling_logp_difference/max"]) < 1e-4
    assert max(value for _, value in tags["policy/approxkl_avg"]) < 1e-8
    assert tags["charts/learning_rate"][-1][1] == pytest.approx(1e-3)
    counted, length = (tags[f"train/{name}"][0][1] for name in ("num_tokens", "completions/mean_length"))
    assert counted == pytest.approx(16 * (4 + length))  # a prompt such as `1+2=` counts with each completion
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert AutoTokenizer.from_pretrained(folder / "model")("1+2=").input_ids == make_tokenizer()("1+2=").input_ids
    assert torch.equal(model.state_dict()["model.norm.weight"], weights(folder)["model.norm.weight"])


def test_microbatch_budget_and_gradient_checkpointing_do_not_change_the_result(tiny, tmp_path, monkeypatch):
    reference, recomputing = None, set()

    def spy(model, *inputs):
        recomputing.add(model.is_activation_checkpointing and model.training)
        return packed_states(model, *inputs)

    monkeypatch.setattr(grpo_llm, "packed_states", spy)
    for number, flags in enumerate((
        {}, {"max_tokens_per_microbatch": 24}, {"max_tokens_per_microbatch": 1}, {"gradient_checkpointing": True},
    )):  # fmt: skip
        args = tiny(output_dir=str(tmp_path / str(number)), max_steps=2, learning_rate=1e-3, **flags)
        main(args)
        assert (True in recomputing) == args.gradient_checkpointing
        found = weights(run_folder(args))
        norms = scalars(run_folder(args))["train/grad_norm"]  # Adam hides a wrong scale
        reference = reference or (found, norms)
        assert all(torch.allclose(found[name], reference[0][name], atol=1e-5) for name in found)
        assert [norm for _, norm in norms] == pytest.approx([norm for _, norm in reference[1]], rel=1e-4)


def test_dropped_groups_count_in_the_denominator(tiny, tmp_path, monkeypatch):
    """A group of equal rewards is dropped before the update; a tiny KL keeps it: both give the same parameters."""

    def odd_reward(prompt, completion, answer):
        return 0.0 if prompt.startswith("0") else float(len(completion) % 2)

    monkeypatch.setattr(grpo_llm, "REWARDS", ((odd_reward, 1.0),))
    found = []
    for number, beta in enumerate((0.0, 1e-12)):
        args = tiny(output_dir=str(tmp_path / str(number)), max_steps=2, beta=beta)
        main(args)
        found.append(weights(run_folder(args)))
        assert 0 < scalars(run_folder(args))["train/frac_reward_zero_std"][0][1] < 1
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_truncated_completions_can_be_masked(tiny, monkeypatch):
    masks = []

    def spy(logprobs, old_logprobs, advantages, mask, *rest):
        masks.append(mask)
        return grpo_loss(logprobs, old_logprobs, advantages, mask, *rest)

    monkeypatch.setattr(grpo_llm, "grpo_loss", spy)
    args = tiny(max_steps=1, mask_truncated_completions=True)
    main(args)
    share = scalars(run_folder(args))["train/completions/clipped_ratio"][0][1]
    assert 0 < share < 1
    assert sum(int((~mask.any(1)).sum()) for mask in masks) == round(share * 16)


def test_the_loop_does_what_the_flags_say(tiny, model_folder, tmp_path, monkeypatch):
    """What reaches the sampler, the loss and the optimizer, when the flags are none of the defaults."""
    seen = {"loss": [], "stop_ids": set(), "optimizer": [], "norm": []}

    def loss_spy(logprobs, old, advantages, mask, low, high, loss_type, ref, beta, length, level, tokens, sequences):
        seen["loss"].append((low, high, loss_type, beta, length, level, tokens, sequences))
        seen.setdefault("rows", []).append((len(mask), int(mask.sum()), advantages))
        return grpo_loss(
            logprobs, old, advantages, mask, low, high, loss_type, ref, beta, length, level, tokens, sequences
        )

    def sample_spy(model, query, attention_mask, num_generations, length, temperature, stop_ids, *rest):
        seen["stop_ids"].add(tuple(stop_ids))
        return sample(model, query, attention_mask, num_generations, length, temperature, stop_ids, *rest)

    def step_spy(optimizer, *arguments):
        seen["optimizer"].append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))
        gradients = [p.grad.norm() for p in optimizer.param_groups[0]["params"]]
        seen["norm"].append(torch.stack(gradients).norm().item())
        return step(optimizer, *arguments)

    def half_reward(prompt, completion, answer):  # equal within the groups of half the prompts
        return 1.0 if prompt.startswith(("0", "1")) else len(completion) / 6

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", step_spy)
    monkeypatch.setattr(grpo_llm, "grpo_loss", loss_spy)
    monkeypatch.setattr(grpo_llm, "sample", sample_spy)
    monkeypatch.setattr(grpo_llm, "REWARDS", ((half_reward, 0.5),))
    folder = tmp_path / "two_eos"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.generation_config.eos_token_id = [1, 5]
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    args = tiny(
        model_name_or_path=str(folder),
        beta=0.0,
        epsilon=0.11,
        epsilon_high=0.33,
        weight_decay=0.07,
        warmup_steps=2,
        num_iterations=2,
        max_steps=2,
        scale_rewards="none",
        loss_type="dr_grpo",
        stop_token_ids=(7,),
        max_grad_norm=1e-3,
        max_tokens_per_microbatch=1,
        generation_batch_size=32,
    )
    main(args)
    assert seen["stop_ids"] == {(1, 5, 7)}
    lengths = scalars(run_folder(args))["train/completions/mean_length"]
    equal = scalars(run_folder(args))["train/frac_reward_zero_std"]
    for low, high, loss_type, beta, length, level, tokens, sequences in seen["loss"]:
        assert (low, high, loss_type, beta, length, level, sequences) == (0.11, 0.33, "dr_grpo", 0.0, 6, "token", 32)
        assert tokens in [pytest.approx(32 * mean) for _, mean in lengths]
    assert 0 < equal[0][1] < 1
    # micro-batches of one completion each; twice a rollout; and none of the groups without a gradient
    assert len(seen["loss"]) == sum(2 * round(32 * (1 - share)) for _, share in equal)
    assert max(advantages.abs().max() for _, _, advantages in seen["rows"]) <= 0.5  # the weight; no division by std
    assert [lr for lr, _ in seen["optimizer"]] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-3])
    assert {decay for _, decay in seen["optimizer"]} == {0.07}
    assert max(seen["norm"]) < 1.01e-3


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tiny):
    args = tiny(bf16=True, max_steps=2)
    metrics = main(args)
    logs = scalars(run_folder(args))
    difference = logs["train/sampling/sampling_logp_difference/max"][0][1]
    assert 1e-4 < difference < 0.1  # of fp32 it would be below
    assert {x.dtype for x in weights(run_folder(args)).values()} == {torch.float32}
    assert abs(metrics["eval/kl_before"]) < 0.05 and metrics["eval/kl"] != 0


def test_weights_are_fp32_masters_and_dropout_is_off(tmp_path):
    model = make_model("gpt2").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    loaded = grpo_llm.load_model(str(tmp_path / "bf16"), "--model-name-or-path").train()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)
    before = [p.detach().clone() for p in loaded.parameters()]
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    for _ in range(100):
        for p in loaded.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    moved = sum(int((p != b).sum()) for p, b in zip(loaded.parameters(), before))
    assert moved / sum(p.numel() for p in loaded.parameters()) > 0.99


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    grpo_llm.save_checkpoint(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
        with pytest.raises(SystemExit) as stop:
            grpo_llm.save_checkpoint(path, {"step": 2, "x": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == 2 and "--output-dir" in capsys.readouterr().err
    assert torch.load(path, weights_only=True) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_last_model(tmp_path, capsys):
    folder = tmp_path / "model"
    grpo_llm.save_model(folder, make_model(seed=1), make_tokenizer())
    before = load_file(folder / "model.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))
        with pytest.raises(SystemExit) as stop:
            grpo_llm.save_model(folder, make_model(seed=2), make_tokenizer())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == 2 and "--output-dir" in capsys.readouterr().err
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before) and list(tmp_path.iterdir()) == [folder]


def test_a_non_finite_gradient_stops_with_the_step_and_a_saved_state(tiny, monkeypatch, capsys):
    def explode(*arguments, **options):
        loss, stats = grpo_loss(*arguments, **options)
        return loss * math.nan, stats

    monkeypatch.setattr(grpo_llm, "grpo_loss", explode)
    args = tiny()
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2 and "step 1 is not finite" in capsys.readouterr().err
    state = torch.load(run_folder(args) / "nonfinite.pt", weights_only=True)
    assert all(x.isfinite().all() for x in state["model"].values())


def test_rewards_are_not_called_before_there_are_completions(tiny, monkeypatch):
    """A reward of one's own may be dear, or not apply to an empty completion."""
    seen = []

    def judge(prompt, completion, answer):
        seen.append(completion)
        return len(completion) if completion else None

    monkeypatch.setattr(grpo_llm, "REWARDS", ((judge, 1.0), (digit_reward, 1.0)))
    main(tiny(max_steps=1))
    assert len(seen) == 2 * 4 + 16 + 2 * 4  # two evaluations, each sampled and greedy, and one rollout


def test_a_run_is_resumed_with_its_own_rewards_only(tiny, monkeypatch, capsys):
    args = tiny(max_steps=2)
    main(args)
    monkeypatch.setattr(grpo_llm, "REWARDS", ((digit_reward, 0.5), *grpo_llm.REWARDS[1:]))
    with pytest.raises(SystemExit) as stop:
        main(Args(resume=str(run_folder(args))))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "['digit_reward', 1.0]" in text and "not [['digit_reward', 0.5]" in text


def test_approxkl_is_a_mean_over_the_tokens_of_the_groups_that_are_kept(tiny, monkeypatch):
    calls = []

    def spy(*arguments, **flags):
        calls.append(arguments)
        return grpo_loss(*arguments, **flags)

    def rare_reward(prompt, completion, answer):
        return float(completion[:1] == prompt[0])

    monkeypatch.setattr(grpo_llm, "grpo_loss", spy)
    monkeypatch.setattr(grpo_llm, "REWARDS", ((rare_reward, 1.0),))
    args = tiny(max_steps=1, num_iterations=2, beta=0.0, learning_rate=0.1, generation_batch_size=48, seed=3)
    main(args)
    log_ratio = [(x[0] - x[1]).detach()[x[3]] for x in calls]  # (tokens,) of each micro-batch of both iterations
    kl = [x.exp() - 1 - x for x in log_ratio]
    logged = scalars(run_folder(args))
    assert 0 < logged["train/frac_reward_zero_std"][0][1] < 1
    assert logged["policy/approxkl_avg"][0][1] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4) != 0


def test_dropout_is_off_in_nested_configurations_too(tmp_path, monkeypatch):
    config = Gemma3Config(text_config={"attention_dropout": 0.5}, vision_config={"num_hidden_layers": 1})
    config.save_pretrained(tmp_path)
    seen = []

    class Stop(Exception):
        pass

    def from_pretrained(name, config, **flags):
        seen.append(config)
        raise Stop

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(Stop):
        grpo_llm.load_model(str(tmp_path), "--model-name-or-path")
    assert seen[0].get_text_config().attention_dropout == 0.0


@pytest.mark.parametrize("bf16", [False, True])
def test_scores_of_a_causal_reward_model_are_its_own_and_not_rounded(bf16, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS["llama"], attn_implementation="sdpa").eval()
    model.config.num_labels, model.config.pad_token_id = 1, 0
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0
    model.score = torch.nn.Linear(32, 1, bias=False)
    tokenizer, prompts = make_tokenizer(), [f"{i}+{i * 7}=" for i in range(30)]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        scores = torch.tensor(grpo_llm.reward_model_scores(model, tokenizer, prompts, ["12"] * 30, 64))
    own = torch.cat([model(input_ids=torch.tensor([tokenizer(p + "12").input_ids])).logits[:, 0] for p in prompts])
    assert torch.allclose(scores, own, atol=0.05 if bf16 else 1e-5)
    assert (scores != scores.bfloat16()).float().mean() > 0.5


def test_numpys_numbers_are_rewards(tiny, monkeypatch):
    def numpy_reward(prompt, completion, answer):
        return numpy.float32(len(completion))

    monkeypatch.setattr(grpo_llm, "REWARDS", ((numpy_reward, 1.0),))
    assert main(tiny(max_steps=1))["eval/reward"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, "good", [1.0]])
def test_a_reward_that_is_no_number_names_the_prompt(tiny, monkeypatch, capsys, value):
    def broken_reward(prompt, completion, answer):
        return value

    monkeypatch.setattr(grpo_llm, "REWARDS", ((broken_reward, 1.0),))
    with pytest.raises(SystemExit) as stop:
        main(tiny())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "broken_reward returned" in error and "+" in error and error.count("\n") == 1


def test_resume_refuses_other_flags_and_other_scripts(tiny, capsys):
    args = tiny(max_steps=2)
    main(args)
    folder = run_folder(args)
    with pytest.raises(SystemExit) as stop:
        main(Args(resume=str(folder), learning_rate=1.0))
    assert stop.value.code == 2 and "--learning-rate" in capsys.readouterr().err
    command = [sys.executable, str(ROOT / "grpo_llm.py"), "--resume", str(folder), "--seed", "1"]  # the default, too
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "--seed" in refused.stderr and "Traceback" not in refused.stderr
    saved = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**saved, "script": "dpo.py"}))
    with pytest.raises(SystemExit) as stop:
        main(Args(resume=str(folder)))
    assert stop.value.code == 2 and "dpo.py" in capsys.readouterr().err


def test_rewards_with_the_same_name_are_refused(tiny, monkeypatch, capsys):
    monkeypatch.setattr(grpo_llm, "REWARDS", ((format_reward, 1.0), (format_reward, 0.5)))
    with pytest.raises(SystemExit) as stop:
        main(tiny())
    assert stop.value.code == 2 and "['format', 'format']" in capsys.readouterr().err


def test_a_model_without_some_weights_is_refused(model_folder, tmp_path, capsys):
    model, state = AutoModelForCausalLM.from_pretrained(model_folder), {}
    for name, value in model.state_dict().items():
        if "mlp.up_proj" not in name:
            state[name] = value.contiguous()
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(SystemExit) as stop:
        grpo_llm.load_model(str(tmp_path), "--model-name-or-path")
    assert stop.value.code == 2 and "mlp.up_proj" in capsys.readouterr().err


def test_parquet_and_folders_load_like_json_lines(tiny, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(8)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "sums.parquet"))
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "train.jsonl", rows[:5])
    write_rows(tmp_path / "folder" / "test.jsonl", rows[5:])
    train, test = grpo_llm.load_rows(tiny(dataset_name=str(tmp_path / "sums.parquet"), max_eval_samples=2))
    assert (train, test) == (rows[:6], rows[6:])
    assert grpo_llm.load_rows(tiny(dataset_name=str(tmp_path / "folder"))) == (rows[:5], rows[5:])


def test_the_embedded_run_starts_from_its_supervised_model_and_resumes(tmp_path):
    flags = {"output_dir": str(tmp_path), "sft_steps": 3, "max_steps": 2, "generation_batch_size": 16, "save_steps": 1,
             "max_eval_samples": 8, "max_completion_length": 8, "device": "cpu", "bf16": False}  # fmt: skip
    args = Args(**flags)
    metrics = main(args)
    folder = run_folder(args)
    assert AutoModelForCausalLM.from_pretrained(folder / "sft").config.vocab_size == 15
    assert AutoTokenizer.from_pretrained(folder / "model").decode([6, 8, 1], skip_special_tokens=True) == "46"
    again = main(Args(resume=str(folder)))  # a finished run: evaluated again
    assert {k: v for k, v in again.items() if k != "wall_seconds"} == {
        k: v for k, v in metrics.items() if k != "wall_seconds"
    }


def test_real_files_run_end_to_end(shared, tmp_path):
    """GSM8K through a real tokenizer and stop ids [1, 2]; then a reward model whose tokenizer is another."""
    flags = {"model_name_or_path": str(shared / "models/stories260K"), "output_dir": str(tmp_path), "max_steps": 1,
             "generation_batch_size": 8, "num_generations": 4, "max_eval_samples": 4, "max_completion_length": 16,
             "device": "cpu", "bf16": False}  # fmt: skip
    rows = [json.loads(line) for line in (shared / "data/gsm8k/train.jsonl").read_text().splitlines()[:40]]
    short = [row for row in rows if len(row["question"]) < 300]
    gsm8k = main(Args(**flags, dataset_name=write_rows(tmp_path / "gsm8k.jsonl", short)))
    assert gsm8k["eval/accuracy"] <= 0.5 and gsm8k["eval/mean_length"] > 1
    prompts = write_rows(tmp_path / "stories.jsonl", [{"prompt": "Once upon a time"}] * 12)
    rated = main(Args(**flags, dataset_name=prompts, reward_model_path=str(shared / "models/minilm-sentiment-rm")))
    assert "eval/accuracy" not in rated and -6 < rated["eval/reward"] < 6
    assert rated["eval/reward"] == pytest.approx(rated["eval/reward_model"])
