"""grpo_llm.py: sampler, log-probabilities, advantages, loss, data and models. tests/test_grpo_runs.py tests whole runs."""

import json
import math
import random
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import CONFIGS, ROOT, digit_reward, make_model, make_tokenizer, run_folder, write_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

import grpo_llm
from grpo_llm import (
    Args, TokenLogprobs, accuracy_reward, completion_logprobs, encode_rows, extract_number, format_reward,
    grpo_loss, load_pretrained, lr_factor, main, pack, sample, sample_tokens,
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
UNUSUAL = {  # sliding windows, linear attention, ALiBi: no tree mask fits, and some need the whole cache reordered
    "mistral": lambda: transformers.MistralConfig(**SIZE, sliding_window=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=8),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**SIZE, **LINEAR),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**SIZE, **LINEAR, num_experts=0),
    "lfm2": lambda: transformers.Lfm2Config(**SIZE, full_attn_idxs=[1, 3]),
    "bamba": lambda: transformers.BambaConfig(**SIZE, **MAMBA, attn_layer_indices=[1, 3]),
    "falcon_h1": lambda: transformers.FalconH1Config(**SIZE, **MAMBA, mamba_d_ssm=64),
    "bloom": lambda: transformers.BloomConfig(vocab_size=20, hidden_size=32, n_layer=2, n_head=4),
}


def make(architecture: str):
    if architecture in CONFIGS:
        return make_model(architecture)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNUSUAL[architecture]()).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # distributions far from uniform
    return model


def draw(model, num_generations=4, length=20, temperature=0.7, stop_ids=(1, 2), pad_id=0, seed=0, prompts=PROMPTS):
    """response, logprobs and mask of completions of left-padded prompts."""
    longest = max(map(len, prompts))
    query = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    generator = torch.Generator().manual_seed(seed)
    return sample(model, query, attention_mask, num_generations, length, temperature, list(stop_ids), pad_id, generator)


def to_lists(response, mask) -> list[list[int]]:
    return [ids[real].tolist() for ids, real in zip(response, mask)]


