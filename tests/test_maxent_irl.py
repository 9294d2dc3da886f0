"""maxent_irl.py: the exact mathematics against brute force, the sampled estimator against the exact one, whole runs."""

import itertools
import json
import math
import os
import signal
import warnings

import gymnasium
import maxent_irl
import numpy as np
import pytest
import torch
from conftest import run_folder, scalars
from maxent_irl import (
    Args,
    as_matrix,
    causal_visits,
    gae_episodic,
    importance_weights,
    load_table,
    log_partition,
    main,
    noncausal_visits,
    occupancy,
    remember,
    sample_table,
    soft_q_step,
    soft_value_iteration,
    successors,
)
from safetensors.torch import load_file
from tqdm import tqdm

H = 4


def make_mdp(S=3, A=2, seed=0, ends=0.0, deterministic=False):
    """Reward (S, A), transition (S, A, S) and initial (S,) in float64; rows sum to 1 - ends in every other state."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(S, A, generator=generator, dtype=torch.float64)
    transition = torch.rand(S, A, S, generator=generator, dtype=torch.float64)
    transition[torch.rand(S, A, S, generator=generator) < 0.3] = 0.0
    transition[..., 0] += 0.1
    if deterministic:
        transition = torch.nn.functional.one_hot(transition.argmax(2), S).double()
    transition /= transition.sum(2, keepdim=True)
    transition[::2] *= 1 - ends
    initial = torch.rand(S, generator=generator, dtype=torch.float64)
    return reward, transition, initial / initial.sum()


def sparse(transition):
    return transition.reshape(-1, transition.shape[-1]).to_sparse_coo()


def trajectories(reward, transition, initial, horizon, gamma=1.0):
    """All of them: (probability of the dynamics, discounted return, [(state, action), ...]). A state S is the end."""
    S, A = reward.shape
    moves = torch.cat([transition, 1 - transition.sum(2, keepdim=True)], 2).clamp(min=0)
    todo = [(initial[s].item(), 0.0, [], s) for s in range(S)]
    for t in range(horizon):
        following = []
        for p, value, steps, s in todo:
            if s == S:
                following.append((p, value, steps, s))
                continue
            for a, s2 in itertools.product(range(A), range(S + 1)):
                q = p * moves[s, a, s2].item()
                if q > 1e-12:
                    following.append((q, value + gamma**t * reward[s, a].item(), [*steps, (s, a)], s2))
        todo = following
    return [x[:3] for x in todo]


def brute_force(reward, transition, initial, horizon, gamma=1.0):
    """log Z and visits of the non-causal model, by enumeration."""
    found = trajectories(reward, transition, initial, horizon, gamma)
    weights = [p * math.exp(value) for p, value, _ in found]
    visits = torch.zeros_like(reward)
    for weight, (_, _, steps) in zip(weights, found):
        for t, (s, a) in enumerate(steps):
            visits[s, a] += gamma**t * weight / sum(weights)
    return math.log(sum(weights)), visits


# ---- the exact mathematics


@pytest.mark.parametrize("ends", [0.0, 0.4])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_log_partition_and_its_gradient_are_those_of_the_enumeration(ends, gamma):
    reward, transition, initial = make_mdp(ends=ends)
    log_z, visits = brute_force(reward, transition, initial, H, gamma)
    assert log_partition(reward, transition, initial, H, gamma).item() == pytest.approx(log_z, abs=1e-10)
    table = {"transition": transition, "initial": initial, "ended": None}
    assert torch.allclose(noncausal_visits(reward, table, gamma, H), visits, atol=1e-10)
    assert gamma < 1 or ends or visits.sum().item() == pytest.approx(H)  # exactly H states


def test_log_partition_passes_gradcheck_and_so_does_the_soft_value():
    reward, transition, initial = make_mdp(ends=0.3)
    reward.requires_grad_()
    for form in (transition, sparse(transition)):
        assert torch.autograd.gradcheck(lambda r: log_partition(r, form, initial, H), reward)
    assert torch.autograd.gradcheck(lambda r: soft_value_iteration(r, transition, 0.9, H)[1][0], reward)


@pytest.mark.parametrize("ends", [0.0, 0.4])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_the_soft_policy_is_the_best_of_all_at_temperature_1(ends, gamma):
    """V_0 is the return plus the (discounted) entropy of the soft policy, and no other policy has more of both."""
    reward, transition, initial = make_mdp(ends=ends)
    policy, values = soft_value_iteration(reward, transition, gamma, H)
    assert policy.shape == (H, 3, 2) and values.shape == (H + 1, 3) and torch.equal(values[-1], torch.zeros(3).double())
    assert torch.allclose(policy.sum(2), torch.ones(H, 3).double(), atol=1e-12)

    def objective(policy):
        total = 0.0
        for p, _, steps in trajectories(reward, transition, initial, H):
            chances = [policy[t, s, a].item() for t, (s, a) in enumerate(steps)]
            taken = enumerate(zip(steps, chances))
            gains = [gamma**t * (reward[s, a].item() - math.log(c)) for t, ((s, a), c) in taken]
            total += p * math.prod(chances) * sum(gains)
        return total

    best = objective(policy)
    assert best == pytest.approx((initial @ values[0]).item(), abs=1e-10)
    for seed in range(5):
        noise = torch.randn(policy.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert objective((policy.log() + 0.1 * noise).softmax(2)) < best


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_occupancies_are_those_of_the_enumeration(gamma):
    reward, transition, initial = make_mdp(ends=0.4)
    policy, values = soft_value_iteration(reward, transition, gamma, H)
    expected = torch.zeros_like(reward)
    for p, _, steps in trajectories(reward, transition, initial, H):
        p *= math.prod(policy[t, s, a].item() for t, (s, a) in enumerate(steps))
        for t, (s, a) in enumerate(steps):
            expected[s, a] += gamma**t * p
    assert torch.allclose(occupancy(policy, transition, initial, gamma), expected, atol=1e-10)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_the_causal_gradient_is_a_difference_of_visits(gamma):
    """d V_0 / d r are the soft policy's visits: by autograd, and by central differences."""
    reward, transition, initial = make_mdp(S=5, A=3, ends=0.2)
    visits = occupancy(soft_value_iteration(reward, transition, gamma, 7)[0], transition, initial, gamma)
    leaf = reward.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(initial @ soft_value_iteration(leaf, transition, gamma, 7)[1][0], leaf)
    assert torch.allclose(gradient, visits, atol=1e-10)
    for s, a in ((0, 0), (3, 2)):
        step = torch.zeros_like(reward)
        step[s, a] = 1e-5
        above, below = (initial @ soft_value_iteration(reward + x, transition, gamma, 7)[1][0] for x in (step, -step))
        assert ((above - below) / 2e-5).item() == pytest.approx(visits[s, a].item(), abs=1e-8)


