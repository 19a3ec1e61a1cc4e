"""The manifest: which files a checkpoint has, and their checksums, so that a broken one is an error, not a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commlayer import Group
from parallel.checkpoint.agreement import agreed
from parallel.checkpoint.files import checksum, write

NAME = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """``files``: name -> bytes and SHA-256 of every other file in the folder. ``about``: JSON, the user's.

    ``number``: greater than those of all checkpoints that were in the folder before.
    """

    step: int
    number: int
    ranks: int
    about: Any
    files: dict[str, tuple[int, str]]
    version: int = VERSION

    def render(self) -> str:
        content = asdict(self)
        content["files"] = {
            name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(self.files.items())
        }
        content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return json.dumps(content, indent=1) + "\n"


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    write(checkpoint / NAME, manifest.render().encode())


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises ValueError for a manifest that is not as it was written, or of another version."""
    path = checkpoint / NAME
    try:
        text = path.read_bytes().decode()
        found = json.loads(text)
        version = found["version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the manifest of a checkpoint ({type(error).__name__}: {error})") from None
    if version != VERSION:
        raise ValueError(f"{path}: of version {version}, this program reads version {VERSION}")
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in found["files"].items()}
        manifest = Manifest(found["step"], found["number"], found["ranks"], found["about"], files, version)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not as it was written ({type(error).__name__}: {error})") from None
    if manifest.render() != text:  # byte for byte, also where JSON would read the same
        raise ValueError(f"{path}: not as it was written, by its checksum")
    return manifest


def read_about(path: Path | str) -> dict[str, Any]:
    """What was saved as ``about``; raises ValueError where that cannot be read."""
    about: dict[str, Any] = read_manifest(Path(path)).about
    return about


def verify(path: Path | str) -> None:
    """Read all of a checkpoint. Raises ValueError that names the file and says what is wrong with it."""
    check(Path(path), None)


def check(path: Path, group: Group | None) -> Manifest:
    """The same; collective, the files divided over the ranks, where there is a group."""
    manifest = _together(lambda: _check_names(path), group)
    rank, ranks = (group.rank, group.size) if group else (0, 1)
    largest = sorted(manifest.files, key=lambda name: (-manifest.files[name][0], name))
    _together(lambda: _check_contents(path, manifest, largest[rank::ranks]), group)
    return manifest


def _together(work: Callable[[], Any], group: Group | None) -> Any:
    return agreed(work, group) if group else work()


def _check_names(path: Path) -> Manifest:
    manifest = read_manifest(path)
    there = {entry.name for entry in path.iterdir()}
    if missing := sorted(manifest.files.keys() - there):
        raise ValueError(f"{path / missing[0]}: missing")
    if more := sorted(there - manifest.files.keys() - {NAME}):
        raise ValueError(f"{path / more[0]}: not in the manifest")
    return manifest


def _check_contents(path: Path, manifest: Manifest, names: list[str]) -> None:
    for name in names:
        size, digest = manifest.files[name]
        try:
            if (found := (path / name).stat().st_size) != size:
                raise ValueError(f"{path / name}: {found} bytes, of {size} that were written")
            if checksum(path / name) != digest:
                raise ValueError(f"{path / name}: not as it was written, by its checksum")
        except OSError as error:
            raise ValueError(f"{path / name}: cannot be read ({error})") from None
