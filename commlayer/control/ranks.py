"""Many ranks in few letters: runs joined, in their order, as in ``0-3,8``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=1024)
def compact(ranks: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


@lru_cache(maxsize=1024)
def expanded(text: str) -> tuple[int, ...]:
    """The inverse of ``compact``. Raises ValueError; for more ranks than jobs have, too."""
    ranks: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        if int(last or first) - int(first) + len(ranks) > 1 << 20:
            raise ValueError(f"ranks {text[:40]!r}")
        ranks.extend(range(int(first), int(last or first) + 1))
    return tuple(ranks)


def named(ranks: Sequence[int]) -> str:
    """For people: ``rank 3``, or ``ranks 1, 3``."""
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"