@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr"])
def test_sparse_and_dense_transitions_agree(layout):
    reward, transition, initial = make_mdp(S=12, A=3, ends=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = getattr(transition.reshape(-1, 12), layout)()
    for one, two in zip(soft_value_iteration(reward, transition, 0.9, 9), soft_value_iteration(reward, other, 0.9, 9)):
        assert torch.allclose(one, two, atol=1e-12)
    policy = soft_value_iteration(reward, transition, 0.9, 9)[0]
    assert torch.allclose(*(occupancy(policy, x, initial, 0.9) for x in (transition, other)), atol=1e-12)
    assert torch.allclose(*(log_partition(reward, x, initial, 9) for x in (transition, other)), atol=1e-12)


def test_rewards_that_differ_by_shaping_have_the_same_policy():
    """r + gamma E[phi(s')] - phi(s): far from the horizon, where phi of the last state is left over."""
    reward, transition, _ = make_mdp(S=5, A=3)
    phi = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shaped = reward + 0.8 * transition @ phi - phi[:, None]
    policies = [soft_value_iteration(r, transition, 0.8, 200)[0][0] for r in (reward, shaped)]
    assert torch.allclose(*policies, atol=1e-10) and not torch.allclose(reward, shaped, atol=0.1)


def test_large_rewards_stay_finite():
    """|r| H = 1e4, where exp(r) overflows and far states underflow."""
    reward, transition, initial = make_mdp(S=20, A=3)
    for scale in (1e4 / 50, -1e4 / 50):
        policy, values = soft_value_iteration(scale * reward.sign(), transition, 1.0, 50)
        assert policy.isfinite().all() and values.isfinite().all()
        leaf = (scale * reward.sign()).requires_grad_()
        log_z = log_partition(leaf, transition, initial, 50)
        (visits,) = torch.autograd.grad(log_z, leaf)
        assert log_z.isfinite() and visits.sum().item() == pytest.approx(50)


def test_an_absorbing_state_is_an_end_under_every_learned_reward():
    """Not flagged as an end, but left by no action and without reward: the demonstrator's reward decides it."""
    moves = {0: {0: [(1.0, 1, 0.5, False)], 1: [(1.0, 0, 0.0, False)]}, 1: {a: [(1.0, 1, 0.0, False)] for a in (0, 1)}}
    table = maxent_irl.read_table(moves, torch.tensor([1.0, 0.0]), (1, 2))
    assert table["transition"].view(2, 2, 2)[0].tolist() == [[0, 0], [1, 0]] and table["ended"].tolist() == [[0], [1]]
    visits = causal_visits(table["reward"], table, 1.0, 10)
    reward = maxent_irl.TableReward("linear", visits, 0)
    assert maxent_irl.fit_exact(reward, "state_action", visits, table, 1.0, 10, 0.0, 1e-4, 5)[1] < 1e-4


def test_a_goal_that_pays_at_every_step_is_no_end_while_its_learned_reward_is_0():
    """A 2x2 grid whose goal no move leaves; rewards to be learned start at exactly 0, where it looks like an end."""
    moves = {}
    for s in range(4):
        y, x = divmod(s, 2)
        reached = [2 * y, 2 * y + 1, x, 2 + x] if s < 3 else [3] * 4
        moves[s] = {a: [(1.0, s2, float(s == 3), False)] for a, s2 in enumerate(reached)}
    table = maxent_irl.read_table(moves, torch.eye(4)[0], (2, 2))
    visits = causal_visits(table["reward"], table, 1.0, 10)
    assert not table["ended"].any()
    for inputs, seen in (("state", visits.sum(1, keepdim=True)), ("state_action", visits)):
        reward = maxent_irl.TableReward("linear", seen, 0)
        _, gap = maxent_irl.fit_exact(reward, inputs, visits, table, 1.0, 10, 0.0, 1e-4, 5)
        results = maxent_irl.evaluate_table(reward().detach().expand(-1, 4), table, visits, 1.0, 10)
        assert gap < 1e-4 and results["normalized_score"] == pytest.approx(1, abs=1e-3)


def test_an_absorbing_state_in_the_table_is_an_end_without_reward_or_entropy():
    reward, transition, initial = make_mdp(ends=0.4)
    S, A = reward.shape
    explicit = torch.zeros(S + 1, A, S + 1, dtype=torch.float64)
    explicit[:S, :, :S], explicit[:S, :, S], explicit[S, :, S] = transition, 1 - transition.sum(2), 1.0
    more = torch.cat([reward, torch.zeros(1, A).double()])
    policy, values = soft_value_iteration(more, explicit, 0.9, H)
    expected_policy, expected = soft_value_iteration(reward, transition, 0.9, H)
    assert torch.allclose(values[:, :S], expected, atol=1e-12) and values[:, S].abs().max() < 1e-12
    assert torch.allclose(policy[:, :S], expected_policy, atol=1e-12)
    start = torch.cat([initial, torch.zeros(1).double()])
    assert log_partition(more, explicit, start, H).item() == pytest.approx(
        log_partition(reward, transition, initial, H).item(), abs=1e-12
    )


def lake(success_rate):
    table, _ = load_table("FrozenLake-v1", {"success_rate": success_rate})
    return table


def test_the_two_models_agree_under_deterministic_dynamics_and_one_start_only():
    gaps = []
    for slip in (0.0, 0.1, 0.3):
        table = lake(1 - slip)
        reward = 10 * table["reward"]
        causal = causal_visits(reward, table, 1.0, 12)
        gaps.append((causal - noncausal_visits(reward, table, 1.0, 12)).sum(1).abs().sum().item())
    assert gaps[0] < 1e-10 and 0.1 < gaps[1] < gaps[2]
    reward, transition, initial = make_mdp(S=6, A=3, deterministic=True)
    one_start = torch.eye(6, dtype=torch.float64)[0]
    for start, same in ((one_start, True), (initial, False)):
        table = {"transition": transition, "initial": start, "ended": None}
        causal, noncausal = (visits(reward, table, 1.0, 8) for visits in (causal_visits, noncausal_visits))
        assert torch.allclose(causal, noncausal, atol=1e-10) == same
        value = start @ soft_value_iteration(reward, transition, 1.0, 8)[1][0]
        assert (abs(value - log_partition(reward, transition, start, 8)) < 1e-10) == same


def test_tables_are_gymnasiums():
    """Transitions and rewards of FrozenLake by hand: an end is missing in the transition, not in the arrivals."""
    table = lake(1 / 3)
    transition, arrival = (table[name].view(16, 4, 16) for name in ("transition", "arrival"))
    assert torch.allclose(arrival[14, 2], torch.eye(16).double()[[10, 14, 15]].sum(0) / 3)  # right, beside the goal
    assert torch.allclose(transition[14, 2], torch.eye(16).double()[[10, 14]].sum(0) / 3)
    assert table["reward"][14, 2].item() == pytest.approx(1 / 3) and table["reward"].sum().item() == pytest.approx(1.0)
    assert table["cell_reward"][15] > 0 and table["initial"][0] == 1
    reward, limit = load_table(None, {})[0]["reward"], load_table(None, {})[1]
    assert reward.max() == 100 and reward.min() == -10 and (reward == -1).any() and limit == maxent_irl.LECTURE_HORIZON


def test_large_tables_are_sparse():
    table, limit = load_table("Taxi-v4", {})
    assert table["transition"].layout == torch.sparse_csr and limit == 200
    visits = causal_visits(table["reward"], table, 1.0, 20).sum().item()
    assert 19 < visits <= 20 + 1e-9  # chance hardly ever ends an episode in 20 steps


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_control_has_no_table(env_id):
    assert load_table(env_id, {})[0] is None


# ---- the sampled estimator


def test_importance_weights_by_hand():
    weights = importance_weights(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-1.0, 0.0, -3.0]))
    raw = torch.tensor([2.0, 2.0, 3.0]).exp()
    assert torch.allclose(weights, raw / raw.sum())


