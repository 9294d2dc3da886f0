"""How long maxent_irl.py and gail.py take, and the same methods of the library imitation: interleaved in one run.

    python tests/bench_control.py --method maxent_irl --peer-python ~/venvs/imitation/bin/python
    python tests/bench_control.py --method gail --peer-python ~/venvs/imitation/bin/python [--demos CartPole-v1.npz]

The peer's interpreter needs imitation 1.0.1, which takes gymnasium 0.29. Without it our side runs alone.

maxent_irl: the exact estimator (`fit_exact`) beside MCEIRL, on grids of 5 x 5 states with horizon 20 and of 10 x 10
with horizon 40; four moves, one start, no discount. The true reward of each state is uniform in [-1, 1], another one in
each repetition; demonstrations are the exact visits of its soft-optimal policy; both sides learn one weight a state.
Seconds are those of fitting, with the table at hand. Ours ends when all visits of states differ by less than 1e-3,
which it looks at after every 20 iterations of L-BFGS; MCEIRL by its own criterion, the same 1e-3 (none for the
gradient). It counts the state after the last step too, and is given the demonstrator's visits so counted; without that
state, as both policies are compared in the end (by the same code, ours), its visits may differ by a little more. Its
optimizer is its default, Adam, at a learning rate of 0.2, on 10 x 10 the fastest of 0.05 to 0.5, on 5 x 5 within 3% of
the fastest of 0.01 (its default, 7 times as long) to 1; SGD with momentum is no faster where it converges. No logs.

gail: CartPole-v1 from the file's first 10 episodes, or 10 of an expert that gail.py trains before. Ours: gail.py with
its defaults (TRPO; every 20th step of each episode). The peer: imitation's GAIL as its tutorial sets it up for a
CartPole of fixed length: 8 environments; PPO with batches of 64, 5 epochs, gamma 0.95, learning rate 4e-4; 8
discriminator steps a round on 1024 pairs of either kind, the policy's from a buffer of 512; RunningNorm; all steps of
the episodes. One setting is not its own: PPO takes 256 steps of each environment a round, not 2048, with which neither
of two seeds got to 0.9 in 100,000 steps. No logs. After each round the policy's mode is evaluated on 50 episodes, and
its return scored: 0 a uniform policy, 1 the expert. Reported: CPU seconds and environment steps up to the first
evaluation from which on every score is at least 0.9 ("for good"), and up to the first such score, whatever came after.
A run that never gets there counts as infinitely long (null in JSON). Seconds are those of training: without
evaluations, logs, demonstrations, and our side's behaviour cloning.

Each side is a process of its own, on the same single core with one thread; they take turns, a repetition (seed) each.
Seconds are the process's CPU seconds without imports; maxent_irl's first repetition warms up and does not count. All
figures are medians. Peak memory is the whole process's. The last line is one JSON object. Linux only.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
import torch  # with numpy, all that both interpreters need have

TASKS = {"5x5": (5, 20), "10x10": (10, 40)}  # side, horizon
VISITS_TOLERANCE, PEER_LEARNING_RATE, PEER_N_STEPS = 1e-3, 0.2, 256  # the last two: of MCEIRL, and of PPO
ENV_ID, NUM_DEMOS, NUM_ENVS, EVAL_EPISODES, SCORE = "CartPole-v1", 10, 8, 50, 0.9


def make_table(task: str, seed: int) -> tuple[dict, int]:
    """The table as maxent_irl.py has it, and the horizon."""
    import maxent_irl

    (size, horizon), rng, moves = TASKS[task], random.Random(seed), {}
    reward = torch.tensor([[rng.uniform(-1, 1)] * 4 for _ in range(size * size)], dtype=torch.float64)  # (S, A)
    for s in range(size * size):
        y, x = divmod(s, size)
        reached = [(y, max(x - 1, 0)), (y, min(x + 1, size - 1)), (max(y - 1, 0), x), (min(y + 1, size - 1), x)]
        moves[s] = {a: [(1.0, size * v + u, 0.0, False)] for a, (v, u) in enumerate(reached)}
    return {**maxent_irl.read_table(moves, torch.eye(size * size)[0], (size, size)), "reward": reward}, horizon


def irl_ours(job: dict) -> dict:
    import maxent_irl

    table, horizon = make_table(job["task"], job["seed"])
    expert_visits = maxent_irl.causal_visits(table["reward"], table, 1.0, horizon)
    start = time.process_time()
    reward = maxent_irl.TableReward("state", expert_visits, table["arrival"])
    maxent_irl.fit_exact(reward, expert_visits, table, 1.0, horizon, VISITS_TOLERANCE, 50)
    report = {"seconds": time.process_time() - start, "peak_mb": peak_mb()}
    entries = reward.table(table["arrival"]).detach()  # (S, A)
    policy, _ = maxent_irl.soft_value_iteration(entries, table["transition"], 1.0, horizon)
    np.save(job["policy"], policy.numpy())
    return report


def irl_peer(job: dict) -> dict:
    from imitation.algorithms.mce_irl import MCEIRL, mce_occupancy_measures
    from imitation.rewards.reward_nets import BasicRewardNet
    from seals.base_envs import TabularModelPOMDP

    with np.load(job["table"]) as file:
        reward, transition = file["reward"], file["transition"]  # (S,), (S, A, S)
    env = TabularModelPOMDP(  # a state is seen as its one-hot vector; the first one is the start
        transition_matrix=transition, observation_matrix=np.eye(len(reward), dtype=np.float32), reward_matrix=reward,
        horizon=TASKS[job["task"]][1],
    )  # fmt: skip
    _, expert_visits = mce_occupancy_measures(env)  # (S,), of H + 1 states
    torch.manual_seed(job["seed"])
    reward_net = BasicRewardNet(
        env.observation_space, env.action_space, hid_sizes=[], use_action=False, use_next_state=False, use_done=False
    )
    irl = MCEIRL(
        expert_visits, env, reward_net, np.random.default_rng(0), optimizer_kwargs={"lr": PEER_LEARNING_RATE},
        linf_eps=VISITS_TOLERANCE, grad_l2_eps=0.0, log_interval=None,
    )  # fmt: skip
    start = time.process_time()
    irl.train(max_iter=10000)
    report = {"seconds": time.process_time() - start, "peak_mb": peak_mb()}
    np.save(job["policy"], irl.policy.pi)
    return report


def evaluate_policy(policy: torch.Tensor, table: dict, horizon: int) -> dict:
    """Of a policy (H, S, A): the largest difference of its visits of a state from the expert's, and by how much
    its true return differs, also as a share of the expert's margin over a uniform policy."""
    import maxent_irl

    expert = maxent_irl.causal_visits(table["reward"], table, 1.0, horizon)  # (S, A)
    uniform = torch.full_like(policy[:1], 1 / 4).expand(horizon, -1, -1)
    visits, chance = (maxent_irl.occupancy(x, table["transition"], table["initial"], 1.0) for x in (policy, uniform))
    returns = [(x * table["reward"]).sum().item() for x in (expert, visits, chance)]
    difference, share = abs(returns[0] - returns[1]), abs(returns[0] - returns[1]) / (returns[0] - returns[2])
    gap = (visits - expert).sum(1).abs().max().item()
    return {"visits_gap": gap, "value_difference": difference, "value_difference_share": share}


