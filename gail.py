# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0", "safetensors==0.8.0",
#                 "tqdm==4.70.1"]
# ///
"""GAIL: generative adversarial imitation learning of a policy from demonstrations, without their reward.

A discriminator D learns to tell the policy's state-action pairs from the expert's. The policy takes TRPO steps on the
cost log D until D can no longer tell them apart. Behavior cloning sees only the expert's states, so its errors compound
once it leaves them. GAIL also trains on the states that the policy's own errors lead to.

    min_pi max_D  E_pi[log D(s,a)] + E_expert[log(1 - D(s,a))] - lambda H(pi)      D = probability of "policy"

GAIL: Ho and Ermon 2016, arXiv:1606.03476. main follows its Algorithm 1: sample trajectories from resets; take an Adam
step of D on the objective; take a TRPO step (arXiv:1502.05477) of the policy on the cost log D of the *new* D, minus
lambda times the entropy; fit the value network for GAE (arXiv:1506.02438). In the flags' help, "paper" is Ho and
Ermon's, and "code" is theirs (github.com/openai/imitation). The code differs from both the paper and this file: the
policy steps before D, the line search allows twice the KL, and a time limit counts as termination (V = 0).

    python gail.py                                              # laptop: CartPole, trains its own expert first
    python gail.py --demos CartPole-v1.npz --num-demos 10       # demonstrations from a file
    python gail.py --constant-action 0 --reward-form airl       # check: does it also imitate a failing expert?
    python gail.py --env-id Acrobot-v1 --reward-form negative --num-demos 4
    python gail.py --env-id HalfCheetah-v4 --demos HalfCheetah-v4_expert.npz --num-demos 2 --total-timesteps 3000000 \\
        --num-envs 5 --learning-rate 0.001 --gradient-penalty 1 --eval-steps 50     # pip install "gymnasium[mujoco]"
    python gail.py --resume runs/<run folder>                   # continue exactly from the last checkpoint

Shapes: T steps of N environments, B valid steps among them (`mask` (T, N); the others only reset), M demonstrated
episodes, n state-action pairs kept from them, O observation features, A actions (or Box dimensions).

Deliberately not here: images, recurrent policies, replay, AIRL's shaping. See the imitation library.
"""

import importlib
import json
import math
import os
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Literal

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Discrete, flatdim
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange


@dataclass
class Args:
    """GAIL: imitate demonstrations without their reward. "paper" is Ho and Ermon 2016, "code" openai/imitation."""

    # ---- common to all scripts
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # seeds initial weights, data order and sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if available
    output_dir: str = "runs"  # parent of the run folder {task}__{exp_name}__{seed}__{unix time}
    resume: str | None = None  # run folder to continue with its own flags; pass no others

    # ---- environment and demonstrations
    env_id: str = "CartPole-v1"  # [module:]name. Needs a time limit, 1-D Box obs, Discrete or bounded 1-D Box actions
    demos: str | None = None  # .npz with obs, act, lengths, optionally rew. None: train an expert here and record it
    num_demos: int = 1  # M: use the first M episodes (paper: 1 to 10; MuJoCo 4 to 25, Humanoid 80 to 240)
    subsample: int = 20  # keep one step in this many, per episode (paper: 20 in MuJoCo; code: 10 for CartPole)
    expert_timesteps: int = 100_000  # environment steps of the expert's TRPO on the true reward
    constant_action: int | None = None  # the expert always takes this action. 0 on CartPole: falls after 9 steps

    # ---- GAIL
    total_timesteps: int = 100_000  # environment steps, resets included, rounded up to whole iterations
    num_envs: int = 6  # N: parallel environments
    num_steps: int | None = None  # T: steps per environment and iteration, from a reset. None: the time limit
    eval_steps: int = 1  # iterations between evaluations
    eval_episodes: int = 50  # episodes per evaluation, with the most likely action (paper: 50)
    save_steps: int = 5  # iterations between checkpoints
    reward_form: Literal["positive", "negative", "airl"] = "positive"  # -log D (paper), log(1 - D), or their sum
    hidden_size: int = 100  # units in each of the two tanh layers of every network (paper)
    gamma: float = 0.995  # discount, below 1 (paper)
    gae_lambda: float = 0.97  # lambda of GAE (code)
    ent_coef: float = 0.0  # lambda of the causal entropy (paper: 0 but for Reacher). Too large: Gaussians keep widening
    learning_rate: float = 0.005  # learning rate of the discriminator's Adam (code: 0.01)
    discriminator_steps: int = 1  # discriminator steps per iteration, each on all pairs (paper)
    discriminator_entropy: float = 0.001  # entropy bonus that keeps D from becoming overconfident (code)
    gradient_penalty: float = 0.0  # coefficient, on D's logit (arXiv:1704.00028). Needed in MuJoCo, where D saturates

    # ---- TRPO, its value network, behavior cloning
    max_kl: float = 0.01  # delta: limit of the mean KL(old || new) of a policy step (code)
    cg_iterations: int = 10  # iterations of conjugate gradient for the natural gradient (code)
    cg_damping: float = 0.1  # multiple of the identity added to the Fisher matrix (code)
    fisher_states: int = 1000  # random states for the Fisher matrix (code: 10%). Too few: steps are halved more often
    line_search_steps: int = 10  # halvings to try before keeping the old policy (code: 10, then steps anyway)
    value_learning_rate: float = 1e-3  # learning rate of the value network's Adam
    value_epochs: int = 5  # passes of the value network over an iteration's steps
    value_batch_size: int = 256  # steps per gradient step of the value network
    bc_epochs: int = 1000  # passes over 70% of the pairs; keeps the one with the best loss on the other 30% (paper)
    bc_batch_size: int = 128  # pairs per gradient step (paper)
    bc_learning_rate: float = 1e-3  # learning rate of behavior cloning's Adam (code)
    bc_warm_start: bool = False  # start GAIL's policy from the clone


