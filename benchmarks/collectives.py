"""The whole sweep: every operation, 8 bytes to 256 MiB, three dtypes, 2 and 4 ranks, on MPI and on gloo.

    python -m benchmarks.collectives                                   # all of it: hours
    python -m benchmarks.collectives --ranks 2 --backends mpi -- -f 8  # what follows -- is for commlayer bench
    python -m benchmarks.collectives --save                            # into benchmarks/results/collectives-*.json

A run is ``commlayer bench`` (see its --help), with each emulation as one more implementation; ``--report FOLDER`` makes
a folder of plots of each.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DTYPES = "float32,bfloat16,int32"
# For the first operation that each line names: the planner then takes one emulation after the other.
DISABLED = (
    "all_reduce",
    "all_reduce,reduce_scatter",
    "all_gather",
    "all_gather,send",
    "reduce_scatter",
    "reduce_scatter,send,all_to_all",
    "all_to_all",
    "all_to_all,send",
    "all_to_all,send,all_gather",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "scatter,send",
    "barrier",
)


def command(ranks: int, backend: str, rest: list[str]) -> list[str]:
    emulations = [word for text in DISABLED for word in ("--disable", text)]
    which = ["--ops", "all", "-d", DTYPES, *emulations, *rest, "-r", str(ranks), "--backend", backend]
    return [sys.executable, "-m", "commlayer", "bench", *which]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--backends", nargs="+", default=["mpi", "gloo"])
    parser.add_argument("--save", action="store_true", help=f"write JSON into {RESULTS.name}/")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write plots into folders of this one")
    parser.add_argument("rest", nargs="*", metavar="OPTION", help="after --: options for commlayer bench")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    failed = False
    for ranks in args.ranks:
        for backend in args.backends:
            name = f"collectives-{backend}-{ranks}"
            rest = list(args.rest)
            if args.save:
                rest += ["--json", str(RESULTS / f"{name}.json")]
            if args.report:
                args.report.mkdir(parents=True, exist_ok=True)
                rest += ["--report", str(args.report / name)]
            line = command(ranks, backend, rest)
            print(f"$ {shlex.join(['commlayer', *line[3:]])}", flush=True)
            failed = subprocess.run(line, check=False).returncode != 0 or failed
    sys.exit(failed)


if __name__ == "__main__":
    main()
