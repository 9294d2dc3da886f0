# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0", "safetensors==0.8.0",
#                 "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
"""Maximum-entropy inverse RL: recover a reward from demonstrations.

The model generates a trajectory tau with probability proportional to exp(r_psi(tau)). The demonstrations are most
likely when the model's expected visits match theirs. Those visits are computed by dynamic programming, or estimated
from samples of a policy trained alongside the reward by RL on r_psi - log pi (temperature 1).

    max_psi E_demos[r_psi(tau)] - log Z(psi),     gradient = E_demos[grad r_psi] - E_model[grad r_psi]

There are two such models, with s_0 drawn from d. They coincide if dynamics and s_0 are deterministic and gamma is 1:

    non-causal  p(tau) ~ d(s_0) prod_t P(s_t+1|s_t,a_t) exp(r(tau)), up to Z. It makes lucky starts and transitions more
                likely, which no policy can do. Ziebart et al. 2008, AAAI. In code: `log_partition`.
    causal      p(tau) = d(s_0) prod_t P(s_t+1|s_t,a_t) pi(a_t|s_t), pi = exp(Q - V), V = logsumexp_a Q; log Z = E_d[V].
                Ziebart et al. 2010, ICML. In code: `soft_value_iteration`; the demonstrator and evaluations use it.

"Tables" are environments with known transitions (env.unwrapped.P); they run on the CPU. All others are "control".
--estimator exact fits the causal model of a table by L-BFGS. --estimator sampled follows Guided Cost Learning (Finn et
al. 2016, arXiv:1603.00448), without demonstrations in the samples; its policy learns by soft Q-iteration on observed
counts (tables) or PPO (arXiv:1707.06347). E_model[.] becomes a sum over samples with weights w that sum to 1:

    tables      log w = r(tau) - sum_t log pi(a_t|s_t) per trajectory. Target: the non-causal model.
    control     log w = sum_t [r + gamma V(s_t+1) - V(s_t) - log pi(a_t|s_t)] per segment, V the critic. Target:
                p(start) prod_t P(s_t+1|s_t,a_t) exp(r + gamma V(s_t+1) - V(s_t)), up to Z: with deterministic dynamics
                and a soft-optimal V, the soft-optimal policy, whose samples get equal weights (arXiv:1702.08892).

    python maxent_irl.py                             # laptop: a cat's 4x4 grid, both estimators
    python maxent_irl.py --env-id FrozenLake-v1 --env-kwargs '{"is_slippery": false}' --reward-scale 10
    python maxent_irl.py --env-id CartPole-v1 --demos CartPole-v1.npz --num-demos 10 --max-steps 200
    python maxent_irl.py --resume runs/<run folder>  # continue exactly from the last checkpoint

Shapes: N environments, T steps each, B valid steps in all (`mask` (T, N)), b per minibatch; O observation features;
n demonstration steps; M weighted segments; A actions (or Box dimensions). Tables: S states, K successors, H steps.

Deliberately not here: images, several processes, off-policy RL, weighted demonstrations. See the imitation library.
"""

import importlib
import json
import math
import os
import sys
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Discrete
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange

DEFAULTS = {  # what None means in Args: (with a table, in control)
    "estimator": ("both", "sampled"), "reward_inputs": ("next_state", "state_action"), "gamma": (1.0, 0.99),
    "reward_l2": (0.0, 0.01), "learning_rate": (0.8, 1e-3), "num_trajectories": (512, 16),
}


@dataclass
class Args:
    """MaxEnt IRL: a reward from demonstrations. Table: env.unwrapped.P has the transitions. Control: all other envs."""

    # ---- common to all scripts
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # seeds initial weights, data order and sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if available
    output_dir: str = "runs"  # parent of the run folder {task}__{exp_name}__{seed}__{unix time}
    resume: str | None = None  # run folder to continue with its own flags; pass no others

    # ---- environment and demonstrations
    env_id: str | None = None  # with a table, or with 1-D Box observations (control). None: the cat's grid
    env_kwargs: str = "{}"  # keyword arguments as JSON. The cat's grid takes slip, a probability
    horizon: int | None = None  # H, maximum steps per episode. None: the time limit (the cat's grid: 10)
    demos: str | None = None  # .npz of obs, act, lengths, optionally rew. None: sample a max-ent policy
    num_demos: int | None = None  # use the first n. None: all in --demos; without --demos, 10 (tables: exact visits)
    reward_scale: float = 1.0  # scales the true reward for the generated demonstrator; larger: closer to optimal
    expert_steps: int = 150  # control: policy updates to train the demonstrator
    transfer: str | None = None  # tables: JSON that overrides --env-kwargs for a second, final evaluation

    # ---- maximum-entropy inverse RL. None: the value in parentheses
    estimator: Literal["exact", "sampled", "both"] | None = None  # random moves: exact (table: both; control: sampled)
    gamma: float | None = None  # discount of values; in tables, of visits too (table: 1; control: 0.99)
    reward_inputs: Literal["state_action", "state", "next_state"] | None = None  # what it reads (table: next_state)
    reward_model: Literal["linear", "neural"] = "neural"  # control only; a table's reward is tabular
    reward_l2: float | None = None  # sampled: weight of episodes' squared rewards (table: 0; control: 0.01)
    learning_rate: float | None = None  # sampled: the reward's Adam, decays to 0 (table: 0.8; control: 1e-3)
    num_trajectories: int | None = None  # sampled: N per iteration (table: 512; control: 16)
    max_steps: int = 300  # sampled: iterations of rollout, reward step, policy step
    save_steps: int = 50  # steps between checkpoints
    exact_tolerance: float = 1e-4  # exact: stop once visits match the demonstrations this closely
    exact_steps: int = 50  # exact: maximum number of L-BFGS calls, 20 iterations each
    soft_q_rate: float = 0.5  # tables: step size of soft Q-iteration
    segment_length: int = 10  # control: steps per weighted segment; the horizon makes it whole episodes

    # ---- control: actor and critic
    eval_episodes: int = 50  # episodes per evaluation, with sampled actions
    hidden_size: int = 64  # units in each of a network's two hidden layers
    policy_learning_rate: float = 1e-3  # Adam of actor and critic, decays to 0; constant for the demonstrator
    gae_lambda: float = 0.95  # lambda of GAE (arXiv:1506.02438)
    update_epochs: int = 5  # passes over the trajectories per policy step
    minibatch_size: int = 512  # environment steps per gradient step
    epsilon: float = 0.2  # the ratio is clipped to 1 +- epsilon
    max_grad_norm: float = 0.5  # clips the global gradient norm of actor and critic


