"""Tensor and sequence parallelism between processes: a transformer block, an embedding, a vocabulary cut over ranks.

The finer points are tested on thread ranks, in tests/unit.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import commlayer
from commlayer import Group, balanced_sizes
from parallel.column import column_linear
from parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel.rng import Streams
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.transformer import ParallelAttention, ParallelMLP
from tests.contracts.tensor import CLOSE, assert_gradients, check_block, drawn, rand

in_graphs = pytest.mark.skipif("COMMLAYER_PROFILE" in os.environ, reason="the graphs are those without a profile")


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("gated", "kv_heads", "causal"), [(False, 12, False), (True, 4, True)])
def test_block(everyone, agreed, sequence_parallel, gated, kv_heads, causal):
    if kv_heads % everyone.size:
        pytest.skip(f"{kv_heads} key-value heads do not divide over {everyone.size} ranks")
    options = {"sequence_parallel": sequence_parallel, "gated": gated, "kv_heads": kv_heads, "causal": causal}
    agreed(lambda: check_block(everyone, **options))


@in_graphs
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_block_inside_a_graph(everyone, agreed, sequence_parallel):
    torch._dynamo.reset()
    agreed(lambda: check_block(everyone, sequence_parallel=sequence_parallel, kv_heads=4, compiled=True))
