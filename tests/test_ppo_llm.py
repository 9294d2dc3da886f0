"""ppo_llm.py: rewards, advantages and losses against hand-computed numbers and TRL's, then the whole script."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import digit_reward, make_model, make_tokenizer, run_folder, scalars, weights, write_rows
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Ernie4_5Config,
    MistralConfig,
    PreTrainedTokenizerFast,
)

import ppo_llm
from ppo_llm import (
    Args,
    adapted_kl_coef,
    completion_logprobs,
    completion_values,
    gae,
    main,
    packed_states,
    pad_sequences,
    padded_states,
    ppo_loss,
    sample,
    token_rewards,
    whiten,
)

PROMPTS = [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17, 3, 9]]


def lengths_mask(lengths: list[int], T: int) -> torch.Tensor:
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def random_batch(seed: int = 0, lengths: tuple[int, ...] = (5, 1, 3, 4), T: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    batch = {name: torch.randn(len(lengths), T, generator=generator) for name in names}
    return {**batch, "mask": lengths_mask(list(lengths), T)}


# ---- rewards and advantages


def test_the_score_lands_on_the_last_real_token():
    mask = lengths_mask([3, 1, 4], 4)
    log_ratio = torch.tensor([[0.5, -1.0, 2.0, 9.0], [1.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 1.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0]), log_ratio, mask, 0.1)
    assert torch.allclose(rewards, torch.tensor([
        [-0.05, 0.1, 9.8, 0.0], [19.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 29.9],
    ]))  # fmt: skip
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0]), log_ratio, mask, 0.0)
    advantages, returns = gae(rewards, torch.zeros(3, 4), mask, 1.0, 1.0)
    expected = torch.tensor([[10.0], [20.0], [30.0]]) * mask
    assert torch.equal(advantages, expected) and torch.equal(returns, expected)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    """Schulman et al. 2016, eq. 16, term by term; what stands behind a response's end does not matter."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    lengths = [7, 1, 4, 6]
    advantages, returns = gae(rewards, values, lengths_mask(lengths, 7), gamma, lam)
    for i, length in enumerate(lengths):
        following = [*values[i, 1:length].tolist(), 0.0]
        for t in range(length):
            expected = sum(
                (gamma * lam) ** (s - t) * (rewards[i, s] + gamma * following[s] - values[i, s])
                for s in range(t, length)
            )
            assert advantages[i, t] == pytest.approx(expected.item(), abs=1e-12)
            assert returns[i, t] == pytest.approx((expected + values[i, t]).item(), abs=1e-12)
        assert not advantages[i, length:].any() and not returns[i, length:].any()


def test_whitening_runs_over_real_tokens_and_can_keep_the_mean():
    values, mask = torch.randn(3, 6) * 4 + 7, lengths_mask([6, 2, 4], 6)
    white = whiten(values, mask)
    assert white[mask].mean().abs() < 1e-6 and white[mask].std() == pytest.approx(1.0, rel=1e-5)
    kept = whiten(values, mask, shift_mean=False)
    assert kept[mask].mean() == pytest.approx(values[mask].mean().item(), rel=1e-5)
    assert kept[mask].std() == pytest.approx(1.0, rel=1e-5)
    padded = torch.cat([values, torch.full((3, 5), 1e9)], 1), torch.cat([mask, torch.zeros(3, 5, dtype=torch.bool)], 1)
    assert torch.equal(whiten(*padded)[:, :6], white) and not whiten(*padded)[:, 6:].any()
    alone = whiten(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]]))
    assert alone.tolist() == [[0.0, 0.0]]


def test_kl_coef_adapts_as_published():
    """Ziegler et al. 2019, section 2.2: K_beta = 0.1, which is a batch of 1000 over a horizon of 10000."""
    assert adapted_kl_coef(0.2, 6.6, 6.0, 10000, 1000) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert adapted_kl_coef(0.2, 60.0, 6.0, 10000, 1000) == pytest.approx(0.2 * (1 + 0.2 * 0.1))
    assert adapted_kl_coef(0.2, -1.0, 6.0, 10000, 1000) == pytest.approx(0.2 * (1 - 0.2 * 0.1))


# ---- the loss


