"""ppo_llm.py: rewards, advantages, loss and values by hand, then whole runs against a naive implementation of PPO.
Its sampler, log-probabilities, data and models are tested in test_ppo_shared.py."""

import weakref
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import digit_reward, make_model, run_folder, scalars, tiny_flags, weights, write_rows
from test_grpo_runs import FROZEN, HELD_OUT, TOKENS, TRAIN, load
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForSequenceClassification, LlamaModel, PreTrainedTokenizerFast

import ppo_llm
from ppo_llm import Args, completion_values, gae, main, ppo_loss, token_rewards, whiten

STOPS = [1, TOKENS.index("+")]
PROMPTS, LENGTHS = [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17, 3, 9]], [7, 1, 4, 2, 9, 3]
COMPLETIONS = [[(5 * i + t * t) % 17 + 2 for t in range(length)] for i, length in enumerate(LENGTHS)]  # 2 per prompt
MASK = torch.arange(9) < torch.tensor(LENGTHS)[:, None]  # (6, 9)
load_rated = AutoModelForSequenceClassification.from_pretrained


def save_tokenizer(folder, tokens: list[str], **special) -> str:
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="#"))
    characters.pre_tokenizer, characters.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder, model = tmp_path_factory.mktemp("model"), make_model("llama", scale=0.1)
    model.config.eos_token_id, model.generation_config.eos_token_id = 1, STOPS
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    return save_tokenizer(folder, TOKENS)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory) -> str:
    """Another model of the policy's architecture, with what reward_model.py writes and a pad token of its own."""
    folder = tmp_path_factory.mktemp("reward")
    make_model("llama", seed=1, scale=0.1, vocab_size=21).save_pretrained(folder)
    rated = load_rated(folder, num_labels=1, pad_token_id=20)
    rated.config.reward_mean, rated.config.reward_std = 0.5, 2.0
    nn.init.normal_(rated.score.weight, std=0.2)
    rated.save_pretrained(folder)
    return save_tokenizer(folder, [*TOKENS, "<pad>"], pad_token="<pad>")


def test_the_score_lands_on_the_last_real_token():
    mask, scores = torch.arange(4) < torch.tensor([[3], [1], [4]]), torch.tensor([10.0, 20.0, 30.0])
    log_ratio = torch.tensor([[0.5, -1.0, 2.0, 9.0], [1.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 1.0]])
    expected = torch.tensor([[-0.05, 0.1, 9.8, 0.0], [19.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 29.9]])
    assert torch.allclose(token_rewards(scores, log_ratio, mask, 0.1), expected)
    free = token_rewards(scores, log_ratio, mask, 0.0)
    assert all(torch.equal(x, scores[:, None] * mask) for x in gae(free, torch.zeros(3, 4), mask, 1.0, 1.0))


def test_loss_by_hand():
    """Two responses: of a token whose ratio is clipped, and of two, one with a value beyond its range."""
    mask, advantages = torch.tensor([[True, False], [True, True]]), torch.tensor([[1.0, 9.0], [2.0, -3.0]])
    logprobs = torch.tensor([[0.6, 5.0], [0.2, 0.5]]).log().requires_grad_()
    old_logprobs = torch.tensor([[0.3, 1.0], [0.4, 0.5]]).log()
    values = torch.tensor([[1.0, 9.0], [0.5, 0.1]], requires_grad=True)
    old_values, returns = torch.tensor([[0.0, 0.0], [0.4, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.3]])
    loss, stats = ppo_loss(logprobs, old_logprobs, advantages, values, old_values, returns, mask, 0.2, 0.3, 0.1)
    policy = -(1.2 * 1.0 + 0.5 * 2.0 + 1.0 * -3.0) / 3  # ratios 2 (clipped to 1.2: A > 0), 0.5 (min keeps it) and 1
    value = (2.89 + 0.25 + 0.04) / 3 / 2  # errors 1 against (0.3 - 2)^2, 0.25 against 0.25, 0.04 against 0.04
    assert loss.item() == pytest.approx(policy + 0.1 * value, rel=1e-6)
    assert {name: x.item() for name, x in stats.items()} == pytest.approx({
        "loss/policy_avg": policy, "policy/clipfrac_avg": 1 / 3, "val/ratio": 3.5 / 3, "loss/value_avg": value,
        "val/clipfrac_avg": 1 / 3, "policy/approxkl_avg": 0.5 / 3,  # (1 - ln 2) + (ln 2 - 1/2) + 0
    }, rel=1e-5)  # fmt: skip
    loss.backward()  # where the worse of the two is constant, nothing moves
    assert torch.allclose(logprobs.grad, torch.tensor([[0.0, 0.0], [-0.5 * 2 / 3, 3 / 3]]))
    assert torch.allclose(values.grad, 0.1 * torch.tensor([[0.0, 0.0], [0.5 / 3, -0.2 / 3]]))


