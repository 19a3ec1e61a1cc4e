"""Which tokens each rank holds: arithmetic, and cutting and joining sequences with their gradients."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import commlayer
from commlayer import Group, run_local
from parallel.shards import SequenceShards


@given(length=st.integers(0, 60), parts=st.integers(1, 9), zigzag=st.booleans())
@settings(deadline=None, derandomize=True, database=None)
def test_shards_are_balanced_and_complete(length, parts, zigzag):
    shards = SequenceShards(length, parts, zigzag)
    positions = [shards.positions(rank) for rank in range(parts)]
    assert [len(p) for p in positions] == shards.sizes
    assert max(shards.sizes) - min(shards.sizes) <= 1
    assert sorted(torch.cat(positions).tolist()) == list(range(length))
    for rank, found in enumerate(positions):
        held = [list(range(*interval)) for interval in shards.intervals(rank)]
        assert list(itertools.chain(*held)) == sorted(found.tolist()) == found.tolist()
        assert all(held)
    x = torch.arange(length)[None]
    assert torch.equal(shards.by_rank(x, 1)[0], torch.cat(positions))
    assert torch.equal(shards.in_order(shards.by_rank(x, 1), 1), x)


def test_zigzag_pairs_the_first_chunk_with_the_last():
    shards = SequenceShards(13, 3, zigzag=True)
    assert [shards.intervals(rank) for rank in range(3)] == [[(0, 3), (11, 13)], [(3, 5), (9, 11)], [(5, 9)]]
    assert [shards.sizes, shards.positions(1).tolist()] == [[5, 4, 4], [3, 4, 9, 10]]


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("length", [2, 13])
def test_shard_and_unshard_with_gradients(length, zigzag):
    x = torch.randn(2, length, 3, dtype=torch.float64)
    grad = torch.randn_like(x)

    def rank():
        world = commlayer.world()
        shards = SequenceShards(length, world.size, zigzag)
        mine = shards.positions(world.rank)
        y = x.clone().requires_grad_()
        part = shards.shard(y, 1, world)
        assert torch.equal(part, x[:, mine])
        part.backward(grad[:, mine])
        assert torch.equal(y.grad, grad)
        part = part.detach().requires_grad_()
        full = shards.unshard(part, -2, world)
        assert torch.equal(full, x)
        full.backward(grad)
        assert torch.equal(part.grad, grad[:, mine])

    run_local(rank, ranks=3)


def test_bad_shards_are_refused():
    with pytest.raises(ValueError, match="expected length >= 0 and parts >= 1, got -1 and 2"):
        SequenceShards(-1, 2)
    with pytest.raises(ValueError, match="group: the sequence is cut into 2 parts, but there are 1 ranks"):
        SequenceShards(4, 2).shard(torch.zeros(4), 0, Group.alone())
    with pytest.raises(ValueError, match=r"x: expected 4 tokens along dim 0, got shape \(5,\)"):
        SequenceShards(4, 1).shard(torch.zeros(5), 0, Group.alone())