def naive_logprobs(model, prompt, completion, temperature):
    """One sequence without padding or masks, full logits: what every other way must agree with."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


# ---- sampler


def test_sample_tokens_inverts_the_cdf():
    logits = torch.tensor([[0.0, -math.inf, math.log(2.0), math.log(1.0)]]).repeat(6, 1)  # 1/4, 0, 1/2, 1/4
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    token, logprob = sample_tokens(logits.clone(), uniform, 1.0)
    assert token.tolist() == [0, 0, 2, 2, 3, 3]
    assert torch.allclose(logprob.exp(), torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25, 0.25]))
    token, logprob = sample_tokens(logits.clone(), uniform, 0.0)
    assert token.tolist() == [2] * 6 and torch.allclose(logprob.exp(), torch.tensor(0.5))


def test_every_token_of_a_large_vocabularys_tail_can_be_drawn():
    """One token has 0.999, and 152k tokens share the rest: 6.6e-9 each, below the resolution of fp32 near 1."""
    tail = 151_936
    logits = torch.zeros(1, tail + 1)
    logits[0, 0] = math.log(999 * tail)
    wanted = torch.randint(1, tail + 1, (300,), generator=torch.Generator().manual_seed(0))
    uniform = 0.999 + 0.001 * (wanted.double() - 0.5) / tail
    token, logprob = sample_tokens(logits.expand(300, -1).clone(), uniform, 1.0)
    assert torch.equal(token, wanted)
    assert torch.allclose(logprob, torch.tensor(math.log(0.001 / tail)), atol=1e-3)


def test_no_random_number_leaves_its_chunk_or_the_vocabulary():
    """Numbers around the borders of the chunks, where fp32 sums and fp64 ones disagree."""
    torch.manual_seed(0)
    logits = 8 * torch.randn(1, 1000)
    logits[0, ::128] = -1e4  # no chunk begins with a token that can be drawn
    logits[0, 900:] = -1e4
    sums = (logits - logits.max()).exp()[0, :896].view(7, 128).sum(1).double()
    borders = sums.cumsum(0) / ((logits - logits.max()).exp().sum().double())
    steps = torch.linspace(-2e-8, 2e-8, 401, dtype=torch.float64)
    uniform = torch.cat([(borders[:, None] + steps).flatten(), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)])
    token, logprob = sample_tokens(logits.expand(len(uniform), -1).clone(), uniform.clamp(0, 1 - 2**-53), 1.0)
    assert token.max() < 900 and logprob.isfinite().all()


def test_sampling_distribution_is_the_softmax_and_nothing_else():
    model = make_model()
    model.generation_config.top_k, model.generation_config.top_p = 2, 0.5
    model.generation_config.temperature, model.generation_config.repetition_penalty = 3.0, 2.0
    response, logprobs, _ = draw(model, 20000, 1, prompts=PROMPTS[:1])
    expected = (model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.7).softmax(-1)
    observed = torch.bincount(response[:, 0], minlength=20) / 20000
    assert (observed - expected).abs().sum() / 2 < 0.02  # total variation
    assert torch.allclose(logprobs[:, 0], expected.log()[response[:, 0]], atol=1e-5)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *UNUSUAL])
def test_sampler_and_completion_logprobs_equal_those_of_each_sequence_alone(architecture):
    """Left-padded prompts, completions that leave the batch, trees or not."""
    model = make(architecture)
    response, logprobs, mask = draw(model, temperature=8.0, stop_ids=(1, 2, 8))
    assert mask.sum(1).unique().numel() > 2
    completions = to_lists(response, mask)
    with torch.no_grad():
        ours = completion_logprobs(model, PROMPTS, completions, 8.0)
        assert ours.shape == logprobs.shape == mask.shape
        assert (ours[~mask] == 0).all() and (logprobs[~mask] == 0).all()
        for i, completion in enumerate(completions):
            naive = naive_logprobs(model, PROMPTS[i // 4], completion, 8.0)
            for other in (logprobs, ours):
                assert (other[i, : len(completion)] - naive).abs().max() < 2e-5


def test_samples_do_not_depend_on_the_number_of_processes_or_on_who_shares_the_batch():
    model = make_model()
    response, logprobs, mask = draw(model)
    for rank in range(3):
        own, generator = torch.tensor([PROMPTS[rank]]), torch.Generator().manual_seed(0)
        torch.rand(rank * 4, 20, dtype=torch.float64, generator=generator)  # as main skips the lower ranks' numbers
        part = sample(model, own, torch.ones_like(own), 4, 20, 0.7, [1, 2], 0, generator)
        rows, T = slice(4 * rank, 4 * rank + 4), part[0].shape[1]
        assert torch.equal(part[0], response[rows, :T]) and torch.equal(part[2], mask[rows, :T])
        assert not mask[rows, T:].any() and torch.allclose(part[1], logprobs[rows, :T], atol=1e-5)


def test_under_autocast_keys_and_values_of_the_cache_have_one_dtype(monkeypatch):
    attention, dtypes = torch.nn.functional.scaled_dot_product_attention, set()

    def watched(query, key, value, *args, **kwargs):
        dtypes.add((key.dtype, value.dtype))
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        draw(make_model(), length=3)
    assert dtypes == {(torch.bfloat16, torch.bfloat16)}


# ---- log-probabilities of the update


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("K", [1, 4])
def test_gradients_equal_the_naive_ones(architecture, K, monkeypatch):
    monkeypatch.setitem(grpo_llm.TILE, "cpu", 350)  # several tiles of the vocabulary, the last one not full
    model = make(architecture)
    response, _, mask = draw(model)
    completions, prompts = to_lists(response, mask), [p for p in PROMPTS for _ in range(4 // K)]
    factors = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    total = (completion_logprobs(model, prompts, completions, 0.7) * factors).sum()
    naive = sum(
        naive_logprobs(model, PROMPTS[i // 4], completion, 0.7) @ factors[i, : len(completion)]
        for i, completion in enumerate(completions)
    )
    parameters = list(model.parameters())
    for ours, theirs in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(naive, parameters)):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


def test_the_bf16_gradient_of_confident_tokens_is_as_good_as_autocasts():
    """1 - p must be taken in fp32: of a token with p = 0.9999, a rounded softmax term would leave nothing but noise."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=generator), torch.randn(50, 32, generator=generator)
    target = torch.arange(64) % 50
    hidden = (weight[target] * 0.4 + 0.1 * hidden).requires_grad_()  # the target's logit stands out
    weight.requires_grad_()
    values = {}
    for name in ("exact", "ours", "autocast"):
        if name == "ours":
            with torch.autocast("cpu", torch.bfloat16):
                logprobs = TokenLogprobs.apply(hidden, weight, target, 1.0)
        else:
            dtype = torch.float64 if name == "exact" else torch.bfloat16
            logits = (hidden.to(dtype) @ weight.to(dtype).T).to(torch.float64 if name == "exact" else torch.float32)
            logprobs = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
        gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
        values[name] = (logprobs.detach(), *(gradient.double() for gradient in gradients))
    assert 0.97 < values["exact"][0].exp().median() < 1
    for i in (1, 2):
        error, plain = ((values[name][i] - values["exact"][i]).norm() for name in ("ours", "autocast"))
        assert error < 1.5 * plain + 1e-6


