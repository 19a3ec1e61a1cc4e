"""Models that were built on the meta device: their parameters get values one after the other, and only pieces stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import commlayer
from parallel.placement import copy_marks, placement
from parallel.zero.flat import Flat, Member
from parallel.zero.released import Released, hand_out, release


def leave_meta(module: nn.Module, device: torch.device) -> dict[nn.Parameter, nn.Parameter]:
    """Put parameters and buffers of ``device`` in the place of those on meta; the former by the latter.

    The parameters are NaN, and have one element in memory. Raises ValueError where some are on meta and some are not.
    """
    where = {p.is_meta: name for name, p in module.named_parameters()}
    if len(where) > 1:
        raise ValueError(f"module: {where[True]} is on the meta device, {where[False]} is not; move all, or none")
    found: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None and p.is_meta:
                if p not in found:
                    empty = torch.full((), float("nan") if p.is_floating_point() else 0, dtype=p.dtype, device=device)
                    empty = empty.expand(p.shape)
                    found[p] = copy_marks(nn.Parameter(empty, requires_grad=p.requires_grad), p)
                owner._parameters[name] = found[p]
        for name, b in owner._buffers.items():
            if b is not None and b.is_meta:
                owner._buffers[name] = renewed = torch.zeros(b.shape, dtype=b.dtype, device=device)
                renewed._from_meta = True  # type: ignore[attr-defined]
    return found


def reset_parameters(module: nn.Module) -> None:
    """By the model's own method of this name; or else by those of its modules, in the order in which they are built.

    Raises ValueError for a module that has parameters of its own, and no such method.
    """
    whole = getattr(module, "reset_parameters", None)
    if callable(whole):
        whole()
        return
    for name, child in module.named_children():
        try:
            reset_parameters(child)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    if any(True for _ in module.parameters(recurse=False)):
        raise ValueError(
            f"{type(module).__name__} has parameters but no reset_parameters(); give init=, a function that fills "
            "those of the whole model"
        )


@torch.no_grad()
def initialise(
    module: nn.Module,
    flats: Sequence[Flat],
    init: Callable[[nn.Module], object],
    share: Callable[[Iterable[tuple[str, nn.Parameter]]], None],
) -> None:
    """Let ``init(module)`` fill the parameters. Each is whole while something is done with it, and no longer.

    The numbers are those that the same calls draw for a model that is whole. ``share`` makes those of the first rank
    the values of all.

    Raises ValueError for a parameter or buffer that was left without values.
    """
    one = _OneByOne(share)
    mine = {member.param for flat in flats for member in flat.members}
    for p in module.parameters():
        if p not in mine:  # frozen, and so whole
            p.data = p.data.clone()
    with one.taking(flats):
        init(module)
    share((name, p) for name, p in module.named_parameters() if p not in mine)
    if missing := [m.name for flat in flats for m in flat.members if m not in one.filled and m.param.numel()]:
        raise ValueError(f"init: nothing was done with {', '.join(missing)}, which came from the meta device")
    left = [name for name, p in module.named_parameters() if p not in mine and p.isnan().any()]
    left += [name for name, b in module.named_buffers() if getattr(b, "_from_meta", False) and not b._version]
    if left:
        raise ValueError(f"init: {left[0]} came from the meta device, and was left without values")


class _OneByOne:
    """Of all parameters only the last that was touched has values: views of it are good until the next."""

    def __init__(self, share: Callable[[Iterable[tuple[str, nn.Parameter]]], None]) -> None:
        self.share = share
        self.filled: set[Member] = set()
        self._current: tuple[Flat, Member] | None = None

    @contextmanager
    def taking(self, flats: Sequence[Flat]) -> Iterator[None]:
        places = {id(member.param): (flat, member) for flat in flats for member in flat.members}

        def bring(param: Released, function: Any) -> None:
            self._put_away(bring)
            flat, member = self._current = places[id(param)]
            if member in self.filled:
                cut = placement(member.piece).stretch
                assert cut is not None
                values = commlayer.all_gather(member.piece.detach(), sizes=cut.sizes, group=cut.group)
                values = values.to(flat.device).view(member.shape)
            else:
                nothing = float("nan") if flat.master.is_floating_point else 0
                values = torch.full(member.shape, nothing, dtype=flat.master, device=flat.device)
            hand_out(param, values)

        for flat, member in places.values():
            release(member.param, flat.master, flat.device, bring)
        yield
        self._put_away(bring)

    def _put_away(self, bring: Callable[..., None]) -> None:
        if self._current is not None:
            flat, member = self._current
            self.share([(member.name, member.param)])
            flat.store(member, member.param.data)
            self.filled.add(member)
            release(member.param, flat.master, flat.device, bring)
            self._current = None
