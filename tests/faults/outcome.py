"""What became of a job, as its ranks reported it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RankOutcome:
    """What one rank reported, and how it ended: None while it runs, negative for a signal."""

    events: list[dict[str, Any]] = field(default_factory=list)
    errors: str = ""

    def find(self, event: str) -> dict[str, Any] | None:
        return next((e for e in self.events if e["event"] == event), None)

    def when(self, event: str) -> float | None:
        found = self.find(event)
        return found and found["time"]

    @property
    def status(self) -> int | None:
        found = self.find("exit")
        return found and found["status"]


@dataclass
class Outcome:
    ranks: list[RankOutcome]
    left: list[str]  # processes and segments of shared memory that outlived the job
    seconds: float
    launcher: str = ""  # what mpiexec said
    launched: int | None = None  # and its exit status

    def __str__(self) -> str:
        lines = [f"{self.seconds:.1f} s, left running: {self.left or 'nothing'}", self.launcher.strip()]
        for number, rank in enumerate(self.ranks):
            lines += [f"--- rank {number}: status {rank.status}", *map(str, rank.events), rank.errors]
        return "\n".join(lines)
