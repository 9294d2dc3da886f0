"""ppo_llm.py: the parts that it still has in the form of version 0.2: sampler, log-probabilities, answers, data, models."""

import math

import pytest
import torch
import transformers
from conftest import CONFIGS, make_model, make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig

import ppo_llm
from ppo_llm import (
    Args,
    TokenLogprobs,
    accuracy_reward,
    completion_logprobs,
    encode_rows,
    extract_number,
    format_reward,
    load_pretrained,
    pack,
    sample,
    sample_tokens,
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
    monkeypatch.setitem(ppo_llm.TILE, "cpu", 350)  # several tiles of the vocabulary, the last one not full
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
    monkeypatch.setattr(ppo_llm, "REWARDS", ((accuracy_reward, 3.0), (format_reward, 0.0)))
    rewards, parts = ppo_llm.score_completions(samples, lambda samples: torch.tensor([0.5, 0.25]))
    assert rewards.tolist() == [3.5, 0.25] and parts["format_reward"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="no finite reward"):  # a weight of 0 only logs
        ppo_llm.score_completions([{**samples[0], "answer": None}], None)
    shown = [format_reward("", c, None) for c in ("-12=132", "132", "#### 4", "2+2 is 4\n#### 4")]
    assert shown == [1.0, 0.0, 0.0, 1.0]


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
        score = ppo_llm.load_reward_model(args, torch.device("cpu"))
        together, alone = score(samples), torch.cat([score([s]) for s in samples])
        assert torch.allclose(together, alone, atol=1e-5) and len(set(together.tolist())) == 4
        ids = tokenizer("7=1" if template is None else "u7=a1", return_tensors="pt").input_ids
        if template is None:  # EOS ends a text
            ids = torch.cat([ids, torch.tensor([[1]])], 1)
        expected = model(input_ids=ids).logits.item()
        assert together[0].item() == pytest.approx((expected - 0.5) / 2 if normalize else expected, abs=1e-5)
        assert torch.allclose(*score(long), atol=1e-6) == (kind == "bert")  # its context has room for 16 tokens
