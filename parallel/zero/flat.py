"""Parameters of one kind, one after the other in a vector that is cut evenly over ranks.

The vector is what is gathered and reduced, so nothing is copied into place: its chunk of rank r is elements
``r * chunk`` to ``(r + 1) * chunk``, and each parameter is a view of the whole. A parameter may lie in the chunks of
several ranks, or in none of mine.

=========  ====================================================  ==================================================
buffer     holds                                                 is there
=========  ====================================================  ==================================================
``full``   the whole vector, in the dtype of computation         always; in stage 3 between gather and drop
``shard``  my chunk, in the dtype of the optimiser               always; a view of ``full``, where that has the same
``local``  the gradients of this rank, in the dtype of messages  between backward and reduction; in stage 1 always
=========  ====================================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import commlayer
from commlayer import CommError, Group, UnsupportedOperation, Work
from parallel.buckets import empty_where
from parallel.placement import mark_stretch
from parallel.zero.released import hand_out


class Kind(NamedTuple):
    """What parameters of one vector have in common. Ranks of ``across`` have the same chunk, whose gradients add up."""

    dtype: torch.dtype
    device: torch.device
    trained: bool
    over: Group
    across: Group


@dataclass(frozen=True)
class Settings:
    """Of all vectors. None: of the parameters', or of the master weights' dtype."""

    stage: int
    dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    offload: bool  # shards and their gradients are on the CPU
    divisor: int  # of the sum of gradients


class Member:
    """One parameter: its place in the vector, and ``piece``, what of it is in my chunk."""

    def __init__(self, name: str, param: nn.Parameter, start: int) -> None:
        self.name, self.param, self.shape = name, param, param.shape
        self.start, self.stop = start, start + param.numel()
        self.piece: nn.Parameter


class _Flight:
    """A reduction under way; ``result`` is my chunk of the sum."""

    def __init__(self, result: Tensor, work: Work | None) -> None:
        self.result, self.work = result, work

    def land(self) -> None:
        if self.work is not None:
            self.work.wait()  # and with it goes what was sent
            self.work = None


class Flat:
    """One vector; see above. All methods but ``add`` are collective, or have to come in the same order on all ranks."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], kind: Kind, settings: Settings) -> None:
        self.kind, self.settings, self.over = kind, settings, kind.over
        floating = kind.dtype.is_floating_point
        self.dtype = settings.dtype if settings.dtype is not None and floating else kind.dtype
        self.master = torch.promote_types(kind.dtype, torch.float32) if kind.trained else kind.dtype
        self.reduced = settings.reduce_dtype or self.master
        self.device, self.home = kind.device, torch.device("cpu") if settings.offload else kind.device
        self.members: list[Member] = []
        for name, param in named:
            self.members.append(Member(name, param, self.members[-1].stop if self.members else 0))
        self.total = self.members[-1].stop
        self.chunk = -(-self.total // self.over.size)
        self.length = self.chunk * self.over.size
        self.first = self.chunk * self.over.rank
        self.whole = settings.stage < 3
        self.gathering: Work | None = None
        self.full: Tensor | None = None
        if self.whole:
            self.full = empty_where(self.device, self.length, self.dtype, self.over).zero_()
        self.separate = not self.whole or (self.dtype, self.device) != (self.master, self.home)
        if self.separate and (self.dtype, self.device) == (self.master, self.home):
            self.shard = empty_where(self.home, self.chunk, self.master, self.over).zero_()
        elif self.separate:
            self.shard = torch.zeros(self.chunk, dtype=self.master, device=self.home)
        else:
            assert self.full is not None
            self.shard = self.full[self.first : self.first + self.chunk]
        for member in self.members:
            bounds = [min(max(r * self.chunk, member.start), member.stop) for r in range(self.over.size)]
            bounds = [bound - member.start for bound in (*bounds, member.stop)]
            member.piece = nn.Parameter(self.mine(member, self.shard), requires_grad=kind.trained)
            mark_stretch(member.piece, member.param, self.over, bounds)
        # Of gradients
        self.overlaps = self.over.size == 1 or self.over.explain("reduce_scatter", dtype=self.reduced).native
        self.local: Tensor | None = None
        self._settled = settings.stage > 1 or self.over.size == 1  # local is where it stays
        self.have: set[Member] = set()  # whose gradients are in local
        self.used: set[Member] = set()  # whose were in the last reduction
        self.flights: list[_Flight] = []
        self._streams: set[Any] = set()  # on which they came

    def mine(self, member: Member, chunk: Tensor) -> Tensor:
        """Of a vector like my chunk, the elements of ``member``."""
        start, stop = (min(max(at - self.first, 0), self.chunk) for at in (member.start, member.stop))
        return chunk[start:stop]

    def view(self, member: Member) -> Tensor:
        """The whole parameter, as long as the vector is there."""
        assert self.full is not None
        return self.full[member.start : member.stop].view(member.shape)

    @torch.no_grad()
    def take_over(self, member: Member) -> bool:
        """Where the values of the parameter differ from mine, theirs are right; elsewhere mine, which may be finer.

        Returns whether any did, as far as autograd does not see it by itself.
        """
        values, place = member.param.data, self.view(member)
        if values.data_ptr() != place.data_ptr():  # somebody has put another tensor there
            place.copy_(values)
            hand_out(member.param, place)
        low = min(max(self.first, member.start), member.stop) - member.start
        piece = self.mine(member, self.shard)
        theirs = place.reshape(-1)[low : low + piece.numel()].to(piece.device)
        if theirs.data_ptr() == piece.data_ptr():
            return not self.whole
        same = theirs == piece.to(theirs.dtype)
        piece.copy_(torch.where(same, piece, theirs.to(piece.dtype)))
        return not bool(same.all())

    @torch.no_grad()
    def store(self, member: Member, values: Tensor) -> None:
        """Take my elements from the whole parameter, of any dtype; communicates nothing."""
        if self.full is not None and values.data_ptr() != self.view(member).data_ptr():
            self.view(member).copy_(values)
        if self.separate:
            piece = self.mine(member, self.shard)
            low = min(max(self.first, member.start), member.stop) - member.start
            piece.copy_(values.detach().reshape(-1)[low : low + piece.numel()])

    # Parameters --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_gather(self) -> None:
        """Put the whole vector together, unless it is there or on its way."""
        if self.full is not None:
            return
        mine = self.shard.to(self.device, self.dtype)
        if self.over.size == 1:
            self.full = mine
            return
        self.full = torch.empty(self.length, dtype=self.dtype, device=self.device)
        self.gathering = commlayer.all_gather(mine, group=self.over, out=self.full, async_op=True)

    def finish_gather(self) -> None:
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    def drop(self) -> None:
        """Forget the whole vector. What autograd keeps of it stays."""
        self.finish_gather()
        self.full = None

    @torch.no_grad()
    def start_publishing(self) -> None:
        """Where the whole vector is always there: after the shards have changed, put it together anew."""
        assert self.full is not None
        if self.over.size > 1:
            mine = self.shard.to(self.device, self.dtype)
            self.gathering = commlayer.all_gather(mine, group=self.over, out=self.full, async_op=True)
        elif self.separate:
            self.full.copy_(self.shard)

    # Gradients ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, member: Member, *, more: bool) -> None:
        """Take the gradient that backward has left in the parameter; ``more``: others will be added to it."""
        grad, member.param.grad = member.param.grad, None
        if grad is None:  # backward can come to a parameter with nothing
            return
        if grad.layout != torch.strided:
            raise UnsupportedOperation(f"the gradient of {member.name} is sparse; only dense ones are reduced")
        if grad.requires_grad:
            raise UnsupportedOperation(
                f"the gradient of {member.name} has a graph (create_graph=True), which the reduction would "
                "drop; use torch.autograd.grad for derivatives inside the loss"
            )
        if self.whole and grad.numel() and member.param.data_ptr() != self.view(member).data_ptr():
            raise ValueError(
                f"{member.name} became another tensor ({member.param.dtype} on {member.param.device}) after ZeRO was "
                f"built for {self.dtype} on {self.device}; convert the module first, change values in gathered()"
            )
        if self.device.type != "cpu":
            self._streams.add(torch.accelerator.current_stream(self.device))
        place = self._buffer(self.master if more else self.reduced)[member.start : member.stop].view(member.shape)
        if member in self.have:
            place.add_(grad)
        else:
            place.copy_(grad)
            self.have.add(member)

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        """Where gradients are added up, in ``dtype`` unless some are there already."""
        # What is on its way stays as it is.
        if self.local is None or (not self.have and (self.flights or self.local.dtype != dtype)):
            self.local = torch.empty(self.length, dtype=dtype, device=self.device)
        elif not self.have:
            # Stage 1 keeps it, and what was delivered may still be a part of it.
            for member in self.members:
                grad = member.piece.grad
                if grad is not None and grad.untyped_storage().data_ptr() == self.local.untyped_storage().data_ptr():
                    member.piece.grad = grad.clone()
        return self.local

    @torch.no_grad()
    def start_reduce(self) -> None:
        """Send off the gradients of this rank, zeros where it has none."""
        if self._streams:  # gradients may come from several, and the reduction follows the current one only
            current = torch.accelerator.current_stream(self.device)
            for stream in self._streams - {current}:
                current.wait_stream(stream)
            self._streams.clear()
        local = self._buffer(self.reduced)
        if not self._settled:
            # Here, as all ranks come by in one order. From the second backward on, it is reduced where it is.
            self.local = local = empty_where(self.device, self.length, local.dtype, self.over).copy_(local)
            self._settled = True
        for member in self.members:
            if member not in self.have:
                local[member.start : member.stop].zero_()
        local[self.total :].zero_()
        if self.reduced == torch.float16:  # whose sums overflow
            local.mul_(1 / self.settings.divisor)
        self.used, self.have = self.have, set()
        if self.settings.stage > 1 or local.dtype != self.reduced:
            self.local = None
        local = local.to(self.reduced)
        if self.over.size == 1:
            self.flights.append(_Flight(local, None))
            return
        chunk = local[self.first : self.first + self.chunk]
        # In place only where it stays: a view would keep the whole vector.
        out = torch.empty_like(chunk) if self.local is None else chunk
        work = commlayer.reduce_scatter(local, group=self.over, out=out, async_op=True)
        self.flights.append(_Flight(out, work))

    def arrived(self) -> bool:
        return all(flight.work is None or flight.work.done() for flight in self.flights)

    def land(self) -> None:
        """Wait for what is under way."""
        for flight in self.flights:
            flight.land()
        grown = any(member.piece.grad is not None for member in self.members)
        if grown and self.kind.across.size == 1 and len(self.used) == len(self.members):
            self._add_up([True] * len(self.members))  # nothing is left to be heard of other ranks

    @torch.no_grad()
    def start_across(self) -> None:
        """After landing: add up what the groups that have the same chunk have got."""
        for flight in self.flights:
            if self.kind.across.size > 1:
                result, group = flight.result, self.kind.across
                flight.work = commlayer.all_reduce(result, group=group, out=result, async_op=True)

    @torch.no_grad()
    def deliver(self, used: Sequence[bool]) -> None:
        """Add the mean to the gradients of my pieces; ``used``: of which members any rank has a gradient."""
        self._add_up(used)
        self.used = set()

    @torch.no_grad()
    def _add_up(self, used: Sequence[bool]) -> None:
        scale = 1.0 if self.reduced == torch.float16 else 1 / self.settings.divisor
        for flight in self.flights:
            flight.land()
            mean = flight.result.to(self.home, self.master)
            if scale != 1:
                mean.mul_(scale)
            for member, anywhere in zip(self.members, used, strict=True):
                if not anywhere:
                    continue
                part = self.mine(member, mean)
                if member.piece.grad is None:
                    member.piece.grad = part
                else:
                    member.piece.grad.add_(part)
        self.flights.clear()

    def forget(self) -> None:
        """The gradients of this rank that were not reduced yet."""
        if self.flights:
            raise CommError("zero_grad: called while gradients are being reduced")
        self.have = set()
        if self.settings.stage > 1:
            self.local = None
