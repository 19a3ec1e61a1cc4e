"""The parallel modules against torch's own, step by step in one run.

    torchrun --nproc-per-node 2 -m benchmarks.parallel
    torchrun --nproc-per-node 2 -m benchmarks.parallel --only ring --rounds 40

A step is forward and backward on gloo, with both sides' results compared first; A B A B, so that both see the same
machine. Times are medians over rounds, each the slowest rank's.

=========  ====================================  ============================================================
name       ours                                  theirs
=========  ====================================  ============================================================
data       parallel.DataParallel                 torch.nn.parallel.DistributedDataParallel
tensor     ParallelMLP                           DTensor: parallelize_module, Colwise- and RowwiseParallel
sequence   the same, sequence_parallel=True      the same, inputs and outputs sharded along the tokens
ring       context_attention, full               torch's context-parallel ring attention on the same kernel
causal     context_attention, causal, zigzag     the same with its load balancing
=========  ====================================  ============================================================
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import commlayer
from commlayer import Group, Mesh
from parallel.attention import SequenceShards, context_attention
from parallel.data import DataParallel
from parallel.tensor import ColumnParallelLinear, RowParallelLinear
from parallel.transformer import ParallelMLP

Step = Callable[[], list[Tensor]]  # one step; what both sides must agree on
Pair = tuple[Step, Step]


def data(group: Group, torch_mesh: DeviceMesh) -> Pair:
    """A stack of linear layers, 8 MiB of gradients."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.GELU())]
    plain = nn.Sequential(*layers)
    ours = DataParallel(copy.deepcopy(plain), group)
    theirs = nn.parallel.DistributedDataParallel(plain, process_group=torch_mesh.get_group())
    x = torch.randn(128, 512, generator=torch.Generator().manual_seed(group.rank))

    def step(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        model(x).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    return lambda: step(ours), lambda: step(theirs)


def tensor(group: Group, torch_mesh: DeviceMesh, *, sequence: bool = False) -> Pair:
    """Four residual MLPs of 512 → 2048 → 512 on 4 × 128 tokens."""
    plain = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(512, 2048), "down": nn.Linear(2048, 512)}) for _ in range(4))
    ours = nn.ModuleList()
    for block in plain:
        mlp = ParallelMLP(512, 2048, group=group, sequence_parallel=sequence)
        mlp.up = ColumnParallelLinear.from_linear(block["up"], group=group, sequence_parallel=sequence)
        mlp.down = RowParallelLinear.from_linear(block["down"], group=group, sequence_parallel=sequence)
        ours.append(mlp)
    layouts = {"input_layouts": Shard(1)} if sequence else {}
    back = {"output_layouts": Shard(1)} if sequence else {}
    for block in plain:
        parallelize_module(block, torch_mesh, {"up": ColwiseParallel(**layouts), "down": RowwiseParallel(**back)})
    whole = torch.randn(4, 128, 512, generator=torch.Generator().manual_seed(0))
    x = whole.chunk(group.size, 1)[group.rank].contiguous() if sequence else whole

    def step(blocks: nn.ModuleList, mlp: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        blocks.zero_grad()
        tokens = x.clone().requires_grad_()
        h = tokens
        for block in blocks:
            h = h + mlp(block, h)
        h.square().mean().backward()
        return [h.detach(), tokens.grad]  # type: ignore[list-item]

    return (
        lambda: step(ours, lambda block, h: block(h)),
        lambda: step(plain, lambda block, h: block["down"](F.gelu(block["up"](h)))),
    )


def sequence(group: Group, torch_mesh: DeviceMesh) -> Pair:
    return tensor(group, torch_mesh, sequence=True)


def ring(group: Group, torch_mesh: DeviceMesh, *, causal: bool = False) -> Pair:
    """8 heads of 64 channels, 2048 tokens over all ranks."""
    shards = SequenceShards(2048, group.size, zigzag=causal)
    generator = torch.Generator().manual_seed(group.rank)
    qkv = [torch.randn(1, 8, shards.sizes[group.rank], 64, generator=generator) for _ in range(3)]
    grad = torch.randn(qkv[0].shape, generator=generator)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    torch_ring._cp_options.enable_load_balance = causal
    pg = torch_mesh.get_group()

    def ours() -> list[Tensor]:
        q, k, v = (t.detach().requires_grad_() for t in qkv)
        out = context_attention(q, k, v, group=group, shards=shards, method="ring", causal=causal)
        out.backward(grad)
        return [out.detach(), q.grad, k.grad, v.grad]  # type: ignore[list-item]

    def forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> tuple[Tensor, ...]:
        return flash(query, key, value, 0.0, is_causal)

    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        is_causal: bool,
    ) -> tuple[Tensor, ...]:
        return flash_backward(grad_out, query, key, value, out, logsumexp, 0.0, is_causal)

    def theirs() -> list[Tensor]:
        with torch.no_grad():
            out, lse = torch_ring._templated_ring_attention(pg, 2, forward, *qkv, is_causal=causal)
            grads = torch_ring._templated_ring_attention_backward(
                pg, 2, backward, grad, "grad_out", *qkv, out, lse, is_causal=causal
            )
        return [out, *grads[:3]]

    return ours, theirs


def causal(group: Group, torch_mesh: DeviceMesh) -> Pair:
    return ring(group, torch_mesh, causal=True)


CASES = {case.__name__: case for case in (data, tensor, sequence, ring, causal)}


def measure(pair: Pair, rounds: int) -> tuple[float, float]:
    """Medians in milliseconds; raises AssertionError where the two disagree."""
    for mine, other in zip(*(step() for step in pair), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        for step, found in zip(pair, times, strict=True):
            commlayer.barrier()
            start = time.perf_counter()
            step()
            mine = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            found.append(float(commlayer.all_reduce(mine, commlayer.MAX)) * 1e3)
    ours, theirs = (statistics.median(found[2:]) for found in times)
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description="The parallel modules against torch's own")
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    group = commlayer.init("gloo")
    torch_mesh = Mesh(f"all={group.size}").to_device_mesh("cpu")
    torch.manual_seed(0)
    found = {name: measure(CASES[name](group, torch_mesh), args.rounds) for name in args.only}
    if group.rank != 0:
        return
    if args.json:
        print(json.dumps({name: {"ours": a, "theirs": b, "ratio": a / b} for name, (a, b) in found.items()}))
        return
    print(f"gloo, {group.size} ranks; medians in milliseconds of {args.rounds} interleaved steps")
    print(f"{'':12}{'ours':>10}{'theirs':>10}{'ratio':>8}")
    for name, (ours, theirs) in found.items():
        print(f"{name:12}{ours:10.2f}{theirs:10.2f}{ours / theirs:8.2f}")


if __name__ == "__main__":
    main()
