"""A training step of torch's FSDP2 on the layer, over the same step on plain gloo, interleaved in one run.

    torchrun --nproc-per-node 2 benchmarks/fsdp.py            # commlayer on gloo against gloo
    mpiexec -n 2 python benchmarks/fsdp.py                    # commlayer on mpi against gloo

A stack of MLP blocks, each a unit of ``fully_shard``; medians of steps A B A B, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import commlayer


class Trained:
    """A model cut over the ranks of a process group, and one step of its training."""

    def __init__(self, group: dist.ProcessGroup, width: int, depth: int, batch: int) -> None:
        torch.manual_seed(0)
        blocks = [
            torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width))
            for _ in range(depth)
        ]
        self.model = torch.nn.Sequential(*blocks)
        mesh = DeviceMesh.from_group(group, "cpu")
        for part in [*self.model, self.model]:
            fully_shard(part, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.x = torch.randn(batch, width, generator=torch.Generator().manual_seed(dist.get_rank()))
        self.times: list[float] = []
        self.loss = 0.0

    def step(self) -> None:
        dist.barrier()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = (self.model(self.x).clone() - self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.times.append(time.perf_counter() - start)
        self.loss = loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64, help="samples per rank")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    dist.init_process_group("commlayer")
    group = dist.group.WORLD
    assert group is not None
    plain = dist.new_group(backend="gloo")
    kinds = {"commlayer": Trained(group, args.width, args.depth, args.batch)}
    kinds["gloo"] = Trained(plain, args.width, args.depth, args.batch)
    for _ in range(args.steps):
        for trained in kinds.values():
            trained.step()
    if dist.get_rank() == 0:
        medians = {name: statistics.median(trained.times[3:]) for name, trained in kinds.items()}
        ratio = medians["commlayer"] / medians["gloo"]
        million = sum(p.numel() for p in kinds["gloo"].model.parameters()) / 1e6
        result = {"backend": commlayer.world().backend, "ranks": dist.get_world_size(), "ratio": round(ratio, 3)}
        if args.json:
            print(json.dumps(result | {"seconds": medians, "loss": {k: t.loss for k, t in kinds.items()}}))
        else:
            print(f"FSDP2, {million:.1f} M parameters, {result['ranks']} ranks: commlayer on {result['backend']}")
            print(f"  {medians['commlayer'] * 1e3:.1f} ms a step, gloo {medians['gloo'] * 1e3:.1f} ms: {ratio:.3f}")
            print(f"  loss {kinds['commlayer'].loss:.6f} and {kinds['gloo'].loss:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
