"""Stage 3: parameters come before they are needed and go afterwards, along one walk that is the same on all ranks.

A forward pass walks through all units in their order, a backward pass in the reverse one. Wherever a rank comes to a
unit, it gathers all that come before it on the walk, that one, and the next (to have it on its way meanwhile); and at
the end of the pass what is left. So a rank whose data leaves a unit out, or takes units in another order, still takes
part in the gathering of each. On the way back, the gradients of a unit are sent off when the unit before it is reached.
Both are one sequence of collectives, so also backends that can do only one thing at a time find the same one on all
ranks. The root's own parameters are needed first and last: they stay from the beginning of forward to the end of
backward.

Autograd would keep the weights that it needs for backward alive. It gets a note of them instead (by saved-tensor
hooks), and the weights when it comes to them. Where others keep them, as a recomputation does, they stay as long.

A unit to which a forward pass goes back from a later one is gathered again, which all ranks have to do alike.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import commlayer
from commlayer import CommError, UnsupportedOperation
from parallel.notes import unseen
from parallel.zero.flat import Flat
from parallel.zero.gradients import Gradients
from parallel.zero.hooks import around, weakly
from parallel.zero.released import Released, hand_out, release
from parallel.zero.unit import Note, Unit


class Gathering:
    """The walk through the units of one model."""

    def __init__(self, root: nn.Module, units: Sequence[Unit], gradients: Gradients) -> None:
        self.gradients = gradients
        self.root = next((unit for unit in units if unit.module is root), None)
        self.units = [unit for unit in units if unit is not self.root]
        self.all = list(units)
        self._forward: int | None = None  # the last unit reached by the forward pass; None outside of one
        self._backward: int | None = None
        self._saving: Any = None  # the hooks of the forward pass
        self._used: list[Unit] = []  # in the forward pass, and not dropped yet
        self._passed: list[Unit] = []  # on the way back, and not dropped yet
        self._owners: dict[int, tuple[Unit, Flat]] = {}  # of storages
        self.everything = 0  # nested uses of gathered()
        gradients.opened, gradients.ending = weakly(self._turn_round), weakly(self._end_backward)
        self._before: BaseException | None = None  # what was being handled when the pass began
        self._age = 0  # how often the shards have changed
        handles = around(root, weakly(self._begin), weakly(self._end))
        for i, unit in enumerate(self.units):
            unit.index = i
            handles += around(unit.module, weakly(self._enter, unit), weakly(self._leave, unit))
        # The modules outlive the wrapper, so their hooks must neither keep it alive nor stay behind.
        weakref.finalize(self, lambda: [remove() for remove in handles])
        self._places = {id(member.param): (unit, member) for unit in self.all for _, member in unit.members}
        self._bring = _bringer(weakref.ref(self))
        for unit in self.all:
            self._take_back(unit)

    def drop(self, *, changed: bool = True) -> None:
        """Forget what was gathered of the shards, before they have ``changed``."""
        self._age += changed
        for unit in self.all:
            unit.unseen = 0
            self._drop(unit)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All units at once, with their values in the parameters."""
        for unit in self.all:
            self._start(unit)
        for unit in self.all:
            self._finish(unit)
            self._hand_out(unit)
        self.everything += 1
        try:
            yield
        finally:
            self.everything -= 1
            self.drop(changed=False)

    # Forward -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self.everything:
            return
        if not _in_backward():  # or it is a recomputation of the whole model
            self.gradients.check()
            if self._forward is not None:  # Ctrl-C in a pass: torch calls no hooks then
                self._end_forward(failed=True)
            for unit in self.all:  # or in a module outside of one
                self._close(unit)
            self._forward, self._before = -1, sys.exc_info()[1]
            if torch.is_grad_enabled():
                self._saving = self._hooked()
        if self.root is not None:
            self._enter(self.root)

    def _end(self) -> None:
        if self.everything:
            return
        if self.root is not None:
            self._leave(self.root)
        if not _in_backward() and self._forward is not None:
            self._end_forward(failed=sys.exc_info()[1] is not self._before)

    def _end_forward(self, failed: bool) -> None:
        if not failed:
            self._walk(len(self.units) - 1)  # with those ranks whose data took them there
        self._forward = None
        self._used.clear()
        stays: list[Unit | None] = []
        if self._saving is not None:
            self._saving.__exit__(None, None, None)
            self._saving = None
            if not failed:  # backward begins with the last, and needs the root's
                stays = [self.root, *self.units[-1:]]
        for unit in self.all:
            if failed:
                unit.users = 0
                for flat in unit.flats:
                    flat.gathering = None  # the others may never come
            if unit not in stays:
                self._drop(unit)

    def _enter(self, unit: Unit) -> None:
        """A module is about to run, in a forward pass or in a recomputation."""
        if self.everything:
            return
        self._reach(unit)
        unit.users += 1
        if unit.users > 1:
            return
        self._hand_out(unit)
        if not _in_backward() and torch.is_grad_enabled():
            unit.unseen += 1
            if self._forward is None:
                unit.saving = self._hooked()

    def _leave(self, unit: Unit) -> None:
        if self.everything or not unit.users:
            return
        unit.users -= 1
        if unit.users:
            return
        self._close(unit)
        if _in_backward():
            unit.unseen -= 1
        elif self._forward is None:
            self._drop(unit)
        elif unit is not self.root:
            self._used.append(unit)  # and perhaps it is called again at once

    def _close(self, unit: Unit) -> None:
        unit.users = 0
        if unit.out:
            self._take_back(unit)
        if unit.saving is not None:
            unit.saving.__exit__(None, None, None)
            unit.saving = None

    def _reach(self, unit: Unit) -> None:
        if _in_backward():
            self.gradients.begin()
            if unit is not self.root:
                self._walk_back(unit.index)
        elif self._forward is not None and unit is not self.root:
            self._walk(unit.index)
        if not unit.here:
            if unit is not self.root:
                self._agree_on(unit)
            self._start(unit)
        self._finish(unit)

    def _walk(self, to: int) -> None:
        assert self._forward is not None
        for used in [*self._used]:
            if used.index < to and not used.users:
                self._used.remove(used)
                self._drop(used)
        for i in range(self._forward + 1, to + 1):
            self._start(self.units[i])
            self._forward = i
        if to == self._forward and to + 1 < len(self.units):
            self._start(self.units[to + 1])

    def _agree_on(self, unit: Unit) -> None:
        """Before a unit is gathered that is not next: a message of another size than any vector, so that a rank that
        does so alone ends in an error, and not with the weights of another unit."""
        for group in dict.fromkeys(flat.over for flat in unit.flats if flat.over.size > 1):
            mine = torch.full((3,), unit.index, dtype=torch.int16, device=group.device)
            if (commlayer.all_gather(mine, group=group) != unit.index).any():
                raise CommError(f"ZeRO: ranks want different modules, this one {type(unit.module).__name__}, once more")

    # Backward ----------------------------------------------------------------------------------------------

    def _turn_round(self) -> None:
        self._backward = len(self.units)
        if self.root is not None:
            self._start(self.root)

    def _walk_back(self, to: int) -> None:
        if self._backward is None:
            return
        for i in range(self._backward - 1, to - 1, -1):
            self._start(self.units[i])
            self._backward = i
            if i + 1 < len(self.units):
                self._pass(self.units[i + 1])
            if i > 0:
                self._start(self.units[i - 1])

    def _pass(self, unit: Unit) -> None:
        """On the way back: send off its gradients. It stays as long as this rank may come to it once more."""
        self.gradients.start([flat for flat in unit.flats if flat.kind.trained])
        self._passed.append(unit)
        for passed in [*self._passed]:
            if not passed.users and not passed.notes and passed.unseen <= 0:
                self._passed.remove(passed)
                self._drop(passed)

    def _end_backward(self) -> None:
        self._walk_back(0)
        for unit in (*self.units[:1], *([self.root] if self.root is not None else [])):
            self._pass(unit)
        self._backward = None
        self._passed.clear()
        for unit in self.all:
            unit.unseen = 0
            self._drop(unit)

    def _hooked(self) -> Any:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        return hooks

    def _pack(self, x: Tensor) -> Any:
        owner = self._owners.get(x.untyped_storage()._cdata) if type(x) in (Tensor, nn.Parameter) else None
        if owner is None or x.dtype != owner[1].dtype or x.is_conj() or x.is_neg():
            return x
        unit = owner[0]
        unit.unseen = 0
        return Note(*owner, x, self._age)

    def _unpack(self, kept: Any) -> Any:
        if not isinstance(kept, Note):
            return kept
        if kept.age != self._age:
            raise RuntimeError(
                f"{kept.flat.members[0].name} or another parameter of its unit, which is needed for this backward, has "
                "been modified since forward, by a step of the optimizer or a checkpoint"
            )
        self._reach(kept.unit)
        assert kept.flat.full is not None
        return kept.flat.full.as_strided(*kept.place)

    # One unit ----------------------------------------------------------------------------------------------

    def _start(self, unit: Unit) -> None:
        for flat in unit.flats:
            flat.start_gather()

    def _finish(self, unit: Unit) -> None:
        for flat in unit.flats:
            flat.finish_gather()
            assert flat.full is not None
            self._owners[flat.full.untyped_storage()._cdata] = (unit, flat)

    def _drop(self, unit: Unit) -> None:
        if self.everything:
            return
        if unit.out and not unit.users:
            self._take_back(unit)
        for flat in unit.flats:
            if flat.full is not None:
                self._owners.pop(flat.full.untyped_storage()._cdata, None)
            flat.drop()

    def _hand_out(self, unit: Unit) -> None:
        unit.out = True
        for flat, member in unit.members:
            hand_out(member.param, flat.view(member))

    def _take_back(self, unit: Unit) -> None:
        unit.out = False
        for flat, member in unit.members:
            release(member.param, flat.dtype, flat.device, self._bring)

    def bring(self, param: Released, function: Any) -> None:
        """Something computes with a parameter outside of its module."""
        unit, member = self._places[id(param)]
        if self._forward is None and not _in_backward():
            name = getattr(function, "__name__", function)
            raise UnsupportedOperation(
                f"{name}: {member.name} is released between passes (ZeRO stage 3), and its values are spread over "
                "ranks; look at it inside of `with model.gathered():`"
            )
        self._reach(unit)
        self._hand_out(unit)


def _bringer(gathering: weakref.ref[Gathering]) -> Callable[[Released, Any], None]:
    def bring(param: Released, function: Any) -> None:
        if (alive := gathering()) is None:
            raise UnsupportedOperation(f"{param!r} has no values: they went with the ZeRO that had them in pieces")
        unseen(partial(alive.bring, param, function))

    return bring


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