def test_importance_weights_ignore_constants_and_are_finite():
    returns, logprobs = torch.randn(50).double(), -10 * torch.rand(50).double()
    weights = importance_weights(returns, logprobs)
    assert torch.allclose(importance_weights(returns + 123.0, logprobs - 7.0), weights, atol=1e-12)
    for extreme in (1e4, -1e4):
        found = importance_weights(torch.tensor([extreme, 0.0, 1.0]), torch.tensor([0.0, -1e4, -1.0]))
        assert found.isfinite().all() and found.sum().item() == pytest.approx(1.0)


def draw(policy, transition, initial, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return sample_table(policy, *successors(as_matrix(transition)), initial, count, generator)


def returns_and_logprobs(reward, batch):
    returns = torch.where(batch["mask"], reward[batch["obs"], batch["act"]], 0.0).sum(1)
    return returns, torch.where(batch["mask"], batch["logprobs"], 0.0).sum(1)


def test_weights_are_even_for_the_soft_policy_under_deterministic_dynamics():
    """std(log w) = 0 and the effective sample size is N; with slip, or from a uniform policy, it is not."""
    for slip, even in ((0.0, True), (0.3, False)):
        table = lake(1 - slip)
        reward = 5 * torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).double()
        policy, _ = soft_value_iteration(reward, table["transition"], 1.0, 12)
        returns, logprobs = returns_and_logprobs(reward, draw(policy, table["transition"], table["initial"], 300))
        size = importance_weights(returns, logprobs).square().sum().reciprocal().item()
        assert ((returns - logprobs).std() < 1e-8) == even
        assert (abs(size - 300) < 1e-6) == even
        uniform = torch.full_like(policy, 0.25)
        returns, logprobs = returns_and_logprobs(reward, draw(uniform, table["transition"], table["initial"], 300))
        assert importance_weights(returns, logprobs).square().sum().reciprocal() < 30


