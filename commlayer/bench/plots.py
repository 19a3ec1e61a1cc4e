"""Pictures of a report: bandwidth over size against the limit of the machine, and latencies of small messages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from commlayer.bench.report import panels, size
from commlayer.bench.sweep import LIMIT, Report, Row

SMALL = 1 << 16  # bytes up to which latency is shown
LARGE = 1 << 12  # bytes from which on bandwidth is
COLUMNS = 3  # of the overview
# Of people with any colour vision (Okabe, Ito: Color Universal Design, 2008); who has none, sees the markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
MARKERS = "osD^vPX*"


def pictures(report: Report) -> dict[str, bytes]:
    """PNGs by name: of each operation and dtype that has several sizes, and first, where there are several, of all."""
    drawn = [(name, rows) for name, rows in panels(report) if len({row["bytes"] for row in rows}) > 1]
    made = {name: _png(_one(report, name, rows)) for name, rows in drawn}
    return ({"overview": _png(_overview(report, drawn))} if len(drawn) > 1 else {}) | made


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _one(report: Report, name: str, rows: Sequence[Row]) -> Any:
    figure = _figure(11, 4.6)
    bandwidth, latency = figure.subplots(1, 2)
    _bandwidth(bandwidth, report, rows)
    _curves(latency, report, _some(rows, 0, SMALL), "us")
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter(_plain())
    latency.set_ylabel("time (µs)")
    latency.set_title("small messages")
    bandwidth.set_title(f"{name}, {report['ranks']} ranks")
    _legend(figure, [bandwidth])
    return figure


def _overview(report: Report, drawn: Sequence[tuple[str, Sequence[Row]]]) -> Any:
    lines = -(-len(drawn) // COLUMNS)
    figure = _figure(4.2 * min(COLUMNS, len(drawn)), 3.4 * lines + 0.9)
    axes = figure.subplots(lines, min(COLUMNS, len(drawn)), squeeze=False).flatten()
    for axis, (name, rows) in zip(axes, drawn, strict=False):
        _bandwidth(axis, report, rows)
        axis.set_title(name)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    _legend(figure, axes[: len(drawn)])
    return figure


def _bandwidth(axis: Any, report: Report, rows: Sequence[Row]) -> None:
    _curves(axis, report, _some(rows, LARGE, max(row["bytes"] for row in rows)), "busbw")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_plain())
    axis.set_ylabel("bus bandwidth (GB/s)")


def _some(rows: Sequence[Row], low: int, high: int) -> Sequence[Row]:
    """Those of sizes in this range; all, if that leaves no two sizes to draw a line between."""
    found = [row for row in rows if low <= row["bytes"] <= high]
    return found if len({row["bytes"] for row in found}) > 1 else rows


def _curves(axis: Any, report: Report, rows: Sequence[Row], value: str) -> None:
    """A curve for each implementation, in the colour that it has in every picture."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    for place, (key, label) in enumerate(report["implementations"].items()):
        mine = [row for row in rows if row["implementation"] == key]
        x = [row["bytes"] for row in mine]
        if key == LIMIT:
            axis.plot(x, [row[value] for row in mine], "--", color="0.35", linewidth=1.5, label=label, zorder=1)
        elif mine:
            style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            axis.plot(x, [row[value] for row in mine], markersize=4, linewidth=1.5, label=label, **style)
            if value == "us":
                low, high = ([row[end] for row in mine] for end in ("us_low", "us_high"))
                axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda count, _: size(int(count)).replace("iB", "")))
    axis.set_xlabel("size (bytes)")
    axis.grid(True, which="major", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _plain() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}")


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = min(4, len(entries))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
