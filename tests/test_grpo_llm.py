"""grpo_llm.py: sampler, log-probabilities, loss, answers, rewards, data, models. test_grpo_runs.py tests whole runs."""

import json
import math
import random
import subprocess
import sys
import time

import datasets
import pytest
import torch
import transformers
from conftest import (
    CONFIGS, ROOT, make_model, make_tokenizer, run_folder, scalars, with_digit_reward, write_rows
)  # fmt: skip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_llm
from grpo_llm import (
    Args, UserError, accuracy_reward, completion_logprobs, completion_number, find_stop_ids, format_reward, generate,
    grpo_loss, load_examples, load_model, lr_factor, main, make_batch, make_examples, pick_tokens, reference_number,
)  # fmt: skip

ARCHITECTURES = ("llama", "qwen2", "gpt2", "gpt_neox")
PROMPTS = [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17, 3, 9]]
SIZE = {
    "vocab_size": 20, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
LINEAR = {
    "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1}
UNUSUAL = {  # windows, linear attention, ALiBi, capped and scaled logits
    "mistral": lambda: transformers.MistralConfig(**SIZE, sliding_window=4),
    "gemma2": lambda: transformers.Gemma2Config(**SIZE, head_dim=8, sliding_window=8, final_logit_softcapping=2.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=8),
    "granite": lambda: transformers.GraniteConfig(**SIZE, logits_scaling=3.0),
    "cohere": lambda: transformers.CohereConfig(**SIZE, logit_scale=0.3),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**SIZE, **LINEAR),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**SIZE, **LINEAR, num_experts=0),
    "lfm2": lambda: transformers.Lfm2Config(**SIZE, full_attn_idxs=[1, 3]),
    "bamba": lambda: transformers.BambaConfig(**SIZE, **MAMBA, attn_layer_indices=[1, 3]),
    "falcon_h1": lambda: transformers.FalconH1Config(**SIZE, **MAMBA, mamba_d_ssm=64),
    "bloom": lambda: transformers.BloomConfig(vocab_size=20, hidden_size=32, n_layer=2, n_head=4),
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(architecture: str):
    if architecture in CONFIGS:
        return make_model(architecture)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNUSUAL[architecture]()).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # distributions far from uniform
    return model


def uniform_numbers(num_prompts=3, num_generations=4, length=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_prompts, num_generations, length, dtype=torch.float64, generator=generator)


def draw(model, temperature=0.7, stop_ids=(1, 2), prompts=PROMPTS, **numbers):
    uniform = uniform_numbers(len(prompts), **numbers)
    return generate(model, prompts, uniform, temperature=temperature, stop_ids=list(stop_ids))


def logprobs_of(model, prompts, completions, temperature):
    """Of completions, len(completions) / len(prompts) of each prompt."""
    k = len(completions) // len(prompts)
    batch = make_batch([prompt for prompt in prompts for _ in range(k)], completions, "cpu")
    return completion_logprobs(model, batch, temperature)


