"""The folders and files of checkpoints: written aside, to disk, and renamed; and found again.

``folder/step-00000400/`` is a checkpoint. ``folder/.step-00000400.1f0c9a2b/`` is one that is being written, or what a
crash left of it; ``folder/.step-00000400.replaced/`` is what another of the same step takes the place of.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path

_NAME = re.compile(r"step-\d{8,}")
REPLACED = "replaced"


def final(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}"


def make_aside(folder: Path, step: int) -> Path:
    """A fresh folder to write to, after removing those that earlier crashes left."""
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    aside = _aside(final(folder, step), secrets.token_hex(4))
    aside.mkdir()
    return aside


def publish(aside: Path, folder: Path, step: int) -> Path:
    """Give a folder, whose files are on disk, its name."""
    to_disk(aside)
    path = final(folder, step)
    if path.exists():  # perhaps broken, and the run went on from an earlier one
        path.rename(_aside(path, REPLACED))
    aside.rename(path)
    to_disk(folder)
    shutil.rmtree(_aside(path, REPLACED), ignore_errors=True)
    return path


def remove_old(folder: Path, new: Path, keep: int) -> None:
    """All but the newest ``keep``, of which ``new`` is one."""
    others = [path for path in checkpoints(folder) if path != new]
    for path in others[: len(others) - (keep - 1)]:
        aside = _aside(path, secrets.token_hex(4))
        path.rename(aside)  # so that a crash leaves no half of it
        shutil.rmtree(aside)


def checkpoints(folder: Path) -> list[Path]:
    """By step. Also one that a crash kept from being replaced, where that step has no other."""
    found = {path.name: path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)}
    for path in _replaced(folder):
        found.setdefault(_original(path), path)
    return [found[name] for name in sorted(found, key=lambda name: (len(name), name))]


def write(path: Path, data: bytes) -> None:
    """To disk, before it returns."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def to_disk(path: Path) -> None:
    """Return when a file, or the entries of a folder, would survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _aside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _original(replaced: Path) -> str:
    return replaced.name[1 : -len(REPLACED) - 1]


def _replaced(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f".step-*.{REPLACED}") if _NAME.fullmatch(_original(path))]


def _clear(folder: Path) -> None:
    for path in _replaced(folder):
        if not (before := folder / _original(path)).exists():
            path.rename(before)
    for path in folder.glob(".step-*.*"):
        shutil.rmtree(path)
