"""Reductions over rows in one process: what every backend's answer is measured against.

MIN and MAX of floats follow IEEE 754-2019 ``minimum`` and ``maximum``: NaN wins, and -0 < +0. Half types
accumulate in float32. Integers wrap. On bool, SUM and MAX are OR, PRODUCT and MIN are AND.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from commlayer.reduce_op import ReduceOp

HALF = frozenset({torch.float16, torch.bfloat16})

# Integers of the same width, for moving bits and for ordering floats.
SIGNED_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def premultiplied(x: torch.Tensor, op: ReduceOp) -> torch.Tensor:
    """``factor * x`` in the dtype of ``x``, leaving ``x`` alone."""
    factor = op.factor
    assert factor is not None
    if isinstance(factor, torch.Tensor):
        factor = factor.reshape(()).to(device=x.device)
    if x.dtype in HALF:
        return (x.float() * factor).to(x.dtype)
    if x.dtype == torch.complex32:
        return (x.to(torch.complex64) * factor).to(x.dtype)
    return (x * factor).to(x.dtype)


def order_keys(x: torch.Tensor, op: str) -> torch.Tensor:
    """Signed integers that sort as the floats of ``x`` do under IEEE 754-2019 minimum or maximum.

    A float's bits, read as a signed integer, already sort correctly where they are positive; below
    zero they sort backwards, so all bits but the sign are flipped there. NaN becomes the extreme key.
    """
    keys = x.view(SIGNED_OF_WIDTH[x.dtype.itemsize])
    info = torch.iinfo(keys.dtype)
    keys = torch.where(keys < 0, keys ^ info.max, keys)
    return keys.masked_fill_(x.isnan(), info.max if op == "max" else info.min)


def from_order_keys(keys: torch.Tensor, dtype: torch.dtype, op: str) -> torch.Tensor:
    """The floats whose keys these are; the inverse of ``order_keys``."""
    info = torch.iinfo(keys.dtype)
    nan = keys == (info.max if op == "max" else info.min)
    values = torch.where(keys < 0, keys ^ info.max, keys).view(dtype)
    return values.masked_fill_(nan, float("nan"))


def combine(rows: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """Reduce equal-shaped tensors in the order given; ``premul_sum`` expects rows already scaled."""
    dtype = rows[0].dtype
    if dtype.is_complex and op != "product":
        # As pairs of reals: complex addition of infinities makes NaN of finite parts.
        return torch.view_as_complex(combine([torch.view_as_real(row) for row in rows], op))
    if op == "avg":
        return _mean(rows, dtype)
    if op == "premul_sum":
        op = "sum"
    if dtype == torch.bool:
        return functools.reduce(_BOOL[op], rows)
    if dtype in UNSIGNED:
        return _combine_unsigned(rows, op)
    if op in ("min", "max") and dtype.is_floating_point:
        keys = [order_keys(row, op) for row in rows]
        return from_order_keys(functools.reduce(_PLAIN[op], keys), dtype, op)
    wide = _wide(dtype)
    if wide is not None:
        return functools.reduce(_PLAIN[op], [row.to(wide) for row in rows]).to(dtype)
    return functools.reduce(_PLAIN[op], rows)


def _mean(rows: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    wide = _wide(dtype)
    if wide is None:
        return functools.reduce(torch.add, rows) / len(rows)
    # Divided first: the sum of bfloat16's largest values overflows even in float32.
    return functools.reduce(torch.add, [row.to(wide) / len(rows) for row in rows]).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    if dtype in HALF:
        return torch.float32
    return torch.complex64 if dtype == torch.complex32 else None


def _combine_unsigned(rows: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    # torch has no arithmetic on these, but two's complement has: only the order differs, by the sign bit.
    signed = UNSIGNED[rows[0].dtype]
    flip = torch.iinfo(signed).min if op in ("min", "max") else 0
    result = functools.reduce(_PLAIN[op], [row.view(signed) ^ flip for row in rows])
    return (result ^ flip).view(rows[0].dtype)


_PLAIN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}
_BOOL: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.logical_or,
    "max": torch.logical_or,
    "bor": torch.logical_or,
    "product": torch.logical_and,
    "min": torch.logical_and,
    "band": torch.logical_and,
    "bxor": torch.logical_xor,
}