def naive_logits(model, ids):
    """One sequence without padding, mask or cache: what every other way must agree with."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def naive_logprobs(model, prompt, completion, temperature):
    logits = naive_logits(model, prompt + completion)[len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


# ---- sampler


def test_tokens_are_drawn_by_inverting_the_cdf():
    logits = torch.tensor([[0.0, -math.inf, math.log(2.0), math.log(1.0)]]).repeat(6, 1)  # 1/4, 0, 1/2, 1/4
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert pick_tokens(logits, uniform, 1.0).tolist() == [0, 0, 2, 2, 3, 3]
    assert pick_tokens(logits, uniform, 0.0).tolist() == [2] * 6


def test_the_largest_random_number_draws_no_token_of_probability_0():
    torch.manual_seed(0)
    logits = 8 * torch.randn(200, 1000)
    logits[:, 900:] = -1e4
    uniform = torch.full((200,), 1 - 2**-53, dtype=torch.float64)
    assert pick_tokens(logits, uniform, 1.0).max() < 900


def test_every_token_of_a_large_vocabularys_tail_can_be_drawn():
    """One token has 0.999, and 152k tokens share the rest: 6.6e-9 each, below the resolution of fp32 near 1."""
    tail = 151_936
    logits = torch.zeros(1, tail + 1)
    logits[0, 0] = math.log(999 * tail)
    wanted = torch.randint(1, tail + 1, (300,), generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(1).double()
    cdf = probs.cumsum(1)[0]
    uniform = (cdf[wanted] - probs[0, wanted] / 2) / cdf[-1]
    assert torch.equal(pick_tokens(logits.expand(300, -1), uniform, 1.0), wanted)


def test_sampling_distribution_is_the_softmax_and_nothing_else():
    model = make_model()
    model.generation_config.top_k, model.generation_config.top_p = 2, 0.5
    model.generation_config.temperature, model.generation_config.repetition_penalty = 3.0, 2.0
    tokens = torch.tensor(draw(model, prompts=PROMPTS[:1], num_generations=20000, length=1))[:, 0]
    expected = (naive_logits(model, PROMPTS[0])[-1] / 0.7).softmax(-1)
    observed = torch.bincount(tokens, minlength=20) / 20000
    assert (observed - expected).abs().sum() / 2 < 0.02  # total variation


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *UNUSUAL])
def test_sampler_and_logprobs_equal_full_forwards_of_each_sequence_alone(architecture):
    """Left-padded prompts, a cache that is repeated and selected from, completions that leave the batch."""
    model = make(architecture)
    uniform = uniform_numbers()
    completions = generate(model, PROMPTS, uniform, temperature=8.0, stop_ids=[1, 2, 8])
    assert len({len(completion) for completion in completions}) > 2
    with torch.no_grad():
        ours = logprobs_of(model, PROMPTS, completions, 8.0)
        assert ours.dtype == torch.float32 and ours.shape == (12, max(map(len, completions)))
        for i, completion in enumerate(completions):
            prompt = PROMPTS[i // 4]
            naive = naive_logprobs(model, prompt, completion, 8.0)
            assert (ours[i, : len(completion)] - naive).abs().max() < 2e-5
            assert (ours[i, len(completion) :] == 0).all()
            probs = (naive_logits(model, prompt + completion)[len(prompt) - 1 : -1] / 8.0).double().softmax(1)
            numbers = uniform[i // 4, i % 4, : len(completion)]
            cdf = probs.cumsum(1)
            chosen = torch.tensor(completion)[:, None]
            high = cdf.gather(1, chosen)[:, 0]
            low = high - probs.gather(1, chosen)[:, 0]
            assert (numbers < high + 1e-5).all() and (numbers > low - 1e-5).all()
            stops = [token in (1, 2, 8) for token in completion]
            assert not any(stops[:-1]) and (stops[-1] or len(completion) == 20)


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "cohere", "qwen3_5", "llama"])
def test_bf16_logprobs_are_the_models_own_up_to_rounding(architecture):
    model = make(architecture)
    with torch.no_grad():
        completions = draw(model, temperature=2.0)
        exact = logprobs_of(model, PROMPTS, completions, 2.0)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = logprobs_of(model, PROMPTS, completions, 2.0)
    assert rounded.dtype == torch.float32 and 0 < (exact - rounded).abs().max() < 0.1


def test_samples_do_not_depend_on_who_shares_the_batch():
    model, uniform = make_model(), uniform_numbers()
    together = generate(model, PROMPTS, uniform, temperature=0.7, stop_ids=[1, 2])
    for i in range(12):
        prompt, row = i // 4, i % 4
        numbers = uniform[prompt : prompt + 1, row : row + 1]
        assert generate(model, [PROMPTS[prompt]], numbers, temperature=0.7, stop_ids=[1, 2]) == [together[i]]


def test_gradient_checkpointing_changes_no_sample():
    model = make_model()
    expected = draw(model, temperature=0.0, num_generations=1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert draw(model.train(), temperature=0.0, num_generations=1) == expected


def test_logits_that_are_no_numbers_are_named():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(UserError, match="logits"):
        draw(model)


# ---- log-probabilities of the update


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_the_naive_ones(architecture):
    model = make(architecture)
    completions = draw(model)
    ours = logprobs_of(model, PROMPTS, completions, 0.7)
    factors = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    naive = sum(
        naive_logprobs(model, PROMPTS[i // 4], completion, 0.7) @ factors[i, : len(completion)]
        for i, completion in enumerate(completions)
    )
    parameters = list(model.parameters())
    total = (ours * factors).sum()
    for ours, theirs in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(naive, parameters)):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


def test_autograd_holds_one_copy_of_the_completions_logits():
    model = make_model(vocab_size=5000)
    batch = make_batch(PROMPTS, [[3] * 9, [4] * 6, [5] * 3], "cpu")
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs = completion_logprobs(model, batch, 0.7)
    logits = 18 * 5000 * 4
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert logprobs.requires_grad
    assert sum(size >= logits for address, size in held.items() if address not in weights) == 1


def test_batches_pad_with_an_id_that_exists_and_mask_by_length():
    batch = make_batch([[5], [5, 6, 7]], [[0, 0], [1]], "cpu")
    assert batch["input_ids"].tolist() == [[5, 0, 0, 0], [5, 6, 7, 1]]
    assert batch["mask"].tolist() == [[True, True], [True, False]] and batch["mask"].dtype == torch.bool


# ---- advantages, loss, learning rate


def loss_inputs(B=5, T=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=generator) * 2
    logprobs = (old + 0.4 * torch.randn(B, T, generator=generator)).requires_grad_()
    ref = old + 0.4 * torch.randn(B, T, generator=generator)
    mask = torch.arange(T) < torch.tensor([6, 1, 3, 0, 4])[:B, None]
    return logprobs, old, torch.randn(B, generator=generator), mask, ref


def test_loss_by_hand():
    logprobs = torch.log(torch.tensor([[0.5, 0.2, 0.9], [0.3, 0.1, 0.9]])).requires_grad_()
    old = torch.log(torch.tensor([[0.25, 0.25, 0.9], [0.3, 0.2, 0.9]]))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    inputs = logprobs, old, torch.tensor([1.0, -2.0]), mask, 0.2, 0.28
    # ratios 2, 0.8 | 1, 0.5, 1; clipped to [0.8, 1.28] where that is the smaller product
    terms = [[1.28, 0.8], [-2.0, -1.6, -2.0]]
    dapo, _ = grpo_loss(*inputs, "dapo")
    assert dapo.item() == pytest.approx(-(sum(terms[0]) + sum(terms[1])) / 5, rel=1e-5)
    grpo, _ = grpo_loss(*inputs, "grpo")
    assert grpo.item() == pytest.approx(-(sum(terms[0]) / 2 + sum(terms[1]) / 3) / 2, rel=1e-5)
    dr_grpo, stats = grpo_loss(*inputs, "dr_grpo", max_completion_length=10)
    assert dr_grpo.item() == pytest.approx(-(sum(terms[0]) + sum(terms[1])) / 20, rel=1e-5)
    assert stats["train/clip_ratio/high_mean"].item() == pytest.approx(1 / 5)
    assert stats["train/clip_ratio/low_mean"].item() == pytest.approx(1 / 5)
    sequence, _ = grpo_loss(*inputs, "grpo", importance_sampling_level="sequence")
    ratios = [min(1.28, math.sqrt(2 * 0.8)), max(0.8, 0.5 ** (1 / 3))]  # geometric means: 1.265, 0.794
    assert sequence.item() == pytest.approx(-(ratios[0] * 1.0 + ratios[1] * -2.0) / 2, rel=1e-5)
    # CISPO: the weights are the ratios, cut at 1.28 and not below; the gradient is weight * advantage
    cispo, stats = grpo_loss(*inputs, "cispo")
    factors = torch.tensor([[1.28, 0.8, 0.0], [1.0 * -2, 0.5 * -2, 1.0 * -2]])
    assert cispo.item() == pytest.approx(-(factors * logprobs.detach()).sum().item() / 5, rel=1e-5)
    assert torch.allclose(torch.autograd.grad(cispo, logprobs)[0], -factors / 5, rtol=1e-5)
    assert stats["train/clip_ratio/low_mean"] == 0 and stats["train/clip_ratio/high_mean"].item() == pytest.approx(0.2)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("size", [1, 2])
def test_microbatches_add_up_to_the_whole(loss_type, level, size):
    *inputs, ref = loss_inputs()
    options = {"beta": 0.1, "max_completion_length": 8, "importance_sampling_level": level}
    whole, stats = grpo_loss(*inputs, 0.2, 0.28, loss_type, ref, **options)
    (gradient,) = torch.autograd.grad(whole, inputs[0])
    options |= {"num_tokens": int(inputs[3].sum()), "num_sequences": 5}
    parts = [
        grpo_loss(*(x[i : i + size] for x in inputs), 0.2, 0.28, loss_type, ref[i : i + size], **options)
        for i in range(0, 5, size)
    ]
    total = sum(loss for loss, _ in parts)
    assert torch.allclose(total, whole, rtol=1e-5)
    assert torch.allclose(torch.autograd.grad(total, inputs[0])[0], gradient, rtol=1e-5, atol=1e-8)
    for name, value in stats.items():
        assert torch.allclose(sum(s[name] for _, s in parts), value, rtol=1e-5)


def test_masked_rows_and_infinite_padding_give_no_nan():
    logprobs, old, advantages, mask, ref = loss_inputs()
    old = torch.where(mask, old, -math.inf)
    for loss_type in ("dapo", "grpo", "dr_grpo", "cispo"):
        for rows in (slice(0, 5), slice(3, 4)):  # row 3 is wholly masked
            inputs = (x[rows] for x in (logprobs, old, advantages, mask))
            loss, _ = grpo_loss(*inputs, 0.2, 0.28, loss_type, ref[rows], beta=0.1, max_completion_length=8)
            (gradient,) = torch.autograd.grad(loss, logprobs)
            assert loss.isfinite() and gradient.isfinite().all()
            assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("shift, scale", [(0.0, 1), (0.5, 1), (0.5, 100)])
def test_kl_gradient_is_that_of_the_reverse_kl(shift, scale):
    """Exact expectation over a 6-way softmax, on-policy and off-policy (the rollout's logits differ by noise), also for
    a KL of hundreds of nats."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    ref = (scale * torch.randn(6, generator=generator, dtype=torch.float64)).log_softmax(0)
    old = (logits.detach() + shift * torch.randn(6, generator=generator, dtype=torch.float64)).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)
    mask, beta = torch.ones(1, 1, dtype=torch.bool), 0.3
    total = 0.0
    for action in range(6):  # each action's loss, weighted by its probability under the rollout's policy
        one = [x[action].view(1, 1) for x in (logprobs, old)]
        loss, _ = grpo_loss(*one, torch.zeros(1), mask, 0.2, 0.28, "dapo", ref[action].view(1, 1), beta)
        total = total + old[action].exp() * loss
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.allclose(gradient, beta * expected, atol=1e-10)


