"""Model state per rank under ZeRO, measured, against the formulas of Rajbhandari et al. 2020 (arXiv:1910.02054).

    python -m benchmarks.zero_memory                  # a table, and docs/zero_memory.png; three minutes
    python -m benchmarks.zero_memory --check          # exit status 1 where a figure is not as the formula says

The state is what lives between backward and ``step()``: parameters, gradients, and what AdamW keeps. Three figures of
each rank, of the fullest one:

===========  =====================================================================================================
state        bytes of all tensors alive at that moment, whoever holds them
in memory    how much the process has grown by then (RssAnon): a cross-check, and what counts where state is on disk
peak         bytes of all tensors alive at most in a step of a batch so small that activations do not count
===========  =====================================================================================================
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import commlayer
from benchmarks.memory import MIB, Alive
from commlayer import Group
from parallel import DataParallel, ZeRO

RANKS = (1, 2, 4)
BUCKET = 8 * MIB

# Bytes of a parameter: on every rank whole, and divided by the number of ranks. Stage 0 is DataParallel.
#   float32: p = 4, g = 4, K = 8 (Adam's moments). As in the paper.
#   bfloat16: p = 2, K = 12 (with master weights). Reduced gradients are kept in the dtype of the master weights, g = 4.
#     Stage 1 keeps the buffer that is reduced, too, in reduce_dtype; if that is float32, gradients are a part of it.
#     Stage 3 keeps no bfloat16 of the parameters, p = 0: each gathering makes it from the master weights.
#   paper: p = 2, g = 2, K = 12.
FORMULAS: dict[str, dict[int, tuple[int, int]]] = {
    "float32": {0: (16, 0), 1: (8, 8), 2: (4, 12), 3: (0, 16)},
    "bfloat16": {0: (16, 0), 1: (6, 12), 2: (2, 16), 3: (0, 16)},
    "bfloat16 sums": {1: (4, 16), 2: (2, 16), 3: (0, 16)},
    "paper": {0: (16, 0), 1: (4, 12), 2: (2, 14), 3: (0, 16)},
}
# With offload="disk" in bfloat16 what stays in memory: masters are on disk in stages 1 and 2, moments always.
ON_DISK = {1: (6, 0), 2: (2, 4), 3: (0, 8)}
DTYPES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16, "reduce_dtype": torch.float32},
    "bfloat16 sums": {"dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16},
}


class Row(NamedTuple):
    """Bytes of a rank; ``slack`` is what the state may be above the formula: a bucket, or the largest unit."""

    ranks: int
    dtypes: str
    stage: int
    offload: str
    parameters: int
    slack: int
    state: int
    in_memory: int
    peak: int

    @property
    def expected(self) -> float:
        whole, cut = (ON_DISK if self.offload == "disk" else FORMULAS[self.dtypes])[self.stage]
        return (whole + cut / self.ranks) * self.parameters

    @property
    def measured(self) -> int:
        return self.in_memory if self.offload == "disk" else self.state

    @property
    def holds(self) -> bool:
        return abs(self.measured - self.expected) <= 0.05 * self.expected + self.slack


def transformer(width: int, depth: int) -> nn.Sequential:
    """Blocks of 12 · width² parameters, for input of shape (batch, tokens, width)."""
    return nn.Sequential(
        *(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
    )


def process(entry: str) -> int:
    """Bytes, as the kernel has them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


def measure(group: Group, dtypes: str, stage: int, offload: str, size: tuple[int, int]) -> Row:
    gc.collect()
    before = process("RssAnon")
    with tempfile.TemporaryDirectory() as folder, Alive() as alive:
        torch.manual_seed(0)
        plain = transformer(*size)
        parameters = sum(p.numel() for p in plain.parameters())
        unit = max(sum(p.nbytes for p in block.parameters()) for block in plain)
        optimizer = torch.optim.AdamW(plain.parameters(), fused=True)
        options = {"folder": folder} if offload == "disk" else {}
        model: nn.Module
        if stage:
            model = ZeRO(plain, optimizer, stage=stage, group=group, offload=offload, **DTYPES[dtypes], **options)
        else:
            model = DataParallel(plain, group)
        # Mixed precision without ZeRO: weights stay in float32, and products are computed in bfloat16.
        mixed = not stage and dtypes != "float32"
        x = torch.randn(1, 2, size[0])
        for _ in range(2):  # Adam's state comes with the first step
            alive.peak = alive.now
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
                loss = model(x).float().square().mean()
            loss.backward()
            del loss
            state, grown = alive.now, process("RssAnon") - before
            optimizer.step()
    figures = torch.tensor([state, grown, alive.peak])
    slack = unit if stage == 3 else BUCKET
    return Row(group.size, dtypes, stage, offload, parameters, slack, *largest(figures, group))


