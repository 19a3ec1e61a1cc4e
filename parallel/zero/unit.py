"""A unit at work: what is known of its calls, and what autograd has of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from parallel.zero.flat import Flat


class Unit:
    """A module, and the vectors of what is gathered with it."""

    def __init__(self, module: nn.Module, flats: Sequence[Flat]) -> None:
        self.module, self.flats = module, list(flats)
        self.members = [(flat, member) for flat in flats for member in flat.members]
        self.index = -1  # on the walk; the root is not
        self.users = 0  # calls of the module that are under way
        self.out = True  # the parameters have values
        self.notes = 0  # that autograd still has
        self.unseen = 0  # calls of which it got none, so that they may be done again in backward
        self.saving: Any = None  # the hooks of a call outside of any pass

    @property
    def here(self) -> bool:
        return all(flat.full is not None for flat in self.flats)


class Note:
    """What autograd keeps in place of a view of a gathered vector."""

    def __init__(self, unit: Unit, flat: Flat, view: Tensor, age: int) -> None:
        self.unit, self.flat, self.age = unit, flat, age
        self.place = view.size(), view.stride(), int(view.storage_offset())
        unit.notes += 1

    def __del__(self) -> None:
        self.unit.notes -= 1