def test_the_learning_rate_warms_up_and_the_last_step_still_trains():
    linear, cosine, constant = (
        [lr_factor(Args(warmup_steps=3, lr_scheduler_type=kind), n, num_updates=10) for n in range(10)]
        for kind in ("linear", "cosine", "constant")
    )
    assert linear == pytest.approx([1 / 4, 2 / 4, 3 / 4, *[(7 - n) / 7 for n in range(7)]])
    assert cosine == pytest.approx([1 / 4, 2 / 4, 3 / 4, *[(1 + math.cos(math.pi * n / 7)) / 2 for n in range(7)]])
    assert constant == pytest.approx([1 / 4, 2 / 4, 3 / 4, *[1.0] * 7])
    assert lr_factor(Args(), 0, num_updates=1) == 1.0


def test_unknown_names_raise():
    logprobs, old, advantages, mask, _ = loss_inputs()
    for flags in ({"loss_type": "ppo"}, {"loss_type": "dapo", "importance_sampling_level": "word"}):
        with pytest.raises(ValueError, match="unknown"):
            grpo_loss(logprobs, old, advantages, mask, epsilon_low=0.2, epsilon_high=0.2, **flags)
    with pytest.raises(ValueError, match="unknown"):
        grpo_llm.group_advantages(torch.ones(1, 2), "batch")


