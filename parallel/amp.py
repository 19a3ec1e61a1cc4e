"""Mixed precision: autocast by name, and a loss scaler whose verdict is the same on every rank."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import commlayer
from commlayer import MAX, Mesh

DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(mode: str, device: torch.device | str) -> AbstractContextManager[Any]:
    """torch's autocast to ``mode``, one of none, bf16, fp16; with fp16 train by a :class:`GradScaler`."""
    if mode not in DTYPES:
        raise ValueError(f"mode: expected one of {', '.join(DTYPES)}, got {mode!r}")
    dtype = DTYPES[mode]
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)


def as_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype that autocast, where it is on, gives to matrix products: float64 stays as it is.

    For autograd Functions, of which autocast knows nothing; to be called outside of them, so that gradients are cast
    back.
    """
    device = next(x for x in tensors if x is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler``, with which a step is skipped on all ranks of ``mesh`` if a gradient of any overflowed.

    A shard can overflow on one rank alone. If that one skipped the step and halved its scale, and the others did not,
    their parameters would drift apart in silence. Costs an all_reduce of one number per optimizer step, none without a
    mesh or with ``enabled=False``. ``options`` as torch's: init_scale, growth_factor, backoff_factor, growth_interval,
    enabled.
    """

    def __init__(self, mesh: Mesh | None = None, device: str = "cpu", **options: Any) -> None:
        super().__init__(device, **options)
        self.mesh = mesh

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        # Both ways lead through here: unscale_, and the check before optimizers that unscale themselves (fused Adam).
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        if self.mesh is None:
            return found
        group = self.mesh["-".join(self.mesh.axes)]
        # A rank without a gradient takes part, too.
        mine = torch.stack([one.to(group.device) for one in (found_inf, *found.values())]).amax()
        anywhere = commlayer.all_reduce(mine, MAX, group=group)
        return {device: anywhere.to(device) for device in found or {found_inf.device: found_inf}}
