"""Reduce operations, and which dtypes each of them has a meaning for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch

from commlayer.errors import UnsupportedOperation

BITWISE = frozenset({"band", "bor", "bxor"})
ORDERED = frozenset({"min", "max"})


NAMES = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor", "premul_sum")


@dataclass(frozen=True)
class ReduceOp:
    """How values of several ranks become one.

    ``name`` is the row of the capability table; ``factor`` belongs to ``premul_sum`` alone.
    """

    name: str
    factor: float | torch.Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"op: expected one of {', '.join(NAMES)}, got {self.name!r}")
        if (self.factor is None) == (self.name == "premul_sum"):
            raise ValueError(f"op: a factor belongs to premul_sum, and to it alone; got {self.name} and {self.factor}")

    def __repr__(self) -> str:
        return self.name.upper() if self.factor is None else f"premul_sum({self.factor})"


SUM = ReduceOp("sum")
AVG = ReduceOp("avg")
PRODUCT = ReduceOp("product")
MIN = ReduceOp("min")
MAX = ReduceOp("max")
BAND = ReduceOp("band")
BOR = ReduceOp("bor")
BXOR = ReduceOp("bxor")

BY_NAME = {op.name: op for op in (SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR)}

# Those whose adjoint is a collective of the same kind (the result is linear in the input).
LINEAR = frozenset({"sum", "avg", "premul_sum"})


def premul_sum(factor: float | torch.Tensor) -> ReduceOp:
    """SUM of ``factor * x``; each rank may bring its own factor (a real number, or a tensor of one).

    Follows NCCL's ``ncclRedOpCreatePreMulSum``, except that the caller's tensor is never scaled in place.
    """
    if isinstance(factor, torch.Tensor):
        if factor.numel() != 1:
            raise ValueError(f"premul_sum: factor must have one element, got shape {tuple(factor.shape)}")
        if factor.is_complex() or factor.dtype == torch.bool:
            raise TypeError(f"premul_sum: factor must be real, got {factor.dtype}")
        if factor.requires_grad:
            raise UnsupportedOperation(
                "premul_sum: no gradient flows to a factor, and this one requires it; reduce factor * x instead"
            )
        factor = factor.detach().clone().reshape(())  # as it is now, whatever becomes of the caller's
    elif isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise TypeError(f"premul_sum: factor must be a number or a one-element tensor, got {factor!r}")
    return ReduceOp("premul_sum", factor)


def as_reduce_op(op: ReduceOp | str) -> ReduceOp:
    """Accept ``SUM`` as well as ``"sum"``."""
    if isinstance(op, ReduceOp):
        return op
    if isinstance(op, str) and op.lower() in BY_NAME:
        return BY_NAME[op.lower()]
    raise ValueError(f"op: expected one of {', '.join(BY_NAME)} or premul_sum(factor), got {op!r}")


@cache  # asked in every call
def meaningless(op: str, dtype: torch.dtype) -> str | None:
    """Why ``op`` has no meaning on ``dtype``; None where it has one."""
    if op in ("sum", "product") and not is_fp8(dtype):
        return None
    if is_fp8(dtype):
        return "8-bit floats can be moved but not reduced; convert to float32 or bfloat16 first"
    if op in BITWISE:
        if dtype.is_floating_point or dtype.is_complex:
            return "bitwise operations need an integer or bool tensor"
    elif op == "avg":
        if not (dtype.is_floating_point or dtype.is_complex):
            return "the mean of integers is not an integer; convert to a floating dtype first"
    elif op == "premul_sum":
        if not (dtype.is_floating_point or dtype.is_complex):
            return "a factor needs a floating or complex tensor"
    elif op in ORDERED and dtype.is_complex:
        return "complex numbers have no order"
    return None


def is_fp8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1