@pytest.mark.parametrize("ends", [0.0, 0.3])
def test_weighted_visits_are_the_non_causal_models(ends):
    """Also with stochastic dynamics, where they are not the causal model's."""
    reward, transition, initial = make_mdp(ends=ends)
    policy, _ = soft_value_iteration(reward, transition, 1.0, H)
    batch = draw(policy, transition, initial, 200_000)
    weights = importance_weights(*returns_and_logprobs(reward, batch))
    index = (batch["obs"] * 2 + batch["act"])[batch["mask"]]
    steps = weights[:, None].expand(-1, H)[batch["mask"]]
    estimate = torch.bincount(index, steps, 6).view(3, 2)
    exact = brute_force(reward, transition, initial, H)[1]
    causal = causal_visits(reward, {"transition": transition, "initial": initial, "ended": None}, 1.0, H)
    assert (estimate - exact).abs().max() < 0.02 < (causal - exact).abs().max()


def test_sampled_trajectories_have_the_policys_visits_and_logprobs():
    reward, transition, initial = make_mdp(ends=0.4)
    policy, _ = soft_value_iteration(reward, transition, 1.0, H)
    batch = draw(policy, transition, initial, 50_000)
    visits = maxent_irl.visit_counts(batch["obs"], batch["act"], batch["mask"], 0.9, (3, 2))
    assert torch.allclose(visits, occupancy(policy, transition, initial, 0.9), atol=0.02)
    again = policy[torch.arange(H), batch["obs"], :].gather(2, batch["act"][..., None])[..., 0].log()
    assert torch.equal(torch.where(batch["mask"], again, 0.0), torch.where(batch["mask"], batch["logprobs"], 0.0))


def test_soft_q_learning_on_all_transitions_is_soft_value_iteration():
    reward, transition, _ = make_mdp(S=6, A=3, deterministic=True)
    states, actions = (x.flatten() for x in torch.meshgrid(torch.arange(6), torch.arange(3), indexing="ij"))
    arrived = transition.argmax(2).flatten()
    replay = remember(torch.zeros(0, 2).long(), (states * 3 + actions) * 7 + arrived)
    q = soft_q_step(torch.zeros(H, 6, 3).double(), reward, replay, 0.9, 1.0)
    policy, values = soft_value_iteration(reward, transition, 0.9, H)
    assert torch.allclose(q.logsumexp(2), values[:-1], atol=1e-12) and torch.allclose(q.softmax(2), policy, atol=1e-12)
    half = soft_q_step(torch.zeros(H, 6, 3).double(), reward, torch.tensor([[6, 1]]), 0.9, 0.5)  # an end of (0, 0)
    assert torch.allclose(half[:, 0, 0], reward[0, 0].expand(H) / 2) and half.abs().sum() == half[:, 0, 0].abs().sum()


def test_the_replay_memory_counts_every_transition():
    replay = torch.zeros(0, 2).long()
    for new in ([5, 3, 5], [3, 9]):
        replay = remember(replay, torch.tensor(new))
    assert replay.tolist() == [[3, 2], [5, 2], [9, 1]]


