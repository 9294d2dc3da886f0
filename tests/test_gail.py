"""gail.py: the mathematics against closed forms, TRPO's outcomes, rollouts of scripted environments, whole runs."""

import math
import subprocess
import sys
from collections import Counter
from glob import glob

import gail
import gymnasium
import numpy as np
import pytest
import torch
from conftest import ROOT, run_folder, scalars
from gail import Policy, discriminator_loss, load_demos, main, normalize, policy_kl, rollout, trpo_step
from gymnasium.spaces import Box, Discrete
from safetensors.torch import load_file
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

SPACES = [Discrete(3), Box(-2.0, 2.0, (2,))]
TRPO = {"max_kl": 0.01, "cg_iterations": 10, "cg_damping": 0.1, "fisher_states": 150, "line_search_steps": 10}


def test_the_discriminators_loss_and_reward_are_the_papers():
    policy, expert = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([-3.0, 0.3])
    d, e = policy.sigmoid(), expert.sigmoid()
    entropy = sum(-(x * x.log() + (1 - x) * (1 - x).log()).mean() for x in (d, e))
    plain = -d.log().mean() - (1 - e).log().mean()
    loss, stats = discriminator_loss(policy, expert, 0.1)
    assert torch.allclose(loss, plain - 0.1 * entropy)
    assert torch.allclose(torch.stack([*stats.values()]), torch.tensor([plain, entropy, 2 / 3, 1 / 2]))
    certain = torch.tensor([-500.0, 500.0])
    assert discriminator_loss(certain, certain, 0.1)[0].isfinite()
    for form, expected in {"positive": -d.log(), "negative": (1 - d).log(), "airl": ((1 - d) / d).log()}.items():
        assert torch.allclose(gail.imitation_reward(policy, form), expected, atol=1e-6)
        assert gail.imitation_reward(certain, form).isfinite().all()
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6])  # in tenths: rows of either kind
    rows = [torch.arange(3).repeat_interleave((10 * x).round().long()) for x in (p, q)]
    logits = (p / q).log().requires_grad_()  # the optimum, D = p / (p + q), whatever the numbers of rows are
    loss, _ = discriminator_loss(logits[rows[0].repeat(3)], logits[rows[1]])
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


def test_the_gradient_penalty_is_taken_between_pairs_and_zero_at_a_slope_of_one():
    net, inputs = torch.nn.Linear(3, 1), (torch.zeros(20, 3), torch.ones(4, 3))
    for scale, expected in ((1, 0), (3, 4)):
        net.weight.data = scale * torch.tensor([[0.6, 0.8, 0.0]])
        penalty = gail.logit_gradient_penalty(net, *inputs, torch.Generator().manual_seed(0))
        assert penalty.item() == pytest.approx(expected, abs=1e-5) and penalty.requires_grad
    seen = []
    gail.logit_gradient_penalty(lambda x: seen.append(x) or x.sum(1), *inputs, torch.Generator().manual_seed(0))
    assert (seen[0] == seen[0][:, :1]).all() and 0 <= seen[0].min() < 0.3 and 0.7 < seen[0].max() <= 1


def make_policy(space, seed=0):
    """A tiny policy in float64, far from uniform; obs, actions, logprobs and advantages of its own actions."""
    torch.manual_seed(seed)
    policy = Policy(2, space, 3).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        obs = torch.randn(200, 2, dtype=torch.float64)
        actions = policy.select(policy(obs), "sample", torch.Generator().manual_seed(0))
        return policy, (obs, actions, policy.logprobs(policy(obs), actions), torch.randn(200).double())