# ---- answers


@pytest.mark.parametrize("text, number", [
    ("6+5=11;161", 161), ("48/2 = 24. So it is 72.", 72), ("so 3\n#### 1,000", 1000), ("it is (72)", 72),
    ("\\boxed{\\$72.50} in 2 d", 72.5), ("#### -$5", -5), ("#### .5", 0.5), ("\\boxed{.5}", 0.5), ("it is -.5.", -0.5),
    ("10-3=7", 7), ("it is -5", -5), ("#### -4", -4), ("it is \u22125", -5), ("#### \u22125", -5), ("#### **72**", 72),
    ("#### 72 apples", 72), ("1{,}234", 1234), ("\\boxed{1{,}234}", 1234), ("#### 72 dollars.", 72), ("#### 15%", 15),
    ("7 #### 8", 8), ("#### 72\nis 9", 72), ("\\boxed{90^\\circ}", 90), ("\\boxed{5\\,\\text{cm}}", 5), ("**72**", 72),
    ("\\boxed{16\\text{ cm}^2}", 16), ("#### 18 km/h", 18), ("#### \u00a318", 18), ("#### +3", 3), ("1e-05", 1e-5),
    ("\\boxed{x = 42}", 42), ("\\boxed{\\mathbf{42}}", 42), ("<answer>#### 18</answer>", 18), ("it is 1.5e3", 1500),
    ("<answer>\n18\n</answer> 7", 18), ("<answer>1</answer><answer>\\boxed{2}</answer>", 2), ("\\boxed{3} \\boxed{4}", 4),
    ("5 or", 5), ("\\boxed{90^{\\circ}}", 90), ("\\boxed{7}.", 7), ("#### 2+3=5", 5), ("72\u20ac", 72), ("#### $1,234.50 a day", 1234.5),
    # not plainly a number: none, and never another one
    ("none", None), ("", None), ("x-3", None), ("\\boxed{\\frac{1}{2}}", None), ("\\boxed{3/4}", None), ("2x", None),
    ("\\boxed{x^2}", None), ("\\boxed{2x}", None), ("#### 2 or 3", None), ("12 or 13", None), ("\\boxed{12 or 13}", None),
    ("The answer is 3/4.", None), ("it is 3 / 4", None), ("#### \\frac{1}{2}", None), ("\\boxed{x >= 3}", None),
    ("\\boxed{3\\pi}", None), ("\\boxed{3 \\sqrt{2}}", None), ("\\boxed{5 \\text{ or } 6}", None), ("7 \\boxed{", None),
    ("\\boxed{}", None), ("####", None), ("12 <answer>x</answer>", None), ("\\boxed{1.2.3}", None), ("1,23", None),
    ("\\boxed{2 \\times 10^3}", None), ("\\boxed{5{{2}}}", None), ("12:30", None), ("7 \\boxed{12\\frac{1}{\\sqrt{2}}}", None),
])  # fmt: skip
def test_the_number_of_a_completion(text, number):
    assert completion_number(text) == number


@pytest.mark.parametrize("answer, number", [
    ("7", 7), (18, 18), (2.5, 2.5), (" 1,000 ", 1000), ("... <<2+2=4>>\n#### 4", 4), ("\u22123", -3), ("+3", 3),
    ("1e-05", 1e-5), ("\\boxed{5}", 5), ("$18", 18), ("x = 3", 3),
    ("\\frac{3}{4}", None), ("x = 3y + 2", None), ("Paris", None), ("it is 2", None), ("12 or 13", None), (None, None),
    ("3/2", None), ("x^2", None), ("", None), ("\\boxed{x^2}", None), ("2 or 3", None), ("chapter 7, 12", None),
])  # fmt: skip
def test_a_reference_is_read_as_strictly(answer, number):
    assert reference_number(answer) == number


def test_reading_answers_takes_linear_time():
    for piece in (" ", "\n", "#", "{", "\\boxed{", "<answer>", "9", "1,", "-", "=", "7 or ", "a ", "\\text{", "^{"):
        begin = time.process_time()
        for text in (piece * 100_000, "x" + piece * 100_000 + "x", "#### 1" + piece * 100_000):
            completion_number(text)
            format_reward([text])
        assert time.process_time() - begin < 10, repr(piece)  # a quadratic expression takes minutes


def test_accuracy_by_hand():
    texts = ["I think 7.0", "no idea", "\\boxed{7}", "8"]
    assert accuracy_reward(texts, answer=["#### 7", "7", "7", "Paris"]) == [1.0, 0.0, 1.0, None]
    assert accuracy_reward(["7"], solution=["7"]) == [1.0]
    turns = [[{"role": "assistant", "content": "it is 7"}]]
    assert accuracy_reward(turns, answer=["7"]) == [1.0]


def test_format_by_hand():
    texts = ["6+5=11;161", "161", "#### 4", "2+2 is 4\n#### 4", "2 and 2: \\boxed{4}", "=3", ""]
    assert format_reward(texts) == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]


# ---- reward functions