def test_segments_keep_every_step():
    x = torch.arange(1, 15).view(2, 7).t()
    assert maxent_irl.segment_sums(x, 3).tolist() == [1 + 2 + 3, 4 + 5 + 6, 7, 8 + 9 + 10, 11 + 12 + 13, 14]
    assert torch.equal(maxent_irl.segment_sums(x, 7), x.sum(0))


# ---- control


def test_segments_of_the_soft_optimal_policy_have_even_weights():
    """Path consistency: under deterministic dynamics r - log pi + gamma V(s') - V(s) is 0 in every step, also in the
    last one of an episode that ended, or was cut off; so all segments weigh the same."""
    reward, transition, initial = make_mdp(S=5, A=3, ends=0.0, deterministic=True)
    transition[4] = 0.0  # whatever is done there ends the episode
    policy, values = soft_value_iteration(reward, transition, 0.8, 300)  # as good as without a horizon
    batch = sample_table(policy[:12], *successors(as_matrix(transition)), initial, 64, torch.Generator().manual_seed(0))
    terminated = batch["mask"] & (batch["next_obs"] == 5)
    found = []
    for obs, act, logprobs, after, ends, mask in zip(
        batch["obs"], batch["act"], batch["logprobs"], batch["next_obs"], terminated, batch["mask"]
    ):
        visited = torch.cat([obs, after[-1:]]).clamp(max=4)  # (S+1,)
        differences = maxent_irl.value_differences(values[0][visited][:, None], ends[:, None], 0.8)[:, 0]
        found.append((reward[obs, act] - logprobs + differences)[mask])
    assert terminated.any() and (batch["mask"].sum(1) == 12).any()
    assert torch.cat(found).abs().max() < 1e-6


def test_the_lengths_of_demonstrations_fit_the_horizon_and_equal_returns_have_no_score(tiny, tmp_path, capsys):
    flags = {"env_id": "MountainCar-v0", "num_trajectories": 2, "eval_episodes": 2, "expert_steps": 1, "num_demos": 1}
    metrics = main(tiny(**flags, max_steps=2, horizon=20))
    assert metrics["eval/return"] == metrics["eval/expert_return"] == -20 and metrics["eval/normalized_score"] is None
    demos = str(run_folder(tiny()) / "demos.npz")
    with pytest.raises(SystemExit):
        main(tiny(env_id="MountainCar-v0", demos=demos, horizon=19))
    assert "has an episode of 20 steps, and --horizon is 19" in capsys.readouterr().err


def test_gae_by_hand():
    rewards, values, following = (torch.tensor(x)[:, None] for x in ([1.0, 2.0, 3.0], [0.5, 0.4, 0.3], [0.4, 9.0, 0.2]))
    no = torch.zeros(3, 1, dtype=torch.bool)
    end = torch.tensor([False, True, False])[:, None]
    for terminated, truncated, second in ((end, no, 2 - 0.4), (no, end, 2 + 0.9 * 9 - 0.4)):
        advantages, returns = gae_episodic(rewards, values, following, terminated, truncated, 0.9, 0.5)
        assert advantages[1, 0].item() == pytest.approx(second)
        assert advantages[0, 0].item() == pytest.approx(1 + 0.9 * 0.4 - 0.5 + 0.45 * second)
        assert advantages[2, 0].item() == pytest.approx(3 + 0.9 * 0.2 - 0.3)
        assert torch.allclose(returns, advantages + values)


def test_squashed_actions_have_a_density():
    outputs = torch.tensor([[0.3, -0.2]]).expand(20001, 2)
    actions = torch.linspace(-0.9999, 0.9999, 20001)[:, None]
    policy = maxent_irl.ActorCritic(3, gymnasium.make("Pendulum-v1").action_space, 4)
    density = policy.logprobs(outputs, actions.double().atanh().float()).exp()
    assert torch.trapezoid(density, actions[:, 0]).item() == pytest.approx(1.0, abs=2e-3)


def test_stored_logprobs_are_the_policys_and_truncation_is_no_termination():
    envs = maxent_irl.make_envs("Pendulum-v1", 3)
    policy = maxent_irl.ActorCritic(3, envs.single_action_space, 16)
    statistics = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 4.0]])
    draws = [
        maxent_irl.rollout(envs, policy, statistics, 20, 5, "sample", torch.Generator().manual_seed(0), True)
        for _ in range(2)
    ]
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])  # no state is left in environments
    batch = draws[0]
    assert batch["mask"].all() and not batch["terminated"].any() and batch["truncated"].sum(0).tolist() == [1, 1, 1]
    assert batch["truncated"][-1].all() and batch["obs"].shape == (21, 3, 3)
    outputs = policy(maxent_irl.normalise(batch["obs"][:-1], statistics))
    assert torch.allclose(policy.logprobs(outputs, batch["act"]), batch["logprobs"], atol=1e-5)
    poles = maxent_irl.make_envs("CartPole-v1", 3)
    policy = maxent_irl.ActorCritic(4, poles.single_action_space, 16)
    batch = maxent_irl.rollout(
        poles, policy, torch.ones(2, 4), 500, 5, "sample", torch.Generator().manual_seed(0), True
    )
    mask, lengths = batch["mask"], batch["mask"].sum(0)
    assert len(mask) == lengths.max() < 500 and ((batch["terminated"] & mask).sum(0) == 1).all()
    assert torch.equal(torch.where(mask, batch["rew"], 0.0).sum(0), lengths.float())


