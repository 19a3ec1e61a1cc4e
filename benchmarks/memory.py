"""Memory per rank of a training step of the ViT, under tensor and context parallelism.

    python -m benchmarks.memory --json alone.json
    mpiexec -n 4 python -m benchmarks.memory --mesh "tp=4" --beside alone.json

Counted are the bytes of all tensors alive, whatever the allocator makes of them: parameters, gradients and Adam's
state; activations that the forward pass leaves for backward; and the peak over the whole step.
"""

from __future__ import annotations

import argparse
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import commlayer
from commlayer import Mesh
from models.vit import ViT, ViTConfig
from parallel import DataParallel

MIB = 2**20


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations inside have made and that are still alive; ``peak`` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen[key] = weakref.finalize(storage, self._gone, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory per rank of a training step of the ViT")
    parser.add_argument("--mesh", default="dp=-1", help='such as "dp=1 cp=2 tp=2"')
    parser.add_argument("--embed", type=int, default=768)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--grid", type=int, nargs=2, default=(120, 240), help="points (default 120 240)")
    parser.add_argument("--batch", type=int, default=2, help="samples of each dp rank")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--beside", type=Path, help="figures of another run, to give ratios to")
    args = parser.parse_args()
    group = commlayer.init()
    mesh = Mesh(args.mesh, world_size=group.size)
    config = ViTConfig(tuple(args.grid), 20, 20, embed=args.embed, depth=args.depth, heads=8)
    with Alive() as alive:
        model = ViT(config, mesh, sequence_parallel=args.sequence_parallel, recompute=args.recompute)
        model = DataParallel(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        x = torch.randn(args.batch, 20, *config.grid)
        for _ in range(2):  # Adam's state comes with the first step
            optimizer.zero_grad()
            state, alive.peak = alive.now, 0
            loss = model(x).square().mean()
            forward = alive.now
            loss.backward()
            del loss
            optimizer.step()
    mine = torch.tensor([state, forward - state, alive.peak], dtype=torch.float64) / MIB
    found = dict(zip(("state", "activations", "peak"), commlayer.all_reduce(mine, commlayer.MAX).tolist(), strict=True))
    if group.rank == 0:
        report(found, args, mesh)


def report(found: dict[str, float], args: argparse.Namespace, mesh: Mesh) -> None:
    before = json.loads(args.beside.read_text()) if args.beside else {}
    print(f"ViT of embed {args.embed}, depth {args.depth} on {args.grid} points, batch {args.batch}, {mesh!r}")
    for name, value in found.items():
        ratio = f"   {value / before[name]:.2f} of {before[name]:.0f}" if before else ""
        print(f"  {name:12}{value:10.0f} MiB{ratio}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
