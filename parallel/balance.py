"""How busy the experts were in a step, and the biases that even it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import commlayer
from commlayer import Group
from parallel.expert import Load, MoE


class Totals(NamedTuple):
    """Of one step, all ranks and micro-batches, layer by layer: choices of each expert, and dropped ones."""

    counts: Tensor  # layers × experts
    dropped: Tensor  # layers


class LoadCounter:
    """Adds up the loads of a model's MoE layers over the micro-batches of a step, and over ranks once.

    Args:
        group: all ranks that bring tokens: of a folded mesh ``experts["etp-ep-edp"]``.

    Raises:
        ValueError: for a model without MoE layers, or whose layers differ in the number of experts.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        self.layers, self.group = [module for module in model.modules() if isinstance(module, MoE)], group
        if len(numbers := {layer.routing.experts for layer in self.layers}) != 1:
            raise ValueError(f"model: expected MoE layers that are alike, got numbers of experts {sorted(numbers)}")
        self._sums = torch.zeros(len(self.layers), numbers.pop() + 1, dtype=torch.int64, device=group.device)

    def add(self, loads: Sequence[Load]) -> None:
        """The loads of one micro-batch, in the order of ``model.modules()``; once, whatever is recomputed."""
        if len(loads) != len(self.layers):
            raise ValueError(f"loads: expected one for each of {len(self.layers)} layers, got {len(loads)}")
        for sums, load in zip(self._sums, loads, strict=True):
            sums += torch.cat([load.counts, load.dropped.view(1)]).to(sums.device)

    def step(self) -> Totals:
        """The totals of the step; moves the routers' biases, and starts anew. One all_reduce: call it on all ranks."""
        totals = commlayer.all_reduce(self._sums, group=self.group)
        self._sums.zero_()
        for layer, counts in zip(self.layers, totals[:, :-1], strict=True):
            layer.router.balance(counts)
        return Totals(totals[:, :-1], totals[:, -1])