def test_loss_by_hand():
    """Two responses: of a token whose ratio is clipped, and of two, one with a value beyond its range."""
    mask = torch.tensor([[True, False], [True, True]])
    logprobs = torch.tensor([[math.log(0.6), 5.0], [math.log(0.2), math.log(0.5)]])
    old_logprobs = torch.tensor([[math.log(0.3), 0.0], [math.log(0.4), math.log(0.5)]])
    advantages = torch.tensor([[1.0, 9.0], [2.0, -3.0]])
    values, old_values = torch.tensor([[1.0, 9.0], [0.5, 0.1]]), torch.tensor([[0.0, 0.0], [0.4, 0.0]])
    returns = torch.tensor([[2.0, 0.0], [0.0, 0.3]])
    loss, stats = ppo_loss(logprobs, old_logprobs, advantages, values, old_values, returns, mask, 0.2, 0.2, 0.1)
    # ratios 2 (clipped to 1.2: A > 0), 0.5 (A > 0: min keeps it) and 1
    policy = -(1.2 * 1.0 + 0.5 * 2.0 + 1.0 * -3.0) / 3
    # errors 1 against (0.2 - 2)^2, 0.25 against 0.25, 0.04 against 0.04
    value = (3.24 + 0.25 + 0.04) / 3 / 2
    assert loss.item() == pytest.approx(policy + 0.1 * value, rel=1e-6)
    assert stats["loss/policy_avg"].item() == pytest.approx(policy, rel=1e-6)
    assert stats["loss/value_avg"].item() == pytest.approx(value, rel=1e-6)
    assert stats["policy/clipfrac_avg"].item() == pytest.approx(1 / 3)
    assert stats["val/clipfrac_avg"].item() == pytest.approx(1 / 3)
    assert stats["val/ratio"].item() == pytest.approx(3.5 / 3)
    k3 = (2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2))
    assert stats["policy/approxkl_avg"].item() == pytest.approx(k3 / 3, rel=1e-5)


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
@pytest.mark.parametrize("size", [1, 2])
def test_microbatches_add_up_to_the_whole(size, ent_coef):
    batch = random_batch()
    learnt = [batch[name].requires_grad_() for name in ("logprobs", "values")]
    whole, stats = ppo_loss(**batch, epsilon=0.2, cliprange_value=0.2, vf_coef=0.1, ent_coef=ent_coef)
    expected = torch.autograd.grad(whole, learnt)
    total, sums = 0.0, dict.fromkeys(stats, 0.0)
    for start in range(0, 4, size):
        part = {name: x[start : start + size] for name, x in batch.items()}
        loss, part_stats = ppo_loss(**part, epsilon=0.2, cliprange_value=0.2, vf_coef=0.1, ent_coef=ent_coef,
                                    num_tokens=13)  # fmt: skip
        total = total + loss
        sums = {name: sums[name] + part_stats[name] for name in sums}
    assert torch.allclose(total, whole, rtol=1e-6)
    assert all(torch.allclose(x, y, atol=1e-7) for x, y in zip(torch.autograd.grad(total, learnt), expected))
    assert all(torch.allclose(sums[name], stats[name], rtol=1e-5) for name in stats)


