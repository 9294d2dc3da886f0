"""grpo_llm.py: what a whole run does, by the files that it leaves and by what its reward function sees."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import digit_reward, make_model, run_folder, scalars, tiny_flags, weights, write_rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaModel, PreTrainedTokenizerFast

import grpo_llm

TOKENS = ["#", "<eos>", *"0123456789+-= abcd"]  # every id but EOS is a character, so that a text tells its ids
TRAIN = [{"prompt": f"{a}" * (1 + a % 3) + f"+{b}=", "answer": f"{a}{b}"} for a in range(4) for b in range(2)]
HELD_OUT = [{"prompt": f"{a}" * (1 + a % 2) + "-1=", "answer": f"{a}"} for a in range(6)]
FROZEN = 1e-12  # a learning rate that changes no weight by more than rounding
load = AutoModelForCausalLM.from_pretrained
OFF_POLICY = ["policy/approxkl_avg", "train/clip_ratio/low_mean", "train/clip_ratio/high_mean"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder, model = tmp_path_factory.mktemp("model"), make_model("llama", scale=0.1)
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    tokens = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="#"))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path, model_folder, monkeypatch):
    """Does a tiny run with one reward function. Returns its metrics, its tags' values, its folder, and the (prompt,
    text, answer) that were rewarded: `train` by step, and those of the evaluations `before` and `after` training."""

    def run(reward=digit_reward, rows=TRAIN, **flags):
        def watched(prompts, completions, answer, **columns):
            rows = [*zip(prompts, completions, answer)]
            calls.extend(rows)
            return [reward(*row) for row in rows]

        calls, folder = [], tmp_path / str(len([*tmp_path.iterdir()]))
        (folder / "data").mkdir(parents=True)
        write_rows(folder / "data" / "train.jsonl", rows)
        write_rows(folder / "data" / "test.jsonl", HELD_OUT)
        own = {"dataset_name": str(folder / "data"), "max_eval_samples": 6, "eval_generations": 4, "beta": 0.0}
        args = grpo_llm.Args(**{**tiny_flags("grpo_llm", folder, model_folder), **own, **flags})
        monkeypatch.setattr(grpo_llm, "REWARDS", {"accuracy": (watched, 1.0)})
        metrics = grpo_llm.main(args)
        held_out = {row["prompt"] for row in (HELD_OUT if args.dataset_name else grpo_llm.addition_rows()[1])}
        train, evaluated = ([c for c in calls if (c[0] in held_out) == side] for side in (False, True))
        size, B = 6 * (args.eval_generations + 1), args.generation_batch_size  # of an evaluation and of a step
        tags = {tag: [value for _, value in points] for tag, points in scalars(run_folder(args)).items()}
        return SimpleNamespace(metrics=metrics, tags=tags, folder=run_folder(args), before=evaluated[:size],
                               after=evaluated[-size:], train=[train[i : i + B] for i in range(0, len(train), B)])

    return run


def largest_change(run, model_folder):
    before, after = load(model_folder).state_dict(), weights(run.folder)
    return max((before[name] - value).abs().max().item() for name, value in after.items())


def logprobs_of(model, prompt, text, temperature=1.0):
    """Log-probabilities of a completion's tokens, EOS among them if it is short. No padding, no mask."""
    ids = [TOKENS.index(character) for character in prompt + text] + [1] * (len(text) < 6)
    logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("flags", [
    {"temperature": 0.7, "micro_batch_size": 3},
    {"loss_type": "grpo", "scale_rewards": "none", "mask_truncated_completions": True},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "gradient_checkpointing": True},
    {"loss_type": "dr_grpo", "micro_batch_size": 1, "num_generations": 8},
    {"loss_type": "cispo", "temperature": 0.7, "mask_truncated_completions": True, "num_iterations": 2},
])  # fmt: skip
def test_the_tags_of_two_steps_are_those_computed_by_hand(run, model_folder, flags):
    def reward(prompt, completion, answer):  # equal in the groups of a quarter of the prompts
        return 1 / 3 if prompt.startswith("0") else completion.count("+") + digit_reward(prompt, completion, answer)

    result, model = run(reward, max_steps=2, learning_rate=FROZEN, **flags), load(model_folder)
    tokens, args = 0, grpo_llm.Args(**{"num_generations": 4, **flags})
    for step, calls in enumerate(result.train):
        rewards = torch.tensor([reward(*c) for c in calls], dtype=float).view(-1, args.num_generations)
        std, advantages = rewards.std(1, keepdim=True), rewards - rewards.mean(1, keepdim=True)  # ddof 1
        advantages = (advantages if args.scale_rewards == "none" else advantages / (std + 1e-4)).flatten()
        rows = [logprobs_of(model, *c[:2], args.temperature) for c in calls]
        lengths, cut = torch.tensor([len(row) for row in rows]), torch.tensor([len(text) == 6 for _, text, _ in calls])
        kept = ~cut if args.mask_truncated_completions else torch.ones(16)
        shares = {"grpo": 1 / lengths / 16, "dr_grpo": torch.ones(16) / 16 / 6}  # of each token of a completion
        shares = kept * shares.get(args.loss_type, torch.ones(16) / (lengths * kept).sum())
        objective = torch.stack([row.sum() for row in rows]) @ (shares * advantages).float()
        gradient = torch.autograd.grad(objective, list(model.parameters()))
        tokens += lengths.sum() + sum(len(prompt) for prompt, _, _ in calls)
        expected = {
            "reward": rewards.mean(), "reward_std": rewards.std(), "frac_reward_zero_std": (std == 0).float().mean(),
            "completions/mean_length": lengths.float().mean(), "completions/clipped_ratio": cut.float().mean(),
            "num_tokens": tokens,
            "entropy": -torch.stack([row.sum() for row in rows]) @ kept.float() / (lengths * kept).sum(),
            "loss": -objective if args.loss_type == "cispo" else -(shares * advantages * lengths).sum(),
            "grad_norm": torch.stack([g.norm() for g in gradient]).norm(),
        }  # fmt: skip
        for tag, value in expected.items():
            assert result.tags[f"train/{tag}"][step] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), tag
    assert max(result.tags["train/grad_norm"]) > 1e-4


