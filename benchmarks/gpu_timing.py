"""How long calls take the host, and how long the device; on a CPU both are one. For benchmarks/gpu.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch

import commlayer
from commlayer import Group

Call = Callable[[], object]
WARM_UP = 2  # rounds that do not count
LONGEST = 50_000.0  # microseconds that a GPU sleeps


class Cost(NamedTuple):
    """Microseconds of one call: until it returned, and on the device."""

    host: float
    device: float


def interleaved(
    calls: Mapping[str, Call], group: Group, rounds: int, count: int, *, asleep: bool = True
) -> dict[str, Cost]:
    """Medians of ``rounds`` rounds A B A B …, each of ``count`` calls in a row; of the slowest rank. Collective.

    A GPU is ``asleep`` until all calls of a round are issued, so that the time on the device has no waiting for the
    host in it. Not for calls of hundreds of kernels: the queue between the two holds about a thousand.
    """
    found: dict[str, list[Cost]] = {name: [] for name in calls}
    for _ in range(WARM_UP + rounds):
        for name, call in calls.items():
            commlayer.barrier(group=group)
            last = found[name][-1].host * count if found[name] else 0.0
            found[name].append(_timed(call, group, count, min(2 * last + 1000, LONGEST) if asleep else 0.0))
    medians = [[statistics.median(side) for side in zip(*costs[WARM_UP:], strict=True)] for costs in found.values()]
    slowest = slowest_of(medians, group)
    return {name: Cost(*cost) for name, cost in zip(calls, slowest, strict=True)}


def slowest_of(values: list[list[float]], group: Group) -> list[list[float]]:
    """The largest of all ranks' values, each by itself. Collective."""
    mine = torch.tensor(values, dtype=torch.float64, device=group.device)
    return commlayer.all_reduce(mine, commlayer.MAX, group=group).tolist()


def _timed(call: Call, group: Group, count: int, asleep: float) -> Cost:
    """One round, after a GPU has slept for ``asleep`` microseconds."""
    token = torch.zeros(1, device=group.device)
    if group.device.type == "cpu":
        commlayer.all_reduce(token, out=token, group=group)
        begin = time.perf_counter()
        for _ in range(count):
            call()
        spent = (time.perf_counter() - begin) / count * 1e6
        return Cost(spent, spent)
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(asleep * cycles_per_microsecond(group.device.index)))
    commlayer.all_reduce(token, out=token, group=group)  # the ranks' devices begin together, as far as they can
    started.record()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    host = time.perf_counter() - begin
    ended.record()
    torch.cuda.synchronize()
    return Cost(host / count * 1e6, started.elapsed_time(ended) / count * 1e3)


@cache
def cycles_per_microsecond(index: int) -> float:
    """As ``torch.cuda._sleep`` counts them, on this GPU."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)  # the first one is slow
    started.record()
    torch.cuda._sleep(20_000_000)
    ended.record()
    torch.cuda.synchronize(index)
    return 20_000_000 / (started.elapsed_time(ended) * 1e3)


def step_seconds(step: Call, group: Group, rounds: int) -> float:
    """The median of whole steps, each from the call until the device is done; of the slowest rank. Collective."""
    synchronize(group)
    for _ in range(WARM_UP):
        step()
    synchronize(group)
    commlayer.barrier(group=group)
    spent = []
    for _ in range(rounds):
        begin = time.perf_counter()
        step()
        synchronize(group)
        spent.append(time.perf_counter() - begin)
    return slowest_of([[statistics.median(spent)]], group)[0][0]


def synchronize(group: Group) -> None:
    torch.get_device_module(group.device).synchronize()
