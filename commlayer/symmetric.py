"""Symmetric buffers: tensors that the ranks of one host can read and write in each other's memory."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence

import torch

from commlayer.capability import NAME_OF
from commlayer.group import Group
from commlayer.runtime import resolve
from commlayer.work import Work

MOST = 1 << 44  # elements


def empty_symmetric(
    shape: int | Sequence[int], dtype: torch.dtype = torch.float32, group: Group | None = None
) -> torch.Tensor:
    """A tensor of this shape on each rank, uninitialised, in memory that the ranks of a host share.

    Collectives of this very group then read and write it where it is, and so do those of contiguous parts of it; that
    is two to three times as fast as between ordinary tensors. Give the same shape and dtype on every rank, which
    all call this. Where ranks share no memory (on several hosts, on GPUs, under COMMLAYER_SHM=0) it is an ordinary
    tensor on the group's device. Its memory is given back by the next call of this once no rank uses its part any
    more, and with the group. A forked process that writes to it writes to its parent's.

    Raises ValueError, TypeError; CollectiveMismatch where ranks ask for different sizes.
    """
    g = resolve(group)
    sizes = _checked(shape)
    if dtype not in NAME_OF:
        raise TypeError(f"dtype: expected a torch.dtype that can be communicated, got {dtype!r}")
    if g.rank < 0:
        raise ValueError(f"group: this process is not a member of the group of ranks {list(g.ranks)}")
    shared = g.shared
    if shared is None:
        return torch.empty(sizes, dtype=dtype, device=g.device)
    call = g.watch.begin("empty_symmetric", details=(None, None, [*sizes]))
    made = call.run(lambda: (shared.empty_symmetric(sizes, dtype), Work()))
    if isinstance(made, torch.Tensor):
        return made
    warnings.warn(f"empty_symmetric: an ordinary tensor instead ({made})", RuntimeWarning, stacklevel=2)
    return torch.empty(sizes, dtype=dtype, device=g.device)


def _checked(shape: int | Sequence[int]) -> tuple[int, ...]:
    values = (shape,) if hasattr(shape, "__index__") else shape
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"shape: expected ints, got {shape!r}")
    try:
        sizes = tuple(operator.index(value) for value in values)
    except TypeError:
        raise TypeError(f"shape: expected ints, got {shape!r}") from None
    if any(size < 0 for size in sizes) or math.prod(sizes) >= MOST:
        raise ValueError(f"shape: expected sizes of 0 or more, and fewer than 2**44 elements, got {sizes}")
    return sizes
