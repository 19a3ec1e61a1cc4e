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

import matplotlib
import numpy as np

RUNS = {
    "1 process": "dp=1",
    "dp=4": "dp=4",
    "tp=4": "tp=4",
    "cp=4": "cp=4",
    "dp=2 tp=2": "dp=2 tp=2",
}


def losses(mesh: str, ranks: int, folder: Path, options: list[str]) -> np.ndarray:
    """The training loss of every step."""
    program = ["-m", "models.train", "--config", "demo", "--mesh", mesh, f"output={folder}"]
    program += ["model.drop_path=0", "require_skill=false", "log_every=1", *options]
    launch = [sys.executable, "-m", "commlayer", "launch", "-n", str(ranks), "--"] if ranks > 1 else [sys.executable]
    subprocess.run([*launch, *program], check=True, stdout=subprocess.DEVNULL)
    return np.array([entry["loss"] for entry in json.loads((folder / "metrics.json").read_text())["curve"]])


def plot(path: Path, curves: dict[str, np.ndarray]) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    serial = curves["1 process"]
    steps = np.arange(1, len(serial) + 1)
    for i, (name, curve) in enumerate(curves.items()):
        style = {"color": "black", "linewidth": 4, "alpha": 0.3} if i == 0 else {"linewidth": 1, "dashes": (4, i)}
        left.plot(steps, curve, label=name, **style)
        if i:
            right.plot(steps, np.abs(curve / serial - 1), ".", label=name, markersize=4)
    left.set(xlabel="step", ylabel="training loss", title="All on one line", yscale="log")
    right.set(xlabel="step", ylabel="relative difference from 1 process", title="Rounding in float32")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves along several meshes")
    parser.add_argument("--output", type=Path, default=Path("docs/curves.png"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the trainer, such as epochs=3")
    args = parser.parse_args()
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, mesh in RUNS.items():
            ranks = int(np.prod([int(size.partition("=")[2]) for size in mesh.split()]))
            curves[name] = losses(mesh, ranks, Path(folder) / mesh.replace(" ", "-"), args.overrides)
            apart = np.abs(curves[name] / curves["1 process"] - 1)
            print(f"{name:12}{len(apart)} steps, last loss {curves[name][-1]:.5f}, apart by at most {apart.max():.1e}")
    plot(args.output, curves)


if __name__ == "__main__":
    main()
