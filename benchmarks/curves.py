"""The ViT trained on real fields along several meshes: do the loss curves lie on that of one process?

    python -m benchmarks.curves                # into docs/curves.png, about five minutes on two cores

Each run is ``models.train --config demo`` without stochastic depth, whose random numbers differ along dp; everything
else is the same at the same seed. In float32, so the curves part by rounding alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

RUNS = {
    "1 process": "dp=1",
    "dp=4": "dp=4",
    "tp=4": "tp=4",
    "cp=4": "cp=4",
    "dp=2 tp=2": "dp=2 tp=2",
}


def train(config: str, ranks: int, folder: Path, *options: str) -> dict[str, Any]:
    """What a run of the trainer wrote into its metrics.json, with every step in the curve."""
    program = ["-m", "models.train", "--config", config, f"output={folder}", "require_skill=false", "log_every=1"]
    launch = [sys.executable, "-m", "commlayer", "launch", "-n", str(ranks), "--"] if ranks > 1 else [sys.executable]
    subprocess.run([*launch, *program, *options], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "metrics.json").read_text())


def losses(metrics: dict[str, Any]) -> np.ndarray:
    """The training loss of every step."""
    return np.array([entry["loss"] for entry in metrics["curve"]])


def plot(path: Path, curves: dict[str, np.ndarray]) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    draw(left, right, curves)
    left.set(ylabel="training loss", title="All on one line", yscale="log")
    right.set(title="Rounding in float32")
    figure.savefig(path, dpi=130)


def draw(left: Axes, right: Axes, curves: dict[str, np.ndarray]) -> None:
    """The curves, and how far they are from the first."""
    serial = next(iter(curves.values()))
    steps = np.arange(1, len(serial) + 1)
    for i, (name, curve) in enumerate(curves.items()):
        style = {"color": "black", "linewidth": 4, "alpha": 0.3} if i == 0 else {"linewidth": 1, "dashes": (4, i)}
        left.plot(steps, curve, label=name, **style)
        if i:
            right.plot(steps, np.abs(curve / serial - 1), ".", label=name, markersize=4)
    right.set(ylabel="relative difference from 1 process")
    for axes in (left, right):
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves along several meshes")
    parser.add_argument("--output", type=Path, default=Path("docs/curves.png"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the trainer, such as epochs=3")
    args = parser.parse_args()
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, mesh in RUNS.items():
            ranks = int(np.prod([int(size.partition("=")[2]) for size in mesh.split()]))
            options = ["--mesh", mesh, "model.drop_path=0", *args.overrides]
            curves[name] = losses(train("demo", ranks, Path(folder) / mesh.replace(" ", "-"), *options))
            apart = np.abs(curves[name] / curves["1 process"] - 1)
            print(f"{name:12}{len(apart)} steps, last loss {curves[name][-1]:.5f}, apart by at most {apart.max():.1e}")
    plot(args.output, curves)


if __name__ == "__main__":
    main()