# ---- the whole script


CARTPOLE = {
    "env_id": "CartPole-v1", "num_trajectories": 4, "eval_episodes": 4, "expert_steps": 2, "num_demos": 3, "horizon": 60
}  # fmt: skip


def test_the_default_run_recovers_the_lectures_grid(tmp_path, capsys):
    args = Args(output_dir=str(tmp_path), device="cpu", transfer='{"slip": 0.2}')
    metrics = main(args)
    folder = run_folder(args)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert json.loads((folder / "summary.json").read_text()) == metrics
    margin = metrics["eval/expert_return"] - metrics["eval/random_return"]
    assert margin > 90
    assert abs(metrics["eval/exact/expected_value_difference"]) < 1e-3 * margin
    assert abs(metrics["eval/sampled/expected_value_difference"]) < 0.03 * margin
    assert abs(metrics["eval/exact/optimal_value_difference"]) < 1e-3 * margin
    assert metrics["eval/exact/occupancy_gap"] < 1e-3 and metrics["eval/causal_gap"] < 1e-8
    for name in ("expected_value_difference", "expert_return", "random_return", "return", "normalized_score"):
        assert metrics[f"eval/{name}"] == metrics[f"eval/sampled/{name}"]
        assert f"transfer/exact/{name}" in metrics
    best, worst = metrics["transfer/exact/expert_return"], metrics["transfer/exact/old_policy_return"]
    assert worst < metrics["transfer/exact/return"] <= best + 1e-3
    logs = scalars(folder)
    cosines = [value for _, value in logs["train/gradient_cosine"]]
    assert len(cosines) == args.max_steps // maxent_irl.DIAGNOSTIC_STEPS and np.median(cosines) > 0.5
    assert logs["train/effective_sample_share"][-1][1] > 0.9
    tensors = load_file(folder / "reward.safetensors"), load_file(folder / "policy.safetensors")
    assert tensors[0]["exact"].shape == (16, 4) and tensors[1]["sampled"].shape == (10, 16, 4)
    table = load_table(None, {})[0]
    again = soft_value_iteration(tensors[0]["exact"], table["transition"], 1.0, 10)[0]
    assert torch.equal(again, tensors[1]["exact"])


@pytest.mark.parametrize("size, horizon", [(5, 20), (10, 40)])
def test_the_exact_estimator_needs_few_iterations(size, horizon):
    """A random reward for each state of a grid: visits to 1e-3 in 40 iterations of L-BFGS, and a value to 1% of the
    expert's margin over random. (tests/bench_control.py measures the time.)"""
    reward = 2 * torch.rand(size * size, generator=torch.Generator().manual_seed(size)) - 1
    moves = {}
    for s in range(size * size):
        y, x = divmod(s, size)
        reached = [(y, max(x - 1, 0)), (y, min(x + 1, size - 1)), (max(y - 1, 0), x), (min(y + 1, size - 1), x)]
        moves[s] = {a: [(1.0, size * v + u, reward[s].item(), False)] for a, (v, u) in enumerate(reached)}
    table = maxent_irl.read_table(moves, torch.eye(size * size)[0], (size, size))
    visits = maxent_irl.causal_visits(table["reward"], table, 1.0, horizon)
    learned = maxent_irl.TableReward("linear", visits.sum(1, keepdim=True), 0)
    _, gap = maxent_irl.fit_exact(learned, "state", visits, table, 1.0, horizon, 0.0, 1e-3, 2)
    results = maxent_irl.evaluate_table(learned().detach().expand(-1, 4), table, visits, 1.0, horizon)
    assert gap < 1e-3 and results["occupancy_gap"] < 1e-3
    assert abs(results["expected_value_difference"]) < 0.01 * (results["expert_return"] - results["random_return"])


@pytest.mark.parametrize("flags", [{"reward_model": "neural"}, {"reward_inputs": "state_action"}])
def test_other_rewards_on_frozen_lake(flags, tiny):
    args = tiny(
        env_id="FrozenLake-v1", env_kwargs='{"is_slippery": false}', reward_scale=10.0, horizon=20, max_steps=300,
        num_trajectories=256, **flags,
    )  # fmt: skip
    metrics = main(args)
    margin = metrics["eval/expert_return"] - metrics["eval/random_return"]
    assert abs(metrics["eval/exact/expected_value_difference"]) < 0.01 * margin
    assert abs(metrics["eval/sampled/expected_value_difference"]) < 0.03 * margin


