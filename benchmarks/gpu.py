"""Benchmarks on NVIDIA GPUs: what the layer adds to NCCL, and how fast models train.

    python -m benchmarks.gpu --json gpu.json                                    # one GPU: the models
    torchrun --nproc-per-node 4 -m benchmarks.gpu --json gpu.json               # four, a rank each: all
    torchrun --nproc-per-node 4 -m benchmarks.gpu --only overhead step --rounds 40
    torchrun --nproc-per-node 2 -m benchmarks.gpu --device cpu                  # tries the program out, on Gloo

Two ranks can share one GPU over NCCL 2.30 or newer. Then calls cost the host what they cost it elsewhere; times on the
device are those of ranks that take turns, and no figures of a network:

    NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=2 CUDA_VISIBLE_DEVICES=0 torchrun --nproc-per-node 2 \\
        -m benchmarks.gpu --only overhead step

``make bench-gpu`` takes all GPUs that there are.

========  ==========================================================================================================
part
========  ==========================================================================================================
overhead  microseconds a call, 8 B … 256 MiB, A B A B in one run. ``host``: until a call has returned, while the GPU
          sleeps. ``device``: between CUDA events around 20 calls (5 above 1 MiB) that were all issued before the first
          one began, so that no host is waited for. ``async_op``: NCCL on a stream of its own;
          without, torch runs it on the current stream (since 2.8), which saves two events.
step      milliseconds of a training step of a transformer with 25 M parameters, no CUDA graph: torch's DDP on NCCL
          itself and on the layer, and parallel.DataParallel
vit       the ladder of NERSC's "Deep Learning at Scale" on the ViT of 24 M parameters for 20 × 360 × 720 points, batch
          16 a GPU or the largest half of it that fits: float32, TF32, AMP, compile and fused Adam. Samples are random
          and on the device already: no figure has the loading in it that the published ones of one A100 have.
moe       tokens a second of a DeepSeek-MoE with 1 B parameters (models/moe_sizes.py), experts on every rank, spread
          over all, or none; 4 × 512 and 16 × 2048 tokens a GPU, or what fits. MFU = tokens/s · FLOPs per token ÷
          (ranks · peak), the FLOPs being 6 · N + 12 · depth · embed · tokens with N the active parameters that are
          multiplied with (models/flops.py: PaLM, arXiv:2204.02311, appendix B; torchtitan's formula is the same but
          for norms), the peak that of dense bfloat16 products in the device's data sheet (models/devices.py). A device
          that is not there has no MFU.
========  ==========================================================================================================

Each time is the median over rounds of the slowest rank's; memory is the peak of what PyTorch has allocated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import commlayer
from benchmarks import gpu_calls, gpu_models
from commlayer import Group
from commlayer.launch import discover

PARTS = ("overhead", "step", "vit", "moe")
TALKING = ("overhead", "step")  # which one rank alone has nothing of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the layer adds to NCCL, and how fast models train on GPUs")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu implies --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, and no figures")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch.cuda is not available; --device cpu tries the program out")
    alone = discover().launcher == "none"
    group = commlayer.init("single" if alone else {"cuda": "nccl", "cpu": "gloo"}[args.device])
    found = measure(group, args.only, args.quick or args.device == "cpu", args.rounds)
    if group.rank == 0:
        record = about(group) | {"quick": args.quick or args.device == "cpu", "rounds": args.rounds, "found": found}
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")
        report(record, Console(width=max(Console().width, 100)))


def measure(group: Group, parts: Sequence[str], quick: bool, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of each part, but for those that need more ranks than there are. Collective."""
    found: dict[str, list[dict[str, Any]]] = {}
    calls, models = (part.QUICK if quick else part.FULL for part in (gpu_calls, gpu_models))
    if group.size > 1 and set(parts) & set(TALKING):
        groups = gpu_calls.groups_of(group)
        for part in (part for part in TALKING if part in parts):
            found[part] = getattr(gpu_calls, part)(groups, calls, rounds)
    for part in (part for part in ("vit", "moe") if part in parts):
        found[part] = getattr(gpu_models, part)(group, models, rounds)
    return found


