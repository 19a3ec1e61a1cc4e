"""Arguments of a process group's methods: their many forms as one, and checks before anything is communicated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from commlayer.backends.torch_requests import plain
from commlayer.checks import PLAIN, check_reduce, check_tensor
from commlayer.group import Group
from commlayer.layout import flat
from commlayer.reduce_op import BY_NAME, ReduceOp, premul_sum

Tensor = torch.Tensor
_PREMUL_SUM = hash(dist.ReduceOp.PREMUL_SUM)  # the hash of a reduce op is the number of its kind


def own(x: Tensor, group: Group) -> Tensor:
    """A tensor with memory of its own: a functional collective's result, once it is there. TypeError for others."""
    if type(x) in PLAIN:
        return x
    from torch.distributed._functional_collectives import AsyncCollectiveTensor  # which imports much

    if isinstance(x, AsyncCollectiveTensor):
        return x.trigger_wait()
    check_tensor(x, group)
    return x


def listed(tensors: Any, group: Group) -> list[Tensor]:
    return [own(x, group) for x in ([tensors] if isinstance(tensors, torch.Tensor) else tensors)]


def lists(tensors: Any, group: Group) -> list[list[Tensor]]:
    nested = [tensors] if isinstance(tensors[0], torch.Tensor) else tensors
    return [listed(row, group) for row in nested]


def one(tensors: Any, group: Group) -> Tensor:
    """The tensor of a call that takes a list of one."""
    if type(tensors) is list and len(tensors) == 1:
        return own(tensors[0], group)
    found = listed(tensors, group)
    if len(found) != 1:
        raise ValueError(f"tensors: expected one, got {len(found)}")
    return found[0]


def as_it_lies(*tensors: Tensor) -> bool:
    """Whether the memory holds the values in their order, and nothing else is to be done to them."""
    for x in tensors:  # noqa: SIM110 - a microsecond less than all()
        if not x.is_contiguous() or x.is_neg() or x.is_conj():
            return False
    return True


def options_of(kind: Any, given: Any, timeout: Any = None, field: str = "") -> Any:
    """The options of a call; where it was called by values (a reduce op, a root), those as options."""
    if type(given) is kind:
        return given
    if given is not None and not field:
        return given
    options = kind()
    if given is not None:
        setattr(options, field, given)
    if timeout is not None:
        options.timeout = timeout
    return options


def reduce_op(reduce: Any, dtype: torch.dtype) -> ReduceOp:
    """The layer's reduce op; TypeError where it has no meaning for the dtype."""
    if hash(reduce) != _PREMUL_SUM:
        return _known(hash(reduce), dtype)
    op = premul_sum(reduce.__getstate__()[1])
    check_reduce(op, dtype)
    return op


@cache
def _known(number: int, dtype: torch.dtype) -> ReduceOp:
    op = BY_NAME[dist.ReduceOp.RedOpType(number).name.lower()]
    check_reduce(op, dtype)
    return op


def alike(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """In a row, where one is stacked of the other: gloo takes what is concatenated alone."""
    return (output, x) if output.dim() == x.dim() else (output.view(-1), x.view(-1))


def joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([flat(plain(part)) for part in parts])


def deal(buffer: Tensor, rows: Sequence[Tensor]) -> None:
    for row, values in zip(rows, buffer.split([row.numel() for row in rows]), strict=True):
        plain(row).copy_(values.view(row.shape))


def check_tensors(parts: Sequence[Tensor], group: Group) -> None:
    for part in parts:
        check_tensor(part, group, "tensor")


def check_pair(output: Tensor, x: Tensor, wanted: int, got: int, group: Group) -> None:
    if output.dtype != x.dtype:
        raise TypeError(f"output: expected dtype {x.dtype}, got {output.dtype}")
    if wanted != got:
        shapes = f"output of shape {tuple(output.shape)}, input of shape {tuple(x.shape)}"
        raise ValueError(f"{shapes}: one must be {group.size} times the other")


def check_list(parts: Sequence[Tensor], x: Tensor, group: Group, equal: bool = False) -> None:
    if len(parts) != group.size:
        raise ValueError(f"tensor list: expected one for each of {group.size} ranks, got {len(parts)}")
    for part in parts:
        if part.dtype != x.dtype:
            raise TypeError(f"tensor list: expected dtype {x.dtype}, got {part.dtype}")
        if equal and part.numel() != x.numel():
            raise ValueError(f"tensor list: expected {x.numel()} elements in each, got {part.numel()}")


def counts_of(name: str, x: Tensor, splits: list[int], group: Group) -> list[int]:
    """Elements for each rank, of sizes along the first dim."""
    size = group.size
    if not splits:
        if x.dim() and x.shape[0] % size:
            raise ValueError(f"{name}: dim 0 of shape {tuple(x.shape)} does not divide into {size} equal parts")
        return [x.numel() // size] * size
    extent = x.shape[0] if x.dim() else 1
    if len(splits) != size or sum(splits) != extent or min(splits) < 0:
        raise ValueError(
            f"{name}_split_sizes: expected {size} that add up to {extent}, the extent of dim 0 of {name}, got {splits}"
        )
    inner = x.numel() // extent if extent else 0
    return [split * inner for split in splits]
