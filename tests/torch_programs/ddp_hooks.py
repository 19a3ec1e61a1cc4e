"""DDP's communication hooks: callbacks on futures that start further collectives."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import (
    debugging_hooks,
    default_hooks,
    post_localSGD_hook,
    powerSGD_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook import hook_with_zero_step
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

from tests.torch_programs.catalogue import WAITS, Results, program
from tests.torch_programs.data import fit, mlp, sample

SMALL = 0.002
SKIPPED = 3


def alone(first: int, steps: int) -> dict[str, torch.Tensor]:
    """The parameters that one process has on everybody's samples, after steps from ``first`` on."""
    model, size = mlp(), dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if first == 0 else 0)
    for step in range(first, steps):
        optimizer.zero_grad()
        for rank in range(size):
            x = sample(4, 12, seed=100 * step + rank)
            ((model(x) - x.flip(-1)).square().mean() / size).backward()
        optimizer.step()
    return {f"parameter module.{name}": p.detach() for name, p in model.named_parameters()}


def parameters(results: Results) -> Results:
    return {name: value for name, value in results.items() if name.startswith("parameter")}


def trained_with(hook: object, state: object = None, bucket_cap_mb: float = SMALL, **options: object) -> Results:
    model = DDP(mlp(), bucket_cap_mb=bucket_cap_mb, **options)
    model.register_comm_hook(state, hook)
    return fit(model, steps=4)


@program()
def all_reduce() -> Results:
    return trained_with(default_hooks.allreduce_hook)


@program(sums_in=torch.float16)
def compressed_to_fp16() -> Results:
    return trained_with(default_hooks.fp16_compress_hook)


def in_bf16(state, bucket):  # DDP refuses torch's own by its name, where there is no GPU
    return default_hooks.bf16_compress_hook(state, bucket)


@program(sums_in=torch.bfloat16)
def compressed_to_bf16() -> Results:
    return trained_with(in_bf16, gradient_as_bucket_view=True)


@program(sums_in=torch.float16)
def wrapped() -> Results:
    """fp16 around a hook that is one of the user's own."""
    return trained_with(default_hooks.fp16_compress_wrapper(own), None)


def own(state, bucket):
    """Scaled before and after, with a callback on a callback."""
    work = dist.all_reduce(bucket.buffer().div_(2 * dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda f: f.value()[0] * 2).then(lambda f: f.value())


@program()
def own_hook() -> Results:
    return trained_with(own)


def power_sgd_state(**options: object) -> powerSGD_hook.PowerSGDState:
    return powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, **options)


@program()
def power_sgd() -> Results:
    """Three collectives in one bucket, the second and the third begun by callbacks of the one before."""
    return trained_with(powerSGD_hook.powerSGD_hook, power_sgd_state(min_compression_rate=0.5), bucket_cap_mb=25)


@program(sums_in=torch.float16)
def power_sgd_in_fp16() -> Results:
    hook = default_hooks.fp16_compress_wrapper(powerSGD_hook.powerSGD_hook)
    return trained_with(hook, power_sgd_state(matrix_approximation_rank=2), bucket_cap_mb=25)


@program()
def local_sgd() -> Results:
    """Reduced in pairs only, after the first step."""
    pair, _ = dist.new_subgroups(group_size=2)
    state = post_localSGD_hook.PostLocalSGDState(None, subgroup=pair, start_localSGD_iter=1)
    return trained_with(post_localSGD_hook.post_localSGD_hook, state)


@program()
def nothing() -> Results:
    return trained_with(debugging_hooks.noop_hook)


@program(lambda: alone(SKIPPED, 5), refused="may meet hangs")
def sharded_step_in_the_hook() -> Results:
    """ZeroRedundancyOptimizer's step runs bucket by bucket inside the hook, which torch refuses to one backend by name.

    The optimizer skips the steps in which DDP still arranges its buckets.
    """
    model = DDP(mlp(), bucket_cap_mb=SMALL, gradient_as_bucket_view=True, static_graph=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1)
    model.register_comm_hook(None, hook_with_zero_step(default_hooks.allreduce_hook, model, optimizer))
    return parameters(fit(model, optimizer=optimizer, steps=5))


@program(lambda: alone(0, 4), refused=WAITS)
def power_sgd_in_buckets() -> Results:
    """Callbacks of several buckets wait at once for what they began; of full rank, so that nothing is lost."""
    state = power_sgd_state(matrix_approximation_rank=32, min_compression_rate=0.1)
    return parameters(trained_with(powerSGD_hook.powerSGD_hook, state))
