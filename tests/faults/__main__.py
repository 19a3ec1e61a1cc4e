"""``python -m tests.faults``: every fault on every backend, and 1,000 random schedules, into docs/reliability.md.

``--schedules N`` plays another number; on MPI it is a fifth, since its jobs take longer. The status is 1 if anything is
not as promised, and the page says what.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.faults import measure, schedules
from tests.faults.catalogue import CATALOGUE
from tests.faults.hosts import hosts, missing
from tests.faults.job import BACKENDS, ROOT, zygote
from tests.faults.measure import Row
from tests.faults.outcome import Outcome

PAGE = ROOT / "docs" / "reliability.md"
INTRODUCTION = Path(__file__).with_name("reliability.md")
HEAD = "| fault | backend | error | seconds | status | left running |\n|---|---|---|---|---|---|"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000, help="random schedules on gloo")
    wanted = parser.parse_args()
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(row, flush=True)
        if row.wrong:
            print(*row.wrong, row.outcome, sep="\n", flush=True)

    with zygote() as here:
        for name in CATALOGUE:
            for backend in BACKENDS:
                add(measure.by_a_rank(here, name, backend))
    why = missing()
    if why is None:
        with hosts(2) as (built, zygotes):
            for fault in (measure.cut_link, measure.dead_host, measure.slow_link):
                for backend in BACKENDS:
                    add(fault(built, zygotes, backend))
    random = [_random(backend, wanted.schedules // (5 if backend == "mpi" else 1)) for backend in BACKENDS]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(_page(rows, random, why))
    wrong = sum(bool(row.wrong) for row in rows) + sum(len(bad) for _, bad in random)
    print(f"wrote {PAGE.relative_to(ROOT)}; {wrong or 'nothing'} not as promised")
    return 1 if wrong else 0


def _random(backend: str, examples: int) -> tuple[str, list[str]]:
    """Play random schedules; a sentence on them, and what went wrong."""
    start, count, bad = time.monotonic(), 0, []

    def judge(schedule: dict[str, Any], outcome: Outcome, wrong: list[str]) -> None:
        nonlocal count
        count += 1
        if wrong:
            bad.append(f"{'; '.join(wrong)}: `{json.dumps(schedule)}`")
            print(bad[-1], outcome, sep="\n", flush=True)
        if count % 50 == 0:
            print(f"{backend}: {count} of {examples} schedules, {time.monotonic() - start:.0f} s", flush=True)

    with zygote() as here:
        schedules.play_all(here, backend, examples, judge)
    minutes = (time.monotonic() - start) / 60
    return f"{count:,} on {backend} in {minutes:.0f} minutes, of which {len(bad)} went wrong", bad


def _page(rows: list[Row], random: list[tuple[str, list[str]]], why: str | None) -> str:
    table = [HEAD, *map(str, rows)]
    table += [f"\n**Not as promised**: {row.fault}, {row.backend}: {'; '.join(row.wrong)}" for row in rows if row.wrong]
    played = ["; ".join(said for said, _ in random) + "."]
    played += [f"\n**Went wrong**: {schedule}" for _, bad in random for schedule in bad]
    return INTRODUCTION.read_text().format(
        machine=f"One machine with {os.cpu_count()} cores, {measure.RANKS} ranks.",
        missing="" if why is None else f"\nFaults of hosts and links could not be tried here: {why}.\n",
        table="\n".join(table),
        random="\n".join(played),
    )


if __name__ == "__main__":
    sys.exit(main())