def test_samples_of_several_iterations_are_weighted_by_the_mixture_of_their_policies(tiny, monkeypatch):
    """Each sample's density is the mean of the stored policies', not that of its own."""
    drawn, weighted = [], []
    sample, weigh = maxent_irl.sample_table, maxent_irl.importance_weights

    def noted(policy, *arguments):
        drawn.append((policy, sample(policy, *arguments)))
        return drawn[-1][1]

    monkeypatch.setattr(maxent_irl, "sample_table", noted)
    monkeypatch.setattr(maxent_irl, "importance_weights", lambda *x: weighted.append(x) or weigh(*x))
    main(tiny(estimator="sampled", fusion_iterations=2, max_steps=3))
    obs, act, mask = (torch.cat([batch[name] for _, batch in drawn[1:]]) for name in ("obs", "act", "mask"))
    chances = [torch.where(mask, policy[torch.arange(10), obs, act], 1.0).prod(1) for policy, _ in drawn[1:]]
    assert len(weighted[0][1]) == 32 and len(weighted[2][1]) == 64 and not torch.allclose(*chances)
    assert torch.allclose(weighted[2][1], torch.stack(chances).mean(0).log(), atol=1e-10)


def test_finite_demonstrations_and_files_of_them(tiny, tmp_path):
    table = load_table(None, {})[0]
    policy, _ = soft_value_iteration(table["reward"], table["transition"], 1.0, 10)
    batch = draw(policy, table["transition"], table["initial"], 50)
    mask = batch["mask"]
    path = str(tmp_path / "demos.npz")
    np.savez(path, obs=batch["obs"][mask].numpy(), act=batch["act"][mask].numpy(), lengths=mask.sum(1).numpy())
    for flags in ({"num_demos": 50}, {"demos": path}):
        metrics = main(tiny(estimator="exact", exp_name=next(iter(flags)), **flags))
        assert metrics["eval/normalized_score"] > 0.9