def test_with_one_update_per_rollout_the_ratio_is_exactly_1_also_in_bf16(run):
    gspo = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
    for flags in ({}, {"bf16": True, **gspo}):
        result = run(learning_rate=3e-2, micro_batch_size=5, **flags)
        assert all(result.tags[tag] == [0.0] * 4 for tag in OFF_POLICY)
    assert {x.dtype for x in weights(result.folder).values()} == {torch.float32}


def test_later_updates_of_a_rollout_are_made_and_clipped_at_each_sides_epsilon(run, model_folder):
    flags = {"num_iterations": 3, "max_steps": 2, "learning_rate": 3e-2, "loss_type": "grpo"}
    bounds = (0.1, 0.1), (0.1, 1e9), (1e9, 0.1), (1e9, 1e9)
    runs = [run(epsilon=low, epsilon_high=high, **flags) for low, high in bounds]
    for (low, high), result in zip(bounds, runs):
        too_low, too_high = (max(result.tags[tag]) > 0.01 for tag in OFF_POLICY[1:])
        assert (too_low, too_high) == (low < 1, high < 1)
        assert largest_change(result, model_folder) > 0.06  # all rates add up to 0.09, those of first updates to 0.042
    runs.append(run(importance_sampling_level="sequence", epsilon=1e9, epsilon_high=1e9, **flags))
    clipped, *_, free, sequence = (result.tags["policy/approxkl_avg"][0] for result in runs)
    assert 1e-3 < clipped < free and abs(free - sequence) > 1e-3


