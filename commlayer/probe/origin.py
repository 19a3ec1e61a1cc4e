"""Where a backend comes from that is not torch's own: the module that registers it, so that a child can do the same."""

from __future__ import annotations

import functools
import hashlib
import importlib
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from commlayer.backends.process_groups import DEVICE_OF
from commlayer.errors import BackendUnavailable

_MAIN = "__mp_main__"  # what multiprocessing calls a program that a child runs as a module


@dataclass(frozen=True)
class Origin:
    """A module by name, or by file where it is the program itself; and the name of the creator in it."""

    module: str
    file: str = ""
    creator: str = ""
    extended: bool = False

    @classmethod
    def of(cls, backend: str) -> Origin | None:
        """None for a backend that needs no module of the user's, or is not known here."""
        plugin = _plugin(backend)
        if plugin is None or backend in DEVICE_OF:
            return None
        creator = _unwrapped(plugin.creator_fn)
        module, file = getattr(creator, "__module__", None) or "", ""
        if module == "__main__":
            main = sys.modules["__main__"]
            spec = getattr(main, "__spec__", None)
            if spec is not None:  # python -m
                module = spec.name
            else:
                file = getattr(main, "__file__", None) or ""
        if not (module and (file or module != "__main__")):
            raise BackendUnavailable(
                f"backend {backend}: registered interactively; register it in a module, which the prober can import"
            )
        return cls(module, file, getattr(creator, "__qualname__", ""), plugin.extended_api)

    def bring(self, backend: str = "") -> None:
        """Import the module; if that alone does not register ``backend``, register its creator."""
        where = self.file or self.module
        try:
            if self.file:
                names = runpy.run_path(self.file, run_name=_MAIN)
            else:
                names = vars(importlib.import_module(self.module))
        except Exception as error:  # whatever a user's module raises
            raise BackendUnavailable(f"the prober cannot import {where}: {type(error).__name__}: {error}") from error
        if not backend or _plugin(backend) is not None:
            return
        creator = names.get(self.creator)
        if creator is None:
            raise BackendUnavailable(
                f"backend {backend}: importing {where} does not register it, and its creator {self.creator} is not "
                "a name of that module"
            )
        dist.Backend.register_backend(backend, creator, extended_api=self.extended, devices=["cpu"])


def source_version(backend: str) -> str:
    """The version of what registers a backend, with a digest of its file; "" for torch's own."""
    plugin = _plugin(backend)
    if plugin is None:
        return ""
    creator = _unwrapped(plugin.creator_fn)
    module = getattr(creator, "__module__", None) or ""
    root = sys.modules.get(module.partition(".")[0])
    version = "" if module in ("__main__", _MAIN) else str(getattr(root, "__version__", ""))
    code = getattr(creator, "__code__", None)
    file = code.co_filename if code else getattr(sys.modules.get(module), "__file__", None)
    try:
        digest = hashlib.sha256(Path(file or "").read_bytes()).hexdigest()[:12]
    except OSError:
        digest = "of unknown source"
    return f"{version} {digest}".strip()


def _plugin(backend: str) -> Any:
    return dist.Backend._plugins.get(backend.upper())


def _unwrapped(creator: Callable[..., Any]) -> Any:
    while isinstance(creator, functools.partial):
        creator = creator.func
    return creator
