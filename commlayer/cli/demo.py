"""``commlayer demo``: a Vision Transformer learns real temperature fields, in about a minute."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from commlayer.cli.diagnosis import devices
from commlayer.cli.launch import Backend, DryRun, Ranks, start
from commlayer.errors import CommError

PACKAGES = ("h5py", "iris_sample_data", "matplotlib", "yaml")


def main(
    ranks: Ranks = 2,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to its configuration: epochs=5.")
    ] = None,
    backend: Backend = "auto",
    dry_run: DryRun = False,
) -> None:
    """Train a small Vision Transformer on real temperature fields, on a few ranks of this machine."""
    missing = [name for name in (*PACKAGES, "models") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommError(f"demo: missing {', '.join(missing)}; pip install 'commlayer[train]'")
    found = devices()
    if backend == "auto" and max(len(found["cuda"]), len(found["xpu"])) < ranks:
        backend = "gloo"  # the demo is for every machine, also for one with fewer GPUs than ranks
    start(ranks, ["-m", "models.train", "--config", "demo", *(overrides or ())], backend, {}, dry_run=dry_run)