@pytest.mark.parametrize("masked", [True, False])
def test_cut_off_completions_can_be_left_out_of_the_loss(run, masked):
    flags = {"max_completion_length": 1, "generation_batch_size": 4, "max_steps": 12, "learning_rate": FROZEN}
    tags = run(mask_truncated_completions=masked, **flags).tags
    names = ("grad_norm", "completions/clipped_ratio", "frac_reward_zero_std")
    norms = [norm for norm, cut, equal in zip(*(tags[f"train/{name}"] for name in names)) if cut == 1 and equal == 0]
    assert norms and all((norm == 0) == masked for norm in norms)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_groups_of_equal_rewards_learn_the_kl_and_nothing_else(run, beta):
    flags = {"num_generations": 7, "generation_batch_size": 7, "max_steps": 6, "beta": beta, "rows": TRAIN[1:3]}
    tags = run(lambda *call: digit_reward(*call) if call[0].startswith("1") else 0.1, **flags).tags
    equal = [share == 1 for share in tags["train/frac_reward_zero_std"]]
    later = [norm for step, norm in enumerate(tags["train/grad_norm"]) if equal[step] and not all(equal[:step])]
    assert later and all(norm > 1e-4 if beta else norm == 0 for norm in later)


def test_the_learning_rate_follows_its_schedule_and_is_the_one_applied(run, model_folder):
    rates = run(warmup_steps=2, max_steps=5, learning_rate=3e-3).tags["charts/learning_rate"]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 2e-3, 1e-3], abs=1e-9)
    rates = run(num_iterations=2, max_steps=2, learning_rate=4e-3).tags["charts/learning_rate"]
    assert rates == pytest.approx([3e-3, 1e-3], abs=1e-9)  # of the second of two updates each
    for max_grad_norm, expected in ((1e6, 5e-3), (1e-12, 0.0)):  # Adam's first step is the learning rate
        result = run(max_steps=1, warmup_steps=1, max_grad_norm=max_grad_norm, micro_batch_size=5)
        assert largest_change(result, model_folder) == pytest.approx(expected, rel=1e-2, abs=1e-5)


def test_a_run_learns_only_by_its_learning_rate(run):
    learner, frozen = (run(max_steps=30, learning_rate=rate) for rate in (1e-2, FROZEN))
    assert learner.metrics["eval/reward"] > learner.metrics["eval/reward_before"] + 0.2
    assert frozen.before == frozen.after  # and each evaluation draws the same random numbers


def test_each_prompt_learns_from_its_own_rewards(run):
    flags = {"max_steps": 30, "max_completion_length": 1, "generation_batch_size": 64}
    rewards = run(lambda prompt, text, _: float(text[:1] == prompt[0]), **flags).tags["train/reward"]
    assert sum(rewards[:2]) / 2 < 0.3 and sum(rewards[-5:]) / 5 > 0.8  # a constant completion would get 0.25


def test_beta_holds_the_policy_near_the_initial_model(run):
    loose, held = (run(beta=beta, max_steps=10, temperature=0.7) for beta in (1e-9, 2.0))
    assert abs(held.tags["train/kl"][0]) < 1e-6 and min(held.tags["train/kl"][1:]) > 1e-4
    assert held.tags["train/kl"][-1] < loose.tags["train/kl"][-1] / 2


def test_a_completion_is_scored_with_its_own_prompt_and_answer(run):
    result = run(num_generations=2, generation_batch_size=8)
    for calls in result.train:  # P prompts, G times each
        assert [c[::2] for c in calls[::2]] == [c[::2] for c in calls[1::2]] and len({c[0] for c in calls}) == 4
    rows, other = ({(row["prompt"], row["answer"]) for row in rows} for rows in (TRAIN, HELD_OUT))
    first, second = ([c[::2] for calls in epoch for c in calls] for epoch in (result.train[:2], result.train[2:]))
    assert {*first} == {*second} == rows and first != second  # every row once an epoch
    assert {c[::2] for c in result.before} == {c[::2] for c in result.after} == other