def test_a_tree_mask_is_additive_and_in_the_compute_dtype():
    model, masks = make_model(), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    completion_logprobs(model, PROMPTS[:1], [[3, 4], [5]], 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        completion_logprobs(model, PROMPTS[:1], [[3, 4], [5]], 1.0)
    assert [mask.dtype for mask in masks] == [torch.float32, torch.bfloat16]


def test_long_completions_share_rows_with_fewer_others():
    """A dense mask costs (L_q + K T)^2: at Qwen2.5-0.5B's width and T = 512, K = 2 took 11.1 s and K = 8 15.4 s."""
    wide, windowed = make_model(), make("mistral")
    wide.config.hidden_size = 896
    for model, T, possible in ((wide, 20, {8}), (wide, 512, {1, 2}), (windowed, 20, {1})):
        samples = [{"ids": [3] * 64, "completion": [4] * T}] * 8
        (indices, prompts, _), *_ = pack(model, samples, 8, 10**6)
        assert len(indices) // len(prompts) in possible


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


def test_learning_rate_schedule_warms_up_and_ends_exactly():
    for kind in ("linear", "cosine"):
        factors = [lr_factor(step, 10, 3, kind) for step in range(10)]
        assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[-1] == pytest.approx(0.0, abs=1e-15)
        assert all(a >= b for a, b in zip(factors[3:], factors[4:]))
    assert [lr_factor(step, 4, 2, "constant") for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert lr_factor(0, 1, 0, "linear") == 1.0


# ---- rewards and data


@pytest.mark.parametrize("text, number", [
    ("-12=132", 132), ("48/2 = 24. So it is 72.", 72), ("so 3\n#### 1,000", 1000), ("\\boxed{\\$72.50} in 2 d", 72.5),
    ("\\boxed{\\frac{1}{2}}", None), ("\\boxed{3/4}", None), ("#### -$5", -5), ("\\boxed{x^2}", None),
    ("#### .5", 0.5), ("\\boxed{.5}", 0.5), ("it is -.5.", -0.5), ("\\boxed{2x}", None), ("#### 2 or 3", None),
    ("10-3=7", 7), ("it is -5", -5), ("#### -4", -4), ("none", None), ("", None), ("x-3", -3),
    ("it is \u22125", -5), ("#### \u22125", -5), ("#### **72**", 72), ("#### 72 apples", 72), ("1{,}234", 1234),
    ("\\boxed{1{,}234}", 1234), ("#### 72 dollars.", 72), ("#### 15%", 15), ("7 #### 8", 8), ("#### 72\nis 9", 72),
    ("#### Step 1: add\n2+3 is 5", 5), ("#### **Step 2**\n7.", 7), ("#### 1. Add\nis 5", 5),
    ("#### \\frac{1}{2}", None),
])  # fmt: skip
def test_extract_number(text, number):
    assert extract_number(text) == number


def test_rewards_by_hand(monkeypatch):
    assert accuracy_reward("", "I think 7.0", "... #### 7") == 1.0
    assert accuracy_reward("", "no idea", "#### 7") == 0.0
    for formula in ("\\frac{1}{2}", "x^2", "3/2", "2 or 3", "\\boxed{x^2}"):
        assert accuracy_reward("", "it is 2", formula) is None
    assert accuracy_reward("", "it is 1000", " 1,000 ") == 1.0
    assert accuracy_reward("", "Paris", "Paris") is None and accuracy_reward("", "1", None) is None
    samples = [{"prompt": "", "text": "1+1=2", "answer": "2"}, {"prompt": "", "text": "3", "answer": "2"}]
    monkeypatch.setattr(grpo_llm, "REWARDS", ((accuracy_reward, 3.0), (format_reward, 0.0)))
    rewards, parts = grpo_llm.score_completions(samples, lambda samples: torch.tensor([0.5, 0.25]))
    assert rewards.tolist() == [3.5, 0.25] and parts["format_reward"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="no finite reward"):  # a weight of 0 only logs
        grpo_llm.score_completions([{**samples[0], "answer": None}], None)
    shown = [format_reward("", c, None) for c in ("-12=132", "132", "#### 4", "2+2 is 4\n#### 4")]
    assert shown == [1.0, 0.0, 0.0, 1.0]


def test_hasty_demonstrators_forget_the_carry():
    rng = random.Random(0)
    for prompt, answer, hasty in (("47+85=", "-12=132", {121, 122, 123}), ("41+82=", "-3=123", {122, 123, 124})):
        texts = [grpo_llm.demonstrate({"prompt": prompt}, rng) for _ in range(4000)]
        assert set(texts) == {answer, *map(str, hasty)}
        assert 0.22 < texts.count(answer) / 4000 < 0.28


def test_rows_of_all_kinds_become_prompts_and_answers():
    tokenizer, turn = make_tokenizer(), {"role": "user", "content": "2+2="}
    rows = [
        {"prompt": "2+2=", "answer": "4"}, {"question": "2+2=", "answer": 4, "solution": None},
        {"messages": [turn, {"role": "assistant", "content": "4"}], "solution": "4"}, {"prompt": [turn]},
    ]  # fmt: skip
    examples = encode_rows(rows, tokenizer, 10)
    assert [e["ids"] for e in examples] == [tokenizer("2+2=").input_ids] * 4
    assert [e["answer"] for e in examples] == ["4", "4", "4", None]
    assert [e["prompt"] for e in examples] == ["2+2="] * 4
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    (example,) = encode_rows([{"prompt": []}, {"prompt": [{"role": "b", "content": "1+1="}]}], tokenizer, 10)
    assert tokenizer.decode(example["ids"]) == "b1+1=a"


def test_a_prompt_does_not_end_with_the_eos_that_some_tokenizers_append():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert tokenizer("2").input_ids[-1] == 1
    assert encode_rows([{"prompt": "2+2="}], tokenizer, 10)[0]["ids"] == make_tokenizer()("2+2=").input_ids


def test_prompts_that_do_not_fit_are_left_out_and_counted(capsys):
    rows = [{"prompt": "1+1="}, {"prompt": "1" * 30}, {"prompt": "was?"}, {"prompt": "2+2="}]
    assert [e["prompt"] for e in encode_rows(rows, make_tokenizer(), 29)] == ["1+1=", "2+2="]
    assert "2 of 4 prompts are left out" in capsys.readouterr().out


# ---- models


def test_weights_are_fp32_masters_and_dropout_is_off(tmp_path):
    make_model("gpt2").to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path), "--model-name-or-path")[0].train()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_dropout_is_off_in_nested_configurations_too(tmp_path, monkeypatch):
    transformers.Gemma3Config(text_config={"attention_dropout": 0.5}).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    seen = []

    def from_pretrained(name, config, **flags):
        seen.append(config)
        raise InterruptedError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError):
        load_pretrained(str(tmp_path), "--model-name-or-path")
    assert seen[0].get_text_config().attention_dropout == 0.0


