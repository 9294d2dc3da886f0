# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0", "safetensors==0.8.0",
#     "matplotlib==3.11.2", "tqdm==4.70.1",
# ]
# ///
"""Maximum-entropy inverse RL: recover a reward from demonstrations, exactly (with a table) or from samples.

Of all distributions over trajectories with the demonstrator's visits, the most random one weighs a trajectory by
exp(r_psi(tau)) / Z; the demonstrations' likelihood under it is maximised over psi. Its gradient needs the model's
visits. Dynamic programming computes them (`exact`), or importance weights estimate them from trajectories of a policy
that is trained beside the reward, by RL on r_psi - log pi at temperature 1 (`sampled`):

    max_psi E_expert[r_psi(tau)] - log Z(psi),   gradient = E_expert[grad r_psi] - E_model[grad r_psi]
    E_model[grad r_psi] ~ sum_j w_j grad r_psi(tau_j),   w_j ~ exp(r_psi(tau_j)) / prod_t pi(a_t|s_t),   sum_j w_j = 1

There are two such models, and every figure belongs to one of them. They are equal under deterministic dynamics with one
start state at gamma 1, and not elsewhere:

    non-causal  p(tau) ~ d(s_0) prod_t P(s_t+1|s_t,a_t) exp(r(tau)). Luck is reweighted too: no policy may reach this.
                `log_partition`, `importance_weights` and so the sampled estimator. Ziebart et al. 2008, AAAI
    causal      p(tau) = d(s_0) prod_t P(s_t+1|s_t,a_t) pi(a_t|s_t), pi = exp(Q - V), V = logsumexp_a Q; log Z is V_0.
                `soft_value_iteration`, the demonstrator, the exact estimator, all evaluation. Ziebart et al. 2010, ICML

The sampled estimator is Guided Cost Learning, Finn, Levine and Abbeel 2016 (arXiv:1603.00448), with a reward for a cost
and another max-ent RL step: soft Q-learning on tables, an actor-critic with clipped ratios (PPO) in control.

    python maxent_irl.py                                        # laptop: the lecture's grid, both estimators, compared
    python maxent_irl.py --env-id FrozenLake-v1 --env-kwargs '{"is_slippery": false}' --reward-scale 10
    python maxent_irl.py --env-id CartPole-v1 --demos CartPole-v1.npz --num-demos 10 --max-steps 200
    python maxent_irl.py --env-id Pendulum-v1 --gamma 0.95 --gae-lambda 0.9   # makes its expert first
    python maxent_irl.py --resume runs/<run folder>             # goes on exactly where the last checkpoint stood

Shapes with a table: S states, A actions, K successors, H horizon, N trajectories; `policy[t]` (S, A) is that of step t.
In control, as in gail.py: S steps of N environments; B = the steps of them that are data, flattened; D numbers of an
observation; A actions, or numbers of one; F features of a step; n demonstrated pairs, or segments. `mask`, (N, H) or
(S, N), is True where a step was taken.

Deliberately not here: images, several processes, off-policy RL in control, demonstrations in the set of samples (their
density under the demonstrator is unknown), features that depend on the whole trajectory. See
HumanCompatibleAI/imitation.
"""

import importlib
import json
import math
import os
import signal
import sys
import time
import warnings
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
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange


@dataclass
class Args:
    """Maximum-entropy inverse RL: recover a reward from demonstrations, exactly (with a table) or from samples."""

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

    # ---- maximum-entropy inverse RL
    env_id: str | None = None
    """Gymnasium environment: discrete with a transition table env.unwrapped.P, or with Box observations (control).
    None: the lecture's grid, a table."""
    env_kwargs: str = "{}"
    """Its keyword arguments, as JSON ('{"is_slippery": false}'); of the lecture's grid: slip."""
    map_size: int | None = None
    """FrozenLake: the side of a map that its own generator draws from --seed."""
    estimator: Literal["exact", "sampled", "both"] | None = None
    """Dynamic programming, importance-weighted samples, or one after the other.
    None: both where there is a table, else sampled."""
    demos: str | None = None
    """Demonstrations: .npz with obs and act, concatenated over episodes, and lengths; rew where it is known.
    None: made here, by the soft-optimal policy (tables) or a policy trained on the true reward (control)."""
    num_demos: int | None = None
    """Demonstrated episodes that are imitated, the first ones. None: all of a file's.
    Of those made here, None is 10 in control, and with a table the expert's exact visits, as if of infinitely many."""
    reward_scale: float = 1.0
    """Times the true reward, for the demonstrator only.
    Its temperature is 1, so it is hardly better than chance for small rewards. A large one (1000) makes it optimal."""
    expert_steps: int = 150
    """Control: policy updates on the true reward by which the demonstrator is made."""
    reward_model: Literal["linear", "neural"] | None = None
    """A weight for each feature (of a table: for each entry), or two hidden layers (of a table: one).
    None: linear with a table, neural in control."""
    reward_inputs: Literal["state_action", "state", "next_state"] | None = None
    """What the reward sees. None: next_state with a table, state_action in control.
    next_state (tables only): the state that is reached, in expectation over the dynamics, the choice for --transfer."""
    hidden_size: int = 64
    """Units of each hidden layer of reward, policy and value network."""
    gamma: float | None = None
    """Discount of soft values, visits and demonstrations alike.
    None: 1 with a table; 0.99 in control, where it is the actor-critic's only and visits are not discounted."""
    horizon: int | None = None
    """H: steps of an episode. None: the environment's time limit, 10 for the lecture's grid."""
    transfer: str | None = None
    """Tables: other --env-kwargs, as JSON, under which the learned reward is evaluated too: another slip or map."""
    exact_tolerance: float = 1e-4
    """Tables: the exact estimator ends when no reward entry's gradient, a difference of visits, is larger."""
    exact_steps: int = 50
    """Tables: the exact estimator ends after so many times 20 iterations of L-BFGS at the latest."""
    max_steps: int = 300
    """Iterations of the sampled estimator: trajectories, one step of the reward, one of the policy."""
    eval_steps: int = 100
    """Steps from one evaluation to the next; there is always one after training."""
    eval_episodes: int = 50
    """Control: episodes that a return is the mean of (with a table, it is computed)."""
    num_trajectories: int | None = None
    """N: trajectories an iteration. None: 512 with a table, 16 in control."""
    learning_rate: float | None = None
    """Peak learning rate of the reward (Adam). None: with a table 0.3 (linear) or 0.1 (neural), 1e-3 in control."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rates' decay."""
    min_lr_rate: float = 0.1
    """Share of the peak learning rates that the decay reaches exactly at the last step."""
    reward_l2: float | None = None
    """Coefficient of the sum of squared rewards in the reward's loss. None: 0 with a table, 0.01 in control.
    The rewards are the table's entries, or those of an episode's steps."""
    fusion_iterations: int = 1
    """Samples of so many iterations are weighted together (Finn et al. 2016).
    The density under the weights is the mixture of their policies."""
    segment_length: int | None = None
    """Control: weights are of segments of so many steps; 0: of whole episodes, the formula above. None: 10.
    The critic says what comes before a segment and after it, as in path consistency learning (arXiv:1702.08892).
    So weights are even for the soft-optimal policy. The shorter, the more the policy is trusted to be that."""
    soft_q_rate: float = 0.5
    """Tables: step size of soft Q-learning."""
    policy_learning_rate: float = 1e-3
    """Control: peak learning rate of actor and critic (Adam, eps 1e-5)."""
    gae_lambda: float = 0.95
    """Control: lambda of the generalised advantage estimator (arXiv:1506.02438)."""
    update_epochs: int = 5
    """Control: passes over the trajectories in one policy step (PPO, arXiv:1707.06347)."""
    minibatch_size: int = 512
    """Control: steps in one gradient step of the policy."""
    epsilon: float = 0.2
    """Control: the policy's ratio is clipped to 1 +- epsilon (PPO)."""
    max_grad_norm: float = 0.5
    """Control: policy gradients with a larger global norm are scaled down to it."""


