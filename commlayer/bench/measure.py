"""Times of several implementations of one case, interleaved: A B A B, so that all see the same machine.

A sample is the mean time of a batch of calls, on the slowest rank. Before each batch the ranks meet in the layer's
barrier, which does not spin for long (a spinning one, with more ranks than cores, would be what is measured); and
where a call is short against what ranks leave a barrier apart, one call that is not timed lets them draw level.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

import commlayer
from commlayer.bench.operations import Case, wrong
from commlayer.group import Group

BATCH = 1e-3  # seconds of calls that are timed together
MOST = 100  # calls of a batch
LEVEL = 5e-3  # seconds of a call from which on nobody minds how far ranks leave a barrier apart
MEETING = 200e-6  # seconds that a barrier may take, for estimates
FEWEST = 5  # samples, unless even fewer are asked for
WARM = 0.5  # seconds of warm-up that suffice


class Run(NamedTuple):
    """One implementation of a case, ready to be called again and again."""

    call: Callable[[], object]
    refill: Callable[[], object]  # what it reads is there again, and what it writes is not
    result: torch.Tensor | None = None  # None on a rank that gets none
    accumulates: bool = False  # each call adds to what the last one has left


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    iters: int = 20  # samples of each implementation, at most
    warmup: int = 5  # calls before them, at most
    check: int = 1  # calls after them whose results are compared; 0: no result is
    seconds: float = 2.0  # for one case, all implementations together; FEWEST samples are taken in any case


class Series(NamedTuple):
    """What was measured of one implementation."""

    seconds: list[float]  # of a call, a value a round: the slowest rank's
    calls: int  # in a batch
    wrong: int | None  # elements, on all ranks, in all results that were compared; None: none were


class Summary(NamedTuple):
    median: float
    low: float  # lower and upper quartile
    high: float
    least: float


def summary(seconds: list[float]) -> Summary:
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return Summary(statistics.median(seconds), low, high, min(seconds))


def speedup(base: list[float], ours: list[float]) -> float:
    """How often faster than ``base``: the median over rounds, in each of which both saw the same machine."""
    return statistics.median(theirs / mine for theirs, mine in zip(base, ours, strict=True))


def measure(case: Case, runs: Mapping[str, Run], group: Group, effort: Effort) -> dict[str, Series]:
    """The times of each, and whether their results are right. Called by every rank of the group with the same names."""
    expected = _agreed([_warm(run, group, effort) for run in runs.values()], group)
    calls = {name: max(1, min(MOST, int(BATCH / t))) for name, t in zip(runs, expected, strict=True)}
    level = {name: t < LEVEL for name, t in zip(runs, expected, strict=True)}
    round_takes = sum((calls[name] + level[name]) * t + MEETING for name, t in zip(runs, expected, strict=True))
    rounds = max(min(FEWEST, effort.iters), min(effort.iters, int(effort.seconds / round_takes)))
    times = torch.empty(len(runs), rounds, dtype=torch.float64)
    errors = torch.zeros(len(runs), dtype=torch.int64)
    with _no_collector():
        for number in range(rounds):
            for place, (name, run) in enumerate(runs.items()):
                # The results of the last round are compared: the very ones that were timed.
                compare = effort.check > 0 and number == rounds - 1
                if compare:
                    run.refill()
                commlayer.barrier(group=group)
                if level[name]:
                    run.call()
                start = time.perf_counter()
                for _ in range(calls[name]):
                    run.call()
                times[place, number] = (time.perf_counter() - start) / calls[name]
                if compare and not (run.accumulates and calls[name] + level[name] > 1):
                    errors[place] += wrong(case, group.rank, run.result)
        for _ in range(effort.check):
            for place, run in enumerate(runs.values()):
                run.refill()
                commlayer.barrier(group=group)
                run.call()
                errors[place] += wrong(case, group.rank, run.result)
    slowest = commlayer.all_reduce(times, commlayer.MAX, group=group)
    total = commlayer.all_reduce(errors, group=group).tolist()
    return {
        name: Series(slowest[place].tolist(), calls[name], total[place] if effort.check else None)
        for place, name in enumerate(runs)
    }


def _warm(run: Run, group: Group, effort: Effort) -> float:
    """Seconds of a call, the least of the warm-up's."""
    run.refill()
    commlayer.barrier(group=group)
    first = _timed(run.call)
    again = min(effort.warmup, max(1, int(WARM / _agreed([first], group)[0])))
    return min([_timed(run.call) for _ in range(again)], default=first)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-7)


def _agreed(seconds: list[float], group: Group) -> list[float]:
    """The slowest rank's, known to all: what follows from them must be the same everywhere."""
    return commlayer.all_reduce(torch.tensor(seconds, dtype=torch.float64), commlayer.MAX, group=group).tolist()


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector stops a rank for milliseconds."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
