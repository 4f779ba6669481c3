"""How close a model with a kv4 cache stays to the same model with its own cache."""

from kv4.evaluate.quality import Quality, WindowResult, measure

__all__ = ["Quality", "WindowResult", "measure"]
