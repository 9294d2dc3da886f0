"""What holds for every input, on examples that hypothesis chooses: masks, packing, advantages, weights and losses."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

import grpo_llm
from dpo import dpo_loss
from gail import gae_episodic
from grpo_llm import generate, group_advantages, make_batch
from maxent_irl import importance_weights, soft_value_iteration
from ppo_llm import completion_logprobs, gae, pack, sample, whiten
from reward_model import bradley_terry_loss, plackett_luce_loss


def examples(count: int) -> settings:
    """The same examples in every run, without a limit of time and without a database of them."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def numbers(bound: float) -> st.SearchStrategy[float]:
    return st.floats(-bound, bound, allow_subnormal=False)


def lists(elements: st.SearchStrategy, size: int) -> st.SearchStrategy[list]:
    return st.lists(elements, min_size=size, max_size=size)


@st.composite
def tables(draw, elements: st.SearchStrategy, *shape: int) -> torch.Tensor:
    values = torch.tensor(draw(lists(elements, math.prod(shape))))
    return (values.double() if values.is_floating_point() else values).view(shape)


# ---- masks of sampled completions


class Scripted:
    """A language model that answers prompt number i, whose last id is i, with scripts[i]. What it knows of a row are
    its position ids and what it put into the cache: a row that is mistaken for another one gets the other's answer."""

    training, config, device = False, LlamaConfig(num_hidden_layers=1), torch.device("cpu")

    def __init__(self, scripts: torch.Tensor, lengths: list[int], vocabulary: int) -> None:
        self.scripts, self.lengths, self.vocabulary = scripts, torch.tensor(lengths), vocabulary

    def eval(self) -> None:
        pass

    def train(self, mode: bool) -> None:
        pass

    def __call__(self, input_ids, past_key_values, attention_mask, position_ids, **options) -> SimpleNamespace:
        if past_key_values.get_seq_length() == 0:  # the prompts
            self.prompt_length = input_ids.shape[1]
        keys, _ = past_key_values.update(*[input_ids[:, None, :, None].float()] * 2, 0)  # (b, 1, positions, 1)
        row = keys[:, 0, self.prompt_length - 1, 0].long()  # (b,)
        t = position_ids[:, -1] - self.lengths[row] + 1  # (b,)
        assert (t == keys.shape[2] - self.prompt_length).all()
        assert (keys[:, 0, self.prompt_length :, 0] == self.scripts[row, : t[0]]).all()
        if attention_mask is None:
            assert (self.lengths == self.prompt_length).all()
        else:
            assert torch.equal(attention_mask.sum(1), self.lengths[row] + t)
        logits = torch.full((len(row), self.vocabulary), -torch.inf)
        t = t.clamp(max=self.scripts.shape[1] - 1)  # what comes after the last token is not asked for
        logits[torch.arange(len(row)), self.scripts[row, t]] = 0.0
        return SimpleNamespace(logits=logits[:, None])


@st.composite
def completions(draw) -> tuple:
    """Scripts (P, T) of ids, stop ids and a pad id, which may be a stop id, and the prompts' lengths (P,)."""
    vocabulary, P, T = draw(st.integers(2, 12)), draw(st.integers(1, 20)), draw(st.integers(1, 5))
    ids = st.integers(0, vocabulary - 1)
    stop_ids = draw(st.lists(ids, max_size=3, unique=True))
    pad_id = draw(st.sampled_from(stop_ids) if stop_ids and draw(st.booleans()) else ids)
    return draw(tables(ids, P, T)), stop_ids, pad_id, draw(lists(st.integers(1, 4), P)), vocabulary


