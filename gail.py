# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0", "safetensors==0.8.0", "tqdm==4.70.1",
# ]
# ///
"""Generative adversarial imitation learning (GAIL): learn a policy from demonstrations, without their reward.

A discriminator D learns to tell the policy's state-action pairs from the demonstrator's, and the policy learns, by TRPO
on the cost log D, to be taken for the demonstrator: at the saddle point it visits what the demonstrator visits. Cloning
the demonstrator's actions fails where its own errors take it; GAIL sees those states, because the policy acts.

    max_pi min_D  - E_pi[log D(s,a)] - E_expert[log(1 - D(s,a))] + lambda H(pi),   D = probability of "policy"

This is Algorithm 1 of Ho and Ermon 2016 (arXiv:1606.03476) in its order. An iteration samples trajectories from resets;
steps D up E_pi[log D] + E_expert[log(1 - D)]; then takes one TRPO step (Schulman et al. 2015, arXiv:1502.05477) on the
cost log D of the *new* D, with lambda times the causal entropy; last, it fits the baseline. What the algorithm leaves
open is from the authors' code (advantages by GAE, a little entropy for D) or a flag that says its source.

    python gail.py                                              # laptop: CartPole, makes its expert first
    python gail.py --demos CartPole-v1.npz --num-demos 10       # from a file
    python gail.py --constant-action 0 --reward-form airl       # the control: who imitates a demonstrator that fails?
    python gail.py --env-id Acrobot-v1 --reward-form negative --num-demos 4
    python gail.py --env-id HalfCheetah-v4 --demos HalfCheetah-v4_expert.npz --num-demos 2 --total-timesteps 5000000 \\
        --num-envs 5 --learning-rate 0.001 --gradient-penalty 1 --eval-steps 50     # pip install "gymnasium[mujoco]"
    python gail.py --resume runs/<run folder>                   # goes on exactly where the last checkpoint stood

Shapes: N environments, S steps of each; B = the steps of them that are data, flattened; D numbers of an observation; A
actions, or numbers of one; n demonstrated pairs. `mask` (S, N) is True where a step was taken, not a reset.

Where it differs from the authors' code (github.com/openai/imitation): there the policy steps first, on the cost of the
D before this iteration's step; the line search allows twice the KL, wants a tenth of the linear gain, and keeps its
last try when all failed; the value network, itself fitted by a KL-limited natural gradient to Monte Carlo sums without
the entropy, sees the time, and nothing follows a time limit; D has the opposite sign (1 is the expert) and for discrete
actions an output for each; the normalisers are running ones, one for each network.

Deliberately not here: images, recurrent policies, replay buffers (off-policy), several processes, PPO or SAC in the
place of TRPO, rewards of transitions (AIRL's shaping). See HumanCompatibleAI/imitation.
"""

import importlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NoReturn

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Discrete
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange


@dataclass
class Args:
    """Generative adversarial imitation learning: learn a policy from demonstrations, without their reward."""

    # ---- common to all scripts
    exp_name: str = Path(__file__).stem
    """Name of the experiment, a part of the run folder's name."""
    seed: int = 1
    """Seed of whatever is random: initial weights, order of the data, samples, environments."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is one."""
    output_dir: str = "runs"
    """Folder in which the run folder {task}__{exp_name}__{seed}__{unix time} is made."""
    resume: str | None = None
    """Run folder to go on with, from its last checkpoint and with its flags: give no other flag beside this one."""
    save_steps: int = 50
    """Steps (iterations) from one checkpoint to the next. In training one is saved at the end and on Ctrl-C, too."""

    # ---- generative adversarial imitation learning
    env_id: str = "CartPole-v1"
    """Gymnasium environment with a time limit, Box observations, and Discrete or bounded Box actions."""
    demos: str | None = None
    """Demonstrations: .npz with obs and act, concatenated over episodes, and lengths; rew where it is known.
    None: made here, by TRPO on the true reward."""
    num_demos: int = 1
    """Demonstrated episodes that are imitated, the first ones (paper: 1 to 10, in MuJoCo 4 to 25)."""
    subsample: int = 20
    """Keep one step of an episode in so many, from a random first one (paper: 20 in MuJoCo; code: 10 for CartPole)."""
    expert_timesteps: int = 100_000
    """Environment steps of TRPO on the true reward by which the demonstrator is made."""
    constant_action: int | None = None
    """The demonstrator always takes this action, whatever comes of it.
    0 on CartPole, pushing left, is the control for survival bias: its episodes last 9 steps.
    An imitator that lasts longer has learned from the reward's sign."""
    total_timesteps: int = 100_000
    """Environment steps of GAIL."""
    num_envs: int = 6
    """N: environments that step together."""
    num_steps: int | None = None
    """S: steps of each environment in an iteration, which starts from resets; the last trajectory is cut off there.
    A value below the time limit never shows the policy later states.
    None: the time limit, so that the first is whole. (Code: at least 5,000 steps in all, in MuJoCo 50,000.)"""
    reward_form: Literal["positive", "negative", "airl"] = "positive"
    """The policy's reward, of the probability D of "policy".
    positive: -log D >= 0, the paper's, by which it pays to stay alive, whomever it imitates.
    negative: log(1 - D) <= 0, by which it pays to end, for tasks that end on success (code: favor_zero_expert_reward).
    airl: log(1 - D) - log D, of either sign (Fu et al. 2018, arXiv:1710.11248)."""
    hidden_size: int = 100
    """Units of each of the two tanh layers of policy, value network and discriminator (paper)."""
    gamma: float = 0.995
    """Discount (paper)."""
    gae_lambda: float = 0.97
    """lambda of the generalised advantage estimator (code; arXiv:1506.02438)."""
    max_kl: float = 0.01
    """delta: a step of the policy has at most this mean KL(old || new) (code)."""
    cg_iterations: int = 10
    """Iterations of conjugate gradient for the natural gradient (code)."""
    cg_damping: float = 0.1
    """Multiple of the identity that is added to the Fisher matrix (code)."""
    fisher_states: int = 1000
    """States on which the Fisher matrix is estimated, at most, a random part (code: a tenth of all; TRPO, appendix C).
    With a few hundred the step is often too long, and halved."""
    line_search_steps: int = 10
    """Halvings of a step after which the old policy is kept (code)."""
    ent_coef: float = 0.0
    """lambda of the causal entropy: -lambda log pi is added to the reward of each step (paper: 0 but for Reacher).
    With Box actions, which are clipped, a large one lets the variance grow for ever."""
    learning_rate: float = 0.005
    """Learning rate of the discriminator (Adam; code: 0.01)."""
    discriminator_steps: int = 1
    """Gradient steps of the discriminator in an iteration, each on all pairs (paper).
    (Code: on as many of the expert's, drawn anew, as of the policy's.)"""
    discriminator_entropy: float = 0.001
    """Coefficient of D's entropy, which keeps it from certainty (code: reward_ent_reg_weight)."""
    gradient_penalty: float = 0.0
    """Coefficient of (|gradient of the logit| - 1)^2 between pairs of both kinds (arXiv:1704.00028).
    For imitation: 10 (arXiv:1809.02925).
    Where the two are easily told apart, as in MuJoCo, D is otherwise soon certain, and flat."""
    value_learning_rate: float = 1e-3
    """Learning rate of the value network (Adam)."""
    value_epochs: int = 5
    """Passes over the iteration's steps by which the value network is fitted."""
    value_batch_size: int = 256
    """Steps in one gradient step of the value network."""
    bc_epochs: int = 1000
    """Passes of behaviour cloning over 70% of the demonstrated pairs (paper: until the others' likelihood falls).
    The one with the best likelihood of the other 30% is kept."""
    bc_batch_size: int = 128
    """Pairs in one gradient step of behaviour cloning (paper)."""
    bc_learning_rate: float = 1e-3
    """Learning rate of behaviour cloning (Adam; code)."""
    bc_warm_start: bool = False
    """Start GAIL's policy from the clone."""
    eval_steps: int = 1
    """Iterations from one evaluation to the next; there is always one after the last."""
    eval_episodes: int = 50
    """Episodes of an evaluation, without sampling of actions (paper: 50).
    The expert's return is that of all its episodes, which may have been sampled."""


