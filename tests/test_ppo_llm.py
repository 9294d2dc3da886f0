"""ppo_llm.py: rewards, advantages, losses and values by hand; then whole runs against a naive implementation, and TRL's.

What ppo_llm.py shares word for word with grpo_llm.py is tested in test_grpo_llm.py."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import digit_reward, make_model, run_folder, scalars, tiny_flags, weights, write_rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaModel
from transformers import PreTrainedTokenizerFast

import ppo_llm
from ppo_llm import (
    Args, completion_logprobs, completion_values, gae, load_pretrained, load_value_model, main, pack, ppo_loss,
    token_rewards, whiten,
)  # fmt: skip

TOKENS = ["#", "<eos>", *"0123456789+-= abcd"]  # every id but EOS is a character, so that a text tells its ids
STOPS = [1, TOKENS.index("+")]
TRAIN = [{"prompt": f"{a}" * (1 + a % 3) + f"+{b}=", "answer": f"{a}{b}"} for a in range(4) for b in range(2)]
HELD_OUT = [{"prompt": f"{a}" * (1 + a % 2) + "-1=", "answer": f"{a}"} for a in range(6)]
FROZEN = 1e-12  # a learning rate that changes no weight by more than rounding
load, load_rated = AutoModelForCausalLM.from_pretrained, AutoModelForSequenceClassification.from_pretrained


def make_tokenizer(tokens: list[str], **special) -> PreTrainedTokenizerFast:
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="#"))
    characters.pre_tokenizer, characters.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", **special)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder, model = tmp_path_factory.mktemp("model"), make_model("llama", scale=0.1)
    model.config.eos_token_id, model.generation_config.eos_token_id = 1, STOPS
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    make_tokenizer(TOKENS).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory) -> str:
    """Another model of the policy's architecture, with what reward_model.py writes and a pad token of its own."""
    folder = tmp_path_factory.mktemp("reward")
    make_model("llama", seed=1, scale=0.1, vocab_size=21).save_pretrained(folder)
    rated = load_rated(folder, num_labels=1)
    nn.init.normal_(rated.score.weight, std=0.2)
    rated.config.pad_token_id, rated.config.reward_mean, rated.config.reward_std = 20, 0.5, 2.0
    rated.save_pretrained(folder)
    make_tokenizer([*TOKENS, "<pad>"], pad_token="<pad>").save_pretrained(folder)
    return str(folder)


# ---- rewards and advantages


