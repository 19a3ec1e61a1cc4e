"""The emulations: one module per target operation, each lowering a small function.

Importing this package fills ``registry.FALLBACKS``.
"""

from commlayer.fallbacks import (
    all_gather,
    all_reduce,
    all_to_all,
    dtypes,
    point_to_point,
    reduce_ops,
    reduce_scatter,
    rooted,
)
from commlayer.fallbacks.registry import FALLBACKS, Fallback, Use

__all__ = [
    "FALLBACKS",
    "Fallback",
    "Use",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "dtypes",
    "point_to_point",
    "reduce_ops",
    "reduce_scatter",
    "rooted",
]
