"""A process that answers prompts with so many ranks: python parallel.py FOLDER RANKS. Tokens and log-probabilities as
JSON in a line of its output."""

from __future__ import annotations

import json
import sys

import numpy as np


def main() -> None:
    folder, ranks = sys.argv[1], int(sys.argv[2])
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="float32",
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=256,
        skip_tokenizer_init=True,
        attention_backend="CUSTOM",
        additional_config={"kv4": {"recipe": "kv4"}},
    )
    drawn = np.random.default_rng(3)
    prompts = [{"prompt_token_ids": drawn.integers(3, 500, n).tolist()} for n in (5, 63, 200, 320, 700)]
    greedy = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True, logprobs=3, detokenize=False)
    answers = [x.outputs[0] for x in llm.generate(prompts, greedy, use_tqdm=False)]
    found = [
        {
            "tokens": list(a.token_ids),
            "logprobs": [{str(t): x.logprob for t, x in step.items()} for step in a.logprobs],
        }
        for a in answers
    ]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
