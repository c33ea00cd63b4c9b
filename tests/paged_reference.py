"""Decoders for CUDA without a card: their operators in numpy, and `feeds_of`, a step's inputs.

The operators are those of the export's own verification; `tests/test_paged_reference.py` holds them against naive
formulas. `evaluator` opens an exported file; caches are updated in place, as CUDA does: each ``present`` that comes
back is the array that was given as past.
"""

from pathlib import Path

from sardonyx_export.stages.attention_operator import MICROSOFT
from sardonyx_export.stages.operators import OPERATORS, MappedEvaluator
from sardonyx_export.stages.paged_verify import step_feeds as feeds_of
from sardonyx_export.stages.whisper_operators import WHISPER_OPERATORS

__all__ = ["MICROSOFT", "OPERATORS", "evaluator", "feeds_of"]


def evaluator(path: Path) -> MappedEvaluator:
    """A graph with its external data, ready to ``run(None, feeds)``; bfloat16 is `ml_dtypes.bfloat16`."""
    return MappedEvaluator(path, WHISPER_OPERATORS)