def largest(figures: Tensor, group: Group) -> list[int]:
    return [int(x) for x in commlayer.all_reduce(figures, commlayer.MAX, group=group)]


def cases(ranks: int) -> list[tuple[str, int, str]]:
    """Of dtypes, stages and offload."""
    found = [(dtypes, stage, "none") for dtypes in DTYPES for stage in FORMULAS[dtypes]]
    if ranks == 2:
        found += [("bfloat16", stage, offload) for offload in ("cpu", "disk") for stage in ON_DISK]
    return found


def run(ranks: int, size: Sequence[int]) -> list[Row]:
    """All cases, one process a rank."""
    program = ["-m", "benchmarks.zero_memory", "--size", *map(str, size)]
    launch = ["-m", "commlayer", "launch", "-n", str(ranks), "--backend", "mpi", "--"] if ranks > 1 else []
    # So that what is freed goes back to the system, and the size of the process says what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, *launch, *program, "--rows", str(file)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return [Row(*row) for row in json.loads(file.read_text())]


def report(rows: Sequence[Row]) -> Table:
    million = rows[0].parameters / 1e6
    table = Table(
        title=f"Bytes of each of {million:.1f} M parameters on a rank, with AdamW; less: than in stage 0, measured"
    )
    for name in ("dtype", "stage", "offload"):
        table.add_column(name)
    for name in ("ranks", "formula", "state", "off by", "in memory", "peak", "paper", "less"):
        table.add_column(name, justify="right")
    before = rows[0]
    for row in rows:
        whole, cut = FORMULAS["paper"][row.stage]
        figures = (row.expected, row.state, row.in_memory, row.peak)
        each, state, memory, peak = (f"{x / row.parameters:.2f}" for x in figures)
        off = f"{row.measured / row.expected - 1:+.1%}" + ("" if row.holds else " !")
        times = f"{16 * row.parameters / row.measured:.2f}×"
        paper = f"{whole + cut / row.ranks:.2f}" if row.dtypes != "float32" else ""
        names = (row.dtypes, str(row.stage), row.offload, str(row.ranks))
        if (row.dtypes, row.offload) != (before.dtypes, before.offload):
            table.add_section()
        before = row
        table.add_row(*names, each, state, off, memory, peak, paper, times)
    return table


def plot(path: Path, rows: Sequence[Row]) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(DTYPES), figsize=(11, 3.8), layout="constrained", sharey=True)
    along = [2 ** (i / 8) for i in range(49)]
    for axes, dtypes in zip(panels, DTYPES, strict=True):
        for stage, (whole, cut) in FORMULAS[dtypes].items():
            colour = f"C{stage}"
            axes.plot(along, [whole + cut / n for n in along], color=colour, label=f"stage {stage}")
            if dtypes != "float32":
                whole, cut = FORMULAS["paper"][stage]
                axes.plot(along, [whole + cut / n for n in along], color=colour, linestyle=":", alpha=0.6)
            mine = [row for row in rows if (row.dtypes, row.stage, row.offload) == (dtypes, stage, "none")]
            axes.plot([row.ranks for row in mine], [row.state / row.parameters for row in mine], "o", color=colour)
        axes.set(title=dtypes, xlabel="ranks", xscale="log", ylim=(0, 21))
        axes.set_xticks([2**i for i in range(7)], [str(2**i) for i in range(7)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="bytes of a parameter on a rank")
    for style, name in ((":", "paper"), ("-", "formula"), ("o", "measured")):
        panels[0].plot([], [], style, color="grey", label=name)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Model state per rank under ZeRO, against the paper's formulas")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 16), help="width and depth (default 512 16)")
    parser.add_argument("--check", action="store_true", help="fail where the state is off by > 5 %% and a bucket")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("docs/zero_memory.png"))
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # this is one of the ranks
    args = parser.parse_args()
    if args.rows:
        group = commlayer.init()
        measure(group, "float32", 0, "none", (64, 1))  # what the first use of libraries takes is no state
        measured = [measure(group, *case, tuple(args.size)) for case in cases(group.size)]
        if group.rank == 0:
            args.rows.write_text(json.dumps(measured))
        return
    rows = [row for ranks in RANKS for row in run(ranks, args.size)]
    rows.sort(key=lambda row: (row.offload != "none", row.offload, list(DTYPES).index(row.dtypes), row.stage))
    if args.json:
        print(json.dumps([row._asdict() | {"expected": row.expected, "holds": row.holds} for row in rows]))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(report(rows))
    plot(args.output, rows)
    wrong = [row for row in rows if not row.holds]
    for row in wrong:
        print(f"not as the formula says: {row}", file=sys.stderr)
    if args.check:
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
