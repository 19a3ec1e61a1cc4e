"""What the layer adds to NCCL: the same collectives, and the same training step, through torch.distributed and it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import commlayer
from benchmarks.gpu_timing import interleaved
from benchmarks.zero_memory import transformer
from commlayer import Group
from parallel import DataParallel, autocast

# By their names since torch 2.13, where there are any: the older ones warn, which takes its time at each call.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

KIB, MIB = 2**10, 2**20
RAW = "torch.distributed"  # what the others are compared with
Row = dict[str, Any]
Variants = dict[str, Callable[[], Tensor]]  # each returns where its result is


class Groups(NamedTuple):
    """The same ranks: of the layer; of torch.distributed on the backend itself, and on the layer."""

    ours: Group
    raw: dist.ProcessGroup
    through: dist.ProcessGroup


def groups_of(group: Group) -> Groups:
    through = commlayer.to_process_group(group)
    return Groups(group, dist.new_group(backend=group.backend), through)


class Sizes(NamedTuple):
    """``nbytes`` of the longest vector, as nccl-tests counts; blocks and width of the step's transformer."""

    nbytes: tuple[int, ...]
    width: int
    depth: int
    batch: int
    tokens: int


FULL = Sizes((*(8 * 8**i for i in range(9)), 256 * MIB), 512, 8, 16, 512)  # 8 B, 64 B … 128 MiB, and the last
QUICK = Sizes((8, 64 * KIB), 64, 2, 2, 16)


def all_reduce(x: Tensor, part: Tensor, groups: Groups) -> Variants:
    def through(group: dist.ProcessGroup, async_op: bool = False) -> Tensor:
        work = dist.all_reduce(x, group=group, async_op=async_op)
        if async_op:
            work.wait()
        return x

    return {
        RAW: lambda: through(groups.raw),
        f"{RAW}, async_op": lambda: through(groups.raw, async_op=True),
        f"{RAW} on commlayer": lambda: through(groups.through),
        "commlayer, out=": lambda: commlayer.all_reduce(x, out=x, group=groups.ours),
        "commlayer": lambda: commlayer.all_reduce(x, group=groups.ours),
    }


def all_gather(x: Tensor, part: Tensor, groups: Groups) -> Variants:
    def through(group: dist.ProcessGroup) -> Tensor:
        all_gather_single(x, part, group=group)
        return x

    return {
        RAW: lambda: through(groups.raw),
        f"{RAW} on commlayer": lambda: through(groups.through),
        "commlayer, out=": lambda: commlayer.all_gather(part, out=x, group=groups.ours),
        "commlayer": lambda: commlayer.all_gather(part, group=groups.ours),
    }


def reduce_scatter(x: Tensor, part: Tensor, groups: Groups) -> Variants:
    def through(group: dist.ProcessGroup) -> Tensor:
        reduce_scatter_single(part, x, group=group)
        return part

    return {
        RAW: lambda: through(groups.raw),
        f"{RAW} on commlayer": lambda: through(groups.through),
        "commlayer, out=": lambda: commlayer.reduce_scatter(x, out=part, group=groups.ours),
        "commlayer": lambda: commlayer.reduce_scatter(x, group=groups.ours),
    }


def all_to_all(x: Tensor, part: Tensor, groups: Groups) -> Variants:
    out = torch.empty_like(x)

    def through(group: dist.ProcessGroup) -> Tensor:
        dist.all_to_all_single(out, x, group=group)
        return out

    return {
        RAW: lambda: through(groups.raw),
        f"{RAW} on commlayer": lambda: through(groups.through),
        "commlayer, out=": lambda: commlayer.all_to_all(x, out=out, group=groups.ours),
        "commlayer": lambda: commlayer.all_to_all(x, group=groups.ours),
    }


OPERATIONS = (all_reduce, all_gather, reduce_scatter, all_to_all)


def overhead(groups: Groups, sizes: Sizes, rounds: int) -> list[Row]:
    """Microseconds a call on the host and on the device, of each operation, size and way. float32. Collective."""
    rows: list[Row] = []
    group = groups.ours
    for operation in OPERATIONS:
        for nbytes in sizes.nbytes:
            share = max(nbytes // 4 // group.size, 1)
            x, part = (torch.zeros(n, device=group.device) for n in (share * group.size, share))
            variants = operation(x, part, groups)
            agree(variants, x, part, group)
            count = 20 if nbytes <= MIB else 5
            for name, cost in interleaved(variants, group, rounds, count).items():
                rows.append({"op": operation.__name__, "bytes": x.nbytes, "way": name, **cost._asdict()})
    return rows


def agree(variants: Variants, x: Tensor, part: Tensor, group: Group) -> None:
    """All give the same bits; AssertionError where one does not. Leaves zeros behind, of which sums never grow."""
    expected = None
    for name, call in variants.items():
        for i, tensor in enumerate((x, part)):
            torch.arange(tensor.numel(), out=tensor).remainder_(13).add_(group.rank + i)
        found = call().clone()
        expected = found if expected is None else expected
        assert torch.equal(found, expected), f"{name} differs from {RAW}"
    x.zero_()
    part.zero_()


def step(groups: Groups, sizes: Sizes, rounds: int) -> list[Row]:
    """Milliseconds of a training step of a transformer, in bfloat16 on a GPU, with DDP on the backend and with ours.

    Forward, backward with the gradients' mean in buckets of 25 MiB, fused AdamW; nothing is captured as a CUDA graph.
    """
    group, device = groups.ours, groups.ours.device
    torch.manual_seed(0)
    plain = transformer(sizes.width, sizes.depth).to(device)
    ddp = partial(nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True)
    models = {
        f"DDP on {group.backend}": ddp(copy.deepcopy(plain), process_group=groups.raw),
        f"DDP on commlayer on {group.backend}": ddp(copy.deepcopy(plain), process_group=groups.through),
        "commlayer DataParallel": DataParallel(copy.deepcopy(plain), group),
    }
    torch.manual_seed(group.rank)
    x = torch.randn(sizes.batch, sizes.tokens, sizes.width, device=device)
    calls = {name: training(model, x) for name, model in models.items()}
    first = None
    for name, call in calls.items():
        call()
        mine = torch.cat([p.grad.flatten() for p in models[name].parameters() if p.grad is not None]).float()
        first = mine if first is None else first
        assert (mine - first).norm() <= 1e-2 * first.norm(), f"{name}: other gradients than those of DDP"
    parameters = sum(p.numel() for p in plain.parameters())
    costs = interleaved(calls, group, rounds, count=2, asleep=False)
    return [
        {"way": name, "parameters": parameters, "host_ms": cost.host / 1e3, "device_ms": cost.device / 1e3}
        for name, cost in costs.items()
    ]


def training(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    amp = "none" if x.device.type == "cpu" else "bf16"

    def one() -> None:
        optimizer.zero_grad()
        with autocast(amp, x.device):
            loss = (model(x) - x).float().square().mean()
        loss.backward()
        optimizer.step()

    return one