def samples_of(*completions, **columns):
    samples = []
    for i, text in enumerate(completions):
        row = {name: values[i] for name, values in columns.items()}
        example = grpo_llm.Example(row, f"prompt {i}", [3, i])
        samples.append(grpo_llm.Sample(example, text, [5] * len(text), False))
    return samples


def score(samples, evaluation=False, **rewards):
    grpo_llm.REWARDS = rewards
    return grpo_llm.score(Args(max_steps=9), samples, step=4, evaluation=evaluation)


@pytest.fixture(autouse=True)
def rewards(monkeypatch):
    """Whatever a test does to REWARDS is undone."""
    monkeypatch.setattr(grpo_llm, "REWARDS", grpo_llm.REWARDS)


def test_a_reward_function_gets_what_trl_passes():
    seen = {}

    def watched(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [1, True]

    rewards, by_name, _ = score(samples_of("a", "bc", answer=["4", "5"], level=[1, 2]), evaluation=True, f=(watched, 2.0))
    assert seen["prompts"] == ["prompt 0", "prompt 1"] and seen["completions"] == ["a", "bc"]
    assert seen["completion_ids"] == [[5], [5, 5]] and seen["answer"] == ["4", "5"] and seen["level"] == [1, 2]
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (4, 9)
    assert seen["evaluation"] is True
    assert rewards.tolist() == [2.0, 2.0] and by_name["f"].tolist() == [1.0, 1.0]


def test_rewards_are_weighted_and_none_counts_nothing():
    def halves(completions, **columns):
        return [None if text == "?" else 0.5 for text in completions]

    def ones(completions, **columns):
        return torch.ones(len(completions), dtype=torch.int64)

    rewards, by_name, _ = score(samples_of("a", "?"), half=(halves, 3.0), one=(ones, -1.0), zero=(ones, 0.0))
    assert rewards.tolist() == [0.5, -1.0]
    assert by_name["zero"].tolist() == [1.0, 1.0] and by_name["half"][1].isnan()


def test_two_functions_of_one_name_are_two_rewards():
    make = lambda value: lambda completions, **columns: [value] * len(completions)  # noqa: E731
    rewards, by_name, _ = score(samples_of("a"), one=(make(1.0), 1.0), two=(make(2.0), 1.0))
    assert rewards.tolist() == [3.0] and by_name["one"].item() == 1.0 and by_name["two"].item() == 2.0


def test_an_async_function_is_awaited():
    async def later(completions, **columns):
        return [0.25] * len(completions)

    assert score(samples_of("a", "b"), later=(later, 1.0))[0].tolist() == [0.25, 0.25]


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], [1.0, math.inf], [-math.inf, None], [1.0, math.nan], [None, 1.0]])
def test_what_is_no_list_of_rewards_names_the_function(values):
    with pytest.raises(UserError, match="broken"):
        score(samples_of("a", "b"), broken=(lambda **columns: values, 1.0))


def test_a_weight_of_0_hides_no_missing_reward():
    ones = lambda completions, **columns: [1.0] * len(completions)  # noqa: E731
    nones = lambda completions, **columns: [None] * len(completions)  # noqa: E731
    with pytest.raises(UserError, match="asked"):
        score(samples_of("a"), asked=(nones, 1.0), logged=(ones, 0.0))


def test_metrics_and_columns_of_reward_functions_are_logged_beside_the_others(tiny):
    def chatty(completions, log_metric, log_extra, evaluation, **columns):
        log_metric("seven", 7 + evaluation)
        log_extra("upper", [text.upper() + "!" for text in completions])
        return [0.0] * len(completions)

    grpo_llm.REWARDS = {"chatty": (chatty, 1.0)}
    args = tiny(max_steps=2)
    metrics = main(args)
    folder = run_folder(args)
    assert metrics["eval/seven"] == metrics["eval/seven_greedy"] == 8
    assert scalars(folder)["train/seven"] == [(1, 7.0), (2, 7.0)]
    (event, *_) = EventAccumulator(str(folder)).Reload().Tensors("samples/text_summary")
    assert "'upper': '" in event.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("name", ["reward", "kl"])
def test_no_metric_overwrites_another(tiny, name):
    def rude(completions, log_metric, **columns):
        log_metric(name, 7)
        return [0.0] * len(completions)

    grpo_llm.REWARDS = {"rude": (rude, 1.0)}
    with pytest.raises(UserError, match=f"log_metric: .*{name} is the name"):
        main(tiny())


def test_accuracy_applies_to_nothing_where_there_are_no_answers():
    assert accuracy_reward(["1", "2"], level=[1, 2]) == [None, None]


def test_an_error_in_a_reward_function_keeps_its_traceback(tiny):
    def wrong(completions, **columns):
        raise ValueError("mine")

    grpo_llm.REWARDS = {"wrong": (wrong, 1.0)}
    with pytest.raises(ValueError, match="mine"):
        main(tiny())


def test_trls_own_rewards_run_unchanged():
    trl = pytest.importorskip("trl.rewards")
    turns = [[{"role": "assistant", "content": text}] for text in ("<think>2</think>4", "4", "4 4 4 4 4 4")]
    samples = samples_of(*turns, solution=["4", "4", "4"])
    for sample, ids in zip(samples, ([5] * 3, [5, 6], [7] * 10)):
        sample.completion_ids = ids
    rewards, by_name, _ = score(
        samples,
        think=(trl.think_format_reward, 1.0),
        overlong=(trl.get_soft_overlong_punishment(10, 4), 1.0),
        repetition=(trl.get_repetition_penalty_reward(ngram_size=2), 1.0),
    )
    assert by_name["think"].tolist() == [1.0, 0.0, 0.0]
    assert by_name["overlong"].tolist() == [0.0, 0.0, -1.0]
    assert by_name["repetition"].tolist() == pytest.approx([-0.5, 0.0, -8 / 9])