@pytest.mark.parametrize("space", SPACES)
def test_kl_logprobs_and_samples_are_torchs(space):
    discrete = isinstance(space, Discrete)
    old, new = torch.randn(2, 5, 3 if discrete else 4, generator=torch.Generator().manual_seed(0))

    def distribution(x):
        return Categorical(logits=x) if discrete else Independent(Normal(x[:, :2], x[:, 2:].exp()), 1)

    expected = kl_divergence(distribution(old), distribution(new))
    assert torch.allclose(policy_kl(old, new, discrete), expected, atol=1e-6)
    policy, many = Policy(2, space, 3), old[:1].expand(40_000, -1)
    actions = policy.select(many, "sample", torch.Generator().manual_seed(0))
    logprobs = policy.logprobs(many, actions)
    assert torch.allclose(logprobs, distribution(many).log_prob(actions), atol=1e-6)
    assert torch.allclose(-logprobs.mean(), distribution(old).entropy()[0], atol=0.02)
    x = policy.select(many, "uniform", torch.Generator().manual_seed(0)).float()
    assert (x.mean().item(), x.var().item()) == pytest.approx((1, 2 / 3) if discrete else (0, 1 / 3), abs=0.02)
    assert torch.equal(policy.select(old, "greedy", None), old.argmax(-1) if discrete else old[:, :2])


@pytest.mark.parametrize("space", SPACES)
def test_the_fisher_matrix_is_the_kls_curvature(space):
    policy, (obs, *_) = make_policy(space)
    old, flat = policy(obs).detach(), parameters_to_vector(policy.parameters()).detach()
    product = gail.fisher_vector_product(policy, obs, 0.3)
    v = torch.randn(len(flat), dtype=torch.float64)
    expected = v @ product(v)
    vector_to_parameters(flat + 1e-4 * v, policy.parameters())
    kl = policy_kl(old, policy(obs), policy.discrete).mean()
    assert (2 * kl / 1e-8 + 0.3 * v @ v).item() == pytest.approx(expected.item(), rel=1e-3)


def test_conjugate_gradient_is_the_direct_solve():
    torch.manual_seed(0)
    root, b = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    matrix = root @ root.t() + 0.1 * torch.eye(12)
    solved = gail.conjugate_gradient(lambda v: matrix @ v, b, 50, 1e-20)
    assert torch.allclose(solved, torch.linalg.solve(matrix, b), atol=1e-8)
    assert 0 < (gail.conjugate_gradient(lambda v: matrix @ v, b, 5) - solved).norm() < solved.norm()
    assert torch.equal(gail.conjugate_gradient(lambda v: matrix @ v, torch.zeros(12), 5), torch.zeros(12))


