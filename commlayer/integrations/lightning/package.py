"""Lightning, under whichever of its two names the program uses."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_HALVES = {
    "lightning": ("lightning.pytorch", "lightning.fabric"),
    "pytorch_lightning": ("pytorch_lightning", "lightning_fabric"),
}


def _name() -> str:
    """The package that the program has imported; before it has, the first that is installed."""
    found = [name for name in _HALVES if name in sys.modules] or [name for name in _HALVES if find_spec(name)]
    if not found:
        raise ImportError("commlayer.integrations.lightning needs Lightning 2.x: pip install 'commlayer[lightning]'")
    return found[0]


_PYTORCH, _FABRIC = _HALVES[_name()]


def pytorch(module: str) -> Any:
    """``lightning.pytorch.MODULE``, or ``pytorch_lightning.MODULE``."""
    return import_module(f"{_PYTORCH}.{module}")


def fabric(module: str) -> Any:
    """``lightning.fabric.MODULE``, or ``lightning_fabric.MODULE``."""
    return import_module(f"{_FABRIC}.{module}")
