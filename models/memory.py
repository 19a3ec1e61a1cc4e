"""How much memory a rank has needed at most."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

import commlayer
from commlayer import Group


def high_water(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, of the whole process on a CPU (where ranks that are threads share it)."""
    if device.type != "cpu":
        return int(getattr(torch, device.type).max_memory_allocated(device))
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def of_all_ranks(marks: dict[str, int], group: Group) -> dict[str, list[int]]:
    """The same marks of every rank; collective."""
    everyone = commlayer.all_gather_object(marks, group=group)
    return {name: [theirs[name] for theirs in everyone] for name in marks}