def lengths_mask(lengths: list[int], T: int) -> torch.Tensor:
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def random_batch(seed: int = 0, lengths: tuple[int, ...] = (5, 1, 3, 4), T: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    batch = {name: torch.randn(len(lengths), T, generator=generator) for name in names}
    return {**batch, "mask": lengths_mask(list(lengths), T)}


def test_the_score_lands_on_the_last_real_token():
    mask = lengths_mask([3, 1, 4], 4)
    log_ratio = torch.tensor([[0.5, -1.0, 2.0, 9.0], [1.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 1.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0]), log_ratio, mask, 0.1)
    assert torch.allclose(rewards, torch.tensor([
        [-0.05, 0.1, 9.8, 0.0], [19.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 29.9],
    ]))  # fmt: skip
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0]), log_ratio, mask, 0.0)
    advantages, returns = gae(rewards, torch.zeros(3, 4), mask, 1.0, 1.0)
    expected = torch.tensor([[10.0], [20.0], [30.0]]) * mask
    assert torch.equal(advantages, expected) and torch.equal(returns, expected)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    """Schulman et al. 2016, eq. 16, term by term; what stands behind a response's end does not matter."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    lengths = [7, 1, 4, 6]
    advantages, returns = gae(rewards, values, lengths_mask(lengths, 7), gamma, lam)
    for i, length in enumerate(lengths):
        following = [*values[i, 1:length].tolist(), 0.0]
        for t in range(length):
            deltas = [rewards[i, s] + gamma * following[s] - values[i, s] for s in range(t, length)]
            expected = sum((gamma * lam) ** l * delta for l, delta in enumerate(deltas))
            assert advantages[i, t] == pytest.approx(expected.item(), abs=1e-12)
            assert returns[i, t] == pytest.approx((expected + values[i, t]).item(), abs=1e-12)
        assert not advantages[i, length:].any() and not returns[i, length:].any()


def test_whitening_runs_over_real_tokens_and_can_keep_the_mean():
    values, mask = torch.randn(3, 6) * 4 + 7, lengths_mask([6, 2, 4], 6)
    white = whiten(values, mask)
    assert white[mask].mean().abs() < 1e-6 and white[mask].std() == pytest.approx(1.0, rel=1e-5)
    kept = whiten(values, mask, shift_mean=False)
    assert kept[mask].mean() == pytest.approx(values[mask].mean().item(), rel=1e-5)
    assert kept[mask].std() == pytest.approx(1.0, rel=1e-5)
    padded = torch.cat([values, torch.full((3, 5), 1e9)], 1), torch.cat([mask, torch.zeros(3, 5, dtype=torch.bool)], 1)
    assert torch.allclose(whiten(*padded)[:, :6], white, atol=1e-6) and not whiten(*padded)[:, 6:].any()
    assert whiten(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]


# ---- the loss


def test_loss_by_hand():
    """Two responses: of a token whose ratio is clipped, and of two, one with a value beyond its range."""
    mask = torch.tensor([[True, False], [True, True]])
    logprobs = torch.tensor([[math.log(0.6), 5.0], [math.log(0.2), math.log(0.5)]])
    old_logprobs = torch.tensor([[math.log(0.3), 0.0], [math.log(0.4), math.log(0.5)]])
    advantages = torch.tensor([[1.0, 9.0], [2.0, -3.0]])
    values, old_values = torch.tensor([[1.0, 9.0], [0.5, 0.1]]), torch.tensor([[0.0, 0.0], [0.4, 0.0]])
    returns = torch.tensor([[2.0, 0.0], [0.0, 0.3]])
    loss, stats = ppo_loss(logprobs, old_logprobs, advantages, values, old_values, returns, mask, 0.2, 0.2, 0.1)
    # ratios 2 (clipped to 1.2: A > 0), 0.5 (A > 0: min keeps it) and 1
    policy = -(1.2 * 1.0 + 0.5 * 2.0 + 1.0 * -3.0) / 3
    # errors 1 against (0.2 - 2)^2, 0.25 against 0.25, 0.04 against 0.04
    value = (3.24 + 0.25 + 0.04) / 3 / 2
    k3 = (2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2))
    expected = {
        "loss/policy_avg": policy, "loss/value_avg": value, "policy/clipfrac_avg": 1 / 3, "val/clipfrac_avg": 1 / 3,
        "val/ratio": 3.5 / 3, "policy/approxkl_avg": k3 / 3,
    }  # fmt: skip
    assert loss.item() == pytest.approx(policy + 0.1 * value, rel=1e-6)
    assert {name: x.item() for name, x in stats.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
@pytest.mark.parametrize("size", [1, 2])
def test_microbatches_add_up_to_the_whole(size, ent_coef):
    batch = random_batch()
    learned = [batch[name].requires_grad_() for name in ("logprobs", "values")]
    whole, stats = ppo_loss(**batch, epsilon=0.2, cliprange_value=0.2, vf_coef=0.1, ent_coef=ent_coef)
    expected = torch.autograd.grad(whole, learned)
    total, sums = 0.0, dict.fromkeys(stats, 0.0)
    for start in range(0, 4, size):
        part = {name: x[start : start + size] for name, x in batch.items()}
        loss, part_stats = ppo_loss(**part, epsilon=0.2, cliprange_value=0.2, vf_coef=0.1, ent_coef=ent_coef,
                                    num_tokens=13)  # fmt: skip
        total = total + loss
        sums = {name: sums[name] + part_stats[name] for name in sums}
    assert torch.allclose(total, whole, rtol=1e-6)
    assert all(torch.allclose(x, y, atol=1e-7) for x, y in zip(torch.autograd.grad(total, learned), expected))
    assert all(torch.allclose(sums[name], stats[name], rtol=1e-5) for name in stats)


def test_padding_changes_no_figure_and_no_gradient():
    batch = random_batch()
    padded = {name: nn.functional.pad(x, (0, 3), value=1e6) for name, x in batch.items()}
    padded["mask"] = nn.functional.pad(batch["mask"], (0, 3))
    results = []
    for columns in (batch, padded):
        learned = [columns[name].requires_grad_() for name in ("logprobs", "values")]
        loss, stats = ppo_loss(**columns, epsilon=0.2, cliprange_value=0.2, vf_coef=0.1, ent_coef=0.1)
        gradients = torch.stack(torch.autograd.grad(loss, learned))
        assert not gradients[:, ~columns["mask"]].any()
        results.append((torch.stack([loss, *stats.values()]), gradients[:, :, :5]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5) and torch.equal(results[0][1], results[1][1])


def test_a_value_is_clipped_only_where_that_makes_it_worse():
    one = torch.ones(1, 1)
    for value, moves in ((0.9, False), (-0.5, True), (0.1, True)):  # old value 0, range 0.2, return 2
        values = torch.full((1, 1), value, requires_grad=True)
        loss, _ = ppo_loss(one, one, 0 * one, values, 0 * one, 2 * one, one.bool(), 0.2, 0.2, 1.0)
        loss.backward()
        assert bool(values.grad.abs() > 0) == moves


def test_entropy_bonus_has_the_gradient_of_the_entropy():
    """In expectation over the tokens, on-policy and off-policy, on a 6-way softmax."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    old = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (expected,) = torch.autograd.grad(-(logprobs.exp() * logprobs).sum(), logits, retain_graph=True)
    zero, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    for old_logprobs in (old, logprobs.detach()):
        loss = 0.0
        for new, before in zip(logprobs, old_logprobs):
            columns = (new.view(1, 1), before.view(1, 1), zero, zero, zero, zero, mask)
            loss = loss + before.exp() * ppo_loss(*columns, 0.2, 0.2, 0.1, ent_coef=1.0)[0]
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.allclose(-gradient, expected, atol=1e-10)


