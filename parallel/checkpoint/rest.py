"""What a checkpoint holds beside tensors cut over ranks: one file for all, and one of each rank, by ``torch.save``."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

SHARED = "shared.pt"


@dataclass
class Rest:
    """``shared`` is the user's; the others are as in :class:`~parallel.checkpoint.content.Content`."""

    shared: Any = None
    tied: dict[str, str] = field(default_factory=dict)
    groups: list[dict[str, Any]] | None = None
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)


def own_file(rank: int) -> str:
    return f"own-{rank:05}.pt"


def merged(everyone: list[Rest]) -> Rest:
    """Rank 0's, with what others know of parameters that it has not: those of other stages of a pipeline."""
    together = Rest(everyone[0].shared)
    for rest in reversed(everyone):
        together.tied.update(rest.tied)
        for name, values in rest.scalars.items():
            together.scalars[name] = together.scalars.get(name, {}) | values
    for rest in everyone:
        if rest.groups is None:
            continue
        together.groups = together.groups or []
        known = [group["names"] for group in together.groups]
        together.groups += [group for group in rest.groups if group["names"] not in known]
    return together


def to_bytes(name: str, tree: Any) -> bytes:
    """Raises ValueError for a tree that could not be read again without running code from the file."""
    content = {f.name: getattr(tree, f.name) for f in fields(tree)} if isinstance(tree, Rest) else tree
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: torch.load(weights_only=True) could not read it: {error}") from None
    return buffer.getvalue()


def read_rest(checkpoint: Path) -> Rest:
    return Rest(**read(checkpoint / SHARED))


def read(path: Path) -> Any:
    """On the CPU. Raises ValueError that names the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
