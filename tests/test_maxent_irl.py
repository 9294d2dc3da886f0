"""maxent_irl.py: the exact mathematics against brute force, the sampled estimator against the exact one, whole runs."""

import itertools
import json
import math

import gymnasium
import numpy as np
import pytest
import torch
from conftest import run_folder, scalars
from gymnasium.spaces import Box
from maxent_irl import UNIFORM_SEEDS, ActorCritic, Args, SoftQ, TableEnv, TableReward, actor_critic_loss, causal_visits
from maxent_irl import evaluate_table, fit_exact, importance_weights, load_table, log_partition, main, make_envs, mlp
from maxent_irl import normalize, observation_mean_std, occupancy, pair_features, read_table, rollout
from maxent_irl import soft_value_iteration
from safetensors.torch import load_file

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


def as_table(reward, transition, initial):
    never = torch.zeros(len(reward), 1, dtype=torch.bool)
    return {"reward": reward, "transition": transition, "initial": initial, "ended": never, "arrival": None}


def trajectories(reward, transition, initial, horizon, gamma=1.0):
    """All of them: (probability of the dynamics, discounted return, [(state, action), ...]). A state S is the end."""
    S, A = reward.shape
    moves = torch.cat([transition, 1 - transition.sum(2, keepdim=True)], 2).clamp(min=0)
    todo = [(initial[s].item(), 0.0, [], s) for s in range(S)]
    for t in range(horizon):
        following = [x for x in todo if x[3] == S]
        for (p, value, steps, s), a, s2 in itertools.product(todo, range(A), range(S + 1)):
            if s < S and (q := p * moves[s, a, s2].item()) > 1e-12:
                following.append((q, value + gamma**t * reward[s, a].item(), [*steps, (s, a)], s2))
        todo = following
    return [x[:3] for x in todo]


def mean_visits(reward, weighted, gamma):
    visits = torch.zeros_like(reward)
    for weight, steps in weighted:
        for t, (s, a) in enumerate(steps):
            visits[s, a] += gamma**t * weight
    return visits


def brute_force(reward, transition, initial, horizon, gamma=1.0):
    """log Z and visits of the non-causal model, by enumeration."""
    found = trajectories(reward, transition, initial, horizon, gamma)
    z = sum(p * math.exp(value) for p, value, _ in found)
    return math.log(z), mean_visits(reward, [(p * math.exp(value) / z, steps) for p, value, steps in found], gamma)


def noncausal_visits(reward, table, gamma, horizon):
    leaf = reward.clone().requires_grad_()
    log_z = log_partition(leaf, table["transition"], table["initial"], horizon, gamma, table["ended"])
    return torch.autograd.grad(log_z, leaf)[0]


