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
import ppo_llm

HELD_OUT, TOKENS = 200, 48


def sample_texts(model, tokenizer, prompts: list[str], count: int, seed: int) -> tuple[list[str], tuple]:
    """count completions of each prompt, as texts and as sample()'s tensors; prompts of equal length are not needed."""
    ids = [ppo_llm.encode_prompt(prompt, tokenizer) for prompt in prompts]
    query, query_mask = ppo_llm.pad_sequences(ids, tokenizer.pad_token_id, "left")
    eos = model.generation_config.eos_token_id
    stop_ids = sorted(
        {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    )
    generator = torch.Generator().manual_seed(seed)
    drawn = ppo_llm.sample(
        model, query, query_mask, count, TOKENS, 1.0, stop_ids, tokenizer.pad_token_id, generator
    )  # fmt: skip
    return ppo_llm.decode_responses(tokenizer, query, drawn[0], drawn[2]), (query, query_mask, *drawn)


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
    prompts = [row["prompt"] for row in ppo_llm.read_jsonl(Path(options.prompts))]
    rater = ppo_llm.load_reward_model(options.reward_model, torch.device("cpu"), normalize=False)
    if options.action == "make":
        model, tokenizer = (f(options.model, "--model") for f in (ppo_llm.load_model, ppo_llm.load_tokenizer))
        with open(options.pairs, "w") as file:
            for start in range(0, len(prompts) - HELD_OUT, 32):
                batch = prompts[start : min(start + 32, len(prompts) - HELD_OUT)]
                texts, _ = sample_texts(model, tokenizer, batch, 8, options.seed + start)
                scores = ppo_llm.reward_model_scores(*rater, [p for p in batch for _ in range(8)], texts, 4096)
                for i, prompt in enumerate(batch):
                    ranked = sorted(range(8 * i, 8 * i + 8), key=scores.__getitem__)
                    row = {"prompt": prompt, "chosen": texts[ranked[-1]], "rejected": texts[ranked[0]]}
                    file.write(json.dumps(row) + "\n")
        return
    initial = ppo_llm.load_model(options.initial, "--initial")
    held_out = prompts[-HELD_OUT:]
    for name, folder in (("before", options.initial), ("after", options.model)):
        model, tokenizer = (f(folder, "--model") for f in (ppo_llm.load_model, ppo_llm.load_tokenizer))
        texts, (query, query_mask, response, logprobs, mask) = sample_texts(model, tokenizer, held_out, 1, options.seed)
        scores = ppo_llm.reward_model_scores(*rater, held_out, texts, 4096)
        with torch.no_grad():
            states = ppo_llm.padded_states(initial, query, query_mask, response[:, None], mask[:, None])
            reference = ppo_llm.completion_logprobs(initial, states, response[:, None], mask[:, None], 1.0)[:, 0]
        kl = (logprobs - reference).sum(1).mean()
        print(f"{name}: mean reward {sum(scores) / len(scores):.2f}, KL {kl:.2f} nats; {held_out[0] + texts[0]!r}")


if __name__ == "__main__":
    main()
