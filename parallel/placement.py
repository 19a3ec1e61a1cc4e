"""Where a parameter lives on the mesh: cut along an axis, or whole on every rank of it with partial gradients.

What optimisers, clipping, checkpoints and data parallelism have to know about a parameter, and cannot see in its
numbers. Three kinds of parameter exist on an axis:

- *sharded* over it: each rank holds a part (:func:`mark_sharded`; the parallel layers do so themselves);
- *replicated, with sharded activations*: each rank holds all of it, but has seen only a part of the tokens, so that
  its gradient is a partial sum (:func:`mark_replicated`; norms under sequence or context parallelism);
- *replicated, with replicated activations*: every rank has the whole gradient already. Such are all others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

import commlayer
from commlayer import Group

Marked = TypeVar("Marked", nn.Parameter, nn.Module)


@dataclass(frozen=True)
class Shard:
    """One cut: dim ``dim``, into parts of these extents, over ``group``, which the mesh calls ``axis``."""

    axis: str
    group: Group
    dim: int
    sizes: tuple[int, ...]

    def narrow(self, full: Tensor) -> Tensor:
        """This rank's part of a tensor that is whole along ``dim``: a view."""
        return full.narrow(self.dim, sum(self.sizes[: self.group.rank]), self.sizes[self.group.rank])


@dataclass(frozen=True)
class Stretch:
    """The last cut of all, by ZeRO: a part of this ``shape``, flattened row by row, in stretches over ``group``.

    The rank ``r`` of the group has its elements ``bounds[r]`` to ``bounds[r + 1]`` as a vector, perhaps none.
    """

    group: Group
    shape: tuple[int, ...]
    bounds: tuple[int, ...]

    @property
    def start(self) -> int:
        return self.bounds[self.group.rank]

    @property
    def stop(self) -> int:
        return self.bounds[self.group.rank + 1]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in pairwise(self.bounds))


@dataclass(frozen=True)
class Placement:
    """``shards`` in the order in which they were cut; ``partial``: axes over which gradients are partial sums.

    ``stretch``: of what the shards left, this rank has only these elements.
    """

    shards: tuple[Shard, ...] = ()
    partial: tuple[str, ...] = ()
    stretch: Stretch | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """Those that it is cut over, of more than one rank."""
        cut = [shard.group for shard in self.shards] + ([self.stretch.group] if self.stretch else [])
        return tuple(group for group in cut if group.size > 1)


def placement(param: Tensor) -> Placement:
    """What was marked on ``param``; nothing means: the same on every rank, with the whole gradient."""
    found: Placement = getattr(param, "_placement", Placement())
    return found


def mark_sharded(param: nn.Parameter, dim: int, *, axis: str, group: Group, sizes: Sequence[int]) -> nn.Parameter:
    """Say that ``param`` is this rank's part along ``dim`` of a tensor cut into ``sizes`` over ``group``.

    Raises ValueError where ``sizes`` contradict the group or the parameter's shape.
    """
    if len(sizes) != group.size or sizes[group.rank] != param.shape[dim]:
        raise ValueError(
            f"sizes: {list(sizes)} for {group.size} ranks, but dim {dim} of the parameter has {param.shape[dim]} on "
            f"rank {group.rank}"
        )
    known = placement(param)
    if axis in known.partial or any(shard.axis == axis for shard in known.shards):
        raise ValueError(f"axis: the parameter is marked as {_words(known)} already, so it cannot be cut over {axis}")
    shard = Shard(axis, group, dim % param.ndim, tuple(sizes))
    _mark(param, replace(known, shards=(*known.shards, shard)))
    return param


def mark_replicated(what: Marked, axes: Sequence[str], *, recurse: bool = True) -> Marked:
    """Say that a parameter, or every one of a module, is whole on each rank along ``axes`` but sees only a part there.

    Its gradient then is a partial sum on each rank; ``DataParallel(model, mesh=mesh)`` adds it up over these axes,
    once, in the same reduction as over the data axis. Without a DataParallel nobody does.

    Marks add up. Of a module they last when its parameters are replaced, as where it leaves the meta device.
    ``recurse=False``: not those of its submodules. Raises ValueError for a parameter that is sharded over one of the
    axes.

    >>> mark_replicated(model.norm, axes=("cp",))
    """
    if isinstance(axes, str):
        raise TypeError(f"axes: expected a sequence of names such as ('cp',), got {axes!r}")
    if isinstance(what, nn.Module):
        for module in what.modules() if recurse else (what,):
            for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
                _add_partial(param, axes)
                module.__dict__.setdefault("_partial", {})[name] = placement(param).partial
    else:
        _add_partial(what, axes)
    return what


