"""Which parameters share a vector, and over which ranks it is cut."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from commlayer import Group
from parallel.buckets import packs_of
from parallel.replicas import Replicas
from parallel.zero.divide import Division
from parallel.zero.flat import Flat, Kind, Settings


class Layout:
    """Of a model whose data ranks fall into ``blocks``, each with all of the state. Collective."""

    def __init__(self, replicas: Replicas, blocks: int, settings: Settings) -> None:
        if not 1 <= blocks <= replicas.group.size or replicas.group.size % blocks:
            raise ValueError(f"replicas: expected a divisor of the {replicas.group.size} data ranks, got {blocks}")
        self.replicas, self.blocks, self.settings = replicas, blocks, settings
        self._cuts: dict[Group, Group] = {}
        self._groups: dict[tuple[Group, Group], tuple[Group, Group]] = {}

    def kind(self, param: Tensor) -> Kind:
        whole = self.replicas.summed_over(param)
        base = whole if self.replicas.is_expert(param) else self.replicas.group
        if (base, whole) not in self._groups:
            # A block of experts' ranks is as large as can be.
            over = self._cut(base, math.gcd(self.blocks, base.size))
            across = Group.alone(whole.device)
            if whole.size > over.size:
                across = whole.split(over.rank) or across
            self._groups[base, whole] = over, across
        return Kind(param.dtype, param.device, param.requires_grad, *self._groups[base, whole])

    def _cut(self, base: Group, blocks: int) -> Group:
        if blocks == 1:
            return base
        if base not in self._cuts:
            self._cuts[base] = base.split(base.rank // (base.size // blocks)) or base
        return self._cuts[base]

    def by_unit(self, units: Division) -> list[tuple[nn.Module, list[Flat]]]:
        """A vector for each kind of parameter of a unit."""
        found = []
        for module, params in units:
            alike: dict[Kind, list[tuple[str, nn.Parameter]]] = {}
            for name, p in params.items():
                alike.setdefault(self.kind(p), []).append((name, p))
            found.append((module, [Flat(named, kind, self.settings) for kind, named in alike.items()]))
        return found

    def by_size(self, params: Mapping[str, nn.Parameter], limit: int) -> list[Flat]:
        """Vectors of at most ``limit`` bytes; the last ones have what backward comes to first."""
        names = {p: name for name, p in params.items()}
        kinds = {p: self.kind(p) for p in names}
        packs = packs_of([*reversed(names)], limit, lambda p: kinds[p])
        return [
            Flat([(names[p], p) for p in reversed(pack)], kinds[pack[0]], self.settings) for pack in reversed(packs)
        ]
