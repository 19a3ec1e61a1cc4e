"""A training step under DataParallel and ZeRO, against torch's DDP, ZeroRedundancyOptimizer and FSDP2, in one run.

    torchrun --nproc-per-node 2 -m benchmarks.zero                  # step time: commlayer on gloo against plain gloo
    torchrun --nproc-per-node 2 -m benchmarks.zero --only FSDP2     # its memory
    python -m benchmarks.zero --memory                              # memory of all, each in processes of its own

A stack of transformer blocks of 25 million parameters in float32 with AdamW (fused, in all variants). Times are
medians of steps A B C A B C, each the slowest rank's: ``step`` by the clock, and ``processor``, what all threads of a
rank have worked, which says more on a busy machine. Memory, on the fullest rank and from the second step on:
``tensors``, the bytes of all that are alive at the peak, and ``process``, how far the process grows beyond what it
had before there was a model (VmHWM).

==============  =====================================================================  =============
variant                                                                                compared with
==============  =====================================================================  =============
DataParallel    parallel.DataParallel, with all of the optimiser on every rank         DDP
ZeRO 1, ZeRO 2  parallel.ZeRO, buckets of 8 MiB                                        ZRO
ZeRO 3          the same, a block is a unit                                            FSDP2
FSDP2           fully_shard of each block and of the root
ZRO             ZeroRedundancyOptimizer and DistributedDataParallel, 25 MiB, as views
DDP             DistributedDataParallel, with all of the optimiser on every rank
==============  =====================================================================  =============
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import commlayer
from benchmarks.memory import MIB
from benchmarks.zero_memory import process, transformer
from parallel import DataParallel, ZeRO

ADAMW = {"lr": 1e-4, "fused": True}
RIVALS = {"DataParallel": "DDP", "ZeRO 1": "ZRO", "ZeRO 2": "ZRO", "ZeRO 3": "FSDP2"}
Made = tuple[nn.Module, Optimizer]
Make = Callable[[nn.Sequential, ProcessGroup], Made]


def zero(stage: int) -> Make:
    def make(model: nn.Sequential, _: ProcessGroup) -> Made:
        optimizer = AdamW(model.parameters(), **ADAMW)
        return ZeRO(model, optimizer, stage=stage), optimizer

    return make


def data(model: nn.Sequential, _: ProcessGroup) -> Made:
    return DataParallel(model), AdamW(model.parameters(), **ADAMW)


def fsdp2(model: nn.Sequential, gloo: ProcessGroup) -> Made:
    mesh = DeviceMesh.from_group(gloo, "cpu")
    for part in [*model, model]:
        fully_shard(part, mesh=mesh)
    return model, AdamW(model.parameters(), **ADAMW)


def ddp(model: nn.Sequential, gloo: ProcessGroup) -> Made:
    return _ddp(model, gloo), AdamW(model.parameters(), **ADAMW)


def zro(model: nn.Sequential, gloo: ProcessGroup) -> Made:
    options: dict[str, Any] = {"optimizer_class": AdamW, "process_group": gloo, **ADAMW}
    return _ddp(model, gloo), ZeroRedundancyOptimizer(model.parameters(), **options)


def _ddp(model: nn.Sequential, gloo: ProcessGroup) -> nn.Module:
    return DistributedDataParallel(model, process_group=gloo, gradient_as_bucket_view=True)


VARIANTS: dict[str, Make] = {
    "DataParallel": data,
    "ZeRO 1": zero(1),
    "ZeRO 2": zero(2),
    "ZRO": zro,
    "ZeRO 3": zero(3),
    "FSDP2": fsdp2,
    "DDP": ddp,
}


class Training:
    """One variant, and a step of it."""

    def __init__(self, make: Make, gloo: ProcessGroup, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.model, self.optimizer = make(transformer(args.width, args.depth), gloo)
        draw = torch.Generator().manual_seed(dist.get_rank())
        self.x = torch.randn(args.batch, args.tokens, args.width, generator=draw)
        self.times: list[tuple[float, float]] = []  # by the clock, and of the processor
        self.loss = 0.0

    def step(self) -> None:
        dist.barrier()
        start, worked = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        loss = (self.model(self.x) - self.x.roll(1, 1)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.times.append((time.perf_counter() - start, time.process_time() - worked))
        self.loss = loss.item()


class Tensors(TorchDispatchMode):
    """Bytes of all storages alive; as ``benchmarks.memory.Alive``, and right for FSDP2.

    That empties and refills storages in place, and has tensors inside of others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                storage = (leaf._local_tensor if isinstance(leaf, DTensor) else leaf).untyped_storage()
                self._seen[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self._alive()))
        return result

    def _alive(self) -> Iterator[torch.UntypedStorage]:
        for key, seen in list(self._seen.items()):
            storage = seen()
            if storage is None:
                self._seen.pop(key, None)  # gloo's own thread comes here, too
            else:
                yield storage


