"""Pictures of a run: the loss curve, and a forecast beside the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def loss_curve(
    path: Path,
    curve: list[dict[str, float]],
    history: list[dict[str, float]],
    rivals: dict[str, float],
    unit: str,
) -> None:
    """Loss and validation RMSE by step; ``rivals`` are horizontal lines."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    steps = [entry["step"] for entry in history]
    trained = [entry for entry in history if "loss" in entry]  # the first entry is from before training
    left.plot([entry["step"] for entry in curve], [entry["loss"] for entry in curve], color="C0", alpha=0.3)
    left.plot([e["step"] for e in trained], [e["loss"] for e in trained], marker=".", color="C0", label="training")
    left.plot(steps, [entry["validation_loss"] for entry in history], marker=".", color="black", label="validation")
    left.set(xlabel="step", ylabel="loss (normalised)", title="Loss")
    left.legend(fontsize="small")
    right.plot(steps, [entry["rmse"] for entry in history], marker=".", color="black", label="ViT")
    best = min(rivals.values())
    for i, (name, value) in enumerate(rivals.items()):
        if value < 2 * best:  # a far worse one would flatten the rest
            right.axhline(value, linestyle="--", color=f"C{i}", label=f"{name}: {value:.2f}")
        else:
            right.plot([], [], " ", label=f"({name}: {value:.2f})")
    right.set(xlabel="step", ylabel=_with_unit("validation RMSE", unit), title="Validation")
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
