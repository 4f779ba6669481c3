"""How close a model with a kv4 cache stays to the same model with its own cache."""

from kv4.extras import require

require("kv4.evaluate", "tools", "torch", "transformers", "matplotlib")

from kv4.calibration import Calibration
from kv4.evaluate.quality import Candidate, Quality, measure, measure_all
from kv4.evaluate.scores import Summary, TokenScores
from kv4.evaluate.variant import SideVariant, Variant

__all__ = [
    "Calibration",
    "Candidate",
    "Quality",
    "SideVariant",
    "Summary",
    "TokenScores",
    "Variant",
    "measure",
    "measure_all",
]