def test_microbatches_add_up_and_padding_changes_nothing():
    names, results = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "mask"), []
    batch = dict(zip(names, [*torch.randn(6, 6, 9, generator=torch.Generator().manual_seed(0)), MASK]))
    padded = {name: nn.functional.pad(x, (0, 3), value=0 if name == "mask" else 1e6) for name, x in batch.items()}
    for columns, size, num_tokens in ((batch, 6, None), (padded, 4, MASK.sum()), (padded, 1, MASK.sum())):
        learned, total = [columns[name].requires_grad_() for name in ("logprobs", "values")], 0.0
        for i in range(0, 6, size):
            mb = (columns[name][i : i + size] for name in names)
            loss, stats = ppo_loss(*mb, 0.2, 0.2, 0.1, 0.3, num_tokens)
            total = total + torch.stack([loss, *stats.values()])
        gradients = torch.stack(torch.autograd.grad(total[0], learned))
        assert not gradients[:, ~columns["mask"]].any()
        results.append((total, gradients[:, :, :9]))
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-7) for other in results[1:] for x, y in zip(results[0], other))


def test_entropy_bonus_has_the_gradient_of_the_entropy():
    """In expectation over the tokens, on-policy and off-policy, on a 6-way softmax."""
    generator, columns = torch.Generator().manual_seed(0), torch.zeros(4, 6, 1, dtype=torch.float64)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    logprobs, other = logits.log_softmax(0), torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    (expected,) = torch.autograd.grad(-(logprobs.exp() * logprobs).sum(), logits, retain_graph=True)
    for old in (other, logprobs.detach()):
        new = logprobs.detach().view(6, 1).requires_grad_()
        ppo_loss(new, old.view(6, 1), *columns, new < 0, 0.2, 0.2, 0.1, ent_coef=1.0, num_tokens=1)[0].backward()
        (gradient,) = torch.autograd.grad(old.exp() * new.grad[:, 0] @ logprobs, logits, retain_graph=True)
        assert torch.allclose(-gradient, expected, atol=1e-10)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_a_value_is_the_heads_fp32_output_on_the_state_before_the_token(architecture):
    model, head = make_model(architecture), nn.Linear(32, 1)
    values = completion_values(model, head, PROMPTS, COMPLETIONS)  # (6, 9)
    assert values.shape == (6, 9) and not values[~MASK].any()
    for i, t in MASK.nonzero().tolist():
        alone = torch.tensor([PROMPTS[i // 2] + COMPLETIONS[i][:t]])
        assert values[i, t].item() == pytest.approx(head(model.base_model(alone)[0][0, -1]).item(), abs=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        values = completion_values(model, head, PROMPTS, COMPLETIONS)[MASK]
        hidden = ppo_llm.completion_states(model, PROMPTS, COMPLETIONS).double()
    exact = hidden @ head.weight.double()[0] + head.bias.double()
    assert values.dtype == torch.float32 and torch.allclose(values.double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case, changes", [
    ("as it is", {}), ("no reward model", {}), ("other ids", {}), ("other type", {}),
    ("other context", {"max_position_embeddings": 64}), ("other window", {"sliding_window": 8}),
])  # fmt: skip
def test_where_the_value_network_starts(model_folder, reward_folder, tmp_path, case, changes):
    """From the reward model and its score, if it reads the same ids in the same way; else from the policy, values 0."""
    make_model("gpt2", vocab_size=21).save_pretrained(tmp_path)
    rated = load_rated(tmp_path if case == "other type" else reward_folder, num_labels=1, pad_token_id=20)
    rated.config.update(changes)
    rated.save_pretrained(tmp_path)
    tokens = [token.replace("a", "z") for token in TOKENS] if case == "other ids" else TOKENS
    save_tokenizer(tmp_path, [*tokens, "<pad>"], pad_token="<pad>")
    args = Args(reward_model_path=None if case == "no reward model" else str(tmp_path))
    policy, tokenizer = ppo_llm.load_pretrained(model_folder, "")
    value_model, head = ppo_llm.load_value_model(args, policy, tokenizer, model_folder)
    for ids in (torch.tensor([ids]) for ids in PROMPTS):
        state = value_model.base_model(ids).last_hidden_state[:, -1]
        if case == "as it is":
            assert head(state).item() == pytest.approx(rated(ids).logits.item(), abs=1e-5)
        else:
            assert torch.equal(state, policy.model(ids).last_hidden_state[:, -1]) and head(state) == 0
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in value_model.parameters()}


# ---- whole runs


@pytest.fixture
def run(tmp_path, model_folder, monkeypatch):
    """Does a tiny run, or goes on with one. Returns its arguments, metrics, tags' values, folder and checkpoint; the
    (prompt, text, answer) that were rewarded, in `train` by step, `before` and `after` training; `updates`: the prompts
    that the networks learned from, by optimizer step; `learning`: tensors kept by others, recomputation, autocast."""

    def run(reward=digit_reward, rows=TRAIN, resume=None, **flags):
        def accuracy_reward(*call):
            calls.append(call)
            return reward(*call)

        def save(tensor):
            alive.add(box := partial(torch.as_tensor, tensor))
            return box

        def forward(model, *inputs, **options):
            if torch.is_grad_enabled():
                recomputed = model.training and model.layers[0].gradient_checkpointing
                learning.add((len(alive), recomputed, torch.is_autocast_enabled("cpu")))
                texts = ["".join(TOKENS[i] for i in ids) for ids in options["input_ids"].tolist()]
                updates[-1] |= {row["prompt"] for row in rows for text in texts if text.startswith(row["prompt"])}
            sequences.append(len(options.get("input_ids", ())))
            return plain_forward(model, *inputs, **options)

        calls, updates, learning, alive, plain_forward = [], [set()], set(), weakref.WeakSet(), LlamaModel.forward
        sequences = []  # in each forward pass
        folder, held_out = tmp_path / str(len([*tmp_path.iterdir()])), {row["prompt"] for row in HELD_OUT}
        (folder / "data").mkdir(parents=True)
        write_rows(folder / "data" / "train.jsonl", rows)
        write_rows(folder / "data" / "test.jsonl", HELD_OUT)
        own = {"dataset_name": str(folder / "data"), "max_eval_samples": 6, "eval_generations": 4}
        args = Args(**{**tiny_flags("ppo_llm", folder, model_folder), **own, **flags})
        steps = register_optimizer_step_post_hook(lambda *_: updates.append(set()))
        saving = torch.autograd.graph.saved_tensors_hooks(save, lambda box: box())
        with monkeypatch.context() as patched, saving, steps:
            patched.setattr(ppo_llm, "REWARDS", ((accuracy_reward, 1.0),))
            patched.setattr(LlamaModel, "forward", forward)
            metrics = main(Args(resume=str(resume)) if resume else args)
        run_dir, B = resume or run_folder(args), args.generation_batch_size
        train, evaluated = ([c for c in calls if (c[0] in held_out) == side] for side in (False, True))
        assert max(sequences) <= B  # also in evaluation, which so needs no more memory than a rollout

        def sampled_first(calls):
            """The 24 sampled completions of an evaluation, then the 6 greedy ones; it takes some prompts at a time."""
            size, sampled, greedy = B // max(4, args.num_generations), [], []
            while calls:
                n = min(size, len(calls) // 5)
                sampled, greedy, calls = sampled + calls[: 4 * n], greedy + calls[4 * n : 5 * n], calls[5 * n :]
            return sampled + greedy

        return SimpleNamespace(
            args=args, metrics=metrics, folder=run_dir, updates=updates[:-1], learning=learning,
            before=sampled_first(evaluated[:30]), after=sampled_first(evaluated[-30:]),
            train=[train[i : i + B] for i in range(0, len(train), B)],
            tags={tag: [value for _, value in points] for tag, points in scalars(run_dir).items()},
            checkpoint=torch.load(run_dir / "checkpoint.pt", weights_only=True),
        )  # fmt: skip

    return run


def reward_by_prompt(prompt, completion, answer):
    return completion.count("+") + digit_reward(prompt, completion, answer) + int(answer) / 20


def ids_of(prompt, text, *_):
    """The ids of a prompt and its completion, EOS among them if that is short."""
    end = [1] * (len(text) < 6 and not text.endswith("+"))
    return torch.tensor([[TOKENS.index(character) for character in prompt + text] + end])


def logprobs_of(model, call, temperature=1.0):
    """Log-probabilities of a completion's tokens. No padding, no mask, all logits."""
    ids, L = ids_of(*call), len(call[0])
    logits = model(input_ids=ids).logits[0, L - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, L:, None])[:, 0]


def table(columns):
    return torch.stack([nn.functional.pad(x, (0, 6 - len(x))) for x in columns])


def values_of(value_model, head, call):
    return head(value_model.base_model(ids_of(*call)).last_hidden_state[0, len(call[0]) - 1 : -1])[:, 0]


@torch.no_grad()
def scores_of(args, calls):
    if args.reward_model_path is None:
        return torch.tensor([reward_by_prompt(*call) for call in calls])
    rated = load_rated(args.reward_model_path)
    texts = [ids_of(*c)[:, : len(c[0] + c[1])] for c in calls]  # EOS ends a text, also where a completion was cut off
    scores = torch.cat([rated(torch.cat([ids, torch.tensor([[1]])], 1)).logits[0] for ids in texts])
    return (scores - 0.5) / 2.0 if args.normalize_reward_model else scores


def train_by_hand(result, model_folder):
    """PPO on a run's completions and minibatches, sequence by sequence. Yields each step's tags, policy and critic."""
    a, updates, num_tokens, update = result.args, iter(result.updates), 0, 0
    policy, reference, value_model, head = *(load(model_folder) for _ in range(3)), nn.Linear(32, 1)
    head.weight.data, head.bias.data = torch.zeros(1, 32), torch.zeros(1)
    if a.reward_model_path and not a.share_value_backbone:  # the value of a text is then its score
        value_model, (mean, std) = load_rated(a.reward_model_path), (0.5, 2.0) if a.normalize_reward_model else (0, 1)
        head.weight.data, head.bias.data = value_model.score.weight.data / std, torch.tensor([-mean / std])
    critic = nn.ModuleList([value_model, head])
    value_model, critic = (policy, head) if a.share_value_backbone else (value_model, critic)
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], eps=1e-5, weight_decay=0.0)
    schedule = a.max_steps * a.num_ppo_epochs * a.num_mini_batches, a.warmup_steps, "linear"
    limits = {name: getattr(a, name) for name in ("epsilon", "cliprange_value", "vf_coef", "ent_coef")}
    for calls in result.train:
        assert {c[::2] for c in calls} == {(*row.values(),) for row in TRAIN}
        with torch.no_grad():
            old, ref = (table(logprobs_of(m, c, a.temperature) for c in calls) for m in (policy, reference))
            old_values, scored = table(values_of(value_model, head, c) for c in calls), scores_of(a, calls)
        mask, stopped = old != 0, torch.tensor([ids_of(*c)[0, -1].item() in STOPS for c in calls])
        scores, kl, N = scored - a.missing_eos_penalty * ~stopped, (old - ref).sum() / len(calls), mask.sum()
        rewards = token_rewards(scores, old - ref, mask, a.kl_coef)
        rewards = whiten(rewards, mask, shift_mean=False) if a.whiten_rewards else rewards
        raw, returns = gae(rewards, old_values, mask, a.gamma, a.lam)
        columns = {"old_logprobs": old, "advantages": whiten(raw, mask), "old_values": old_values, "returns": returns}
        stats, passes, pass_kl = defaultdict(float), 0, 0.0
        while passes < a.num_ppo_epochs and (a.target_kl is None or pass_kl <= a.target_kl):
            passes, kl_before, seen = passes + 1, float(stats["policy/approxkl_avg"]), []
            for _ in range(a.num_mini_batches):
                prompts = next(updates)
                chosen = [i for i, call in enumerate(calls) if call[0] in prompts]
                assert len(chosen) == len(calls) // a.num_mini_batches
                seen += chosen
                loss, mb_stats = ppo_loss(
                    logprobs=table(logprobs_of(policy, calls[i], a.temperature) for i in chosen), mask=mask[chosen],
                    values=table(values_of(value_model, head, calls[i]) for i in chosen), **limits,
                    **{name: x[chosen] for name, x in columns.items()},
                )  # fmt: skip
                optimizer.zero_grad()
                loss.backward()
                for tag, x in mb_stats.items():
                    stats[tag] += x * mask[chosen].sum() / N
                for tag, network in (("train/grad_norm", policy), ("val/grad_norm", critic)):
                    stats[tag] += nn.utils.clip_grad_norm_(network.parameters(), a.max_grad_norm) / a.num_mini_batches
                rate = optimizer.param_groups[0]["lr"] = a.learning_rate * ppo_llm.lr_factor(update, *schedule)
                optimizer.step()
                update += 1
            assert sorted(seen) == [*range(len(calls))]  # every completion once per pass
            pass_kl = stats["policy/approxkl_avg"] - kl_before
        update += (a.num_ppo_epochs - passes) * a.num_mini_batches  # passes that are not made count as made
        num_tokens += N + sum(len(prompt) for prompt, _, _ in calls)
        tags = {tag: x / passes for tag, x in stats.items()} | {
            "objective/scores": scores.mean(), "train/reward_std": scores.std(correction=0), "objective/kl": kl,
            "objective/non_score_reward": -a.kl_coef * kl, "objective/rlhf_reward": scores.mean() - a.kl_coef * kl,
            "objective/entropy": -old.sum() / len(calls), "charts/learning_rate": rate, "policy/epochs": passes,
            "losses/explained_variance": 1 - raw[mask].var() / returns[mask].var(), "train/num_tokens": num_tokens,
            "train/completions/mean_length": N / len(calls),
            "train/completions/clipped_ratio": 1 - stopped.float().mean(),
            "train/rewards/accuracy_reward/mean": sum(reward_by_prompt(*c) for c in calls) / len(calls),
            f"train/rewards/{'reward_model' if a.reward_model_path else 'accuracy_reward'}/mean": scored.mean(),
        }  # fmt: skip
        yield {tag: float(x) for tag, x in tags.items()}, policy, critic