def test_padding_changes_no_figure_and_no_gradient():
    batch = random_batch()
    padded = {name: torch.nn.functional.pad(x, (0, 3), value=1e6) for name, x in batch.items()}
    padded["mask"] = torch.nn.functional.pad(batch["mask"], (0, 3))
    results = []
    for columns in (batch, padded):
        learnt = [columns[name].requires_grad_() for name in ("logprobs", "values")]
        loss, stats = ppo_loss(**columns, epsilon=0.2, cliprange_value=0.2, vf_coef=0.1, ent_coef=0.1)
        gradients = torch.stack(torch.autograd.grad(loss, learnt))
        assert not gradients[:, ~columns["mask"]].any()
        results.append((loss, stats, gradients[:, :, :5]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5) and torch.equal(results[0][2], results[1][2])
    assert {name: x.item() for name, x in results[0][1].items()} == pytest.approx(
        {name: x.item() for name, x in results[1][1].items()}
    )


def test_a_value_is_clipped_only_where_that_makes_it_worse():
    one = torch.ones(1, 1)
    for value, moves in ((0.9, False), (-0.5, True), (0.1, True)):  # old value 0, range 0.2, return 2
        values = torch.full((1, 1), value, requires_grad=True)
        loss, _ = ppo_loss(one, one, 0 * one, values, 0 * one, 2 * one, one.bool(), 0.2, 0.2, 1.0)
        loss.backward()
        assert bool(values.grad.abs() > 0) == moves


def test_entropy_bonus_has_the_gradient_of_the_entropy():
    """In expectation over the tokens, on-policy and off-policy, on a 6-way softmax."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    old = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (expected,) = torch.autograd.grad(-(logprobs.exp() * logprobs).sum(), logits, retain_graph=True)
    for old_logprobs in (old, logprobs.detach()):
        zero, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
        loss = sum(
            old_logprobs[token].exp() * ppo_loss(
                logprobs[token].view(1, 1), old_logprobs[token].view(1, 1), zero, zero, zero, zero, mask, 0.2, 0.2,
                0.1, ent_coef=1.0,
            )[0]
            for token in range(6)
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.allclose(-gradient, expected, atol=1e-10)


def draw(model, num_generations=4, length=20, seed=0):
    query, query_mask = pad_sequences(PROMPTS, 0, "left")
    generator = torch.Generator().manual_seed(seed)
    response, logprobs, mask = sample(model, query, query_mask, num_generations, length, 1.0, [1, 2], 0, generator)
    return query, query_mask, response.view(3, num_generations, -1), mask.view(3, num_generations, -1), logprobs


def test_without_clipping_and_whitening_one_step_is_reinforce_with_the_value_as_baseline():
    """gamma = lambda = 1: the gradient of sum_t (reward-to-go_t - V_t) log pi_t / tokens, written out."""
    model = make_model()
    query, query_mask, response, mask, old_logprobs = draw(model)
    mask_flat = mask.flatten(0, 1)
    states = packed_states(model, query, query_mask, response, mask)
    logprobs = completion_logprobs(model, states, response, mask, 1.0).flatten(0, 1)
    scores, log_ratio = torch.randn(12), 0.1 * torch.randn(mask_flat.shape)
    values = torch.randn(mask_flat.shape)
    rewards = token_rewards(scores, log_ratio, mask_flat, 0.05)
    advantages, returns = gae(rewards, values, mask_flat, 1.0, 1.0)
    loss, _ = ppo_loss(logprobs, old_logprobs, advantages, values, values, returns, mask_flat, math.inf, math.inf, 0.0)
    ours = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    total = 0.0
    for i in range(12):
        for t in range(int(mask_flat[i].sum())):
            rest = range(t, int(mask_flat[i].sum()))
            reward_to_go = scores[i] - 0.05 * sum(log_ratio[i, s] for s in rest)
            total = total + (reward_to_go - values[i, t]) * logprobs[i, t]
    expected = torch.autograd.grad(-total / mask_flat.sum(), list(model.parameters()))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(ours, expected))
    assert max(x.abs().max() for x in ours) > 1e-2


@pytest.mark.parametrize("states_fn", [packed_states, padded_states])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_a_value_is_the_heads_output_on_the_state_before_the_token(architecture, states_fn, tmp_path):
    """As transformers' own classifier gives it for the prompt and the response up to that token, alone."""
    make_model(architecture).save_pretrained(tmp_path)
    query, query_mask, response, mask, _ = draw(make_model(architecture))
    torch.manual_seed(0)
    value_model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    value_model.config.pad_token_id = 19  # no such token in the data
    values = completion_values(value_model.score, states_fn(value_model, query, query_mask, response, mask), mask)
    for p, k in ((0, 0), (1, 2), (2, 3)):
        for t in range(int(mask[p, k].sum())):
            alone = torch.tensor([PROMPTS[p] + response[p, k, :t].tolist()])
            assert values[p, k, t].item() == pytest.approx(value_model(input_ids=alone).logits.item(), abs=1e-4)
    assert not values[~mask].any() and values[mask].std() > 0


def test_values_are_fp32_under_autocast():
    head, states = torch.nn.Linear(32, 1, bias=False), torch.randn(3, 32)
    mask = torch.ones(1, 1, 3, dtype=torch.bool)
    plain = completion_values(head, states, mask)
    with torch.autocast("cpu", torch.bfloat16):
        values = completion_values(head, states, mask)
    assert values.dtype == torch.float32 and torch.equal(values, plain)


# ---- the whole script on a tiny model


@pytest.fixture(autouse=True)
def graded_reward(monkeypatch):
    monkeypatch.setattr(ppo_llm, "REWARDS", ((digit_reward, 1.0), *ppo_llm.REWARDS))


@pytest.fixture(scope="session")
def reward_folder(model_folder, tmp_path_factory) -> str:
    """A reward model of the tiny policy's architecture and tokenizer, with what reward_model.py writes beside it."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id, model.config.reward_mean, model.config.reward_std = 0, 0.5, 2.0
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("shared_backbone", [False, True])
def test_a_run_learns_logs_and_saves(tiny, capsys, shared_backbone):
    args = tiny(max_steps=12, num_mini_batches=2, share_value_backbone=shared_backbone)
    metrics = main(args)
    folder = run_folder(args)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert json.loads((folder / "summary.json").read_text()) == metrics
    assert metrics["eval/reward"] > metrics["eval/reward_before"] + 0.2
    assert {"eval/accuracy", "eval/accuracy_before", "eval/kl", "seed", "wall_seconds"} <= set(metrics)
    assert abs(metrics["eval/kl_before"]) < 1e-4 < metrics["eval/kl"]
    tags = scalars(folder)
    counted, length = (tags[f"train/{name}"][0][1] for name in ("num_tokens", "completions/mean_length"))
    assert counted == pytest.approx(16 * (4 + length))  # a prompt such as `1+2=` counts with each completion
    assert len(tags["objective/scores"]) == 12 and abs(tags["objective/kl"][0][1]) < 1e-4
    assert max(value for _, value in tags["train/sampling/sampling_logp_difference/max"]) < 1e-4
    assert tags["losses/explained_variance"][0][1] == pytest.approx(0.0, abs=1e-5)  # the first values are 0
    assert tags["loss/value_avg"][-1][1] < tags["loss/value_avg"][0][1] / 2
    assert tags["charts/learning_rate"][-1][1] == pytest.approx(1e-3)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(state["critic"]) == (1 if shared_backbone else len(state["model"]))
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.vocab_size == 20


def spy_on(monkeypatch, name: str) -> list[tuple]:
    """The arguments of each call of one of the script's functions."""
    calls, function = [], getattr(ppo_llm, name)

    def spy(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(ppo_llm, name, spy)
    return calls


def test_the_loop_does_what_the_flags_say(tiny, monkeypatch):
    """What reaches rewards, advantages, the loss and the optimizers, when the flags are none of the defaults."""
    losses, rewards, advantages = (spy_on(monkeypatch, name) for name in ("ppo_loss", "token_rewards", "gae"))
    steps, step = [], torch.optim.AdamW.step
    queries = []

    def states_spy(model, *inputs):
        if torch.is_grad_enabled() and type(model).__name__ == "LlamaForCausalLM":
            queries.append((model, *inputs))
        return packed_states(model, *inputs)

    monkeypatch.setattr(ppo_llm, "packed_states", states_spy)

    def step_spy(optimizer, *arguments):
        (group,) = optimizer.param_groups
        norm = torch.stack([p.grad.norm() for p in group["params"]]).norm().item()
        steps.append((group["lr"], group["eps"], group["weight_decay"], norm))
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_spy)
    args = tiny(
        max_steps=1, num_ppo_epochs=3, num_mini_batches=2, num_generations=2, epsilon=0.11, cliprange_value=0.22,
        vf_coef=0.33, ent_coef=0.44, gamma=0.9, lam=0.8, kl_coef=0.07, weight_decay=0.05, max_grad_norm=1e-3,
        max_tokens_per_microbatch=1,
    )  # fmt: skip
    main(args)
    assert [call[3] for call in rewards] == [0.07] and [call[3:] for call in advantages] == [(0.9, 0.8)]
    assert {call[7:11] for call in losses} == {(0.11, 0.22, 0.33, 0.44)}
    # with one token a micro-batch each of the 16 completions is alone, once in each of the 3 epochs
    assert len(losses) == 3 * 16 and {tuple(call[0].shape[:2]) for call in losses} == {(1, 1)}
    tokens = sum(int(call[6].sum()) for call in losses) / 3
    per_minibatch = [{call[11] for call in losses[start : start + 8]} for start in range(0, 48, 8)]
    assert all(len(counts) == 1 for counts in per_minibatch)
    totals = [counts.pop() for counts in per_minibatch]
    assert [a + b for a, b in zip(totals[::2], totals[1::2])] == [tokens] * 3
    assert len({frozenset(totals[start : start + 2]) for start in (0, 2, 4)}) > 1  # shuffled anew in each epoch
    prompts = [tuple(call[1].flatten().tolist()) for call in queries[-48:]]  # of the update's micro-batches
    for start in range(0, 48, 8):  # both completions of a prompt are in the same minibatch
        assert all(prompts[start : start + 8].count(prompt) == 2 for prompt in prompts[start : start + 8])
    assert [lr for lr, *_ in steps[::2]] == pytest.approx([1e-2 * (1 - 0.9 * i / 5) for i in range(6)])
    assert {(eps, decay) for _, eps, decay, _ in steps} == {(1e-5, 0.05)} and len(steps) == 12
    assert max(norm for *_, norm in steps) < 1.01e-3


def test_whole_groups_share_a_minibatch_and_every_prompt_comes_once(tiny, monkeypatch):
    calls = spy_on(monkeypatch, "ppo_loss")
    main(tiny(max_steps=1, num_generations=4, num_mini_batches=2, num_ppo_epochs=2))
    assert [call[0].shape[:2] for call in calls] == [(2, 4)] * 4  # 2 prompts of 4 completions, in one packed row each
    for first, second in (calls[:2], calls[2:]):
        rows = torch.cat([first[1], second[1]]).flatten(1)
        assert len(rows.unique(dim=0)) == 4


def test_the_missing_eos_penalty_looks_at_all_stop_ids(tiny, tmp_path, monkeypatch):
    """With some digits as stop ids fewer completions are cut off, and only those pay."""
    shares = []
    for number, stop_token_ids in enumerate(((), (2, 3, 4, 5, 6))):
        calls = spy_on(monkeypatch, "token_rewards")
        main(tiny(
            max_steps=1, missing_eos_penalty=3.0, stop_token_ids=stop_token_ids, output_dir=str(tmp_path / str(number))
        ))  # fmt: skip
        scores, _, mask, _ = calls[0]
        cut_off = scores < 0  # without the penalty a score lies between 0 and 1
        assert cut_off.any() and (~cut_off).any()
        assert (mask[cut_off].sum(1) == 6).all() and (mask[~cut_off].sum(1) < 6).any()
        shares.append(cut_off.float().mean())
    assert shares[1] < shares[0]


def test_whitened_rewards_keep_their_mean_and_returns_come_before_whitening(tiny, monkeypatch):
    advantages, losses = spy_on(monkeypatch, "gae"), spy_on(monkeypatch, "ppo_loss")
    main(tiny(max_steps=1, whiten_rewards=True, num_ppo_epochs=1, share_value_backbone=True))
    rewards, values, mask = advantages[0][:3]
    assert rewards[mask].std() == pytest.approx(1.0, rel=1e-4)
    raw, returns = gae(rewards, values, mask, 1.0, 0.95)
    assert torch.allclose(returns, raw + values)
    assert torch.cat([call[5][call[6]] for call in losses]).sort()[0].tolist() == pytest.approx(
        returns[mask].sort()[0].tolist()
    )
    white = torch.cat([call[2][call[6]] for call in losses])
    assert white.mean().abs() < 1e-5 and white.std() == pytest.approx(1.0, rel=1e-4)


def test_target_kl_ends_the_epochs(tiny):
    args = tiny(target_kl=1e-6, num_ppo_epochs=5, max_steps=3)
    main(args)
    assert [value for _, value in scalars(run_folder(args))["policy/epochs"]] == [2.0] * 3  # the first is on-policy


def test_target_kl_is_that_of_one_pass_and_not_of_their_sum(tiny, tmp_path, monkeypatch):
    def same_kl(*arguments, **options):
        loss, stats = ppo_loss(*arguments, **options)
        tokens = arguments[6].sum() / arguments[11]  # this micro-batch's share
        return loss, {**stats, "policy/approxkl_avg": 0.1 * tokens}

    monkeypatch.setattr(ppo_llm, "ppo_loss", same_kl)
    for target, epochs in ((0.11, 5.0), (0.09, 1.0)):
        args = tiny(target_kl=target, num_ppo_epochs=5, num_mini_batches=2, max_steps=1,
                    output_dir=str(tmp_path / str(target)))  # fmt: skip
        main(args)
        assert scalars(run_folder(args))["policy/epochs"] == [(1, epochs)]
        assert scalars(run_folder(args))["policy/approxkl_avg"][0][1] == pytest.approx(0.1, rel=1e-5)


def test_the_rollouts_values_are_those_of_the_update(tiny, reward_folder, monkeypatch):
    """Before the first step the value of every token is what the rollout has noted for it, and the ratio is 1."""
    losses, advantages = spy_on(monkeypatch, "ppo_loss"), spy_on(monkeypatch, "gae")
    args = tiny(
        max_steps=1, num_ppo_epochs=1, num_generations=4, num_mini_batches=2, reward_model_path=reward_folder,
        learning_rate=1e-30,
    )  # fmt: skip
    main(args)
    for logprobs, old_logprobs, _, values, old_values, _, mask, *_ in losses:
        assert torch.allclose(values[mask], old_values[mask], atol=1e-4)
        assert torch.allclose(logprobs[mask], old_logprobs[mask], atol=1e-4)
    rewards, values, mask = advantages[0][:3]
    assert values[mask].std() > 0.1  # else any rows would do
    returns = gae(rewards, values, mask, 1.0, 0.95)[1][mask]
    logs = scalars(run_folder(args))
    explained = 1 - (returns - values[mask]).var(correction=0) / returns.var(correction=0)
    assert logs["losses/explained_variance"][0][1] == pytest.approx(explained.item(), rel=1e-3, abs=1e-4)
    assert logs["val/ratio"][0][1] == pytest.approx(1.0, abs=1e-4)


def test_the_value_loss_moves_a_shared_backbone_and_not_a_separate_policy(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_llm, "whiten", lambda advantages, mask: torch.zeros_like(advantages))
    for shared_backbone in (True, False):
        args = tiny(share_value_backbone=shared_backbone, max_steps=2, output_dir=str(tmp_path / str(shared_backbone)))
        main(args)
        norms = scalars(run_folder(args))["train/grad_norm"]
        assert (norms[1][1] > 1e-4) == shared_backbone  # at first the head is 0


def test_kl_target_moves_the_coefficient(tiny):
    args = tiny(kl_target=0.01, kl_horizon=160, max_steps=4, learning_rate=3e-2)
    main(args)
    logs = scalars(run_folder(args))
    expected = 0.05
    for (_, coefficient), (_, kl), (_, non_score) in zip(
        logs["objective/kl_coef"], logs["objective/kl"], logs["objective/non_score_reward"]
    ):
        assert coefficient == pytest.approx(expected, rel=1e-5)
        assert non_score == pytest.approx(-expected * kl, rel=1e-4, abs=1e-7)
        expected *= 1 + min(max(kl / 0.01 - 1, -0.2), 0.2) * 0.1
    assert expected > 0.05


def test_the_reward_model_is_the_reward_and_starts_the_value_network(tiny, reward_folder, monkeypatch, tmp_path):
    args = tiny(reward_model_path=reward_folder, learning_rate=1e-30, max_steps=1, num_ppo_epochs=1)
    metrics = main(args)
    assert metrics["eval/reward"] == pytest.approx(metrics["eval/reward_model"])
    assert {"eval/digit", "eval/accuracy"} <= set(metrics)  # still logged
    critic = torch.load(run_folder(args) / "checkpoint.pt", weights_only=True)["critic"]
    rated = AutoModelForSequenceClassification.from_pretrained(reward_folder).state_dict()
    assert all(torch.equal(critic[name], rated[name]) for name in rated) and critic["score.bias"].abs() < 1e-20
    args = tiny(
        reward_model_path=reward_folder, normalize_reward_model=True, learning_rate=1e-30, max_steps=1,
        output_dir=str(tmp_path / "standardised"),
    )  # fmt: skip
    standardised = main(args)
    assert standardised["eval/reward"] == pytest.approx((metrics["eval/reward"] - 0.5) / 2.0, rel=1e-5)
    critic = torch.load(run_folder(args) / "checkpoint.pt", weights_only=True)["critic"]
    assert torch.allclose(critic["score.weight"], rated["score.weight"] / 2.0)
    assert critic["score.bias"].item() == pytest.approx(-0.25)


@pytest.mark.parametrize("difference", ["no reward model", "ids", "class", "context", "window", "one more token"])
def test_where_the_value_network_starts(tiny, reward_folder, model_folder, tmp_path, difference):
    """From the reward model only where it reads the same ids in the same way; else from the policy, its values 0."""
    folder, tokenizer = tmp_path / "other", make_tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    if difference == "class":
        make_model("gpt2").save_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model.config.pad_token_id = 0
    elif difference == "context":
        model.config.max_position_embeddings = 64
    elif difference == "window":
        model.config.sliding_window = 8
    elif difference == "ids":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(reward_folder)
        swapped = tokenizer.backend_tokenizer.to_str().replace('"a":16', '"z":16')
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(swapped), pad_token="<pad>", eos_token="<eos>"
        )
        assert tokenizer.get_vocab() != make_tokenizer().get_vocab()
    elif difference == "one more token":
        tokenizer.add_tokens(["<|pad|>"])
        model.resize_token_embeddings(21)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    args = tiny(
        reward_model_path=None if difference == "no reward model" else str(folder), learning_rate=1e-30, max_steps=1,
        num_ppo_epochs=1,
    )  # fmt: skip
    main(args)
    critic = torch.load(run_folder(args) / "checkpoint.pt", weights_only=True)["critic"]
    if difference == "one more token":
        assert (
            torch.equal(critic["score.weight"], model.score.weight) and len(critic["model.embed_tokens.weight"]) == 21
        )
    else:
        policy = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
        assert critic["score.weight"].abs().max() < 1e-20
        assert torch.equal(critic["model.layers.1.mlp.up_proj.weight"], policy["model.layers.1.mlp.up_proj.weight"])


