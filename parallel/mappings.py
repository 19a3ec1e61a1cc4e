"""The seven mappings: what happens to a value, and to its gradient, between regions of a model.

After Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053; with sequence parallelism Korthikanti et al. 2022,
arXiv:2205.05198) and Ulysses (Jacobs et al. 2023, arXiv:2309.14509). On the ranks of a group a value is **R**
replicated, **S** sharded along a dim, **P** partial sums, or **I** replicated with a gradient that is complete on
every rank already.

=========================  =====================  ================  =======================================
function                   forward                backward          where
=========================  =====================  ================  =======================================
copy_to_region             I → R, identity        all_reduce        into a column-parallel layer
reduce_from_region         P → I, all_reduce      identity          out of a row-parallel layer
scatter_to_region          I → S, slice           all_gather        into sequence parallelism
gather_from_region         S → I, all_gather      slice             consumers do the same work on all ranks
all_gather_from_region     S → R, all_gather      reduce_scatter    consumers do different work
reduce_scatter_to_region   P → S, reduce_scatter  all_gather        row-parallel + sequence-parallel
all_to_all_region          S → S                  the inverse       Ulysses, experts
=========================  =====================  ================  =======================================

``sizes`` are the extents of ``dim`` on each rank. What is cut is by default cut into balanced parts ([3, 3, 2, 2] of
10 over 4); what is gathered is by default of the same extent on every rank. Each backward is again a mapping, so
second derivatives work too. All of them run inside ``torch.compile(fullgraph=True)``, and cost nothing on a group of
one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from commlayer import Group, balanced_sizes
from parallel import operators


def copy_to_region(x: Tensor, group: Group) -> Tensor:
    """``x`` as it is; its gradient is summed over the group."""
    return x if group.size == 1 else _Copy.apply(x, group)


def reduce_from_region(x: Tensor, group: Group) -> Tensor:
    """The sum of ``x`` over the group; the gradient passes as it is."""
    return x if group.size == 1 else _Reduce.apply(x, group)


def scatter_to_region(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's part of ``x`` along ``dim``; the gradients of the parts are gathered."""
    dim, sizes = _cut(x, dim, group, sizes)
    return x if group.size == 1 else _Scatter.apply(x, dim, sizes, group)


def gather_from_region(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """All parts along ``dim``, for consumers that do the same on every rank: each takes its part of the gradient."""
    dim, sizes = _parts(x, dim, group, sizes)
    return x if group.size == 1 else _Gather.apply(x, dim, sizes, group)


def all_gather_from_region(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """All parts along ``dim``, for consumers that differ between ranks: their gradients are summed, and cut."""
    dim, sizes = _parts(x, dim, group, sizes)
    return x if group.size == 1 else _AllGather.apply(x, dim, sizes, group)


def reduce_scatter_to_region(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's part, along ``dim``, of the sum of ``x`` over the group; the gradients of the parts are gathered."""
    dim, sizes = _cut(x, dim, group, sizes)
    return x if group.size == 1 else _ReduceScatter.apply(x, dim, sizes, group)


def all_to_all_region(
    x: Tensor,
    scatter_dim: int,
    gather_dim: int,
    group: Group,
    scatter_sizes: Sequence[int] | None = None,
    gather_sizes: Sequence[int] | None = None,
) -> Tensor:
    """From sharded along ``gather_dim`` to sharded along ``scatter_dim``: rank r gets part r of every rank."""
    scatter_dim, scatter_sizes = _cut(x, scatter_dim, group, scatter_sizes, "scatter_")
    gather_dim, gather_sizes = _parts(x, gather_dim, group, gather_sizes, "gather_")
    if scatter_dim == gather_dim:
        raise ValueError(f"gather_dim: must differ from scatter_dim, both are {gather_dim}")
    return x if group.size == 1 else _AllToAll.apply(x, scatter_dim, gather_dim, scatter_sizes, gather_sizes, group)


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return reduce_from_region(grad, ctx.group), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return operators.all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return copy_to_region(grad, ctx.group), None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: tuple[int, ...], group: Group) -> Tensor:
        ctx.dim, ctx.sizes, ctx.group = dim, sizes, group
        # A copy: a view would keep the whole of x alive, which is what sharding is to spare.
        return x.narrow(dim, sum(sizes[: group.rank]), sizes[group.rank]).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return gather_from_region(grad, ctx.dim, ctx.group, ctx.sizes), None, None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: tuple[int, ...], group: Group) -> Tensor:
        ctx.dim, ctx.sizes, ctx.group = dim, sizes, group
        return operators.all_gather(x, dim, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return scatter_to_region(grad, ctx.dim, ctx.group, ctx.sizes), None, None, None


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: tuple[int, ...], group: Group) -> Tensor:
        ctx.dim, ctx.sizes, ctx.group = dim, sizes, group
        return operators.all_gather(x, dim, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return reduce_scatter_to_region(grad, ctx.dim, ctx.group, ctx.sizes), None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: tuple[int, ...], group: Group) -> Tensor:
        ctx.dim, ctx.sizes, ctx.group = dim, sizes, group
        return operators.reduce_scatter(x, dim, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return all_gather_from_region(grad, ctx.dim, ctx.group, ctx.sizes), None, None, None


class _AllToAll(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scatter_dim: int,
        gather_dim: int,
        scatter_sizes: tuple[int, ...],
        gather_sizes: tuple[int, ...],
        group: Group,
    ) -> Tensor:
        ctx.back = (gather_dim, scatter_dim, group, gather_sizes, scatter_sizes)
        return operators.all_to_all(x, scatter_dim, gather_dim, scatter_sizes, gather_sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return all_to_all_region(grad, *ctx.back), None, None, None, None, None


def _cut(
    x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None, prefix: str = ""
) -> tuple[int, tuple[int, ...]]:
    """The dim counted from the front, and the extents that it is cut into."""
    dim = _from_front(x, dim, prefix)
    found = tuple(balanced_sizes(x.shape[dim], group.size) if sizes is None else sizes)
    if len(found) != group.size or sum(found) != x.shape[dim]:
        raise ValueError(
            f"{prefix}sizes: {list(found)} for {group.size} ranks; they must add up to the {x.shape[dim]} of dim {dim} "
            f"of x (shape {tuple(x.shape)})"
        )
    return dim, found


def _parts(
    x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None, prefix: str = ""
) -> tuple[int, tuple[int, ...]]:
    """The dim counted from the front, and the extents of all ranks' parts."""
    dim = _from_front(x, dim, prefix)
    found = tuple([x.shape[dim]] * group.size if sizes is None else sizes)
    if len(found) != group.size or found[group.rank] != x.shape[dim]:
        raise ValueError(
            f"{prefix}sizes: {list(found)} for {group.size} ranks; rank {group.rank} has {x.shape[dim]} along dim "
            f"{dim} of x (shape {tuple(x.shape)})"
        )
    return dim, found


def _from_front(x: Tensor, dim: int, prefix: str = "") -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{prefix}dim: x of shape {tuple(x.shape)} has no dim {dim}")
    return dim % x.ndim
