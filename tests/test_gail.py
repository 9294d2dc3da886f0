"""gail.py: the mathematics against closed forms, TRPO's outcomes, rollouts of a scripted environment, whole runs."""

import json
import math
import os
import signal
import sys

import gail
import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_folder, scalars
from gail import (
    Args,
    Policy,
    conjugate_gradient,
    discriminator_loss,
    fisher_vector_product,
    gae_episodic,
    imitation_reward,
    lasting,
    main,
    normalise,
    observation_statistics,
    pair_features,
    policy_kl,
    rollout,
    subsample_demos,
    trpo_step,
)
from gymnasium.spaces import Box, Discrete
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

SPACES = [Discrete(3), Box(-2.0, 2.0, (2,))]


def make_policy(space, seed=0, hidden_size=3) -> Policy:
    """A tiny policy in float64, far from uniform."""
    torch.manual_seed(seed)
    policy = Policy(2, space, hidden_size).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return policy


def make_batch(policy, count=200):
    """obs, actions, logprobs and advantages of a policy's own actions."""
    obs = torch.randn(count, 2, dtype=torch.float64)
    with torch.no_grad():
        outputs = policy(obs)
        actions = policy.select(outputs.float(), "sample", torch.Generator().manual_seed(0))
        actions = actions if policy.discrete else actions.double()
        return obs, actions, policy.logprobs(outputs, actions), torch.randn(count).double()


TRPO = {"max_kl": 0.01, "cg_iterations": 10, "cg_damping": 0.1, "fisher_states": 1000, "line_search_steps": 10}


# ---- the discriminator


def test_the_optimum_is_p_over_p_plus_q_and_equal_distributions_cost_2_log_2():
    policy, expert = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6])  # in tenths: rows of either kind
    rows = [torch.arange(3).repeat_interleave((10 * p).round().long()) for p in (policy, expert)]
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss, _ = discriminator_loss(logits[rows[0].repeat(3)], logits[rows[1]])  # the numbers of rows do not matter
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(logits.sigmoid(), policy / (policy + expert), atol=1e-4)
    loss, stats = discriminator_loss(torch.zeros(7), torch.zeros(4))
    assert loss.item() == pytest.approx(2 * math.log(2)) == pytest.approx(stats["losses/discriminator_loss"].item())
    entropic, _ = discriminator_loss(torch.zeros(7), torch.zeros(4), 0.1)
    assert entropic.item() == pytest.approx(1.8 * math.log(2))
    assert discriminator_loss(torch.full((2,), -500.0), torch.full((2,), 500.0), 0.1)[0].isfinite()


@pytest.mark.parametrize("form", ["positive", "negative", "airl"])
def test_after_steps_of_d_the_experts_pairs_have_the_larger_reward(form):
    torch.manual_seed(0)
    expert, policy = torch.randn(50, 3) + 2, torch.randn(50, 3) - 2
    net = gail.mlp(3, 1, 8, 0.01)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(2):  # the first step sets off from the same reward everywhere
        loss, _ = discriminator_loss(net(policy)[:, 0], net(expert)[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rewards = [imitation_reward(net(x)[:, 0], form) for x in (expert, policy)]
    assert rewards[0].mean() > rewards[1].mean()
    logits = torch.tensor([-200.0, -1.0, 0.0, 1.0, 200.0])
    rewards, d = imitation_reward(logits, form), logits[1:4].sigmoid()
    expected = {"positive": -d.log(), "negative": (1 - d).log(), "airl": (1 - d).log() - d.log()}[form]
    assert rewards.isfinite().all() and torch.allclose(rewards[1:4], expected, atol=1e-6)
    assert (rewards >= 0).all() if form == "positive" else (rewards <= 0).all() if form == "negative" else True


def test_the_gradient_penalty_is_zero_at_a_slope_of_one():
    net = torch.nn.Linear(3, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.6, 0.8, 0.0]]))
    inputs, generator = (torch.randn(20, 3), torch.randn(4, 3)), torch.Generator().manual_seed(0)
    assert gail.logit_gradient_penalty(net, *inputs, generator).item() == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        net.weight.mul_(3)
    penalty = gail.logit_gradient_penalty(net, *inputs, generator)
    assert penalty.item() == pytest.approx(4, rel=1e-5) and penalty.requires_grad


# ---- policy and TRPO


