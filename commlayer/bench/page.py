"""A report as a page of HTML that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from commlayer.bench.report import duration, limits, panels, rate, size, title
from commlayer.bench.sweep import Report, Row

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
img { max-width: 100% } h2 { margin-top: 2em } summary { cursor: pointer; color: #555 }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .15em .7em; text-align: right }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left } tr.first td { border-top: 1px solid #ccc }
.wrong { color: #b00; font-weight: bold } .quiet { color: #555 }
"""
_COLUMNS = (
    "size",
    "implementation",
    "median",
    "quartiles",
    "least",
    "algbw GB/s",
    "busbw GB/s",
    "×",
    "% of limit",
    "wrong",
    "how",
)


def page(report: Report, pictures: dict[str, bytes]) -> str:
    """The report as one page of HTML; ``pictures`` are PNGs by the names of panels."""
    parts = [f"<h1>Collectives on {report['ranks']} ranks</h1>", f"<p class=quiet>{html.escape(title(report))}</p>"]
    parts.append(f"<p class=quiet>{html.escape(str(limits(report)))}</p>")
    for name, picture in pictures.items():
        if name not in dict(panels(report)):
            parts.append(_image(name, picture))
    for name, rows in panels(report):
        parts.append(f"<h2>{html.escape(name)}</h2>")
        if name in pictures:
            parts.append(_image(name, pictures[name]))
        parts.append(f"<details><summary>all figures</summary>{_table(report, rows)}</details>")
    base = html.escape(report["implementations"].get(report["baseline"], report["baseline"]))
    parts.append(
        "<p class=quiet>Sizes and bandwidths as nccl-tests defines them (doc/PERFORMANCE.md). A time is the median of "
        f"samples, each the slowest rank's; × is how often faster than {base}, the median of interleaved rounds.</p>"
    )
    head = f"<meta charset=utf-8><title>commlayer bench</title><style>{_STYLE}</style>"
    return f"<!DOCTYPE html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _image(name: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def _table(report: Report, rows: Iterable[Row]) -> str:
    lines = ["<table><tr>", *(f"<th>{column}</th>" for column in _COLUMNS), "</tr>"]
    last = None
    for row in rows:
        cells: list[Any] = [size(row["bytes"]), report["implementations"][row["implementation"]], duration(row["us"])]
        cells += [f"{duration(row['us_low'])} – {duration(row['us_high'])}", duration(row["us_least"])]
        cells += [rate(row["algbw"]), rate(row["busbw"])]
        cells += ["" if row["speedup"] is None else f"{row['speedup']:.3g}", f"{row['of_limit'] * 100:.0f}"]
        cells += ["" if row["wrong"] is None else row["wrong"], row["how"]]
        kind = ["first"] * (row["bytes"] != last) + ["wrong"] * bool(row["wrong"])
        last = row["bytes"]
        lines.append(f"<tr class='{' '.join(kind)}'>")
        lines += [f"<td>{html.escape(str(value))}</td>" for value in cells]
        lines.append("</tr>")
    return "".join([*lines, "</table>"])


def is_page(target: Path) -> bool:
    """Whether a report is to be one file, and not a folder."""
    return target.suffix.lower() in (".html", ".htm")


def save(report: Report, target: Path) -> list[Path]:
    """Write one page, if ``target`` is called so, or a folder of index.html and the pictures; returns the files."""
    from commlayer.bench.plots import pictures  # matplotlib is an extra

    drawn = pictures(report)
    if is_page(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(report, drawn), encoding="utf-8")
        return [target]
    target.mkdir(parents=True, exist_ok=True)
    index = target / "index.html"
    index.write_text(page(report, drawn), encoding="utf-8")
    files = [target / f"{name.replace(' ', '-')}.png" for name in drawn]
    for file, picture in zip(files, drawn.values(), strict=True):
        file.write_bytes(picture)
    return [index, *files]
