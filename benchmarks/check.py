"""Has anything become slow? Reruns a short list and compares ratios with the recorded ones: make bench-check.

    python -m benchmarks.check             # exit status 1 if something is more than 1.6 times as slow as it was
    python -m benchmarks.check --record    # what is measured now is the record from here on

Two ranks, on MPI and on gloo, five operations from 8 bytes to 16 MiB, by ``commlayer bench`` in a process of its own.
What counts is how long the layer takes against gloo and mpi4py, which ran in turn with it. Since other load can only
add to a time, a ratio is that of the least times; what looks slow is measured again, up to three times in all, and
the least of all counts. It has to be slow against each of gloo and mpi4py. Ratios of another machine are another
machine's: record there, and compare with that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
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
OPS = "all_reduce,reduce_scatter,all_gather,all_to_all,broadcast"
SIZES = ("-b", "8", "-e", "16M", "-f", "128")

Least = dict[tuple[str, str], float]  # (operation and size, implementation) -> microseconds
Ratios = dict[str, dict[str, float]]  # operation, size and implementation of ours -> time over that of each base


def run(backend: str) -> dict[str, Any]:
    """A report of ``commlayer bench``; exits with its message if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        options = ["--ops", OPS, *SIZES, "-n", "15", "-r", "2", "--backend", backend, "--json", str(file)]
        command = [sys.executable, "-m", "commlayer", "bench", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            sys.exit(
                f"{' '.join(command[1:])}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return json.loads(file.read_text(encoding="utf-8"))


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
            report = run(backend)
            least = pooled(least, report)
        made |= {key: report[key] for key in ("date", "host", "versions")}
        rounded = {name: {base: round(value, 4) for base, value in row.items()} for name, row in ratios(least).items()}
        made["ratios"][backend] = rounded
    RECORDS.parent.mkdir(exist_ok=True)
    RECORDS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {RECORDS}")


def check(recorded: Mapping[str, Any]) -> bool:
    """Whether nothing has become slow; prints what has."""
    fine = True
    for backend in BACKENDS:
        least: Least = {}
        worse: dict[str, float] = {}
        for _ in range(ATTEMPTS):
            report = run(backend)
            least = pooled(least, report)
            found = ratios(least)
            worse = slower(recorded["ratios"][backend], found)
            if not worse:
                break
            print(f"{backend}: {len(worse)} look slow, on {report['date']}", flush=True)
        if report["host"] != recorded["host"]:
            print(f"note: recorded on {recorded['host']}, this is {report['host']}: record here with --record")
        for name, times in worse.items():
            before, now = recorded["ratios"][backend][name], found.get(name, {})
            told = ", ".join(
                f"{now.get(base, float('nan')):.3g} of {base}'s time, was {before[base]:.3g}" for base in before
            )
            print(f"SLOW on {backend}: {name}, {times:.2f} times as slow: {told}")
        if not worse:
            print(f"{backend}: {len(found)} ratios within {TOLERANCE} of the recorded ones")
        fine = fine and not worse
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="make what is measured now the record")
    if parser.parse_args().record:
        return record()
    if not RECORDS.exists():
        sys.exit(f"{RECORDS}: no records yet; python -m benchmarks.check --record writes them")
    sys.exit(0 if check(json.loads(RECORDS.read_text(encoding="utf-8"))) else 1)


if __name__ == "__main__":
    main()
