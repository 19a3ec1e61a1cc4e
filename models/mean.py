"""The mean of a quantity over the ranks and steps of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import commlayer
from commlayer import Group


class Mean:
    """The mean loss over all ranks, gathered step by step without communication until it is asked for."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.total = torch.zeros(1, dtype=torch.float64, device=group.device)
        self.count = 0

    def add(self, total: Tensor, count: int) -> None:
        """The sum of this rank's losses, and what it is to be divided by: samples or tokens of all ranks."""
        self.total += total
        self.count += count

    def take(self) -> float:
        """The mean since it was last taken. Collective."""
        mean = commlayer.all_reduce(self.total, group=self.group).item() / self.count
        self.load_state_dict({"total": 0.0, "count": 0})
        return mean

    def whole(self) -> dict[str, Any]:
        """The state of all ranks together, for any other number of them. Collective."""
        return {"total": commlayer.all_reduce(self.total, group=self.group).item(), "count": self.count}

    def load_whole(self, state: dict[str, Any]) -> None:
        self.load_state_dict({**state, "total": state["total"] if self.group.rank == 0 else 0.0})

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total.item(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total.fill_(state["total"])
        self.count = state["count"]
