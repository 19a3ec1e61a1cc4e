"""From backward to the mean gradient of my pieces: reductions that overlap with backward, in one order on all ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import commlayer
from commlayer import MAX, CommError, Group
from parallel.zero.flat import Flat, Member

LATEST = 2  # how many vectors further backward may be when one is reduced


class Gradients:
    """Of one wrapped model.

    In stages 1 and 2 a vector is reduced when all its gradients are there and those before it are on their way; and
    with whatever is there, when the vector after the next, or a later one, is complete: so a rank that lacks a gradient
    does not keep the others waiting until its end, before which it may wait for them (in an all_to_all). Where the
    backend emulates the reduction, which may block, all ranks start it at that latter point. In stage 3 the walk
    through the units says when (:mod:`parallel.zero.gathering`).

    At the end one small all_reduce tells what every rank has to know: which parameters were used anywhere, since the
    others end with no gradient, as in a serial run; and whether on any rank a gradient came after its vector had left,
    so that all of them reduce that once more. So all ranks issue the same collectives, whatever their data did.

    Args:
        flats: those that are trained.
        summed: over which group each of them is, pieces and copies of them together.
        by_unit: who starts reductions: the walk, or the gradients themselves.
    """

    def __init__(self, flats: Sequence[Flat], summed: Sequence[Group], *, by_unit: bool) -> None:
        self.flats = list(reversed(flats))
        self.groups: dict[Group, list[Flat]] = {}
        for flat, group in zip(self.flats, reversed(summed), strict=True):
            self.groups.setdefault(group, []).append(flat)
        self.by_unit = by_unit
        # Reductions under way: each needs memory. Not more than LATEST, within which all ranks have started one.
        self._at_once = 1 if by_unit else LATEST
        self._places = {flat: i for i, flat in enumerate(self.flats)}
        self.sync = True
        self.open = False  # between the first sign of a backward and its end
        self.opened: Callable[[], None] = lambda: None
        self.ending: Callable[[], None] = lambda: None
        self._task: int | None = None
        self._missing: dict[Flat, set[Member]] = {}
        self._launched: list[Flat] = []
        self._landed = 0  # and of these, the first ones that are known to be done
        self._start_anew()
        # Parameters outlive the wrapper, so their hooks must neither keep it alive nor stay behind.
        handles = [
            member.param.register_post_accumulate_grad_hook(_hook(weakref.ref(self), flat, member))
            for flat in self.flats
            for member in flat.members
        ]
        self.retire = weakref.finalize(self, lambda: [handle.remove() for handle in handles])

    def begin(self) -> None:
        """Backward is running: be called at its end."""
        task = torch._C._current_graph_task_id()
        if task == self._task or task == -1:
            return
        if self.open:
            raise CommError(
                "ZeRO: a backward within a backward, as re-entrant checkpoints make it; use use_reentrant=False"
            )
        self.open, self._task = True, task
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self.opened()

    def start(self, flats: Sequence[Flat]) -> None:
        """Send off what is there of them."""
        for flat in flats:
            if self.sync:
                if len(self._launched) >= self._at_once:
                    self._launched[-self._at_once].land()
                flat.start_reduce()
                self._launched.append(flat)

    def forget(self) -> None:
        """Gradients that were not reduced."""
        for flat in self.flats:
            flat.forget()

    def check(self) -> None:
        """Before a forward pass."""
        if self.open and torch._C._current_graph_task_id() == -1:
            raise CommError(
                "ZeRO: the last backward broke off halfway, so this rank and the others may have started "
                "different collectives; restart from a checkpoint"
            )

    def ready(self, flat: Flat, member: Member) -> None:
        """Backward has come to a parameter."""
        self.begin()
        flat.add(member, more=not self.sync)
        if self.by_unit:
            return
        missing = self._missing[flat]
        if member not in missing:
            raise CommError(f"ZeRO: {member.name} got a gradient twice in one backward; the first may be on its way")
        missing.remove(member)
        while len(self._launched) < len(self.flats) and self.sync:
            following = self.flats[len(self._launched)]
            # The last vector does not count: when that is complete, so is the rest in a moment.
            due = not missing and len(self._launched) + LATEST <= self._places[flat] < len(self.flats) - 1
            if not due and (self._missing[following] or not following.overlaps):
                break
            self.start([following])
        # Ask, although nobody needs the answer yet: some backends (MPI) move data only inside their calls.
        # And what has arrived needs its memory no longer.
        while self._landed < len(self._launched) and self._launched[self._landed].arrived():
            self._launched[self._landed].land()
            self._landed += 1

    def _finish(self) -> None:
        self.ending()
        if self.sync:
            if not self.by_unit:
                self.start(self.flats[len(self._launched) :])
            self._settle()
        self._start_anew()

    def _settle(self) -> None:
        used = self._used_anywhere()
        again = [flat for flat in self.flats if used[flat][-1]]
        self.start(again)
        for flat in self.flats:
            flat.land()
            flat.start_across()
        for flat in self.flats:
            flat.deliver(used[flat][:-1])

    def _used_anywhere(self) -> dict[Flat, list[bool]]:
        """Of each member; and whether anything is left."""
        found: dict[Flat, list[bool]] = {}
        for group, flats in self.groups.items():
            flags = [[m in f.used or m in f.have for m in f.members] + [bool(f.have)] for f in flats]
            if group.size > 1:
                mine = torch.tensor([flag for one in flags for flag in one], dtype=torch.uint8, device=group.device)
                both = iter(commlayer.all_reduce(mine, MAX, group=group).tolist())
                flags = [[bool(next(both)) for _ in one] for one in flags]
            found.update(zip(flats, flags, strict=True))
        return found

    def _start_anew(self) -> None:
        self.open, self._task = False, None
        self._launched, self._landed = [], 0
        self._missing = {flat: set(flat.members) for flat in self.flats}


def _hook(gradients: weakref.ref[Gradients], flat: Flat, member: Member) -> Callable[[Tensor], None]:
    def ready(_: Any) -> None:
        if (alive := gradients()) is not None:
            alive.ready(flat, member)

    return ready
