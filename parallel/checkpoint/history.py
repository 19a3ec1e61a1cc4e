"""Which checkpoint of a folder is the newest, and which are kept: by the order in which they were saved.

Every checkpoint has a number, one more than those that were there. A run that goes back to an earlier step leaves
checkpoints of later steps behind: these are older than what it saves from then on, and no part of its line.
"""

from __future__ import annotations

from pathlib import Path

from parallel.checkpoint import files
from parallel.checkpoint.manifest import read_manifest


def next_number(folder: Path) -> int:
    """For the checkpoint that is saved now."""
    return 1 + max((number for number, _ in _numbered(folder)[0]), default=0)


def newest_first(folder: Path) -> list[Path]:
    """All of them; where a manifest cannot be read, only the step says how new it may be."""
    numbered, unreadable = _numbered(folder)
    found = _in_line_first(numbered)
    for path in unreadable:
        step = files.step_of(path)
        older = (place for place, other in enumerate(found) if files.step_of(other) < step)
        found.insert(next(older, len(found)), path)
    return found


def remove_old(folder: Path, new: Path, keep: int) -> None:
    """All but ``keep``: ``new``, those that its run came by, the newest first, then those that were left behind."""
    numbered, unreadable = _numbered(folder)
    others = [path for path in _in_line_first(numbered) if path != new]
    for path in [*others[keep - 1 :], *unreadable]:
        files.remove(path)


def _numbered(folder: Path) -> tuple[list[tuple[int, Path]], list[Path]]:
    """With their numbers; and those that have none, by step."""
    numbered, unreadable = [], []
    for path in files.checkpoints(folder):
        try:
            numbered.append((read_manifest(path).number, path))
        except ValueError:
            unreadable.append(path)
    return numbered, unreadable


def _in_line_first(numbered: list[tuple[int, Path]]) -> list[Path]:
    """From the newest on back, those of ever smaller steps; then all others, the newest first."""
    line: list[Path] = []
    left: list[Path] = []
    for _, path in sorted(numbered, key=lambda found: (found[0], files.step_of(found[1])), reverse=True):
        in_line = not line or files.step_of(path) < files.step_of(line[-1])
        (line if in_line else left).append(path)
    return [*line, *left]