@pytest.mark.parametrize("ends", [0.0, 0.4])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_both_models_are_those_of_the_enumeration(ends, gamma):
    """log Z and its gradient, the visits. V_0 is the soft policy's return plus (discounted) entropy; its gradient are
    the policy's visits, and no other policy has more of both."""
    reward, transition, initial = make_mdp(ends=ends)
    log_z, visits = brute_force(reward, transition, initial, H, gamma)
    assert log_partition(reward, transition, initial, H, gamma).item() == pytest.approx(log_z, abs=1e-10)
    found = noncausal_visits(reward, as_table(reward, transition, initial), gamma, H)
    assert torch.allclose(found, visits, atol=1e-10)
    leaf, paths = reward.clone().requires_grad_(), trajectories(reward, transition, initial, H)
    policy, values = soft_value_iteration(leaf, transition, gamma, H)
    assert policy.shape == (H, 3, 2) and values.shape == (H + 1, 3) and torch.equal(values[-1], torch.zeros(3).double())

    def follow(policy):
        """The policy's value, and its trajectories with their probabilities."""
        total, weighted = 0.0, []
        for p, _, steps in paths:
            logs = [policy[t, *move].log().item() for t, move in enumerate(steps)]
            weighted.append((p * math.exp(sum(logs)), steps))
            gains = [gamma**t * (reward[move].item() - x) for t, (move, x) in enumerate(zip(steps, logs))]
            total += weighted[-1][0] * sum(gains)
        return total, weighted

    best, weighted = follow(policy.detach())
    assert best == pytest.approx((initial @ values[0]).item(), abs=1e-10)
    visits = occupancy(policy.detach(), transition, initial, gamma)
    assert torch.allclose(visits, mean_visits(reward, weighted, gamma), atol=1e-10)
    assert torch.allclose(torch.autograd.grad(initial @ values[0], leaf)[0], visits, atol=1e-10)
    noise = torch.randn(policy.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert follow((policy.detach().log() + 0.1 * noise).softmax(2))[0] < best


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr"])
def test_sparse_and_dense_transitions_agree(layout):
    reward, transition, initial = make_mdp(S=12, A=3, ends=0.2)
    forms = transition, getattr(transition.reshape(-1, 12), layout)()
    for one, two in zip(*(soft_value_iteration(reward, x, 0.9, 9) for x in forms)):
        assert torch.allclose(one, two, atol=1e-12)
    policy = soft_value_iteration(reward, transition, 0.9, 9)[0]
    assert torch.allclose(*(occupancy(policy, x, initial, 0.9) for x in forms), atol=1e-12)
    assert torch.allclose(*(log_partition(reward, x, initial, 9) for x in forms), atol=1e-12)


def test_large_rewards_stay_finite():  # |r| H = 1e4, where exp(r) overflows and far states underflow
    reward, transition, initial = make_mdp(S=20, A=3)
    for scale in (1e4 / 50, -1e4 / 50):
        policy, values = soft_value_iteration(scale * reward.sign(), transition, 1.0, 50)
        assert policy.isfinite().all() and values.isfinite().all()
        visits = noncausal_visits(scale * reward.sign(), as_table(reward, transition, initial), 1.0, 50)
        assert visits.sum().item() == pytest.approx(50)


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
    found = [log_partition(more, explicit, start, H), log_partition(reward, transition, initial, H)]
    assert found[0].item() == pytest.approx(found[1].item(), abs=1e-12)


def grid_moves(size, reward):  # (S,), of leaving the state
    moves = {}
    for s in range(size * size):
        y, x = divmod(s, size)
        reached = [(y, max(x - 1, 0)), (y, min(x + 1, size - 1)), (max(y - 1, 0), x), (min(y + 1, size - 1), x)]
        moves[s] = {a: [(1.0, size * v + u, reward[s].item(), False)] for a, (v, u) in enumerate(reached)}
    return moves


def test_an_absorbing_state_is_an_end_by_the_true_reward_only():
    """Left by no action and without reward, it is an end under every learned reward. A goal that pays at every step is
    none, although its learned reward starts at exactly 0."""
    moves = {0: {0: [(1.0, 1, 0.5, False)], 1: [(1.0, 0, 0.0, False)]}, 1: {a: [(1.0, 1, 0.0, False)] for a in (0, 1)}}
    table = read_table(moves, torch.tensor([1.0, 0.0]), (1, 2))
    assert table["transition"].view(2, 2, 2)[0].tolist() == [[0, 0], [1, 0]] and table["ended"].tolist() == [[0], [1]]
    pays = grid_moves(2, torch.zeros(4))
    pays[3] = {a: [(1.0, 3, 1.0, False)] for a in range(4)}
    paying = read_table(pays, torch.eye(4)[0], (2, 2))
    assert not paying["ended"].any()
    for table, inputs in ((table, "state_action"), (paying, "state"), (paying, "state_action")):
        visits = causal_visits(table["reward"], table, 1.0, 10)
        reward = TableReward(inputs, visits, table["arrival"])
        assert fit_exact(reward, visits, table, 1.0, 10, 1e-4, 5)[1] < 1e-4
        learned = reward.table(table["arrival"]).detach()
        assert evaluate_table(learned, table, visits, 1.0, 10)["normalized_score"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("size, horizon", [(5, 20), (10, 40)])
def test_the_exact_estimator_needs_few_iterations(size, horizon):
    """A random reward for each state of a grid: visits to 1e-3 in 40 iterations of L-BFGS."""
    reward = 2 * torch.rand(size * size, generator=torch.Generator().manual_seed(size)) - 1
    table = read_table(grid_moves(size, reward), torch.eye(size * size)[0], (size, size))
    visits = causal_visits(table["reward"], table, 1.0, horizon)
    learned = TableReward("state", visits, table["arrival"])
    _, gap = fit_exact(learned, visits, table, 1.0, horizon, 1e-3, 2)
    results = evaluate_table(learned.table(table["arrival"]).detach(), table, visits, 1.0, horizon)
    assert gap < 1e-3 and results["occupancy_gap"] < 1e-3
    assert gap == pytest.approx(results["occupancy_gap"], rel=1e-6)  # in visits, not in the scaled parameters
    assert abs(results["expected_value_difference"]) < 0.01 * (results["expert_return"] - results["random_return"])


def test_the_two_models_agree_under_deterministic_dynamics_and_one_start_only():
    gaps = []
    for slip in (0.0, 0.1, 0.3):
        table = load_table("FrozenLake-v1", {"success_rate": 1 - slip})[0]
        reward = 10 * table["reward"]
        causal = causal_visits(reward, table, 1.0, 12)
        gaps.append((causal - noncausal_visits(reward, table, 1.0, 12)).sum(1).abs().sum().item())
    assert gaps[0] < 1e-10 and 0.1 < gaps[1] < gaps[2]
    reward, transition, initial = make_mdp(S=6, A=3, deterministic=True)
    for start, same in ((torch.eye(6, dtype=torch.float64)[0], True), (initial, False)):
        table = as_table(reward, transition, start)
        causal, noncausal = (visits(reward, table, 1.0, 8) for visits in (causal_visits, noncausal_visits))
        assert torch.allclose(causal, noncausal, atol=1e-10) == same


def test_tables_are_gymnasiums():
    """FrozenLake by hand: an end is missing in the transition, not in the arrivals. Control has no table."""
    table = load_table("FrozenLake-v1", {"success_rate": 1 / 3})[0]
    transition, arrival = (table[name].view(16, 4, 16) for name in ("transition", "arrival"))
    assert torch.allclose(arrival[14, 2], torch.eye(16).double()[[10, 14, 15]].sum(0) / 3)  # right, beside the goal
    assert torch.allclose(transition[14, 2], torch.eye(16).double()[[10, 14]].sum(0) / 3)
    assert table["reward"][14, 2].item() == pytest.approx(1 / 3) and table["reward"].sum().item() == pytest.approx(1.0)
    assert table["initial"][0] == 1 and load_table("Taxi-v4", {})[0]["shape"] == (1, 500)
    table, limit = load_table(None, {})
    assert {100, -10, -1} <= set(table["reward"].flatten().tolist()) and limit == 10
    slippery = load_table(None, {"slip": 0.4})[0]["arrival"].view(16, 4, 16)
    assert table["transition"].view(16, 4, 16)[11, 3].sum() == 0  # the meat ends the episode
    assert slippery[0, 1, 1].item() == pytest.approx(0.7) and slippery[0, 1, 0].item() == pytest.approx(0.2)
    assert load_table("CartPole-v1", {})[0] is None and load_table("Pendulum-v1", {})[0] is None


def draw(policy, table, count, seed=0):
    """Trajectories of a policy (H, S, A) in a table: states (T+1, N), actions, logprobs and mask (T, N)."""
    horizon, S, A = policy.shape
    soft_q = SoftQ(S, A, horizon, 1.0)
    soft_q.q.copy_(policy.log())
    mean_std = torch.tensor([[0.0, 0.0], [S, horizon]])
    batch = rollout(TableEnv(table, count), soft_q, mean_std, horizon, seed, "sample", one_episode=True)
    assert torch.equal(batch["obs"][:, 0, 1], torch.arange(len(batch["obs"])).float())  # the clock
    return batch["obs"][..., 0].long(), batch["actions"], batch["logprobs"], batch["mask"]


def returns_and_logprobs(reward, states, actions, logprobs, mask):
    returns = torch.where(mask, reward[states[:-1].clamp(max=len(reward) - 1), actions], 0.0).sum(0)
    return returns, torch.where(mask, logprobs, 0.0).sum(0)


def test_weights_are_even_for_the_soft_policy_under_deterministic_dynamics():
    """std(log w) = 0 and the effective sample size is N; with slip, it is not."""
    for slip, even in ((0.0, True), (0.3, False)):
        table = load_table("FrozenLake-v1", {"success_rate": 1 - slip})[0]
        reward = 5 * torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).double()
        policy, _ = soft_value_iteration(reward, table["transition"], 1.0, 12)
        returns, logprobs = returns_and_logprobs(reward, *draw(policy, table, 300))
        size = importance_weights(returns, logprobs).square().sum().reciprocal().item()
        assert ((returns - logprobs).std() < 1e-8) == even and (abs(size - 300) < 1e-6) == even


@pytest.mark.parametrize("ends", [0.0, 0.3])
def test_weighted_visits_are_the_non_causal_models(ends):
    """Also with stochastic dynamics, where they are not the causal model's. Without weights they are the policy's, and
    next states depend on the move only: the table's random numbers are not those of the policy."""
    reward, transition, initial = make_mdp(ends=ends)
    table = as_table(reward, transition, initial)
    policy, _ = soft_value_iteration(reward, transition, 1.0, H)
    states, actions, logprobs, mask = draw(policy, table, 200_000)
    assert not torch.equal(states[0], draw(policy, table, 200_000, seed=1)[0][0])
    weights = importance_weights(*returns_and_logprobs(reward, states, actions, logprobs, mask))
    index = (states[:-1] * 2 + actions)[mask]
    estimate = torch.bincount(index, weights.expand_as(logprobs)[mask], 6).view(3, 2)
    exact, causal = brute_force(reward, transition, initial, H)[1], causal_visits(reward, table, 1.0, H)
    assert (estimate - exact).abs().max() < 0.02 < (causal - exact).abs().max()
    assert (torch.bincount(index, minlength=6).view(3, 2) / 200_000 - causal).abs().max() < 0.02
    seen = torch.bincount(index * 4 + states[1:][mask], minlength=24).view(6, 4).double()
    rows = torch.cat([transition, 1 - transition.sum(2, keepdim=True)], 2).view(6, 4)
    assert torch.allclose(seen / seen.sum(1, keepdim=True), rows, atol=0.02)
    again = policy[torch.arange(H)[:, None], states[:-1].clamp(max=2), actions].log()
    assert torch.allclose(again[mask], logprobs[mask], atol=1e-12)


def test_soft_q_learning_on_all_transitions_is_soft_value_iteration():
    reward, transition, _ = make_mdp(S=6, A=3, deterministic=True)
    arrived = transition.argmax(2).flatten()
    policy = SoftQ(6, 3, H, 0.9)
    assert torch.allclose(policy.q[:, 0, 0], torch.tensor([2.439, 1.71, 0.9, 0.0]).double() * math.log(3))  # entropy
    policy.learn(torch.arange(18), arrived, reward, 0.9, 1.0)
    expected, values = soft_value_iteration(reward, transition, 0.9, H)
    assert torch.allclose(policy.q.logsumexp(2), values[:-1]) and torch.allclose(policy.q.softmax(2), expected)
    policy.learn(torch.tensor([0, 0]), torch.tensor([6, 6]), 0 * reward, 0.9, 0.5)  # an end of (0, 0), seen twice in 3
    assert policy.counts[0, 6] == 2 and policy.counts.sum() == 20
    after = 0.9 * policy.q[1].logsumexp(1)[arrived[0]] / 3  # under the newest reward
    assert policy.q[0, 0, 0].item() == pytest.approx((reward[0, 0] + 0.9 * values[1][arrived[0]] + after).item() / 2)
    policy = SoftQ(6, 3, H, 0.9)
    policy.learn(torch.tensor([4]), torch.tensor([6]), reward, 0.9, 0.5)  # moves that were never seen stay
    assert torch.equal(policy.q[:, 0], policy.q[:, 2]) and not torch.equal(policy.q[:, 1, 1], policy.q[:, 0, 1])


def test_actor_critic_loss_by_hand():
    """Advantages 1 and 5 count as -1 and 1. The second ratio, 1.5, is clipped to 1.2; the first, 0.5, gains more."""
    ratio, values, returns = torch.tensor([0.5, 1.5]), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0])
    loss, stats = actor_critic_loss(ratio.log(), torch.zeros(2), torch.tensor([1.0, 5.0]), values, returns, 0.2)
    assert stats["losses/policy_loss"].item() == pytest.approx((0.8 - 1.2) / 2)
    assert stats["losses/value_loss"].item() == pytest.approx(0.5 * (1 + 9) / 2)
    assert loss.item() == pytest.approx(-0.2 + 2.5) and stats["policy/clipfrac_avg"] == 1.0
    kl = ((0.5 - 1 - math.log(0.5)) + (1.5 - 1 - math.log(1.5))) / 2
    assert stats["policy/approxkl_avg"].item() == pytest.approx(kl)