def test_steps_and_seeds_have_their_own_random_numbers_and_a_seed_repeats(run):
    first, again, other = (run(seed=seed, rows=TRAIN * 4) for seed in (1, 1, 2))
    assert {**first.metrics, "wall_seconds": 0} == {**again.metrics, "wall_seconds": 0}
    assert first.train == again.train and {c[0] for c in first.train[0]} != {c[0] for c in other.train[0]}
    flags = {"rows": TRAIN[:1], "num_generations": 8, "generation_batch_size": 8, "learning_rate": FROZEN}
    steps = [tuple(calls) for seed in (1, 2) for calls in run(seed=seed, **flags).train]
    assert len({*steps}) == 8 and all(len({*calls}) > 4 for calls in steps)


def test_the_evaluation_is_the_trained_models_on_the_held_out_prompts(run, model_folder):
    def reward(prompt, completion, answer):
        return float(answer[-1] in "05" and completion < "5")

    result = run(reward, temperature=0.6, max_steps=6, eval_steps=2, learning_rate=5e-3, eval_generations=5)
    assert json.loads((result.folder / "summary.json").read_text()) == result.metrics
    assert len(result.tags["eval/reward"]) == 4
    reference, trained = load(model_folder), load(result.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "model")
    for suffix, calls, policy in (("_before", result.before, reference), ("", result.after, trained)):
        greedy = []
        for row in HELD_OUT:
            query = tokenizer(row["prompt"], return_tensors="pt").input_ids
            ids = policy.generate(query, max_new_tokens=6, do_sample=False, pad_token_id=1)[0, query.shape[1] :]
            greedy.append((row["prompt"], tokenizer.decode(ids, skip_special_tokens=True), row["answer"]))
            calls.remove(greedy[-1])  # the others were sampled, at temperature 1
        right = [[reward(*c) for c in calls if c[0] == row["prompt"]] for row in HELD_OUT]  # 6 times 5
        rows = [logprobs_of(policy, *c[:2]) for c in calls]
        expected = {
            "accuracy": sum(map(sum, right)) / 30, "mean_length": sum(map(len, rows)) / 30,
            "pass@5": sum(map(max, right)) / 6, "accuracy_greedy": sum(reward(*c) for c in greedy) / 6,
        }  # fmt: skip
        for name, value in expected.items():
            assert result.metrics[f"eval/{name}{suffix}"] == pytest.approx(value, abs=1e-4), name


def test_held_out_sums_are_the_same_for_every_seed_and_never_demonstrated(run, monkeypatch):
    monkeypatch.setattr(grpo_llm, "demonstrate", lambda prompt, rng: shown.append(prompt) or "7")
    learned, evaluated, embeddings = [], [], []
    for seed in (1, 2):
        shown = []
        result = run(dataset_name=None, model_name_or_path=None, sft_steps=2, seed=seed, max_steps=1)
        learned.append(shown + [c[0] for c in result.train[0]])
        embeddings.append(weights(result.folder)["model.embed_tokens.weight"])
        evaluated.append({c[0] for c in result.before + result.after})
        assert len(shown) > 100 and all(eval(c[0][:-1]) == int(c[2]) for c in result.train[0])
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 6 and learned[0][:99] != learned[1][:99]
    assert (embeddings[0] - embeddings[1]).abs().mean() > 0.05  # far more than so few steps change
    train = {row["prompt"] for row in grpo_llm.addition_rows()[0]}
    assert {*learned[0], *learned[1]} <= train


