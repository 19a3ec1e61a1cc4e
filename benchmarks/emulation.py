"""Emulated all_to_all against the native one, interleaved in one run.

    torchrun --nproc-per-node 4 benchmarks/emulation.py
    mpiexec -n 4 python benchmarks/emulation.py

Even load and one skewed 8 to 1 (the first ranks get most, as popular experts do), checked for the right values.
Times are medians over rounds, each the slowest rank's; workspace is what an emulation allocates beside input and
output, at its peak on any rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import commlayer
from commlayer.capability import EVERYTHING
from commlayer.fallbacks import all_to_all as emulations
from commlayer.group import Group
from commlayer.planned import Planned

LOWERINGS = ("pairwise", "padded_all_gather", "broadcasts")


class Allocated(TorchDispatchMode):
    """Peak of the bytes in tensors that were made while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and ("empty" in str(func) or "zeros" in str(func)):
            storage = result.untyped_storage()
            size, key = storage.nbytes(), storage.data_ptr()
            if key and key not in self.seen:
                self.seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def splits(rank: int, size: int, elements: int, skew: int) -> list[int]:
    """What a rank sends to each, ``elements`` in all: half of the ranks get ``skew`` times the share of the others."""
    weights = [skew if dst < (size + 1) // 2 else 1 for dst in range(size)]
    total = sum(weights)
    parts = [elements * weight // total for weight in weights]
    parts[0] += elements - sum(parts)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description="Emulated all_to_all against native")
    parser.add_argument("--bytes", type=int, default=1 << 20, help="sent by each rank (default 1 MiB)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    group = commlayer.init()
    rows = []
    for label, skew in (("even", 1), ("skewed 8x", 8)):
        rows += measure(group, label, skew, args.bytes // 4, args.rounds)
    if group.rank != 0:
        return
    if args.json:
        print(json.dumps(rows))
        return
    print(f"all_to_all of {args.bytes} bytes per rank, {group.size} ranks, {group.backend} ({group.version()})")
    print(f"{'load':12}{'how':20}{'median ms':>12}{'over native':>14}{'workspace MiB':>16}")
    for row in rows:
        print(f"{row['load']:12}{row['how']:20}{row['ms']:12.2f}{row['ratio']:14.2f}{row['workspace'] / 2**20:16.1f}")


def measure(group: Group, load: str, skew: int, elements: int, rounds: int) -> list[dict[str, Any]]:
    size, rank = group.size, group.rank
    table = [splits(src, size, elements, skew) for src in range(size)]
    x = torch.arange(elements, dtype=torch.float32) + rank * elements
    out_counts = None if skew == 1 else [row[rank] for row in table]
    in_counts = None if skew == 1 else table[rank]
    out = torch.empty(elements if skew == 1 else sum(out_counts or ()))
    native = Planned(group.flat.comm, commlayer.CapabilitySet((EVERYTHING,)))
    calls = {"native": lambda: native.all_to_all(out, x, out_counts, in_counts).wait()}
    for name in LOWERINGS:
        lowering = getattr(emulations, name)
        calls[name] = lambda run=lowering: run(native, out, x, out_counts, in_counts).wait()
    times: dict[str, list[float]] = {name: [] for name in calls}
    workspace = {}
    calls["native"]()
    expected = out.clone()
    for name, call in calls.items():
        out.zero_()
        with Allocated() as allocated:
            call()
        workspace[name] = int(commlayer.all_reduce(torch.tensor(allocated.peak), commlayer.MAX))
        assert torch.equal(out, expected), name
    for _ in range(rounds):
        for name, call in calls.items():
            commlayer.barrier()
            start = time.perf_counter()
            call()
            mine = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            times[name].append(float(commlayer.all_reduce(mine, commlayer.MAX)) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        {"load": load, "how": name, "ms": ms, "ratio": ms / medians["native"], "workspace": workspace[name]}
        for name, ms in medians.items()
    ]


if __name__ == "__main__":
    main()
