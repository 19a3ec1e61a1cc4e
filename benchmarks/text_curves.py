"""A mixture of experts learns real text, with its experts on one, two and four ranks: is the loss curve the same?

    python -m benchmarks.text_curves                # into docs/text_curves.png, about ten minutes on two cores

Each run is ``models.train --config text_demo``, the source of Python's standard library byte by byte; only where the
experts are differs. In float32, so the curves part by rounding, and by a token whose choice of experts rounding turns.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.curves import draw, losses, train
from models.tasks.language import RIVAL

RUNS = {"1 process": 1, "ep=2": 2, "ep=4": 4}


def plot(path: Path, curves: dict[str, np.ndarray], bigram: float) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.axhline(bigram, color="tab:red", linestyle=":", label=RIVAL)
    draw(left, right, curves)
    left.set(ylabel="training loss [bits per byte]", title="All on one line")
    right.set(title="Rounding in float32", yscale="log")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves of a mixture of experts on several ranks")
    parser.add_argument("--output", type=Path, default=Path("docs/text_curves.png"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the trainer, such as steps=100")
    args = parser.parse_args()
    curves: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, ranks in RUNS.items():
            metrics = train("text_demo", ranks, Path(folder) / name, "--experts", f"ep={ranks}", *args.overrides)
            bits = metrics["bits_per_byte"]
            curves[name] = losses(metrics) / math.log(2)
            apart = np.abs(curves[name] / curves["1 process"] - 1)
            print(
                f"{name:12}{len(apart)} steps, apart by at most {apart.max():.1e} (the first 100 by "
                f"{apart[:100].max():.1e}); validation {bits['LM']:.4f} bits per byte, {RIVAL} {bits[RIVAL]:.4f}"
            )
    plot(args.output, curves, bits[RIVAL])


if __name__ == "__main__":
    main()
