"""kv4: an int4 key/value cache for transformer inference.

`kv4.hf` puts it behind HuggingFace transformers; the `kv4` command generates, measures and explains.
"""

from kv4 import _core
from kv4.recipe import Recipe, Side

__version__: str = _core.version()
__all__ = ["Recipe", "Side", "num_threads", "set_num_threads"]


def set_num_threads(n: int) -> None:
    """Threads that a call may use, at least 1. By default kv4 follows `torch.set_num_threads`."""
    _core.set_num_threads(n)


def num_threads() -> int:
    return _core.num_threads()
