"""The folders and files of checkpoints: written aside, to disk, and renamed; and found again.

``folder/step-00000400/`` is a checkpoint. ``folder/.step-00000400.1f0c9a2b/`` is one that is being written, or what a
crash left of it; ``folder/.step-00000400.replaced/`` is what another of the same step takes the place of.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"step-\d{8,}")
REPLACED = "replaced"

# Of folders that are being written: a handle each, which holds a lock on it until it is closed, or the process dies.
_in_use: dict[Path, int] = {}


def final(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}"


def make_aside(folder: Path, step: int) -> Path:
    """A fresh folder to write to, after removing those that crashes have left. Nobody else removes it till release."""
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    aside = _aside(final(folder, step), secrets.token_hex(4))
    aside.mkdir()
    _in_use[aside] = _lock(aside)
    return aside


def release(aside: Path) -> None:
    """It has got its name, or may be removed by the next who saves."""
    if (handle := _in_use.pop(aside, None)) is not None:
        _unlock(handle)


def discard(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    release(aside)


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


def remove(path: Path) -> None:
    """A checkpoint; a crash leaves no half of it under its name."""
    handle = _lock(path)  # also under the name that it gets now: nobody else is to remove it at the same time
    try:
        aside = _aside(path, secrets.token_hex(4))
        path.rename(aside)
        shutil.rmtree(aside)
    finally:
        _unlock(handle)


def checkpoints(folder: Path) -> list[Path]:
    """By step. Also one that a crash kept from being replaced, where that step has no other."""
    found = {path.name: path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)}
    for path in _replaced(folder):
        found.setdefault(_original(path), path)
    return sorted(found.values(), key=step_of)


def step_of(checkpoint: Path) -> int:
    """By its name."""
    return int(checkpoint.name.split("-")[1].split(".")[0])


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
        if not _is_locked(path):
            shutil.rmtree(path)


def _lock(path: Path) -> int:
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def _unlock(handle: int) -> None:
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)  # also of the copies that forked processes have
    os.close(handle)


def _is_locked(path: Path) -> bool:
    """Whether another is at it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # or was
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
