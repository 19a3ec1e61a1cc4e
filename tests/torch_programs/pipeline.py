"""Pipelining: each schedule of torch, with stages whose shapes it finds out by messages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import sample

WIDTH, MICRO_BATCHES = 12, 8


def layers(count: int) -> list[nn.Module]:
    """Those of all stages, on every rank."""
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)]


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def data(step: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows = 2 * MICRO_BATCHES
    return sample(rows, WIDTH, seed=10 * step + seed), sample(rows, WIDTH, seed=10 * step + seed + 500)


ONE_STAGE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
SEVERAL = {
    "interleaved": ScheduleInterleaved1F1B,
    "looped": ScheduleLoopedBFS,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


def places(kind: str, size: int) -> list[list[int]]:
    """The stages of each rank: in turns, or down and up again in the shape of a V."""
    if kind in ONE_STAGE:
        return [[rank] for rank in range(size)]
    second = [2 * size - 1 - rank if kind in ("zbv", "dualpipev") else size + rank for rank in range(size)]
    return [[rank, second[rank]] for rank in range(size)]


def alone(kind: str) -> Results:
    """All layers in one process; the gradient is the mean over micro-batches."""
    size = dist.get_world_size()
    count = size if kind in ONE_STAGE else 2 * size
    stages = layers(count)
    results: Results = {}
    for step in range(2):
        for stage in stages:
            stage.zero_grad()
        x, target = data(step)
        for stage in stages:
            x = stage(x)
        loss_of(x, target).backward()
        results |= train_step(stages, places(kind, size)[dist.get_rank()], step)
        last = count - 1 in places(kind, size)[dist.get_rank()]
        results[f"loss {step}"] = loss_of(x, target).detach() if last else "elsewhere"
    return results


def train_step(stages: list[nn.Module], mine: list[int], step: int) -> Results:
    """Gradients of this rank's stages; then all of them take a step."""
    results = {
        f"gradient {step} of {stage} {name}": p.grad.clone()
        for stage in mine
        for name, p in stages[stage].named_parameters()
    }
    with torch.no_grad():
        for stage in stages:
            for p in stage.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    return results


@program(alone, cases=[(kind,) for kind in [*ONE_STAGE, *SEVERAL]])
def schedule(kind: str) -> Results:
    rank, size = dist.get_rank(), dist.get_world_size()
    numbers = places(kind, size)[rank]
    count = size * len(numbers)
    stages = layers(count)
    parts = [PipelineStage(stages[number], number, count, torch.device("cpu")) for number in numbers]
    if kind in ONE_STAGE:
        plan = ONE_STAGE[kind](parts[0], MICRO_BATCHES, loss_fn=loss_of)
    else:
        plan = SEVERAL[kind](parts, MICRO_BATCHES, loss_fn=loss_of)
    results: Results = {}
    for step in range(2):
        for stage in stages:
            stage.zero_grad()
        x, target = data(step)
        losses: list[torch.Tensor] = []
        last = count - 1 in numbers
        given = {"target": target, "losses": losses} if last else {}
        plan.step(*([x] if rank == 0 else []), **given)
        results |= train_step(stages, numbers, step)
        results[f"loss {step}"] = torch.stack(losses).mean().detach() if last else "elsewhere"
    return results


@program()
def with_fsdp() -> Results:
    """Stages over the columns of a grid of ranks, each sharded along the other axis; at two ranks only stages."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pp", "dp"))
    number, seed = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module = fully_shard(layers(2)[number], mesh=mesh["dp"])
    stage = PipelineStage(module, number, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    plan = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_of)
    x, target = data(0, seed)
    losses: list[torch.Tensor] = []
    plan.step(*([x] if number == 0 else []), **({"target": target, "losses": losses} if number == 1 else {}))
    results = {name: p.grad.full_tensor() for name, p in module.named_parameters()}
    return results | {"loss": torch.stack(losses).mean().detach() if number == 1 else "elsewhere"}
