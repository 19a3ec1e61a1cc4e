"""What happens at each step of the user's optimiser, whose pieces the wrapper has to know, and follow."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from commlayer import UnsupportedOperation
from parallel.zero.flat import Flat
from parallel.zero.gradients import Gradients
from parallel.zero.offload import DiskState


class Steps:
    """Checks before a step, news of it afterwards, and a zero_grad that forgets what was not reduced, too.

    Args:
        own: what may be in the optimiser's groups.
        published: vectors whose parameters are whole, with master weights apart: changes of the former would be lost.
        after: called when the pieces have changed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        own: Collection[nn.Parameter],
        published: Sequence[Flat],
        gradients: Gradients,
        disk: DiskState | None,
        after: Callable[[], None],
    ) -> None:
        self.optimizer, self.published, self.disk = optimizer, published, disk
        self._own = {id(p) for p in own}
        self._versions: list[int] = []
        self.note()
        # The optimiser may outlive the wrapper, which is not to be kept alive by it.
        me, news, forgotten = weakref.ref(self), weakref.WeakMethod(after), weakref.ref(gradients)
        zero_grad = optimizer.zero_grad

        def before(_: Any, args: Any, kwargs: Any) -> None:
            if (alive := me()) is not None:
                alive._before(closure=kwargs.get("closure", args[1] if len(args) > 1 else None))

        def stepped(*_: Any) -> None:
            if (alive := news()) is not None:
                alive()

        def forget(set_to_none: bool = True) -> None:
            zero_grad(set_to_none)
            if (alive := forgotten()) is not None:
                alive.forget()

        handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(stepped)]
        optimizer.zero_grad = forget  # type: ignore[method-assign]

        def retire() -> None:
            for handle in handles:
                handle.remove()

        weakref.finalize(self, retire)

    def note(self) -> None:
        """From now on the parameters are as the pieces say; and autograd has to know that they have changed."""
        for flat in self.published:
            for member in flat.members:
                torch.autograd.graph.increment_version(member.param)
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [member.param._version for flat in self.published if flat.separate for member in flat.members]

    def _before(self, closure: Any) -> None:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in self._own:
                    raise ValueError(
                        f"optimizer: it was given a parameter of shape {list(p.shape)} after ZeRO was built; give it "
                        "those of the wrapper's named_parameters()"
                    )
        if self._now() != self._versions:
            names = [member.name for flat in self.published if flat.separate for member in flat.members]
            changed = next(name for name, a, b in zip(names, self._now(), self._versions, strict=True) if a != b)
            raise UnsupportedOperation(
                f"{changed} was changed, and its master weights were not; change it inside of `with model.gathered():`"
            )
        if self.disk is not None:
            if closure is not None:
                raise UnsupportedOperation("offload: a closure, with which step() cannot go vector by vector on disk")
            self.disk.step()
