"""kv4 for HuggingFace transformers.

Importing this module registers attn_implementation="kv4".

    import kv4.hf
    kv4.hf.attach(model)            # generate() now runs on a 4-bit cache
    model.generate(**inputs)

or, by hand, model.set_attn_implementation("kv4") and past_key_values=kv4.hf.KV4Cache(model.config).
"""

from kv4.extras import require

require("kv4.hf", "hf", "torch", "transformers")

from transformers import AttentionInterface, AttentionMaskInterface

from .attach import attach, detach, why_not
from .attention import kv4_attention
from .cache import KV4Cache
from .calls import new_cache
from .graph import DecodeGraph
from .handle import KVHandle
from .layer import KV4Layer
from .mask import kv4_mask

AttentionInterface.register("kv4", kv4_attention)
AttentionMaskInterface.register("kv4", kv4_mask)

__all__ = [
    "DecodeGraph",
    "KV4Cache",
    "KV4Layer",
    "KVHandle",
    "attach",
    "detach",
    "kv4_attention",
    "kv4_mask",
    "new_cache",
    "why_not",
]
