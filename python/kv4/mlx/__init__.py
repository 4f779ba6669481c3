"""kv4 for mlx-lm.

    import kv4.mlx
    from mlx_lm import generate, load

    model, tokenizer = load("path/to/model")
    kv4.mlx.attach(model)                       # generate() now runs on a 4-bit cache
    generate(model, tokenizer, "The cache")

or, for one call, prompt_cache=kv4.mlx.make_prompt_cache(model). On MLX's CPU device attention runs in kv4's C++ core.
"""

from kv4.extras import require

require("kv4.mlx", "mlx", "mlx", "mlx_lm")

from .attach import attach, detach, make_prompt_cache, why_not
from .attention import scaled_dot_product_attention
from .cache import BatchKV4Cache, KV4Cache, nbytes
from .handle import KVHandle

__all__ = [
    "BatchKV4Cache",
    "KV4Cache",
    "KVHandle",
    "attach",
    "detach",
    "make_prompt_cache",
    "nbytes",
    "scaled_dot_product_attention",
    "why_not",
]