def mark_stretch(piece: nn.Parameter, param: Tensor, group: Group, bounds: Sequence[int]) -> nn.Parameter:
    """Say that ``piece`` is this rank's stretch of ``param``, which is cut at ``bounds`` over ``group``."""
    _mark(piece, replace(placement(param), stretch=Stretch(group, tuple(param.shape), tuple(bounds))))
    return piece


def copy_marks(param: nn.Parameter, like: Tensor) -> nn.Parameter:
    """Mark ``param`` as ``like`` is, which it replaces."""
    if (marks := placement(like)) != Placement():
        _mark(param, marks)
    return param


def recall_marks(module: nn.Module) -> None:
    """Mark the parameters that have replaced marked ones in the module."""
    for owner in module.modules():
        for name, axes in owner.__dict__.get("_partial", {}).items():
            if (param := owner._parameters.get(name)) is not None:
                _add_partial(param, axes)


def _add_partial(param: Tensor, axes: Sequence[str]) -> None:
    known = placement(param)
    if cut := {shard.axis for shard in known.shards} & set(axes):
        raise ValueError(f"axes: the parameter is {_words(known)}, so it is not replicated over {', '.join(cut)}")
    _mark(param, replace(known, partial=tuple(dict.fromkeys((*known.partial, *axes)))))


def full_shape(param: Tensor) -> list[int]:
    """The shape of the whole parameter, of which ``param`` may be a part."""
    found = placement(param)
    shape = list(found.stretch.shape if found.stretch else param.shape)
    for shard in found.shards:
        shape[shard.dim] = sum(shard.sizes)
    return shape


def gather_full(part: Tensor, param: Tensor) -> Tensor:
    """The whole of ``part``, a tensor that is cut like ``param``: itself, its gradient, its optimiser state.

    Collective over the groups that ``param`` is sharded over; ``part`` itself, detached, where there are none.
    """
    full, found = part.detach(), placement(param)
    if cut := found.stretch:
        full = commlayer.all_gather(full, sizes=cut.sizes, group=cut.group).view(cut.shape)
    for shard in reversed(found.shards):
        full = commlayer.all_gather(full, dim=shard.dim, sizes=shard.sizes, group=shard.group)
    return full


def part_of(full: Tensor, param: Tensor) -> Tensor:
    """This rank's part of ``full``, cut like ``param``: a view, unless it is a stretch."""
    found = placement(param)
    for shard in found.shards:
        full = shard.narrow(full)
    return full.reshape(-1)[found.stretch.start : found.stretch.stop] if found.stretch else full


@torch.no_grad()
def initialise(param: Tensor, fill: Callable[[Tensor], object]) -> None:
    """Fill ``param`` with its part of what ``fill`` makes of the whole tensor, in place.

    So every rank draws the same numbers in the same order as a single process would: a sharded model starts with the
    same bits as the serial one of the same seed, and the generator goes on alike. On the meta device nothing happens.
    """
    if param.is_meta:
        return
    if not placement(param).shards:
        fill(param)
        return
    full = torch.empty(full_shape(param), dtype=param.dtype, device=param.device)
    fill(full)
    param.copy_(part_of(full, param))


@torch.no_grad()
def initialise_each(param: Tensor, fill: Callable[[Tensor], object]) -> None:
    """The same, one entry of the first dim after the other: the whole of a stack of experts would fill the memory."""
    if param.is_meta:
        return
    whole, cuts = full_shape(param), placement(param).shards
    mine = range(whole[0])
    for cut in cuts:
        if cut.dim == 0:
            first = sum(cut.sizes[: cut.group.rank])
            mine = mine[first : first + cut.sizes[cut.group.rank]]
    full = torch.empty(1, *whole[1:], dtype=param.dtype, device=param.device)
    for entry in range(whole[0]):
        fill(full[0])
        if entry in mine:
            part = full
            for cut in cuts:
                part = cut.narrow(part) if cut.dim else part
            param[mine.index(entry)].copy_(part[0])


def _mark(param: Tensor, marks: Placement) -> None:
    reference = weakref.ref(param)

    def deepcopy(memo: dict[int, object]) -> Tensor:
        # nn.Parameter's own forgets attributes, and gradients would silently go unreduced.
        original = reference()
        assert original is not None
        copied = type(original).__deepcopy__(original, memo)
        _mark(copied, marks)
        return copied

    param._placement = marks  # type: ignore[attr-defined]
    param.__deepcopy__ = deepcopy  # type: ignore[method-assign]


def _words(marks: Placement) -> str:
    cut = [f"cut over {shard.axis}" for shard in marks.shards]
    return ", ".join([*cut, *(f"replicated over {axis}" for axis in marks.partial)])
