"""Run the programs, one after the other, and save what each computed or how it failed, a file for each rank."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.torch_programs.catalogue import WAITS, Program, Results, programs

TIMEOUT = timedelta(seconds=20)  # of one operation: a rank that failed keeps the others waiting so long
HANGS = 90.0  # seconds after which a program is taken for one that never ends


class World:
    """The default group, which is begun anew after a failure: what failed may have left messages under way."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        dist.init_process_group(backend, timeout=TIMEOUT)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.store = dist.distributed_c10d._get_default_store()
        self.round = 0

    def agree(self, fine: bool) -> bool:
        """Whether all ranks say so. By the store alone: the group may be out of order."""
        self.round += 1
        self.store.set(f"{self.round}/{self.rank}", "fine" if fine else "failed")
        return all(self.store.get(f"{self.round}/{rank}") == b"fine" for rank in range(self.size))

    def renew(self) -> None:
        dist.destroy_process_group()
        store = dist.PrefixStore(f"round {self.round}", self.store)
        dist.init_process_group(self.backend, store=store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)


def attempt(program: Program) -> Results:
    """The record of one program: its results, or its error, and the seconds it took."""
    torch.manual_seed(0)
    faulthandler.dump_traceback_later(HANGS, exit=True)
    start = time.monotonic()
    try:
        record = {"results": program.run()}
    except Exception as error:
        record = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    record["seconds"] = time.monotonic() - start
    faulthandler.cancel_dump_traceback_later()
    return record


def judged(program: Program) -> Results:
    """What to compare a record of this program with, beside the reference's."""
    alone = None if program.alone is None else program.alone()
    return {"alone": alone, "refused": program.refused, "moves": program.moves, "sums_in": program.sums_in}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torch_programs", description=__doc__)
    parser.add_argument("--backend", required=True, help="for init_process_group")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results of each rank")
    parser.add_argument("--only", default="", help="programs whose name contains this, or any of a,b,c")
    parser.add_argument("--but", help="programs to leave out, in the same way")
    parser.add_argument("--import", dest="module", help="a module to import first, such as one that adds a backend")
    parser.add_argument("--reference", action="store_true", help="leave out what waits for ever on torch's own backend")
    args = parser.parse_args()
    if args.module:
        importlib.import_module(args.module)
    world = World(args.backend)
    records: dict[str, Results] = {}
    left_out = {found.name for found in programs(args.but)} if args.but else set()
    for program in programs(args.only):
        if program.name in left_out:
            continue
        if args.reference and program.refused == WAITS:
            records[program.name] = {"error": WAITS} | judged(program)
            continue
        record = records[program.name] = attempt(program) | judged(program)
        if not world.agree("error" not in record):
            world.renew()
        if world.rank == 0:
            said = record.get("error", "").partition("\n")[0]
            print(f"{record['seconds']:7.3f} s  {program.name}  {said}", file=sys.stderr, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(records, args.out / f"rank-{world.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