@pytest.mark.parametrize("space", SPACES)
def test_kl_and_logprobs_are_torchs(space):
    old, new = torch.randn(2, 5, 3 if isinstance(space, Discrete) else 4, dtype=torch.float64)
    discrete = isinstance(space, Discrete)

    def distribution(outputs):
        if discrete:
            return torch.distributions.Categorical(logits=outputs)
        mean, log_std = outputs.chunk(2, -1)
        return torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)

    expected = torch.distributions.kl_divergence(distribution(old), distribution(new))
    assert torch.allclose(policy_kl(old, new, discrete), expected)
    actions = distribution(old).sample()
    assert torch.allclose(Policy(2, space, 3).logprobs(new, actions), distribution(new).log_prob(actions))


@pytest.mark.parametrize("space", SPACES)
def test_fisher_vector_products_are_those_of_the_dense_hessian(space):
    policy, obs = make_policy(space), torch.randn(20, 2, dtype=torch.float64)
    names, shapes = zip(*((name, p.shape) for name, p in policy.named_parameters()))
    flat, old = parameters_to_vector(policy.parameters()).detach(), policy(obs).detach()

    def kl(vector):
        parts = [p.view(s) for p, s in zip(vector.split([s.numel() for s in shapes]), shapes)]
        outputs = torch.func.functional_call(policy, dict(zip(names, parts)), obs)
        return policy_kl(old, outputs, policy.discrete).mean()

    hessian = torch.autograd.functional.hessian(kl, flat)
    product = fisher_vector_product(policy, obs, 0.3)
    dense = torch.stack([product(v) for v in torch.eye(len(flat), dtype=torch.float64)])
    assert torch.allclose(dense, hessian + 0.3 * torch.eye(len(flat)), atol=1e-10)
    assert torch.allclose(dense, dense.t(), atol=1e-12) and torch.linalg.eigvalsh(hessian).min() > -1e-10


def test_conjugate_gradient_is_the_direct_solve():
    torch.manual_seed(0)
    root = torch.randn(12, 12, dtype=torch.float64)
    matrix, b = root @ root.t() + 0.1 * torch.eye(12), torch.randn(12, dtype=torch.float64)
    solved = torch.linalg.solve(matrix, b)
    assert torch.allclose(conjugate_gradient(lambda v: matrix @ v, b, 50, 1e-20), solved, atol=1e-8)
    near = conjugate_gradient(lambda v: matrix @ v, b, 5)
    assert 0 < (near - solved).norm() < solved.norm()
    assert torch.equal(conjugate_gradient(lambda v: matrix @ v, torch.zeros(12), 5), torch.zeros(12))


def kl_and_surrogate(policy, old_outputs, obs, actions, logprobs, advantages):
    advantages = (advantages - advantages.mean()) / advantages.std()
    with torch.no_grad():
        outputs = policy(obs)
        ratio = (policy.logprobs(outputs, actions) - logprobs).exp()
        return policy_kl(old_outputs, outputs, policy.discrete).mean().item(), (ratio * advantages).mean().item()