def test_a_model_without_some_weights_is_refused(model_folder, tmp_path):
    model, state = AutoModelForCausalLM.from_pretrained(model_folder), {}
    for name, value in model.state_dict().items():
        if "mlp.up_proj" not in name:
            state[name] = value.contiguous()
    model.save_pretrained(tmp_path, state_dict=state)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mlp.up_proj"):
        load_pretrained(str(tmp_path), "--model-name-or-path")


def save_reward_model(folder, config, **values):
    torch.manual_seed(0)
    config.num_labels, config.pad_token_id = 1, 0
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for name, value in values.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    return model


def reward_samples(texts, prompt="7="):
    return [{"prompt": prompt, "turns": [{"role": "user", "content": prompt}], "text": text} for text in texts]


TEMPLATE = "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}"


@pytest.mark.parametrize("template, kind", [(None, "bert"), (TEMPLATE, "bert"), (None, "llama")])
def test_reward_model_scores_are_the_classifiers_own_also_in_a_batch(template, kind, tmp_path):
    small = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = BertConfig(**small, intermediate_size=64, max_position_embeddings=16)
    config = bert if kind == "bert" else CONFIGS["llama"].__class__(**CONFIGS["llama"].to_diff_dict())
    model = save_reward_model(tmp_path, config, reward_mean=0.5, reward_std=2.0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    samples, long = reward_samples(["1", "1+2=3", "a" * 10, "12345"]), reward_samples(["1" * 40, "1" * 14])
    for normalize in (False, True):
        args = Args(reward_model_path=str(tmp_path), normalize_reward_model=normalize, max_tokens_per_microbatch=32)
        score = grpo_llm.load_reward_model(args, torch.device("cpu"))
        together, alone = score(samples), torch.cat([score([s]) for s in samples])
        assert torch.allclose(together, alone, atol=1e-5) and len(set(together.tolist())) == 4
        ids = tokenizer("7=1" if template is None else "u7=a1", return_tensors="pt").input_ids
        expected = model(input_ids=ids).logits.item()
        assert together[0].item() == pytest.approx((expected - 0.5) / 2 if normalize else expected, abs=1e-5)
        assert torch.allclose(*score(long), atol=1e-6) == (kind == "bert")  # its context has room for 16 tokens


# ---- whole runs: files and failures


@pytest.fixture(autouse=True)
def graded_reward(monkeypatch):
    monkeypatch.setattr(grpo_llm, "REWARDS", ((digit_reward, 1.0), *grpo_llm.REWARDS))


def test_what_a_run_leaves_and_prints(tiny, capsys):
    args = tiny(beta=0.0)
    metrics = main(args)
    folder, lines = run_folder(args), capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1] == str(folder)
    assert json.loads((folder / "summary.json").read_text()) == metrics
    names = {f"eval/{x}" for x in ("accuracy", "accuracy_greedy", "pass@8", "reward", "reward_greedy", "kl")}
    assert {*names, *(f"{name}_before" for name in names), "seed", "wall_seconds"} <= set(metrics)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert AutoTokenizer.from_pretrained(folder / "model")("1+2=").input_ids == make_tokenizer()("1+2=").input_ids
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())
    assert not list(folder.glob("*.tmp"))


