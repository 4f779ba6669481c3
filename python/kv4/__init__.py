"""kv4: an int4 key/value cache for transformer inference.

`Cache` is the cache of one attention layer, on numpy arrays or torch tensors; `kv4.hf` puts it behind HuggingFace
transformers; the `kv4` command generates, measures and explains.

The compiled module is loaded when something of it is first used: with it comes the OpenMP runtime, which reads its
environment at that moment and never again (docs/huggingface.md, "On a loaded machine").
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kv4._core import Cache
    from kv4.recipe import Recipe, Side

    __version__: str

__all__ = ["Cache", "Recipe", "Side", "num_threads", "operand_bits", "set_num_threads", "set_operand_bits"]


def __getattr__(name: str) -> Any:
    if name in ("Recipe", "Side"):
        found = getattr(import_module("kv4.recipe"), name)
    elif name == "Cache":
        found = import_module("kv4._core").Cache
    elif name == "__version__":
        found = import_module("kv4._core").version()
    elif name == "_core":
        return import_module("kv4._core")
    else:
        raise AttributeError(f"module 'kv4' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def set_num_threads(n: int) -> None:
    """Threads that a call may use, at least 1. By default kv4 follows `torch.set_num_threads`."""
    from kv4 import _core

    _core.set_num_threads(n)


def num_threads() -> int:
    from kv4 import _core

    return _core.num_threads()


def set_operand_bits(bits: int) -> None:
    """Bits of the integers that queries and attention weights become on the CPU where they meet packed codes, 8 or 16.

    8, the default, is faster with AVX-512 and used there for codes of at most 4 bits; it adds some 2 % to the squared
    error that the codes have. 16 keeps outputs within some 1e-5 of float64 arithmetic over the same pages.
    """
    from kv4 import _core

    _core.set_operand_bits(bits)


def operand_bits() -> int:
    from kv4 import _core

    return _core.operand_bits()