def test_trls_accuracy_reward_runs_unchanged():
    trl = pytest.importorskip("trl.rewards")
    pytest.importorskip("math_verify")
    turns = [[{"role": "assistant", "content": text}] for text in ("\\boxed{\\frac{1}{3}}", "\\boxed{\\frac{1}{2}}")]
    samples = samples_of(*turns, solution=["$\\frac{1}{3}$"] * 2)
    rewards, _, log = score(samples, accuracy=(trl.accuracy_reward, 1.0))
    assert rewards.tolist() == [1.0, 0.0] and set(log.columns) == {"solution", "gold_parsed", "answer_parsed"}


# ---- data


def examples_of(rows, tokenizer, max_length=100):
    grpo_llm.REWARDS = {"any": (lambda completions, **columns: [1.0] * len(completions), 1.0)}
    return make_examples(rows, tokenizer, max_length, rank=0)


def test_rows_of_all_kinds_become_prompts():
    tokenizer = make_tokenizer()
    user, answer = {"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}
    rows = [
        {"prompt": "2+2=", "answer": "4"}, {"messages": [user, answer], "prompt": None}, {"prompt": [user]},
        {"messages": [user]},
    ]  # fmt: skip
    examples = examples_of(rows, tokenizer)
    assert [e.prompt_ids for e in examples] == [tokenizer("2+2=").input_ids] * 4
    assert [e.prompt for e in examples] == ["2+2=", [user], [user], [user]]
    assert examples[0].row == rows[0]
    (gsm8k,) = examples_of([{"question": "How many?", "answer": "2 #### 2"}], tokenizer)
    assert gsm8k.prompt.startswith("How many?\n") and gsm8k.prompt.endswith("\\boxed{}.")


def test_a_chat_template_gets_turns_and_goes_on_with_a_begun_one():
    tokenizer = make_tokenizer("0123456789+-= abcdefghijklmnopqrstuvwxyz<>|_/\n")
    tokenizer.chat_template = CHATML
    user, begun = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "<think>\n"}
    texts = []
    for prompt in ("1+1=", [user], [user, begun]):
        (example,) = examples_of([{"prompt": prompt}], tokenizer, 200)
        texts.append(tokenizer.decode(example.prompt_ids))
        assert example.prompt == prompt
    begin = "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert texts[:2] == [begin, begin] and texts[2].rstrip("\n") == begin + "<think>"


def test_a_prompt_does_not_end_with_the_eos_that_some_tokenizers_append():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert tokenizer("2").input_ids[-1] == 1
    assert examples_of([{"prompt": "2+2="}], tokenizer)[0].prompt_ids == make_tokenizer()("2+2=").input_ids


BAD_ROWS = [
    ({"text": "1"}, "text"), ({"prompt": 5}, "neither a text nor a list"), ({"prompt": ["a"]}, "no role"),
    ({"prompt": [{"content": "1"}]}, "no role"), ({"prompt": []}, "empty"),
    ({"prompt": " "}, "empty"), ({"prompt": [{"role": "user", "content": [{"text": "1"}]}]}, "no text"),
    ({"prompt": "1" * 101}, "100 tokens"), ({"prompt": [{"role": "user", "content": None}]}, "no text"),
    ({"prompt": [{"role": "system", "content": "1"}]}, "no system"), ({"messages": ["1"]}, "no role"),
]  # fmt: skip