def memory(name: str, gloo: ProcessGroup, args: argparse.Namespace) -> dict[str, float]:
    """MiB at the peak of a step."""
    warm = Training(VARIANTS["DDP"], gloo, argparse.Namespace(**vars(args) | {"width": 64, "depth": 1}))
    warm.step()  # what the first use of libraries takes is not the variant's
    del warm
    gc.collect()
    before = process("VmRSS")
    training = Training(VARIANTS[name], gloo, args)
    training.step()
    training.step()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    training.step()
    training.step()
    grown = process("VmHWM") - before
    del training
    gc.collect()
    with Tensors() as tensors:
        training = Training(VARIANTS[name], gloo, args)
        training.step()
        training.step()
        tensors.peak = 0
        training.step()
    return {"tensors": largest(tensors.peak) / MIB, "process": largest(grown) / MIB}


def largest(mine: float) -> float:
    """Of all ranks."""
    return float(commlayer.all_reduce(torch.tensor(mine, dtype=torch.float64), commlayer.MAX))


def times(gloo: ProcessGroup, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of a step; AssertionError where two variants do not compute the same."""
    trainings = {name: Training(make, gloo, args) for name, make in VARIANTS.items()}
    first = next(iter(trainings.values()))
    for _ in range(args.steps):
        for training in trainings.values():
            training.step()
        for name, training in trainings.items():
            assert abs(training.loss / first.loss - 1) < 1e-4, f"{name}: loss {training.loss}, not {first.loss}"
    found = {}
    for name, training in trainings.items():
        clock, worked = zip(*(map(largest, both) for both in training.times[3:]), strict=True)
        found[name] = {"step": 1e3 * statistics.median(clock), "processor": 1e3 * statistics.median(worked)}
    return found


def run_all(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The memory of every variant, in processes of its own."""
    found = {}
    sizes = [str(x) for key in ("width", "depth", "batch", "tokens") for x in (f"--{key}", getattr(args, key))]
    launch = [sys.executable, "-m", "commlayer", "launch", "-n", "2", "--backend", "gloo", "--", "-m"]
    # What is freed goes back to the system at once, whichever variant it is.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    for name in VARIANTS:
        command = [*launch, "benchmarks.zero", "--only", name, "--json", *sizes]
        out = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(out.splitlines()[-1])
    return found


def report(found: dict[str, dict[str, float]], unit: str) -> None:
    """Each figure, and for ours the ratio to the rival's."""
    for name, row in found.items():
        rival = RIVALS.get(name)
        ratios = [f"{row[key] / found[rival][key]:.3f}" for key in row] if rival in found else []
        figures = ", ".join(f"{key} {value:.1f} {unit}" for key, value in row.items())
        print(f"  {name:14}{figures}" + (f";  {' and '.join(ratios)} of {rival}" if ratios else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step under DataParallel and ZeRO, against torch's own")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1, help="sequences per rank")
    parser.add_argument("--tokens", type=int, default=64, help="of each")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--memory", action="store_true", help="of every variant; starts the ranks itself")
    parser.add_argument("--only", choices=VARIANTS, help="the memory of this variant")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        found = run_all(args)
        print(json.dumps(found)) if args.json else report(found, "MiB")
        return
    dist.init_process_group("commlayer")
    gloo = dist.new_group(backend="gloo")
    assert isinstance(gloo, ProcessGroup)
    if args.only:
        found, unit = {args.only: memory(args.only, gloo, args)}, "MiB"
    else:
        found, unit = times(gloo, args), "ms"
    if dist.get_rank() == 0:
        if args.json:
            print(json.dumps(found[args.only] if args.only else found))
        else:
            print(f"{dist.get_world_size()} ranks, ZeRO on {commlayer.world().backend}")
            report(found, unit)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
