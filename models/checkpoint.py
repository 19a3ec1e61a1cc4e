"""Checkpoints of a run: a folder per step, a file per rank, whole or not there at all.

``folder/step-00000400/`` holds ``about.json`` (step, mesh and configuration, for people and for the check whether a
run may go on from here) and ``rank-00003.pt`` of every rank. What ranks along dp have alike (their part of the model
and of the optimiser's state) is in the file of the first of them alone.

A checkpoint is written beside the others as ``.step-00000400`` and gets its name when all ranks are done, so that a
crash at any moment leaves the previous one as it was. The folder has to be one that all ranks share.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

import commlayer
from commlayer import Mesh

State = dict[str, Any]

_NAME = re.compile(r"step-\d{8,}")


def save(folder: Path, step: int, mesh: Mesh, about: State, shared: State, own: State, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest ``keep``; collective over the world.

    Args:
        about: of JSON's types.
        shared: what ranks along dp have alike.
        own: what differs between all ranks.
    """
    world = commlayer.world()
    aside, final = folder / f".{_name(step)}", folder / _name(step)
    if world.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)  # of an attempt that a crash broke off
        aside.mkdir(parents=True)
        (aside / "about.json").write_text(json.dumps({"step": step, **about}, indent=2) + "\n")
        _to_disk(aside / "about.json")
    commlayer.barrier(group=world)
    torch.save({"own": own, "shared": shared if mesh.rank("dp") == 0 else None}, _file(aside, world.rank))
    _to_disk(_file(aside, world.rank))
    commlayer.barrier(group=world)
    if world.rank == 0:
        _to_disk(aside)  # all of it, before it gets its name
        aside.rename(final)
        _to_disk(folder)
    commlayer.barrier(group=world)  # whoever comes from here can rely on it
    if world.rank == 0:
        for old in _all(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def load(checkpoint: Path, mesh: Mesh) -> tuple[State, State]:
    """What this rank gave :func:`save` as ``shared`` and ``own``, on the CPU. Communicates nothing."""
    world = commlayer.world()
    leader = mesh.ranks("dp", world.rank)[0]
    mine = _read(_file(checkpoint, world.rank))
    first = mine if leader == world.rank else _read(_file(checkpoint, leader))
    return first["shared"], mine["own"]


def about(checkpoint: Path) -> State:
    """What :func:`save` got as ``about``, and ``step``."""
    try:
        found: State = json.loads((checkpoint / "about.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint}: not a checkpoint of a run ({error})") from None
    return found


def newest(folder: Path) -> Path | None:
    """The last checkpoint in ``folder`` that is whole."""
    found = _all(folder)
    return found[-1] if found else None


def _all(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]  # no copies that somebody made
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _to_disk(path: Path) -> None:
    """Return when a file, or the entries of a folder, would survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _name(step: int) -> str:
    return f"step-{step:08}"


def _file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"rank-{rank:05}.pt"


def _read(path: Path) -> State:
    try:
        found: State = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    return found
