"""Measures channels.json: what each operation costs through shared memory, and through the backend itself.

    mpiexec -n 2 python -m benchmarks.calibrate    # and -n 4, more ranks than cores; both also on gloo

Each is a line over bytes, through two medians of interleaved rounds: of 64 bytes, and of 16 MiB. Run it where nothing
else runs; it replaces the entries of this backend, for as many ranks as were started, in the table.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable

import torch

import commlayer
from commlayer import SUM, Group
from commlayer.planner import CHANNELS
from commlayer.work import Work

SMALL, LARGE = 64, 1 << 24  # bytes of the whole vector
ROUNDS, CALLS = 15, {SMALL: 20, LARGE: 3}


def calls(group: Group, size: int) -> dict[str, Callable[[object], Work]]:
    """Of every operation, one call on a channel."""
    whole, part = torch.ones(size // 4), torch.ones(size // 4 // group.size)
    other, root = torch.ones(size // 4), group.rank == 0
    return {
        "all_reduce": lambda on: on.all_reduce(whole, whole, SUM),
        "reduce": lambda on: on.reduce(other if root else None, whole, SUM, 0),
        "broadcast": lambda on: on.broadcast(whole, 0),
        "all_gather": lambda on: on.all_gather(whole, part, None),
        "reduce_scatter": lambda on: on.reduce_scatter(part, whole, SUM, None),
        "all_to_all": lambda on: on.all_to_all(other, whole, None, None),
        "gather": lambda on: on.gather(whole if root else None, part, 0, None),
        "scatter": lambda on: on.scatter(part, whole if root else None, 0, None),
        "barrier": lambda on: on.barrier(),
    }


def seconds(group: Group, size: int) -> dict[str, dict[str, float]]:
    """Medians by channel and operation, the slowest rank's."""
    comm = group._comm
    assert comm is not None
    channels = {"shared memory": group.shared, group.backend: comm}
    comm.synchronous = True
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for op, call in calls(group, size).items():
            for name, channel in channels.items():
                call(channel).wait()
                start = time.perf_counter()
                for _ in range(CALLS[size]):
                    call(channel).wait()
                times.setdefault((name, op), []).append((time.perf_counter() - start) / CALLS[size])
    comm.synchronous = False
    mine = torch.tensor([*map(statistics.median, times.values())], dtype=torch.float64)
    slowest = commlayer.all_reduce(mine, commlayer.MAX).tolist()
    found: dict[str, dict[str, float]] = {}
    for (name, op), value in zip(times, slowest, strict=True):
        found.setdefault(name, {})[op] = value
    return found


def main() -> None:
    group = commlayer.init()
    if group.shared is None:
        raise SystemExit("these ranks share no memory: nothing to compare")
    small, large = (seconds(group, size) for size in (SMALL, LARGE))
    if group.rank == 0:
        table = json.loads(CHANNELS.read_text())
        part = table["crowded" if group._hosts.crowded else "free"]
        for name, lines in small.items():
            part[name] = {
                op: [round(1e6 * t, 1), round((LARGE - SMALL) / max(large[name][op] - t, 1e-9) / 1e9, 2)]
                for op, t in lines.items()
            }
        text = json.dumps(table, indent=1)
        CHANNELS.write_text(re.sub(r"\[\s+([^\]]*?)\s+\]", lambda pair: f"[{' '.join(pair[1].split())}]", text) + "\n")
        for name, lines in small.items():
            print(name, {op: part[name][op] for op in lines})


if __name__ == "__main__":
    main()