@pytest.mark.parametrize("space", SPACES)
def test_a_step_that_is_too_long_is_halved_until_it_is_within_the_kl_and_better(space, monkeypatch):
    policy, (obs, actions, logprobs, advantages) = make_policy(space)
    old, real = policy(obs).detach(), gail.fisher_vector_product
    too_small = lambda policy, obs, damping: lambda v: real(policy, obs, damping)(v) / (50 if len(obs) == 150 else 1)
    monkeypatch.setattr(gail, "fisher_vector_product", too_small)
    stats = trpo_step(policy, obs, actions, logprobs, advantages, **TRPO, generator=torch.Generator())
    kl = policy_kl(old, policy(obs), policy.discrete).mean().item()
    ratio = (policy.logprobs(policy(obs), actions) - logprobs).exp()
    surrogate = (ratio * (advantages - advantages.mean()) / advantages.std()).mean().item()
    assert 0 < kl <= 0.01 and surrogate > 0 and 0 < stats["train/step_share"] <= 0.25
    assert stats["losses/kl"] == pytest.approx(kl) and stats["losses/surrogate"] == pytest.approx(surrogate, rel=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_a_small_step_without_damping_uses_the_whole_kl(space):
    for seed in range(6):
        policy, batch = make_policy(space, seed)
        stats = trpo_step(policy, *batch, 1e-7, 10, 0.0, 1000, 10, torch.Generator())  # maybe just too long: halved
        assert stats["losses/kl"] == pytest.approx(1e-7 * stats["train/step_share"] ** 2, rel=0.1)


@pytest.mark.parametrize("reason", ["kl", "surrogate", "nan", "no advantage"])
def test_without_an_acceptable_step_the_parameters_are_bit_identical(reason, monkeypatch):
    policy, (*batch, advantages) = make_policy(Discrete(3))
    old, flags = parameters_to_vector(policy.parameters()).detach().clone(), TRPO | {"line_search_steps": 0}
    if reason == "kl":  # a step far too long
        monkeypatch.setattr(gail, "fisher_vector_product", lambda *_: lambda v: 1e-6 * v)
    if reason == "surrogate":  # downhill
        monkeypatch.setattr(gail, "conjugate_gradient", lambda matvec, b, *_: -b)
    advantages = {"nan": advantages * torch.nan, "no advantage": torch.ones(200)}.get(reason, advantages)
    stats = trpo_step(policy, *batch, advantages, **flags, generator=torch.Generator())
    assert torch.equal(parameters_to_vector(policy.parameters()), old)
    assert stats["train/step_share"] == stats["losses/kl"] == stats["losses/surrogate"] == 0


class Scripted(gymnasium.vector.VectorEnv):
    """Two environments that count an episode's steps. The first terminates after 3 steps, the second is truncated after
    5. The step after an end resets, as in Gymnasium's own vector environments."""

    num_envs, single_action_space = 2, Discrete(2)

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
        return self.count[:, None].astype(np.float32), np.where(resets, 100.0, self.count), terminated, truncated, {}


def test_the_reset_after_an_end_is_no_data_and_a_cut_episode_is_truncated(tmp_path, monkeypatch):
    policy, mean_std, path = Policy(1, Discrete(2), 4), torch.tensor([[0.0], [1.0]]), tmp_path / "demos.npz"
    batch = rollout(Scripted(), policy, mean_std, 8, 0, "sample")
    assert batch["mask"].int().t().tolist() == [[1, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 1, 1]]
    assert batch["obs"][:, 0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]  # the last observation before each reset
    assert batch["obs"][:, 1, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    ends = {name: batch[name].nonzero().tolist() for name in ("terminated", "truncated")}
    assert ends["terminated"] == [[2, 0], [6, 0]] and [4, 1] in ends["truncated"] and [7, 1] in ends["truncated"]
    assert gail.mean_return_and_length(batch) == (10.5, 4)  # of the first, whole ones: 1+2+3 and 1+2+3+4+5
    once = rollout(Scripted(), policy, mean_std, 8, 0, "sample", one_episode=True)
    assert once["mask"].sum(0).tolist() == [3, 5] and len(once["mask"]) == 5
    gail.write_demos(path, once, policy, Discrete(2))
    for count, steps in ((None, [0, 1, 2, 0, 1, 2, 3, 4]), (1, [0, 1, 2])):
        obs, actions, lengths, mean_return = load_demos(path, count, Box(-9, 9, (1,)), Discrete(2))
        assert obs[:, 0].tolist() == steps and lengths.tolist() == [3, 5][:count] and mean_return == 10.5
        assert torch.equal(actions, once["actions"].t()[once["mask"].t()][: len(steps)])
    with np.load(path) as file:
        assert file["rew"].tolist() == [1, 2, 3, 1, 2, 3, 4, 5] and file["terminal"].nonzero()[0].tolist() == [2]
    monkeypatch.setattr(Scripted, "step", lambda *_: (np.full((2, 1), np.nan), *np.zeros((3, 2), bool), {}))
    with pytest.raises(ValueError, match="is not finite in step 1"):
        rollout(Scripted(), policy, mean_std, 8, 0, "sample")


@pytest.mark.parametrize("space", [Discrete(2), Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64)])
def test_stored_logprobs_are_recomputed_and_of_actions_before_clipping(space, tmp_path):
    envs, policy, mean_std = Scripted(), Policy(1, space, 4), torch.tensor([[1.0], [2.0]])
    envs.single_action_space = space
    batch = rollout(envs, policy, mean_std, 50, 0, "sample", one_episode=True)
    again = policy.logprobs(policy((batch["obs"][:-1] - 1) / 2), batch["actions"])
    assert torch.allclose(again, batch["logprobs"], atol=1e-6)
    gail.write_demos(tmp_path / "demos.npz", batch, policy, space)
    _, actions, *_ = load_demos(tmp_path / "demos.npz", None, Box(-9, 9, (1,)), space)
    selected = batch["actions"].transpose(0, 1)[batch["mask"].t()]
    assert torch.allclose(actions.float(), selected.float() if policy.discrete else selected.clamp(-1, 1), atol=1e-6)
    if not policy.discrete:
        assert selected.abs().max() > 1.2  # outside of the unit box, and still the density is the Gaussian's
        taken = np.concatenate([*envs.actions, np.load(tmp_path / "demos.npz")["act"]]).astype(np.float64)
        assert all(map(space.contains, taken))


def test_actions_outside_of_the_box_are_clipped_and_said(tmp_path, capsys):
    np.savez(tmp_path / "demos.npz", obs=np.zeros((4, 1)), act=[[-4.0], [-2.0], [1.0], [2.0]], lengths=[1, 3])
    _, actions, _, mean_return = load_demos(tmp_path / "demos.npz", None, Box(-9, 9, (1,)), Box(-2.0, 2.0, (1,)))
    assert actions[:, 0].tolist() == [-1, -1, 0.5, 1] and math.isnan(mean_return) and "25%" in capsys.readouterr().out


def test_subsampling_keeps_every_20th_step_from_a_random_first_one():
    lengths, firsts = torch.tensor([500, 499, 9, 1]), set()
    for seed in range(20):
        kept = gail.subsample_demos(lengths, 20, torch.Generator().manual_seed(seed)).split(lengths.tolist())
        assert kept[0].sum() == 25 and kept[2].sum() == kept[3].sum() == 1
        assert all((x.nonzero()[:, 0].diff() == 20).all() for x in kept)
        firsts.add(int(kept[0].nonzero()[0]))
    assert len(firsts) > 5 and max(firsts) < 20 and gail.subsample_demos(lengths, 1, torch.Generator()).all()


def test_the_normalizer_weighs_both_kinds_of_observations_alike_and_clips():
    expert, uniform = torch.full((3, 1), 4.0), torch.tensor([0.0, 2.0]).repeat(500)[:, None]
    mean_std = gail.observation_mean_std(expert, uniform)
    assert mean_std[:, 0].tolist() == pytest.approx([2.5, math.sqrt((2 * 1.5**2 + 2.5**2 + 0.5**2) / 4)], rel=1e-4)
    assert normalize(torch.tensor([[2.5], [1e9]]), mean_std)[:, 0].tolist() == [0, 10]


def test_the_clone_is_the_best_pass_on_held_out_pairs():
    obs, noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    held_out = torch.randperm(40, generator=torch.Generator().manual_seed(0))[28:]
    for actions, least, most in (((obs[:, 0] > 0).long(), -0.3, 0), (noise, -0.75, -0.6)):  # learning noise does harm
        policy = Policy(2, Discrete(2), 8)
        gail.clone_behavior(policy, obs, actions, 60, 16, 3e-2, torch.Generator().manual_seed(0))
        assert least < policy.logprobs(policy(obs[held_out]), actions[held_out]).mean() < most


def second_half(args, policy, value, optimizer, batch, rewards, mean_std, generator) -> tuple[float, float]:
    """Advantages, TRPO and the value network by hand. Returns the explained variance and the value loss."""
    mask, obs, flags = batch["mask"], normalize(batch["obs"], mean_std), {name: getattr(args, name) for name in TRPO}
    values = value(obs)[..., 0].detach() / (1 - args.gamma)
    advantages, following, losses = torch.zeros_like(rewards), torch.zeros(rewards.shape[1]), []
    for t in reversed(range(len(rewards))):
        going_on = values[t + 1] * ~batch["terminated"][t]
        following = following * ~(batch["terminated"][t] | batch["truncated"][t])
        following = rewards[t] + args.gamma * going_on - values[t] + args.gamma * args.gae_lambda * following
        advantages[t] = following
    obs, old, targets, advantages = (x[mask] for x in (obs[:-1], values[:-1], advantages + values[:-1], advantages))
    trpo_step(policy, obs, batch["actions"][mask], batch["logprobs"][mask], advantages, **flags, generator=generator)
    for _ in range(args.value_epochs):
        for rows in torch.randperm(len(obs), generator=generator).split(args.value_batch_size):
            losses.append((value(obs[rows])[:, 0] - targets[rows] * (1 - args.gamma)).square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    return 1 - ((targets - old).var() / targets.var()).item(), float(sum(losses)) / len(losses)


def same(module, parameters) -> bool:
    return all(torch.allclose(x, parameters[name], atol=1e-5) for name, x in module.state_dict().items())


@pytest.mark.parametrize("env_id, T", [("CartPole-v1", 30), ("Pendulum-v1", 210)])  # terminated, truncated after 200
def test_an_iteration_is_algorithm_1s(env_id, T, tiny):
    flags = {"env_id": env_id, "ent_coef": 0.5, "discriminator_steps": 2, "gradient_penalty": 1.0, "seed": 3}
    flags |= {"expert_timesteps": 1, "num_demos": 3, "learning_rate": 0.03, "gamma": 0.9, "num_steps": T}
    runs = [tiny(**flags, total_timesteps=4 * T * k, output_dir=f"{tiny().output_dir}/{k}") for k in (1, 2)]
    _, metrics = map(main, runs)
    folders, args, envs, eval_envs = [run_folder(x) for x in runs], runs[1], *(gail.make_envs(env_id, 4) for _ in "12")
    start, end = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in folders)
    spaces, mean_std = (envs.single_observation_space, envs.single_action_space), end["mean_std"]
    (O,), A = spaces[0].shape, gymnasium.spaces.flatdim(spaces[1])
    policy, value, discriminator = Policy(O, spaces[1], 100), gail.mlp(O, 1, 100, 0.01), gail.mlp(O + A, 1, 100, 0.01)
    optimizer, value_optimizer = (torch.optim.Adam(net.parameters()) for net in (discriminator, value))
    parts = {"policy": policy, "value": value, "discriminator": discriminator}
    for name, part in {**parts, "optimizer": optimizer, "value_optimizer": value_optimizer}.items():
        part.load_state_dict(start[name])
    limit, first, identity = envs.spec.max_episode_steps, 3 * 10**9, torch.tensor([[0.0] * O, [1.0] * O])
    uniform = rollout(eval_envs, policy, identity, limit, first + gail.UNIFORM_SEEDS, "uniform", True)
    obs, actions, lengths, mean_return = load_demos(folders[1] / "demos.npz", 3, *spaces)
    kept = gail.subsample_demos(lengths, 5, torch.Generator().manual_seed(3))
    assert torch.allclose(mean_std, gail.observation_mean_std(obs[kept], uniform["obs"][:-1][uniform["mask"]]))

    def pairs(obs, actions):
        actions = torch.eye(A)[actions] if env_id == "CartPole-v1" else actions.clamp(-1, 1)
        return torch.cat([normalize(obs, mean_std), actions], 1)

    batch, generator = rollout(envs, policy, mean_std, T, first + 4, "sample"), torch.Generator()
    generator.manual_seed(first + 4 + gail.UPDATE_SEEDS)
    mask, logprobs, rewards, losses = batch["mask"], batch["logprobs"], torch.zeros(T, 4), []
    policy_pairs, expert_pairs = pairs(batch["obs"][:-1][mask], batch["actions"][mask]), pairs(obs[kept], actions[kept])
    for _ in range(2):
        penalty = gail.logit_gradient_penalty(discriminator, policy_pairs, expert_pairs, generator)
        loss, stats = discriminator_loss(discriminator(policy_pairs)[:, 0], discriminator(expert_pairs)[:, 0], 0.001)
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
        losses.append({**stats, "losses/gradient_penalty": penalty})
    learned = -discriminator(policy_pairs)[:, 0].detach().sigmoid().log()
    rewards[mask] = learned - 0.5 * logprobs[mask]
    explained, value_loss = second_half(args, policy, value, value_optimizer, batch, rewards, mean_std, generator)
    assert all(same(part, end[name]) and not same(part, start[name]) for name, part in parts.items())
    assert metrics["env_steps"] - start["metrics"]["env_steps"] == mask.sum()
    greedy = rollout(eval_envs, policy, mean_std, limit, first + gail.EVAL_SEEDS, "greedy", True)
    (random_return, _), (sampled, length), (final, _) = map(gail.mean_return_and_length, (uniform, batch, greedy))
    logs = {name: float(sum(x[name] for x in losses)) / 2 for name in losses[0]} | {
        "train/reward": learned.mean().item(), "train/entropy": -logprobs[mask].mean().item(),
        "losses/explained_variance": explained, "losses/value_loss": value_loss,
        "charts/episodic_return": sampled, "charts/episodic_length": length,
        "eval/return": final, "eval/expert_return": mean_return, "eval/random_return": random_return,
        "eval/normalized_score": (final - random_return) / (mean_return - random_return),
    }
    written = {name: values[-1][1] for name, values in scalars(folders[1]).items()}
    for found in (written, written | metrics):
        assert {name: found[name] for name in logs} == pytest.approx(logs, rel=1e-3, abs=1e-4)


def test_the_experts_trpo_is_on_the_true_reward(tiny):
    args, mean_std = tiny(gamma=0.6, expert_timesteps=120, seed=2), torch.tensor([[0.1] * 4, [0.5] * 4])
    envs, nets = gail.make_envs("CartPole-v1", 4), []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append((Policy(4, Discrete(2), 8), gail.mlp(4, 1, 8, 1.0)))
    gail.trpo_expert(envs, *nets[0], mean_std, 30, args)
    batch = rollout(envs, nets[1][0], mean_std, 30, 2 * 10**9 + gail.EXPERT_SEEDS, "sample")
    optimizer, generator = torch.optim.Adam(nets[1][1].parameters(), lr=1e-3), torch.Generator().manual_seed(2)
    second_half(args, *nets[1], optimizer, batch, batch["rewards"], mean_std, generator)
    assert all(same(one, two.state_dict()) for one, two in zip(*nets)) and not batch["mask"].all()


class Recorder(gymnasium.Env):  # writes down the seeds of its episodes
    observation_space, action_space, seeds = Box(-1, 1, (1,)), Discrete(2), []

    def reset(self, *, seed=None, options=None):
        self.seeds += [seed] * (seed is not None)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


def test_expert_demonstrations_training_and_evaluation_have_different_episodes(tiny):
    gymnasium.register("Recorder-v0", Recorder, max_episode_steps=3)
    flags = {"env_id": "Recorder-v0", "num_envs": 3, "num_steps": 3, "total_timesteps": 18, "expert_timesteps": 27}
    for seed in (1, 2):
        main(tiny(**flags, eval_episodes=4, eval_steps=1, num_demos=5, seed=seed))
    one, two = (load_file(file)["net.0.weight"] for file in glob(f"{tiny().output_dir}/*/policy.safetensors"))
    assert not torch.equal(one, two)
    once = 4 + 9 + 5 + 6  # of uniform actions, the expert, demonstrations, training
    assert Counter(Counter(Recorder.seeds).values()) == {1: 2 * once, 3: 2 * 4}  # the latter of three evaluations


def test_a_tiny_run_logs_saves_and_prints_its_table(tiny, capsys):
    metrics, folder = main(tiny()), run_folder(tiny())
    first, *_, policy, _, last = capsys.readouterr().out.splitlines()
    assert first == last == str(folder) and policy.split() == ["GAIL", f"{metrics['eval/return']:.1f}"]
    logs, state = scalars(folder), torch.load(folder / "checkpoint.pt", weights_only=True)
    steps = [step for step, _ in logs["losses/kl"]]  # environment steps
    assert len(steps) == 6 and steps[-1] == metrics["env_steps"] <= 720 and 100 < steps[0] <= 120
    for name in ("eval/return", "eval/expert_return", "eval/bc_return", "eval/random_return"):
        assert [step for step, _ in logs[name]] == steps[1::2] and logs[name][-1][1] == pytest.approx(metrics[name])
    for file, name in (("reward", "discriminator"), ("policy", "policy")):
        saved = load_file(folder / f"{file}.safetensors")
        mean_std = torch.stack([saved.pop("observation_mean"), saved.pop("observation_std")])
        assert torch.equal(mean_std, state["mean_std"]) and saved.keys() == state[name].keys()
        assert all(torch.equal(x, saved[key]) for key, x in state[name].items())
    with np.load(folder / "demos.npz") as demos:
        np.savez(folder / "unknown.npz", **{name: demos[name] for name in ("obs", "act", "lengths")})
    unknown = tiny(demos=str(folder / "unknown.npz"), output_dir=f"{folder}/unknown", num_demos=4)
    assert main(unknown)["eval/expert_return"] is None and "eval/expert_return" not in scalars(run_folder(unknown))
    assert "expert      unknown\n" in capsys.readouterr().out
    warm = main(tiny(bc_warm_start=True, bc_epochs=50, total_timesteps=1, max_kl=1e-12, output_dir=f"{folder}/warm"))
    assert warm["eval/return"] == warm["eval/bc_return"] != metrics["eval/return"]  # the policy is still the clone


def test_the_steps_to_a_score_are_those_to_its_last_unbroken_streak(tiny):
    args = tiny(seed=8, max_kl=1.0, eval_steps=1, gradient_penalty=1.0)  # the score passes 0.95 twice
    metrics, scores = main(args), [(0, 0.0), *scalars(run_folder(args))["eval/normalized_score"]]
    low = max(i for i, (_, score) in enumerate(scores) if score < 0.95)
    assert metrics["env_steps_to_0.95"] == (scores[low + 1][0] if low + 1 < len(scores) else None)


def test_cartpole_is_learned_from_25_pairs(shared, tiny):
    flags = {"demos": str(shared / "data/experts/CartPole-v1.npz"), "num_envs": 8, "num_steps": None, "subsample": 20}
    assert main(tiny(**flags, total_timesteps=60_000, eval_episodes=20, eval_steps=5))["eval/normalized_score"] > 0.8


@pytest.mark.parametrize("form, learning_rate", [("negative", 0.005), ("airl", 0.005), ("airl", 1e-9)])
def test_who_fails_is_imitated_unless_the_discriminator_is_frozen(form, learning_rate, tiny):
    flags = {"constant_action": 0, "num_steps": 200, "num_envs": 4, "total_timesteps": 16_000, "num_demos": 4}
    args = tiny(reward_form=form, learning_rate=learning_rate, **flags)
    expert_return, acts = main(args)["eval/expert_return"], np.load(run_folder(args) / "demos.npz")["act"]
    sampled = scalars(run_folder(args))["charts/episodic_return"][-1][1]  # an untrained mode may push left by chance
    assert expert_return < 11 and not acts.any() and (sampled <= 1.3 * expert_return) == (learning_rate > 1e-3)


def test_a_wrong_environment_is_one_sentence_and_code_2(tmp_path):
    command = [sys.executable, ROOT / "gail.py", "--env-id", "Nothing-v0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "`Nothing`" in done.stderr and "(gail.py, line " in done.stderr and not [*tmp_path.iterdir()]
