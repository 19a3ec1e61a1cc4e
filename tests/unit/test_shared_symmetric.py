"""The places of symmetric tensors, and when their memory goes; both ranks in one process."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import pytest
import torch

from commlayer.backends.shared.symmetric import Symmetric, space

SHAPE = (3, 700)


class Pages:
    """What a Memory is to Symmetric."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffer: Any = (ctypes.c_char * size)()
        self.address = ctypes.addressof(self.buffer)


@pytest.fixture
def ranks() -> list[Symmetric]:
    return [Symmetric(rank, 2) for rank in range(2)]


def both(ranks: list[Symmetric], shape: tuple[int, ...] = SHAPE) -> list[torch.Tensor]:
    pages = Pages(space(2, shape, torch.float32))  # one mapping here, where processes have one each
    return [rank.add(pages, shape, torch.float32) for rank in ranks]


def test_each_rank_finds_the_others_tensors(ranks: list[Symmetric]) -> None:
    tensors = [both(ranks) for _ in range(3)]
    for pair in tensors:
        for rank, other in ((0, 1), (1, 0)):
            for part in (pair[rank], pair[rank][1:], pair[rank].view(-1)[13:20], pair[rank].view(-1)[-1:]):
                number, offset = ranks[rank].place(part.data_ptr())
                assert ranks[other].address(rank, number, offset) == part.data_ptr()
    places = {ranks[0].place(pair[0].data_ptr()) for pair in tensors}
    assert len(places) == 3


def test_what_is_not_symmetric_has_no_place(ranks: list[Symmetric]) -> None:
    mine, theirs = both(ranks)
    for address in (0, torch.ones(5).data_ptr(), theirs.data_ptr(), mine.data_ptr() - 1):
        number, _ = ranks[0].place(address)
        assert number < 0
    stretch = next(iter(ranks[1]._stretches.values()))
    assert ranks[1].place(stretch.end)[0] < 0  # the first byte after it
    assert ranks[1].place(stretch.end - 1)[0] >= 0


def test_parts_do_not_overlap_and_begin_on_pages(ranks: list[Symmetric]) -> None:
    for shape in ((1,), (1024,), (1025,), (5, 1000), ()):
        mine, theirs = both(ranks, shape)
        assert mine.shape == theirs.shape == shape
        mine.fill_(1)
        theirs.fill_(2)
        assert mine.unique().tolist() == [1.0]
        assert abs(theirs.data_ptr() - mine.data_ptr()) >= mine.nbytes


def test_memory_goes_when_no_rank_uses_it(ranks: list[Symmetric]) -> None:
    mine, theirs = both(ranks)
    pages = weakref.ref(next(iter(ranks[0]._stretches.values())).memory)
    view = mine[1]
    del mine
    gc.collect()
    for rank in ranks:
        rank.sweep()
    assert ranks[0].place(view.data_ptr())[0] >= 0, "a view is left"
    del view
    gc.collect()
    for rank in ranks:
        rank.sweep()
    assert ranks[1].place(theirs.data_ptr())[0] >= 0, "the other rank's is left"
    assert ranks[0]._stretches
    del theirs
    gc.collect()
    assert pages() is not None
    for rank in ranks:
        rank.sweep()
    assert pages() is None
    assert not ranks[0]._stretches
    assert not ranks[1]._stretches


def test_numbers_go_on_after_a_sweep(ranks: list[Symmetric]) -> None:
    first = both(ranks)
    second = both(ranks)
    del first
    gc.collect()
    for rank in ranks:
        rank.sweep()
    third = both(ranks)
    for pair in (second, third):
        number, offset = ranks[0].place(pair[0].data_ptr())
        assert ranks[1].address(0, number, offset) == pair[0].data_ptr()


def test_tensors_outlive_what_has_made_them(ranks: list[Symmetric]) -> None:
    mine, theirs = both(ranks)
    ranks.clear()
    gc.collect()
    mine.fill_(3)
    theirs.fill_(4)
    assert mine.sum() == 3 * mine.numel()
