"""Reductions over what lies at addresses: by the compiled kernel where it has them, else by torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from commlayer.arithmetic import combine
from commlayer.backends.shared import kernel

# (to each of these addresses, from these in this order, bytes)
Sum = Callable[[Sequence[int], Sequence[int], int], None]

BLOCK = 1 << 18  # bytes that torch reduces at a time, so that what is between stays in the cache


def reducer(library: Any | None, op: str, dtype: torch.dtype) -> Sum:
    """How to reduce this dtype: the same bits in the same order, whichever way."""
    if dtype.is_complex and op in ("sum", "avg") and dtype != torch.complex32:
        dtype = dtype.to_real()  # pairs of it
    kind = kernel.kind(library, op, dtype)
    if kind is None:
        return partial(_by_torch, op, dtype)
    assert library is not None
    add_up, itemsize = library.add_up, dtype.itemsize
    mean = op == "avg"

    def compiled(to: Sequence[int], source: Sequence[int], size: int) -> None:
        tos, froms = len(to), len(source)
        targets, sources = _pointers(tos)(*to), _pointers(froms)(*source)
        add_up(targets, tos, sources, froms, size // itemsize, kind, float(froms) if mean else 1.0)

    return compiled


@cache
def _pointers(count: int) -> type[ctypes.Array[ctypes.c_void_p]]:
    return ctypes.c_void_p * count


@torch.no_grad()
def _by_torch(op: str, dtype: torch.dtype, to: Sequence[int], source: Sequence[int], size: int) -> None:
    for start in range(0, size, BLOCK):
        here = min(BLOCK, size - start)
        total = combine([_tensor(address + start, here, dtype) for address in source], op)
        for address in to:
            _tensor(address + start, here, dtype).copy_(total)


def _tensor(address: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
