"""Symmetric buffers: tensors in memory that all ranks of a host map, each rank's part at a distance of the others'."""

from __future__ import annotations

import ctypes
import math
import os
import struct
import weakref
from bisect import bisect_right
from collections.abc import Sequence

import torch

from commlayer.backends.shared.memory import Memory

_NOWHERE = (-1, 0)
_FLAG = 8  # bytes


class _Stretch:
    """One buffer of all ranks."""

    def __init__(self, memory: Memory, rank: int, size: int, span: int) -> None:
        self.memory, self.size, self.span = memory, size, span
        self.parts = memory.address + header(size)
        self.begin = self.parts + rank * span
        self.end = self.begin + span
        self._mine = _FLAG * rank
        self._process = os.getpid()

    def drop(self) -> None:
        """This rank's tensors are gone. The others may use theirs, together with other tensors of this rank."""
        if os.getpid() != self._process:
            return  # a forked child let go of its parent's
        struct.pack_into("q", self._flags(), self._mine, 1)

    def dropped(self) -> bool:
        return all(struct.unpack_from(f"{self.size}q", self._flags()))

    def _flags(self) -> ctypes.Array[ctypes.c_char]:
        return (ctypes.c_char * (_FLAG * self.size)).from_address(self.memory.address)


class Symmetric:
    """The symmetric buffers of a group on one host; made by all of its ranks in the same order."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._stretches: dict[int, _Stretch] = {}  # by their number, the same on all ranks
        self._made = 0
        # Of this rank's parts, by address: where they begin, end, and their numbers. Never changed but replaced, since
        # another thread may be looking.
        self._parts: tuple[list[int], list[int], list[int]] = [], [], []

    def add(self, memory: Memory, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """This rank's part as a tensor; ``memory`` has ``space`` bytes."""
        count = math.prod(shape)
        stretch = _Stretch(memory, self._rank, self._size, _span(count * dtype.itemsize))
        self._stretches[self._made] = stretch
        self._made += 1
        self._sort()
        part = (ctypes.c_char * max(count * dtype.itemsize, 1)).from_address(stretch.begin)
        end = weakref.finalize(part, stretch.drop)
        end.atexit = False
        if not count:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        return torch.frombuffer(part, dtype=dtype, count=count).view(tuple(shape))

    def sweep(self) -> None:
        """Let go of what no rank uses any more."""
        self._stretches = {number: each for number, each in self._stretches.items() if not each.dropped()}
        self._sort()

    def _sort(self) -> None:
        parts = sorted((stretch.begin, stretch.end, number) for number, stretch in self._stretches.items())
        self._parts = [begin for begin, _, _ in parts], [end for _, end, _ in parts], [number for *_, number in parts]

    def place(self, address: int) -> tuple[int, int]:
        """The number of the buffer that this address of this rank is in, and how far into it; -1 for none."""
        begins, ends, numbers = self._parts
        if not begins:
            return _NOWHERE
        i = bisect_right(begins, address) - 1
        return (numbers[i], address - begins[i]) if i >= 0 and address < ends[i] else _NOWHERE

    def address(self, rank: int, number: int, offset: int) -> int:
        """Where that is of another rank's, as this process maps it."""
        stretch = self._stretches[number]
        return stretch.parts + rank * stretch.span + offset


def space(size: int, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes for the parts of all ranks."""
    return header(size) + size * _span(math.prod(shape) * dtype.itemsize)


def header(size: int) -> int:
    return -(-_FLAG * size // 4096) * 4096


def _span(nbytes: int) -> int:
    return max(-(-nbytes // 4096), 1) * 4096