def test_ctrl_c_saves_after_the_step_and_resume_goes_on(tiny, tmp_path, monkeypatch, capsys):
    expected = main(tiny(output_dir=str(tmp_path / "whole")))
    broken = tiny(output_dir=str(tmp_path / "broken"), save_steps=100)
    calls, real = [], maxent_irl.soft_q_step

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(maxent_irl, "soft_q_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(broken)
    assert stop.value.code == 130 and "stopped by Ctrl-C after step 3" in capsys.readouterr().out
    metrics = main(Args(resume=str(run_folder(broken))))
    assert all(metrics[key] == expected[key] for key in expected if key != "wall_seconds")


@pytest.mark.parametrize("env_id", [None, "CartPole-v1"])
def test_ctrl_c_between_two_steps_is_heard_after_the_next_one(env_id, tiny, monkeypatch, capsys):
    """The signal comes after step 2 has asked whether to save, before step 3 begins."""

    class Bar(tqdm):
        def __iter__(self):
            for step in super().__iter__():
                if step == 2 and self.desc != "expert":
                    os.kill(os.getpid(), signal.SIGINT)
                yield step

    def handler(*_):
        pass

    monkeypatch.setattr(maxent_irl, "trange", lambda *counts, **flags: Bar(range(*counts), **flags))
    flags = {"estimator": "sampled"} if env_id is None else CARTPOLE
    args, old_handler = tiny(**flags, save_steps=100), signal.signal(signal.SIGINT, handler)
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert signal.signal(signal.SIGINT, old_handler) is handler
    assert stop.value.code == 130 and "stopped by Ctrl-C after step 3" in capsys.readouterr().out
    assert torch.load(run_folder(args) / "checkpoint.pt", weights_only=True)["step"] == 3


def test_the_same_seed_gives_the_same_result_and_another_seed_another(tiny):
    one, two, three = (main(tiny(exp_name=str(i), seed=seed)) for i, seed in enumerate((1, 1, 2)))
    assert one["eval/return"] == two["eval/return"] != three["eval/return"]


def test_gaussian_actions_outside_the_box_are_clipped(tiny, tmp_path, capsys):
    """Expert files hold actions as a Gaussian policy drew them; when most lie outside, the file is another space's."""
    space = gymnasium.make("Pendulum-v1").action_space
    for act, said in (([1.0, -2.5, 0.0, 0.5], "25% of act lie outside"), ([3.0, -2.5, 4.0, 0.5], "wanted in Box")):
        path = str(tmp_path / "box.npz")
        np.savez(path, obs=np.zeros((4, 3), np.float32), act=np.array(act)[:, None], lengths=np.array([4]))
        try:
            demos, _ = maxent_irl.load_demos(path, None, gymnasium.make("Pendulum-v1").observation_space, space)
            assert demos["act"].flatten().tolist() == [1.0, -2.0, 0.0, 0.5]
        except SystemExit as stop:
            assert stop.code == 2
        shown = capsys.readouterr()
        assert said in shown.out + shown.err


def test_nan_observations_are_said(tiny, monkeypatch, capsys):
    real = gymnasium.envs.classic_control.cartpole.CartPoleVectorEnv.step

    def broken(*arguments):
        obs, *rest = real(*arguments)
        return obs * np.nan, *rest

    monkeypatch.setattr(gymnasium.envs.classic_control.cartpole.CartPoleVectorEnv, "step", broken)
    with pytest.raises(SystemExit) as stop:
        main(tiny(**CARTPOLE))
    assert stop.value.code == 2 and "is not finite in step 1" in capsys.readouterr().err


def test_control_runs_log_and_save(tiny):
    metrics = main(tiny(**CARTPOLE))
    assert {"eval/expected_value_difference", "eval/normalized_score", "eval/return", "env_steps"} <= set(metrics)
    folder = run_folder(tiny())
    logs = scalars(folder)
    assert len(logs["train/effective_sample_size"]) == 6 and "losses/explained_variance" in logs
    shares = [value for _, value in logs["policy/clipfrac_avg"]]
    assert max(shares) < 1 and all(0 <= value < 0.1 for _, value in logs["policy/approxkl_avg"])
    reward, policy = (load_file(folder / f"{name}.safetensors") for name in ("reward", "policy"))
    assert reward["observation_std"].shape == (4,) and policy["actor.4.weight"].shape == (2, 64)
    with np.load(folder / "demos.npz") as demos:
        assert len(demos["lengths"]) == 4 and demos["obs"].shape == (demos["lengths"].sum(), 4)


def test_the_experts_return_is_that_of_all_its_episodes_and_resuming_plays_no_uniform_ones(tiny, shared, monkeypatch):
    """As in gail.py: however few are imitated. The normaliser weighs both kinds of observations alike."""
    demos = str(shared / "data/experts/CartPole-v1.npz")
    flags = {**CARTPOLE, "horizon": 500, "max_steps": 2}
    args, played, real = tiny(**flags, demos=demos), [], maxent_irl.rollout
    monkeypatch.setattr(maxent_irl, "rollout", lambda *x: played.append((x[5], real(*x))) or played[-1][1])
    metrics = main(args)
    with np.load(demos) as file:
        assert metrics["eval/expert_return"] == pytest.approx(file["rew"].sum() / len(file["lengths"]))
        imitated = torch.from_numpy(file["obs"][: file["lengths"][:3].sum()])
    state = torch.load(run_folder(args) / "checkpoint.pt", weights_only=True)
    (uniform,) = (batch for mode, batch in played if mode == "uniform")
    statistics = maxent_irl.observation_statistics(imitated, uniform["obs"][:-1][uniform["mask"]])
    assert torch.equal(state["statistics"], statistics)
    assert state["random_return"] == metrics["eval/random_return"] == uniform["mask"].sum().item() / 4
    played.clear()
    assert main(Args(resume=str(run_folder(args))))["eval/return"] == metrics["eval/return"]
    assert [mode for mode, _ in played] == ["sample", "greedy"]  # the last evaluation


def test_the_policy_learns_from_the_new_reward_minus_log_pi(tiny, monkeypatch):
    """Weights are of whole episodes here, by the log-probabilities that were stored; the last steps bootstrap from the
    last observation, before any reset."""
    calls = {name: [] for name in ("rollout", "importance_weights", "reward_step", "gae_episodic")}

    def note(name):
        real = getattr(maxent_irl, name)
        monkeypatch.setattr(
            maxent_irl, name, lambda *x, **flags: calls[name].append((x, real(*x, **flags))) or calls[name][-1][1]
        )

    for name in calls:
        note(name)
    args = tiny(**CARTPOLE, max_steps=1, segment_length=0)
    main(args)
    (batch,) = (batch for arguments, batch in calls["rollout"] if arguments[4] == 10**9)  # obs: now normalised
    mask, ((reward, *_), _) = batch["mask"], calls["reward_step"][0]
    features = maxent_irl.pair_features(batch["obs"][:-1], batch["act"], 2)
    rewards, values, next_values, terminated, truncated, *_ = calls["gae_episodic"][-1][0]
    assert torch.allclose(rewards[mask], (reward(features)[..., 0] - batch["logprobs"])[mask], atol=1e-6)
    assert torch.equal(values[1:], next_values[:-1]) and values.shape == mask.shape
    assert torch.equal(terminated, batch["terminated"]) and torch.equal(truncated, batch["truncated"])
    logprobs = calls["importance_weights"][0][0][1]
    assert torch.allclose(logprobs, torch.where(mask, batch["logprobs"], 0.0).sum(0), atol=1e-5)


def test_a_reward_on_cartpole_is_learned(shared, tiny):
    """From 10 demonstrations, in few steps: far better than chance. (Longer runs reach the expert: README.)"""
    args = tiny(
        env_id="CartPole-v1", demos=str(shared / "data/experts/CartPole-v1.npz"), num_demos=10, max_steps=25,
        num_trajectories=16, eval_episodes=10, save_steps=100,
    )  # fmt: skip
    assert main(args)["eval/normalized_score"] > 0.3