def gail_ours(job: dict) -> dict:
    import gail
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = gail.main(gail.Args(
        env_id=ENV_ID, demos=job["demos"], num_demos=NUM_DEMOS, total_timesteps=job["total_timesteps"],
        seed=job["seed"], eval_episodes=EVAL_EPISODES, device="cpu", output_dir=job["output_dir"],
    ))  # fmt: skip
    (run_folder,) = Path(job["output_dir"]).iterdir()
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
    seconds, returns = (
        {event.step: event.value for event in events.Scalars(tag)} for tag in ("charts/cpu_seconds", "eval/return")
    )
    history = [[step, seconds[step], value] for step, value in returns.items()]  # steps of the environment
    scale = metrics["eval/random_return"], metrics["eval/expert_return"]
    return {"history": history, "scale": scale, "peak_mb": peak_mb()}


def gail_peer(job: dict) -> dict:
    from imitation.algorithms.adversarial.gail import GAIL
    from imitation.data.types import Transitions
    from imitation.rewards.reward_nets import BasicRewardNet
    from imitation.util import logger
    from imitation.util.networks import RunningNorm
    from imitation.util.util import make_vec_env
    from stable_baselines3 import PPO
    from stable_baselines3.common.evaluation import evaluate_policy

    with np.load(job["demos"]) as file:
        lengths = file["lengths"][:NUM_DEMOS]
        steps = int(lengths.sum())
        obs, acts = (file[key][:steps] for key in ("obs", "act"))
    demonstrations = Transitions(  # its reward net sees neither next_obs nor dones
        obs=obs, acts=acts, next_obs=obs, dones=np.zeros(steps, dtype=bool), infos=np.array([{}] * steps)
    )
    venv = make_vec_env(ENV_ID, rng=np.random.default_rng(job["seed"]), n_envs=NUM_ENVS)
    learner = PPO(
        "MlpPolicy", venv, n_steps=PEER_N_STEPS, batch_size=64, ent_coef=0.0, learning_rate=4e-4, gamma=0.95,
        n_epochs=5, seed=job["seed"], device="cpu",
    )  # fmt: skip
    reward_net = BasicRewardNet(venv.observation_space, venv.action_space, normalize_input_layer=RunningNorm)
    trainer = GAIL(
        demonstrations=demonstrations, demo_batch_size=1024, gen_replay_buffer_capacity=512, venv=venv,
        n_disc_updates_per_round=8, gen_algo=learner, reward_net=reward_net, allow_variable_horizon=True,
        custom_logger=logger.configure(job["output_dir"], []),
    )  # fmt: skip
    eval_venv = make_vec_env(ENV_ID, rng=np.random.default_rng(0), n_envs=EVAL_EPISODES)
    history, start = [], 0.0

    def evaluate(_: int) -> None:
        nonlocal start
        now = time.process_time()
        eval_venv.seed(0)
        score, _ = evaluate_policy(learner, eval_venv, EVAL_EPISODES, deterministic=True)
        history.append([learner.num_timesteps, now - start, float(score)])
        start += time.process_time() - now

    start = time.process_time()
    trainer.train(job["total_timesteps"], evaluate)
    return {"history": history, "peak_mb": peak_mb()}


