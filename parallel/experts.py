"""The experts of one rank: as many MLPs, each for rows of its own.

Legend of shape suffixes:
    N rows, expert after expert, X experts of this rank, E embed, H hidden channels of this rank, F features of a
    product, I and O any features
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from commlayer import Group, Mesh, balanced_sizes
from parallel.amp import as_autocast
from parallel.derivatives import first_derivative
from parallel.notes import kept
from parallel.placement import initialise_each, mark_sharded, placement


class Experts(nn.Module):
    """MLPs without biases, this rank's part of them: ``experts`` are cut over ``ep``, the hidden channels over ``etp``.

    ``mesh`` is the folded one, by default one process. As in ``ParallelMLP``, the rows of ``up`` are pairs of gate and
    value where ``gated``.
    """

    def __init__(
        self,
        embed: int,
        hidden: int,
        experts: int,
        *,
        mesh: Mesh | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        gated: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        self.ep, self.etp = (Group.alone() if mesh is None else mesh[axis] for axis in ("ep", "etp"))
        self.experts, channels = balanced_sizes(experts, self.ep.size), balanced_sizes(hidden, self.etp.size)
        rows = [(1 + gated) * size for size in channels]
        # Of each parameter: the dim that is cut over etp, and its extents.
        self.cuts = {"up": (1, rows), "down": (2, channels)}
        mine, place = self.experts[self.ep.rank], self.etp.rank
        self.up = nn.Parameter(torch.empty(mine, rows[place], embed, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(mine, embed, channels[place], device=device, dtype=dtype))
        self._mark()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as nn.Linear would draw it."""
        for param in (self.up, self.down):
            initialise_each(param, _fill)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)
        self._mark()  # new parameters, where the module moved off the meta device
        return self

    def _mark(self) -> None:
        for name, (dim, sizes) in self.cuts.items():
            param = getattr(self, name)
            if not placement(param).shards:
                # Also over one rank: it tells experts from parameters whose gradients are reduced over dp.
                mark_sharded(param, 0, axis="ep", group=self.ep, sizes=self.experts)
                mark_sharded(param, dim, axis="etp", group=self.etp, sizes=sizes)

    def forward(self, x_NE: Tensor, rows: Sequence[int], ends: Tensor | None = None) -> Tensor:
        """``rows`` of each expert, and where they end, as in :func:`grouped_linear`.

        Returns N × E, over several ranks of etp partial sums.
        """
        hidden_NF = grouped_linear(x_NE, self.up, rows, ends)
        if self.gated:
            gate_NH, value_NH = hidden_NF.unflatten(-1, (self.down.shape[2], 2)).unbind(-1)
            hidden_NF = self.activation(gate_NH) * value_NH
        else:
            hidden_NF = self.activation(hidden_NF)
        return grouped_linear(hidden_NF, self.down, rows, ends)

    def extra_repr(self) -> str:
        return (
            f"{sum(self.experts)}, ep: {self.experts[self.ep.rank]} on rank {self.ep.rank}, etp: {self.down.shape[2]} "
            f"of {sum(self.cuts['down'][1])} channels on rank {self.etp.rank}"
        )


def _fill(weight_FE: Tensor) -> None:
    bound = 1 / math.sqrt(max(weight_FE.shape[1], 1))
    nn.init.uniform_(weight_FE, -bound, bound)


def grouped_linear(x_NE: Tensor, weight_XFE: Tensor, rows: Sequence[int], ends: Tensor | None = None) -> Tensor:
    """x Wᵀ with the weight of each expert for its ``rows``, which follow each other: N × F.

    By torch's grouped product, where it takes such tensors, else one product after the other. Every weight gets a
    gradient, zeros where there are no rows. ``ends``, the sums of rows up to each expert, int32 on the device of x,
    spare a GPU a copy from the host.
    """
    if len(rows) != len(weight_XFE) or sum(rows) != len(x_NE):
        raise ValueError(
            f"rows: {list(rows)} for {len(weight_XFE)} experts; they must add up to the {len(x_NE)} rows of x"
        )
    x_NE, weight_XFE = as_autocast(x_NE, weight_XFE)
    if ends is None:
        ends = torch.tensor([*accumulate(rows)], dtype=torch.int32, device=x_NE.device)
    result: Tensor = _GroupedLinear.apply(x_NE, weight_XFE, tuple(rows), ends)
    return result


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, weight_XFE: Tensor, rows: tuple[int, ...], ends_X: Tensor) -> Tensor:
        x_NE = x_NE.contiguous()
        ctx.save_for_backward(x_NE, weight_XFE, ends_X)
        ctx.rows = rows
        return kept(lambda: _products(x_NE, weight_XFE.transpose(1, 2), rows, ends_X))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Any, ...]:
        x_NE, weight_XFE, ends_X = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        x_wanted, weight_wanted, *_ = ctx.needs_input_grad
        grad_x = _products(grad_NF, weight_XFE, ctx.rows, ends_X) if x_wanted else None
        grad_weight = _outer_products(grad_NF, x_NE, ctx.rows, ends_X) if weight_wanted else None
        return grad_x, grad_weight, None, None


def _products(x_NI: Tensor, weight_XIO: Tensor, rows: tuple[int, ...], ends_X: Tensor) -> Tensor:
    """Each expert's rows times its matrix: N × O."""
    if _grouped(x_NI, weight_XIO):
        return torch._grouped_mm(x_NI, weight_XIO, offs=ends_X)
    out_NO = x_NI.new_empty(len(x_NI), weight_XIO.shape[2])
    for x, weight, out in zip(x_NI.split(rows), weight_XIO.unbind(), out_NO.split(rows), strict=True):
        torch.mm(x, weight, out=out)
    return out_NO


def _outer_products(x_NI: Tensor, y_NO: Tensor, rows: tuple[int, ...], ends_X: Tensor) -> Tensor:
    """xᵀ y of each expert's rows: X × I × O."""
    if _grouped(x_NI, y_NO):
        return torch._grouped_mm(x_NI.t(), y_NO, offs=ends_X)
    out_XIO = x_NI.new_empty(len(rows), x_NI.shape[1], y_NO.shape[1])
    for x, y, out in zip(x_NI.split(rows), y_NO.split(rows), out_XIO.unbind(), strict=True):
        torch.mm(x.t(), y, out=out)
    return out_XIO


def _grouped(x_NI: Tensor, y: Tensor) -> bool:
    """Whether torch multiplies this in one call: it wants steps of 16 bytes, and knows some dtypes and devices."""
    extents = (*x_NI.shape[1:], *y.shape[1:])
    fits = all(extent > 0 and extent * x_NI.itemsize % 16 == 0 for extent in extents)
    fits = fits and len(x_NI) > 0 and x_NI.data_ptr() % 16 == 0 == y.data_ptr() % 16
    return fits and _has_grouped_mm(x_NI.device, x_NI.dtype)


@cache
def _has_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    if not hasattr(torch, "_grouped_mm"):
        return False
    x, weight = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(1, 16, 16, device=device, dtype=dtype)
    ends = torch.tensor([16], dtype=torch.int32, device=device)
    try:
        torch._grouped_mm(x, weight, offs=ends)
        torch._grouped_mm(x.t(), x, offs=ends)
    except (RuntimeError, NotImplementedError):
        return False
    return True
