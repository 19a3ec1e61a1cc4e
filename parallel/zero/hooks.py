"""Calls around modules: of methods whose object they do not keep alive, and also where the module is compiled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from parallel.notes import unseen


def weakly(method: Callable[..., None], *args: Any) -> Callable[[], None]:
    """The method, as long as its object is there."""
    alive = weakref.WeakMethod(method)

    @torch.compiler.disable
    def call() -> None:
        if (found := alive()) is not None:
            unseen(partial(found, *args))  # by checkpoints that keep products

    return call


def around(module: nn.Module, enter: Callable[[], None], leave: Callable[[], None]) -> list[Callable[[], None]]:
    """Call these before and after the module, which may raise; returns how to undo it."""
    compiled = module._compiled_call_impl
    if compiled is None:
        before = module.register_forward_pre_hook(lambda *_: enter())
        return [before.remove, module.register_forward_hook(lambda *_: leave(), always_call=True).remove]

    def call(*args: Any, **kwargs: Any) -> Any:  # hooks would be part of the graph
        enter()
        try:
            return compiled(*args, **kwargs)
        finally:
            leave()

    def undo() -> None:
        module._compiled_call_impl = compiled

    module._compiled_call_impl = call
    return [undo]
