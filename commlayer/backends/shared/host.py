"""Which ranks share a host, and how many of them its cores carry."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence

# Without the compiled kernel, ranks meet through plain loads and stores, whose order only these processors keep.
ORDERED_STORES = ("x86_64", "AMD64")


def identity() -> str:
    """The same text on ranks that can map each other's memory: one kernel, one view of its processes."""
    if not sys.platform.startswith("linux") or not hasattr(os, "memfd_create"):
        return ""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            kernel = boot.read().strip()
        # Apart where networks are: containers of one machine stand for hosts then.
        spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
    except OSError:
        return ""
    return " ".join([kernel, *spaces])


def cores() -> list[int]:
    """The numbers of those that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def keeps_order() -> bool:
    return platform.machine() in ORDERED_STORES


def places(identities: Sequence[str]) -> tuple[int, ...]:
    """For each rank the number of its host, counted as they appear; a rank that can share with nobody has its own."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(name or f"rank {rank}", len(numbers)) for rank, name in enumerate(identities))