def test_beta_actions_have_their_density():
    """On [-1, 1]; uniform where both concentrations are 1, and for "uniform"."""
    policy = ActorCritic(3, Box(-2, 2, (2,)), 4)
    actions = torch.linspace(-0.9999, 0.9999, 20001)[:, None]
    density = policy.logprobs(torch.tensor([[2.0, 5.0]]), actions).exp()
    assert torch.trapezoid(density, actions[:, 0]).item() == pytest.approx(1.0, abs=2e-3)
    assert policy.logprobs(torch.ones(4), torch.tensor([0.3, -0.9])).item() == pytest.approx(-2 * math.log(2))
    outputs = torch.tensor([2.0, 1.0, 5.0, 4.0]).expand(50_000, 4)  # Beta(2, 5) and Beta(1, 4)
    drawn = policy.select(outputs, "sample", torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.mean(0), torch.tensor([4 / 7 - 1, 2 / 5 - 1]), atol=0.01)
    uniform = policy.select(outputs, "uniform", torch.Generator().manual_seed(0))
    assert torch.allclose(uniform.mean(0), torch.zeros(2), atol=0.02) and uniform.abs().max() <= 1
    assert torch.allclose(uniform.var(0), torch.full((2,), 1 / 3), atol=0.01)
    edge = policy.select(torch.full((1000, 4), math.exp(-1)), "sample", torch.Generator().manual_seed(0))
    assert policy.logprobs(torch.full((1000, 4), math.exp(-1)), edge).isfinite().all()