def test_an_architecture_without_a_classifier_needs_a_shared_backbone(tiny, tmp_path, capsys):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Ernie4_5Config(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )).save_pretrained(tmp_path / "ernie")  # fmt: skip
    make_tokenizer().save_pretrained(tmp_path / "ernie")
    args = tiny(model_name_or_path=str(tmp_path / "ernie"), max_steps=1)
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2 and "--share-value-backbone" in capsys.readouterr().err
    assert not Path(args.output_dir).exists()
    args.share_value_backbone = True
    assert "eval/reward" in main(args)


def test_sliding_windows_are_padded(tiny, tmp_path, capsys):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MistralConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=8, pad_token_id=0, bos_token_id=None,
        eos_token_id=1,
    )).save_pretrained(tmp_path / "mistral")  # fmt: skip
    make_tokenizer().save_pretrained(tmp_path / "mistral")
    args = tiny(model_name_or_path=str(tmp_path / "mistral"), num_generations=4, num_mini_batches=2, max_steps=1)
    main(args)
    assert "pads completions" in capsys.readouterr().out
    assert scalars(run_folder(args))["train/sampling/sampling_logp_difference/max"][0][1] < 1e-4


def test_microbatch_budget_and_gradient_checkpointing_do_not_change_the_result(tiny, tmp_path, monkeypatch):
    reference, recomputing = None, set()

    def spy(model, *inputs):
        recomputing.add((type(model).__name__, model.is_activation_checkpointing and model.training))
        return packed_states(model, *inputs)

    monkeypatch.setattr(ppo_llm, "packed_states", spy)
    for number, flags in enumerate((
        {}, {"max_tokens_per_microbatch": 24}, {"max_tokens_per_microbatch": 1}, {"gradient_checkpointing": True},
    )):  # fmt: skip
        args = tiny(output_dir=str(tmp_path / str(number)), max_steps=2, num_generations=4, num_mini_batches=2,
                    learning_rate=1e-3, **flags)  # fmt: skip
        main(args)
        recomputed = {name for name, recomputes in recomputing if recomputes}
        assert recomputed == ({"LlamaForCausalLM", "LlamaForSequenceClassification"} if number == 3 else set())
        found = weights(run_folder(args))
        norms = [scalars(run_folder(args))[tag] for tag in ("train/grad_norm", "val/grad_norm")]
        reference = reference or (found, norms)
        assert all(torch.allclose(found[name], reference[0][name], atol=1e-5) for name in found)
        for ours, theirs in zip(norms, reference[1]):
            assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in theirs], rel=1e-3)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tiny, monkeypatch):
    dtypes = set()

    def spy(*inputs):
        dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return packed_states(*inputs)

    args = tiny(bf16=True, max_steps=2)
    monkeypatch.setattr(ppo_llm, "choose_states_fn", lambda *_: spy)
    metrics = main(args)
    assert dtypes == {torch.bfloat16}
    assert scalars(run_folder(args))["train/sampling/sampling_logp_difference/max"][0][1] < 0.1
    state = torch.load(run_folder(args) / "checkpoint.pt", weights_only=True)
    assert {x.dtype for part in ("model", "critic") for x in state[part].values()} == {torch.float32}
    assert abs(metrics["eval/kl_before"]) < 0.05 and metrics["eval/kl"] != 0


