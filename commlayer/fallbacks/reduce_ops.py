"""Reduce ops made from others: AVG, premul_sum, and MIN and MAX of floats."""

from __future__ import annotations

from typing import Any

import torch

from commlayer.arithmetic import HALF, SIGNED_OF_WIDTH, from_order_keys, order_keys, premultiplied
from commlayer.backends.base import Collectives
from commlayer.capability import REDUCING, Request
from commlayer.fallbacks.registry import Use, fallback
from commlayer.reduce_op import ORDERED, SUM
from commlayer.work import Work

# Where the mean or a scaled value would be rounded, or overflow, before it is summed: these go through
# float32 instead (see dtypes.py).
NARROW = HALF | {torch.complex32}


def _as_sum(reduce: str) -> Any:
    def needs(request: Request, size: int) -> list[Use] | None:
        if request.reduce != reduce or request.dtype in NARROW:
            return None
        return [Use(request._replace(reduce="sum"))]

    return needs


@fallback(*REDUCING, needs=_as_sum("avg"), passes=1)
def sum_and_divide(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """A SUM, divided by the number of ranks."""
    out, x, _, *rest = args
    work = getattr(g, op)(out, x, SUM, *rest)
    return work if out is None else work.then(lambda: out.div_(g.size))


@fallback(*REDUCING, needs=_as_sum("premul_sum"), passes=1)
def scale_and_sum(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """The factor applied out of place, then a SUM."""
    out, x, reduce_op, *rest = args
    return getattr(g, op)(out, premultiplied(x, reduce_op), SUM, *rest)


def _keys(request: Request, size: int) -> list[Use] | None:
    if request.reduce not in ORDERED or not request.dtype.is_floating_point:
        return None
    return [Use(request._replace(dtype=SIGNED_OF_WIDTH[request.dtype.itemsize]))]


@fallback(*REDUCING, needs=_keys, passes=4)
def order_preserving_integers(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """MIN or MAX of integers that sort as the floats do, so that NaN propagates and -0 < +0 (IEEE 754-2019)."""
    out, x, reduce_op, *rest = args
    keys = order_keys(x, reduce_op.name)
    result = None if out is None else keys.new_empty(out.numel())
    work = getattr(g, op)(result, keys, reduce_op, *rest)
    if out is None or result is None:
        return work
    return work.then(lambda: out.copy_(from_order_keys(result, out.dtype, reduce_op.name)))