def bad_input(message: str) -> NoReturn:
    """Say what is wrong in one sentence and exit with code 2, without a traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- environments and demonstrations ---------------------------------------------------------------------------------


def make_envs(env_id: str, num_envs: int, /, **env_kwargs) -> gymnasium.vector.VectorEnv:
    """Environments that step together, by their own vectorised code where they have any."""
    module, _, name = env_id.rpartition(":")  # the module registers the environment
    try:
        if module:
            importlib.import_module(module)
        if gymnasium.spec(name).vector_entry_point is None:
            env_kwargs["disable_env_checker"] = True  # it would test every step
        envs = gymnasium.make_vec(env_id, num_envs, **env_kwargs)
    except Exception as error:  # of whatever kind the environment's own code raises; it names what to install
        bad_input(f"--env-id {env_id} cannot be made: {(str(error) or repr(error)).splitlines()[0]}")
    if envs.metadata.get("autoreset_mode") != gymnasium.vector.AutoresetMode.NEXT_STEP:
        bad_input(f"--env-id {env_id} does not reset in the step after an end, as Gymnasium's environments do")
    return envs


def check_spaces(env_id: str, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> None:
    """Spaces that the networks can take."""
    if not isinstance(observation_space, Box) or len(observation_space.shape) != 1:
        bad_input(f"--env-id {env_id} has observations {observation_space}: wanted a 1-D Box")
    usable = isinstance(action_space, Discrete) and action_space.start == 0
    if isinstance(action_space, Box) and len(action_space.shape) == 1 and action_space.dtype.kind == "f":
        width = action_space.high - action_space.low
        usable = bool((np.isfinite(width) & (width > 0)).all())
    if not usable:
        bad_input(f"--env-id {env_id} has actions {action_space}: wanted Discrete from 0 or a bounded 1-D Box")


def load_demos(
    path: str, num_demos: int | None, observation_space: gymnasium.Space, action_space: gymnasium.Space
) -> tuple[dict[str, Tensor], float]:
    """The first num_demos demonstrations (None: all), padded to the longest: obs (N, T, ...), act (N, T, ...) and mask
    (N, T); and the mean return of all that the file has, where it has rew."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: file[key] for key in file.files}
    except Exception as error:  # a broken archive raises one of many kinds
        bad_input(f"--demos {path} cannot be read as .npz without pickles: {error}")
    for key in ("obs", "act", "lengths"):
        if key not in data:
            bad_input(f"--demos {path} has no key {key}; it has {sorted(data)}")
    lengths = data["lengths"]
    if lengths.ndim != 1 or len(lengths) == 0 or lengths.dtype.kind not in "iu" or lengths.min() < 1:
        bad_input(f"--demos {path}: lengths must be one positive integer for each episode, not {lengths.dtype} "
                  f"of shape {lengths.shape}")
    steps = int(lengths.sum())
    for key, space in (("obs", observation_space), ("act", action_space), ("rew", None)):
        if key not in data:
            continue
        values, wanted = data[key], (steps, *(() if space is None else space.shape))
        if values.shape != wanted:
            bad_input(f"--demos {path}: {key} has shape {values.shape}, wanted {wanted}: lengths add up to {steps}")
        if values.dtype.kind not in "iuf" or not np.isfinite(values.astype(np.float32)).all():
            bad_input(f"--demos {path}: {key} has entries that are no finite numbers")
        data[key] = values = values.astype(np.float32)
        if isinstance(space, Discrete):
            outside, form = (values < 0) | (values >= space.n) | (values != np.floor(values)), "integers "
        elif key == "act":
            outside, form = (values < space.low - 1e-4) | (values > space.high + 1e-4), ""
        else:
            continue
        if outside.mean() > (0.0 if isinstance(space, Discrete) else 0.5):
            bad_input(f"--demos {path}: {key} has values from {values.min():.4g} to {values.max():.4g}, "
                      f"wanted {form}in {space}")
        if outside.any():  # of a Gaussian policy, as it drew them
            print(f"--demos {path}: {outside.mean():.0%} of {key} lie outside {space} and are clipped to it")
            data[key] = values.clip(space.low, space.high)
    if num_demos is not None and num_demos > len(lengths):
        bad_input(f"--num-demos {num_demos}, but {path} has {len(lengths)} episodes")
    mean_return = float(data["rew"].sum(dtype=np.float64) / len(lengths)) if "rew" in data else math.nan
    sizes = torch.from_numpy(lengths.astype(np.int64))
    episodes = {key: torch.from_numpy(data[key]).split(sizes.tolist())[:num_demos] for key in ("obs", "act")}
    padded = {key: nn.utils.rnn.pad_sequence(x, batch_first=True) for key, x in episodes.items()}  # (N, T, ...)
    sizes = sizes[:num_demos, None]
    return {**padded, "mask": torch.arange(int(sizes.max())) < sizes}, mean_return