PROMPTS, LENGTHS = [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17, 3, 9]], [7, 1, 4, 2, 9, 3]
COMPLETIONS = [[(5 * i + t * t) % 17 + 2 for t in range(length)] for i, length in enumerate(LENGTHS)]  # 2 per prompt


def test_without_clipping_and_whitening_one_step_is_reinforce_with_the_value_as_baseline():
    """gamma = lambda = 1: the gradient of sum_t (reward-to-go_t - V_t) log pi_t / tokens, written out."""
    model, mask = make_model(), lengths_mask(LENGTHS, 9)
    logprobs = completion_logprobs(model, PROMPTS, COMPLETIONS, 1.0)
    scores, log_ratio, values = torch.randn(6), 0.1 * torch.randn(6, 9), torch.randn(6, 9)
    advantages, returns = gae(token_rewards(scores, log_ratio, mask, 0.05), values, mask, 1.0, 1.0)
    columns = (logprobs, logprobs.detach(), advantages, values, values, returns, mask)
    ours = torch.autograd.grad(ppo_loss(*columns, math.inf, math.inf, 0.0)[0], list(model.parameters()), retain_graph=True)
    total = 0.0
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            reward_to_go = scores[i] - 0.05 * log_ratio[i, t:length].sum()
            total = total + (reward_to_go - values[i, t]) * logprobs[i, t]
    expected = torch.autograd.grad(-total / mask.sum(), list(model.parameters()))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(ours, expected))
    assert max(x.abs().max() for x in ours) > 1e-2