def write_demos(path, env_id, act, episodes=5, horizon=30):
    """Demonstrations of the actions act(rng), from Gymnasium alone."""
    env, rng, rows, lengths = gymnasium.make(env_id), np.random.default_rng(0), [], []
    for episode in range(episodes):
        (obs, _), terminated, start = env.reset(seed=episode), False, len(rows)
        while not terminated and len(rows) < start + horizon:
            action = act(rng)
            following, reward, terminated, *_ = env.step(action)
            rows.append((obs, action, reward))
            obs = following
        lengths.append(len(rows) - start)
    obs, actions, rewards = (np.array(x) for x in zip(*rows))
    np.savez(path, obs=obs, act=actions, rew=rewards, lengths=np.array(lengths))
    return str(path)


def test_the_default_run_recovers_the_cats_grid(tmp_path, capsys):
    args = Args(output_dir=str(tmp_path), transfer='{"slip": 0.2}', num_trajectories=256, max_steps=150)
    metrics, folder = main(args), run_folder(args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(folder) and not [line for line in lines if line.startswith(("eval/return", "note"))]
    assert json.loads((folder / "summary.json").read_text()) == metrics
    margin = metrics["eval/expert_return"] - metrics["eval/random_return"]
    for name, tolerance in {"exact": 1e-3, "sampled": 0.02}.items():
        assert abs(metrics[f"eval/{name}/expected_value_difference"]) < tolerance * margin
    assert metrics["eval/exact/best_return"] - metrics["eval/exact/greedy_return"] < 1e-3 * margin
    assert metrics["eval/exact/occupancy_gap"] < 1e-3 and metrics["eval/causal_gap"] < 1e-8
    for name in ("expected_value_difference", "expert_return", "random_return", "return", "normalized_score"):
        assert metrics[f"eval/{name}"] == metrics[f"eval/sampled/{name}"] and f"transfer/exact/{name}" in metrics
    old, new = metrics["transfer/exact/old_policy_return"], metrics["transfer/exact/return"]
    logs = scalars(folder)
    shares = [value for _, value in logs["train/effective_sample_share"]]
    assert 0 < min(shares) and max(shares) <= 1 + 1e-6 and shares[-1] > 0.8
    tensors = load_file(folder / "reward.safetensors"), load_file(folder / "policy.safetensors")
    assert tensors[0]["exact"].shape == (16, 4) and tensors[1]["sampled"].shape == (10, 16, 4)
    table = load_table(None, {})[0]
    again = soft_value_iteration(tensors[0]["exact"], table["transition"], 1.0, 10, table["ended"])[0]
    assert torch.equal(again, tensors[1]["exact"])
    other = load_table(None, {"slip": 0.2})[0]
    moved = causal_visits((other["arrival"] @ tensors[0]["exact_entries"]).view(16, 4), other, 1.0, 10)
    assert old < new == pytest.approx((moved * other["reward"]).sum().item())
    main(Args(output_dir=str(tmp_path / "slip"), env_kwargs='{"slip": 0.1}', max_steps=1, exact_steps=1))
    assert "note: moves or starts are random" in capsys.readouterr().out
    frozen = Args(output_dir=str(tmp_path / "frozen"), estimator="sampled", learning_rate=0.0, max_steps=9)
    assert main(frozen)["eval/normalized_score"] < 0.05


def test_a_reward_of_states_and_actions_on_frozen_lake(tiny):
    flags = {"env_kwargs": '{"is_slippery": false}', "reward_inputs": "state_action", "num_trajectories": 256}
    metrics = main(tiny(env_id="FrozenLake-v1", reward_scale=10.0, horizon=20, max_steps=100, save_steps=50, **flags))
    margin = metrics["eval/expert_return"] - metrics["eval/random_return"]
    assert margin > 0.9  # by --reward-scale
    for name, tolerance in {"exact": 0.01, "sampled": 0.05}.items():
        assert abs(metrics[f"eval/{name}/expected_value_difference"]) < tolerance * margin


def test_the_sampled_gradient_is_the_discounted_non_causal_models(tiny):
    """At gamma 0.5, of the second step: it follows from Adam's first moment after one step and after two."""
    flags = {"num_trajectories": 20_000, "estimator": "sampled", "reward_inputs": "state_action", "learning_rate": 0.2}
    states = []
    for steps in (1, 2):
        args = tiny(**flags, gamma=0.5, max_steps=steps, output_dir=tiny().output_dir + str(steps))
        main(args)
        states.append(torch.load(run_folder(args) / "checkpoint.pt", weights_only=True))
    one, two = (state["optimizer"]["state"][0]["exp_avg"] for state in states)
    gradient = (two - 0.9 * one) / 0.1 / states[0]["sampled"]["scale"]  # in the entries
    learned, table = states[0]["sampled"]["weight"] * states[0]["sampled"]["scale"], load_table(None, {})[0]
    difference = noncausal_visits(learned, table, 0.5, 10) - causal_visits(table["reward"], table, 0.5, 10)
    assert learned.abs().max() > 0.1 and torch.cosine_similarity(gradient.flatten(), difference.flatten(), 0) > 0.99
    assert (gradient - difference).abs().max() < 0.05


@pytest.mark.parametrize("env_id, length", [("CartPole-v1", 7), ("CartPole-v1", 60), ("Pendulum-v1", 7)])
def test_the_first_step_in_control_by_hand(env_id, length, tiny, tmp_path):
    """The weights of segments, the reward's loss per trajectory and its gradient, and the critic's error."""
    space, gamma, lam, l2, N = gymnasium.make(env_id).action_space, 0.8, 0.6, 0.03, 4
    act = (lambda rng: np.int64(0)) if space.shape == () else lambda rng: rng.uniform(-2, 2, 1)
    path = write_demos(tmp_path / "demos.npz", env_id, act)
    args = tiny(
        env_id=env_id, demos=path, num_demos=2, horizon=30, max_steps=1, num_trajectories=N, eval_episodes=2, seed=3,
        gamma=gamma, gae_lambda=lam, segment_length=length, reward_l2=l2, update_epochs=1, minibatch_size=10_000,
    )
    metrics, folder = main(args), run_folder(args)
    saved, logs = load_file(folder / "policy.safetensors"), {tag: x[0][1] for tag, x in scalars(folder).items()}
    mean_std = torch.stack([saved["observation_mean"], saved["observation_std"]])
    torch.manual_seed(args.seed)
    O, A = mean_std.shape[1], 2 if space.shape == () else 1
    policy, _, reward = ActorCritic(O, space, 64), ActorCritic(O, space, 64), mlp(O + A, 1, 64, 0.1)
    plain, seed = torch.stack([torch.zeros(O), torch.ones(O)]), 3 * 10**9
    uniform = rollout(make_envs(env_id, 2), policy, plain, 30, seed + UNIFORM_SEEDS, "uniform", one_episode=True)
    batch = rollout(make_envs(env_id, N), policy, mean_std, 30, seed, "sample", one_episode=True)
    obs = normalize(batch["obs"], mean_std)
    pairs, values = pair_features(obs[:-1], batch["actions"], space), policy.critic(obs)[..., 0].detach()
    after, r = gamma * values[1:] * ~batch["terminated"], reward(pairs)[..., 0]  # (T, N)
    scores, sums, squares, lengths = [], [], 0.0, batch["mask"].sum(0).tolist()
    for j in range(N):
        for start in range(0, lengths[j], length):
            part = slice(start, min(start + length, lengths[j])), j
            scores.append((r.detach() + after - values[:-1] - batch["logprobs"])[part].sum())
            sums.append(r[part].sum())
            squares = squares + r[part].square().sum()
    weights = torch.stack(scores).softmax(0)
    with np.load(path) as file:
        n = int(file["lengths"][:2].sum())
        assert metrics["eval/expert_return"] == pytest.approx(file["rew"].sum() / 5)  # of all episodes
        expert_obs, act = torch.from_numpy(file["obs"][:n]), torch.from_numpy(file["act"][:n])
    assert torch.equal(mean_std, observation_mean_std(expert_obs, uniform["obs"][:-1][uniform["mask"]]))
    act = act.long() if space.shape == () else (act / 2).float()
    expert = reward(pair_features(normalize(expert_obs, mean_std), act, space))
    loss = len(weights) / N * (weights * torch.stack(sums)).sum() - expert.sum() / 2
    loss = loss + l2 * (squares / N + expert.square().sum() / 2)
    assert logs["train/loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-4)
    assert logs["train/effective_sample_size"] == pytest.approx(1 / weights.square().sum().item(), rel=1e-3)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for i, g in enumerate(torch.autograd.grad(loss, list(reward.parameters()))):
        assert torch.allclose(state["optimizer"]["state"][i]["exp_avg"], 0.1 * g, rtol=1e-3, atol=1e-5)
    reward.load_state_dict(state["sampled"])  # the policy learns from the new reward
    deltas, errors = reward(pairs)[..., 0].detach() - batch["logprobs"] + after - values[:-1], []
    for j in range(N):
        error = 0.0
        for t in reversed(range(lengths[j])):
            error = deltas[t, j] + gamma * lam * error
            errors.append(error)
    assert logs["losses/value_loss"] == pytest.approx(0.5 * torch.stack(errors).square().mean().item(), rel=1e-3)


def test_a_demonstrator_who_fails_is_imitated_only_with_a_reward_that_learns(tiny, tmp_path):
    """It pushes left and falls after 9 steps. With a reward that is never updated, entropy pays for staying alive."""
    path = write_demos(tmp_path / "left.npz", "CartPole-v1", lambda rng: np.int64(0), episodes=10)
    flags = {"env_id": "CartPole-v1", "demos": path, "max_steps": 40, "eval_episodes": 20, "save_steps": 100}
    flags |= {"num_trajectories": 8, "horizon": 100, "policy_learning_rate": 3e-3}
    learned, frozen = (main(tiny(**flags, exp_name=f"at {rate}", learning_rate=rate)) for rate in (1e-2, 0.0))
    assert learned["eval/expert_return"] < 10 and learned["eval/return"] < 14 and frozen["eval/return"] > 30


def test_finite_demonstrations_and_files_of_them(tiny):
    flags = {"estimator": "exact", "num_demos": 40, "gamma": 0.5, "env_kwargs": '{"slip": 0.1}'}
    drawn, metrics = tiny(**flags), main(tiny(**flags))
    demos = str(run_folder(drawn) / "demos.npz")
    assert metrics["eval/normalized_score"] > 0.9 and metrics["eval/causal_gap"] > 0.01
    metrics = main(given := tiny(**flags, demos=demos, output_dir=drawn.output_dir + "2"))
    with np.load(demos) as file:
        lengths, steps = file["lengths"][:40], np.concatenate([np.arange(length) for length in file["lengths"][:40]])
        assert len(file["lengths"]) == 50 and file["obs"].max() < 16
        expected = (0.5**steps * file["rew"][: lengths.sum()]).sum() / 40  # visits are discounted as the model's are
    assert metrics["eval/expert_return"] == pytest.approx(expected) and metrics["eval/normalized_score"] > 0.9
    one, two = (load_file(run_folder(args) / "reward.safetensors")["exact"] for args in (drawn, given))
    assert torch.equal(one, two)


def test_control_runs_log_and_save_and_each_step_has_other_episodes(tiny):
    """With a policy that does not learn, trajectories of two steps differ by their start states and actions only."""
    flags = {"num_trajectories": 4, "eval_episodes": 4, "expert_steps": 2, "num_demos": 3, "horizon": 60}
    args = tiny(env_id="CartPole-v1", policy_learning_rate=0.0, **flags)
    metrics, folder = main(args), run_folder(args)
    expert, random, value = (metrics[f"eval/{name}_return".replace("/_", "/")] for name in ("expert", "random", ""))
    assert metrics["eval/normalized_score"] == pytest.approx((value - random) / (expert - random))
    logs = scalars(folder)
    lengths = [value for _, value in logs["charts/episodic_length"]]
    assert len(lengths) == 6 and len(set(lengths)) > 3
    assert [step for step, _ in logs["train/loss"]] == pytest.approx(np.cumsum([4 * x for x in lengths]))
    assert all(0 < value <= 1 + 1e-6 for _, value in logs["train/effective_sample_share"])
    assert [rate for _, rate in logs["charts/learning_rate"]] == pytest.approx([1e-3 * (1 - t / 6) for t in range(6)])
    reward, policy = (load_file(folder / f"{name}.safetensors") for name in ("reward", "policy"))
    assert reward["observation_std"].shape == (4,) and policy["actor.4.weight"].shape == (2, 64)
    with np.load(folder / "demos.npz") as demos:
        assert len(demos["lengths"]) == 4 and demos["obs"].shape == (demos["lengths"].sum(), 4)


@pytest.mark.parametrize("flags", [{"reward_model": "linear"}, {"reward_inputs": "state"}])
def test_smaller_rewards_and_equal_returns_have_no_score(flags, tiny):
    args = tiny(env_id="MountainCar-v0", num_trajectories=2, eval_episodes=2, expert_steps=1, horizon=20, **flags)
    metrics = main(args)
    assert metrics["eval/return"] == metrics["eval/expert_return"] == -20 and metrics["eval/normalized_score"] is None
    with pytest.raises(ValueError, match="an episode of 20 steps, more than --horizon 19"):
        main(tiny(env_id="MountainCar-v0", demos=str(run_folder(args) / "demos.npz"), horizon=19))
    assert scalars(run_folder(args))["policy/approxkl_avg"][0][1] > 0  # more than one pass
    name, shape = ("weight", (1, 5)) if "reward_model" in flags else ("0.weight", (64, 2))
    assert load_file(run_folder(args) / "reward.safetensors")[name].shape == shape