@pytest.mark.parametrize("flags", [
    {"whiten_rewards": True, "max_tokens_per_microbatch": 24},
    {"rated": True, "whiten_rewards": True, "normalize_reward_model": True, "gradient_checkpointing": True},
    {"rated": True, "num_generations": 1, "num_mini_batches": 4, "max_grad_norm": 0.05, "generation_batch_size": 8},
    {"share_value_backbone": True, "ent_coef": 0.2, "vf_coef": 0.7, "num_generations": 4, "generation_batch_size": 32},
    {"share_value_backbone": True, "rated": True, "target_kl": 0.132, "num_ppo_epochs": 4, "num_mini_batches": 4},
])  # fmt: skip
def test_two_steps_and_evaluations_are_those_computed_by_hand(run, model_folder, reward_folder, flags):
    own = {"max_steps": 2, "learning_rate": 1e-3, "num_ppo_epochs": 2, "num_mini_batches": 2, "num_generations": 2,
           "temperature": 0.7, "kl_coef": 1.5, "missing_eos_penalty": 0.7, "max_tokens_per_microbatch": 40, "lam": 0.9,
           "warmup_steps": 1, "eval_steps": 1, "epsilon": 0.05, "cliprange_value": 0.02, "gamma": 0.95}  # fmt: skip
    flags = own | {"reward_model_path": reward_folder if flags.get("rated") else None} | flags
    result, initial = run(reward_by_prompt, **{k: x for k, x in flags.items() if k != "rated"}), load(model_folder)
    for step, (expected, policy, critic) in enumerate(train_by_hand(result, model_folder)):
        for tag, value in expected.items():
            assert result.tags[tag][step] == pytest.approx(value, rel=1e-3, abs=1e-5), (step, tag)
    sampling = {f"train/sampling/sampling_logp_difference/{name}" for name in ("mean", "max")}
    assert {tag for tag in result.tags if not tag.startswith("eval")} == {*expected, "charts/SPS", *sampling}
    assert all(0 < min(result.tags[tag]) and max(result.tags[tag]) < 1e-4 for tag in sampling)
    assert min(abs(result.tags["objective/kl"][1]), max(result.tags["policy/clipfrac_avg"])) > 1e-3
    assert len({*map(frozenset, result.updates)}) > 2 and step == 1 and len(result.tags["eval/kl"]) == 3
    assert result.learning == {(0, "gradient_checkpointing" in flags, False)}  # one network's graph after the other's
    for ours, network in ((weights(result.folder), policy), (result.checkpoint["critic"], critic)):
        for name, x in network.state_dict().items():
            assert ours[name].dtype == torch.float32 and (ours[name] - x).abs().max() < 1e-5, name
    for suffix, calls, network in (("_before", result.before, initial), ("", result.after, policy)):
        for c in calls[24:]:
            ids = network.generate(ids_of(*c)[:, : len(c[0])], max_new_tokens=6, do_sample=False, pad_token_id=1)
            assert torch.equal(ids, ids_of(*c))
        assert [c[::2] for c in calls[:24:4]] == [c[::2] for c in calls[24:]] == [(*row.values(),) for row in HELD_OUT]
        scores, functions = scores_of(result.args, calls), torch.tensor([reward_by_prompt(*c) for c in calls])
        ratios = [logprobs_of(network, c) - logprobs_of(initial, c) for c in calls[:24]]  # at temperature 1
        for name, x in {
            "reward": scores[:24], "reward_greedy": scores[24:], "accuracy": functions[:24],
            "accuracy_greedy": functions[24:], "pass@4": functions[:24].view(6, 4).amax(1),
            "kl": [x.sum().item() for x in ratios], "mean_length": [len(x) for x in ratios],
        }.items():  # fmt: skip
            assert result.metrics[f"eval/{name}{suffix}"] == pytest.approx(float(sum(x) / len(x)), abs=1e-4), name


