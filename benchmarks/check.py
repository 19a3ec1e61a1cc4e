"""Has anything become slow? Reruns a short list and compares ratios with the recorded ones: make bench-check.

    python -m benchmarks.check             # exit status 1 if something takes more than 1.6 times what it took
    python -m benchmarks.check --record    # what is measured now is the record from here on

Two ranks, on MPI and on gloo, five operations from 8 bytes to 16 MiB, by ``commlayer bench`` in a process of its own.
What counts is how long the layer takes against gloo and mpi4py, which ran in turn with it. Since other load can only
add to a time, a ratio is that of the least times; what looks slow is measured again, up to three times in all, and
the least of all counts. It has to be slow against each of gloo and mpi4py. Ratios of another machine are another
machine's: record there, and compare with that. A run during which other programs had more than 15 % of these cores
convicts nobody and is no record; where there are only such runs, the exit status is 2.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "results" / "guard.json"
SCHEMA = "commlayer.guard/1"
BACKENDS = ("mpi", "gloo")
OURS = ("commlayer", "symmetric")
BASES = ("gloo", "mpi4py")
TOLERANCE = 1.6  # times the recorded ratio
ATTEMPTS = 3
RUNS = 5  # in all, with those that others have disturbed
BUSY = 0.15  # the part of the cores that others may have
OPS = "all_reduce,reduce_scatter,all_gather,all_to_all,broadcast"
SIZES = ("-b", "8", "-e", "16M", "-f", "128")

Least = dict[tuple[str, str], float]  # (operation and size, implementation) -> microseconds
Ratios = dict[str, dict[str, float]]  # operation, size and implementation of ours -> time over that of each base


def run(backend: str) -> tuple[dict[str, Any], float]:
    """A report of ``commlayer bench``, and the part of the cores that others had meanwhile; exits if it fails."""
    before = usage()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        options = ["--ops", OPS, *SIZES, "-n", "15", "-r", "2", "--backend", backend, "--json", str(file)]
        command = [sys.executable, "-m", "commlayer", "bench", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            sys.exit(
                f"{' '.join(command[1:])}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        cores, own, wall = (now - then for now, then in zip(usage(), before, strict=True))
        others = max(0.0, (cores - own) / wall / len(os.sched_getaffinity(0)))
        return json.loads(file.read_text(encoding="utf-8")), others


def usage() -> tuple[float, float, float]:
    """Seconds that this process' cores have worked, that its children have, and the time."""
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    # user, nice and system; and, after idle and iowait, interrupts and what other virtual machines took (proc(5)).
    ticks = sum(int(line[column]) for line in lines if line[0] in mine for column in (1, 2, 3, 6, 7, 8))
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ticks / os.sysconf("SC_CLK_TCK"), children.ru_utime + children.ru_stime, time.monotonic()


def pooled(least: Least, report: Mapping[str, Any]) -> Least:
    """The least times so far, and those of one more report."""
    result = dict(least)
    for row in report["rows"]:
        key = f"{row['op']} {row['dtype']} {row['bytes']}", row["implementation"]
        result[key] = min(row["us_least"], result.get(key, row["us_least"]))
    return result


def ratios(least: Least) -> Ratios:
    return {
        f"{case} {ours}": {base: us / least[case, base] for base in BASES if (case, base) in least}
        for (case, ours), us in least.items()
        if ours in OURS
    }


def slower(recorded: Ratios, found: Ratios) -> dict[str, float]:
    """What is slow, and how many times as slow as recorded: against that base which thinks best of it.

    What was recorded and was not measured now is infinitely slow.
    """
    worse = {}
    for name, bases in recorded.items():
        now = found.get(name, {})
        times = min((now[base] / ratio for base, ratio in bases.items() if base in now), default=float("inf"))
        if times > TOLERANCE:
            worse[name] = times
    return worse


def record() -> None:
    made: dict[str, Any] = {"schema": SCHEMA, "ratios": {}}
    for backend in BACKENDS:
        least: Least = {}
        for attempt in range(ATTEMPTS):
            print(f"{backend}: {attempt + 1} of {ATTEMPTS}", flush=True)
            report, others = run(backend)
            if others > BUSY:
                sys.exit(f"other programs had {others:.0%} of these cores: record when nothing else runs")
            least = pooled(least, report)
        made |= {key: report[key] for key in ("date", "host", "versions")}
        rounded = {name: {base: round(value, 4) for base, value in row.items()} for name, row in ratios(least).items()}
        made["ratios"][backend] = rounded
    RECORDS.parent.mkdir(exist_ok=True)
    RECORDS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {RECORDS}")


def check(recorded: Mapping[str, Any]) -> int:
    """Print what has become slow. 0 if nothing has, 1 if something has, 2 if too much else was going on to tell."""
    status = 0
    for backend in BACKENDS:
        least: Least = {}
        quiet = 0
        for _ in range(RUNS):
            report, others = run(backend)
            least, quiet = pooled(least, report), quiet + (others <= BUSY)
            found = ratios(least)
            worse = slower(recorded["ratios"][backend], found)
            if not worse or quiet == ATTEMPTS:
                break
            print(f"{backend}: {len(worse)} look slow, while others had {others:.0%} of the cores", flush=True)
        if report["host"] != recorded["host"]:
            print(f"note: recorded on {recorded['host']}, this is {report['host']}: record here with --record")
        for name, times in worse.items():
            before, now = recorded["ratios"][backend][name], found.get(name, {})
            told = [
                f"{now.get(base, float('nan')):.3g} of {base}'s time, was {was:.3g}" for base, was in before.items()
            ]
            verdict = "SLOW" if quiet == ATTEMPTS else "perhaps slow"
            print(f"{verdict} on {backend}: {name}, {times:.2f} times as slow: {'; '.join(told)}")
        if not worse:
            print(f"{backend}: {len(found)} ratios within {TOLERANCE} of the recorded ones")
        elif quiet < ATTEMPTS:
            print(f"{backend}: too much else was going on to tell, in {RUNS - quiet} of {RUNS} runs")
            status = status or 2
        else:
            status = 1
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="make what is measured now the record")
    if parser.parse_args().record:
        return record()
    if not RECORDS.exists():
        sys.exit(f"{RECORDS}: no records yet; python -m benchmarks.check --record writes them")
    sys.exit(check(json.loads(RECORDS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
