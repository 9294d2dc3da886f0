"""Preferences for dpo.py from a model's own samples, ranked by a reward model; and what DPO made of that model.

    python tests/sentiment_pairs.py make --model M --reward-model R --prompts prompts.jsonl --pairs pairs.jsonl
    python dpo.py --model-name-or-path M --dataset-name pairs.jsonl --learning-rate 3e-4
    python tests/sentiment_pairs.py evaluate --model runs/<run folder>/model --initial M --reward-model R \\
        --prompts prompts.jsonl

`make` samples 8 completions for each prompt but the last 200 and writes the best and the worst as a pair; `evaluate`
samples one for each of those 200 and prints the mean reward of both models and the KL between them.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from ppo_llm import Args, completion_logprobs, encode_rows, load_pretrained, load_reward_model, sample

HELD_OUT, TOKENS = 200, 48


def draw(model, tokenizer, rows: list[dict], count: int, seed: int) -> tuple[list[dict], torch.Tensor]:
    """count samples {..., completion, text} per row, as main's rollout makes them, and their logprobs (P*count, T)."""
    examples = encode_rows(rows, tokenizer, 10**6)
    query = tokenizer.pad({"input_ids": [e["ids"] for e in examples]}, padding_side="left", return_tensors="pt")
    eos = model.generation_config.eos_token_id
    stop_ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    response, logprobs, mask = sample(
        model, query.input_ids, query.attention_mask, count, TOKENS, 1.0, [*stop_ids], tokenizer.pad_token_id,
        torch.Generator().manual_seed(seed),
    )  # fmt: skip
    samples = []
    for i, (ids, kept) in enumerate(zip(response, mask)):
        example, completion = examples[i // count], ids[kept].tolist()
        texts = tokenizer.batch_decode([example["ids"], example["ids"] + completion], skip_special_tokens=True)
        samples.append({**example, "completion": completion, "text": texts[1][len(texts[0]) :]})
    return samples, logprobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "evaluate"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--initial", help="evaluate: the model that training started from")
    parser.add_argument("--reward-model", required=True)
    parser.add_argument("--prompts", required=True, help="JSON Lines with a column `prompt`")
    parser.add_argument("--pairs", help="make: the file to write")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rows = [json.loads(line) for line in Path(options.prompts).read_text().splitlines()]
    score = load_reward_model(Args(reward_model_path=options.reward_model), torch.device("cpu"))
    if options.action == "make":
        model, tokenizer = load_pretrained(options.model, "--model")
        with open(options.pairs, "w") as file:
            for start in range(0, len(rows) - HELD_OUT, 32):
                samples, _ = draw(model, tokenizer, rows[start : len(rows) - HELD_OUT][:32], 8, options.seed + start)
                scores = score(samples).tolist()
                for i in range(0, len(samples), 8):
                    ranked = sorted(range(i, i + 8), key=scores.__getitem__)
                    pair = {"chosen": samples[ranked[-1]]["text"], "rejected": samples[ranked[0]]["text"]}
                    file.write(json.dumps({"prompt": samples[i]["prompt"], **pair}) + "\n")
        return
    initial, _ = load_pretrained(options.initial, "--initial")
    for name, folder in (("before", options.initial), ("after", options.model)):
        model, tokenizer = load_pretrained(folder, "--model")
        samples, logprobs = draw(model, tokenizer, rows[-HELD_OUT:], 1, options.seed)
        with torch.no_grad():
            prompts, completions = ([s[key] for s in samples] for key in ("ids", "completion"))
            kl = (logprobs - completion_logprobs(initial, prompts, completions, 1.0)).sum(1).mean()
        print(f"{name}: mean reward {score(samples).mean():.2f}, KL {kl:.2f} nats; "
              f"{samples[0]['prompt'] + samples[0]['text']!r}")  # fmt: skip


if __name__ == "__main__":
    main()