# ---- values


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_a_value_is_the_heads_output_on_the_state_before_the_token(architecture, tmp_path):
    """As transformers' own classifier gives it for the prompt and the response up to that token, alone."""
    make_model(architecture).save_pretrained(tmp_path)
    torch.manual_seed(0)
    value_model, head = load_rated(tmp_path, num_labels=1, pad_token_id=19).eval(), nn.Linear(32, 1)  # no data has 19
    head.weight.data = value_model.score.weight.data
    values = completion_values(value_model, head, PROMPTS, COMPLETIONS)  # (6, 9)
    assert values.shape == (6, 9) and not values[~lengths_mask(LENGTHS, 9)].any()
    for i, completion in enumerate(COMPLETIONS):
        for t in range(len(completion)):
            alone = value_model(input_ids=torch.tensor([PROMPTS[i // 2] + completion[:t]])).logits + head.bias
            assert values[i, t].item() == pytest.approx(alone.item(), abs=1e-4)


def test_values_are_fp32_under_autocast():
    model, head = make_model(), nn.Linear(32, 1)
    with torch.autocast("cpu", torch.bfloat16):
        values = completion_values(model, head, PROMPTS, COMPLETIONS)
        hidden = ppo_llm.completion_states(model, PROMPTS, COMPLETIONS).float()
    exact = (hidden.double() @ head.weight.double().T + head.bias.double())[:, 0]
    assert values.dtype == torch.float32
    assert torch.allclose(values[lengths_mask(LENGTHS, 9)].double(), exact, atol=1e-6, rtol=0)


REFUSED = ["no reward model", "ids", "type", "context", "window"]


@pytest.mark.parametrize("case", ["as it is", "normalized", *REFUSED])
def test_where_the_value_network_starts(model_folder, reward_folder, tmp_path, case):
    """From the reward model and its score, if it reads the same ids in the same way; else from the policy, values 0."""
    if case == "type":
        make_model("gpt2", vocab_size=21).save_pretrained(tmp_path)
    rated = load_rated(tmp_path if case == "type" else reward_folder, num_labels=1, pad_token_id=20)
    rated.config.reward_mean, rated.config.reward_std = 0.5, 2.0
    rated.config.update({"context": {"max_position_embeddings": 64}, "window": {"sliding_window": 8}}.get(case, {}))
    rated.save_pretrained(tmp_path)
    tokens = [token.replace("a", "z") for token in TOKENS] if case == "ids" else TOKENS
    make_tokenizer([*tokens, "<pad>"], pad_token="<pad>").save_pretrained(tmp_path)
    path = None if case == "no reward model" else str(tmp_path)
    args = Args(reward_model_path=path, normalize_reward_model=case == "normalized")
    policy, tokenizer = load_pretrained(model_folder, "")
    value_model, head = load_value_model(args, policy, tokenizer, model_folder)
    for ids in PROMPTS:
        ids = torch.tensor([ids])
        hidden = value_model.base_model(ids).last_hidden_state[:, -1]
        score = (rated(ids).logits - args.normalize_reward_model * 0.5) / (1 + args.normalize_reward_model)
        if case in REFUSED:
            assert torch.equal(hidden, policy.model(ids).last_hidden_state[:, -1]) and head(hidden) == 0
        else:
            assert head(hidden).item() == pytest.approx(score.item(), abs=1e-5)
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in value_model.parameters()}
    assert head.weight.requires_grad and head.bias.requires_grad and head.weight.dtype == torch.float32


# ---- whole runs


@pytest.fixture
def run(tmp_path, model_folder, monkeypatch):
    """Does a tiny run with one reward function. Returns its arguments, metrics, tags' values, folder, checkpoint and
    the (prompt, text, answer) that were rewarded: `train` by step, those of the evaluations `before` and `after`
    training; `updates`: the prompts read by the networks between two optimizer steps, most tensors that were held
    for the backward pass when one of them began."""

    def run(reward=digit_reward, rows=TRAIN, resume=None, **flags):
        def accuracy_reward(*call):
            calls.append(call)
            return reward(*call)

        def forward(model, *inputs, **options):
            if torch.is_grad_enabled():
                texts = ["".join(TOKENS[i] for i in ids) for ids in options["input_ids"].tolist()]
                updates[-1] |= {row["prompt"] for row in rows for text in texts if text.startswith(row["prompt"])}
            return plain_forward(model, *inputs, **options)

        calls, updates, plain_forward = [], [set()], LlamaModel.forward
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        (folder / "data").mkdir(parents=True)
        write_rows(folder / "data" / "train.jsonl", rows)
        write_rows(folder / "data" / "test.jsonl", HELD_OUT)
        own = {"dataset_name": str(folder / "data"), "max_eval_samples": 6, "eval_generations": 4}
        args = Args(**{**tiny_flags("ppo_llm", folder, model_folder), **own, **flags})
        handle = torch.optim.optimizer.register_optimizer_step_post_hook(lambda *_: updates.append(set()))
        with monkeypatch.context() as patched:
            patched.setattr(ppo_llm, "REWARDS", ((accuracy_reward, 1.0),))
            patched.setattr(LlamaModel, "forward", forward)
            metrics = main(args if resume is None else Args(resume=str(resume)))
        handle.remove()
        run_dir = resume or run_folder(args)
        held_out = {row["prompt"] for row in HELD_OUT}
        train, evaluated = ([c for c in calls if (c[0] in held_out) == side] for side in (False, True))
        size, B = 6 * (args.eval_generations + 1), args.generation_batch_size  # of an evaluation and of a step
        tags = {tag: [value for _, value in points] for tag, points in scalars(run_dir).items()}
        return SimpleNamespace(args=args, metrics=metrics, tags=tags, folder=run_dir, before=evaluated[:size],
                               after=evaluated[-size:], train=[train[i : i + B] for i in range(0, len(train), B)],
                               checkpoint=torch.load(run_dir / "checkpoint.pt", weights_only=True),
                               updates=updates[:-1])  # fmt: skip

    return run


def completion_ids(text):
    """The ids of a completion, EOS among them if it is short."""
    ids = [TOKENS.index(character) for character in text]
    return ids + [1] * (len(ids) < 6 and ids[-1:] != STOPS[1:])


def logprobs_of(model, prompt, text, temperature=1.0):
    """Log-probabilities of a completion's tokens. No padding, no mask, all logits."""
    completion, L = completion_ids(text), len(prompt)
    ids = torch.tensor([[TOKENS.index(character) for character in prompt] + completion])
    logits = model(input_ids=ids).logits[0, L - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, L:, None])[:, 0]


def reward_by_prompt(prompt, completion, answer):
    return completion.count("+") + digit_reward(prompt, completion, answer) + int(answer) / 20


@torch.no_grad()
def rated_scores(args, calls):
    rated = load_rated(args.reward_model_path)
    logits = [rated(torch.tensor([[TOKENS.index(x) for x in prompt + text]])).logits for prompt, text, _ in calls]
    return (torch.cat(logits)[:, 0] - 0.5) / 2.0 if args.normalize_reward_model else torch.cat(logits)[:, 0]


def train_by_hand(result, model_folder):
    """PPO on the completions and minibatches of a run, one sequence at a time. Yields the tags that each step should
    have, with the policy and the critic as they then are."""
    args, flat = result.args, torch.cat
    policy, reference, value_model, head = *(load(model_folder) for _ in range(3)), nn.Linear(32, 1)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    if args.reward_model_path:  # the value of a text is then its score
        value_model, (mean, std) = load_rated(args.reward_model_path), (0.5, 2.0) if args.normalize_reward_model else (0, 1)
        head.weight.data, head.bias.data = value_model.score.weight.data / std, torch.tensor([-mean / std])
    value_model = policy if args.share_value_backbone else value_model
    critic = head if args.share_value_backbone else nn.ModuleList([value_model, head])
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], eps=1e-5, weight_decay=0.0)
    last_update = args.max_steps * args.num_ppo_epochs * args.num_mini_batches - 1
    updates, num_tokens, index = iter(result.updates), 0, 0

    def values_of(prompt, text):
        ids = torch.tensor([[TOKENS.index(character) for character in prompt] + completion_ids(text)])
        return head(value_model.base_model(ids).last_hidden_state[0, len(prompt) - 1 : -1])[:, 0]

    for calls in result.train:
        with torch.no_grad():
            old, ref = ([logprobs_of(m, *c[:2], args.temperature) for c in calls] for m in (policy, reference))
            old_values = [values_of(*c[:2]) for c in calls]
        function, lengths = torch.tensor([reward_by_prompt(*c) for c in calls]), torch.tensor([len(x) for x in old])
        stopped = torch.tensor([completion_ids(text)[-1] in STOPS for _, text, _ in calls])
        rated = rated_scores(args, calls) if args.reward_model_path else function
        scores, kls = rated - args.missing_eos_penalty * ~stopped, torch.stack([(a - b).sum() for a, b in zip(old, ref)])
        rewards = [args.kl_coef * (b - a) for a, b in zip(old, ref)]
        for r, score in zip(rewards, scores):
            r[-1] += score
        if args.whiten_rewards:
            mean, std = flat(rewards).mean(), flat(rewards).std()
            rewards = [(r - mean) / std + mean for r in rewards]
        raw = []
        for r, v in zip(rewards, old_values):
            deltas, t = r + args.gamma * flat([v[1:], torch.zeros(1)]) - v, torch.arange(len(r))
            raw.append(((args.gamma * args.lam) ** (t - t[:, None]).clamp(min=0)).triu() @ deltas)
        returns = [a + v for a, v in zip(raw, old_values)]
        advantages = [(a - flat(raw).mean()) / flat(raw).std() for a in raw]
        stats, passes, pass_kl = {}, 0, 0.0
        while passes < args.num_ppo_epochs and (args.target_kl is None or pass_kl <= args.target_kl):
            passes, kl_before, seen = passes + 1, stats.get("policy/approxkl_avg", 0.0), []
            for _ in range(args.num_mini_batches):
                prompts = next(updates)
                seen += prompts
                chosen, loss = [i for i, call in enumerate(calls) if call[0] in prompts], 0.0
                assert len(chosen) == len(calls) // args.num_mini_batches
                for i in chosen:
                    new, v, A = logprobs_of(policy, *calls[i][:2], args.temperature), values_of(*calls[i][:2]), advantages[i]
                    ratio = (new - old[i]).exp()
                    v_clipped = old_values[i] + (v - old_values[i]).clamp(-args.cliprange_value, args.cliprange_value)
                    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - args.epsilon, 1 + args.epsilon) * A)
                    error, other_error = (v - returns[i]) ** 2, (v_clipped - returns[i]) ** 2
                    value_loss, bonus = torch.maximum(error, other_error) / 2, ratio.detach() * new**2 / 2
                    loss = loss + (args.vf_coef * value_loss - surrogate + args.ent_coef * bonus).sum()
                    for tag, x in {
                        "loss/policy_avg": -surrogate, "loss/value_avg": value_loss, "val/ratio": ratio,
                        "policy/approxkl_avg": ratio - 1 - ratio.log(), "val/clipfrac_avg": other_error > error,
                        "policy/clipfrac_avg": torch.where(A > 0, ratio > 1 + args.epsilon, ratio < 1 - args.epsilon),
                    }.items():  # fmt: skip
                        stats[tag] = stats.get(tag, 0.0) + x.sum().item() / lengths.sum().item()
                optimizer.zero_grad()
                (loss / lengths[chosen].sum()).backward()
                norms = [nn.utils.clip_grad_norm_(m.parameters(), args.max_grad_norm) for m in (policy, critic)]
                warmup, decay = min(1.0, (index + 1) / (args.warmup_steps + 1)), max(0, index - args.warmup_steps)
                rate = args.learning_rate * warmup * (1 - decay / (last_update - args.warmup_steps))
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
                index += 1
            assert sorted(seen) == sorted({call[0] for call in calls})  # every prompt once per pass
            pass_kl = stats["policy/approxkl_avg"] - kl_before
        index += (args.num_ppo_epochs - passes) * args.num_mini_batches  # passes that were not made count as made
        num_tokens += lengths.sum() + sum(len(prompt) for prompt, _, _ in calls)
        tags = {tag: x / passes for tag, x in stats.items()} | {
            "objective/scores": scores.mean(), "train/reward_std": scores.std(correction=0), "objective/kl": kls.mean(),
            "objective/non_score_reward": -args.kl_coef * kls.mean(), "policy/epochs": passes,
            "objective/rlhf_reward": (scores - args.kl_coef * kls).mean(), "charts/learning_rate": rate,
            "objective/entropy": -flat(old).sum() / len(calls), "train/grad_norm": norms[0], "val/grad_norm": norms[1],
            "losses/explained_variance": 1 - flat(raw).var() / flat(returns).var(), "train/num_tokens": num_tokens,
            "train/completions/mean_length": lengths.float().mean(), "train/rewards/accuracy_reward/mean": function.mean(),
            "train/completions/clipped_ratio": 1 - stopped.float().mean(),
        }  # fmt: skip
        tags |= {"train/rewards/reward_model/mean": rated.mean()} if args.reward_model_path else {}
        yield {tag: float(x) for tag, x in tags.items()}, policy, critic