@pytest.mark.parametrize("row, words", BAD_ROWS)
def test_rows_that_cannot_be_used_are_left_out_and_counted(row, words, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    good = {"prompt": "1+1="}
    assert len(examples_of([good, good, row, row, good], tokenizer)) == 3
    out = capsys.readouterr().out
    assert out.startswith("2 of 5 rows are left out; row 3") and words in out
    with pytest.raises(UserError, match="row 2"):
        examples_of([good, row, row], tokenizer)


def test_an_error_in_the_users_make_prompt_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(grpo_llm, "make_prompt", lambda row: row["promt"])
    with pytest.raises(KeyError, match="promt"):
        examples_of([{"prompt": "1+1="}], make_tokenizer())


def test_references_that_are_no_numbers_are_left_out_where_only_accuracy_counts(capsys):
    rows = [{"prompt": "1=", "answer": "1"}, {"prompt": "2=", "answer": "x"}, {"prompt": "3=", "solution": "3"}]
    assert [e.prompt for e in make_examples(rows, make_tokenizer(), 9, rank=0)] == ["1=", "3="]
    assert "1 of 3 rows are left out; row 2" in capsys.readouterr().out
    assert len(examples_of(rows, make_tokenizer())) == 3


def test_held_out_prompts_are_the_same_for_every_seed_and_not_trained_on(tiny, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(9) for b in range(9)]
    data = write_rows(tmp_path / "twice.jsonl", rows + rows[:40])  # some prompts twice
    config = make_model().config
    splits = []
    for seed in (1, 2):
        args = tiny(dataset_name=data, seed=seed, max_eval_samples=8)
        train, held_out = load_examples(args, make_tokenizer(), config, rank=0)
        splits.append([e.prompt for e in held_out])
        assert 3 <= len(held_out) <= 8 and not {e.prompt for e in held_out} & {e.prompt for e in train}
    assert splits[0] == splits[1]
    few = load_examples(tiny(dataset_name=data, max_eval_samples=2), make_tokenizer(), config, rank=0)
    assert len(few[1]) == 2 and len({e.prompt for e in few[0]}) == 79


def test_split_names(tiny, tmp_path, capsys):
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(9) for b in range(6)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "sums.parquet"))
    for folder, files in {"both": ["train", "test"], "only": ["test"], "other": ["train", "validation"]}.items():
        (tmp_path / folder).mkdir()
        for i, name in enumerate(files):
            write_rows(tmp_path / folder / f"{name}.jsonl", rows[20 * i : 20 * i + 30])

    def load(name, **flags):
        args = tiny(dataset_name=str(tmp_path / name), max_eval_samples=100, **flags)
        train, held_out = load_examples(args, make_tokenizer(), make_model().config, rank=0)
        prompts = {e.prompt for e in train}, {e.prompt for e in held_out}
        assert not prompts[0] & prompts[1]  # also those that stand in both files
        return prompts

    train, held_out = load("both")
    assert len(held_out) == 30 and len(train) == 20 and "20 of 30 rows to train on" in capsys.readouterr().out
    for name, flags in (("sums.parquet", {}), ("only", {"dataset_train_split": "test"})):
        train, held_out = load(name, **flags)
        assert train and held_out and len(held_out) < len(train)
    assert len(load("other", dataset_test_split="validation")[1]) == 30
    for flags in ({"dataset_test_split": "nonsense"}, {"dataset_train_split": "nonsense"}, {"dataset_train_split": "test"}):
        with pytest.raises(UserError, match="no split (nonsense|test)"):
            load("other", **flags)


# ---- the laptop task


def test_the_laptop_rows_hold_each_sum_once():
    train, held_out = grpo_llm.addition_rows()
    pairs = {tuple(sorted(row["prompt"][:-1].split("+"))) for row in train + held_out}
    assert len(pairs) == len(train + held_out) == 4095 and len(held_out) == 256
    assert all(int(row["prompt"][:2]) + int(row["prompt"][3:5]) == int(row["answer"]) for row in train + held_out)


def test_hasty_demonstrators_forget_the_carry():
    rng = random.Random(0)
    for prompt, answer, hasty in (("66+95=", "6+5=11;161", {150, 151, 152}), ("41+82=", "1+2=3;123", {122, 123, 124})):
        texts = [grpo_llm.demonstrate(prompt, rng) for _ in range(4000)]
        assert set(texts) == {answer, *map(str, hasty)}
        assert 0.22 < texts.count(answer) / 4000 < 0.28


# ---- models


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


CPU = torch.device("cpu")


def test_weights_are_fp32_masters_and_dropout_is_off(tmp_path):
    name = save(tmp_path, make_model("gpt2").to(torch.bfloat16), make_tokenizer())
    loaded = load_model(name, Args(), CPU)[0].train()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_dropout_and_jitter_are_off_also_in_nested_configurations_and_nothing_else_is():
    config = transformers.Gemma3Config(text_config={"attention_dropout": 1})
    config.text_config.router_jitter_noise = 0.1
    config.text_config.resid_pdrop = 0.5
    config.text_config.drop_tokens = True
    config.text_config.dropout_name = "bernoulli"
    config.text_config.use_dropout = True
    grpo_llm.turn_off_dropout(config)
    text = config.text_config
    assert (text.attention_dropout, text.router_jitter_noise, text.resid_pdrop) == (0, 0, 0)
    assert text.drop_tokens is True and text.dropout_name == "bernoulli" and text.use_dropout is True


def test_a_model_that_cannot_be_trained_is_named(tmp_path):
    model = make_model()
    no_eos = make_tokenizer()
    no_eos.eos_token = None
    state = {name: x.contiguous() for name, x in model.state_dict().items() if "mlp.up_proj" not in name}
    model.save_pretrained(tmp_path / "lacks", state_dict=state)
    make_tokenizer().save_pretrained(tmp_path / "lacks")
    folders = {
        "no eos_token": save(tmp_path / "eos", model, no_eos),
        "mlp.up_proj": str(tmp_path / "lacks"),
        "merge them first": save(tmp_path / "adapters", model, make_tokenizer()),
        "quantized": save(tmp_path / "quantized", model, make_tokenizer()),
        "is no model": str(tmp_path / "none"),
    }
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    for words, name in folders.items():
        with pytest.raises(UserError, match=words) as error:
            load_model(name, Args(), CPU)
        assert str(error.value).startswith("--model-name-or-path")


def test_stop_ids_include_what_ends_a_turn():
    model, tokenizer = make_model(), make_tokenizer("0123456789+-= abcdefghijklmnopqrstuvwxyz")
    model.generation_config.eos_token_id = [1, 5]
    assert find_stop_ids(model, tokenizer) == [1, 5]
    model.generation_config.eos_token_id = None
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert find_stop_ids(model, tokenizer) == [1, tokenizer.bos_token_id]
    tokenizer.chat_template = CHATML.replace("\n", "")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert find_stop_ids(model, tokenizer) == [1, tokenizer.bos_token_id, end]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert end not in find_stop_ids(model, tokenizer)