def bad_input(message: str) -> NoReturn:
    """Say what is wrong in one sentence and exit with code 2, without a traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- environments and demonstrations ---------------------------------------------------------------------------------


LECTURE_GRID = ("C.B.", "..T.", "....", "...M")  # the cat's start, a broom, a bathtub, a piece of meat
LECTURE_REWARDS = {"M": 100.0, "B": -1.0, "T": -10.0}  # on arrival; the meat ends the episode
LECTURE_HORIZON = 10
DENSE_ENTRIES = 10**6  # a larger transition (S, A, S) is kept sparse: it would be mostly zeros


def lecture_moves(slip: float = 0.0) -> dict:
    """The lecture's grid as Gymnasium writes a table, P[state][action] = [(probability, next state, reward, end)].
    Moves: left, right, up, down; with probability slip any of the four; one that would leave the grid stays."""
    height, width = len(LECTURE_GRID), len(LECTURE_GRID[0])
    table: dict = {}
    for s in range(height * width):
        y, x = divmod(s, width)
        reached = [(y, max(x - 1, 0)), (y, min(x + 1, width - 1)), (max(y - 1, 0), x), (min(y + 1, height - 1), x)]
        cells = [LECTURE_GRID[y][x] for y, x in reached]
        ends = [(width * y + x, LECTURE_REWARDS.get(cell, 0.0), cell == "M") for (y, x), cell in zip(reached, cells)]
        table[s] = {a: [(slip / 4 + (1 - slip) * (a == b), *end) for b, end in enumerate(ends)] for a in range(4)}
    return table


def read_table(moves: dict, initial: Tensor, shape: tuple[int, int]) -> dict:
    """A table P as tensors: `transition` and `arrival` (S*A, S), dense or CSR, `reward` (S, A), its mean on arrival in
    each state `cell_reward` (S,), `initial` (S,), the states `ended` (S, 1) that are ends themselves, and the picture's
    `shape`. A move that ends the episode, or leads to such a state, leads out of the table: it is left out of
    `transition`, whose rows then sum to less than 1, and counts in `arrival`."""
    S, A = len(moves), len(moves[0])
    rows, columns, probabilities, rewards, ends = (
        torch.tensor(x) for x in zip(*(
            (s * A + a, int(s2), float(p), float(r), bool(end))
            for s in range(S) for a in range(A) for p, s2, r, end in moves[s][a]
        ))
    )  # (moves,)  # fmt: skip
    probabilities, rewards = probabilities.double(), rewards.double()
    total = torch.zeros(S * A, dtype=torch.float64).index_add_(0, rows, probabilities)
    if (probabilities < 0).any() or not torch.allclose(total, torch.ones_like(total)):
        bad_input("--env-id: a move in its table has probabilities that are negative or do not add up to 1")
    if not (initial.double().sum() - 1).abs() < 1e-6:
        bad_input("--env-id: its table has no state to start from")

    def matrix(kept: Tensor) -> Tensor:
        index, size = torch.stack([rows[kept], columns[kept]]), (S * A, S)
        coo = torch.sparse_coo_tensor(index, probabilities[kept], size, check_invariants=True).coalesce()
        return as_matrix(coo.to_dense() if S * A * S <= DENSE_ENTRIES else coo)

    reward = torch.zeros(S * A, dtype=torch.float64).index_add_(0, rows, probabilities * rewards).view(S, A)
    arrival = matrix(torch.ones_like(ends))
    ended = ended_states(reward, arrival)  # (S, 1)
    ends |= ended[columns, 0]  # by the true reward, and so under every learned one
    arrivals = torch.zeros(S, dtype=torch.float64).index_add_(0, columns, probabilities)
    cell_reward = torch.zeros(S, dtype=torch.float64).index_add_(0, columns, probabilities * rewards)
    return {
        "transition": matrix(~ends), "arrival": arrival, "initial": initial.double(), "reward": reward, "ended": ended,
        "cell_reward": cell_reward / arrivals.clamp(min=1e-12), "shape": shape,
    }  # fmt: skip


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


def load_table(env_id: str | None, env_kwargs: dict) -> tuple[dict | None, int | None]:
    """The environment's transition table, where it has one, and its time limit."""
    if env_id is None:
        slip = env_kwargs.get("slip", 0.0)
        if set(env_kwargs) - {"slip"} or not (isinstance(slip, (int, float)) and 0 <= slip <= 1):
            bad_input(f"the lecture's grid takes a slip from 0 to 1, not {env_kwargs}; --env-id names another")
        grid = "".join(LECTURE_GRID)
        initial = torch.tensor([float(cell == "C") for cell in grid])
        shape = len(LECTURE_GRID), len(LECTURE_GRID[0])
        return read_table(lecture_moves(**env_kwargs), initial, shape), LECTURE_HORIZON
    envs = make_envs(env_id, 1, **env_kwargs)
    env = getattr(envs, "envs", [envs])[0]  # its own vectorised code has no single ones, nor a table
    limit, inner = env.spec.max_episode_steps, env.unwrapped
    if not (hasattr(inner, "P") and isinstance(env.observation_space, Discrete)):
        envs.close()
        return None, limit
    S = int(env.observation_space.n)
    initial = getattr(inner, "initial_state_distrib", None)
    if initial is None:  # seeds 0 to 999 say where episodes start
        starts = torch.tensor([int(env.reset(seed=i)[0]) for i in range(1000)])
        initial = torch.bincount(starts, minlength=S) / len(starts)
    envs.close()
    shape = inner.desc.shape if hasattr(inner, "desc") else getattr(inner, "shape", (1, S))
    shape = shape if math.prod(shape) == S else (1, S)  # Taxi's map does not show where the passenger is
    return read_table(inner.P, torch.as_tensor(initial), tuple(shape)), limit


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


# ---- reward and policy -----------------------------------------------------------------------------------------------


class TableReward(nn.Module):
    """A reward (S, outputs) of a table: an entry for each state, or for each state and action (outputs = A).

    linear: entries are weights over the root of the expert's visits (S, outputs), + 0.1: the curvature of log Z grows
    with the visits, and L-BFGS needs a third of the iterations. neural: one hidden layer over the one-hot state."""

    def __init__(self, model: str, visits: Tensor, hidden_size: int) -> None:
        super().__init__()
        S, outputs = visits.shape
        self.register_buffer("scale", (visits.double() + 0.1) ** -0.5)
        self.body = None
        if model == "linear":
            self.weight = nn.Parameter(torch.zeros(S, outputs, dtype=torch.float64))
        else:
            self.weight = nn.Parameter(torch.randn(S, hidden_size, dtype=torch.float64))
            self.body = nn.Sequential(nn.Tanh(), nn.Linear(hidden_size, outputs)).double()

    def forward(self) -> Tensor:
        return self.weight * self.scale if self.body is None else self.body(self.weight)


def reward_of_table(entries: Tensor, inputs: str, arrival: Tensor, num_actions: int) -> Tensor:
    """The reward (S, A) from entries (S, 1) or (S, A). For next_state it is their mean over the states that a move may
    lead to: linear in the entries, a function of state and action, and under other dynamics another one."""
    if inputs == "next_state":
        return (arrival @ entries[:, 0]).view(-1, num_actions)
    return entries.expand(-1, num_actions)


def mlp(inputs: int, outputs: int, hidden_size: int, scale: float) -> nn.Sequential:
    """Two hidden layers of tanh; the last layer's weights are scaled down, so that a policy starts almost uniform."""
    layers = [nn.Linear(inputs, hidden_size), nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, outputs)]
    with torch.no_grad():
        layers[-1].weight.mul_(scale)
        layers[-1].bias.zero_()
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


LOG_STD_RANGE = (-5.0, 2.0)  # of Gaussians before tanh, as in SAC (Haarnoja et al. 2018), whose lower bound is -20