def as_matrix(transition: Tensor) -> Tensor:
    """Transition (S, A, S) or sparse (S*A, S) as a float64 matrix (S*A, S): dense, or CSR (20 times as fast as COO)."""
    is_dense = transition.layout == torch.strided
    return (transition.flatten(0, -2) if is_dense else transition.to_sparse_csr()).double()


def successors(transition: Tensor) -> tuple[Tensor, Tensor]:
    """Next states of each (s, a) and their log-probabilities, both (S*A, K), padded with probability 0. The last column
    is state S, the end of the episode, which gets the probability missing from the row."""
    matrix = as_matrix(transition).to_dense()  # (S*A, S)
    probabilities, states = matrix.topk(int((matrix > 0).sum(1).max()), 1)  # (S*A, K-1)
    end = 1 - matrix.sum(1, keepdim=True)  # (S*A, 1)
    end = torch.where(end > 1e-6, end, 0.0)  # less is rounding of a table in fp32
    return F.pad(states, (0, 1), value=matrix.shape[1]), torch.cat([probabilities, end], 1).log()  # (S*A, K)


def ended_states(reward: Tensor, transition: Tensor) -> Tensor:
    """Mask (S, 1) of absorbing states without reward, where the episode has ended. Setting their reward to -log A
    cancels the entropy that logsumexp would credit for choosing among their actions."""
    matrix = as_matrix(transition).to_dense()  # (S*A, S)
    stay = matrix.view(*reward.shape, -1).diagonal(dim1=0, dim2=2).t()  # (S, A)
    return ((stay > 1 - 1e-9) & (reward == 0)).all(1, keepdim=True)