def reached(history: list, scores: list[float], lasting: bool) -> tuple[float, float]:
    """Environment steps and CPU seconds until the score is reached, and if lasting, kept until the end."""
    good = [score >= SCORE for score in scores]
    points = [(x[0], x[1]) for i, x in enumerate(history) if all(good[i : None if lasting else i + 1])]
    return min(points, default=(math.inf, math.inf))


# ---- workers and the parent ------------------------------------------------------------------------------------------

WORKERS = {  # and what each imports before its first job
    "maxent_irl": ((irl_ours, "maxent_irl"), (irl_peer, "imitation.algorithms.mce_irl")),
    "gail": ((gail_ours, "gail"), (gail_peer, "imitation.algorithms.adversarial.gail")),
}


def peak_mb() -> float:
    """Memory of this process at its peak (ru_maxrss would be that, were it not inherited from the parent)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def work(method: str, side: str) -> None:
    """The body of a worker process: one job a line, one report a line. What libraries print goes to stderr."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the same for both sides, which take turns
    torch.set_num_threads(1)
    run, module = WORKERS[method][side == "peer"]
    __import__(module)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=reports, flush=True)


class Worker:  # a process, which ends with the stack
    def __init__(self, python: str, method: str, side: str, folder: str, stack: ExitStack):
        self.side, self.errors = side, Path(folder, f"{side}.log")
        self.process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--worker", method, side],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(self.errors, "w"), text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        stack.callback(self.process.wait)  # the last callback is the first to be called
        stack.callback(self.process.kill)

    def run(self, **job) -> dict:
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):  # no report: it has ended
            code = self.process.wait()
            tail = "\n".join(self.errors.read_text(errors="replace").splitlines()[-30:])
            sys.exit(f"{tail}\nerror: the worker `{self.side}` ended with code {code}; its last words stand above")


def bench_irl(pythons: dict[str, str], options: argparse.Namespace, folder: str) -> dict:
    tasks: dict[str, dict] = {}
    files = {"policy": f"{folder}/policy.npy", "table": f"{folder}/table.npz"}
    for task in TASKS:
        reports: dict[str, list[dict]] = {side: [] for side in pythons}
        with ExitStack() as stack:
            workers = {side: Worker(python, "maxent_irl", side, folder, stack) for side, python in pythons.items()}
            for seed in range(options.seeds + 1):
                table, horizon = make_table(task, seed)
                transition = table["transition"].unflatten(0, (-1, 4))  # (S, A, S)
                np.savez(files["table"], reward=table["reward"][:, 0], transition=transition)
                for side, worker in workers.items():
                    report = worker.run(task=task, seed=seed, **files)
                    policy = torch.from_numpy(np.load(files["policy"]))
                    if seed:  # the first one warms up
                        reports[side].append({**report, **evaluate_policy(policy, table, horizon)})
        tasks[task] = {
            side: {key: median(row[key] for row in rows) for key in rows[0]} for side, rows in reports.items()
        }
        for side, rows in reports.items():
            tasks[task][side]["largest_visits_gap"] = max(row["visits_gap"] for row in rows)
        print_table(f"{task}, seeds: {len(reports['ours'])}", tasks[task], {
            "CPU seconds": "seconds", "peak memory, MB": "peak_mb", "largest difference of visits": "visits_gap",
            "  in the worst seed": "largest_visits_gap", "expected value difference": "value_difference",
            "  as a share of the margin": "value_difference_share",
        })  # fmt: skip
    return {**tasks["10x10"], "tasks": tasks}