class ActorCritic(nn.Module):
    """Separate networks. The actor's outputs, which are what calling this returns: logits (Discrete); or means and log
    standard deviations (Box) of u, where tanh(u) is an action scaled so that the Box is [-1, 1]. A squashed action has
    a largest entropy, log 2 a dimension; for a clipped one the variance would grow for ever."""

    def __init__(self, num_inputs: int, action_space: gymnasium.Space, hidden_size: int) -> None:
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        outputs = int(action_space.n) if self.discrete else 2 * action_space.shape[0]
        self.actor = mlp(num_inputs, outputs, hidden_size, 0.01)
        self.critic = mlp(num_inputs, 1, hidden_size, 1.0)

    def forward(self, obs: Tensor) -> Tensor:
        outputs = self.actor(obs)  # (..., A), or (..., 2A)
        if self.discrete:
            return outputs
        mean, log_std = outputs.chunk(2, -1)
        return torch.cat([mean, log_std.clamp(*LOG_STD_RANGE)], -1)

    def select(self, outputs: Tensor, mode: str, generator: torch.Generator) -> Tensor:
        """Actions by the policy ("sample"), its mode ("greedy"), or uniform ones ("uniform"): indices, or u."""
        if self.discrete:
            if mode == "greedy":
                return outputs.argmax(-1)
            weights = outputs.softmax(-1) if mode == "sample" else torch.ones_like(outputs)
            return torch.multinomial(weights, 1, generator=generator)[:, 0]
        mean, log_std = outputs.chunk(2, -1)
        if mode == "uniform":
            return (2 * torch.rand(mean.shape, generator=generator) - 1).clamp(-0.999, 0.999).atanh()
        return mean + log_std.exp() * torch.randn(mean.shape, generator=generator) if mode == "sample" else mean

    def unit(self, actions: Tensor) -> Tensor:
        """What the environment makes of selected actions: indices stay, others are squashed to [-1, 1]."""
        return actions if self.discrete else actions.tanh()

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """log pi(a|s) (...) of indices (...); or of tanh(u), from u (..., A), as tanh's inverse would lose it."""
        if self.discrete:
            return outputs.log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        mean, log_std = outputs.chunk(2, -1)
        normal = -0.5 * ((actions - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        return (normal - 2 * (math.log(2) - actions - F.softplus(-2 * actions))).sum(-1)  # log tanh'(u), stable


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


def lr_factor(step: int, total_steps: int, warmup_steps: int, lr_scheduler_type: str, min_lr_rate: float) -> float:
    """Learning rate of optimizer step 0..total_steps-1 as a share of its peak. It decays to exactly min_lr_rate at the
    last step, if there are at least two steps after the warm-up and it is not constant."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    decay = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[lr_scheduler_type]
    return 1 - (1 - min_lr_rate) * decay


def as_matrix(transition: Tensor) -> Tensor:
    """Transition (S, A, S), or sparse (S*A, S), as a matrix (S*A, S), float64: dense, or CSR (20 x as fast as COO)."""
    if transition.layout == torch.strided:
        return transition.reshape(-1, transition.shape[-1]).double()
    if transition.layout == torch.sparse_csr and transition.dtype == torch.float64:
        return transition
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state"
        return transition.double().to_sparse_csr()


def transposed(matrix: Tensor) -> Tensor:
    """The transposed matrix, CSR where that was."""
    return matrix.t() if matrix.layout == torch.strided else matrix.t().to_sparse_csr()


def ended_states(reward: Tensor, matrix: Tensor) -> Tensor:
    """(S, 1), True for states that no action leaves and that have no true reward: the episode has ended, and nothing is
    left to decide. A reward of -log A a step cancels the entropy log A that logsumexp would count for them."""
    S, A = reward.shape
    coo = matrix.to_sparse_coo().coalesce()
    rows, columns = coo.indices()
    stay = torch.where(rows // A == columns, coo.values(), 0.0)  # (entries,)
    stay = torch.zeros(S * A, dtype=torch.float64, device=rows.device).index_add_(0, rows, stay).view(S, A)
    return ((stay > 1 - 1e-9) & (reward == 0)).all(1, keepdim=True)


def soft_value_iteration(
    reward: Tensor, transition: Tensor, gamma: float, horizon: int, ended: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The causal model's policy (H, S, A) and values (H+1, S): Q_t = r + gamma P V_t+1, V_t = logsumexp_a Q_t, V_H = 0
    and pi_t = exp(Q_t - V_t) (Ziebart et al. 2010), in float64 and in logarithms throughout.

    reward (S, A); transition (S, A, S), or sparse (S*A, S). Where a row sums to less than 1, the rest ends the episode:
    a move to an absorbing state without reward or entropy. Such a state may also stand in the table: ended (S, 1) says
    which. None: those that no action leaves and that have no reward: right for a true reward, not for a learned one,
    which may be 0 by chance."""
    S, A = reward.shape
    matrix = as_matrix(transition)
    ended = ended_states(reward, matrix) if ended is None else ended
    reward = torch.where(ended, -math.log(A), reward.double())
    policy, values = [], [reward.new_zeros(S)]  # of the last step first
    for _ in range(horizon):
        q = reward + gamma * (matrix @ values[-1]).view(S, A)  # (S, A)
        values.append(q.logsumexp(1))  # (S,)
        policy.append((q - values[-1][:, None]).exp_())
    return torch.stack(policy[::-1]), torch.stack(values[::-1])


def occupancy(policy: Tensor, transition: Tensor, initial: Tensor, gamma: float) -> Tensor:
    """Visits (S, A) of a policy (H, S, A) from d = initial (S,): sum_t gamma^t P(s_t = s, a_t = a) over H steps."""
    backward = transposed(as_matrix(transition))  # (S, S*A)
    visits, state = torch.zeros_like(policy[0]), initial.double()
    for t in range(len(policy)):
        visited = policy[t] * state[:, None]  # (S, A)
        visits = visits + gamma**t * visited
        state = backward @ visited.flatten()  # (S,)
    return visits


def successors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row of (S*A, S) its next states and the logarithms of their probabilities (S*A, K), filled up with
    probability 0; the last column is the end, the state S."""
    coo = matrix.to_sparse_coo().coalesce()
    (rows, columns), probabilities = coo.indices(), coo.values()
    counts = torch.bincount(rows, minlength=matrix.shape[0])  # (S*A,)
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = (matrix.shape[0], int(counts.max()) + 1)
    states = torch.full(shape, matrix.shape[1], device=rows.device)  # (S*A, K)
    logprobs = torch.full(shape, -torch.inf, dtype=torch.float64, device=rows.device)  # (S*A, K)
    states[rows, place], logprobs[rows, place] = columns, probabilities.log()
    end = 1 - torch.zeros_like(logprobs[:, 0]).index_add_(0, rows, probabilities)  # (S*A,)
    logprobs[:, -1] = torch.where(end > 1e-6, end, 0.0).log()  # less is the rounding of a table in fp32
    return states, logprobs


def log_partition(
    reward: Tensor, transition: Tensor, initial: Tensor, horizon: int, gamma: float = 1.0, ended: Tensor | None = None
) -> Tensor:
    """log Z of the non-causal model: the sum over all trajectories of d(s_0) prod_t P(s_t+1|s_t,a_t) exp(gamma^t r_t)
    (Ziebart et al. 2008), in logarithms. Its gradient with respect to the reward (S, A) are the model's visits.
    transition and ends of episodes as in soft_value_iteration."""
    S, A = reward.shape
    matrix = as_matrix(transition)
    states, logprobs = successors(matrix)  # (S*A, K)
    reward, ended = reward.double(), ended_states(reward, matrix) if ended is None else ended
    log_z = reward.new_zeros(S)
    for t in reversed(range(horizon)):
        following = (logprobs + F.pad(log_z, (0, 1))[states]).logsumexp(1).view(S, A)  # (S, A); an end adds log 1
        log_z = (torch.where(ended, -math.log(A), gamma**t * reward) + following).logsumexp(1)  # (S,)
    return (initial.double().log() + log_z).logsumexp(0)


def importance_weights(returns: Tensor, logprobs: Tensor) -> Tensor:
    """Self-normalised weights (N,) of trajectories drawn with log-probability logprobs (N,), summed over time, towards
    the non-causal model: softmax_j(r(tau_j) - log pi(tau_j)). Dynamics cancel; so does a constant in the reward."""
    weights = (returns.double() - logprobs.double()).softmax(0)  # fp32 would round sums of 1e4 to 1e-3
    return weights.to(torch.promote_types(returns.dtype, torch.float32))


def remember(replay: Tensor, transitions: Tensor) -> Tensor:
    """A replay memory (u, 2), distinct transitions (s * A + a) * (S + 1) + s' with how often they were seen, after the
    transitions (n,) were seen too."""
    keys, place = torch.unique(torch.cat([replay[:, 0], transitions]), return_inverse=True)
    counts = torch.cat([replay[:, 1], torch.ones_like(transitions)])
    return torch.stack([keys, torch.zeros_like(keys).index_add_(0, place, counts)], 1)


def soft_q_step(q: Tensor, reward: Tensor, replay: Tensor, gamma: float, rate: float) -> Tensor:
    """Soft Q-learning on a replay memory (u, 2): Q_t(s, a) moves towards the mean of r + gamma V_t+1(s'), from the last
    step t to the first, so that what a step learned is used for the one before it. Dynamics are the same at every step:
    each transition teaches all of them, under the newest reward, or an action that was once worse would never be tried
    again. s' = S is an end. Returns the new Q (H, S, A)."""
    q, (H, S, A) = q.clone(), q.shape
    rows, columns = replay[:, 0] // (S + 1), replay[:, 0] % (S + 1)  # (u,)
    counts = torch.bincount(rows, replay[:, 1].double(), S * A)  # (S*A,)
    share = replay[:, 1] / counts[rows]  # (u,)
    value = q.new_zeros(S + 1)  # after the last step, and after an end
    for t in reversed(range(H)):
        following = torch.bincount(rows, share * value[columns], S * A).view(S, A)
        q[t] += torch.where(counts.view(S, A) > 0, rate * (reward + gamma * following - q[t]), 0.0)
        value[:S] = q[t].logsumexp(1)
    return q


def value_differences(values: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """(S+1, N) -> gamma V(s') - V(s) (S, N), whose discounted sum over L steps is gamma^L V(end) - V(start)."""
    return gamma * torch.where(terminated, 0.0, values[1:]) - values[:-1]


def segment_sums(x: Tensor, length: int) -> Tensor:
    """(S, N) -> (segments,): sums over segments of so many steps, of the first trajectory first."""
    return F.pad(x.t(), (0, -len(x) % length)).reshape(-1, length).sum(1)


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


def actor_critic_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, values: Tensor, returns: Tensor, epsilon: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss (PPO) and half the squared error of the values, each (b,). No entropy bonus: the entropy
    is in the rewards."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    unclipped, clipped = -ratio * advantages, -ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    policy_loss = torch.maximum(unclipped, clipped).mean()
    value_loss = 0.5 * (values - returns).square().mean()
    stats = {
        "losses/policy_loss": policy_loss, "losses/value_loss": value_loss,
        "policy/approxkl_avg": (ratio - 1 - log_ratio).mean(),  # k3: how far the policy is from the rollout's
        "policy/clipfrac_avg": (clipped > unclipped).float().mean(),
    }  # fmt: skip
    return policy_loss + value_loss, {name: x.detach() for name, x in stats.items()}


# ---- trajectories ----------------------------------------------------------------------------------------------------


# Seeds of the environments' episodes; those of training count from 0.
EXPERT_SEEDS, DEMO_SEEDS, UNIFORM_SEEDS, EVAL_SEEDS = (k * 10**8 for k in range(1, 5))


def sample_table(
    policy: Tensor, successor_states: Tensor, successor_logprobs: Tensor, initial: Tensor, count: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Trajectories of a policy (H, S, A) in a table: obs, next_obs, act, logprobs and mask, each (N, H)."""
    H, S, A = policy.shape
    state = torch.multinomial(initial, count, True, generator=generator)  # (N,)
    obs, next_obs, act = (torch.zeros(count, H, dtype=torch.long) for _ in range(3))  # (N, H)
    logprobs = torch.zeros(count, H, dtype=torch.float64)  # (N, H)
    mask = torch.zeros(count, H, dtype=torch.bool)  # (N, H)
    for t in range(H):
        live = (state < S).nonzero()[:, 0]  # (n,)
        if len(live) == 0:
            break
        probabilities = policy[t, state[live]]  # (n, A)
        action = torch.multinomial(probabilities, 1, generator=generator)  # (n, 1)
        obs[live, t], act[live, t], mask[live, t] = state[live], action[:, 0], True
        logprobs[live, t] = probabilities.gather(1, action)[:, 0].log()
        row = state[live] * A + action[:, 0]
        place = torch.multinomial(successor_logprobs[row].exp(), 1, generator=generator)  # (n, 1)
        state[live] = next_obs[live, t] = successor_states[row].gather(1, place)[:, 0]
    return {"obs": obs, "next_obs": next_obs, "act": act, "logprobs": logprobs, "mask": mask}


def visit_counts(states: Tensor, actions: Tensor, mask: Tensor, gamma: float, shape: tuple[int, int]) -> Tensor:
    """Mean visits (S, A) of trajectories (N, T), discounted as those of occupancy."""
    discounts = gamma ** torch.arange(mask.shape[1], dtype=torch.float64) * mask  # (N, T)
    index = (states * shape[1] + actions).flatten()
    return torch.bincount(index, discounts.flatten(), math.prod(shape)).view(shape) / len(mask)


def table_demonstrations(
    table: dict, path: str | None, num_demos: int | None, reward_scale: float, gamma: float, horizon: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Visits (S, A) to learn from, and the expert's own: they differ where num_demos episodes are drawn from it."""
    S, A = table["reward"].shape
    if path is not None:
        demos, _ = load_demos(path, num_demos, Discrete(S), Discrete(A))
        obs, act, mask = demos["obs"].long(), demos["act"].long(), demos["mask"]
        if mask.shape[1] > horizon:
            bad_input(f"--demos {path} has an episode of {mask.shape[1]} steps, and --horizon is {horizon}")
        visits = visit_counts(obs, act, mask, gamma, (S, A))
        return visits, visits
    policy, _ = soft_value_iteration(
        reward_scale * table["reward"], table["transition"], gamma, horizon, table["ended"]
    )
    visits = occupancy(policy, table["transition"], table["initial"], gamma)
    if num_demos is None:
        return visits, visits
    generator = torch.Generator().manual_seed(seed + DEMO_SEEDS)  # not the stream of the first iteration's samples
    demos = sample_table(policy, *successors(table["transition"]), table["initial"], num_demos, generator)
    return visit_counts(demos["obs"], demos["act"], demos["mask"], gamma, (S, A)), visits


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


def policy_step(
    policy: ActorCritic, optimizer: torch.optim.Optimizer, obs: Tensor, actions: Tensor, old_logprobs: Tensor,
    advantages: Tensor, returns: Tensor, epochs: int, minibatch_size: int, epsilon: float, max_grad_norm: float,
    generator: torch.Generator,
) -> dict[str, float]:
    """Passes over B steps in minibatches, each a gradient step of actor and critic; means of the logs over all."""
    columns, sums, count = (obs, actions, old_logprobs, advantages, returns), {}, 0
    for _ in range(epochs):
        for rows in torch.randperm(len(obs), generator=generator).to(obs.device).split(minibatch_size):
            if len(rows) < 2:
                continue  # one advantage has no standard deviation
            mb_obs, mb_actions, *mb = (x[rows] for x in columns)  # (b, ...)
            mb_logprobs, mb_values = policy.logprobs(policy(mb_obs), mb_actions), policy.critic(mb_obs)[:, 0]  # (b,)
            loss, stats = actor_critic_loss(mb_logprobs, mb[0], mb[1], mb_values, mb[2], epsilon)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
            optimizer.step()
            count += len(rows)
            sums = {name: sums.get(name, 0.0) + len(rows) * x for name, x in stats.items()}
    return {name: (x / count).item() for name, x in sums.items()}


def train_expert(
    envs: gymnasium.vector.VectorEnv, policy: ActorCritic, statistics: Tensor, horizon: int, steps: int,
    first_seed: int, reward_scale: float, gamma: float, gae_lambda: float, learning_rate: float, policy_flags: dict,
    generator: torch.Generator,
) -> None:
    """The same max-ent RL on the true reward, times reward_scale: main_control's loop without a learned reward."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate, eps=1e-5)
    bar = trange(steps, desc="expert")
    for step in bar:
        batch = rollout(envs, policy, statistics, horizon, first_seed + step * envs.num_envs, "sample", generator, True)
        mask, ends = batch["mask"], (batch["terminated"], batch["truncated"])
        obs, rewards = normalise(batch["obs"], statistics), reward_scale * batch["rew"] - batch["logprobs"]
        with torch.no_grad():
            values = policy.critic(obs)[..., 0]  # (S+1, N)
        advantages, returns = gae_episodic(rewards, values[:-1], values[1:], *ends, gamma, gae_lambda)  # (S, N)
        data = (x[mask] for x in (obs[:-1], batch["act"], batch["logprobs"], advantages, returns))  # (B, ...)
        policy_step(policy, optimizer, *data, generator=generator, **policy_flags)
        bar.set_postfix_str(f"return {mean_return_and_length(batch)[0]:.1f}")


def write_demos(path: Path, batch: dict[str, Tensor], policy: nn.Module, action_space: gymnasium.Space) -> None:
    """A rollout of one episode each, in the format of --demos."""
    batch = {name: x.cpu() for name, x in batch.items()}
    mask, act = batch["mask"].t(), space_actions(policy.unit(batch["act"]), action_space)  # mask (N, S)
    columns = {"obs": batch["obs"][:-1], "act": act, "rew": batch["rew"], "terminal": batch["terminated"]}
    columns = {name: x.transpose(0, 1)[mask].numpy() for name, x in columns.items()}
    np.savez(path, lengths=mask.sum(1).numpy(), **columns)


# ---- evaluation ------------------------------------------------------------------------------------------------------


HARD = 1e5  # times a reward: its soft-optimal policy is then the optimal one, ties evenly split
DIAGNOSTIC_ENTRIES = 10**6  # S*A*H up to which the non-causal model is solved for diagnostics: autograd keeps each step
DIAGNOSTIC_STEPS = 10  # from one train/gradient_cosine to the next: it takes half as long as a step


def noncausal_visits(reward: Tensor, table: dict, gamma: float, horizon: int) -> Tensor:
    """Visits (S, A) of the non-causal model: the gradient of its log Z."""
    reward = reward.detach().requires_grad_()
    log_z = log_partition(reward, table["transition"], table["initial"], horizon, gamma, table["ended"])
    return torch.autograd.grad(log_z, reward)[0]


def causal_visits(reward: Tensor, table: dict, gamma: float, horizon: int) -> Tensor:
    """Visits (S, A) of the causal model: those of the soft-optimal policy."""
    policy, _ = soft_value_iteration(reward, table["transition"], gamma, horizon, table["ended"])
    return occupancy(policy, table["transition"], table["initial"], gamma)


@torch.no_grad()
def evaluate_table(reward: Tensor, table: dict, expert_visits: Tensor, gamma: float, horizon: int) -> dict[str, float]:
    """How good, under the true reward, the policies are that are optimal for a learned reward (S, A): the soft-optimal
    one (temperature 1, the model's own) beside the expert, and the optimal one beside the best possible."""
    true_reward = table["reward"]
    uniform = torch.full_like(true_reward, 1 / true_reward.shape[1]).expand(horizon, -1, -1)  # (H, S, A)
    visits = {
        "expert": expert_visits, "random": occupancy(uniform, table["transition"], table["initial"], gamma),
        **{name: causal_visits(r, table, gamma, horizon)
           for name, r in {"soft": reward, "hard": HARD * reward, "best": HARD * true_reward}.items()},
    }  # fmt: skip
    returns = {name: (x * true_reward).sum().item() for name, x in visits.items()}
    margin = returns["expert"] - returns["random"]
    return {
        "expert_return": returns["expert"], "random_return": returns["random"], "return": returns["soft"],
        "expected_value_difference": returns["expert"] - returns["soft"],
        "normalized_score": (returns["soft"] - returns["random"]) / margin if margin else math.nan,
        "best_return": returns["best"], "optimal_return": returns["hard"],
        "optimal_value_difference": returns["best"] - returns["hard"],
        "occupancy_gap": (visits["soft"] - expert_visits).sum(1).abs().max().item(),
        "reward_correlation": torch.stack([reward, true_reward]).flatten(1).corrcoef()[0, 1].item(),
    }


def evaluate_control(
    envs: gymnasium.vector.VectorEnv, policy: ActorCritic, statistics: Tensor, horizon: int, seed: int,
    expert_return: float, random_return: float,
) -> dict[str, float]:
    """True returns of an episode of the policy in each environment, and of its mode."""
    results = {"expert_return": expert_return, "random_return": random_return}
    for suffix, mode in (("", "sample"), ("_greedy", "greedy")):
        generator = torch.Generator().manual_seed(seed)  # of its own: an evaluation does not change the training
        value, _ = mean_return_and_length(rollout(envs, policy, statistics, horizon, seed, mode, generator, True))
        score = (value - random_return) / (expert_return - random_return or math.nan)
        results |= {f"return{suffix}": value, f"normalized_score{suffix}": score}
    return results | {"expected_value_difference": expert_return - results["return"]}


def draw_maps(panels: dict[str, Tensor], shape: tuple[int, int]) -> Figure:
    """Maps (S,) of a table's states side by side: rewards and visits."""
    figure = Figure(figsize=(3.2 * len(panels), 3.2), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        image = axes.imshow(values.reshape(shape).numpy(), cmap="viridis", aspect="auto" if 1 in shape else "equal")
        axes.set(title=title, xticks=[], yticks=[])
        figure.colorbar(image, ax=axes, shrink=0.7)
    return figure


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


def check_irl_args(args: Args) -> tuple[dict, dict | None]:
    """Whatever the flags alone show to be wrong; --env-kwargs, with --map-size's map, and --transfer as objects."""
    check_ranges(
        args, ["save_steps", "map_size", "num_demos", "reward_scale", "hidden_size", "horizon", "exact_tolerance",
               "exact_steps", "max_steps", "eval_steps", "eval_episodes", "num_trajectories", "learning_rate",
               "fusion_iterations", "soft_q_rate", "policy_learning_rate", "update_epochs",
               "minibatch_size", "epsilon", "max_grad_norm", "expert_steps"],
        ["seed", "min_lr_rate", "gae_lambda", "reward_l2", "segment_length"],
    )  # fmt: skip
    # Seeds of episodes count from --seed * 10**9, and must fit 63 bits; one advantage has no standard deviation
    if args.seed >= 2**33 or args.minibatch_size < 2:
        bad_input(f"--seed {args.seed} must be below 2**33, and --minibatch-size {args.minibatch_size} at least 2")
    if args.gamma is not None and not 0 < args.gamma <= 1:
        bad_input(f"--gamma must be in (0, 1], not {args.gamma}")
    if args.gae_lambda > 1 or args.soft_q_rate > 1:
        bad_input(f"--gae-lambda {args.gae_lambda} and --soft-q-rate {args.soft_q_rate} must be at most 1")
    parsed = []
    for flag, text in (("--env-kwargs", args.env_kwargs), ("--transfer", args.transfer)):
        try:
            parsed.append(None if text is None else json.loads(text))
        except ValueError as error:
            bad_input(f"{flag} {text} is not JSON ({error})")
        if not isinstance(parsed[-1], (dict, type(None))):
            bad_input(f"{flag} {text} is not a JSON object")
    env_kwargs, transfer = parsed[0] or {}, parsed[1]
    if args.map_size is not None:
        if not (args.env_id or "").startswith("FrozenLake") or args.map_size < 2:
            bad_input(f"--map-size {args.map_size} draws maps of FrozenLake, of side 2 and more: --env-id must name it")
        from gymnasium.envs.toy_text.frozen_lake import generate_random_map

        env_kwargs = {"desc": generate_random_map(args.map_size, seed=args.seed), **env_kwargs}
    return env_kwargs, transfer


def reward_step(
    reward: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float, run_dir: Path, step: int
) -> float:
    """A gradient step of the reward; the gradient's norm. One that is not finite ends the run before the step."""
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in reward.parameters()]).item()
    if not math.isfinite(norm):
        bad_input(f"the reward's gradient in step {step + 1} is not finite; what {run_dir} holds is from before")
    optimizer.step()
    return norm


def finish_run(
    run_dir: Path, writer: SummaryWriter, step: int, found: dict[str, dict[str, float]], metrics: dict[str, float],
    rewards: dict[str, Tensor], policy: dict[str, Tensor],
) -> dict[str, float]:
    """Write what was found, by estimator, and print it. The keys without a prefix are the last estimator's."""
    for name, values in found.items():
        if len(found) > 1:
            metrics |= {f"eval/{name}/{key}": value for key, value in values.items()}
        metrics |= {f"eval/{key}": value for key, value in values.items()}
    save_tensors(run_dir / "reward.safetensors", rewards)
    save_tensors(run_dir / "policy.safetensors", policy)
    metrics = {name: None if x is None or not math.isfinite(x) else x for name, x in metrics.items()}  # JSON has no nan
    (run_dir / "summary.json").write_text(json.dumps(metrics, indent=2))
    for name, value in metrics.items():
        if name.startswith("eval/") and value is not None:
            writer.add_scalar(name, value, step)
    writer.close()
    for key in next(iter(found.values())):
        print(f"eval/{key}: " + ", ".join(f"{name} {values[key]:.4g}" for name, values in found.items()))
    print(run_dir)
    return metrics


LBFGS_ITERATIONS, LBFGS_HISTORY = 20, 100  # between two looks at the gradient; a history of 100 halves their number


def fit_exact(
    reward: TableReward, inputs: str, target_visits: Tensor, table: dict, gamma: float, horizon: int, reward_l2: float,
    tolerance: float, max_calls: int,
) -> tuple[float, float]:
    """Fit the reward to target_visits (S, A) in the causal model: L-BFGS on V_0 - E_expert[r], whose gradient with
    respect to the reward are differences of visits (Ziebart et al. 2010). Returns it and the largest gradient."""
    optimizer = torch.optim.LBFGS(
        reward.parameters(), max_iter=LBFGS_ITERATIONS, history_size=LBFGS_HISTORY, tolerance_grad=0,
        tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> tuple[float, float]:
        optimizer.zero_grad()
        entries = reward()  # (S, outputs)
        entries.retain_grad()
        rewards = reward_of_table(entries, inputs, table["arrival"], target_visits.shape[1])  # (S, A)
        with torch.no_grad():
            policy, values = soft_value_iteration(rewards, table["transition"], gamma, horizon, table["ended"])
            difference = occupancy(policy, table["transition"], table["initial"], gamma) - target_visits  # (S, A)
        penalty = reward_l2 * entries.square().sum()
        ((difference * rewards).sum() + penalty).backward()  # not the objective, but its gradient
        value = table["initial"] @ values[0] - (target_visits * rewards).sum() + penalty
        return value.item(), entries.grad.abs().max().item()

    bar = trange(max_calls, desc="exact")
    for call in bar:
        optimizer.step(lambda: objective()[0])
        loss, gap = objective()
        if not math.isfinite(loss):
            bad_input(f"the exact objective is not finite after {call + 1} times {LBFGS_ITERATIONS} iterations")
        bar.set_postfix_str(f"largest gradient {gap:.2g}")
        if gap <= tolerance:
            break
    bar.close()
    if gap > tolerance:
        print(f"exact: the largest gradient is {gap:.2g} after --exact-steps {max_calls}, not below {tolerance:g}")
    return loss, gap


def main_table(
    args: Args, table: dict, other: dict | None, horizon: int, state: dict | None, start_time: float
) -> dict[str, float]:
    """With a table: dynamic programming, and Guided Cost Learning with soft Q-learning for the policy. What stands in
    policy.safetensors are the soft-optimal policies (H, S, A) of the learned rewards, not the sampler's."""
    # ---- set-up
    S, A = table["reward"].shape
    gamma, N = args.gamma or 1.0, args.num_trajectories or 512
    inputs, model = args.reward_inputs or "next_state", args.reward_model or "linear"
    peak_lr, reward_l2 = args.learning_rate or (0.3 if model == "linear" else 0.1), args.reward_l2 or 0.0
    estimators = ("exact", "sampled") if args.estimator in (None, "both") else (args.estimator,)
    max_steps = args.max_steps if "sampled" in estimators else 0
    target_visits, expert_visits = table_demonstrations(
        table, args.demos, args.num_demos, args.reward_scale, gamma, horizon, args.seed
    )
    seen = {
        "next_state": (transposed(table["arrival"]) @ target_visits.flatten())[:, None],
        "state": target_visits.sum(1, keepdim=True), "state_action": target_visits,
    }[inputs]  # (S, outputs): how often the demonstrations show each entry  # fmt: skip
    modules = {}
    for name in estimators:
        torch.manual_seed(args.seed)
        modules[name] = TableReward(model, seen, args.hidden_size)
    task = (args.env_id or "lecture").replace(":", "-").replace("/", "-")
    run_dir = Path(args.resume or f"{args.output_dir}/{task}__{args.exp_name}__{args.seed}__{int(time.time())}")
    writer = open_run(args, run_dir, state["step"] if state is not None else 0)

    # ---- exact: the causal model
    if "exact" in estimators and state is None:
        loss, gap = fit_exact(
            modules["exact"], inputs, target_visits, table, gamma, horizon, reward_l2, args.exact_tolerance,
            args.exact_steps,
        )  # fmt: skip
        writer.add_scalar("exact/loss", loss, 0)
        writer.add_scalar("exact/gradient_max", gap, 0)

    # ---- sampled: the non-causal model, by Guided Cost Learning. Q starts at what it is without a reward, the entropy
    # log A of each later step: at 0, whatever was tried first would look better than the rest
    left = torch.tensor([sum(gamma**k for k in range(1, horizon - t)) for t in range(horizon)], dtype=torch.float64)
    q = (math.log(A) * left)[:, None, None].expand(-1, S, A)  # (H, S, A)
    replay = torch.zeros(0, 2, dtype=torch.long)
    stored: list[tuple[Tensor, dict]] = []  # the last policies' Q, each with its trajectories
    reward, generator = modules[estimators[-1]], torch.Generator().manual_seed(args.seed)  # exact alone: of no use
    optimizer = torch.optim.Adam(reward.parameters(), lr=peak_lr)
    first_step, env_steps, seconds_before = 0, 0, 0.0
    if state is not None:
        for name, module in modules.items():
            module.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        q, replay, stored = state["q"], state["replay"], state["stored"]
        first_step, env_steps, seconds_before = state["step"], state["env_steps"], state["seconds"]
    next_states, next_logprobs = successors(table["transition"])  # (S*A, K)
    discounts = gamma ** torch.arange(horizon, dtype=torch.float64)  # (H,)
    solvable = S * A * horizon <= DIAGNOSTIC_ENTRIES
    done = first_step

    def save() -> None:
        save_checkpoint(run_dir / "checkpoint.pt", {
            "step": done, **{name: module.state_dict() for name, module in modules.items()},
            "optimizer": optimizer.state_dict(), "q": q, "replay": replay, "stored": stored,
            "generator": generator.get_state(), "env_steps": env_steps,
            "seconds": seconds_before + time.time() - start_time,
        })  # fmt: skip

    if state is None:  # what comes before the loop may have taken long
        save()
    interrupts, old_handler = catch_ctrl_c()
    bar = trange(first_step, max_steps, initial=first_step, total=max_steps, desc="sampled", disable=not max_steps)
    for step in bar:
        # ---- rollout
        step_start = time.time()
        batch = sample_table(q.softmax(2), next_states, next_logprobs, table["initial"], N, generator)  # (N, H) each
        stored = [*stored, (q, batch)][-args.fusion_iterations :]

        # ---- weights: of the samples of all stored policies, drawn from their mixture (Finn et al. 2016)
        obs, act, mask = (torch.cat([x[name] for _, x in stored]) for name in ("obs", "act", "mask"))  # (M, H)
        logprobs = torch.stack([x.log_softmax(2)[torch.arange(horizon), obs, act] for x, _ in stored], 2)
        logprobs = (logprobs * mask[..., None]).sum(1).logsumexp(1) - math.log(len(stored))  # (M,)
        entries = reward()  # (S, outputs)
        learned = reward_of_table(entries, inputs, table["arrival"], A)  # (S, A)
        returns = (learned[obs, act] * discounts * mask).sum(1)  # (M,)
        weights = importance_weights(returns.detach(), logprobs)  # (M,)

        # ---- reward: a gradient step up E_expert[r] - log Z
        expert_reward = (target_visits * learned).sum()
        penalty = reward_l2 * entries.square().sum()
        loss = (weights * returns).sum() - expert_reward + penalty
        logs = {}
        if solvable and step % DIAGNOSTIC_STEPS == 0:  # against the exact visits of the non-causal model
            diagnostic_start, parameters = time.time(), list(reward.parameters())
            difference = noncausal_visits(learned, table, gamma, horizon) - target_visits  # (S, A)
            losses = loss, (difference * learned).sum() + penalty
            both = [torch.autograd.grad(x, parameters, retain_graph=True) for x in losses]
            both = (torch.cat([x.flatten() for x in gradient]) for gradient in both)
            logs["train/gradient_cosine"] = F.cosine_similarity(*both, 0).item()
            step_start += time.time() - diagnostic_start  # no part of the step's time
        lr = peak_lr * lr_factor(step, max_steps, 0, args.lr_scheduler_type, args.min_lr_rate)
        grad_norm = reward_step(reward, optimizer, loss, lr, run_dir, step)

        # ---- policy: a step of soft Q-learning on the new reward
        states, actions, arrived = (batch[name][batch["mask"]] for name in ("obs", "act", "next_obs"))  # (n,)
        replay = remember(replay, (states * A + actions) * (S + 1) + arrived)
        with torch.no_grad():
            learned = reward_of_table(reward(), inputs, table["arrival"], A)  # (S, A)
            q = soft_q_step(q, learned, replay, gamma, args.soft_q_rate)

        # ---- log
        done, env_steps = step + 1, env_steps + len(states)
        episodic_return = (table["reward"][batch["obs"], batch["act"]] * discounts * batch["mask"]).sum().item() / N
        size = weights.square().sum().reciprocal().item()  # effective sample size, 1 to M
        logs |= {
            "train/loss": loss.item(), "train/grad_norm": grad_norm, "train/expert_reward": expert_reward.item(),
            "train/policy_reward": returns.mean().item(), "train/effective_sample_size": size,
            "train/effective_sample_share": size / len(weights),
            "train/entropy": -batch["logprobs"][batch["mask"]].mean().item(),
            "charts/episodic_return": episodic_return, "charts/episodic_length": len(states) / N,
            "charts/env_steps": env_steps, "charts/learning_rate": lr,
            "charts/SPS": len(states) / (time.time() - step_start),
        }  # fmt: skip
        for name, x in logs.items():
            writer.add_scalar(name, x, done)
        bar.set_postfix_str(f"return {episodic_return:.2f}, effective samples {size:.1f}")

        # ---- evaluate, save
        if done % args.eval_steps == 0 and done < max_steps:
            for name, x in evaluate_table(learned, table, expert_visits, gamma, horizon).items():
                writer.add_scalar(f"eval/{name}", x, done)
        interrupted = bool(interrupts)
        if done % args.save_steps == 0 or done == max_steps or interrupted:
            save()
        if interrupted:
            break
    bar.close()
    signal.signal(signal.SIGINT, old_handler)
    if done < max_steps:
        print(f"stopped by Ctrl-C after step {done}; --resume {run_dir} goes on")
        raise SystemExit(130)

    # ---- the last evaluation, maps, results
    found, rewards, policies = {}, {}, {}
    metrics = {"seed": args.seed, "env_steps": env_steps}
    with torch.no_grad():
        for name, module in modules.items():
            entries = module()  # (S, outputs)
            rewards[name] = learned = reward_of_table(entries, inputs, table["arrival"], A)  # (S, A)
            rewards[f"{name}_entries"] = entries.clone()  # what other dynamics need
            policies[name], _ = soft_value_iteration(learned, table["transition"], gamma, horizon, table["ended"])
            found[name] = evaluate_table(learned, table, expert_visits, gamma, horizon)
            if other is not None:  # the same entries under other dynamics
                moved = reward_of_table(entries, inputs, other["arrival"], A)
                visits = causal_visits(args.reward_scale * other["reward"], other, gamma, horizon)
                results = evaluate_table(moved, other, visits, gamma, horizon)
                visits = occupancy(policies[name], other["transition"], other["initial"], gamma)
                results["old_policy_return"] = (visits * other["reward"]).sum().item()
                metrics |= {f"transfer/{name}/{key}": value for key, value in results.items()}
                shown = ("old_policy_return", "return", "optimal_return", "best_return")
                print(f"{name}, under {args.transfer}:", ", ".join(f"{key} {results[key]:.4g}" for key in shown))
            panels = {
                "true reward": table["cell_reward"],
                f"learned reward ({name})": entries[:, 0] if inputs == "next_state" else learned.mean(1),
                "expert's visits": expert_visits.sum(1),
                "learner's visits": causal_visits(learned, table, gamma, horizon).sum(1),
            }
            writer.add_figure(f"maps/{name}", draw_maps(panels, table["shape"]), done)
    if solvable:  # how far apart the two models are under these dynamics, for the demonstrator's reward
        r = args.reward_scale * table["reward"]
        apart = (causal_visits(r, table, gamma, horizon) - noncausal_visits(r, table, gamma, horizon)).sum(1)  # (S,)
        metrics["eval/causal_gap"] = apart.abs().sum().item()
        print(f"visits of the causal and the non-causal model differ by {metrics['eval/causal_gap']:.3g} in all")
    metrics["wall_seconds"] = seconds_before + time.time() - start_time
    return finish_run(run_dir, writer, done, found, metrics, rewards, policies)


def main_control(
    args: Args, env_kwargs: dict, horizon: int, device: torch.device, state: dict | None, start_time: float
) -> dict[str, float]:
    """Without a table: Guided Cost Learning with an actor-critic for the policy, saved as it is at the end."""
    # ---- set-up
    gamma, N = args.gamma or 0.99, args.num_trajectories or 16
    inputs, peak_lr = args.reward_inputs or "state_action", args.learning_rate or 1e-3
    reward_l2 = 0.01 if args.reward_l2 is None else args.reward_l2
    segment_length = 10 if args.segment_length is None else args.segment_length
    envs, eval_envs = (make_envs(args.env_id, count, **env_kwargs) for count in (N, args.eval_episodes))
    spaces = envs.single_observation_space, envs.single_action_space
    check_spaces(args.env_id, *spaces)
    num_actions = int(spaces[1].n) if isinstance(spaces[1], Discrete) else None
    if args.demos is not None:
        demos, expert_return = load_demos(args.demos, args.num_demos, *spaces)
        longest = demos["mask"].shape[1]
        if longest > horizon:
            bad_input(f"--demos {args.demos} has an episode of {longest} steps, and --horizon is {horizon}")
    task = args.env_id.replace(":", "-").replace("/", "-")
    run_dir = Path(args.resume or f"{args.output_dir}/{task}__{args.exp_name}__{args.seed}__{int(time.time())}")
    writer = open_run(args, run_dir, state["step"] if state is not None else 0)

    torch.manual_seed(args.seed)  # of the networks
    generator, first_seed = torch.Generator().manual_seed(args.seed), args.seed * 10**9
    D, A = spaces[0].shape[0], num_actions or spaces[1].shape[0]
    policy = ActorCritic(D, spaces[1], args.hidden_size).to(device)
    width = D if inputs == "state" else D + A
    reward = (nn.Linear(width, 1) if args.reward_model == "linear" else mlp(width, 1, args.hidden_size, 0.1)).to(device)
    optimizer = torch.optim.Adam(reward.parameters(), lr=peak_lr)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=args.policy_learning_rate, eps=1e-5)
    policy_flags = {
        "epochs": args.update_epochs, "minibatch_size": args.minibatch_size, "epsilon": args.epsilon,
        "max_grad_norm": args.max_grad_norm,
    }

    # ---- demonstrations
    if state is None:
        statistics = torch.stack([torch.zeros(D), torch.ones(D)]).to(device)  # (2, D)
        seed = first_seed + UNIFORM_SEEDS
        uniform = rollout(eval_envs, policy, statistics, horizon, seed, "uniform", generator, True)
        uniform_obs = uniform["obs"][:-1][uniform["mask"]]  # (steps, D)
        statistics = observation_statistics(uniform_obs, uniform_obs)
        if args.demos is None:
            expert = ActorCritic(D, spaces[1], args.hidden_size).to(device)
            train_expert(
                envs, expert, statistics, horizon, args.expert_steps, first_seed + EXPERT_SEEDS, args.reward_scale,
                gamma, args.gae_lambda, args.policy_learning_rate, policy_flags, generator,
            )
            demo_envs = make_envs(args.env_id, max(args.num_demos or 10, args.eval_episodes), **env_kwargs)
            seed = first_seed + DEMO_SEEDS
            batch = rollout(demo_envs, expert, statistics, horizon, seed, "sample", generator, True)
            demo_envs.close()
            write_demos(run_dir / "demos.npz", batch, expert, spaces[1])
    if args.demos is None:
        demos, expert_return = load_demos(str(run_dir / "demos.npz"), args.num_demos or 10, *spaces)
    expert_mask = demos["mask"]
    expert_obs = demos["obs"][expert_mask].to(device)  # (n, D)
    expert_actions = unit_actions(demos["act"][expert_mask], spaces[1]).to(device)  # (n,) or (n, A)

    # ---- normaliser, or the state of a checkpoint
    stored: list[tuple[dict, dict]] = []  # the last policies' actors, each with its trajectories
    env_steps, first_step, seconds_before = 0, 0, 0.0
    if state is None:
        # Fixed before training, as rewards and stored log-probabilities are. The expert's observations alone hardly
        # vary where it is good (a pole's angle), so those of uniform actions count as much.
        statistics = observation_statistics(expert_obs, uniform_obs)
        random_return, _ = mean_return_and_length(uniform)
    else:
        reward.load_state_dict(state["reward"])
        optimizer.load_state_dict(state["optimizer"])
        policy.load_state_dict(state["policy"])
        policy_optimizer.load_state_dict(state["policy_optimizer"])
        generator.set_state(state["generator"])
        statistics, random_return = state["statistics"].to(device), state["random_return"]
        stored = [tuple({name: x.to(device) for name, x in part.items()} for part in pair) for pair in state["stored"]]
        first_step, env_steps, seconds_before = state["step"], state["env_steps"], state["seconds"]

    def features(obs: Tensor, actions: Tensor) -> Tensor:
        """What the reward sees of normalised observations (..., D) and of indices or actions in [-1, 1]."""
        return obs if inputs == "state" else pair_features(obs, actions, num_actions)  # (..., F)

    expert_features = features(normalise(expert_obs, statistics), expert_actions)  # (n, F)
    evaluation = eval_envs, policy, statistics, horizon, first_seed + EVAL_SEEDS, expert_return, random_return

    def save() -> None:
        save_checkpoint(run_dir / "checkpoint.pt", {
            "step": done, "reward": reward.state_dict(), "optimizer": optimizer.state_dict(),
            "policy": policy.state_dict(), "policy_optimizer": policy_optimizer.state_dict(), "stored": stored,
            "generator": generator.get_state(), "statistics": statistics, "random_return": random_return,
            "env_steps": env_steps, "seconds": seconds_before + time.time() - start_time,
        })  # fmt: skip

    done = first_step
    if state is None:  # what comes before the loop may have taken long
        save()
    interrupts, old_handler = catch_ctrl_c()
    bar = trange(first_step, args.max_steps, initial=first_step, total=args.max_steps, desc="sampled")
    for step in bar:
        # ---- rollout
        step_start = time.time()
        batch = rollout(envs, policy, statistics, horizon, first_seed + step * N, "sample", generator, True)
        episodic_return, episodic_length = mean_return_and_length(batch)
        batch["obs"] = normalise(batch["obs"], statistics)  # (S+1, N, D), once for all that follows
        mask, ends = batch["mask"], (batch["terminated"], batch["truncated"])  # (S, N)
        S = len(mask)
        actor = {name: x.clone() for name, x in policy.state_dict().items() if name.startswith("actor")}
        stored = [*stored, (actor, batch)][-args.fusion_iterations :]

        # ---- weights: of the samples of all stored policies, drawn from their mixture (Finn et al. 2016; of segments,
        # whose log-probabilities are discounted, the mixture is an approximation)
        samples = {key: nn.utils.rnn.pad_sequence([x[key] for _, x in stored]).flatten(1, 2) for key in batch}
        obs, act, real = samples["obs"], samples["act"], samples["mask"]  # (T+1, M, D), (T, M, ...): M = policies x N
        T, M = real.shape
        all_features = features(obs[:-1], policy.unit(act))  # (T, M, F)
        rewards = reward(all_features)[..., 0]  # (T, M)
        with torch.no_grad():
            values = policy.critic(obs)[..., 0]  # (T+1, M)
            scores, discount = rewards.detach(), 1.0
            if segment_length:  # with what the steps before a segment and behind it are worth
                scores, discount = scores + value_differences(values, samples["terminated"], gamma), gamma
            outputs = (torch.func.functional_call(policy, actor, obs[:-1]) for actor, _ in stored)
            logprobs = [policy.logprobs(x, act) for x in outputs]  # (T, M) each
        length = segment_length or T
        discounts = discount ** (torch.arange(T, device=device) % length)[:, None]  # (T, 1)
        steps, returns, scores, *logprobs = (
            segment_sums(torch.where(real, x, 0.0), length)
            for x in (real, rewards, scores * discounts, *(x * discounts for x in logprobs))
        )  # (n,) each: segments
        logprobs = torch.stack(logprobs).logsumexp(0) - math.log(len(stored))  # (n,)
        weights = importance_weights(scores[steps > 0], logprobs[steps > 0])  # (n,), without segments behind an end

        # ---- reward: a gradient step up E_expert[r] - log Z, both of whole trajectories
        expert_rewards = reward(expert_features)  # (n, 1)
        expert_reward = expert_rewards.sum() / len(expert_mask)
        penalty = expert_rewards.square().sum() / len(expert_mask) + rewards[real].square().sum() / M
        loss = (weights * returns[steps > 0]).sum() * len(weights) / M - expert_reward + reward_l2 * penalty
        lr_share = lr_factor(step, args.max_steps, 0, args.lr_scheduler_type, args.min_lr_rate)
        grad_norm = reward_step(reward, optimizer, loss, peak_lr * lr_share, run_dir, step)

        # ---- advantage: of the new r - log pi, on this iteration's trajectories, which are the last ones
        with torch.no_grad():
            rewards = reward(all_features[:S, -N:])[..., 0] - batch["logprobs"]  # (S, N)
        values = values[: S + 1, -N:]  # (S+1, N)
        advantages, targets = gae_episodic(rewards, values[:-1], values[1:], *ends, gamma, args.gae_lambda)  # (S, N)
        advantages, targets = advantages[mask], targets[mask]  # (B,)
        explained = 1 - (targets - values[:-1][mask]).var() / targets.var().clamp(min=1e-8)

        # ---- policy: a step of max-ent RL
        obs, act, logprobs = batch["obs"][:-1][mask], batch["act"][mask], batch["logprobs"][mask]  # (B, ...)
        policy_optimizer.param_groups[0]["lr"] = args.policy_learning_rate * lr_share
        logs = policy_step(
            policy, policy_optimizer, obs, act, logprobs, advantages, targets, generator=generator, **policy_flags
        )

        # ---- log
        done, env_steps = step + 1, env_steps + len(obs)
        size = weights.square().sum().reciprocal().item()  # effective sample size, 1 to n
        logs |= {
            "train/loss": loss.item(), "train/grad_norm": grad_norm, "train/expert_reward": expert_reward.item(),
            "train/policy_reward": returns.sum().item() / M, "train/effective_sample_size": size,
            "train/effective_sample_share": size / len(weights), "train/entropy": -logprobs.mean().item(),
            "losses/explained_variance": explained.item(), "charts/episodic_return": episodic_return,
            "charts/episodic_length": episodic_length, "charts/env_steps": env_steps,
            "charts/learning_rate": peak_lr * lr_share, "charts/SPS": len(obs) / (time.time() - step_start),
        }  # fmt: skip
        for name, x in logs.items():
            writer.add_scalar(name, x, done)
        bar.set_postfix_str(f"return {episodic_return:.2f}, effective samples {size:.1f}")

        # ---- evaluate, save
        if done % args.eval_steps == 0 and done < args.max_steps:
            for name, x in evaluate_control(*evaluation).items():
                writer.add_scalar(f"eval/{name}", x, done)
        interrupted = bool(interrupts)
        if done % args.save_steps == 0 or done == args.max_steps or interrupted:
            save()
        if interrupted:
            break
    bar.close()
    signal.signal(signal.SIGINT, old_handler)
    if done < args.max_steps:
        print(f"stopped by Ctrl-C after step {done}; --resume {run_dir} goes on")
        raise SystemExit(130)

    # ---- the last evaluation, results
    results = evaluate_control(*evaluation)
    normaliser = {"observation_mean": statistics[0], "observation_std": statistics[1]}
    envs.close()
    eval_envs.close()
    metrics = {"seed": args.seed, "env_steps": env_steps, "wall_seconds": seconds_before + time.time() - start_time}
    return finish_run(
        run_dir, writer, done, {"sampled": results}, metrics, {**reward.state_dict(), **normaliser},
        {**policy.state_dict(), **normaliser},
    )


def main(args: Args) -> dict[str, float]:
    """Train, and return the final metrics, which are also in <run folder>/summary.json."""
    start_time, state = time.time(), None
    if args.resume is not None:
        args, state = load_run(args)
    device = choose_device(args)
    env_kwargs, transfer = check_irl_args(args)
    table, limit = load_table(args.env_id, env_kwargs)
    horizon = args.horizon or limit
    if horizon is None:
        bad_input(f"--env-id {args.env_id} has no time limit: --horizon must say how long an episode is")
    if table is None:
        for flag, needed in (
            (f"--estimator {args.estimator}", args.estimator in ("exact", "both")),
            ("--transfer", transfer is not None), ("--reward-inputs next_state", args.reward_inputs == "next_state"),
        ):  # fmt: skip
            if needed:
                bad_input(f"{flag} cannot do without a transition table, and {args.env_id} has no env.unwrapped.P")
        return main_control(args, env_kwargs, horizon, device, state, start_time)
    other = None
    if transfer is not None:
        other, _ = load_table(args.env_id, {**env_kwargs, **transfer})
        if other["reward"].shape != table["reward"].shape:
            shapes = tuple(other["reward"].shape), tuple(table["reward"].shape)
            bad_input(f"--transfer {args.transfer} has (states, actions) {shapes[0]}, not {shapes[1]}")
    return main_table(args, table, other, horizon, state, start_time)


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
