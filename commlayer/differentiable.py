"""The pattern of every public operation: start it, then wait or hand out a ``Work``; keep its adjoint.

Where the input requires grad, the result carries the exact adjoint, which is made of the public functions
and therefore differentiable in turn. ``requires_grad`` must be the same on every rank, since the adjoint
communicates too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch.autograd import forward_ad

from commlayer.errors import UnsupportedOperation
from commlayer.recorder import Operation
from commlayer.reduce_op import LINEAR, ReduceOp
from commlayer.work import Work

Tensor = torch.Tensor
Started = tuple[Tensor, Work]
Adjoint = Callable[[Tensor], Tensor]
T = TypeVar("T")


class _Collective(torch.autograd.Function):
    """Any operation with its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Callable[[Tensor], Started], adjoint: Adjoint, box: list[Work]) -> Tensor:
        ctx.adjoint = adjoint
        result, work = start(x)
        box.append(work)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.adjoint(grad), None, None, None


def launch(
    op: Operation,
    x: Tensor,
    async_op: bool,
    start: Callable[[Tensor], Started],
    adjoint: Adjoint | None,
) -> Any:
    """Run ``start`` on ``x`` and wait for it, unless ``async_op``; None for ``adjoint`` means there is none."""
    if x.requires_grad and torch.is_grad_enabled():
        assert adjoint is not None
        box: list[Work] = []
        return op.run(lambda: (_Collective.apply(x, start, adjoint, box), box[0]), async_op)
    return op.run(lambda: start(x), async_op)


def check_gradient(name: str, x: Tensor, out: Tensor | None, op: ReduceOp | None = None) -> None:
    """Refuse, before anything is communicated, what would lose a derivative."""
    if (forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None) or is_wrapped(x):
        raise UnsupportedOperation(
            f"{name}: no forward-mode derivative, and nothing under torch.func transforms (jvp, vmap, grad); "
            "use backward(), and communicate outside of the transform"
        )
    if x.requires_grad and torch.is_grad_enabled():
        if op is not None and op.name not in LINEAR:
            raise UnsupportedOperation(f"{name} {op} has no gradient, and x requires one; use x.detach() to go without")
        if out is not None:
            raise ValueError(f"{name}: out= carries no gradient, and x requires one; leave out= away or detach x")


def finished(result: T, work: Work, finish: Callable[[], object] | None) -> tuple[T, Work]:
    """A result, and the work that ends with ``finish``."""
    return result, work if finish is None else work.then(finish)


def shaped(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of which only shape and dtype count: one element, seen often."""
    return like.new_empty(1).expand(tuple(shape))