@examples(150)
@given(completions(), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_response_goes_to_its_first_stop_id_whatever_the_ids_and_the_pad_id(completions, G, temperature):
    scripts, stop_ids, pad_id, lengths, vocabulary = completions
    (P, T), model = scripts.shape, Scripted(scripts, lengths, vocabulary)
    query = torch.full((P, max(lengths)), pad_id)
    query[:, -1] = torch.arange(P)
    query_mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    response, logprobs, mask = sample(
        model, query, query_mask, G, T, temperature, stop_ids, pad_id, torch.Generator().manual_seed(0)
    )
    expected = [next((t + 1 for t, token in enumerate(row) if token in stop_ids), T) for row in scripts.tolist()]
    assert response.shape == logprobs.shape == mask.shape == (P * G, max(expected))
    for row, (ids, real) in enumerate(zip(response.tolist(), mask.tolist())):
        script, length = scripts[row // G].tolist(), expected[row // G]
        assert sum(real) == length and all(real[:length])
        assert ids == script[:length] + [pad_id] * (max(expected) - length)
    assert (logprobs == 0).all()  # probability 1, and padding


@examples(150)
@given(completions(), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0]))
def test_generate_goes_to_the_first_stop_id_whatever_the_ids(completions, G, temperature):
    scripts, stop_ids, _, lengths, vocabulary = completions
    P, T = scripts.shape
    prompts = [[0] * (length - 1) + [i] for i, length in enumerate(lengths)]
    uniform = torch.rand(P, G, T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Scripted(scripts, lengths, vocabulary)
    generated = generate(model, prompts, uniform, temperature=temperature, stop_ids=stop_ids)
    ends = [next((t + 1 for t, token in enumerate(row) if token in stop_ids), T) for row in scripts.tolist()]
    assert generated == [row[:end] for row, end in zip(scripts.tolist(), ends) for _ in range(G)]


# ---- packing


TOKENS = st.integers(0, 19)


@st.composite
def trees(draw, shortest: int, tokens: st.SearchStrategy[int] = TOKENS) -> tuple:
    """Prompts, K answers to each, and an id that pads them."""
    K = draw(st.integers(1, 4))
    answers = lists(st.lists(tokens, min_size=shortest, max_size=5), K)
    prompt = st.lists(tokens, min_size=1, max_size=5)
    return (*zip(*draw(st.lists(st.tuples(prompt, answers), min_size=1, max_size=3))), draw(TOKENS))


def alone(model, prompt: list[int], answer: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities of an answer by one plain forward pass without masks."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer, dtype=torch.long)[:, None])[:, 0]


@pytest.fixture(scope="module")
def llama():
    return make_model("llama").requires_grad_(False)


def test_rows_of_completions_have_the_logprobs_of_each_sequence_alone(llama):
    @examples(60)
    @given(trees(shortest=0), st.sampled_from([0.5, 1.0]))
    def holds(tree, temperature):
        prompts, answers, _ = tree
        completions = [*itertools.chain(*answers)]
        if not any(completions):
            return
        logprobs = completion_logprobs(llama, list(prompts), completions, temperature)
        assert logprobs.shape == (len(completions), max(map(len, completions)))
        for i, answer in enumerate(completions):
            expected = alone(llama, prompts[i // len(answers[0])], answer, temperature)
            assert torch.allclose(logprobs[i, : len(answer)], expected, atol=1e-4)
            assert (logprobs[i, len(answer) :] == 0).all()

    holds()


def test_batches_have_the_logprobs_of_each_sequence_alone(llama):
    @examples(60)
    @given(trees(shortest=1), st.sampled_from([0.5, 1.0]))
    def holds(tree, temperature):
        prompts, answers, _ = tree
        prompts = [prompt for prompt, group in zip(prompts, answers) for _ in group]
        completions = [*itertools.chain(*answers)]
        batch = make_batch(prompts, completions, "cpu")
        logprobs = grpo_llm.completion_logprobs(llama, batch, temperature)
        assert logprobs.shape == batch["mask"].shape == (len(completions), max(map(len, completions)))
        for i, (prompt, completion) in enumerate(zip(prompts, completions)):
            assert batch["mask"][i].sum() == len(completion) and batch["mask"][i, : len(completion)].all()
            assert torch.allclose(logprobs[i][batch["mask"][i]], alone(llama, prompt, completion, temperature), atol=1e-4)
            assert (logprobs[i][~batch["mask"][i]] == 0).all()

    holds()


@examples(100)
@given(trees(shortest=1), st.integers(1, 60))
def test_microbatches_hold_every_sample_once_within_the_budget(llama, tree, max_tokens):
    prompts, answers, _ = tree
    samples = [{"ids": p, "completion": c} for p, group in zip(prompts, answers) for c in group]
    seen = []
    for indices, mb_prompts, completions in pack(llama, samples, len(answers[0]), max_tokens):
        K = len(indices) // len(mb_prompts)
        assert completions == [samples[i]["completion"] for i in indices]
        assert [prompt for prompt in mb_prompts for _ in range(K)] == [samples[i]["ids"] for i in indices]
        rows = [len(p) + sum(map(len, completions[r * K : r * K + K])) for r, p in enumerate(mb_prompts)]
        assert len(rows) == 1 or len(rows) * max(rows) <= max_tokens
        seen += indices
    assert sorted(seen) == list(range(len(samples))) and len(pack(llama, samples, len(answers[0]), 10**6)) == 1


# ---- advantages

DISCOUNT = st.floats(0, 1, allow_subnormal=False)


def double_sum(deltas: list[float], decay: float) -> list[float]:
    """Schulman et al. 2016, eq. 16, as it stands there: for each step the sum over those that follow."""
    return [sum(decay**later * delta for later, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@st.composite
def responses(draw) -> tuple[torch.Tensor, ...]:
    """rewards, values and mask (B, T); what stands where mask is False may be anything."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    mask = draw(tables(st.booleans(), B, T))
    padding = draw(st.sampled_from([0.0, 7.0, -1e6, math.inf, math.nan]))
    return *(torch.where(mask, draw(tables(numbers(10), B, T)), padding) for _ in range(2)), mask


@examples(150)
@given(responses(), DISCOUNT, DISCOUNT)
def test_gae_is_the_double_sum_over_real_tokens(batch, gamma, lam):
    rewards, values, mask = batch
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b in range(len(mask)):
        r, v = rewards[b][mask[b]].tolist(), values[b][mask[b]].tolist()
        deltas = [x + gamma * following - value for x, value, following in zip(r, v, [*v[1:], 0.0])]
        expected = torch.tensor(double_sum(deltas, gamma * lam), dtype=torch.float64)
        assert torch.allclose(advantages[b][mask[b]], expected, rtol=0, atol=1e-9)
        assert torch.equal(returns[b][mask[b]], (advantages + values)[b][mask[b]])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@st.composite
def rollouts(draw) -> tuple[torch.Tensor, ...]:
    """rewards, values, next_values, terminated and truncated (S, N), in any pattern; a step may be both."""
    S, N = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    return *(draw(tables(numbers(10), S, N)) for _ in range(3)), *(draw(tables(st.booleans(), S, N)) for _ in range(2))


@examples(150)
@given(rollouts(), DISCOUNT, DISCOUNT)
def test_gae_of_episodes_is_the_double_sum_up_to_each_end(rollout, gamma, lam):
    advantages, returns = gae_episodic(*rollout, gamma, lam)
    for n in range(advantages.shape[1]):
        deltas, expected = [], []
        for r, v, following, terminated, truncated in zip(*(x[:, n].tolist() for x in rollout)):
            deltas.append(r + (0.0 if terminated else gamma * following) - v)
            if terminated or truncated:
                expected, deltas = expected + double_sum(deltas, gamma * lam), []
        expected = torch.tensor(expected + double_sum(deltas, gamma * lam), dtype=torch.float64)
        assert torch.allclose(advantages[:, n], expected, rtol=0, atol=1e-9)
    assert torch.equal(returns, advantages + rollout[1])


@examples(150)
@given(responses(), st.booleans())
def test_whitening_scales_the_real_tokens_and_moves_their_mean_only_where_it_should(batch, shift_mean):
    values, _, mask = batch
    whitened = whiten(values, mask, shift_mean)
    assert not shift_mean or torch.equal(whitened, whiten(values, mask))
    assert whitened.dtype == values.dtype and (whitened[~mask] == 0).all()
    real, scaled = values[mask], whitened[mask]
    if len(real):
        assert scaled.mean().item() == pytest.approx(0.0 if shift_mean else real.mean().item(), abs=1e-5)
    if len(real) > 1:
        variance = real.var()
        assert torch.allclose(scaled.var(), variance / (variance + 1e-8), atol=1e-5)  # sums over processes are fp32
    more = torch.nn.functional.pad(values, (2, 1), value=1e3), torch.nn.functional.pad(mask, (2, 1))
    assert torch.equal(whiten(*more, shift_mean)[more[1]], scaled)


@examples(100)
@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 4), st.integers(2, 9), st.sampled_from(["group", "none"]))
def test_equal_rewards_have_no_advantage(reward, P, G, scale_rewards):
    assert (group_advantages(torch.full((P, G), reward), scale_rewards) == 0).all()


@st.composite
def groups(draw, size: int = 9) -> torch.Tensor:
    """Rewards (P, G) in eighths, so that fp32 holds them, and their sums, exactly."""
    return draw(tables(st.integers(-80, 80), draw(st.integers(1, 4)), draw(st.integers(2, size)))).float() / 8


@examples(100)
@given(groups(), st.integers(-1000, 1000), st.sampled_from(["group", "none"]))
def test_advantages_of_a_group_sum_to_zero_and_ignore_a_constant(rewards, shift, scale_rewards):
    advantages = group_advantages(rewards, scale_rewards)
    assert torch.allclose(advantages.sum(1), torch.zeros(len(rewards)), atol=1e-4)
    shifted = group_advantages(rewards + shift, scale_rewards)  # fp32 rounds means near 1000 to 6e-5
    assert torch.allclose(shifted, advantages, atol=5e-3)
    deviation = rewards.std(1)
    expected = deviation / (deviation + 1e-4) if scale_rewards == "group" else deviation
    assert torch.allclose(advantages.std(1), expected, rtol=1e-4)


# ---- maximum entropy

EXTREMES = st.sampled_from([-1e4, 1e4]) | numbers(1e4)


@examples(150)
@given(st.lists(st.tuples(EXTREMES, EXTREMES), min_size=1, max_size=8), numbers(1e4))
def test_importance_weights_are_a_distribution_and_ignore_a_constant(pairs, constant):
    returns, logprobs = torch.tensor(pairs, dtype=torch.float64).T
    weights, raw = importance_weights(returns, logprobs), returns - logprobs
    assert torch.allclose(weights, (raw - raw.max()).exp() / (raw - raw.max()).exp().sum())
    assert weights.isfinite().all() and (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    for shifted in (importance_weights(returns + constant, logprobs), importance_weights(returns, logprobs + constant)):
        assert torch.allclose(shifted, weights, rtol=0, atol=1e-10)
    single = importance_weights(returns.float(), logprobs.float())
    assert single.dtype == torch.float32 and single.sum().item() == pytest.approx(1, abs=1e-6)


@st.composite
def decision_processes(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """reward (S, A) and transition (S, A, S), whose rows sum to 1 or less. Some states are absorbing and have no
    reward."""
    S, A = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    transition = draw(tables(st.integers(0, 4), S, A, S)).double()
    arrival = draw(tables(st.integers(0, S - 1), S, A, 1))
    transition = transition.scatter_add(2, arrival, torch.ones(S, A, 1, dtype=torch.float64))  # no row is empty
    transition *= draw(tables(st.sampled_from([0.0, 0.3, 1.0]), S, A, 1)) / transition.sum(2, keepdim=True)
    absorbing = draw(tables(st.booleans(), S))
    transition = torch.where(absorbing[:, None, None], torch.eye(S, dtype=torch.float64)[:, None], transition)
    return draw(tables(st.just(0.0) | EXTREMES, S, A)) * ~absorbing[:, None], transition


@examples(150)
@given(decision_processes(), st.floats(0, 1), st.integers(1, 6))
def test_soft_policies_sum_to_1_and_soft_values_are_those_of_the_best_action_or_more(process, gamma, H):
    reward, transition = process
    S, A = reward.shape
    policy, values = soft_value_iteration(reward, transition, gamma, H)
    assert policy.shape == (H, S, A) and values.shape == (H + 1, S)
    assert torch.allclose(policy.sum(2), torch.ones(H, S, dtype=torch.float64), rtol=0, atol=1e-9)
    assert values.isfinite().all() and (values[H] == 0).all()
    for t, s in itertools.product(range(H), range(S)):
        ended = all(reward[s, a] == 0 and transition[s, a, s] > 1 - 1e-9 for a in range(A))
        q = [reward[s, a].item() + gamma * (transition[s, a] @ values[t + 1]).item() for a in range(A)]
        if ended:
            assert values[t, s].item() == pytest.approx(0, abs=1e-9)
        else:
            assert max(q) - 1e-8 <= values[t, s].item() <= max(q) + math.log(A) + 1e-8
            assert policy[t, s, q.index(max(q))].item() >= 1 / A - 1e-9


# ---- preferences


@examples(100)
@given(st.lists(st.tuples(numbers(1000), numbers(1000)), min_size=1, max_size=6))
def test_plackett_luce_of_two_answers_is_bradley_terry(pairs):
    scores = torch.tensor(pairs, dtype=torch.float64)
    assert torch.allclose(plackett_luce_loss(scores), bradley_terry_loss(*scores.T), rtol=1e-9, atol=1e-9)


@st.composite
def rankings(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B, K) and their mask; every ranking has at least one answer."""
    B, K = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    counts = torch.tensor(draw(lists(st.integers(1, K), B)))
    return draw(tables(numbers(100), B, K)), torch.arange(K) < counts[:, None]


@examples(100)
@given(rankings(), numbers(100))
def test_plackett_luce_ignores_a_constant_and_what_is_no_answer(ranking, constant):
    scores, mask = ranking
    loss = plackett_luce_loss(scores, mask)
    shift = constant * torch.arange(1, len(scores) + 1)[:, None]  # each ranking has its own
    assert torch.allclose(plackett_luce_loss(scores + shift, mask), loss, atol=1e-9)
    rows = [plackett_luce_loss(row[real][None]) for row, real in zip(scores, mask)]
    assert torch.allclose(torch.stack(rows).mean(), loss, atol=1e-9)


@examples(150)
@given(
    st.lists(st.sampled_from([-200.0, 200.0]) | numbers(200), min_size=1, max_size=6),
    st.floats(0.01, 10),
    st.sampled_from(["sigmoid", "ipo", "robust", "hinge"]),
    st.sampled_from([0.0, 0.1, 0.4]),
)
def test_dpo_losses_and_gradients_are_finite_and_right_at_differences_of_200(differences, beta, loss_type, smoothing):
    chosen = torch.tensor(differences, requires_grad=True)
    zeros = torch.zeros_like(chosen, requires_grad=True)
    losses, *rewards = dpo_loss(chosen, zeros, zeros, zeros, beta, loss_type, smoothing)
    assert not any(reward.requires_grad for reward in rewards)
    (gradient,) = torch.autograd.grad(losses.sum(), chosen)
    assert all(x.isfinite().all() for x in (losses, gradient, *rewards))
    for difference, loss in zip(chosen.tolist(), losses.tolist()):
        h = beta * difference
        right, wrong = (max(-x, 0.0) + math.log1p(math.exp(-abs(x))) for x in (h, -h))
        expected = {
            "sigmoid": (1 - smoothing) * right + smoothing * wrong,
            "robust": ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing),
            "hinge": max(0.0, 1 - h),
            "ipo": (difference - 1 / (2 * beta)) ** 2,
        }[loss_type]
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-4)