def test_held_out_rows_share_no_prompt_with_training_and_are_the_same_for_every_seed(tiny, tmp_path, monkeypatch):
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(8)]
    rows += rows[:20]  # each of the first 20 prompts twice
    data, seen = write_rows(tmp_path / "twice.jsonl", rows), []

    def watched(prompt, completion, answer):
        seen.append(prompt)
        return float(len(completion))

    monkeypatch.setattr(grpo_llm, "REWARDS", ((watched, 1.0),))
    held_out = []
    for seed in (1, 2):
        args = tiny(output_dir=str(tmp_path / str(seed)), dataset_name=data, seed=seed, max_steps=20, max_eval_samples=64)
        main(args)
        evaluation = len(seen) - 20 * 16  # two evaluations of 8 + 1 completions per held-out row
        assert evaluation % 18 == 0 and 0 < evaluation // 18 <= len(rows) // 10
        before, training, after = seen[: evaluation // 2], seen[evaluation // 2 : -evaluation // 2], seen[-evaluation // 2 :]
        assert set(before) == set(after) and not set(before) & set(training)
        assert len(set(training)) == 40 - len(set(before))
        held_out.append(set(before))
        seen.clear()
    assert held_out[0] == held_out[1]


def test_parquet_folders_and_split_names(tiny, tmp_path):
    import datasets

    rows = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(8)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "sums.parquet"))
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "train.jsonl", rows[:5])
    write_rows(tmp_path / "folder" / "validation.jsonl", rows[5:])
    load = lambda **flags: grpo_llm.load_rows(tiny(**flags))  # noqa: E731
    assert load(dataset_name=str(tmp_path / "sums.parquet")) == (rows, [])
    folder = str(tmp_path / "folder")
    assert load(dataset_name=folder) == (rows[:5], [])
    assert load(dataset_name=folder, dataset_test_split="validation") == (rows[:5], rows[5:])
    with pytest.raises(ValueError, match="nonsense is not one of"):
        load(dataset_name=folder, dataset_test_split="nonsense")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_reward_that_is_no_number_names_the_prompt(tiny, monkeypatch, value):
    def broken_reward(prompt, completion, answer):
        return value

    monkeypatch.setattr(grpo_llm, "REWARDS", ((broken_reward, 1.0),))
    with pytest.raises(ValueError, match=r"no finite reward for '\d\+\d='"):
        main(tiny())