def soft_value_iteration(
    reward: Tensor, transition: Tensor, gamma: float, horizon: int, ended: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Policy (H, S, A) and values (H+1, S) of the causal model, in logarithms: Q_t = r + gamma P V_t+1, V_t =
    logsumexp_a Q_t, pi_t = exp(Q_t - V_t), V_H = 0 (Ziebart et al. 2010).
    reward (S, A); transition (S, A, S) or sparse (S*A, S). If a row sums to less than 1, the rest ends the episode.
    `ended` (S, 1) marks absorbing end states kept in the table. None: infer them with `ended_states`, which is only
    safe for a true reward; a learned reward may happen to be 0."""
    S, A = reward.shape
    matrix = as_matrix(transition)  # (S*A, S)
    ended = ended_states(reward, transition) if ended is None else ended
    reward = torch.where(ended, -math.log(A), reward.double())
    policy, values = [], [reward.new_zeros(S)]  # the last step comes first
    for _ in range(horizon):
        q = reward + gamma * (matrix @ values[-1]).view(S, A)  # (S, A)
        values.append(q.logsumexp(1))  # (S,)
        policy.append((q - values[-1][:, None]).exp())
    return torch.stack(policy[::-1]), torch.stack(values[::-1])


def occupancy(policy: Tensor, transition: Tensor, initial: Tensor, gamma: float) -> Tensor:
    """Expected visits (S, A) of a policy (H, S, A): sum_t gamma^t P(s_t = s, a_t = a), s_0 from initial (S,)."""
    backward = as_matrix(transition).t()  # (S, S*A)
    visits, state = torch.zeros_like(policy[0]), initial.double()
    for t in range(len(policy)):
        visited = policy[t] * state[:, None]  # (S, A)
        visits = visits + gamma**t * visited
        state = backward @ visited.flatten()  # (S,)
    return visits


def log_partition(
    reward: Tensor, transition: Tensor, initial: Tensor, horizon: int, gamma: float = 1.0, ended: Tensor | None = None
) -> Tensor:
    """log Z of the non-causal model, the sum over trajectories of d(s_0) prod_t P(s_t+1|s_t,a_t) exp(gamma^t r_t). Its
    gradient in the reward (S, A) is the model's visits. For transition and ended see soft_value_iteration."""
    S, A = reward.shape
    states, log_p = successors(transition)  # (S*A, K)
    ended = ended_states(reward, transition) if ended is None else ended
    log_z = torch.zeros(S, dtype=torch.float64)
    for t in reversed(range(horizon)):
        following = (log_p + F.pad(log_z, (0, 1))[states]).logsumexp(1).view(S, A)  # after an end, log Z = 0
        log_z = (torch.where(ended, -math.log(A), gamma**t * reward.double()) + following).logsumexp(1)  # (S,)
    return (initial.double().log() + log_z).logsumexp(0)


def importance_weights(returns: Tensor, logprobs: Tensor) -> Tensor:
    """Self-normalized weights (N,) of trajectories (or segments) that a policy drew with these log-probabilities (N,),
    summed over time: softmax_j(r(tau_j) - log pi(tau_j)). The dynamics cancel, as does a constant in the returns."""
    return (returns.double() - logprobs.double()).softmax(0).to(returns.dtype)  # fp32 rounds sums of 1e4 to 1e-3


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


def actor_critic_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, values: Tensor, returns: Tensor, epsilon: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped policy loss plus half the squared error of the values, all (b,). -log pi is part of the returns."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    unclipped, clipped = -ratio * advantages, -ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    policy_loss = torch.maximum(unclipped, clipped).mean()
    value_loss = 0.5 * (values - returns).square().mean()
    stats = {
        "losses/policy_loss": policy_loss, "losses/value_loss": value_loss,
        "policy/approxkl_avg": (ratio - 1 - log_ratio).mean(),  # k3: distance from the policy before the update
        "policy/clipfrac_avg": (clipped > unclipped).float().mean(),
    }
    return policy_loss + value_loss, {name: x.detach() for name, x in stats.items()}


def fit_exact(
    reward: nn.Module, target_visits: Tensor, table: dict, gamma: float, horizon: int, tolerance: float, max_calls: int
) -> tuple[float, float]:
    """Fit the reward to target_visits (S, A) in the causal model: L-BFGS on V(s_0) - E_demos[r]. Its gradient in the
    reward is a difference of visits (Ziebart et al. 2010). Returns the loss and the largest gradient of an entry."""
    optimizer = torch.optim.LBFGS(
        reward.parameters(), max_iter=20, history_size=100, tolerance_grad=0, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # tolerances of 0: the loop below decides when to stop

    def objective() -> Tensor:
        optimizer.zero_grad()
        learned = reward.table(table["arrival"])  # (S, A)
        with torch.no_grad():
            policy, values = soft_value_iteration(learned, table["transition"], gamma, horizon, table["ended"])
            difference = occupancy(policy, table["transition"], table["initial"], gamma) - target_visits  # (S, A)
        (difference * learned).sum().backward()  # has the objective's gradient
        return table["initial"] @ values[0] - (target_visits * learned.detach()).sum()

    for _ in range(max_calls):
        optimizer.step(objective)
        loss = objective().item()
        gap = (reward.weight.grad / reward.scale).abs().max().item()  # per reward entry, not per scaled parameter
        if gap <= tolerance:
            break
    return loss, gap


CAT_GRID = "C.B." "..T." "...." "...M"  # the cat starts; rewards are paid on arrival; the meat ends the episode
CAT_CELLS = {".": ("", 0.0), "C": ("cat", 0.0), "B": ("broom", -1.0), "T": ("bathtub", -10.0), "M": ("meat", 100.0)}


def cat_moves(slip: float = 0.0) -> dict:
    """The cat's grid in Gymnasium's form: P[state][action] = [(probability, next state, reward, end), ...]. Moves
    are left, right, up, down; with probability slip, any of the four. Moves off the grid stay put."""
    moves: dict = {}
    for s in range(16):
        reached = [s - (s % 4 > 0), s + (s % 4 < 3), s - 4 * (s >= 4), s + 4 * (s < 12)]
        outcomes = [(s2, CAT_CELLS[CAT_GRID[s2]][1], CAT_GRID[s2] == "M") for s2 in reached]
        moves[s] = {a: [(slip / 4 + (1 - slip) * (a == b), *x) for b, x in enumerate(outcomes)] for a in range(4)}
    return moves


def read_table(moves: dict, initial: Tensor, shape: tuple[int, int]) -> dict:
    """A table P as tensors: `transition` and `arrival` (S*A, S), true `reward` (S, A), `initial` (S,), `ended` (S, 1),
    and the map's `shape`. `arrival` has every move. `transition` lacks those that end the episode or lead to an ended
    state, so its rows may sum to less than 1."""
    S, A = len(moves), len(moves[0])
    flat = [(s * A + a, *move) for s in range(S) for a in range(A) for move in moves[s][a]]
    rows, probabilities, columns, rewards, ends = (torch.from_numpy(np.array(x)) for x in zip(*flat))  # (moves,)
    arrival = torch.zeros(S * A, S, dtype=torch.float64).index_put_((rows, columns), probabilities, accumulate=True)
    if (probabilities < 0).any() or not np.allclose(arrival.sum(1), 1) or not np.isclose(initial.sum(), 1):
        raise ValueError("--env-id: its table has probabilities that are negative or do not sum to 1")
    reward = torch.bincount(rows, probabilities * rewards, S * A).view(S, A)
    ended = ended_states(reward, arrival)  # by the true reward, and so under every learned one
    going_on = probabilities * ~(ends | ended[columns, 0])
    transition = torch.zeros_like(arrival).index_put_((rows, columns), going_on, accumulate=True)
    table = {"transition": transition, "arrival": arrival, "reward": reward, "initial": initial.double()}
    return table | {"ended": ended, "shape": shape if math.prod(shape) == S else (1, S)}  # Taxi: S != rows * cols


def load_table(env_id: str | None, env_kwargs: dict) -> tuple[dict | None, int | None]:
    """The environment's transition table, or None if it has none, and its time limit."""
    if env_id is None:
        return read_table(cat_moves(**env_kwargs), torch.eye(16)[CAT_GRID.index("C")], (4, 4)), 10
    env = gymnasium.make(env_id, **env_kwargs)
    inner, limit = env.unwrapped, env.spec.max_episode_steps
    if not (hasattr(inner, "P") and hasattr(inner, "initial_state_distrib")):
        return None, limit
    shape = getattr(inner, "shape", None) or np.shape(getattr(inner, "desc", ()))
    return read_table(inner.P, torch.as_tensor(inner.initial_state_distrib), shape), limit


class TableEnv(gymnasium.vector.VectorEnv):
    """N trajectories in a table. Observations (N, 2): state index and step number; state S means the episode ended."""

    def __init__(self, table: dict, num_envs: int) -> None:
        self.reward, self.initial, self.num_envs = table["reward"], table["initial"], num_envs
        self.states, logprobs = successors(table["transition"])  # (S*A, K)
        self.cumulative, self.single_action_space = logprobs.exp().cumsum(1), Discrete(self.reward.shape[1])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.rng, self.clock = np.random.default_rng(seed), 0  # not torch's: the policy's has the same seed
        self.state = torch.from_numpy(self.rng.choice(len(self.initial), self.num_envs, p=self.initial))  # (N,)
        return F.pad(self.state[:, None], (0, 1)).numpy(), {}  # (N, 2)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        S, A = self.reward.shape
        rows = self.state.clamp(max=S - 1) * A + torch.from_numpy(actions)  # (N,)
        drawn = torch.from_numpy(self.rng.random((self.num_envs, 1))) * self.cumulative[rows, -1:]  # (N, 1)
        arrived = self.states[rows, (self.cumulative[rows] <= drawn).sum(1)]  # (N,)
        self.state, self.clock = torch.where(self.state < S, arrived, S), self.clock + 1
        obs, ended = F.pad(self.state[:, None], (0, 1), value=self.clock), self.state == S  # (N, 2), (N,)
        return obs.numpy(), self.reward.flatten()[rows].numpy(), ended.numpy(), np.zeros(self.num_envs, bool), {}


class TableReward(nn.Module):
    """Tabular reward: one entry per state, or per state and action. Parameters are entries * sqrt(demonstrated visits
    + 0.1): the curvature of log Z grows with the visits, so one step size then suits all entries."""

    def __init__(self, inputs: str, visits: Tensor, arrival: Tensor) -> None:
        super().__init__()
        options = {"next_state": (arrival.t() @ visits.flatten())[:, None], "state": visits.sum(1, keepdim=True)}
        seen = options.get(inputs, visits)  # (S, 1) or (S, A)
        self.expected, self.num_actions = inputs == "next_state", visits.shape[1]
        self.register_buffer("scale", (seen + 0.1) ** -0.5)
        self.register_buffer("arrival", arrival, persistent=False)
        self.weight = nn.Parameter(torch.zeros_like(seen))

    def table(self, arrival: Tensor) -> Tensor:
        """Reward (S, A). For next_state inputs, the expected entry of the next state under these dynamics."""
        entries = self.weight * self.scale
        return (arrival @ entries).view(-1, self.num_actions) if self.expected else entries.expand(-1, self.num_actions)

    def forward(self, pairs: Tensor) -> Tensor:
        """Rewards (..., 1) of pairs (..., 2 + A): normalized state and step, one-hot action."""
        states = (pairs[..., 0] * len(self.weight)).round().long()  # (...)
        moves = states.clamp(max=len(self.weight) - 1) * self.num_actions + pairs[..., 2:].argmax(-1)  # (...)
        return self.table(self.arrival).flatten()[moves][..., None]


def mlp(inputs: int, outputs: int, hidden_size: int, scale: float) -> nn.Sequential:
    """Two hidden tanh layers. The last layer's weights are scaled: with 0.01 a policy starts almost uniform."""
    layers = [nn.Linear(inputs, hidden_size), nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, outputs)]
    layers[-1].weight.data.mul_(scale)
    layers[-1].bias.data.zero_()
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class ActorCritic(nn.Module):
    """The policy in control. For Discrete actions, its outputs are logits (..., A). For a Box, scaled to [-1, 1], they
    are concentrations (..., 2A) of Beta distributions, which have no tails to clip, and are uniform if both are 1."""

    unit = nn.Identity()  # Beta actions are in [-1, 1] already; gail.py's Gaussian ones are clipped here

    def __init__(self, num_inputs: int, action_space: gymnasium.Space, hidden_size: int) -> None:
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        outputs = int(action_space.n) if self.discrete else 2 * action_space.shape[0]
        self.actor = mlp(num_inputs, outputs, hidden_size, 0.01)
        self.critic = mlp(num_inputs, 1, hidden_size, 1.0)

    def forward(self, obs: Tensor) -> Tensor:
        return self.actor(obs) if self.discrete else self.actor(obs).clamp(-1, 6).exp()  # 0.4 (U) to 403 (std 0.035)

    def select(self, outputs: Tensor, mode: str, generator: torch.Generator | None) -> Tensor:
        """Actions, indices (N,) or numbers (N, A). mode: "sample" from the policy, or "uniform"."""
        outputs = torch.ones_like(outputs) if mode == "uniform" else outputs
        if self.discrete:
            return torch.multinomial(outputs.softmax(-1), 1, generator=generator)[:, 0]
        shares = torch._sample_dirichlet(torch.stack(outputs.chunk(2, -1), -1), generator)[..., 0]  # (N, A)
        return 2 * shares.clamp(1e-6, 1 - 1e-6) - 1  # the density may be infinite at both ends

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """log pi(a|s) (...) of indices (...), or its density on [-1, 1] for numbers (..., A)."""
        if self.discrete:
            return outputs.log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        beta = torch.distributions.Beta(*outputs.chunk(2, -1), validate_args=False)
        return (beta.log_prob((actions + 1) / 2) - math.log(2)).sum(-1)


class SoftQ(nn.Module):
    """The policy of a table, softmax Q_t(s, .), and its max-ent RL step. It acts like a discrete ActorCritic."""

    discrete, unit, select, logprobs = True, ActorCritic.unit, ActorCritic.select, ActorCritic.logprobs

    def __init__(self, S: int, A: int, H: int, gamma: float) -> None:
        super().__init__()
        # Start Q at its value under zero reward: the entropy of later steps. From 0, moves tried first look best.
        later = torch.tensor([sum(gamma**k for k in range(1, H - t)) for t in range(H)]).double()  # (H,)
        self.q = nn.Parameter((math.log(A) * later)[:, None, None].repeat(1, S, A), requires_grad=False)  # (H, S, A)
        self.register_buffer("counts", torch.zeros(S * A, S + 1).double())  # of moves and next states; S is the end

    def forward(self, obs: Tensor) -> Tensor:
        H, S, _ = self.q.shape
        state, step = (obs * torch.tensor([S, H])).round().long().unbind(-1)  # from normalized observations
        return self.q[step.clamp(max=H - 1), state.clamp(max=S - 1)]  # (..., A)

    def learn(self, moves: Tensor, arrived: Tensor, reward: Tensor, gamma: float, rate: float) -> None:
        """Count new transitions s * A + a -> s' (B,), then do one damped backward sweep of soft Q-iteration on all seen
        so far: Q_t(s, a) moves toward the mean of r + gamma V_t+1(s') under the newest reward (S, A). The dynamics do
        not depend on t, so each transition updates every Q_t."""
        H, S, A = self.q.shape
        self.counts.index_put_((moves, arrived), torch.ones((), dtype=torch.float64), accumulate=True)
        seen = self.counts.sum(1).view(S, A)
        share = self.counts / self.counts.sum(1, keepdim=True).clamp(min=1)  # (S*A, S+1)
        value = torch.zeros(S + 1, dtype=torch.float64)  # after the last step, and after an end
        for t in reversed(range(H)):
            target = reward + gamma * (share @ value).view(S, A)
            self.q[t] += torch.where(seen > 0, rate * (target - self.q[t]), 0.0)
            value[:S] = self.q[t].logsumexp(1)


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


def policy_step(
    policy: ActorCritic, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], obs: Tensor, rewards: Tensor,
    args: Args, seed: int,
) -> dict[str, Tensor]:
    """A step of max-ent RL on rewards (T, N) minus log pi: passes of PPO over a rollout, whose normalized obs are
    (T+1, N, O). Returns statistics, means over all passes."""
    mask, all_stats, generator = batch["mask"], [], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        values = policy.critic(obs)[..., 0]  # (T+1, N)
    rewards, ends = rewards - batch["logprobs"], (batch["terminated"], batch["truncated"])  # (T, N)
    advantages, returns = gae_episodic(rewards, values[:-1], values[1:], *ends, args.gamma, args.gae_lambda)  # (T, N)
    columns = [x[mask] for x in (obs[:-1], batch["actions"], batch["logprobs"], advantages, returns)]  # (B, ...)
    for _ in range(args.update_epochs):
        for mb in torch.randperm(len(columns[0]), generator=generator).to(obs.device).split(args.minibatch_size):
            mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_returns = (x[mb] for x in columns)  # (b, ...)
            logprobs, mb_values = policy.logprobs(policy(mb_obs), mb_actions), policy.critic(mb_obs)[:, 0]  # (b,)
            loss, stats = actor_critic_loss(logprobs, mb_logprobs, mb_advantages, mb_values, mb_returns, args.epsilon)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm, error_if_nonfinite=True)
            optimizer.step()
            all_stats.append(stats)
    logs = {name: torch.stack([x[name] for x in all_stats]).mean() for name in all_stats[0]}
    return logs | {"losses/explained_variance": 1 - advantages[mask].var() / returns[mask].var().clamp(min=1e-8)}