def subsample_demos(mask: Tensor, every: int, generator: torch.Generator) -> Tensor:
    """(N, T) -> (N, T), True for every such step of an episode from a random first one, so that each episode's part is
    spread over it and neighbours, nearly equal, do not count twice. Each episode keeps at least one."""
    first = (torch.rand(len(mask), generator=generator) * mask.sum(1).clamp(max=every)).long()  # (N,)
    steps = torch.arange(mask.shape[1])  # (T,)
    return mask & (steps >= first[:, None]) & ((steps - first[:, None]) % every == 0)


# ---- policy, value network and discriminator -------------------------------------------------------------------------


def mlp(inputs: int, outputs: int, hidden_size: int, scale: float) -> nn.Sequential:
    """Two hidden layers of tanh; the last layer's weights are scaled down, so that a policy starts almost uniform."""
    layers = [nn.Linear(inputs, hidden_size), nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, outputs)]
    with torch.no_grad():
        layers[-1].weight.mul_(scale)
        layers[-1].bias.zero_()
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Policy(nn.Module):
    """Outputs for an observation: logits (Discrete); or means and log standard deviations, the latter one parameter for
    all states (Box; as in TRPO), of an action scaled so that the Box is [-1, 1]."""

    def __init__(self, num_inputs: int, action_space: gymnasium.Space, hidden_size: int) -> None:
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        outputs = int(action_space.n) if self.discrete else action_space.shape[0]
        self.net = mlp(num_inputs, outputs, hidden_size, 0.01)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(outputs))

    def forward(self, obs: Tensor) -> Tensor:
        outputs = self.net(obs)  # (..., A)
        return outputs if self.discrete else torch.cat([outputs, self.log_std.expand_as(outputs)], -1)  # (..., 2A)

    def select(self, outputs: Tensor, mode: str, generator: torch.Generator) -> Tensor:
        """Actions by the policy ("sample"), its mode ("greedy"), or uniform ones ("uniform"): indices, or unclipped."""
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
        """What the environment makes of selected actions: indices stay, others are clipped to [-1, 1]."""
        return actions if self.discrete else actions.clamp(-1, 1)

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """log pi(a|s) (...) of indices (...), or of actions (..., A) before they are clipped."""
        if self.discrete:
            return outputs.log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        mean, log_std = outputs.chunk(2, -1)
        return (-0.5 * ((actions - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


OBSERVATION_RANGE = 10.0  # of normalised observations, as in OpenAI's baselines


def normalise(obs: Tensor, statistics: Tensor) -> Tensor:
    """Observations by the mean and standard deviation that expert, policy and reward share; statistics (2, D)."""
    return ((obs - statistics[0]) / statistics[1]).clamp(-OBSERVATION_RANGE, OBSERVATION_RANGE).float()


def observation_statistics(expert_obs: Tensor, other_obs: Tensor) -> Tensor:
    """Mean and standard deviation (2, D) of observations (n, D) and (m, D), either kind with half of the weight."""
    halves = [torch.stack([x.mean(0), x.square().mean(0)]) for x in (expert_obs.double(), other_obs.double())]
    mean, square = (halves[0] + halves[1]) / 2
    return torch.stack([mean, (square - mean.square()).clamp(min=0).sqrt() + 1e-6]).float()


def pair_features(obs: Tensor, actions: Tensor, num_actions: int | None) -> Tensor:
    """State-action pairs as a network sees them: normalised observations (..., D), and with them indices as one-hot
    vectors (num_actions), or actions in [-1, 1]: as the environment takes them, not as the policy selects them."""
    actions = F.one_hot(actions, num_actions).float() if num_actions else actions
    return torch.cat([obs, actions], -1)  # (..., D + A)


# ---- the mathematics -------------------------------------------------------------------------------------------------


def discriminator_loss(
    policy_logits: Tensor, expert_logits: Tensor, entropy_coef: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """-E_pi[log D] - E_expert[log(1 - D)] - entropy_coef (E_pi + E_expert)[H(D)], D = sigmoid(logit) the probability of
    "policy" (Ho and Ermon 2016, eq. 17), from logits (B,) and (n,): finite however sure D is. Each side is a mean, so
    the optimum is p_pi / (p_pi + p_expert) whatever the numbers of pairs, and 2 log 2 where both are alike."""
    policy_loss, expert_loss = F.softplus(-policy_logits).mean(), F.softplus(expert_logits).mean()
    entropy = sum((F.softplus(logits) - logits * logits.sigmoid()).mean() for logits in (policy_logits, expert_logits))
    stats = {
        "losses/discriminator_loss": (policy_loss + expert_loss).detach(),
        "losses/discriminator_entropy": entropy.detach(),
        "train/policy_accuracy": (policy_logits > 0).float().mean(),
        "train/expert_accuracy": (expert_logits < 0).float().mean(),
    }
    return policy_loss + expert_loss - entropy_coef * entropy, stats


def logit_gradient_penalty(
    discriminator: nn.Module, policy_inputs: Tensor, expert_inputs: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean of (|d logit / d input| - 1)^2 at random points between pairs of both kinds (Gulrajani et al. 2017)."""
    rows = torch.randint(len(expert_inputs), (len(policy_inputs),), generator=generator).to(policy_inputs.device)
    share = torch.rand(len(policy_inputs), 1, generator=generator).to(policy_inputs.device)
    inputs = (share * policy_inputs + (1 - share) * expert_inputs[rows]).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(inputs).sum(), inputs, create_graph=True)
    return (gradient.norm(dim=-1) - 1).square().mean()


def imitation_reward(logits: Tensor, reward_form: str) -> Tensor:
    """The policy's reward of pairs with these logits of D, the larger the more they look like the expert's."""
    if reward_form == "positive":
        return F.softplus(-logits)  # -log D: minus the paper's cost
    return -F.softplus(logits) if reward_form == "negative" else -logits  # log(1 - D); log(1 - D) - log D


def gae_episodic(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (S, N) of S steps of N environments (Schulman et al. 2016, eq. 16). next_values are of the
    observation before any reset: after the last step of a truncated episode there would have been more, after that of a
    terminated one there is nothing. No advantage looks past the end of its episode."""
    advantages, following = torch.zeros_like(values), torch.zeros_like(values[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * torch.where(terminated[t], 0.0, next_values[t]) - values[t]  # (N,)
        following = delta + gamma * lam * torch.where(terminated[t] | truncated[t], 0.0, following)
        advantages[t] = following
    return advantages, advantages + values


def policy_kl(old: Tensor, new: Tensor, discrete: bool) -> Tensor:
    """KL(old || new) (...) of the distributions with these outputs."""
    if discrete:
        old, new = old.log_softmax(-1), new.log_softmax(-1)
        return (old.exp() * (old - new)).sum(-1)
    (old_mean, old_log_std), (mean, log_std) = old.chunk(2, -1), new.chunk(2, -1)
    square = (old_log_std.exp().square() + (old_mean - mean).square()) / (2 * log_std.exp().square())
    return (log_std - old_log_std + square - 0.5).sum(-1)


def fisher_vector_product(policy: nn.Module, obs: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """v -> (F + damping I) v for flat vectors of parameters: F is the Hessian of the mean KL(old || new) over states
    (b, D), at new = old, by differentiating twice. The old distribution is a constant."""
    parameters = list(policy.parameters())
    outputs = policy(obs)
    kl = policy_kl(outputs.detach(), outputs, policy.discrete).mean()
    gradient = parameters_to_vector(torch.autograd.grad(kl, parameters, create_graph=True))

    def product(v: Tensor) -> Tensor:
        rows = torch.autograd.grad(gradient @ v, parameters, retain_graph=True)
        return parameters_to_vector([row.contiguous() for row in rows]) + damping * v

    return product


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """x with matvec(x) = b, up to a squared residual of tolerance or so many iterations (Hestenes and Stiefel 1952)."""
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    square = residual @ residual
    for _ in range(iterations):
        if square <= tolerance:
            break
        product = matvec(direction)
        length = square / (direction @ product)
        x, residual = x + length * direction, residual - length * product
        square, old_square = residual @ residual, square
        direction = residual + square / old_square * direction
    return x


def trpo_step(
    policy: nn.Module, obs: Tensor, actions: Tensor, old_logprobs: Tensor, advantages: Tensor, max_kl: float,
    cg_iterations: int, cg_damping: float, fisher_states: int, line_search_steps: int, generator: torch.Generator,
) -> dict[str, float]:
    """One step of TRPO (Schulman et al. 2015) on B steps: the natural gradient of E[pi / pi_old A], as long as the KL's
    quadratic model allows, then halved until KL(old || new) <= max_kl and the surrogate is better, both on all states.
    If no length will do, the old parameters are put back, bit for bit."""
    with torch.no_grad():
        old_outputs = policy(obs)  # (B, outputs)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    def surrogate_and_kl() -> tuple[Tensor, Tensor]:
        outputs = policy(obs)
        ratio = (policy.logprobs(outputs, actions) - old_logprobs).exp()  # (B,)
        return (ratio * advantages).mean(), policy_kl(old_outputs, outputs, policy.discrete).mean()

    parameters = list(policy.parameters())
    old_parameters = parameters_to_vector(parameters).detach().clone()
    surrogate, _ = surrogate_and_kl()
    gradient = parameters_to_vector(torch.autograd.grad(surrogate, parameters)).detach()
    chosen = torch.randperm(len(obs), generator=generator)[:fisher_states].to(obs.device)
    fisher = fisher_vector_product(policy, obs[chosen], cg_damping)
    direction = conjugate_gradient(fisher, gradient, cg_iterations)
    step = direction * (2 * max_kl / (direction @ fisher(direction))).sqrt()
    stats = {"losses/surrogate": 0.0, "losses/kl": 0.0, "train/step_share": 0.0}
    with torch.no_grad():
        for halvings in range(line_search_steps + 1):
            vector_to_parameters(old_parameters + step / 2**halvings, parameters)
            new_surrogate, kl = surrogate_and_kl()
            if kl <= max_kl and new_surrogate > surrogate:  # False where either is not a number
                stats = {"losses/surrogate": (new_surrogate - surrogate).item(), "losses/kl": kl.item(),
                         "train/step_share": 0.5**halvings}
                break
        else:
            vector_to_parameters(old_parameters, parameters)
    return {**stats, "train/grad_norm": gradient.norm().item()}


def fit_value(
    value: nn.Module, optimizer: torch.optim.Optimizer, obs: Tensor, targets: Tensor, epochs: int, batch_size: int,
    generator: torch.Generator,
) -> float:
    """Fit the network (B, D) -> (B, 1) to targets (B,) by least squares; the mean squared error on the way."""
    losses = []
    for _ in range(epochs):
        for rows in torch.randperm(len(obs), generator=generator).to(obs.device).split(batch_size):
            loss = (value(obs[rows])[:, 0] - targets[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item()


# ---- trajectories ----------------------------------------------------------------------------------------------------


# Seeds of the environments' episodes; those of training count from 0.
EXPERT_SEEDS, DEMO_SEEDS, UNIFORM_SEEDS, EVAL_SEEDS = (k * 10**8 for k in range(1, 5))


def space_actions(actions: Tensor, space: gymnasium.Space) -> Tensor:
    """Actions of the space from indices, or from actions in [-1, 1]."""
    if isinstance(space, Discrete):
        return actions
    low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
    return low + (actions + 1) / 2 * (high - low)


def unit_actions(actions: Tensor, space: gymnasium.Space) -> Tensor:
    """The inverse of space_actions."""
    if isinstance(space, Discrete):
        return actions.long()
    low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
    return ((actions - low) / (high - low) * 2 - 1).clamp(-1, 1).float()


@torch.no_grad()
def rollout(
    envs: gymnasium.vector.VectorEnv, policy: nn.Module, statistics: Tensor, steps: int, seed: int, mode: str,
    generator: torch.Generator, one_episode: bool = False,
) -> dict[str, Tensor]:
    """S steps of N environments from a reset with this seed: no state is kept between calls. obs (S+1, N, D), raw; act
    (S, N) or (S, N, A), as selected; logprobs, stored when acting; true rew, mask, terminated, truncated (S, N).
    obs[t+1] is what step t led to: at the end of an episode its last observation, before any reset.

    In the step after an end Gymnasium resets and ignores the action: that is no data, so mask is False. An episode that
    is cut off after S steps is truncated. one_episode: mask only the first of each environment; stop when all ended."""
    space, device = envs.single_action_space, statistics.device
    observed = [torch.tensor(envs.reset(seed=seed)[0], dtype=torch.float32)]
    outputs, columns, live = [], [], np.ones(envs.num_envs, dtype=bool)
    for t in range(steps):
        outputs.append(policy(normalise(observed[-1].to(device), statistics)).cpu())  # (N, outputs)
        actions = policy.select(outputs[-1], mode, generator)  # (N,) or (N, A)
        obs, reward, terminated, truncated, _ = envs.step(space_actions(policy.unit(actions), space).numpy())
        if not np.isfinite(obs).all():
            bad_input(f"--env-id: an observation of the environment is not finite in step {t + 1} of a rollout")
        observed.append(torch.tensor(obs, dtype=torch.float32))
        columns.append((actions, *(torch.from_numpy(x.copy()) for x in (reward, live, terminated, truncated))))
        live = ~(terminated | truncated) & (live | (not one_episode))
        if not live.any() and one_episode:
            break
    act, rew, mask, terminated, truncated = (torch.stack(x) for x in zip(*columns))  # (S, N), act maybe (S, N, A)
    truncated[-1] |= ~terminated[-1]
    logprobs = policy.logprobs(torch.stack(outputs), act)  # (S, N)
    batch = {
        "obs": torch.stack(observed), "act": act, "logprobs": logprobs, "rew": rew.float(), "mask": mask,
        "terminated": terminated, "truncated": truncated,
    }  # fmt: skip
    return {name: x.to(device) for name, x in batch.items()}


def mean_return_and_length(batch: dict[str, Tensor]) -> tuple[float, float]:
    """Mean true return and length of the first episode of each environment of a rollout: later ones may be cut off."""
    first = batch["mask"] & (~batch["mask"]).cumsum(0).eq(0)  # (S, N)
    return (batch["rew"] * first).sum().item() / first.shape[1], first.sum().item() / first.shape[1]


def trpo_expert(
    envs: gymnasium.vector.VectorEnv, policy: Policy, value: nn.Module, statistics: Tensor, num_steps: int,
    total_timesteps: int, first_seed: int, gamma: float, gae_lambda: float, learning_rate: float, policy_flags: dict,
    value_flags: dict, generator: torch.Generator,
) -> None:
    """TRPO on the true reward: main's loop without a discriminator."""
    optimizer = torch.optim.Adam(value.parameters(), lr=learning_rate)
    bar = trange(math.ceil(total_timesteps / (envs.num_envs * num_steps)), desc="expert")
    for step in bar:
        batch = rollout(envs, policy, statistics, num_steps, first_seed + step * envs.num_envs, "sample", generator)
        mask, ends = batch["mask"], (batch["terminated"], batch["truncated"])
        obs = normalise(batch["obs"], statistics)  # (S+1, N, D)
        with torch.no_grad():
            values = value(obs)[..., 0] / (1 - gamma)  # (S+1, N)
        advantages, returns = gae_episodic(batch["rew"], values[:-1], values[1:], *ends, gamma, gae_lambda)  # (S, N)
        obs = obs[:-1][mask]  # (B, D)
        data = (x[mask] for x in (batch["act"], batch["logprobs"], advantages))
        trpo_step(policy, obs, *data, generator=generator, **policy_flags)
        fit_value(value, optimizer, obs, returns[mask] * (1 - gamma), generator=generator, **value_flags)
        bar.set_postfix_str(f"return {mean_return_and_length(batch)[0]:.1f}")


def write_demos(path: Path, batch: dict[str, Tensor], policy: nn.Module, action_space: gymnasium.Space) -> None:
    """A rollout of one episode each, in the format of --demos."""
    batch = {name: x.cpu() for name, x in batch.items()}
    mask, act = batch["mask"].t(), space_actions(policy.unit(batch["act"]), action_space)  # mask (N, S)
    columns = {"obs": batch["obs"][:-1], "act": act, "rew": batch["rew"], "terminal": batch["terminated"]}
    columns = {name: x.transpose(0, 1)[mask].numpy() for name, x in columns.items()}
    np.savez(path, lengths=mask.sum(1).numpy(), **columns)


# ---- behaviour cloning -----------------------------------------------------------------------------------------------


BC_TRAIN_SHARE = 0.7  # of the pairs; the likelihood of the others says which pass was best (paper, section 6)


def clone_behaviour(
    policy: Policy, obs: Tensor, actions: Tensor, epochs: int, batch_size: int, learning_rate: float,
    generator: torch.Generator,
) -> float:
    """Maximise the likelihood of the demonstrated actions in states obs (n, D) (Pomerleau 1989); the parameters of the
    best pass are kept, and its mean log-likelihood of the pairs that were held out returned."""
    order = torch.randperm(len(obs), generator=generator).to(obs.device)
    count = max(1, int(BC_TRAIN_SHARE * len(obs)))
    train, held_out = order[:count], order[count:] if len(obs) > 1 else order
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    best, best_parameters = -math.inf, None
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
    if best_parameters is not None:
        vector_to_parameters(best_parameters, policy.parameters())
    return best


# ---- saving, resuming, running ---------------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict) -> None:
    """Written aside, flushed to the disk, then renamed: neither a kill nor a full disk harms the last checkpoint."""
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        bad_input(f"cannot save to --output-dir: {error}; the last checkpoint in {path.parent} is whole")
    os.replace(aside, path)


def open_run(args: Args, run_dir: Path, first_step: int) -> SummaryWriter:
    """TensorBoard's writer into the run folder; a new folder is made and gets its args.json."""
    if args.resume is not None:
        return SummaryWriter(run_dir, purge_step=first_step + 1)
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        bad_input(f"--output-dir {args.output_dir}: the run folder cannot be made: {error}")
    flags = asdict(args)
    (run_dir / "args.json").write_text(json.dumps({"script": Path(__file__).name, "args": flags}, indent=2))
    writer = SummaryWriter(run_dir)
    rows = "".join(f"| {name} | {value} |\n" for name, value in flags.items())
    writer.add_text("hyperparameters", f"| flag | value |\n|---|---|\n{rows}")
    return writer


def load_run(args: Args) -> tuple[Args, dict]:
    """The flags and the last checkpoint of the run folder --resume."""
    folder = Path(args.resume)
    if not (folder / "args.json").is_file() or not (folder / "checkpoint.pt").is_file():
        bad_input(f"--resume {folder} is not a run folder with args.json and checkpoint.pt")
    try:
        saved = json.loads((folder / "args.json").read_text())
        if saved["script"] != Path(__file__).name:
            bad_input(f"--resume {folder} is a run of {saved['script']}, not of {Path(__file__).name}")
        flags = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["args"].items()}
        saved_args = Args(**{**flags, "resume": args.resume})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        bad_input(f"--resume {folder}: args.json cannot be read ({error!r})")
    for name in (f.name for f in fields(Args) if f.name != "resume"):
        if getattr(args, name) != getattr(Args(), name):
            bad_input(f"--{name.replace('_', '-')} cannot be given beside --resume, which takes that run's flags")
    try:
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises one of many kinds
        bad_input(f"--resume {folder}: checkpoint.pt cannot be read ({error})")
    return saved_args, state


def catch_ctrl_c() -> tuple[list[int], Callable]:
    """A list that the first Ctrl-C enters, for the loop to look at after its step, and the handler that was there
    before, to be put back: a second Ctrl-C is for that one."""
    interrupts: list[int] = []

    def on_interrupt(number: int, _) -> None:
        interrupts.append(number)
        print("\nsaving after this step; Ctrl-C again stops at once, without saving", file=sys.stderr)
        signal.signal(signal.SIGINT, old_handler)

    old_handler = signal.signal(signal.SIGINT, on_interrupt)
    return interrupts, old_handler


def check_ranges(args: Args, positive: list[str], not_negative: list[str]) -> None:
    """Numbers that must be > 0, and numbers that must be >= 0, where they are not None."""
    for name in positive:
        if getattr(args, name) is not None and not getattr(args, name) > 0:  # so written, nan is refused too
            bad_input(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in not_negative:
        if getattr(args, name) is not None and not getattr(args, name) >= 0:
            bad_input(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file."""
    try:
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        bad_input(f"cannot save to --output-dir: {error}; the last checkpoint in {path.parent} is whole")


def choose_device(args: Args) -> torch.device:
    """The device of the networks. Tables and environments stay on the CPU: their steps are many and small."""
    if args.device == "cuda" and not torch.cuda.is_available():
        bad_input("--device cuda, but torch sees no CUDA device")
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def lasting(history: list[list[float]], threshold: float) -> list[float] | None:
    """The first evaluation [environment steps, CPU seconds, score, return] from which the score stays >= threshold."""
    below = [i for i, (_, _, score, _) in enumerate(history) if not score >= threshold]
    first = below[-1] + 1 if below else 0
    return history[first] if first < len(history) else None


def check_gail_args(args: Args) -> None:
    """Whatever the flags alone show to be wrong."""
    check_ranges(
        args, ["save_steps", "num_demos", "subsample", "expert_timesteps", "total_timesteps", "num_envs", "num_steps",
               "hidden_size", "gamma", "max_kl", "cg_iterations", "fisher_states", "learning_rate", "value_epochs",
               "value_learning_rate", "value_batch_size", "bc_epochs", "bc_batch_size", "bc_learning_rate",
               "discriminator_steps", "eval_steps", "eval_episodes"],
        ["seed", "gae_lambda", "cg_damping", "line_search_steps", "ent_coef", "discriminator_entropy",
         "gradient_penalty"],
    )  # fmt: skip
    if args.seed >= 2**33:  # seeds of episodes count from --seed * 10**9, and must fit 63 bits
        bad_input(f"--seed {args.seed} must be below 2**33")
    if args.gamma >= 1 or args.gae_lambda > 1:
        bad_input(f"--gamma {args.gamma} must be below 1, and --gae-lambda {args.gae_lambda} at most 1")
    if args.constant_action is not None and args.demos is not None:
        bad_input("--constant-action makes demonstrations, and --demos reads them: give one of the two")


LASTING_SCORE = 0.95  # of the way from uniform actions to the expert, for env_steps_to_0.95 and cpu_seconds_to_0.95


def main(args: Args) -> dict[str, float]:
    """Train, and return the final metrics, which are also in <run folder>/summary.json."""
    # ---- set-up: whatever is wrong with flags, environment or data is said before anything is written
    start_time, state = time.time(), None
    if args.resume is not None:
        args, state = load_run(args)
    device = choose_device(args)
    check_gail_args(args)
    N = args.num_envs
    envs, eval_envs = make_envs(args.env_id, N), make_envs(args.env_id, args.eval_episodes)
    spaces = envs.single_observation_space, envs.single_action_space
    check_spaces(args.env_id, *spaces)
    num_actions = int(spaces[1].n) if isinstance(spaces[1], Discrete) else None
    episode_steps = envs.spec.max_episode_steps
    if episode_steps is None:
        bad_input(f"--env-id {args.env_id} has no time limit: a rollout would not end")
    if args.constant_action is not None and not (num_actions and 0 <= args.constant_action < num_actions):
        bad_input(f"--constant-action {args.constant_action} is no action of {args.env_id}, which takes {spaces[1]}")
    if args.demos is not None:
        demos, expert_return = load_demos(args.demos, args.num_demos, *spaces)
    num_steps = args.num_steps or episode_steps
    if N * num_steps < 2:
        bad_input("--num-envs 1 --num-steps 1: one advantage has no standard deviation")
    iterations = math.ceil(args.total_timesteps / (N * num_steps))
    task = args.env_id.replace(":", "-").replace("/", "-")
    run_dir = Path(args.resume or f"{args.output_dir}/{task}__{args.exp_name}__{args.seed}__{int(time.time())}")
    writer = open_run(args, run_dir, state["step"] if state is not None else 0)

    torch.manual_seed(args.seed)  # of the networks
    generator, first_seed = torch.Generator().manual_seed(args.seed), args.seed * 10**9
    D, A = spaces[0].shape[0], num_actions or spaces[1].shape[0]
    policy, clone = (Policy(D, spaces[1], args.hidden_size).to(device) for _ in range(2))
    value = mlp(D, 1, args.hidden_size, 0.01).to(device)
    discriminator = mlp(D + A, 1, args.hidden_size, 0.01).to(device)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=args.learning_rate)
    value_optimizer = torch.optim.Adam(value.parameters(), lr=args.value_learning_rate)
    policy_flags = {
        "max_kl": args.max_kl, "cg_iterations": args.cg_iterations, "cg_damping": args.cg_damping,
        "fisher_states": args.fisher_states, "line_search_steps": args.line_search_steps,
    }  # fmt: skip
    value_flags = {"epochs": args.value_epochs, "batch_size": args.value_batch_size}

    # ---- demonstrations
    if state is None:
        statistics = torch.stack([torch.zeros(D), torch.ones(D)]).to(device)  # (2, D)
        seed = first_seed + UNIFORM_SEEDS
        uniform = rollout(eval_envs, policy, statistics, episode_steps, seed, "uniform", generator, True)
        uniform_obs = uniform["obs"][:-1][uniform["mask"]]  # (steps, D)
        statistics = observation_statistics(uniform_obs, uniform_obs)
        if args.demos is None:
            expert = Policy(D, spaces[1], args.hidden_size).to(device)
            if args.constant_action is None:
                expert_value = mlp(D, 1, args.hidden_size, 0.01).to(device)
                trpo_expert(
                    envs, expert, expert_value, statistics, num_steps, args.expert_timesteps, first_seed + EXPERT_SEEDS,
                    args.gamma, args.gae_lambda, args.value_learning_rate, policy_flags, value_flags, generator,
                )
            else:
                expert.net[-1].weight.data.zero_()
                expert.net[-1].bias.data = 100 * F.one_hot(torch.tensor(args.constant_action), A).float().to(device)
            demo_envs = make_envs(args.env_id, max(args.num_demos, args.eval_episodes))
            seed = first_seed + DEMO_SEEDS
            batch = rollout(demo_envs, expert, statistics, episode_steps, seed, "sample", generator, True)
            demo_envs.close()
            write_demos(run_dir / "demos.npz", batch, expert, spaces[1])
    if args.demos is None:
        demos, expert_return = load_demos(str(run_dir / "demos.npz"), args.num_demos, *spaces)
    kept = subsample_demos(demos["mask"], args.subsample, torch.Generator().manual_seed(args.seed))  # (N, T)
    expert_obs = demos["obs"][kept].to(device)  # (n, D)
    expert_actions = unit_actions(demos["act"][kept], spaces[1]).to(device)  # (n,) or (n, A)

    # ---- normaliser, behaviour cloning, or the state of a checkpoint
    env_steps, cpu_seconds, first_step, seconds_before, history = 0, 0.0, 0, 0.0, []
    if state is None:
        # Fixed before training: under a running normaliser the same parameters are another policy after each update, so
        # that neither KL(old || new) nor stored log-probabilities mean what they say. The expert's observations alone
        # hardly vary where it is good (a pole's angle), so those of uniform actions count as much.
        statistics = observation_statistics(expert_obs, uniform_obs)
        random_return, _ = mean_return_and_length(uniform)
        inputs = normalise(expert_obs, statistics)
        flags = args.bc_epochs, args.bc_batch_size, args.bc_learning_rate
        clone_behaviour(clone, inputs, expert_actions, *flags, torch.Generator().manual_seed(args.seed))
        seed = first_seed + EVAL_SEEDS
        batch = rollout(eval_envs, clone, statistics, episode_steps, seed, "greedy", generator, True)
        bc_return, _ = mean_return_and_length(batch)
        if args.bc_warm_start:
            policy.load_state_dict(clone.state_dict())
    else:
        for name, module in (("policy", policy), ("value", value), ("discriminator", discriminator)):
            module.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        value_optimizer.load_state_dict(state["value_optimizer"])
        generator.set_state(state["generator"])
        statistics, random_return, bc_return = (state[name] for name in ("statistics", "random_return", "bc_return"))
        statistics = statistics.to(device)
        first_step, env_steps, history = state["step"], state["env_steps"], state["history"]
        cpu_seconds, seconds_before = state["cpu_seconds"], state["seconds"]
    expert_inputs = pair_features(normalise(expert_obs, statistics), expert_actions, num_actions)  # (n, D + A)

    def save() -> None:
        save_checkpoint(run_dir / "checkpoint.pt", {
            "step": done, "policy": policy.state_dict(), "value": value.state_dict(),
            "discriminator": discriminator.state_dict(), "optimizer": optimizer.state_dict(),
            "value_optimizer": value_optimizer.state_dict(), "generator": generator.get_state(),
            "statistics": statistics, "random_return": random_return, "bc_return": bc_return, "history": history,
            "env_steps": env_steps, "cpu_seconds": cpu_seconds, "seconds": seconds_before + time.time() - start_time,
        })  # fmt: skip

    done = first_step
    if state is None:  # what comes before the loop may have taken long
        save()
    interrupts, old_handler = catch_ctrl_c()
    bar = trange(first_step, iterations, initial=first_step, total=iterations, desc="gail")
    for step in bar:
        # ---- rollout: trajectories of pi_i
        step_start, cpu_start = time.time(), time.process_time()
        batch = rollout(envs, policy, statistics, num_steps, first_seed + step * N, "sample", generator)
        mask, ends = batch["mask"], (batch["terminated"], batch["truncated"])  # (S, N)
        all_obs = normalise(batch["obs"], statistics)  # (S+1, N, D)
        obs, act, logprobs = all_obs[:-1][mask], batch["act"][mask], batch["logprobs"][mask]  # (B, ...)

        # ---- discriminator: D_i to D_i+1, up E_pi[log D] + E_expert[log(1 - D)]
        policy_inputs = pair_features(obs, policy.unit(act), num_actions)  # (B, D + A)
        logs: dict[str, Tensor | float] = {}
        for _ in range(args.discriminator_steps):
            logits = discriminator(torch.cat([policy_inputs, expert_inputs]))[:, 0]  # (B + n,)
            loss, stats = discriminator_loss(*logits.split([len(obs), len(expert_inputs)]), args.discriminator_entropy)
            stats["losses/gradient_penalty"] = torch.zeros(())
            if args.gradient_penalty:
                penalty = logit_gradient_penalty(discriminator, policy_inputs, expert_inputs, generator)
                loss = loss + args.gradient_penalty * penalty
                stats["losses/gradient_penalty"] = penalty.detach()
            if not loss.isfinite():
                bad_input(f"the discriminator's loss of step {step + 1} is not finite: is --learning-rate too large?")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, x in stats.items():
                logs[name] = logs.get(name, 0.0) + x / args.discriminator_steps

        # ---- reward: of the new D, and lambda times the causal entropy, which is thereby inside Q
        rewards = torch.zeros_like(batch["rew"])  # (S, N)
        with torch.no_grad():
            learned = imitation_reward(discriminator(policy_inputs)[:, 0], args.reward_form)  # (B,)
            rewards[mask] = learned - args.ent_coef * logprobs
            values = value(all_obs)[..., 0] / (1 - args.gamma)  # (S+1, N): the network says (1 - gamma) V

        # ---- advantage
        advantages, returns = gae_episodic(rewards, values[:-1], values[1:], *ends, args.gamma, args.gae_lambda)
        advantages, returns = advantages[mask], returns[mask]  # (B,)
        explained = 1 - (returns - values[:-1][mask]).var() / returns.var().clamp(min=1e-8)

        # ---- policy: one TRPO step, pi_i to pi_i+1
        logs |= trpo_step(policy, obs, act, logprobs, advantages, generator=generator, **policy_flags)

        # ---- value: only now, so that no advantage has seen its own return
        targets = returns * (1 - args.gamma)
        logs["losses/value_loss"] = fit_value(value, value_optimizer, obs, targets, generator=generator, **value_flags)

        # ---- log
        done, env_steps = step + 1, env_steps + len(obs)
        cpu_seconds += time.process_time() - cpu_start
        episodic_return, episodic_length = mean_return_and_length(batch)
        logs |= {
            "losses/explained_variance": explained.item(), "train/reward": learned.mean().item(),
            "train/entropy": -logprobs.mean().item(), "charts/learning_rate": args.learning_rate,
            "charts/episodic_return": episodic_return, "charts/episodic_length": episodic_length,
            "charts/env_steps": env_steps, "charts/cpu_seconds": cpu_seconds,
            "charts/SPS": len(obs) / (time.time() - step_start),
        }  # fmt: skip
        if done % args.eval_steps == 0 or done == iterations:
            seed = first_seed + EVAL_SEEDS
            batch = rollout(eval_envs, policy, statistics, episode_steps, seed, "greedy", generator, True)
            logs["eval/return"], _ = mean_return_and_length(batch)
            margin = expert_return - random_return or math.nan
            logs["eval/normalized_score"] = (logs["eval/return"] - random_return) / margin
            history.append([env_steps, cpu_seconds, logs["eval/normalized_score"], logs["eval/return"]])
        for name, x in logs.items():
            writer.add_scalar(name, x, done)
        bar.set_postfix_str(f"return {episodic_return:.1f}, expert's {expert_return:.1f}")

        # ---- save
        interrupted = bool(interrupts)
        if done % args.save_steps == 0 or done == iterations or interrupted:
            save()
        if interrupted:
            break
    bar.close()
    signal.signal(signal.SIGINT, old_handler)
    if done < iterations:
        print(f"stopped by Ctrl-C after step {done}; --resume {run_dir} goes on")
        raise SystemExit(130)

    # ---- results
    normaliser = {"observation_mean": statistics[0], "observation_std": statistics[1]}
    save_tensors(run_dir / "policy.safetensors", {**policy.state_dict(), **normaliser})
    save_tensors(run_dir / "reward.safetensors", {**discriminator.state_dict(), **normaliser})
    reached = lasting(history, LASTING_SCORE)
    _, _, score, final_return = history[-1]
    metrics = {
        "eval/expert_return": expert_return, "eval/random_return": random_return, "eval/bc_return": bc_return,
        "eval/return": final_return, "eval/normalized_score": score, "env_steps": env_steps, "cpu_seconds": cpu_seconds,
        "env_steps_to_0.95": reached and reached[0], "cpu_seconds_to_0.95": reached and reached[1],
        "demo_pairs": len(expert_obs), "seed": args.seed, "wall_seconds": seconds_before + time.time() - start_time,
    }  # fmt: skip
    metrics = {name: None if x is None or not math.isfinite(x) else x for name, x in metrics.items()}  # JSON has no nan
    (run_dir / "summary.json").write_text(json.dumps(metrics, indent=2))
    writer.close()
    envs.close()
    eval_envs.close()
    for name, x in (("random", random_return), ("BC", bc_return), ("GAIL", final_return), ("expert", expert_return)):
        print(f"{name:8} {x:10.1f}")
    print(run_dir)
    return metrics


if __name__ == "__main__":
    cli_args = tyro.cli(Args)
    others = [flag for flag in sys.argv[1:] if flag.startswith("--") and not flag.startswith("--resume")]
    if cli_args.resume is not None and others:
        bad_input(f"{others[0]} cannot be given beside --resume, which takes that run's flags")
    try:
        main(cli_args)
    except KeyboardInterrupt:  # outside the training loop, where Ctrl-C saves
        print("stopped at once; a run folder that has a checkpoint.pt can be resumed", file=sys.stderr)
        raise SystemExit(130) from None
