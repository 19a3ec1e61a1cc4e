"""Parallel modules on commlayer's public functions, for use in your own models."""

from parallel.amp import GradScaler, autocast
from parallel.attention import SequenceShards, context_attention
from parallel.balance import LoadCounter
from parallel.clip import clip_grad_norm_, grad_norm
from parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel.data import DataParallel
from parallel.dispatch import Dispatcher
from parallel.expert import MoE
from parallel.experts import Experts, grouped_linear
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
from parallel.rng import Dropout, DropPath, Streams
from parallel.router import Routing, TopKRouter
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.transformer import ParallelAttention, ParallelMLP
from parallel.verify import verify_gradients
from parallel.zero import ZeRO

__all__ = [
    "ColumnParallelLinear",
    "DataParallel",
    "Dispatcher",
    "DropPath",
    "Dropout",
    "Experts",
    "GradScaler",
    "LoadCounter",
    "MoE",
    "ParallelAttention",
    "ParallelMLP",
    "Routing",
    "RowParallelLinear",
    "SequenceShards",
    "Streams",
    "TopKRouter",
    "VocabParallelEmbedding",
    "ZeRO",
    "all_gather_from_region",
    "all_to_all_region",
    "autocast",
    "clip_grad_norm_",
    "context_attention",
    "copy_to_region",
    "gather_from_region",
    "grad_norm",
    "grouped_linear",
    "mark_replicated",
    "mark_sharded",
    "reduce_from_region",
    "reduce_scatter_to_region",
    "scatter_to_region",
    "verify_gradients",
    "vocab_parallel_cross_entropy",
]