def bench_gail(pythons: dict[str, str], options: argparse.Namespace, folder: str) -> dict:
    runs: dict[str, list[dict]] = {side: [] for side in pythons}
    if options.demos is None:
        import gail

        gail.main(gail.Args(env_id=ENV_ID, num_demos=NUM_DEMOS, total_timesteps=1, output_dir=f"{folder}/expert"))
        (options.demos,) = Path(folder, "expert").glob("*/demos.npz")
    job = {"demos": str(Path(options.demos).resolve()), "total_timesteps": options.total_timesteps}
    with ExitStack() as stack:
        workers = {side: Worker(python, "gail", side, folder, stack) for side, python in pythons.items()}
        for seed in range(1, options.seeds + 1):
            scale = (0.0, 1.0)
            for side, worker in workers.items():  # ours first: it says what a score of 0 and of 1 is
                report = worker.run(**job, seed=seed, output_dir=f"{folder}/{side}-{seed}")
                chance, expert = scale = report.get("scale", scale)
                history = report["history"]
                scores = [(value - chance) / (expert - chance) for _, _, value in history]
                steps, seconds = reached(history, scores, True)
                first_steps, first_seconds = reached(history, scores, False)
                row = {
                    "seconds": seconds, "env_steps": steps, "first_seconds": first_seconds,
                    "first_env_steps": first_steps, "final_score": scores[-1], "total_env_steps": history[-1][0],
                    "steps_per_second": history[-1][0] / history[-1][1], "peak_mb": report["peak_mb"],
                }  # fmt: skip
                runs[side].append(row)
                print(f"seed {seed}, {side}: " + ", ".join(f"{k} {x:.5g}" for k, x in row.items()), flush=True)
    sides = {side: {key: median(row[key] for row in rows) for key in rows[0]} for side, rows in runs.items()}
    for side, rows in runs.items():
        sides[side]["seeds_for_good"] = sum(row["seconds"] < math.inf for row in rows)
    print_table(f"{ENV_ID}, seeds: {options.seeds}", sides, {
        f"CPU seconds to {SCORE} for good": "seconds", "  environment steps": "env_steps",
        "  seeds that get there": "seeds_for_good", f"CPU seconds to the first {SCORE}": "first_seconds",
        "  environment steps ": "first_env_steps", "score at the end": "final_score",
        "steps a CPU second": "steps_per_second", "peak memory, MB": "peak_mb",
    })  # fmt: skip
    return {**sides, "score": SCORE, "medians": sides, "runs": runs}


def print_table(title: str, sides: dict[str, dict], rows: dict[str, str]) -> None:
    print(f"\n{title:32}" + "".join(f"{name:>12}" for name in [*sides, *["peer/ours"] * (len(sides) > 1)]))
    for label, key in rows.items():
        values = [side[key] for side in sides.values()]
        ratio = f"{values[1] / values[0]:12.2f}" if len(values) > 1 and values[0] else ""
        print(f"{label:32}" + "".join(f"{value:12.4g}" for value in values) + ratio, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=WORKERS, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="counted repetitions of each side")
    parser.add_argument("--demos", help="gail: an .npz file of CartPole-v1 demonstrations")
    parser.add_argument("--total-timesteps", type=int, default=100_000, help="gail: environment steps of a run")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has imitation")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit, which ends the workers and clears the folder
    code = "import importlib.metadata, imitation; print('imitation', importlib.metadata.version('imitation'))"
    found = subprocess.run([options.peer_python, "-c", code], capture_output=True, text=True)
    peer = found.stdout.split("\n")[0] if found.returncode == 0 else None
    pythons = {"ours": sys.executable, "peer": options.peer_python}
    if peer is None:
        print(f"{options.peer_python} cannot import imitation: our side alone")
        del pythons["peer"]
    with tempfile.TemporaryDirectory() as folder:
        result = {"maxent_irl": bench_irl, "gail": bench_gail}[options.method](pythons, options, folder)
    ours, other = result.pop("ours"), result.pop("peer", None)
    result |= {f"ours_{key}": ours[key] for key in ("seconds", "peak_mb")}
    result |= {f"peer_{key}": other and other[key] for key in ("seconds", "peak_mb")}
    result["ratio"] = other and other["seconds"] / ours["seconds"] if ours["seconds"] < math.inf else None
    result["memory_ratio"] = other and ours["peak_mb"] / other["peak_mb"]
    result = {"method": options.method, "device": "cpu", "peer": peer, "seeds": options.seeds, **result}
    print(json.dumps(json.loads(json.dumps(result), parse_constant=lambda _: None)))  # JSON knows no infinity


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main()
