"""Where the command writes: people's text, programs' JSON, errors."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 100  # of text that no terminal shows


def console(stderr: bool = False) -> Console:
    """Made for each use, so that it sees the streams and the terminal as they are now."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDTH
    return made


def write(*parts: RenderableType) -> None:
    """Print in one piece, since other ranks print as well; a wide table stays whole on whatever terminal."""
    out = console()
    free = out.options.update(max_width=10_000)
    whole = [part for part in parts if isinstance(part, Table) and all(column.no_wrap for column in part.columns)]
    out.width = max([out.width, *(out.measure(part, options=free).maximum for part in whole)])
    with out.capture() as captured:
        out.print(*parts, sep="\n")
    sys.stdout.writelines(line.rstrip() + "\n" for line in captured.get().splitlines())
    sys.stdout.flush()


def print_json(data: Any, indent: int | None = 1) -> None:
    print(json.dumps(data, indent=indent, ensure_ascii=False), flush=True)


def print_error(text: str) -> None:
    console(stderr=True).print(Text(f"error: {text}", style="red"), soft_wrap=True)
