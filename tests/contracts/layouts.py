"""Tensors of every layout, each within a larger piece of memory whose other bytes must never change.

They are made on torch's default device: ``with torch.device(group.device):`` puts them on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tests.contracts.oracle import COMPLEX, DTYPES, itemsize

PLAIN, OFFSET, TRANSPOSED, SLICED, REVERSED = "plain", "offset", "transposed", "sliced", "steps"
EXPANDED, CONJ, NEG = "expanded", "conj", "neg"
WRITABLE = (PLAIN, OFFSET, TRANSPOSED, SLICED, REVERSED)
GUARD = 3  # elements on either side


def place(shape: tuple[int, ...], layout: str) -> tuple[tuple[int, ...], int, int]:
    """Strides, offset and elements of the memory in which a tensor of this layout lies."""
    extents = list(shape)
    order = list(range(len(shape)))  # slowest first
    steps = [1] * len(shape)
    lead = [0] * len(shape)
    guard = 0 if layout == PLAIN else GUARD
    if layout == TRANSPOSED:
        order.reverse()
    elif layout == SLICED:  # [1:-1] of every dim
        extents, lead = [extent + 2 for extent in shape], [1] * len(shape)
    elif layout == REVERSED:  # [1::2] of every dim, and the dims transposed
        extents, steps, lead = [2 * extent + 1 for extent in shape], [2] * len(shape), [1] * len(shape)
        order.reverse()
    elif layout == EXPANDED and shape:
        extents[0] = 1
    strides = [0] * len(shape)
    total = 1
    for dim in reversed(order):
        strides[dim] = total
        total *= max(extents[dim], 1)
    offset = guard + sum(step * stride for step, stride in zip(lead, strides, strict=True))
    if layout == EXPANDED and shape:
        strides[0] = 0
    return tuple(step * stride for step, stride in zip(steps, strides, strict=True)), offset, total + 2 * guard


@dataclass
class Placed:
    """A tensor within its memory, of which a copy was taken when it was filled."""

    tensor: torch.Tensor
    memory: torch.Tensor  # bytes
    before: np.ndarray
    index: np.ndarray  # where each element lies
    flipped: str  # "", "conj" or "neg"
    dtype: str

    def memory_now(self) -> np.ndarray:
        return self.memory.cpu().numpy().reshape(self.before.shape)

    def assert_untouched(self, what: str) -> None:
        """Neither the tensor nor anything around it has changed."""
        now = self.memory_now()
        if not np.array_equal(now, self.before):
            where = sorted(set(np.argwhere(now != self.before)[:, 0].tolist()))
            inside = set(self.index.reshape(-1).tolist())
            kind = "elements of it" if inside & set(where) else "memory beside it"
            raise AssertionError(f"{what} was changed: {kind}, at {where[:8]} of {len(now)} elements")

    def taken(self, what: str) -> np.ndarray:
        """The tensor's bytes; nothing outside it has changed."""
        now = self.memory_now()
        outside = np.ones(len(now), bool)
        outside[self.index.reshape(-1)] = False
        if not np.array_equal(now[outside], self.before[outside]):
            where = np.flatnonzero(outside & (now != self.before).any(1)).tolist()
            raise AssertionError(f"memory outside {what} was changed, at {where[:8]} of {len(now)} elements")
        return flipped(now[self.index], self.flipped, self.dtype)


def flipped(data: np.ndarray, how: str, dtype: str) -> np.ndarray:
    """Bytes with the sign of the imaginary part, or of everything, turned round."""
    data = data.copy()
    if how == CONJ:
        data[..., -1] ^= 0x80
    elif how == NEG:
        data[..., -1] ^= 0x80
        if dtype in COMPLEX:
            data[..., itemsize(dtype) // 2 - 1] ^= 0x80
    return data


def fits(layout: str, dtype: str, kind: str) -> bool:
    """Lazy conjugates and negatives exist for some dtypes, and keep the bits of NaN for none."""
    if layout == CONJ:
        return dtype in ("complex64", "complex128") and kind in ("values", "near_one")
    if layout == NEG:
        return dtype in ("float32", "float64") and kind in ("values", "near_one")
    return True


def put(data: np.ndarray, dtype: str, layout: str, seed: tuple[int, ...]) -> Placed:
    """A tensor with these bytes, in this layout."""
    shape = data.shape[:-1]
    how = layout if layout in (CONJ, NEG) else ""
    strides, offset, total = place(shape, OFFSET if how else layout)
    return _placed(data, dtype, strides, offset, total, how, seed)


def _placed(
    data: np.ndarray, dtype: str, strides: tuple[int, ...], offset: int, total: int, how: str, seed: tuple[int, ...]
) -> Placed:
    shape, size = data.shape[:-1], itemsize(dtype)
    rng = np.random.default_rng((*seed, 99))
    # Guards are small positive values of any dtype: a 1 in the lowest byte, so valid as bool too.
    memory = np.zeros((total, size), np.uint8)
    memory[:, 0] = rng.integers(0, 2, total)
    index = np.full(shape, offset, np.int64)
    for dim, stride in enumerate(strides):
        span = np.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        index = index + stride * span
    memory[index] = flipped(data, how, dtype)
    held = torch.asarray(memory.reshape(-1).copy())
    tensor = torch.as_strided(held.view(DTYPES[dtype]), shape, strides, offset)
    if how == CONJ:
        tensor = tensor.conj()
    elif how == NEG:
        tensor = torch._neg_view(tensor)
    return Placed(tensor, held, memory, index, how, dtype)


def overlapping(x: Placed, shape: tuple[int, ...], shift: int) -> tuple[Placed, Placed]:
    """``x`` anew, contiguous, and a destination that begins ``shift`` elements after it in the same memory."""
    data = x.taken("x")
    size = itemsize(x.dtype)
    count = int(np.prod(data.shape[:-1], dtype=np.int64))
    total = max(count, shift + int(np.prod(shape, dtype=np.int64))) + 2 * GUARD
    again = _placed(data, x.dtype, torch.empty(data.shape[:-1], device="meta").stride(), GUARD, total, "", (shift,))
    strides = torch.empty(shape, device="meta").stride()
    tensor = torch.as_strided(again.memory.view(DTYPES[x.dtype]), shape, strides, GUARD + shift)
    index = (GUARD + shift + np.arange(int(np.prod(shape, dtype=np.int64)))).reshape(shape)
    assert again.before.shape[1] == size
    return again, Placed(tensor, again.memory, again.before, index, "", x.dtype)


def to_bytes(x: torch.Tensor, dtype: str) -> np.ndarray:
    """Bytes of a tensor of any layout."""
    assert x.dtype == DTYPES[dtype], f"dtype {x.dtype}, expected {dtype}"
    plain = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    plain.copy_(x.detach())
    return plain.view(-1).view(torch.uint8).numpy().reshape(*x.shape, itemsize(dtype))