def test_the_embedded_run_starts_from_its_supervised_model_and_resumes(tmp_path):
    flags = {"output_dir": str(tmp_path), "sft_steps": 3, "max_steps": 2, "generation_batch_size": 16, "save_steps": 1,
             "max_eval_samples": 8, "max_completion_length": 8, "device": "cpu", "bf16": False}  # fmt: skip
    args = Args(**flags)
    metrics = main(args)
    folder = run_folder(args)
    assert AutoModelForCausalLM.from_pretrained(folder / "sft").config.vocab_size == 15
    assert AutoTokenizer.from_pretrained(folder / "model").decode([6, 8, 1], skip_special_tokens=True) == "46"
    again = main(Args(resume=str(folder)))  # a finished run: evaluated again
    assert {k: v for k, v in again.items() if k != "wall_seconds"} == {
        k: v for k, v in metrics.items() if k != "wall_seconds"
    }


def test_an_unsupported_model_is_refused(tiny, model_folder, monkeypatch):
    """A model that changes its logits after its head: its sampler and its update would not agree."""
    real = grpo_llm.load_pretrained

    def scaled(*args):
        model, tokenizer = real(*args)
        model.lm_head.register_forward_hook(lambda head, inputs, logits: 2 * logits)
        return model, tokenizer

    monkeypatch.setattr(grpo_llm, "load_pretrained", scaled)
    with pytest.raises(ValueError, match="not supported"):
        main(tiny())


def test_help_is_short_and_says_something_of_every_flag():
    command = [sys.executable, str(ROOT / "grpo_llm.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"COLUMNS": "80"})
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) <= 110 and "(default: )" not in shown.stdout


def test_an_error_on_the_command_line_is_one_sentence_with_the_scripts_line_and_code_2(tmp_path, model_folder):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": \n')
    for flags, words in ((["--dataset-name", str(broken)], "JSON"), (["--num-generations", "1"], "--num-generations 1")):
        command = [sys.executable, str(ROOT / "grpo_llm.py"), "--model-name-or-path", model_folder, *flags]
        command += ["--output-dir", str(tmp_path / "runs"), "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and words in line and "(grpo_llm.py, line " in line
        assert "Traceback" not in done.stderr


def test_real_files_run_end_to_end(shared, tmp_path):
    """GSM8K through a real tokenizer and stop ids [1, 2]; then a reward model whose tokenizer is another."""
    flags = {"model_name_or_path": str(shared / "models/stories260K"), "output_dir": str(tmp_path), "max_steps": 1,
             "generation_batch_size": 8, "num_generations": 4, "max_eval_samples": 4, "max_completion_length": 16,
             "device": "cpu", "bf16": False}  # fmt: skip
    rows = [json.loads(line) for line in (shared / "data/gsm8k/train.jsonl").read_text().splitlines()[:60]]
    short = [row for row in rows if len(row["question"]) < 300]
    gsm8k = main(Args(**flags, dataset_name=write_rows(tmp_path / "gsm8k.jsonl", short)))
    assert gsm8k["eval/accuracy"] <= 0.5 and gsm8k["eval/mean_length"] > 1
    starts = [{"prompt": f"Once upon a time there was {who}"} for who in ("a cat", "a dog", "Tom", "Lily")] * 5
    (tmp_path / "stories").mkdir()
    write_rows(tmp_path / "stories" / "train.jsonl", starts)
    write_rows(tmp_path / "stories" / "test.jsonl", [{"prompt": "Once upon a time"}] * 4)
    grpo_llm.REWARDS = ((format_reward, 0.0),)
    rated = main(Args(**flags, dataset_name=str(tmp_path / "stories"),
                      reward_model_path=str(shared / "models/minilm-sentiment-rm")))  # fmt: skip
    assert "eval/accuracy" not in rated and -6 < rated["eval/reward"] < 6
    assert rated["eval/reward"] == pytest.approx(rated["eval/reward_model"])