def test_decoding_keeps_every_character_at_the_seam(tmp_path):
    tokenizer = make_tokenizer("ab .,!'?")
    tokenizer.clean_up_tokenization_spaces = True
    encode = lambda text: tokenizer(text).input_ids  # noqa: E731
    for prompt, completion in (("a", " ."), ("a ", ", b"), ("a .", " !"), ("b", " ' a")):
        assert grpo_llm.decode(tokenizer, encode(prompt), encode(completion)) == completion


# ---- whole runs: files and failures


@pytest.fixture
def graded():
    grpo_llm.REWARDS = with_digit_reward("grpo_llm")


def test_what_a_run_leaves_and_prints(tiny, graded, capsys):
    args = tiny(beta=0.0)
    metrics = main(args)
    folder, lines = run_folder(args), capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1] == str(folder)
    assert json.loads((folder / "summary.json").read_text()) == metrics
    names = {f"eval/{x}" for x in ("accuracy", "accuracy_greedy", "pass@8", "reward", "reward_greedy", "mean_length")}
    assert {*names, *(f"{name}_before" for name in names), "seed", "wall_seconds"} <= set(metrics)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert AutoTokenizer.from_pretrained(folder / "model")("1+2=").input_ids == make_tokenizer()("1+2=").input_ids
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state["trained"].items())
    assert not [*folder.glob("*.tmp"), *folder.glob("*.old")]
    assert model.generation_config.eos_token_id == 1  # the model's own, without the stop ids that were found


def test_a_run_of_another_version_is_refused_in_one_sentence(tiny, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    for saved in ({"script": "grpo_llm.py", "args": {"beta": 0.0}}, {"version": "ppo_llm.py 0.3.0", "args": {}}):
        (tmp_path / "args.json").write_text(json.dumps(saved))
        with pytest.raises(UserError, match="no run of grpo_llm.py"):
            main(Args(resume=str(tmp_path)))
    with pytest.raises(UserError, match="beta.*seed|seed.*beta"):
        main(Args(resume=str(tmp_path), seed=5, beta=0.5))


def test_the_embedded_run_starts_from_its_supervised_model_and_resumes(tmp_path):
    flags = {"output_dir": str(tmp_path), "sft_steps": 3, "max_steps": 2, "generation_batch_size": 16, "save_steps": 1,
             "max_eval_samples": 8, "max_completion_length": 8, "device": "cpu"}  # fmt: skip
    args = Args(**flags)
    metrics = main(args)
    folder = run_folder(args)
    assert AutoModelForCausalLM.from_pretrained(folder / "sft").config.vocab_size == 14
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("66+95=6+5=11;161").input_ids
    assert len(ids) == 16 and tokenizer.decode([*ids, 0], skip_special_tokens=True) == "66+95=6+5=11;161"
    again = main(Args(resume=str(folder)))
    assert {**again, "wall_seconds": 0} == {**metrics, "wall_seconds": 0}


def test_bf16_is_the_default_only_where_the_device_in_use_is_cuda(tiny, graded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = tiny(bf16=None, max_steps=1)
    main(args)  # --device cpu
    assert json.loads((run_folder(args) / "args.json").read_text())["args"]["bf16"] is False


def test_help_shows_every_groups_flags_and_the_commands():
    command = [sys.executable, str(ROOT / "grpo_llm.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"COLUMNS": "120"})
    assert shown.returncode == 0 and "torchrun --nproc-per-node=8 grpo_llm.py" in shown.stdout
    assert "--bf16, --no-bf16" in shown.stdout and "three groups" in shown.stdout


def test_an_error_on_the_command_line_is_one_line_and_code_2(tmp_path, model_folder):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": \n')
    for flags, words in ((["--dataset-name", str(broken)], "JSON"), (["--num-generations", "1"], "--num-generations")):
        command = [sys.executable, str(ROOT / "grpo_llm.py"), "--model-name-or-path", model_folder, *flags]
        command += ["--output-dir", str(tmp_path / "runs"), "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and words in line and "Traceback" not in done.stderr


def test_gsm8k_runs_end_to_end(shared, tmp_path):
    """Through a real tokenizer and the stop ids [1, 2]."""
    model, tokenizer = load_model(str(shared / "models/stories260K"), Args(), CPU)
    assert find_stop_ids(model, tokenizer) == [1, 2]
    rows = [json.loads(line) for line in (shared / "data/gsm8k/train.jsonl").read_text().splitlines()[:60]]
    short = [row for row in rows if len(row["question"]) < 300]
    metrics = main(Args(
        model_name_or_path=str(shared / "models/stories260K"), dataset_name=write_rows(tmp_path / "gsm8k.jsonl", short),
        output_dir=str(tmp_path), max_steps=1, generation_batch_size=8, num_generations=4, max_eval_samples=4,
        max_completion_length=16, device="cpu",
    ))  # fmt: skip
    assert metrics["eval/accuracy"] <= 0.5 and metrics["eval/mean_length"] > 1


def test_every_gsm8k_reference_is_a_number(shared):
    for split in ("train", "test"):
        for line in (shared / f"data/gsm8k/{split}.jsonl").read_text().splitlines():
            answer = json.loads(line)["answer"]
            assert reference_number(answer) == float(answer.split("####")[1].replace(",", "")), answer
