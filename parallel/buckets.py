"""Flat buckets of gradients: what data parallelism reduces, and how it stays in step when ranks differ."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from commlayer import AVG, CommError, Group, ReduceOp, UnsupportedOperation, Work, empty_symmetric


class Reduction(NamedTuple):
    """What makes gradients whole: ``op`` over ``group``."""

    group: Group
    op: ReduceOp

    @property
    def gain(self) -> float:
        """By how much it multiplies what is the same on all ranks already."""
        if self.op is AVG:
            return 1.0
        return self.group.size * (1.0 if self.op.factor is None else float(self.op.factor))


class Slot:
    """The place of one parameter's gradient in a bucket."""

    def __init__(self, name: str, param: nn.Parameter, view: Tensor, gain: float) -> None:
        self.name, self.param, self.view, self.gain = name, param, view, gain
        self.address = view.data_ptr()
        self.reduced = False  # and since then nothing was added

    def attach(self) -> None:
        """Make ``p.grad`` the view; after ``zero_grad()``, backward has put another tensor there."""
        grad = self.param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise UnsupportedOperation(f"the gradient of {self.name} is sparse; only dense ones are reduced")
        if grad.data_ptr() == self.address != 0 and grad.dtype == self.view.dtype:
            return
        if grad.requires_grad:
            raise UnsupportedOperation(
                f"the gradient of {self.name} has a graph (create_graph=True), which the reduction would "
                "drop; use torch.autograd.grad for derivatives inside the loss"
            )
        if grad.dtype != self.view.dtype or grad.device != self.view.device:
            raise ValueError(
                f"{self.name} became {grad.dtype} on {grad.device} after DataParallel was built for "
                f"{self.view.dtype} on {self.view.device}; convert the module first"
            )
        self.view.copy_(grad)
        self.hand_out()

    def divide_reduced(self) -> None:
        """Before something is added to a gradient that was reduced: all of it will be reduced together, once more."""
        grad = self.param.grad
        if self.reduced and self.gain != 1 and grad is not None and grad.data_ptr() == self.address:
            grad.mul_(1 / self.gain)
        self.reduced = False

    def hand_out(self) -> None:
        """Make ``p.grad`` this place; by a tensor of its own, since converting a module swaps what is in that."""
        self.param.grad = self.view.detach()


class Bucket:
    """Gradients that are reduced together: ``flat`` holds the views of the slots, then one flag per slot."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], reduction: Reduction) -> None:
        self.reduction = reduction
        like = named[0][1]
        total = sum(p.numel() for _, p in named)
        # Where ranks share a host, they reduce it in place.
        self.flat = empty_where(like.device, total + len(named), like.dtype, reduction.group).zero_()
        self.flags = self.flat[total:]
        self.slots: list[Slot] = []
        start = 0
        for name, p in named:
            # The parameter's own strides if it is dense (channels_last), as optimizers like it.
            strides = torch.empty_like(p, device="meta").stride()
            view = self.flat.as_strided(p.shape, strides, start)
            self.slots.append(Slot(name, p, view, reduction.gain))
            start += p.numel()
        self.missing = set(self.slots)
        self.unused: list[int] = []
        self.work = Work()
        self._streams: set[Any] = set()

    def mark_ready(self, slot: Slot) -> None:
        if slot not in self.missing:
            raise CommError(
                f"DataParallel: {slot.name} got a gradient twice in one backward; the first may be on its "
                "way already (a parameter shared by re-entrant checkpoints? use use_reentrant=False)"
            )
        self.missing.remove(slot)
        if self.flat.device.type != "cpu":
            self._streams.add(torch.accelerator.current_stream(self.flat.device))

    def collect(self) -> None:
        """Complete the bucket for its reduction."""
        if self._streams:  # gradients may come from several, and the reduction follows the current one only
            current = torch.accelerator.current_stream(self.flat.device)
            for stream in self._streams - {current}:
                current.wait_stream(stream)
            self._streams.clear()
        self.flags.fill_(1)
        for i, slot in enumerate(self.slots):
            slot.divide_reduced()
            if slot.param.grad is not None:
                slot.attach()  # also a gradient that was accumulated or set outside this backward
            else:
                slot.view.zero_()
                self.flags[i] = 0
                self.unused.append(i)

    def deliver(self) -> None:
        """Hand the result to parameters that only other ranks used, and make ready for the next backward."""
        if self.unused:  # only then the flags are looked at: on a GPU that waits for the reduction
            used_somewhere = (self.flags.abs() > 0).tolist()
            for i in self.unused:
                if used_somewhere[i]:
                    self.slots[i].hand_out()
        for slot in self.slots:
            slot.reduced = True
        self.unused.clear()
        self.missing = set(self.slots)
        self.work = Work()


def empty_where(device: torch.device, length: int, dtype: torch.dtype, group: Group) -> Tensor:
    """A vector on this device, symmetric over the group where that is the group's own; called by all of its ranks."""
    if device == group.device:
        return empty_symmetric(length, dtype, group)
    return torch.empty(length, dtype=dtype, device=device)


def make_buckets(
    named: Sequence[tuple[str, nn.Parameter]], limit: int, reductions: Mapping[str, Reduction]
) -> list[Bucket]:
    """Buckets of at most ``limit`` bytes, in reverse order; ``reductions`` by the names of parameters."""
    names = {p: n for n, p in named}
    packs = packs_of([p for _, p in reversed(named)], limit, lambda p: reductions[names[p]])
    return [Bucket([(names[p], p) for p in pack], reductions[names[pack[0]]]) for pack in packs]


@dataclass
class _Pack:
    tensors: list[Any] = field(default_factory=list)
    nbytes: int = 0
    last: int = 0


def packs_of(
    tensors: Sequence[Tensor], limit: int, kind: Callable[[Any], Hashable] = lambda tensor: None
) -> list[list[Any]]:
    """Tensors packed by kind, dtype and device up to ``limit`` bytes; ordered by the last tensor of each pack."""
    packs: list[_Pack] = []
    growing: dict[Hashable, _Pack] = {}
    for i, t in enumerate(tensors):
        key = t.dtype, t.device, kind(t)
        if key not in growing or growing[key].nbytes + t.nbytes > limit:
            growing[key] = _Pack()
            packs.append(growing[key])
        pack = growing[key]
        pack.tensors.append(t)
        pack.nbytes += t.nbytes
        pack.last = i
    return [pack.tensors for pack in sorted(packs, key=lambda pack: pack.last)]