def test_a_non_finite_gradient_stops_with_the_step_and_a_saved_state(tiny, monkeypatch, capsys):
    def explode(*arguments, **options):
        loss, stats = ppo_loss(*arguments, **options)
        return loss * math.nan, stats

    monkeypatch.setattr(ppo_llm, "ppo_loss", explode)
    args = tiny()
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2 and "step 1 is not finite" in capsys.readouterr().err
    state = torch.load(run_folder(args) / "nonfinite.pt", weights_only=True)
    assert all(x.isfinite().all() for part in ("model", "critic") for x in state[part].values())


def test_a_task_without_a_reward_is_refused_and_a_reward_model_gives_one(
    tiny, tmp_path, reward_folder, capsys, monkeypatch
):
    monkeypatch.setattr(ppo_llm, "REWARDS", ppo_llm.REWARDS[1:])
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{a}+1="} for a in range(9)])
    with pytest.raises(SystemExit) as stop:
        main(tiny(dataset_name=prompts))
    assert stop.value.code == 2 and "--reward-model-path" in capsys.readouterr().err
    metrics = main(tiny(dataset_name=prompts, max_steps=1, reward_model_path=reward_folder))
    assert "eval/accuracy" not in metrics and metrics["eval/reward"] == metrics["eval/reward_model"]


