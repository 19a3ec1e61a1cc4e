"""The collectives of the mappings as plain functions of tensors, also inside ``torch.compile(fullgraph=True)``.

A graph cannot hold a Group, so there each function becomes a custom operator (``torch.library``) that takes the
group's handle, with a fake kernel that knows the shape of the result; elsewhere the layer is called directly. They
carry no gradients: what the gradient is depends on who consumes the result, and is the mappings' affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import commlayer
from commlayer import Group
from parallel.notes import kept

MADE: list[Any] = []  # all operators of the parallel modules, as they stand in graphs


def operator(name: str, fake: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """``real`` as ``torch.ops.commlayer.<name>``; ``fake`` makes empty results of the right shapes from the same."""
    made = torch.library.custom_op(f"commlayer::{name}", real, mutates_args=())
    made.register_fake(fake)
    if hasattr(made, "register_effect"):  # not in torch 2.8
        from torch._library.effects import EffectType

        # Compilers reorder what is independent, by sizes that may differ between ranks: collectives would meet others.
        made.register_effect(EffectType.ORDERED)
    MADE.append(made._opoverload)
    return made


def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """``x`` reduced over the group by ``op``, one of sum, avg, max, min."""
    if torch.compiler.is_compiling():
        return _all_reduce(x, op, group.handle)
    return kept(lambda: _all_reduce_real(x, op, group.handle))


def all_gather(x: Tensor, dim: int, sizes: Sequence[int], group: Group) -> Tensor:
    """Every rank's part, of extents ``sizes``, concatenated along ``dim``."""
    if torch.compiler.is_compiling():
        return _all_gather(x, dim, sizes, group.handle)
    return kept(lambda: _all_gather_real(x, dim, sizes, group.handle))


def reduce_scatter(x: Tensor, dim: int, sizes: Sequence[int], group: Group) -> Tensor:
    """This rank's part, of extents ``sizes`` along ``dim``, of the sum over the group."""
    if torch.compiler.is_compiling():
        return _reduce_scatter(x, dim, sizes, group.handle)
    return kept(lambda: _reduce_scatter_real(x, dim, sizes, group.handle))


def all_to_all(
    x: Tensor, scatter_dim: int, gather_dim: int, scatter: Sequence[int], gather: Sequence[int], group: Group
) -> Tensor:
    """Cut ``scatter_dim`` into the extents ``scatter``, one for each rank, and put what arrives together along
    ``gather_dim``, of which rank r holds ``gather[r]``."""
    if torch.compiler.is_compiling():
        return _all_to_all(x, scatter_dim, gather_dim, scatter, gather, group.handle)
    return kept(lambda: _all_to_all_real(x, scatter_dim, gather_dim, scatter, gather, group.handle))


def _all_reduce_real(x: Tensor, op: str, group: int) -> Tensor:
    result: Tensor = commlayer.all_reduce(x, op, group=Group.of(group))
    return result


def _all_gather_real(x: Tensor, dim: int, sizes: Sequence[int], group: int) -> Tensor:
    result: Tensor = commlayer.all_gather(x, dim=dim, sizes=sizes, group=Group.of(group))
    return result.contiguous()


def _reduce_scatter_real(x: Tensor, dim: int, sizes: Sequence[int], group: int) -> Tensor:
    result: Tensor = commlayer.reduce_scatter(x, dim=dim, sizes=sizes, group=Group.of(group))
    return result.contiguous()


def _all_to_all_real(
    x: Tensor, scatter_dim: int, gather_dim: int, scatter: Sequence[int], gather: Sequence[int], group: int
) -> Tensor:
    parts = [part.reshape(-1) for part in x.split(list(scatter), scatter_dim)]
    mine = scatter[Group.of(group).rank]
    shapes = [_replaced(x.shape, {scatter_dim: mine, gather_dim: extent}) for extent in gather]
    counts = [math.prod(shape) for shape in shapes]
    even = len(set(scatter)) == len(set(gather)) == 1
    arrived = commlayer.all_to_all(
        torch.cat(parts),
        input_splits=None if even else [part.numel() for part in parts],
        output_splits=None if even else counts,
        group=Group.of(group),
    )
    return torch.cat([part.view(s) for part, s in zip(arrived.split(counts), shapes, strict=True)], gather_dim)


def _replaced(shape: Sequence[int], extents: dict[int, int]) -> list[int]:
    return [extents.get(dim, extent) for dim, extent in enumerate(shape)]


_all_reduce = operator("all_reduce", lambda x, op, group: x.new_empty(x.shape), _all_reduce_real)
_all_gather = operator(
    "all_gather",
    lambda x, dim, sizes, group: x.new_empty(_replaced(x.shape, {dim: sum(sizes)})),
    _all_gather_real,
)
_reduce_scatter = operator(
    "reduce_scatter",
    lambda x, dim, sizes, group: x.new_empty(_replaced(x.shape, {dim: sizes[Group.of(group).rank]})),
    _reduce_scatter_real,
)
_all_to_all = operator(
    "all_to_all",
    lambda x, scatter_dim, gather_dim, scatter, gather, group: x.new_empty(
        _replaced(x.shape, {scatter_dim: scatter[Group.of(group).rank], gather_dim: sum(gather)})
    ),
    _all_to_all_real,
)