HAND = {
    "max_steps": 2, "learning_rate": 1e-3, "num_ppo_epochs": 2, "num_mini_batches": 2, "num_generations": 2,
    "temperature": 0.7, "kl_coef": 1.5, "missing_eos_penalty": 0.7, "max_tokens_per_microbatch": 40, "warmup_steps": 1,
    "epsilon": 0.05, "cliprange_value": 0.02, "gamma": 0.95, "lam": 0.9,
}  # fmt: skip


@pytest.mark.parametrize("flags", [
    {"whiten_rewards": True},
    {"rated": True, "whiten_rewards": True, "normalize_reward_model": True, "gradient_checkpointing": True},
    {"rated": True, "num_generations": 1, "num_mini_batches": 4, "max_grad_norm": 0.05, "generation_batch_size": 8},
    {"share_value_backbone": True, "num_generations": 4, "ent_coef": 0.2, "vf_coef": 0.7, "num_ppo_epochs": 3},
    {"share_value_backbone": True, "rated": True, "target_kl": 1e-4, "num_ppo_epochs": 3, "missing_eos_penalty": 0.0},
])  # fmt: skip
def test_two_steps_are_those_computed_by_hand(run, model_folder, reward_folder, flags):
    flags = {**HAND, **flags}
    if flags.pop("rated", False):
        flags["reward_model_path"] = reward_folder
    result = run(reward_by_prompt, **flags)
    for step, (expected, policy, critic) in enumerate(train_by_hand(result, model_folder)):
        for tag, value in expected.items():
            assert result.tags[tag][step] == pytest.approx(value, rel=2e-3, abs=1e-5), (step, tag)
    written = {tag for tag in result.tags if not tag.startswith(("eval/", "samples"))}
    assert written - {*expected} == {"charts/SPS", *(f"train/sampling/sampling_logp_difference/{x}" for x in ("mean", "max"))}
    assert 0 < max(result.tags["train/sampling/sampling_logp_difference/max"]) < 1e-4
    assert min(result.tags["objective/kl"][1], max(result.tags["val/clipfrac_avg"])) > 1e-3
    for ours, theirs in ((weights(result.folder), policy.state_dict()), (result.checkpoint["critic"], critic.state_dict())):
        assert len(ours) == len(theirs) and all(x.dtype == torch.float32 for x in ours.values())
        for name, x in theirs.items():
            assert (ours[name] - x).abs().max() < 1e-5, name
    if "reward_model_path" in flags:  # it is the reward; functions are only logged
        scores = rated_scores(result.args, result.before)  # of 4 samples per prompt, then of the greedy ones
        for name, value in (("reward", scores[:24]), ("reward_model", scores[:24]), ("reward_greedy", scores[24:])):
            assert result.metrics[f"eval/{name}_before"] == pytest.approx(value.mean().item(), abs=1e-4), name
