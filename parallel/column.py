"""x Wᵀ + b where each rank has some rows of W: the multiplication of column-parallel layers, and its gradient.

x is whole on every rank, or each has a part that is gathered first. In backward the ranks communicate while they
multiply: a part of x is gathered once more, beside the product that is the input's gradient, and that gradient is
summed over the ranks beside the product that is the weight's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

import commlayer
from commlayer import Group
from parallel import operators
from parallel.amp import as_autocast
from parallel.mappings import all_gather_from_region, copy_to_region, reduce_from_region, reduce_scatter_to_region


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, dim: int = 0, sizes: Sequence[int] | None = None
) -> Tensor:
    """x Wᵀ + b; with ``sizes``, of the ranks' x of these extents concatenated along ``dim``.

    Under autocast it computes in the same dtype as F.linear. What is kept for backward is x as it was given.
    """
    x, weight, bias = as_autocast(x, weight, bias)
    result: Tensor = _Column.apply(x, weight, bias, group, dim % x.ndim, None if sizes is None else tuple(sizes))
    return result


class _Column(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, dim: int, sizes: tuple[int, ...] | None
    ) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        x_wanted, weight_wanted, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if weight_wanted else None, weight if x_wanted else None)
        full = x if sizes is None else operators.all_gather(x, dim, sizes, group)
        return F.linear(full, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if torch.compiler.is_compiling():
            found = iter(_in_graph(grad, x, weight, wanted[2], ctx.dim, ctx.sizes, ctx.group.handle))
        else:
            found = iter(_gradients(grad, x, weight, wanted[2], ctx.dim, ctx.sizes, ctx.group))
        return *(next(found) if each else None for each in wanted), None, None, None


def _gradients(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    dim: int,
    sizes: Sequence[int] | None,
    group: Group,
) -> list[Tensor]:
    """The gradients of x if there is a weight, of the weight if there is an x, and of the bias if asked for."""
    gathered = None if x is None else _start_gathering(x, dim, sizes, group)
    reduced = None if weight is None else _start_reducing(grad @ weight, dim, sizes, group)
    rows = _rows(grad)
    found = []
    if gathered is not None:
        found.append(rows.t() @ _rows(gathered()))
    if bias:
        found.append(rows.sum(0))
    return found if reduced is None else [reduced(), *found]


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def _start_gathering(x: Tensor, dim: int, sizes: Sequence[int] | None, group: Group) -> Callable[[], Tensor]:
    """Start what forward did to x; what is returned waits for it."""
    if torch.is_grad_enabled():  # a second derivative is wanted, which the mappings have
        full = copy_to_region(x, group) if sizes is None else all_gather_from_region(x, dim, group, sizes)
        return lambda: full
    if sizes is None:
        return lambda: x
    wait: Callable[[], Tensor] = commlayer.all_gather(x, dim=dim, sizes=sizes, group=group, async_op=True).wait
    return wait


def _start_reducing(grad: Tensor, dim: int, sizes: Sequence[int] | None, group: Group) -> Callable[[], Tensor]:
    """Start to sum the gradients of x, and cut them if x was gathered; what is returned waits for it."""
    wait: Callable[[], Tensor]
    if torch.is_grad_enabled():
        total = reduce_from_region(grad, group) if sizes is None else reduce_scatter_to_region(grad, dim, group, sizes)
        return lambda: total
    if sizes is None:
        wait = commlayer.all_reduce(grad, group=group, out=grad, async_op=True).wait
    else:
        wait = commlayer.reduce_scatter(grad, dim=dim, sizes=sizes, group=group, async_op=True).wait
    return wait


# In graphs, as one operator, so that the overlap is not lost ------------------------------------------------------


def _real(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    dim: int,
    sizes: Sequence[int] | None,
    group: int,
) -> list[Tensor]:
    with torch.no_grad():
        return [g.contiguous() for g in _gradients(grad, x, weight, bias, dim, sizes, Group.of(group))]


def _fake(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    dim: int,
    sizes: Sequence[int] | None,
    group: int,
) -> list[Tensor]:
    found = []
    if weight is not None:
        shape = [*grad.shape[:-1], weight.shape[1]]
        if sizes is not None:
            shape[dim] = sizes[Group.of(group).rank]
        found.append(grad.new_empty(shape))
    if x is not None:
        found.append(grad.new_empty(grad.shape[-1], x.shape[-1]))
    if bias:
        found.append(grad.new_empty(grad.shape[-1]))
    return found


_in_graph = operators.operator("column_gradients", _fake, _real)
