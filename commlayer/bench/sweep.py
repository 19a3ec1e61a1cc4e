"""All cases by all implementations, as a report: plain data, the same as in its JSON file."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import commlayer
from commlayer.bench.contenders import BASELINE, contenders
from commlayer.bench.limits import Floor, machine
from commlayer.bench.measure import Effort, Series, measure, speedup, summary
from commlayer.bench.operations import OPERATIONS, Case
from commlayer.capability import NAME_OF
from commlayer.errors import BackendUnavailable
from commlayer.group import Group

SCHEMA = "commlayer.bench/1"
LIMIT = "limit"
Progress = Callable[[int, str], None]  # how many cases are done, what comes now
Row = dict[str, Any]
Report = dict[str, Any]


def sweep(
    world: Group,
    cases: Sequence[Case],
    effort: Effort,
    disabled: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Report:
    """Measure every case; called by every rank, and the same report on each.

    Raises ValueError for one rank alone, BackendUnavailable on a backend that does not work on CPU tensors.
    """
    if world.size < 2:
        raise ValueError("bench: one rank alone has nobody to talk to; start two or more, as with -r 2")
    if world.device.type != "cpu":
        raise BackendUnavailable(f"bench measures CPU tensors, and backend {world.backend} works on {world.device}")
    largest = max([case.nbytes for case in cases] + [64])
    sizes = sorted({max(case.nbytes, 1 << 10) for case in cases})
    picked = sorted({sizes[place] for place in np.linspace(0, len(sizes) - 1, 6).astype(int)})
    limits = machine(world, picked, Effort(iters=7, warmup=1, check=0, seconds=0.5))
    flag = limits["latency_us"]["flag"] or 0.0
    rivals, floor = contenders(world, largest, disabled), Floor(largest)
    rows: list[Row] = []
    for number, case in enumerate(cases):
        if progress is not None:
            progress(number, str(case))
        runs = {rival.key: run for rival in rivals if (run := rival.run(case, world.rank)) is not None}
        series = measure(case, {**runs, LIMIT: floor.run(case)}, world, effort)
        hows = {rival.key: rival.how(case) for rival in rivals if rival.key in runs}
        rows += case_rows(case, series, hows, flag)
    return {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "backend": world.backend,
        "ranks": world.size,
        "baseline": BASELINE,
        "host": {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()},
        "versions": {
            "commlayer": commlayer.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            world.backend: world.version(),
        },
        "implementations": {rival.key: rival.label for rival in rivals} | {LIMIT: "limit of the machine"},
        "limits": limits,
        "rows": rows,
    }


def case_rows(case: Case, series: dict[str, Series], hows: dict[str, str], flag_us: float) -> list[Row]:
    """What was measured of one case, a row an implementation; times in microseconds, bandwidths in 1e9 bytes a second.

    The row of the limit is the floor's times, each with what a flag takes (``flag_us``).
    """
    floor = [0.0 if case.op == "barrier" else t for t in series[LIMIT].seconds]
    limit = series[LIMIT]._replace(seconds=[t + max(flag_us, 1e-3) * 1e-6 for t in floor], wrong=None)
    series = {**series, LIMIT: limit}
    base = series.get(BASELINE)
    rows = []
    for key, found in series.items():
        median, low, high, least = summary(found.seconds)
        rows.append(
            {
                "op": case.op,
                "reduce": case.reduce.name if OPERATIONS[case.op].reduces else None,
                "dtype": NAME_OF[case.dtype],
                "bytes": case.nbytes,
                "implementation": key,
                "how": hows.get(key, ""),
                "us": median * 1e6,
                "us_low": low * 1e6,
                "us_high": high * 1e6,
                "us_least": least * 1e6,
                "algbw": case.algbw(median),
                "busbw": case.busbw(median),
                "speedup": None if base is None else speedup(base.seconds, found.seconds),
                "of_limit": statistics.median(limit.seconds) / median,
                "samples": len(found.seconds),
                "calls": found.calls,
                "wrong": found.wrong,
            }
        )
    return rows


def wrong_rows(report: Report) -> list[Row]:
    """Those whose results were not right."""
    return [row for row in report["rows"] if row["wrong"]]


def cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
