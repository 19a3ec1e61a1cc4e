"""What a call through the layer costs over the raw backend's own, interleaved in one run.

    mpiexec -n 2 python benchmarks/overhead.py            # over mpi4py's Allreduce
    torchrun --nproc-per-node 2 benchmarks/overhead.py    # over torch.distributed on gloo

Medians of a 16-byte all_reduce, in microseconds; A B A B, so that all see the same machine. With more ranks than
cores mpi4py's call, which spins, tells little: mpiexec -n 4 python benchmarks/overhead.py --gloo --elements 262144
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import commlayer


def raw_mpi(x: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    send, receive = ([MPI.buffer.fromaddress(t.data_ptr(), t.nbytes), MPI.FLOAT] for t in (x, out))
    return lambda: comm.Allreduce(send, receive)


def through_torch(out: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    return lambda: dist.all_reduce(out, group=group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=4, help="float32 elements (default 4: 16 bytes)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=50, help="calls a round")
    parser.add_argument("--gloo", action="store_true", help="under MPI: compare with torch.distributed on gloo")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    group = commlayer.init()
    x, out = torch.zeros(args.elements), torch.zeros(args.elements)
    ours = commlayer.to_process_group(group)
    if group.backend == "mpi" and not args.gloo:
        raw, name = raw_mpi(x, out), "mpi4py Allreduce"
    else:
        raw, name = through_torch(out, dist.new_group(backend="gloo")), "torch.distributed on gloo"
    calls = {
        name: raw,
        "torch.distributed on commlayer": through_torch(out, ours),
        "commlayer all_reduce(x)": lambda: commlayer.all_reduce(x),
        "commlayer all_reduce(x, out=out)": lambda: commlayer.all_reduce(x, out=out),
    }
    wall: dict[str, list[float]] = {label: [] for label in calls}
    cpu: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(args.rounds):
        for label, call in calls.items():
            commlayer.barrier()
            call()
            busy = time.thread_time()
            for _ in range(args.calls):
                start = time.perf_counter()
                call()
                wall[label].append((time.perf_counter() - start) * 1e6)
            cpu[label].append((time.thread_time() - busy) / args.calls * 1e6)
    if group.rank == 0:
        us = {label: {"wall": statistics.median(wall[label]), "cpu": statistics.median(cpu[label])} for label in calls}
        if args.json:
            print(json.dumps({"backend": group.backend, "ranks": group.size, "bytes": x.nbytes, "us": us}))
            return
        print(f"{x.nbytes} bytes, {group.size} ranks, {group.backend} ({group.version()}); medians in microseconds")
        print(f"  {'':34}    wall             CPU of the calling thread")
        for label, found in us.items():
            ahead = {kind: found[kind] - us[name][kind] for kind in found}
            print(f"  {label:34} {found['wall']:8.1f} {ahead['wall']:+7.1f} {found['cpu']:10.1f} {ahead['cpu']:+7.1f}")


if __name__ == "__main__":
    main()
