"""Pictures of a run: the loss curve, a forecast beside the truth, the load of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def loss_curve(
    path: Path,
    curve: list[dict[str, float]],
    history: list[dict[str, float]],
    rivals: dict[str, float],
    *,
    key: str,
    name: str,
    loss: str,
    label: str,
) -> None:
    """Loss and validation score by step.

    ``key``: of the score in the history, of the model ``name``; ``rivals`` are horizontal lines. ``loss`` and ``label``
    say what is on the axes.
    """
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    steps = [entry["step"] for entry in history]
    trained = [entry for entry in history if "loss" in entry]  # the first entry is from before training
    left.plot([entry["step"] for entry in curve], [entry["loss"] for entry in curve], color="C0", alpha=0.3)
    left.plot([e["step"] for e in trained], [e["loss"] for e in trained], marker=".", color="C0", label="training")
    left.plot(steps, [entry["validation_loss"] for entry in history], marker=".", color="black", label="validation")
    left.set(xlabel="step", ylabel=loss, title="Loss")
    left.legend(fontsize="small")
    right.plot(steps, [entry[key] for entry in history], marker=".", color="black", label=name)
    best = min(rivals.values())
    for i, (rival, value) in enumerate(rivals.items()):
        if value < 2 * best:  # a far worse one would flatten the rest
            right.axhline(value, linestyle="--", color=f"C{i}", label=f"{rival}: {value:.2f}")
        else:
            right.plot([], [], " ", label=f"({rival}: {value:.2f})")
    right.set(xlabel="step", ylabel=f"validation {label}", title="Validation")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def forecast_map(
    path: Path,
    fields: dict[str, np.ndarray],
    errors: dict[str, float],
    latitudes: np.ndarray,
    longitudes: np.ndarray,
    *,
    title: str,
    unit: str,
) -> None:
    """Truth, forecast, and the errors of the forecast and of persistence, on the map.

    ``fields`` has ``truth``, ``ViT`` and ``persistence``, each H × W in physical units; ``errors`` the RMSE
    of the latter two.
    """
    truth, forecast, last = fields["truth"], fields["ViT"], fields["persistence"]
    largest = max(np.abs(forecast - truth).max(), np.abs(last - truth).max())
    state = {
        "vmin": min(truth.min(), forecast.min()),
        "vmax": max(truth.max(), forecast.max()),
        "cmap": "inferno",
    }
    error = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}
    panels: list[tuple[str, np.ndarray, dict[str, Any], str]] = [
        ("truth", truth, state, unit),
        ("ViT forecast", forecast, state, unit),
        (
            f"ViT error, RMSE {errors['ViT']:.2f} {unit}",
            forecast - truth,
            error,
            _with_unit("forecast − truth", unit),
        ),
        (
            f"persistence error, RMSE {errors['persistence']:.2f} {unit}",
            last - truth,
            error,
            _with_unit("last − truth", unit),
        ),
    ]
    figure, grid = _pyplot().subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True, sharey=True)
    longitudes = np.where(longitudes > 180, longitudes - 360, longitudes)
    order = np.argsort(longitudes, kind="stable")
    for axes, (name, values, style, label) in zip(grid.flat, panels, strict=True):
        mesh = axes.pcolormesh(longitudes[order], latitudes, values[:, order], shading="nearest", **style)
        axes.set_title(name, fontsize="medium")
        axes.set_aspect(1 / max(np.cos(np.deg2rad(latitudes.mean())), 0.3))  # kilometres alike both ways
        axes.xaxis.set_major_formatter(lambda value, _: _degrees(value, "EW"))
        axes.yaxis.set_major_formatter(lambda value, _: _degrees(value, "NS"))
        axes.set(xlabel="longitude", ylabel="latitude")
        axes.label_outer()
        figure.colorbar(mesh, ax=axes, label=label, shrink=0.9)
    figure.suptitle(title)
    _save(figure, path)


def expert_loads(path: Path, loads: dict[int, list[int]], drop_rate: float) -> None:
    """How often each expert was chosen, over the mean, a panel for each layer of ``loads``."""
    columns = min(len(loads), 4)
    rows = -(-len(loads) // columns)
    size = (2.8 * columns + 0.6, 2.2 * rows + 0.6)
    figure, grid = _pyplot().subplots(
        rows, columns, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axes in grid.flat[len(loads) :]:
        axes.remove()
    for axes, (layer, counts) in zip(grid.flat, loads.items(), strict=False):
        axes.bar(range(len(counts)), np.array(counts) / np.mean(counts), width=0.8)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_title(f"layer {layer}", fontsize="medium")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3, axis="y")
    figure.supxlabel("expert")
    figure.supylabel("load over mean")
    figure.suptitle(f"Load of the experts since the validation before; {drop_rate:.1%} dropped", fontsize="medium")
    _save(figure, path)


def _degrees(value: float, sides: str) -> str:
    return f"{abs(value):g}°" + ("" if value == 0 else sides[0] if value > 0 else sides[1])


def _with_unit(text: str, unit: str) -> str:
    return f"{text} [{unit}]" if unit else text


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install commlayer[train]") from None
    matplotlib.use("Agg")  # no display on a compute node
    import matplotlib.pyplot

    return matplotlib.pyplot