def discriminator_loss(policy_logits: Tensor, expert_logits: Tensor, entropy_coef: float = 0.0) -> tuple[Tensor, dict]:
    """-E_pi[log D] - E_expert[log(1 - D)] (Ho and Ermon, eq. 17, negated) minus entropy_coef times D's entropy, and
    statistics. Logits (B,) and (n,) of D, the probability of "policy". Each side is a mean of its own, so without the
    entropy the optimum is D = p_pi / (p_pi + p_expert) for any B and n: 2 log 2 if both distributions are equal."""
    policy_loss = F.softplus(-policy_logits).mean()  # -log D, finite for any logit
    expert_loss = F.softplus(expert_logits).mean()  # -log(1 - D)
    entropy = sum((F.softplus(logits) - logits * logits.sigmoid()).mean() for logits in (policy_logits, expert_logits))
    stats = {
        "losses/discriminator_loss": (policy_loss + expert_loss).detach(),
        "losses/discriminator_entropy": entropy.detach(),
        "train/policy_accuracy": (policy_logits > 0).float().mean(),
        "train/expert_accuracy": (expert_logits < 0).float().mean(),
    }
    return policy_loss + expert_loss - entropy_coef * entropy, stats


def logit_gradient_penalty(
    discriminator: nn.Module, policy_pairs: Tensor, expert_pairs: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean of (|d logit / d pair| - 1)^2 at random points between policy and expert pairs (Gulrajani et al. 2017)."""
    rows = torch.randint(len(expert_pairs), (len(policy_pairs),), generator=generator).to(policy_pairs.device)
    share = torch.rand(len(policy_pairs), 1, generator=generator).to(policy_pairs.device)  # (B, 1)
    between = (share * policy_pairs + (1 - share) * expert_pairs[rows]).requires_grad_()  # (B, O + A)
    (gradient,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    return (gradient.norm(dim=-1) - 1).square().mean()


def imitation_reward(logits: Tensor, reward_form: str) -> Tensor:
    """The policy's reward from D's logits, higher for pairs that look like the expert's. "positive" rewards survival
    whatever the expert does. "negative" rewards ending the episode, which suits tasks that end on success. "airl" can
    have either sign (Fu et al. 2018, arXiv:1710.11248)."""
    if reward_form == "positive":
        return F.softplus(-logits)  # -log D >= 0: minus the paper's cost
    return -F.softplus(logits) if reward_form == "negative" else -logits  # log(1 - D) <= 0; log(1 - D) - log D


def gae_episodic(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """GAE advantages and lambda-returns (Schulman et al. 2016, eq. 16), all (T, N). next_values belong to the
    observation before any reset: a truncated episode bootstraps from it, a terminated one does not."""
    advantages, advantage = torch.zeros_like(values), torch.zeros_like(values[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * torch.where(terminated[t], 0.0, next_values[t]) - values[t]  # (N,)
        advantage = delta + gamma * lam * torch.where(terminated[t] | truncated[t], 0.0, advantage)  # (N,)
        advantages[t] = advantage
    return advantages, advantages + values


def policy_kl(old: Tensor, new: Tensor, discrete: bool) -> Tensor:
    """KL(old || new) (...) of the action distributions given by policy outputs (..., A) or (..., 2A)."""
    if discrete:
        old, new = old.log_softmax(-1), new.log_softmax(-1)
        return (old.exp() * (old - new)).sum(-1)
    (old_mean, old_log_std), (mean, log_std) = old.chunk(2, -1), new.chunk(2, -1)
    square = (old_log_std.exp().square() + (old_mean - mean).square()) / (2 * log_std.exp().square())
    return (log_std - old_log_std + square - 0.5).sum(-1)


def fisher_vector_product(policy: nn.Module, obs: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """v -> (F + damping I) v for a flat parameter vector v. F is the Hessian of the mean KL(old || new) over
    observations (b, O) at new = old, by double backpropagation."""
    parameters = list(policy.parameters())
    outputs = policy(obs)
    kl = policy_kl(outputs.detach(), outputs, policy.discrete).mean()
    gradient = parameters_to_vector(torch.autograd.grad(kl, parameters, create_graph=True))

    def product(v: Tensor) -> Tensor:
        parts = torch.autograd.grad(gradient @ v, parameters, retain_graph=True)
        return parameters_to_vector([part.contiguous() for part in parts]) + damping * v

    return product


def conjugate_gradient(matvec: Callable, b: Tensor, iterations: int, tolerance: float = 1e-10) -> Tensor:
    """x with matvec(x) = b (Hestenes and Stiefel 1952). Stops when the squared residual is at most tolerance."""
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    squared = residual @ residual
    for _ in range(iterations):
        if squared <= tolerance:
            break
        product = matvec(direction)
        alpha = squared / (direction @ product)
        x, residual = x + alpha * direction, residual - alpha * product
        squared, old_squared = residual @ residual, squared
        direction = residual + squared / old_squared * direction
    return x


def trpo_step(
    policy: nn.Module, obs: Tensor, actions: Tensor, old_logprobs: Tensor, advantages: Tensor, max_kl: float,
    cg_iterations: int, cg_damping: float, fisher_states: int, line_search_steps: int, generator: torch.Generator,
) -> dict[str, float]:
    """One TRPO step (Schulman et al. 2015, appendix C) on B steps, in place. Returns statistics.
    The natural gradient of E[(pi / pi_old) A] is scaled so that its quadratic KL is max_kl, then halved until
    KL(old || new) <= max_kl and the surrogate improves. If no step qualifies, the old parameters are restored."""
    old_outputs = policy(obs).detach()  # (B, outputs)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)  # (B,)

    def surrogate_and_kl() -> tuple[Tensor, Tensor]:
        outputs = policy(obs)  # (B, outputs)
        ratio = (policy.logprobs(outputs, actions) - old_logprobs).exp()  # (B,)
        return (ratio * advantages).mean(), policy_kl(old_outputs, outputs, policy.discrete).mean()

    parameters = list(policy.parameters())
    old_parameters = parameters_to_vector(parameters).detach().clone()
    surrogate, _ = surrogate_and_kl()
    gradient = parameters_to_vector(torch.autograd.grad(surrogate, parameters)).detach()
    chosen = torch.randperm(len(obs), generator=generator)[:fisher_states].to(obs.device)
    fisher = fisher_vector_product(policy, obs[chosen], cg_damping)
    direction = conjugate_gradient(fisher, gradient, cg_iterations)
    full_step = direction * (2 * max_kl / (direction @ fisher(direction))).sqrt()  # KL ~ full_step F full_step / 2
    stats = {"losses/surrogate": 0.0, "losses/kl": 0.0, "train/step_share": 0.0}
    with torch.no_grad():
        for halvings in range(line_search_steps + 1):
            vector_to_parameters(old_parameters + full_step / 2**halvings, parameters)
            new_surrogate, kl = surrogate_and_kl()
            if kl <= max_kl and new_surrogate > surrogate:  # False if either is nan
                gain = (new_surrogate - surrogate).item()
                stats = {"losses/surrogate": gain, "losses/kl": kl.item(), "train/step_share": 0.5**halvings}
                break
        else:
            vector_to_parameters(old_parameters, parameters)
    return {**stats, "train/grad_norm": gradient.norm().item()}


def fit_value(
    value: nn.Module, optimizer: torch.optim.Optimizer, obs: Tensor, targets: Tensor, epochs: int, batch_size: int,
    generator: torch.Generator,
) -> float:
    """Fit the value network (B, O) -> (B, 1) to targets (B,) by least squares. Returns the mean minibatch loss."""
    losses = []
    for _ in range(epochs):
        for rows in torch.randperm(len(obs), generator=generator).to(obs.device).split(batch_size):
            loss = (value(obs[rows])[:, 0] - targets[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def clone_behavior(
    policy: nn.Module, obs: Tensor, actions: Tensor, epochs: int, batch_size: int, learning_rate: float,
    generator: torch.Generator,
) -> None:
    """Behavior cloning in place (Pomerleau 1989): maximize the likelihood of actions at 70% of obs (n, O), then keep
    the parameters of the pass with the best likelihood on the other 30% (paper, section 6)."""
    order = torch.randperm(len(obs), generator=generator).to(obs.device)
    count = max(1, int(0.7 * len(obs)))
    train, held_out = order[:count], order[count:]
    held_out = held_out if len(obs) > 1 else train  # a single pair validates itself
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    best, best_parameters = -math.inf, parameters_to_vector(policy.parameters()).detach().clone()
    for _ in range(epochs):
        for rows in train[torch.randperm(count, generator=generator).to(obs.device)].split(batch_size):
            loss = -policy.logprobs(policy(obs[rows]), actions[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            likelihood = policy.logprobs(policy(obs[held_out]), actions[held_out]).mean().item()
        if likelihood > best:
            best, best_parameters = likelihood, parameters_to_vector(policy.parameters()).detach().clone()
    vector_to_parameters(best_parameters, policy.parameters())


def make_envs(env_id: str, num_envs: int, /, **env_kwargs) -> gymnasium.vector.VectorEnv:
    """A vector environment: the environment's own vectorized version if it has one."""
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)  # registers the environment
    spec = replace(gymnasium.spec(name), disable_env_checker=True)  # the checker would test every step
    envs = gymnasium.make_vec(spec, num_envs, **env_kwargs)
    if envs.metadata.get("autoreset_mode") != gymnasium.vector.AutoresetMode.NEXT_STEP:
        raise ValueError(f"--env-id {env_id}: rollout requires a vector environment with autoreset_mode NEXT_STEP")
    return envs


