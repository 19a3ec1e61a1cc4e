"""What the machine allows, measured in the same run with all of the ranks at work.

Bandwidth: each rank at once copies (c = a) or adds (c = a + b), with torch, arrays that together have the bytes an
operation must read and write at the least (``operations.py``): ``floor`` is such a loop as one more implementation,
interleaved with the others, and so the limit of that very case on that very minute's machine. Latency: half of a
round trip of 8 bytes, by a flag in memory that ranks 0 and 1 share (where they are on one host, with a core each), and
by messages of the layer. The limit of a case is the floor's time and the flag's.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from contextlib import nullcontext
from typing import Any

import torch

import commlayer
from commlayer.bench.measure import Effort, Run, measure
from commlayer.bench.operations import OPERATIONS, Case
from commlayer.group import Group
from commlayer.runtime import inside_run_local

KERNELS = {"copy": 2, "add": 3}  # arrays that each reads or writes
TRIPS = 200  # round trips of a sample
SAMPLES = 9


class Floor:
    """Copying and adding, in the same memory for every case."""

    def __init__(self, largest: int) -> None:
        self._memory = torch.ones(2 * largest + 64, dtype=torch.uint8)  # no operation has more traffic

    def run(self, case: Case) -> Run:
        return self.kernel(OPERATIONS[case.op].kernel, case.traffic, case.dtype)

    def kernel(self, name: str, traffic: int, dtype: torch.dtype) -> Run:
        """Copy or add so that ``traffic`` bytes are read or written, or an element; what torch cannot add is copied."""
        if not _adds(dtype):
            name = "copy"
        count = max(1, traffic // KERNELS[name] // dtype.itemsize)
        a, b, c = (
            self._memory[: KERNELS[name] * count * dtype.itemsize].view(dtype)[place * count : (place + 1) * count]
            for place in (0, KERNELS[name] - 2, KERNELS[name] - 1)
        )
        call = (lambda: torch.add(a, b, out=c)) if name == "add" else (lambda: c.copy_(a))
        return Run(call, lambda: None)


def _adds(dtype: torch.dtype) -> bool:
    try:
        torch.add(torch.ones(1, dtype=dtype), torch.ones(1, dtype=dtype))
    except RuntimeError:  # unsigned integers, 8-bit floats
        return False
    return True


def machine(world: Group, sizes: list[int], effort: Effort) -> dict[str, Any]:
    """Bandwidths of a rank while all are at work, in 1e9 bytes a second, and latencies in microseconds."""
    floor = Floor(2 * max(sizes))
    bandwidth = []
    for size in sizes:
        case = Case("barrier", torch.float32, 0, world.size)
        runs = {name: floor.kernel(name, size * arrays, torch.float32) for name, arrays in KERNELS.items()}
        times = measure(case, runs, world, effort)
        # Of a copy the bytes of the array, as of memcpy; of an addition those of the result.
        bandwidth.append({"bytes": size} | {name: size / min(found.seconds) / 1e9 for name, found in times.items()})
    return {"bandwidth": bandwidth, "latency_us": latencies(world)}


def latencies(world: Group) -> dict[str, float | None]:
    """Half a round trip of 8 bytes between ranks 0 and 1, in microseconds."""
    flag, message = shared_flag(world), messages(world)
    return {"flag": flag, "message": message}


def messages(world: Group) -> float:
    """By the layer's send and recv."""
    x = torch.zeros(8, dtype=torch.uint8)

    def trips() -> None:
        for _ in range(TRIPS // 4):
            if world.rank == 0:
                commlayer.send(x, 1, group=world)
                commlayer.recv(x, 1, group=world)
            else:
                commlayer.recv(x, 0, group=world)
                commlayer.send(x, 0, group=world)

    return _half_trip(trips, TRIPS // 4, world)


def shared_flag(world: Group) -> float | None:
    """By a number in shared memory that one rank waits for and the other writes; None where that would hang or lie."""
    if inside_run_local():
        return None
    places = commlayer.all_gather_object((os.uname().nodename, sorted(os.sched_getaffinity(0))), group=world)
    (host, cores), (other_host, other_cores) = places[:2]
    if host != other_host or len({*cores, *other_cores}) < 2:
        return None
    with tempfile.NamedTemporaryFile() if world.rank == 0 else nullcontext() as file:
        if file is not None:
            os.truncate(file.name, mmap.PAGESIZE)
        path = commlayer.broadcast_object(file and file.name, group=world)
        flags = _mapped(path) if world.rank < 2 else None
        commlayer.barrier(group=world)
    mine, theirs = (0, 8) if world.rank == 0 else (8, 0)  # numbers of 8 bytes, each on a cache line of its own
    turn = 0

    def trips() -> None:
        nonlocal turn
        assert flags is not None
        for _ in range(TRIPS):
            turn += 1
            if world.rank == 0:
                flags[mine] = turn
            while flags[theirs] != turn:
                pass
            if world.rank == 1:
                flags[mine] = turn

    return _half_trip(trips, TRIPS, world)


def _mapped(path: str) -> memoryview:
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")


def _half_trip(trips: Any, count: int, world: Group) -> float:
    """The least of some samples, since other load only adds; ranks but 0 and 1 wait in a barrier."""
    samples = []
    for _ in range(SAMPLES):
        commlayer.barrier(group=world)
        if world.rank < 2:
            start = time.perf_counter()
            trips()
            samples.append((time.perf_counter() - start) / count / 2 * 1e6)
    least = torch.tensor(min(samples, default=0.0), dtype=torch.float64)
    return float(commlayer.broadcast(least, group=world))
