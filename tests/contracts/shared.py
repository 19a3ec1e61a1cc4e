"""Operations through shared memory: with limits so small that small tensors meet all of them, and symmetric tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import commlayer
from commlayer.backends import shared
from commlayer.backends.shared import channel, rounds
from commlayer.planner import Line
from tests.contracts import layouts
from tests.contracts.cases import Case, cases
from tests.contracts.checks import Call, _arguments, _compare
from tests.contracts.oracle import DTYPES, Exact, Near, itemsize, make

HALF, SMALL, LARGE = 1024, 384, 3000  # bytes, instead of a MiB, 64 KiB and 8 MiB
SIZES = (0, 1, 60, 64, 96, 128, 192, 250, 256, 260, 512, 1000, 1024, 1028, 2048, 2500, 3100, 4096)  # bytes of a tensor


@contextmanager
def small_limits() -> Iterator[None]:
    """Groups that are made now have short slots, and take shared memory for every size; the same on every rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "HALF", HALF)
        patch.setattr(shared, "HALF_CROWDED", HALF)
        patch.setattr(channel, "SMALL", SMALL)
        patch.setattr(rounds, "LARGE", LARGE)
        patch.setattr(Line, "cheaper_from", lambda near, far: 0)
        yield


def otherwise(world: commlayer.Group, **changed: Any) -> commlayer.Group:
    """A group of all ranks, as if their hosts were not what they are: without compilers, or several."""
    hosts = world._hosts
    assert hosts is not None
    world._hosts = dataclasses.replace(hosts, **changed)
    try:
        return world.new_group(list(range(world.size)))
    finally:
        world._hosts = hosts


@st.composite
def shared_cases(draw: st.DrawFn, groups: tuple[str, ...]) -> Case:
    """One call with a tensor of around a limit's size, and what is to be symmetric."""
    case = draw(cases(groups).filter(lambda case: case.op not in ("sendrecv", "messages")))
    shape = list(case.shape)
    if shape and draw(st.integers(0, 3)):
        dim = case.dim % len(shape)
        shape[dim] = 1
        around = max(itemsize(case.dtype) * int(np.prod(shape)), 1)
        shape[dim] = draw(st.sampled_from(SIZES)) // around
    return dataclasses.replace(case, shape=tuple(shape))


class Arena:
    """This rank's part of a symmetric buffer, from which tensors are cut at odd places."""

    def __init__(self, group: commlayer.Group, size: int = 1 << 20) -> None:
        self.memory = commlayer.empty_symmetric(size, torch.uint8, group) if group.is_member else None
        self.used = 0

    def clear(self) -> None:
        self.used = 0

    def move(self, placed: layouts.Placed, rng: np.random.Generator, *others: layouts.Placed) -> list[layouts.Placed]:
        """The same tensors, all within the memory of the first, in symmetric memory."""
        item, size = itemsize(placed.dtype), placed.memory.numel()
        start = (self.used + 63) // item * item + item * int(rng.integers(1, 40))
        assert self.memory is not None
        if start + size > self.memory.numel():
            return [placed, *others]
        self.used = start + size
        room = self.memory[start : start + size]
        room.copy_(placed.memory)
        moved = []
        for old in (placed, *others):
            line = room.view(DTYPES[old.dtype])
            place = line.storage_offset() + old.tensor.storage_offset()
            tensor = torch.as_strided(line, old.tensor.shape, old.tensor.stride(), place)
            tensor = tensor.conj() if old.tensor.is_conj() else tensor
            tensor = torch._neg_view(tensor) if old.tensor.is_neg() else tensor
            moved.append(dataclasses.replace(old, tensor=tensor, memory=room))
        return moved


class Started:
    """A case that this rank has called; ``symmetric``: on which ranks its tensors are, by bits of the case's seed."""

    def __init__(self, case: Case, group: commlayer.Group, arena: Arena, symmetric: str) -> None:
        self.case = case
        call, rank = Call(case, group.size), group.rank
        self.what = f"{case.op} on rank {rank} of {group.size}, {symmetric} symmetric"
        rng = np.random.default_rng((case.seed, rank, 11))
        data, self.expected = call.inputs[rank], call.expected(rank)
        x, out = _tensors(case, data, self.expected, rank)
        wanted = {"none": (False, False), "all": (True, True), "some": (rng.random() < 0.5, rng.random() < 0.5)}
        first, second = wanted[symmetric]
        if out is not None and out is not x and out.memory is x.memory:
            x, out = arena.move(x, rng, out) if first else (x, out)
        else:
            same = out is x
            x = arena.move(x, rng)[0] if first else x
            out = x if same else arena.move(out, rng)[0] if out is not None and second else out
        self.x, self.out = x, out
        function, kwargs = _arguments(call, rank)
        self.result = function(x.tensor, group=group, out=out and out.tensor, async_op=case.async_op, **kwargs)

    def finish(self) -> bytes:
        """The bytes of this rank's result, where every rank has the same."""
        if self.case.async_op:
            work, self.result = self.result, self.result.wait()
            assert work.done()
        return _compare(self.what, self.result, self.expected, self.x, self.out, self.case)

    def drop(self) -> None:
        """Nobody waits for it."""
        self.result = None


def _tensors(
    case: Case, data: np.ndarray, expected: Exact | Near | None, rank: int
) -> tuple[layouts.Placed, layouts.Placed | None]:
    x = layouts.put(data, case.dtype, case.layout, (case.seed, rank, 1))
    if expected is None or case.out == "none":
        return x, None
    shape = (expected.data if isinstance(expected, Exact) else expected.values).shape
    shape = shape[:-1] if isinstance(expected, Exact) else shape
    if case.out == "same" and case.layout != layouts.EXPANDED and shape == data.shape[:-1]:
        return x, x
    if case.out == "overlap":
        return layouts.overlapping(x, shape, case.seed % 3)
    blank = make((case.seed, rank, 5), shape, case.dtype, "values")
    layout = layouts.PLAIN if case.out == "fresh" else case.out_layout
    return x, layouts.put(blank, case.dtype, layout, (case.seed, rank, 2))