@pytest.mark.parametrize("space", SPACES)
def test_an_accepted_step_is_within_the_kl_and_better(space):
    policy = make_policy(space)
    batch = make_batch(policy)
    old = policy(batch[0]).detach()
    stats = trpo_step(policy, *batch, **TRPO, generator=torch.Generator())
    kl, surrogate = kl_and_surrogate(policy, old, *batch)
    assert 0 < kl <= 0.01 and surrogate > 1e-3 and stats["train/step_share"] > 0
    assert stats["losses/kl"] == pytest.approx(kl) and stats["losses/surrogate"] == pytest.approx(surrogate, rel=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_a_step_that_is_too_long_is_halved(space, monkeypatch):
    """Here because the Fisher matrix comes out 50 times too small, in a run because it is that of other states."""
    policy = make_policy(space)
    batch = make_batch(policy)
    old = policy(batch[0]).detach()
    real = gail.fisher_vector_product
    monkeypatch.setattr(gail, "fisher_vector_product", lambda *flags: lambda v: real(*flags)(v) / 50)
    stats = trpo_step(policy, *batch, **TRPO, generator=torch.Generator())
    kl, surrogate = kl_and_surrogate(policy, old, *batch)
    assert 0 < stats["train/step_share"] <= 0.25 and 0 < kl <= 0.01 and surrogate > 0


@pytest.mark.parametrize("reason", ["kl", "surrogate", "nan", "no advantage"])
def test_without_an_acceptable_step_the_parameters_are_bit_identical(reason, monkeypatch):
    policy = make_policy(Discrete(3))
    obs, actions, logprobs, advantages = make_batch(policy)
    old = parameters_to_vector(policy.parameters()).detach().clone()
    flags = dict(TRPO)
    if reason == "kl":  # no halving allowed, and a step far too long
        flags["line_search_steps"] = 0
        monkeypatch.setattr(gail, "conjugate_gradient", lambda matvec, b, *_: b)
        monkeypatch.setattr(gail, "fisher_vector_product", lambda *_: lambda v: 1e-6 * v)
    if reason == "surrogate":  # downhill
        monkeypatch.setattr(gail, "conjugate_gradient", lambda matvec, b, *_: -b)
    advantages = {"nan": advantages * torch.nan, "no advantage": torch.ones(200)}.get(reason, advantages)
    stats = trpo_step(policy, obs, actions, logprobs, advantages, **flags, generator=torch.Generator())
    assert torch.equal(parameters_to_vector(policy.parameters()), old)
    assert stats["train/step_share"] == stats["losses/kl"] == stats["losses/surrogate"] == 0


# ---- trajectories


class Scripted(gymnasium.vector.VectorEnv):
    """Two environments whose observation counts the steps of an episode: after 3 steps the first one terminates, after
    5 the second is truncated. The step after an end resets, as Gymnasium's own vector environments do."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, action_space=Discrete(2)) -> None:
        self.num_envs, self.single_action_space = 2, action_space
        self.single_observation_space = Box(-np.inf, np.inf, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.count, self.ended, self.actions = np.zeros(2), np.zeros(2, bool), []
        return self.count[:, None].astype(np.float32), {}

    def step(self, actions):
        self.actions.append(actions)
        resets = self.ended
        self.count = np.where(resets, 0, self.count + 1)
        terminated = ~resets & (self.count == 3) & [True, False]
        truncated = ~resets & (self.count == 5) & [False, True]
        self.ended = terminated | truncated
        obs = np.where(resets, 0.0, self.count)[:, None].astype(np.float32)
        return obs, np.where(resets, 100.0, 1.0), terminated, truncated, {}


STATISTICS = torch.tensor([[0.0], [1.0]])


def test_the_reset_after_an_end_is_no_data_and_a_cut_episode_is_truncated():
    policy = Policy(1, Discrete(2), 4)
    batch = rollout(Scripted(), policy, STATISTICS, 8, 0, "sample", torch.Generator().manual_seed(0))
    assert batch["mask"].int().t().tolist() == [[1, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 1, 1]]
    assert batch["obs"][:, 0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]  # the last observation before each reset
    assert batch["obs"][:, 1, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    ends = {name: batch[name].nonzero().tolist() for name in ("terminated", "truncated")}
    assert ends["terminated"] == [[2, 0], [6, 0]] and [4, 1] in ends["truncated"] and [7, 1] in ends["truncated"]
    assert gail.mean_return_and_length(batch) == (4, 4)  # of the first, whole ones: 3 and 5 steps
    once = rollout(Scripted(), policy, STATISTICS, 8, 0, "greedy", torch.Generator(), one_episode=True)
    assert once["mask"].sum(0).tolist() == [3, 5] and len(once["mask"]) == 5
    assert gail.mean_return_and_length(once) == (4, 4)


@pytest.mark.parametrize("space", [Discrete(2), Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64)])
def test_stored_logprobs_are_recomputed_and_of_actions_before_clipping(space):
    envs, policy = Scripted(space), Policy(1, space, 4)
    batch = rollout(envs, policy, STATISTICS, 50, 0, "sample", torch.Generator().manual_seed(0))
    again = policy.logprobs(policy(normalise(batch["obs"][:-1], STATISTICS)), batch["act"])
    assert torch.allclose(again, batch["logprobs"], atol=1e-6)
    if not policy.discrete:
        assert batch["act"].abs().max() > 1.5  # of the unit box, and still the density is the Gaussian's
        assert all(space.contains(row) for actions in envs.actions for row in actions.astype(np.float64))
        clipped = torch.from_numpy(np.stack(envs.actions))
        assert torch.allclose(gail.unit_actions(clipped, space), batch["act"].clamp(-1, 1), atol=1e-6)
        seen = pair_features(batch["obs"][:-1], policy.unit(batch["act"]), None)
        assert torch.equal(seen[..., 1:], batch["act"].clamp(-1, 1))


def test_gae_is_the_brute_force_sum_whatever_ends_an_episode():
    torch.manual_seed(0)
    S, N, gamma, lam = 12, 2, 0.9, 0.8
    rewards, values = torch.randn(S, N), torch.randn(S + 1, N)
    terminated, truncated = torch.zeros(2, S, N, dtype=torch.bool)
    terminated[4, 0] = truncated[6, 1] = True
    truncated[-1] = True
    advantages, returns = gae_episodic(rewards, values[:-1], values[1:], terminated, truncated, gamma, lam)
    for n in range(N):
        for t in range(S):
            expected = 0.0
            for k in range(t, S):
                following = 0.0 if terminated[k, n] else values[k + 1, n]
                expected += (gamma * lam) ** (k - t) * (rewards[k, n] + gamma * following - values[k, n])
                if terminated[k, n] or truncated[k, n]:
                    break
            assert advantages[t, n].item() == pytest.approx(float(expected), abs=1e-5)
    assert torch.equal(returns, advantages + values[:-1])


def test_subsampling_keeps_every_20th_step_from_a_random_first_one():
    mask = torch.arange(500) < torch.tensor([500, 499, 9, 1])[:, None]
    firsts = set()
    for seed in range(20):
        kept = subsample_demos(mask, 20, torch.Generator().manual_seed(seed))
        assert not (kept & ~mask).any() and kept[0].sum() == 25 and (kept[2:].sum(1) == 1).all()
        steps = kept[0].nonzero()[:, 0]
        assert (steps.diff() == 20).all()
        firsts.add(int(steps[0]))
    assert len(firsts) > 5 and max(firsts) < 20
    assert torch.equal(subsample_demos(mask, 1, torch.Generator()), mask)


def test_statistics_weigh_both_kinds_of_observations_alike():
    expert, uniform = torch.full((3, 1), 4.0), torch.tensor([0.0, 2.0]).repeat(500)[:, None]
    mean, std = observation_statistics(expert, uniform)
    assert mean.item() == pytest.approx(2.5)
    assert std.item() == pytest.approx(math.sqrt((2 * 1.5**2 + 2.5**2 + 0.5**2) / 4), rel=1e-4)


def test_a_score_counts_from_where_it_stays():
    history = [[i, i / 10, score, 0.0] for i, score in enumerate((0.1, 0.96, 0.94, 0.95, 1.0))]
    assert lasting(history, 0.95)[:2] == [3, 0.3]
    assert lasting(history[:3], 0.95) is None and lasting(history[1:2], 0.95)[0] == 1


# ---- the whole script


def test_an_iteration_is_algorithm_1s(tiny, monkeypatch):
    """Fresh trajectories; D's steps; the reward by the new D with -lambda log pi; advantages; TRPO; the value network.
    One normaliser for the expert's and the policy's observations."""
    calls = []

    def note(name):
        real = getattr(gail, name)

        def call(*arguments, **flags):
            said = arguments[0](arguments[2])[:, 0].detach() if name == "fit_value" else None
            result = real(*arguments, **flags)
            calls.append((name, arguments, result, said))
            return result

        monkeypatch.setattr(gail, name, call)

    steps = ["rollout", "discriminator_loss", "imitation_reward", "gae_episodic", "trpo_step", "fit_value"]
    for name in [*steps, "normalise"]:
        note(name)
    metrics = main(
        tiny(constant_action=0, num_demos=2, subsample=2, ent_coef=0.5, discriminator_steps=2, total_timesteps=240)
    )
    loop = [x for x in calls if x[0] in steps and not (x[0] == "rollout" and len(x[1]) == 8)]  # 8: one episode each
    assert [name for name, *_ in loop] == 2 * [steps[0], steps[1], *steps[1:]]
    assert len({arguments[4] for name, arguments, *_ in loop if name == "rollout"}) == 2  # seeds
    for first in (0, 7):
        (_, batch), (policy_logits, _), _, learned, (gae, targets), _, (fitted, said) = (
            {"rollout": (None, result), "discriminator_loss": (arguments, None), "imitation_reward": result,
             "gae_episodic": (arguments, result), "trpo_step": None, "fit_value": (arguments, said)}[name]
            for name, arguments, result, said in loop[first : first + 7]
        )  # fmt: skip
        mask, (rewards, values, next_values, terminated, truncated, gamma, _) = batch["mask"], gae
        new_logits = loop[first + 3][1][0]
        assert policy_logits[0].shape == new_logits.shape and not torch.allclose(
            policy_logits[0], new_logits, atol=1e-4
        )
        assert torch.equal(rewards[mask], learned - 0.5 * batch["logprobs"][mask]) and (rewards[~mask] == 0).all()
        assert torch.equal(values[1:], next_values[:-1])
        assert torch.equal(terminated, batch["terminated"]) and torch.equal(truncated, batch["truncated"])
        assert torch.allclose(values[mask] * (1 - gamma), said, atol=1e-5)
        assert torch.allclose(targets[1][mask] * (1 - gamma), fitted[3])
    used = {name: set() for name in ("expert", "policy")}
    for _, (obs, statistics), *_ in (x for x in calls if x[0] == "normalise"):
        kind = {metrics["demo_pairs"]: "expert", 31: "policy"}.get(len(obs))
        used.get(kind, set()).add(tuple(statistics.flatten().tolist()))
    assert 8 <= metrics["demo_pairs"] <= 10 and len(used["expert"]) == 1 and used["expert"] == used["policy"]


def test_a_warm_start_is_the_clone(tiny):
    metrics = main(tiny(bc_warm_start=True, bc_epochs=50, total_timesteps=1, max_kl=1e-12))
    assert metrics["eval/return"] == metrics["eval/bc_return"] != main(tiny(exp_name="cold"))["eval/return"]


def test_a_tiny_run_logs_saves_and_says_its_table(tiny, capsys):
    metrics = main(tiny())
    folder = run_folder(tiny())
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(folder) and [line.split()[0] for line in out[-5:-1]] == ["random", "BC", "GAIL", "expert"]
    assert json.loads((folder / "summary.json").read_text()) == metrics
    keys = {f"eval/{x}" for x in ("expert_return", "random_return", "bc_return", "return", "normalized_score")}
    assert keys | {"seed", "env_steps", "env_steps_to_0.95", "cpu_seconds_to_0.95", "wall_seconds"} <= set(metrics)
    margin = metrics["eval/expert_return"] - metrics["eval/random_return"]
    score = (metrics["eval/return"] - metrics["eval/random_return"]) / margin
    assert metrics["eval/normalized_score"] == pytest.approx(score)
    logs = scalars(folder)
    assert len(logs["losses/kl"]) == 6 and len(logs["eval/return"]) == 3
    assert all(0 <= kl <= 0.01 for _, kl in logs["losses/kl"])
    reward, policy = (load_file(folder / f"{name}.safetensors") for name in ("reward", "policy"))
    assert reward["observation_std"].shape == (4,) and reward["0.weight"].shape == (100, 6)
    assert policy["net.4.weight"].shape == (2, 100)
    with np.load(folder / "demos.npz") as demos:
        assert len(demos["lengths"]) == 4 and demos["obs"].shape == (demos["lengths"].sum(), 4)
    again = main(tiny(demos=str(folder / "demos.npz"), exp_name="again", num_demos=2))
    assert again["eval/expert_return"] == metrics["eval/expert_return"]


def test_the_discriminators_logs_are_means_over_its_steps(tiny, monkeypatch):
    losses, real = [], gail.discriminator_loss
    monkeypatch.setattr(gail, "discriminator_loss", lambda *x: losses.append(real(*x)) or losses[-1])
    args = tiny(constant_action=0, discriminator_steps=3, gradient_penalty=1.0, total_timesteps=1)
    main(args)
    logs = scalars(run_folder(args))
    for tag in ("losses/discriminator_loss", "losses/discriminator_entropy", "train/expert_accuracy"):
        values = [stats[tag].item() for _, stats in losses]
        assert len(set(values)) == 3 or tag == "train/expert_accuracy"
        assert logs[tag][0][1] == pytest.approx(sum(values) / 3, rel=1e-6)
    assert logs["losses/gradient_penalty"][0][1] > 0


def test_ctrl_c_saves_after_the_step_and_resume_goes_on(tiny, tmp_path, monkeypatch, capsys):
    expected = main(tiny(output_dir=str(tmp_path / "whole"), constant_action=0))
    broken = tiny(output_dir=str(tmp_path / "broken"), constant_action=0, save_steps=100)
    calls, real = [], gail.trpo_step

    def interrupted(*arguments, **flags):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **flags)

    monkeypatch.setattr(gail, "trpo_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(broken)
    assert stop.value.code == 130 and "stopped by Ctrl-C after step 3" in capsys.readouterr().out
    metrics = main(Args(resume=str(run_folder(broken))))
    assert metrics["eval/return"] == expected["eval/return"] and metrics["env_steps"] == expected["env_steps"]


def test_ctrl_c_between_two_steps_is_heard_after_the_next_one(tiny, monkeypatch, capsys):
    """The signal comes after step 2 has asked whether to save, before step 3 begins."""

    class Bar(tqdm):
        def __iter__(self):
            for step in super().__iter__():
                if step == 2 and self.desc != "expert":
                    os.kill(os.getpid(), signal.SIGINT)
                yield step

    def handler(*_):
        pass

    monkeypatch.setattr(gail, "trange", lambda *counts, **flags: Bar(range(*counts), **flags))
    args, old_handler = tiny(constant_action=0, save_steps=100), signal.signal(signal.SIGINT, handler)
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert signal.signal(signal.SIGINT, old_handler) is handler
    assert stop.value.code == 130 and "stopped by Ctrl-C after step 3" in capsys.readouterr().out
    assert torch.load(run_folder(args) / "checkpoint.pt", weights_only=True)["step"] == 3


def test_the_same_seed_gives_the_same_policy_and_another_seed_another(tiny):
    runs = [tiny(output_dir=f"{tiny().output_dir}/{i}", constant_action=0, seed=s) for i, s in enumerate((1, 1, 2))]
    for args in runs:
        main(args)
    one, two, three = (load_file(run_folder(args) / "policy.safetensors")["net.0.weight"] for args in runs)
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_cartpole_is_learned_from_25_pairs(shared, tiny):
    """From one episode of which every 20th step is kept."""
    args = tiny(
        demos=str(shared / "data/experts/CartPole-v1.npz"), num_envs=8, num_steps=None, total_timesteps=60_000,
        eval_episodes=20, eval_steps=5, subsample=20, save_steps=100,
    )  # fmt: skip
    assert main(args)["eval/normalized_score"] > 0.8


def test_only_a_reward_that_can_be_negative_imitates_who_fails(tiny):
    """The survival-bias control: a demonstrator that always pushes left and falls after 9 steps."""
    flags = {"constant_action": 0, "num_steps": 200, "num_envs": 4, "total_timesteps": 16_000, "num_demos": 4}
    for form in ("negative", "airl"):
        metrics = main(tiny(reward_form=form, exp_name=form, **flags))
        assert metrics["eval/expert_return"] < 11 and metrics["eval/return"] <= 2 * metrics["eval/expert_return"]


def test_real_mujoco_demonstrations(shared, tiny):
    pytest.importorskip("mujoco")
    path = str(shared / "data/experts/HalfCheetah-v4_expert.npz")
    metrics = main(tiny(env_id="HalfCheetah-v4", demos=path, num_demos=2, subsample=20, total_timesteps=240))
    assert metrics["eval/expert_return"] == pytest.approx(4034.8, abs=1) and metrics["demo_pairs"] == 100


def test_a_missing_extra_is_one_sentence_with_the_pip_command(tiny, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("mujoco", "gymnasium.envs.mujoco"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)  # as if it were not installed
    with pytest.raises(SystemExit) as stop:
        main(tiny(env_id="HalfCheetah-v5"))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "error: --env-id HalfCheetah-v5 cannot be made" in text
    assert 'pip install "gymnasium[mujoco]"' in text


def test_nan_observations_are_said(tiny, monkeypatch, capsys):
    real = gymnasium.envs.classic_control.cartpole.CartPoleVectorEnv.step

    def broken(*arguments):
        obs, *rest = real(*arguments)
        return obs * np.nan, *rest

    monkeypatch.setattr(gymnasium.envs.classic_control.cartpole.CartPoleVectorEnv, "step", broken)
    with pytest.raises(SystemExit) as stop:
        main(tiny())
    assert stop.value.code == 2 and "is not finite in step 1" in capsys.readouterr().err


def test_the_clone_is_the_best_pass_on_held_out_pairs():
    """The parameters that are kept are those of the pass with the best held-out likelihood."""
    torch.manual_seed(0)
    obs, policy = torch.randn(40, 2), Policy(2, Discrete(2), 8)
    actions = (obs[:, 0] > 0).long()
    best = gail.clone_behaviour(policy, obs, actions, 60, 16, 1e-2, torch.Generator().manual_seed(0))
    held_out = torch.randperm(40, generator=torch.Generator().manual_seed(0))[28:]
    assert -F.cross_entropy(policy(obs[held_out]), actions[held_out]).item() == pytest.approx(best, abs=1e-6)
    assert (policy(obs).argmax(-1) == actions).float().mean() > 0.8
