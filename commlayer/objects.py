"""The same for Python objects. They are pickled, and unpickled from every rank of the group: of your own job alone."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch

from commlayer import functional as F
from commlayer.checks import budget, check_rank
from commlayer.group import Group
from commlayer.runtime import resolve


def _packed(value: Any, group: Group) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(group.device)


def _unpacked(data: torch.Tensor) -> Any:
    return pickle.loads(data.cpu().numpy().tobytes())


def _lengths(data: torch.Tensor, group: Group, timeout: float | None) -> list[int]:
    length = torch.tensor([data.numel()], dtype=torch.int64, device=group.device)
    return F.all_gather(length, group=group, timeout=timeout).tolist()


def all_gather_object(value: Any, *, group: Group | None = None, timeout: float | None = None) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank. Unpickles what all ranks of the job send."""
    g, left = resolve(group), budget(timeout)
    data = _packed(value, g)
    lengths = _lengths(data, g, left())
    return [_unpacked(part) for part in F.all_gather(data, sizes=lengths, group=g, timeout=left()).split(lengths)]


def gather_object(
    value: Any, *, dst: int = 0, group: Group | None = None, timeout: float | None = None
) -> list[Any] | None:
    """Every rank's picklable value, in rank order, on rank ``dst``, which unpickles them; None elsewhere."""
    g, left = resolve(group), budget(timeout)
    dst = check_rank(dst, g, "dst")
    data = _packed(value, g)
    lengths = _lengths(data, g, left())
    everything = F.gather(data, sizes=lengths, dst=dst, group=g, timeout=left())
    return None if everything is None else [_unpacked(part) for part in everything.split(lengths)]


def broadcast_object(
    value: Any = None, *, src: int = 0, group: Group | None = None, timeout: float | None = None
) -> Any:
    """The picklable value of rank ``src``, on every rank. Unpickles what that rank of the job sends."""
    g, left = resolve(group), budget(timeout)
    src = check_rank(src, g, "src")
    at_root = g.rank == src
    data = _packed(value, g) if at_root else torch.empty(0, dtype=torch.uint8, device=g.device)
    length = torch.tensor([data.numel()], dtype=torch.int64, device=g.device)
    total = int(F.broadcast(length, src=src, group=g, timeout=left()).item())
    data = F.broadcast(data if at_root else data.new_empty(total), src=src, group=g, timeout=left())
    return value if at_root else _unpacked(data)


def scatter_object(
    values: Sequence[Any] | None = None, *, src: int = 0, group: Group | None = None, timeout: float | None = None
) -> Any:
    """Element r of the list on rank ``src``, on rank r, which unpickles it; ``values`` counts on ``src`` alone."""
    g, left = resolve(group), budget(timeout)
    src = check_rank(src, g, "src")
    lengths = torch.zeros(g.size, dtype=torch.int64, device=g.device)
    parts: list[torch.Tensor] = []
    if g.rank == src:
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
            raise TypeError(f"values: expected a sequence of {g.size} objects on src, got {type(values).__name__}")
        if len(values) != g.size:
            raise ValueError(f"values: expected one per rank, {g.size}, got {len(values)}")
        parts = [_packed(value, g) for value in values]
        lengths = torch.tensor([part.numel() for part in parts], dtype=torch.int64, device=g.device)
    sizes = F.broadcast(lengths, src=src, group=g, timeout=left()).tolist()
    data = torch.cat(parts) if parts else torch.empty(sum(sizes), dtype=torch.uint8, device=g.device)
    return _unpacked(F.scatter(data, src=src, sizes=sizes, group=g, timeout=left()))
