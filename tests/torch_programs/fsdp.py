"""FSDP2, on one axis and on two, and FSDP1."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import Transformer, fit, next_token, sample

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
ALL_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(mesh: DeviceMesh | None = None, layers: int = 1, **options: object) -> FSDPModule:
    """Each block is a unit, and so is the rest."""
    model = Transformer(layers=layers)
    for block in model.blocks:
        fully_shard(block, mesh=mesh or line(), **options)
    return fully_shard(model, mesh=mesh or line(), **options)


def trained(model: nn.Module, **options: object) -> Results:
    return fit(model, next_token, steps=2, **options)


def alone(divide_by: float | None = None) -> Results:
    """One process on everybody's samples."""
    model, size = Transformer(), dist.get_world_size()

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        return torch.stack([next_token(model, step, rank) for rank in range(size)]).sum() / (divide_by or size)

    return without_losses(fit(model, loss_of, steps=2))


def without_losses(results: Results) -> Results:
    """Each rank's is its own: one process has the mean of all."""
    return {name: value for name, value in results.items() if not name.startswith("loss")}


@program(alone)
def plain() -> Results:
    return without_losses(trained(sharded(), whole=True))


@program(cases=[("keep",), ("free",), ("pairs",)])
def after_forward(what: str) -> Results:
    """Gathered parameters stay, are freed, or are cut again over pairs of ranks only."""
    return trained(sharded(reshard_after_forward={"keep": False, "free": True, "pairs": 2}[what]))


@program(cases=[("parameters",), ("reductions_too",)], sums_in=torch.bfloat16)
def mixed_precision(what: str) -> Results:
    return trained(sharded(mp_policy=BF16 if what == "parameters" else ALL_BF16))


@program()
def clipped() -> Results:
    norms: list[torch.Tensor] = []

    def clip(model: nn.Module) -> None:
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05).full_tensor())

    return trained(sharded(), before_step=clip) | {"norm": norms[-1]}


@program(lambda: alone(divide_by=3.0), refused="PREMUL_SUM")
def divided_by_three() -> Results:
    """A factor of the user's own is PREMUL_SUM, as torchtitan's expert parallelism asks for it."""
    model = sharded()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(3.0)
    return without_losses(trained(model, whole=True))


@program()
def accumulation() -> Results:
    """Two micro-batches, the first without a reduction; layers are fetched ahead."""
    model = sharded(layers=2)
    first, second = model.blocks
    model.set_modules_to_forward_prefetch([first])
    first.set_modules_to_forward_prefetch([second])
    second.set_modules_to_backward_prefetch([first])

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        model.set_requires_gradient_sync(False)
        next_token(model, 10 * step).backward()
        model.set_requires_gradient_sync(True)
        return next_token(model, 10 * step + 1)

    return fit(model, loss_of, steps=2)


@program()
def uneven_and_frozen() -> Results:
    """Rows that do not divide by the ranks, fewer rows than ranks, and parameters without gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 1), nn.Linear(1, 7), nn.Linear(7, 12))
    model[2].requires_grad_(False)
    for layer in model:
        fully_shard(layer, mesh=line())
    return fit(fully_shard(model, mesh=line()), optimizer=torch.optim.Adam(model.parameters()))


@program()
def unshard_by_hand() -> Results:
    """Parameters are gathered asynchronously, read in full, and cut again."""
    model = sharded()
    handles = [block.unshard(async_op=True) for block in model.blocks]
    for handle in handles:
        handle.wait()
    results = {f"block {i}": block.up.weight.detach().clone() for i, block in enumerate(model.blocks)}
    for block in model.blocks:
        block.reshard()
    return results | trained(model)


@program()
def offloaded() -> Results:
    return trained(sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)))


@program()
def hybrid() -> Results:
    """HSDP: replicas of sharded models on two axes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    return trained(sharded(mesh))


@program(sums_in=torch.bfloat16)
def hybrid_in_bf16() -> Results:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return trained(sharded(mesh, mp_policy=BF16))


@program()
def full_state() -> Results:
    """Built without memory, filled from rank 0's full state, trained, and returned in full to rank 0."""
    state = Transformer().state_dict() if dist.get_rank() == 0 else {}
    with torch.device("meta"):
        model = Transformer()
    for block in model.blocks:
        fully_shard(block, mesh=line())
    fully_shard(model, mesh=line())
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    set_model_state_dict(model, state, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    results = fit(model, next_token, optimizer=optimizer, steps=2)
    results |= {f"full {name}": value for name, value in get_model_state_dict(model, options=options).items()}
    moments = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
    return results | {f"moment of {name}": state["exp_avg"] for name, state in moments.items()}


@program()
def on_some_ranks() -> Results:
    """Two ranks train a model, and the others have nothing to do with it."""
    mesh = DeviceMesh("cpu", [0, 1])
    results = trained(sharded(mesh)) if dist.get_rank() < 2 else {}
    if dist.get_rank() < 2 < dist.get_world_size():  # torch names groups by how many a rank has
        dist.destroy_process_group(mesh.get_group())
    return results


STRATEGIES = [(name,) for name in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")]


@program(cases=STRATEGIES)
def first_version(strategy: str) -> Results:
    model = FullyShardedDataParallel(
        Transformer(),
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results: Results = {}
    for step in range(2):
        optimizer.zero_grad()
        loss = next_token(model, step)
        loss.backward()
        results[f"norm {step}"] = model.clip_grad_norm_(1.0)
        optimizer.step()
        results[f"loss {step}"] = loss.detach()
    with FullyShardedDataParallel.summon_full_params(model):
        results |= {f"parameter {name}": p.detach().clone() for name, p in model.named_parameters()}
    return results | {"logits": model(sample(2, 8).abs().long()).detach()}
