"""Parallel modules on commlayer's public functions, for use in your own models."""

from parallel.data import DataParallel
from parallel.mappings import (
    all_gather_from_region,
    all_to_all_region,
    copy_to_region,
    gather_from_region,
    reduce_from_region,
    reduce_scatter_to_region,
    scatter_to_region,
)
from parallel.placement import mark_replicated, mark_sharded
from parallel.verify import verify_gradients

__all__ = [
    "DataParallel",
    "all_gather_from_region",
    "all_to_all_region",
    "copy_to_region",
    "gather_from_region",
    "mark_replicated",
    "mark_sharded",
    "reduce_from_region",
    "reduce_scatter_to_region",
    "scatter_to_region",
    "verify_gradients",
]