def about(group: Group) -> dict[str, Any]:
    """Where the figures are from."""
    there = {"device": gpu_models.device_name(group), "ranks": group.size, "backend": group.backend}
    there |= {"torch": torch.__version__, "commlayer": commlayer.__version__}
    if group.device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        there |= {"cuda": torch.version.cuda, "nccl": nccl, "gpus": torch.cuda.device_count()}
    return there


def report(record: dict[str, Any], console: Console) -> None:
    """Tables for people; ``record`` is what --json keeps."""
    names = ("device", "ranks", "backend", "torch", "cuda", "nccl")
    console.print(", ".join(f"{name} {record[name]}" for name in names if name in record))
    if record["quick"]:
        console.print("[bold]Tiny sizes, to try the program out: these are no figures.[/bold]")
    if record["ranks"] == 1:
        console.print(f"One rank has nothing to communicate: no {' and no '.join(TALKING)}.")
    for part, rows in record["found"].items():
        console.print(TABLES[part](rows))
    if any(row["mfu"] is None for row in record["found"].get("moe", ())):
        console.print(f"{record['device']} is not in models/devices.py, so there is no MFU.")


def table(title: str, first: Sequence[str], rest: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in (*first, *rest):
        made.add_column(name, justify="left" if name in first else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def overhead_table(rows: list[dict[str, Any]]) -> Table:
    raw = {(row["op"], row["bytes"]): row for row in rows if row["way"] == gpu_calls.RAW}
    shown = []
    for row in rows:
        base = raw[row["op"], row["bytes"]]
        sides = [(f"{row[side]:.1f}", f"{row[side] - base[side]:+.1f}") for side in ("host", "device")]
        shown.append((row["op"], in_bytes(row["bytes"]), row["way"], *sides[0], *sides[1]))
    title = f"overhead: microseconds a call, and how many more than {gpu_calls.RAW}"
    return table(title, ("op", "size", "way"), ("host", "more", "device", "more"), shown)


def in_bytes(size: int) -> str:
    """8 B, 256 KiB, 128 MiB."""
    for unit, name in ((gpu_calls.MIB, "MiB"), (gpu_calls.KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size} B"


def step_table(rows: list[dict[str, Any]]) -> Table:
    base = rows[0]["device_ms"]
    shown = [
        (row["way"], f"{row['host_ms']:.2f}", f"{row['device_ms']:.2f}", f"{base / row['device_ms']:.3f}")
        for row in rows
    ]
    title = f"step: {rows[0]['parameters'] / 1e6:.1f} M parameters, milliseconds"
    return table(title, ("way",), ("host", "device", "speed"), shown)


def vit_table(rows: list[dict[str, Any]]) -> Table:
    shown = [
        (
            *(row["rung"], f"{row['batch']}", f"{row['ms']:.1f}", f"{row['samples_per_second']:.1f}"),
            *(f"{row['samples_per_second'] / rows[0]['samples_per_second']:.2f}", f"{row['published']:g}"),
            *(f"{row['published'] / rows[0]['published']:.2f}", f"{row['GiB']:.1f}"),
        )
        for row in rows
    ]
    columns = ("batch", "ms", "samples/s", "ratio", "published", "ratio", "GiB")
    return table("vit: published are those of one A100, with loading", ("rung",), columns, shown)


def moe_table(rows: list[dict[str, Any]]) -> Table:
    shown = [
        (
            *(row["way"], f"{row['batch']} × {row['tokens']}", f"{row['ms']:.1f}", f"{row['tokens_per_second']:.0f}"),
            *("" if row["mfu"] is None else f"{row['mfu']:.1%}", f"{row['GiB']:.1f}"),
        )
        for row in rows
    ]
    title = f"moe: {rows[0]['model']}, {rows[0]['parameters'] / 1e6:.3g} M parameters"
    return table(title, ("way", "tokens a rank"), ("ms", "tokens/s", "MFU", "GiB"), shown)


TABLES = {"overhead": overhead_table, "step": step_table, "vit": vit_table, "moe": moe_table}

if __name__ == "__main__":
    main()