def causal_visits(reward: Tensor, table: dict, gamma: float, horizon: int) -> Tensor:
    """Visits (S, A) of the soft-optimal policy of a reward (S, A)."""
    policy, _ = soft_value_iteration(reward, table["transition"], gamma, horizon, table["ended"])
    return occupancy(policy, table["transition"], table["initial"], gamma)


@torch.no_grad()
def evaluate_table(reward: Tensor, table: dict, expert_visits: Tensor, gamma: float, horizon: int) -> dict[str, float]:
    """True returns of the policies that a learned reward (S, A) induces: the soft-optimal one (temperature 1) against
    the demonstrator, and the greedy one against the best possible."""
    true_reward = table["reward"]
    uniform = torch.full_like(true_reward, 1 / true_reward.shape[1]).expand(horizon, -1, -1)  # (H, S, A)
    visits = {"expert": expert_visits, "random": occupancy(uniform, table["transition"], table["initial"], gamma)}
    for name, r in {"soft": reward, "hard": 1e5 * reward, "best": 1e5 * true_reward}.items():  # ~greedy
        visits[name] = causal_visits(r, table, gamma, horizon)
    returns = {name: (x * true_reward).sum().item() for name, x in visits.items()}
    margin = returns["expert"] - returns["random"]
    return {
        "expert_return": returns["expert"], "random_return": returns["random"], "return": returns["soft"],
        "expected_value_difference": returns["expert"] - returns["soft"],
        "normalized_score": (returns["soft"] - returns["random"]) / (margin or math.nan),
        "best_return": returns["best"], "greedy_return": returns["hard"],
        "occupancy_gap": (visits["soft"] - expert_visits).sum(1).abs().max().item(),
        "reward_correlation": torch.stack([reward, true_reward]).flatten(1).corrcoef()[0, 1].item(),
    }


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
        if type(value) in (int, float) and value <= 0 and name not in ("seed", "reward_l2") and "rate" not in name:
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    try:
        env_kwargs, device = json.loads(args.env_kwargs), torch.device("cpu")
        table, limit = load_table(args.env_id, env_kwargs)
        other, _ = load_table(args.env_id, env_kwargs | json.loads(args.transfer)) if args.transfer else (None, None)
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"--env-id, --env-kwargs or --transfer (JSON objects of keyword arguments): {error}") from None
    args = replace(args, **{k: pair[table is None] for k, pair in DEFAULTS.items() if getattr(args, k) is None})
    H = limit if args.horizon is None else args.horizon
    if H is None:
        raise ValueError(f"--horizon must be set: {args.env_id} has no time limit")
    if table is not None:
        S, A = table["reward"].shape
        make, observation_space, action_space = partial(TableEnv, table), Discrete(S), Discrete(A)
        make_policy = partial(SoftQ, S, A, H, args.gamma)
        mean_std = torch.tensor([[0.0, 0.0], [S, H]])  # of observations (state, step); the reward and SoftQ undo it
    else:
        if args.estimator != "sampled" or args.reward_inputs == "next_state" or args.transfer is not None:
            raise ValueError(f"{args.env_id} has no table: --estimator exact/both, next_state and --transfer need one")
        device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        make = partial(make_envs, args.env_id, **env_kwargs)
        eval_envs = make(args.eval_episodes)
        observation_space, action_space = eval_envs.single_observation_space, eval_envs.single_action_space
        box_obs, box_act = (isinstance(x, Box) and len(x.shape) == 1 for x in (observation_space, action_space))
        usable = isinstance(action_space, Discrete) and action_space.start == 0
        if box_act and action_space.is_bounded() and action_space.dtype.kind == "f":
            usable = (action_space.low < action_space.high).all()
        if not (box_obs and usable):
            raise ValueError(f"--env-id: {observation_space}, {action_space}: needs 1-D Box; Discrete or bounded Box")
        O = observation_space.shape[0]
        make_policy = partial(ActorCritic, O, action_space, args.hidden_size)
        mean_std = torch.stack([torch.zeros(O), torch.ones(O)]).to(device)  # (2, O)
    estimators = ("exact", "sampled") if args.estimator == "both" else (args.estimator,)
    max_steps, N = args.max_steps if "sampled" in estimators else 0, args.num_trajectories
    envs, first_seed = make(N), args.seed * 10**9
    if other is not None and other["reward"].shape != (S, A):
        raise ValueError(f"--transfer: its table has shape {tuple(other['reward'].shape)}, not {S, A}")
    demos = None if args.demos is None else load_demos(args.demos, args.num_demos, observation_space, action_space)
    if demos is not None and demos[2].max() > H:
        raise ValueError(f"--demos has an episode of {int(demos[2].max())} steps, more than --horizon {H}")
    task = (args.env_id or "cat-grid").replace(":", "-").replace("/", "-")
    run_dir = Path(args.resume or f"{args.output_dir}/{task}__{args.exp_name}__{args.seed}__{int(start_time)}")
    print(run_dir)
    progress = {"step": 0, "env_steps": 0} if checkpoint is None else {k: checkpoint[k] for k in ("step", "env_steps")}
    writer = SummaryWriter(run_dir, purge_step=progress["env_steps"] + 1)
    if not args.resume:
        (run_dir / "args.json").open("x").write(json.dumps({"script": Path(__file__).name, "args": vars(args)}))

    # ---- demonstrations, and the normalizer
    torch.manual_seed(args.seed)  # for the initial weights only; everything else is seeded per step
    policy, expert = make_policy().to(device), make_policy().to(device)
    exact_visits = table is not None and args.demos is None and args.num_demos is None
    if table is not None:
        true_reward = args.reward_scale * table["reward"]  # (S, A)
        expert.q.copy_(soft_value_iteration(true_reward, table["transition"], args.gamma, H, table["ended"])[0].log())
        expert_visits = causal_visits(true_reward, table, args.gamma, H)  # (S, A)
    else:
        uniform = rollout(eval_envs, expert, mean_std, H, first_seed + UNIFORM_SEEDS, "uniform", one_episode=True)
        random_return = (uniform["rewards"] * uniform["mask"]).sum().item() / args.eval_episodes
        uniform_obs = uniform["obs"][:-1][uniform["mask"]]  # (m, O)
        mean_std = observation_mean_std(uniform_obs, uniform_obs)
    if args.demos is None and not exact_visits:
        if checkpoint is None:
            optimizer = torch.optim.Adam(expert.parameters(), lr=args.policy_learning_rate, eps=1e-5)
            for step in trange(args.expert_steps if table is None else 0, desc="expert"):
                seed = first_seed + EXPERT_SEEDS + step * N
                batch = rollout(envs, expert, mean_std, H, seed, "sample", one_episode=True)
                obs, rewards = normalize(batch["obs"], mean_std), args.reward_scale * batch["rewards"]
                policy_step(expert, optimizer, batch, obs, rewards, args, seed + UPDATE_SEEDS)
            demo_envs, seed = make(max(args.num_demos or 10, args.eval_episodes)), first_seed + DEMO_SEEDS
            batch = rollout(demo_envs, expert, mean_std, H, seed, "sample", one_episode=True)
            batch["obs"] = batch["obs"] if table is None else batch["obs"][..., 0]  # states
            write_demos(run_dir / "demos.npz", batch, expert, action_space)
        demos = load_demos(run_dir / "demos.npz", args.num_demos or 10, observation_space, action_space)
    # One row per (observation, action); weights sum to the mean (discounted) episode length.
    discount = 1.0 if table is None else args.gamma  # of visits. In control, gamma enters only through the critic
    if exact_visits:
        expert_obs, expert_actions = torch.arange(S).repeat_interleave(A), torch.arange(A).repeat(S)  # (n,)
        expert_weights = expert_visits.flatten()  # (n,)
    else:
        expert_obs, expert_actions, lengths, expert_return = demos
        steps = torch.cat([torch.arange(length) for length in lengths.tolist()])  # (n,)
        expert_weights = discount ** steps.double() / len(lengths)  # (n,)
    if table is not None:
        target_visits = torch.bincount(expert_obs.long() * A + expert_actions, expert_weights, S * A).view(S, A)
        expert_visits = expert_visits if args.demos is None else target_visits  # for evaluation: exact if known
        expert_obs = F.pad(expert_obs[:, None], (0, 1))  # (n, 2)
    expert_obs, expert_actions, expert_weights = (x.to(device) for x in (expert_obs, expert_actions, expert_weights))
    if table is None:  # fixed from here on: log-probabilities depend on it
        mean_std = observation_mean_std(expert_obs, uniform_obs)
    expert_pairs = pair_features(normalize(expert_obs, mean_std), expert_actions, action_space)  # (n, O + A)

    # ---- reward
    width = O if table is None and args.reward_inputs == "state" else expert_pairs.shape[1]  # reward input features
    if table is not None:
        modules = {name: TableReward(args.reward_inputs, target_visits, table["arrival"]) for name in estimators}
    else:
        network = nn.Linear(width, 1) if args.reward_model == "linear" else mlp(width, 1, args.hidden_size, 0.1)
        modules = {"sampled": network.to(device)}
    reward = modules[estimators[-1]]
    optimizer = torch.optim.Adam(reward.parameters(), lr=args.learning_rate)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=args.policy_learning_rate, eps=1e-5)  # control
    state = {"policy": policy, "optimizer": optimizer, "policy_optimizer": policy_optimizer, **modules}
    if checkpoint:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    elif "exact" in estimators:
        fit = fit_exact(modules["exact"], target_visits, table, args.gamma, H, args.exact_tolerance, args.exact_steps)
        for name, x in zip(("loss", "gradient_max"), fit):
            writer.add_scalar(f"exact/{name}", x, 0)
    bar = trange(progress["step"], max_steps + 1, initial=progress["step"], total=max_steps, disable=not max_steps)
    for step in bar:
        # ---- save to a temporary file, then rename. Also at step 0: the setup may have been slow
        if step % args.save_steps == 0 or step == max_steps:
            writer.flush()
            torch.save(progress | {name: part.state_dict() for name, part in state.items()}, run_dir / "checkpoint.tmp")
            os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")
        if step == max_steps:
            break

        # ---- rollout
        step_start, seed = time.time(), first_seed + step * N
        batch = rollout(envs, policy, mean_std, H, seed, "sample", one_episode=True)
        mask, obs, T = batch["mask"], normalize(batch["obs"], mean_std), len(batch["mask"])  # (T, N), (T+1, N, O)
        pairs = pair_features(obs[:-1], batch["actions"], action_space)  # (T, N, O + A)

        # ---- importance weights: targets are in the module docstring
        rewards = reward(pairs[..., :width])[..., 0]  # (T, N)
        returns = rewards * (discount ** torch.arange(T, device=device))[:, None]  # (T, N)
        scores, length = returns.detach(), T  # per step: log w + log pi. A table's segment is the whole trajectory
        if table is None:
            with torch.no_grad():
                values = policy.critic(obs)[..., 0]  # (T+1, N)
            scores = scores + args.gamma * torch.where(batch["terminated"], 0.0, values[1:]) - values[:-1]
            length = args.segment_length
        valid, scores, logprobs, returns = (  # sums over segments
            F.pad(torch.where(mask, x, 0.0).t(), (0, -T % length)).reshape(-1, length).sum(1)
            for x in (mask, scores, batch["logprobs"], returns)
        )  # (segments,), trajectory by trajectory
        scores, logprobs, returns = (x[valid > 0] for x in (scores, logprobs, returns))  # (M,)
        weights = importance_weights(scores, logprobs)  # (M,)

        # ---- reward: a gradient step up E_demos[r] - log Z, per trajectory (M / N segments; weights sum to 1)
        expert_rewards = reward(expert_pairs[..., :width])[..., 0]  # (n,)
        expert_reward = (expert_weights * expert_rewards).sum()
        penalty = (expert_weights * expert_rewards.square()).sum() + rewards[mask].square().sum() / N
        loss = (weights * returns).sum() * len(weights) / N - expert_reward + args.reward_l2 * penalty
        decay = 1 - step / max_steps  # of both learning rates
        optimizer.param_groups[0]["lr"] = decay * args.learning_rate
        policy_optimizer.param_groups[0]["lr"] = decay * args.policy_learning_rate
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reward.parameters(), math.inf, error_if_nonfinite=True)
        optimizer.step()

        # ---- policy: a step of max-ent RL on the new reward
        if table is not None:
            learned, states = reward.table(table["arrival"]).detach(), batch["obs"][..., 0].long()  # (S, A), (T+1, N)
            moves, arrived = (states[:-1] * A + batch["actions"])[mask], states[1:][mask]  # (B,)
            policy.learn(moves, arrived, learned, args.gamma, args.soft_q_rate)
            logs = {}
        else:
            learned = reward(pairs[..., :width])[..., 0].detach()  # (T, N)
            logs = policy_step(policy, policy_optimizer, batch, obs, learned, args, seed + UPDATE_SEEDS)

        # ---- log
        env_steps, size = int(mask.sum()), 1 / weights.square().sum().item()  # effective sample size, 1 to M
        progress = {"step": step + 1, "env_steps": progress["env_steps"] + env_steps}
        logs |= {
            "train/loss": loss, "train/grad_norm": norm, "train/expert_reward": expert_reward,
            "train/policy_reward": returns.sum() / N, "train/effective_sample_size": size,
            "train/effective_sample_share": size / len(weights), "train/entropy": -batch["logprobs"][mask].mean(),
            "charts/episodic_return": (batch["rewards"] * mask).sum().item() / N,
            "charts/episodic_length": env_steps / N, "charts/learning_rate": decay * args.learning_rate,
            "charts/SPS": env_steps / (time.time() - step_start),
        }
        for name, x in logs.items():
            writer.add_scalar(name, x, progress["env_steps"])
        bar.set_postfix_str(f"return {logs['charts/episodic_return']:.2f}, effective samples {size:.1f}")

    # ---- evaluate
    found, tensors, metrics = {}, {"reward": {}, "policy": {}}, {"seed": args.seed, "env_steps": progress["env_steps"]}
    if table is None:
        batch = rollout(eval_envs, policy, mean_std, H, first_seed + EVAL_SEEDS, "sample", one_episode=True)
        value = (batch["rewards"] * batch["mask"]).sum().item() / args.eval_episodes
        score = (value - random_return) / ((expert_return - random_return) or math.nan)
        found["sampled"] = {"expert_return": expert_return, "random_return": random_return, "return": value}
        found["sampled"] |= {"expected_value_difference": expert_return - value, "normalized_score": score}
        normalizer = {"observation_mean": mean_std[0], "observation_std": mean_std[1]}
        tensors = {"reward": reward.state_dict() | normalizer, "policy": policy.state_dict() | normalizer}
    else:
        leaf = true_reward.clone().requires_grad_()  # how far apart the two models' visits are
        log_partition(leaf, table["transition"], table["initial"], H, args.gamma, table["ended"]).backward()
        difference = causal_visits(true_reward, table, args.gamma, H) - leaf.grad  # (S, A)
        metrics["eval/causal_gap"] = difference.sum(1).abs().sum().item()
        if "sampled" in estimators and metrics["eval/causal_gap"] > 0.01:
            print("note: moves or starts are random; the sampled estimator fits another model. Use --estimator exact")
        on_arrival = table["arrival"] / table["arrival"].sum(0)  # (S*A, S): mean over moves to a state, for maps
    for name, module in (modules.items() if table is not None else ()):
        learned = module.table(table["arrival"]).detach()  # (S, A)
        found[name] = evaluate_table(learned, table, expert_visits, args.gamma, H)
        best, _ = soft_value_iteration(learned, table["transition"], args.gamma, H, table["ended"])  # (H, S, A)
        tensors["reward"] |= {name: learned, f"{name}_entries": (module.weight * module.scale).detach()}
        tensors["policy"][name] = best  # the soft-optimal policy of the reward, not the sampler's
        if other is not None:  # same reward entries, new dynamics; the old policy for comparison
            visits = causal_visits(args.reward_scale * other["reward"], other, args.gamma, H)  # (S, A)
            results = evaluate_table(module.table(other["arrival"]).detach(), other, visits, args.gamma, H)
            old_visits = occupancy(best, other["transition"], other["initial"], args.gamma)
            results["old_policy_return"] = (old_visits * other["reward"]).sum().item()
            metrics |= {f"transfer/{name}/{key}": x for key, x in results.items()}
        panels = {
            "true reward": table["reward"].flatten() @ on_arrival, "expert's steps from a state": expert_visits.sum(1),
            f"learned reward ({name})": learned.flatten() @ on_arrival,
            "learner's steps from a state": causal_visits(learned, table, args.gamma, H).sum(1),
        }  # (S,) each
        figure = Figure(figsize=(12.8, 3.2), layout="constrained")
        for axes, (title, x) in zip(figure.subplots(1, 4), panels.items()):
            axes.set(title=title, xticks=[], yticks=[])
            figure.colorbar(axes.imshow(x.view(table["shape"]).numpy()), ax=axes, shrink=0.7)
            for s, cell in enumerate(CAT_GRID if args.env_id is None else ""):
                label = f"{CAT_CELLS[cell][0]}\n{x[s].round(decimals=1) + 0.0:g}".strip()
                axes.text(s % 4, s // 4, label, ha="center", va="center", size=7, backgroundcolor="white")
        writer.add_figure(f"maps/{name}", figure, progress["env_steps"])
    for name, results in found.items():  # unprefixed keys belong to the last estimator
        metrics |= {f"eval/{key}": x for key, x in results.items()}
        metrics |= {f"eval/{name}/{key}": x for key, x in results.items() if len(found) > 1}
    for name, part in tensors.items():
        save_file({key: x.cpu().contiguous() for key, x in part.items()}, run_dir / f"{name}.safetensors")
    for name, x in metrics.items():
        if len(found) == 1 or name[5:] not in results:  # no key twice
            print(f"{name}: {x:.4g}".replace("nan", "unknown"))
        if name.startswith("eval/"):
            writer.add_scalar(name, x, progress["env_steps"])
    metrics["wall_seconds"] = time.time() - start_time
    metrics = {name: x if math.isfinite(x) else None for name, x in metrics.items()}  # JSON has no nan
    (run_dir / "summary.json").write_text(json.dumps(metrics, indent=2))
    writer.close()
    print(run_dir)
    return metrics


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError, ImportError, gymnasium.error.Error) as error:
        at = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == __file__][-1]
        print("error:", *str(error).split(), f"({Path(__file__).name}, line {at})", file=sys.stderr)
        raise SystemExit(2) from None
