"""kv4's quality through the Metal kernels in emulation, beside the C++ core's: run by hand, minutes per hundred tokens.

    python tests/python/metal_quality.py [tokens]

Gemma 3 270M in float32 on Python's language reference, in calls of 64 tokens, so that every cache answers from what it
holds; KL against transformers' own cache over the second half.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import kv4.hf
import kv4.hf.layer
from kv4.bench.text import prompt_ids
from kv4.metal.mps import MetalCache
from kv4.models import resolve
from metal_device import host

CALL = 64


def log_probabilities(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """float32 [T / 2, vocabulary]."""
    tokens, parts = ids.shape[1], []
    for at in range(0, tokens, CALL):
        logits = model(ids[:, at : at + CALL], past_key_values=cache).logits[0]
        parts.append(logits[max(0, tokens // 2 - at) :].log_softmax(-1))
    return torch.cat(parts)


def main(tokens: int) -> None:
    folder = resolve("gemma-3-270m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = prompt_ids(AutoTokenizer.from_pretrained(folder), tokens)
    own = log_probabilities(model, ids, DynamicCache(config=model.config))
    kv4.hf.attach(model)

    def emulated(device, recipe, **arguments):
        return MetalCache(host(arguments["head_dim_k"]), recipe, **arguments)

    for name, new_core in (("C++ core", kv4.hf.layer.new_core), ("Metal, in emulation", emulated)):
        kv4.hf.layer.new_core = new_core
        ours = log_probabilities(model, ids, kv4.hf.new_cache(model))
        blocks = zip(own.split(32), ours.split(32), strict=True)
        kl = sum(float((a.exp() * (a - b)).sum()) for a, b in blocks) / len(own)
        same = float((own.argmax(-1) == ours.argmax(-1)).float().mean())
        print(f"{name:20}  KL {kl:.7f}  top-1 {same:.4f}  over {len(own)} tokens")


if __name__ == "__main__":
    with torch.no_grad():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 384)