def test_the_supervised_model_learns_the_demonstrations_with_their_end_and_not_the_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_llm, "demonstrate", lambda prompt, rng: rng.choice(("7", "88")))
    _, held_out = grpo_llm.addition_rows()
    grpo_llm.write_tiny_model(str(tmp_path), grpo_llm.Args(sft_steps=100), torch.device("cpu"))
    model, tokenizer = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    (seven, eight), eos = tokenizer("78").input_ids, model.generation_config.eos_token_id
    ids, short = (torch.tensor(tokenizer([r["prompt"] + x for r in held_out[:50]]).input_ids) for x in ("88", "7"))
    probs, ends = (model(input_ids=x).logits.softmax(-1) for x in (ids, short))  # (50, 8, V), (50, 7, V)
    assert min(probs[:, 5, seven].min(), probs[:, 5, eight].min()) > 0.2 and eos == tokenizer.eos_token_id
    assert min(probs[:, 6, eight].min(), probs[:, 7, eos].min(), ends[:, 6, eos].min()) > 0.9
    assert probs[:, :5].gather(2, ids[:, 1:6, None]).log().mean() < -2.2  # the prompt learned: -1.4. Uniform: -2.7


def test_every_pass_is_under_autocast_and_those_of_training_are_checkpointed(run, monkeypatch):
    def forward(model, *args, **kwargs):
        passes.append((torch.is_autocast_enabled("cpu"), model.training, model.layers[0].gradient_checkpointing))
        return original(model, *args, **kwargs)

    passes, original = [], LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", forward)
    run(bf16=True, gradient_checkpointing=True, beta=0.1, max_steps=1)
    assert all(autocast for autocast, _, _ in passes)
    assert {is_checkpointed for _, is_training, is_checkpointed in passes if is_training} == {True}


def test_no_two_completions_get_the_same_random_numbers(run, monkeypatch):
    """Neither in one rollout, nor in two, nor in a rollout and an evaluation, of any seed."""
    seen, real = [], grpo_llm.generate

    def generate(model, prompts, uniform, **options):
        seen.extend(tuple(row) for row in uniform.flatten(0, 1).tolist())
        return real(model, prompts, uniform, **options)

    monkeypatch.setattr(grpo_llm, "generate", generate)
    for seed in (1, 2):
        run(seed=seed, eval_steps=9, max_steps=3)
    # Each evaluation decodes 6 prompts, greedy and 4 times; both evaluations of a seed have the same numbers.
    rollouts = 2 * 3 * 16
    assert len(seen) == rollouts + 2 * 2 * (6 + 24) and len({*seen}) == rollouts + 2 * (6 + 18 + 6 - 6)


def test_reward_functions_are_told_what_is_evaluation_and_which_step_it_is(run, monkeypatch):
    seen, real = [], grpo_llm.score

    def score(args, samples, **options):
        seen.append((options["step"], options["evaluation"], {sample.example.prompt for sample in samples}))
        return real(args, samples, **options)

    monkeypatch.setattr(grpo_llm, "score", score)
    run(max_steps=2)
    assert [(step, evaluation) for step, evaluation, _ in seen] == [
        (0, True), (0, True), (0, False), (1, False), (2, True), (2, True)
    ]  # fmt: skip
    held_out = {row["prompt"] for row in HELD_OUT}
    assert all((prompts <= held_out) == evaluation for _, evaluation, prompts in seen)


def test_evaluation_samples_at_temperature_1_whatever_the_rollouts(run):
    cold, warm = (run(temperature=temperature, learning_rate=FROZEN) for temperature in (0.01, 1.0))
    assert cold.before == warm.before and cold.train != warm.train


def test_a_completion_that_ends_with_any_stop_id_is_whole(run, model_folder, tmp_path):
    model = load(model_folder)
    model.generation_config.eos_token_id = [1, 4, 5]
    model.save_pretrained(tmp_path / "stops")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "stops")
    result = run(model_name_or_path=str(tmp_path / "stops"), learning_rate=FROZEN)
    for share, calls in zip(result.tags["train/completions/clipped_ratio"], result.train):
        whole = [len(text) < 6 or text[-1] in (TOKENS[4], TOKENS[5]) for _, text, _ in calls]
        assert share == pytest.approx(1 - sum(whole) / 16)
        assert any(text and text[-1] in (TOKENS[4], TOKENS[5]) for _, text, _ in calls)