@pytest.mark.parametrize("shared", [False, True])
def test_the_value_loss_moves_a_shared_backbone_and_not_a_separate_policy(run, model_folder, shared):
    """One token per response and equal rewards: no advantage differs from another."""
    flags = {"max_completion_length": 1, "kl_coef": 0.0, "max_steps": 1, "share_value_backbone": shared}
    result, initial = run(lambda *_: 0.5, **flags), load(model_folder).state_dict()
    assert result.tags["val/grad_norm"][0] > 1e-2 and (result.tags["train/grad_norm"][0] > 1e-4) == shared
    assert all(torch.equal(x, initial[name]) for name, x in weights(result.folder).items()) == (not shared)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(run):
    result = run(bf16=True, max_steps=2, num_generations=4)
    assert {(0, 0, 1)} == result.learning and 1e-4 < result.tags["train/sampling/sampling_logp_difference/max"][0] < 0.1
    assert {x.dtype for part in ("model", "critic") for x in result.checkpoint[part].values()} == {torch.float32}
    assert abs(result.metrics["eval/kl_before"]) < 0.05 < abs(result.metrics["eval/kl"])


def test_steps_and_seeds_have_their_own_random_numbers_and_a_seed_repeats(run):
    flags = {"rows": TRAIN[:2], "num_generations": 8, "generation_batch_size": 8, "learning_rate": FROZEN}
    first, again, other = (run(seed=seed, **flags).train for seed in (1, 1, 2))  # two epochs, a prompt per step
    assert first == again and len({tuple(calls) for calls in first + other}) == 8
    assert [calls[0][0] for calls in first] != [calls[0][0] for calls in other]


def test_the_embedded_run_starts_from_its_supervised_model_and_learns_by_its_learning_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_llm, "REWARDS", ((digit_reward, 1.0),))
    own = {"max_steps": 4, "generation_batch_size": 64, "max_completion_length": 4, "device": "cpu", "bf16": False}
    for lr in (None, 0.0):
        metrics = main(Args(output_dir=f"{tmp_path}/{lr}", learning_rate=lr, sft_steps=2, max_eval_samples=32, **own))
        gain, kl = metrics["eval/digit"] - metrics["eval/digit_before"], metrics["eval/kl"]
        assert gain == 0 and abs(kl) < 1e-5 if lr == 0.0 else gain > 0.2 and kl > 0.1