def test_the_embedded_run_starts_from_its_supervised_model_and_resumes(tmp_path):
    flags = {"output_dir": str(tmp_path), "sft_steps": 3, "max_steps": 2, "generation_batch_size": 16, "save_steps": 1,
             "max_eval_samples": 8, "max_completion_length": 8, "device": "cpu", "bf16": False}  # fmt: skip
    args = Args(**flags)
    metrics = main(args)
    assert AutoModelForCausalLM.from_pretrained(run_folder(args) / "sft").config.vocab_size == 15
    again = main(Args(resume=str(run_folder(args))))  # a finished run: evaluated again
    assert {k: v for k, v in again.items() if k != "wall_seconds"} == {
        k: v for k, v in metrics.items() if k != "wall_seconds"
    }


# ---- TRL's trainer on the same rollout


def test_an_update_equals_trls(model_folder, reward_folder, tmp_path, monkeypatch):
    """TRL 1.12's PPOTrainer does a rollout and four optimizer steps on it; ours does the same steps on that rollout.

    Its responses have no EOS: after one TRL puts the score a token too late."""
    ppo_trainer = pytest.importorskip("trl.experimental.ppo.ppo_trainer")
    from datasets import Dataset

    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    policy, reference = (AutoModelForCausalLM.from_pretrained(model_folder).eval() for _ in range(2))
    with torch.no_grad():
        policy.lm_head.weight[0] = policy.lm_head.weight[1] = 0  # see below: neither is sampled
    value, rater = (AutoModelForSequenceClassification.from_pretrained(reward_folder).eval() for _ in range(2))
    prompts = [tokenizer(f"{a}+{b}=").input_ids for a in range(2) for b in range(4)]
    rollouts, logged = [], []
    generate = ppo_trainer.batch_generation

    def no_special_tokens(model, queries, *arguments):
        config = arguments[-1]
        config.suppress_tokens = [0, 1]
        sequences, logits = generate(model, queries, *arguments)
        logits = model(sequences).logits[:, queries.shape[1] - 1 : -1]  # of all tokens: suppressed logits are -inf
        rollouts.append((queries.clone(), sequences.clone()))
        return sequences, logits

    monkeypatch.setattr(ppo_trainer, "batch_generation", no_special_tokens)
    config = ppo_trainer.PPOConfig(
        output_dir=str(tmp_path), report_to="none", save_strategy="no", use_cpu=True, bf16=False, seed=0,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, total_episodes=8, num_mini_batches=1,
        num_ppo_epochs=4, learning_rate=1e-2, temperature=1.0, response_length=7, num_sample_generations=0,
        gradient_checkpointing=False, max_grad_norm=1e9, adam_epsilon=1e-5, kl_coef=0.05, vf_coef=0.1,
        optim="adamw_torch", lr_scheduler_type="constant",
    )  # fmt: skip
    start = {"policy": policy.state_dict(), "value": value.state_dict()}
    start = {name: {k: v.clone() for k, v in state.items()} for name, state in start.items()}
    trainer = ppo_trainer.PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=rater,
        value_model=value, train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts}),
    )  # fmt: skip
    trainer.log = lambda values, *rest: logged.append(values)
    trainer.train()
    (theirs,) = logged

    ours, ours_value = (AutoModelForCausalLM.from_pretrained(model_folder).eval(),
                        AutoModelForSequenceClassification.from_pretrained(reward_folder).eval())  # fmt: skip
    ours.load_state_dict(start["policy"])
    ours_value.load_state_dict(start["value"])
    (query, sequence), = rollouts  # fmt: skip
    response, query_mask = sequence[:, None, query.shape[1] :], torch.ones_like(query, dtype=torch.bool)
    mask = torch.ones_like(response, dtype=torch.bool)
    assert response.shape == (8, 1, 7) and (response > 1).all()

    def forward(model, value_model):
        states, value_states = (packed_states(m, query, query_mask, response, mask) for m in (model, value_model))
        logprobs = completion_logprobs(model, states, response, mask, 1.0)[:, 0]
        return logprobs, completion_values(value_model.score, value_states, mask)[:, 0]

    frozen = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    with torch.no_grad():
        scores = frozen(input_ids=sequence).logits[:, 0]
        ref_logprobs, _ = forward(AutoModelForCausalLM.from_pretrained(model_folder).eval(), frozen)
        old_logprobs, old_values = forward(ours, ours_value)
    mask = mask[:, 0]
    log_ratio = old_logprobs - ref_logprobs
    advantages, returns = gae(token_rewards(scores, log_ratio, mask, 0.05), old_values, mask, 1.0, 0.95)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-5, weight_decay=0.0) for m in (ours, ours_value)]
    stats = []
    for _ in range(4):
        mask = mask[:, None]
        logprobs, values = forward(ours, ours_value)
        mask = mask[:, 0]
        loss, step_stats = ppo_loss(
            logprobs, old_logprobs, whiten(advantages, mask), values, old_values, returns, mask, 0.2, 0.2, 0.1
        )
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        stats.append(step_stats)
    for tag in ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg", "val/ratio"):
        assert torch.stack([s[tag] for s in stats]).mean().item() == pytest.approx(theirs[tag], rel=1e-5, abs=1e-5), tag
    assert theirs["policy/clipfrac_avg"] > 0 and theirs["val/clipfrac_avg"] > 0 and theirs["loss/value_avg"] > 0
    assert log_ratio.sum(1).mean().item() == pytest.approx(theirs["objective/kl"], rel=1e-4, abs=1e-5)
    assert scores.mean().item() == pytest.approx(theirs["objective/scores"], rel=1e-5)
    for ours_parameter, parameter in zip(ours.parameters(), policy.parameters()):
        assert torch.allclose(ours_parameter, parameter, atol=1e-4)
    for ours_parameter, parameter in zip(ours_value.parameters(), value.parameters()):
        assert torch.allclose(ours_parameter, parameter, atol=1e-4)