def check_spaces(observation_space: gymnasium.Space, action_space: gymnasium.Space) -> None:
    """Raise ValueError unless the networks support these spaces."""
    usable = isinstance(action_space, Discrete) and action_space.start == 0
    if isinstance(action_space, Box) and len(action_space.shape) == 1 and action_space.dtype.kind == "f":
        usable = action_space.is_bounded() and (action_space.low < action_space.high).all()
    if not usable:
        raise ValueError(f"--env-id has actions {action_space}: only Discrete from 0 and bounded 1-D Box are supported")
    if not isinstance(observation_space, Box) or len(observation_space.shape) != 1:
        raise ValueError(f"--env-id has observations {observation_space}: only 1-D Box is supported")


def space_actions(actions: Tensor, action_space: gymnasium.Space) -> Tensor:
    """Map unit actions, indices (Discrete) or numbers in [-1, 1] (Box), to the environment's actions."""
    if isinstance(action_space, Discrete):
        return actions
    low, high = torch.from_numpy(action_space.low), torch.from_numpy(action_space.high)  # (A,)
    return low + (actions + 1) / 2 * (high - low)


def load_demos(
    path: str | Path, num_demos: int | None, observation_space: gymnasium.Space, action_space: gymnasium.Space
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The first num_demos episodes of an .npz file (None: all): obs (steps, O), unit actions (steps,) or (steps, A),
    lengths (M,). Last, the mean return of all episodes in the file (nan without `rew`)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = ("obs", "act", "lengths", "rew") if "rew" in file else ("obs", "act", "lengths")
            data = {name: file[name].astype(np.float64) for name in names}
    except Exception as error:  # a damaged file raises errors of many kinds
        raise ValueError(f"--demos {path} cannot be read as .npz of obs, act and lengths: {error}") from None
    lengths = torch.from_numpy(data["lengths"]).long()  # (M,)
    if lengths.ndim != 1 or len(lengths) == 0 or lengths.min() < 1:
        raise ValueError(f"--demos {path}: lengths must hold the number of steps of each episode")
    if num_demos is not None and not 1 <= num_demos <= len(lengths):
        raise ValueError(f"--num-demos {num_demos}: --demos {path} has {len(lengths)} episodes")
    for name, space in (("obs", observation_space), ("act", action_space), ("rew", Box(-np.inf, np.inf, ()))):
        wanted = (int(lengths.sum()), *space.shape)
        if name in data and (data[name].shape != wanted or not np.isfinite(data[name]).all()):
            raise ValueError(f"--demos {path}: {name} must be finite, of shape {wanted}; got shape {data[name].shape}")
        if isinstance(space, Discrete) and len(bad := data[name][~np.isin(data[name], range(space.n))]):
            raise ValueError(f"--demos {path}: {name} has {bad[0]:g}, which is not in {space}")
    mean_return = float(data["rew"].sum() / len(lengths)) if "rew" in data else math.nan
    lengths = lengths[:num_demos]
    obs, actions = (torch.from_numpy(data[name][: lengths.sum()]).float() for name in ("obs", "act"))
    if isinstance(action_space, Discrete):
        return obs, actions.long(), lengths, mean_return
    low, high = torch.from_numpy(action_space.low), torch.from_numpy(action_space.high)  # (A,)
    actions = ((actions - low) / (high - low) * 2 - 1).float()  # the inverse of space_actions
    if (share := (actions.abs() > 1 + 1e-4).float().mean()) > 0:  # drawn by a Gaussian policy
        print(f"--demos {path}: {share:.0%} of action values lie outside {action_space}; clipped")
    return obs, actions.clamp(-1, 1), lengths, mean_return


def subsample_demos(lengths: Tensor, every: int, generator: torch.Generator) -> Tensor:
    """One step in `every` of each episode, from a random offset: lengths (M,) -> mask (steps,)."""
    first = (torch.rand(len(lengths), generator=generator) * lengths.clamp(max=every)).long()  # (M,)
    t = torch.cat([torch.arange(-f, length - f) for f, length in zip(first.tolist(), lengths.tolist())])  # (steps,)
    return (t >= 0) & (t % every == 0)  # t counts from each episode's first kept step


def mlp(inputs: int, outputs: int, hidden_size: int, scale: float) -> nn.Sequential:
    """Two hidden tanh layers. The last layer's weights are scaled: with 0.01 a policy starts almost uniform."""
    layers = [nn.Linear(inputs, hidden_size), nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, outputs)]
    layers[-1].weight.data.mul_(scale)
    layers[-1].bias.data.zero_()
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Policy(nn.Module):
    """Observations (..., O) -> outputs. Discrete: logits (..., A). Box, scaled to [-1, 1]: means and log standard
    deviations of a Gaussian (..., 2A); the latter are one parameter for all states, as in TRPO."""

    def __init__(self, num_inputs: int, action_space: gymnasium.Space, hidden_size: int) -> None:
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        self.net = mlp(num_inputs, flatdim(action_space), hidden_size, 0.01)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(flatdim(action_space)))

    def forward(self, obs: Tensor) -> Tensor:
        outputs = self.net(obs)  # (..., A)
        return outputs if self.discrete else torch.cat([outputs, self.log_std.expand_as(outputs)], -1)  # (..., 2A)

    def select(self, outputs: Tensor, mode: str, generator: torch.Generator | None) -> Tensor:
        """Actions by mode: "sample", "greedy" (most likely) or "uniform". Indices (N,) or unclipped numbers (N, A)."""
        if self.discrete:
            if mode == "greedy":
                return outputs.argmax(-1)
            weights = outputs.softmax(-1) if mode == "sample" else torch.ones_like(outputs)
            return torch.multinomial(weights, 1, generator=generator)[:, 0]
        mean, log_std = outputs.chunk(2, -1)
        if mode == "uniform":
            return 2 * torch.rand(mean.shape, generator=generator) - 1
        return mean + log_std.exp() * torch.randn(mean.shape, generator=generator) if mode == "sample" else mean

    def unit(self, actions: Tensor) -> Tensor:
        """Unit actions: selected Box actions are clipped to [-1, 1]; indices stay."""
        return actions if self.discrete else actions.clamp(-1, 1)

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """log pi(a|s) (...) of indices (...) or Box actions (..., A)."""
        if self.discrete:
            return outputs.log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        mean, log_std = outputs.chunk(2, -1)
        return (-0.5 * ((actions - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def normalize(obs: Tensor, mean_std: Tensor) -> Tensor:
    """Normalize observations (..., O) by the mean and standard deviation (2, O) that all networks share."""
    return ((obs - mean_std[0]) / mean_std[1]).clamp(-10, 10).float()  # the clip range of OpenAI Baselines


def observation_mean_std(expert_obs: Tensor, uniform_obs: Tensor) -> Tensor:
    """Mean and standard deviation (2, O) of observations (n, O) and (m, O), with half the weight on each set. A good
    expert's observations barely vary (a pole's angle), so a uniform policy's count equally."""
    moments = [torch.stack([x.mean(0), x.square().mean(0)]) for x in (expert_obs.double(), uniform_obs.double())]
    mean, square = (moments[0] + moments[1]) / 2  # (O,), (O,)
    return torch.stack([mean, (square - mean.square()).clamp(min=0).sqrt() + 1e-6]).float()


def pair_features(obs: Tensor, actions: Tensor, action_space: gymnasium.Space) -> Tensor:
    """State-action pairs (..., O + A) from normalized observations and unit actions. Indices become one-hot vectors.
    Callers clip Box actions, as environments do: values out of range would reveal which pairs are the policy's."""
    actions = F.one_hot(actions, int(action_space.n)) if isinstance(action_space, Discrete) else actions  # (..., A)
    return torch.cat([obs, actions.float()], -1)


@torch.no_grad()
def rollout(
    envs: gymnasium.vector.VectorEnv, policy: nn.Module, mean_std: Tensor, steps: int, seed: int, mode: str,
    one_episode: bool = False,
) -> dict[str, Tensor]:
    """T steps of N environments, reproducible from the seed alone. Raw obs (T+1, N, O); actions (T, N) or (T, N, A) as
    selected; their logprobs, true rewards, mask, terminated and truncated (T, N).
    obs[t+1] is what step t led to; at the end of an episode, its final observation, before the reset.
    The step after an end only resets and ignores the action, so its mask is False. Episodes still running after T
    steps are truncated. one_episode: only each environment's first episode is data; stops when all have ended."""
    generator, is_data = torch.Generator().manual_seed(seed), np.ones(envs.num_envs, dtype=bool)
    all_obs, columns = [torch.tensor(envs.reset(seed=seed)[0], dtype=torch.float32)], []
    for t in range(steps):
        outputs = policy(normalize(all_obs[-1].to(mean_std.device), mean_std)).cpu()  # (N, outputs)
        actions = policy.select(outputs, mode, generator)  # (N,) or (N, A)
        taken = space_actions(policy.unit(actions), envs.single_action_space)
        obs, rewards, terminated, truncated, _ = envs.step(taken.numpy())
        if not np.isfinite(obs).all():
            raise ValueError(f"--env-id: an observation is not finite in step {t + 1} of a rollout")
        all_obs.append(torch.tensor(obs, dtype=torch.float32))
        others = (torch.from_numpy(x.copy()) for x in (rewards, is_data, terminated, truncated))  # (N,) each
        columns.append((outputs, actions, *others))
        is_data = ~(terminated | truncated) & (is_data | (not one_episode))  # the step after an end only resets
        if one_episode and not is_data.any():
            break
    outputs, actions, rewards, mask, terminated, truncated = (torch.stack(x) for x in zip(*columns))  # (T, N, ...)
    truncated[-1] |= ~terminated[-1]  # still running after T steps
    batch = {
        "obs": torch.stack(all_obs), "actions": actions, "logprobs": policy.logprobs(outputs, actions),
        "rewards": rewards.float(), "mask": mask, "terminated": terminated, "truncated": truncated,
    }
    return {name: x.to(mean_std.device) for name, x in batch.items()}


def mean_return_and_length(batch: dict[str, Tensor]) -> tuple[float, float]:
    """Mean true return and length of each environment's first episode, or of its part within the rollout."""
    first = batch["mask"] & (~batch["mask"]).cumsum(0).eq(0)  # (T, N)
    return (batch["rewards"] * first).sum().item() / first.shape[1], first.sum().item() / first.shape[1]


def write_demos(path: Path, batch: dict[str, Tensor], policy: nn.Module, action_space: gymnasium.Space) -> None:
    """Write a rollout of one episode per environment in the format of --demos."""
    batch = {name: x.cpu() for name, x in batch.items()}
    taken = space_actions(policy.unit(batch["actions"]), action_space)  # (T, N) or (T, N, A)
    columns = {"obs": batch["obs"][:-1], "act": taken, "rew": batch["rewards"], "terminal": batch["terminated"]}
    mask = batch["mask"].t()  # (N, T)
    columns = {name: x.transpose(0, 1)[mask].numpy() for name, x in columns.items()}  # (steps, ...), by episode
    np.savez(path, lengths=mask.sum(1).numpy(), **columns)


# Seed offsets; training rollouts start at 0. Each --seed owns a block of 10**9 seeds.
EXPERT_SEEDS, DEMO_SEEDS, UNIFORM_SEEDS, EVAL_SEEDS, UPDATE_SEEDS = (k * 10**8 for k in range(1, 6))


def trpo_expert(
    envs: gymnasium.vector.VectorEnv, policy: Policy, value: nn.Module, mean_std: Tensor, num_steps: int, args: Args
) -> None:
    """Train the policy and its value network by TRPO on the true reward: main's loop without a discriminator."""
    optimizer = torch.optim.Adam(value.parameters(), lr=args.value_learning_rate)
    generator = torch.Generator().manual_seed(args.seed)
    bar = trange(math.ceil(args.expert_timesteps / (args.num_envs * num_steps)), desc="expert")
    for step in bar:
        seed = args.seed * 10**9 + EXPERT_SEEDS + step * args.num_envs
        batch = rollout(envs, policy, mean_std, num_steps, seed, "sample")
        mask, ends = batch["mask"], (batch["terminated"], batch["truncated"])  # (T, N)
        obs = normalize(batch["obs"], mean_std)  # (T+1, N, O)
        with torch.no_grad():
            values = value(obs)[..., 0] / (1 - args.gamma)  # (T+1, N): the network learns (1 - gamma) V, a mean reward
        rewards, obs = batch["rewards"], obs[:-1][mask]  # (T, N), (B, O)
        advantages, returns = gae_episodic(rewards, values[:-1], values[1:], *ends, args.gamma, args.gae_lambda)
        trpo_step(
            policy, obs, batch["actions"][mask], batch["logprobs"][mask], advantages[mask], args.max_kl,
            args.cg_iterations, args.cg_damping, args.fisher_states, args.line_search_steps, generator,
        )
        targets = returns[mask] * (1 - args.gamma)  # (B,)
        fit_value(value, optimizer, obs, targets, args.value_epochs, args.value_batch_size, generator)
        bar.set_postfix_str(f"return {mean_return_and_length(batch)[0]:.1f}")


def main(args: Args) -> dict[str, float]:
    """Train. Returns the final metrics, also saved as <run folder>/summary.json."""
    # ---- set-up
    start_time, checkpoint = time.time(), None
    if args.resume:
        run_dir = Path(args.resume)
        if not (run_dir / "checkpoint.pt").is_file():
            raise ValueError(f"--resume {run_dir} has no checkpoint.pt: misspelt, or stopped before its first one")
        saved = json.loads((run_dir / "args.json").read_text())
        changed = " ".join(f"--{k}" for k, v in vars(args).items() if k != "resume" and v != getattr(Args(), k))
        if changed or saved["script"] != Path(__file__).name:
            raise ValueError(f"--resume {run_dir}: use {saved['script']} and no other flags (got: {changed or 'none'})")
        args = Args(**saved["args"] | {"resume": args.resume})
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    for name, value in vars(args).items():
        may_be_0 = name in ("seed", "constant_action", "bc_epochs", "gamma", "gae_lambda", "cg_damping")
        may_be_0 |= name in ("ent_coef", "discriminator_entropy", "gradient_penalty")
        if type(value) in (int, float) and not (value > 0 or value == 0 and may_be_0):
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.gamma >= 1 or args.gae_lambda > 1:
        raise ValueError("--gamma must be below 1, as the value network learns (1 - gamma) V; --gae-lambda at most 1")
    envs, eval_envs = make_envs(args.env_id, args.num_envs), make_envs(args.env_id, args.eval_episodes)
    observation_space, action_space = envs.single_observation_space, envs.single_action_space
    check_spaces(observation_space, action_space)
    O, A = flatdim(observation_space), flatdim(action_space)
    episode_steps = envs.spec.max_episode_steps
    if episode_steps is None:
        raise ValueError(f"--env-id {args.env_id} has no time limit, so an episode may never end")
    if args.constant_action is not None and (args.demos or not action_space.contains(args.constant_action)):
        raise ValueError(f"--constant-action {args.constant_action} needs no --demos and must be in {action_space}")
    if args.demos is not None:
        demos = load_demos(args.demos, args.num_demos, observation_space, action_space)
    num_steps, first_seed = args.num_steps or episode_steps, args.seed * 10**9
    iterations = max(1, math.ceil(args.total_timesteps / (args.num_envs * num_steps)))
    task = args.env_id.replace(":", "-").replace("/", "-")
    run_dir = Path(args.resume or f"{args.output_dir}/{task}__{args.exp_name}__{args.seed}__{int(start_time)}")
    print(run_dir)
    torch.manual_seed(args.seed)  # for the initial weights only; all other randomness has generators of its own
    policy, clone = (Policy(O, action_space, args.hidden_size).to(device) for _ in range(2))
    value = mlp(O, 1, args.hidden_size, 0.01).to(device)
    discriminator = mlp(O + A, 1, args.hidden_size, 0.01).to(device)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=args.learning_rate)
    value_optimizer = torch.optim.Adam(value.parameters(), lr=args.value_learning_rate)
    state = {"policy": policy, "value": value, "discriminator": discriminator}
    state |= {"optimizer": optimizer, "value_optimizer": value_optimizer}
    metrics = {"env_steps": 0, "cpu_seconds": 0.0, "env_steps_to_0.95": None, "cpu_seconds_to_0.95": None}
    progress = {"step": 0, "metrics": metrics, "mean_std": torch.tensor([[0.0] * O, [1.0] * O])}
    if checkpoint:
        progress = {name: checkpoint[name] for name in progress}
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    mean_std, metrics = progress["mean_std"].to(device), progress["metrics"]  # (2, O)
    writer = SummaryWriter(run_dir, purge_step=metrics["env_steps"] + 1)
    if not args.resume:
        (run_dir / "args.json").open("x").write(json.dumps({"script": Path(__file__).name, "args": vars(args)}))

    def play(envs: gymnasium.vector.VectorEnv, policy: Policy, mode: str, seed_offset: int) -> dict[str, Tensor]:
        """Each environment's first episode, with observations normalized by main's mean_std at the time of the call."""
        return rollout(envs, policy, mean_std, episode_steps, first_seed + seed_offset, mode, one_episode=True)

    # ---- demonstrations
    if checkpoint is None:
        uniform = play(eval_envs, policy, "uniform", UNIFORM_SEEDS)
        metrics["eval/random_return"], _ = mean_return_and_length(uniform)
        uniform_obs = uniform["obs"][:-1][uniform["mask"]]  # (m, O)
    if checkpoint is None and args.demos is None:
        mean_std = observation_mean_std(uniform_obs, uniform_obs)
        expert = Policy(O, action_space, args.hidden_size).to(device)
        if args.constant_action is None:
            trpo_expert(envs, expert, mlp(O, 1, args.hidden_size, 0.01).to(device), mean_std, num_steps, args)
        else:
            expert.net[-1].weight.data.zero_()
            expert.net[-1].bias.data = 100 * F.one_hot(torch.tensor(args.constant_action), A).float().to(device)
        demo_envs = make_envs(args.env_id, max(args.num_demos, args.eval_episodes))
        write_demos(run_dir / "demos.npz", play(demo_envs, expert, "sample", DEMO_SEEDS), expert, action_space)
        demo_envs.close()
    if args.demos is None:
        demos = load_demos(run_dir / "demos.npz", args.num_demos, observation_space, action_space)
    expert_obs, expert_actions, lengths, metrics["eval/expert_return"] = demos
    kept = subsample_demos(lengths, args.subsample, torch.Generator().manual_seed(args.seed))  # (steps,)
    expert_obs, expert_actions = expert_obs[kept].to(device), expert_actions[kept].to(device)  # (n, O), (n, ...)

    # ---- normalizer, behavior cloning
    if checkpoint is None:
        mean_std = progress["mean_std"] = observation_mean_std(expert_obs, uniform_obs)  # fixed: changes would move pi
        clone_behavior(
            clone, normalize(expert_obs, mean_std), expert_actions, args.bc_epochs, args.bc_batch_size,
            args.bc_learning_rate, torch.Generator().manual_seed(args.seed),
        )
        metrics["eval/bc_return"], _ = mean_return_and_length(play(eval_envs, clone, "greedy", EVAL_SEEDS))
        if args.bc_warm_start:
            policy.load_state_dict(clone.state_dict())
    expert_pairs = pair_features(normalize(expert_obs, mean_std), expert_actions, action_space)  # (n, O + A)
    baselines = {f"eval/{name}_return": metrics[f"eval/{name}_return"] for name in ("random", "bc", "expert")}
    random_return, bc_return, expert_return = baselines.values()
    writer.add_custom_scalars({"eval": {"return": ["Multiline", ["eval/return", *baselines]]}})  # in one chart

    bar = trange(progress["step"], iterations, initial=progress["step"], total=iterations, desc="gail")
    for step in bar:
        # ---- rollout: trajectories of pi_i
        step_start, cpu_start, seed = time.time(), time.process_time(), first_seed + step * args.num_envs
        batch = rollout(envs, policy, mean_std, num_steps, seed, "sample")
        mask, ends = batch["mask"], (batch["terminated"], batch["truncated"])  # (T, N)
        all_obs = normalize(batch["obs"], mean_std)  # (T+1, N, O)
        obs, actions, logprobs = all_obs[:-1][mask], batch["actions"][mask], batch["logprobs"][mask]  # (B, ...)

        # ---- discriminator: D_i to D_i+1, gradient ascent on E_pi[log D] + E_expert[log(1 - D)]
        policy_pairs = pair_features(obs, policy.unit(actions), action_space)  # (B, O + A)
        stats, generator = defaultdict(float), torch.Generator().manual_seed(seed + UPDATE_SEEDS)
        for _ in range(args.discriminator_steps):
            logits = discriminator(torch.cat([policy_pairs, expert_pairs]))[:, 0]  # (B + n,)
            loss, d_stats = discriminator_loss(logits[: len(obs)], logits[len(obs) :], args.discriminator_entropy)
            penalty = torch.zeros(())
            if args.gradient_penalty:
                penalty = logit_gradient_penalty(discriminator, policy_pairs, expert_pairs, generator)
            loss = loss + args.gradient_penalty * penalty
            if not loss.isfinite():
                raise ValueError(f"the discriminator's loss is {loss}: is --learning-rate too large?")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, x in {**d_stats, "losses/gradient_penalty": penalty.detach()}.items():
                stats[name] += x.item() / args.discriminator_steps

        # ---- reward: from the new D, with lambda times the causal entropy as a bonus on every step
        rewards = torch.zeros_like(batch["rewards"])  # (T, N)
        with torch.no_grad():
            learned = imitation_reward(discriminator(policy_pairs)[:, 0], args.reward_form)  # (B,)
            rewards[mask] = learned - args.ent_coef * logprobs
            values = value(all_obs)[..., 0] / (1 - args.gamma)  # (T+1, N): the network says (1 - gamma) V

        # ---- advantage
        advantages, returns = gae_episodic(rewards, values[:-1], values[1:], *ends, args.gamma, args.gae_lambda)
        advantages, returns = advantages[mask], returns[mask]  # (B,)
        explained = 1 - (returns - values[:-1][mask]).var() / returns.var().clamp(min=1e-8)

        # ---- update the policy: one TRPO step, pi_i to pi_i+1
        stats |= trpo_step(
            policy, obs, actions, logprobs, advantages, args.max_kl, args.cg_iterations, args.cg_damping,
            args.fisher_states, args.line_search_steps, generator,
        )

        # ---- update the value network: after the advantages, or it would have been fitted to their returns
        passes = args.value_epochs, args.value_batch_size, generator
        value_loss = fit_value(value, value_optimizer, obs, returns * (1 - args.gamma), *passes)
        if not math.isfinite(value_loss):
            raise ValueError(f"the value loss is {value_loss}: is --value-learning-rate too large?")

        # ---- log
        progress["step"] = step + 1
        metrics["env_steps"] += len(obs)  # without resets
        metrics["cpu_seconds"] += time.process_time() - cpu_start
        episodic_return, episodic_length = mean_return_and_length(batch)
        logs = stats | {
            "losses/value_loss": value_loss, "losses/explained_variance": explained, "train/reward": learned.mean(),
            "train/entropy": -logprobs.mean(), "charts/learning_rate": args.learning_rate,
            "charts/episodic_return": episodic_return, "charts/episodic_length": episodic_length,
            "charts/cpu_seconds": metrics["cpu_seconds"], "charts/SPS": len(obs) / (time.time() - step_start),
        }

        # ---- evaluate
        if (step + 1) % args.eval_steps == 0 or step + 1 == iterations:
            eval_return, _ = mean_return_and_length(play(eval_envs, policy, "greedy", EVAL_SEEDS))
            score = (eval_return - random_return) / ((expert_return - random_return) or math.nan)
            metrics |= {"eval/return": eval_return, "eval/normalized_score": score}
            if not score >= 0.95 or metrics["env_steps_to_0.95"] is None:  # the start of an unbroken streak up to now
                for name in ("env_steps", "cpu_seconds"):
                    metrics[f"{name}_to_0.95"] = metrics[name] if score >= 0.95 else None
            logs |= {"eval/return": eval_return, "eval/normalized_score": score, **baselines}
        for name, x in logs.items():
            if not math.isnan(x):  # the expert's return, and so the score, may be unknown
                writer.add_scalar(name, x, metrics["env_steps"])
        bar.set_postfix_str(f"return {episodic_return:.1f}, expert {expert_return:.1f}".replace("nan", "unknown"))

        # ---- save to a temporary file, then rename: a kill or full disk spares the checkpoint
        if (step + 1) % args.save_steps == 0 or step + 1 == iterations:
            writer.flush()
            torch.save(progress | {name: part.state_dict() for name, part in state.items()}, run_dir / "checkpoint.tmp")
            os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")

    # ---- results
    normalizer = {"observation_mean": mean_std[0].clone(), "observation_std": mean_std[1].clone()}
    save_file({**policy.state_dict(), **normalizer}, run_dir / "policy.safetensors")
    save_file({**discriminator.state_dict(), **normalizer}, run_dir / "reward.safetensors")
    metrics |= {"demo_pairs": len(expert_obs), "seed": args.seed, "wall_seconds": time.time() - start_time}
    metrics = {name: None if x is None or math.isnan(x) else x for name, x in metrics.items()}  # JSON has no nan
    (run_dir / "summary.json").write_text(json.dumps(metrics, indent=2))
    for opened in (writer, envs, eval_envs):
        opened.close()
    returns = random_return, bc_return, metrics["eval/return"], expert_return
    for name, x in zip(("random", "BC", "GAIL", "expert"), returns):
        print(f"{name:8} {x:10.1f}".replace("    nan", "unknown"))
    print(run_dir)
    return metrics


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError, ImportError, gymnasium.error.Error) as error:
        at = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == __file__][-1]
        print("error:", *str(error).split(), f"({Path(__file__).name}, line {at})", file=sys.stderr)
        raise SystemExit(2) from None
