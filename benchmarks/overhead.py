"""What a call through the layer costs over the raw backend's own, interleaved in one run.

    mpiexec -n 2 python benchmarks/overhead.py            # over mpi4py's Allreduce
    torchrun --nproc-per-node 2 benchmarks/overhead.py    # over torch.distributed on gloo

Medians of an 8-byte all_reduce, in microseconds; A B A B, so that both see the same machine. With more ranks than
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


def raw_torch(x: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    def call() -> None:
        out.copy_(x)  # torch reduces in place; the layer's function leaves its input alone
        dist.all_reduce(out)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=2, help="float32 elements (default 2: 8 bytes)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=50, help="calls a round")
    parser.add_argument("--gloo", action="store_true", help="under MPI: compare with torch.distributed on gloo")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    group = commlayer.init()
    x, out = torch.ones(args.elements), torch.empty(args.elements)
    if group.backend == "mpi" and not args.gloo:
        raw, name = raw_mpi(x, out), "mpi4py Allreduce"
    else:
        commlayer.Mesh(f"dp={group.size}").to_device_mesh()  # starts torch.distributed over the same ranks
        raw, name = raw_torch(x, out), f"torch.distributed on {dist.get_backend()}"
    calls = {
        name: raw,
        "commlayer all_reduce(x)": lambda: commlayer.all_reduce(x),
        "commlayer all_reduce(x, out=out)": lambda: commlayer.all_reduce(x, out=out),
    }
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(args.rounds):
        for label, call in calls.items():
            commlayer.barrier()
            call()
            for _ in range(args.calls):
                start = time.perf_counter()
                call()
                times[label].append((time.perf_counter() - start) * 1e6)
    if group.rank == 0:
        medians = {label: statistics.median(values) for label, values in times.items()}
        if args.json:
            print(json.dumps({"backend": group.backend, "ranks": group.size, "bytes": x.nbytes, "us": medians}))
            return
        print(f"{x.nbytes} bytes, {group.size} ranks, {group.backend} ({group.version()}); medians in microseconds")
        for label, median in medians.items():
            print(f"  {label:36} {median:8.1f}   {median - medians[name]:+7.1f}")


if __name__ == "__main__":
    main()
