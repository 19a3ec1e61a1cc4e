"""The flat operations with plans: through shared memory, by the backend itself, or by fallbacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from commlayer.backends.base import Communicator, Counts, Message
from commlayer.backends.shared import Shared
from commlayer.capability import CapabilitySet, Request
from commlayer.errors import UnsupportedOperation
from commlayer.planner import Plan, plan, through_shared_memory
from commlayer.reduce_op import ReduceOp
from commlayer.volume import Counted
from commlayer.work import Work, gather_works

Runner = Callable[["Planned", str, tuple[Any, ...]], Work]

ANY = 1 << 62  # bytes: more than any tensor has


class FallbackWarning(UserWarning):
    """An operation is emulated; shown under ``COMMLAYER_FALLBACK=warn``."""


class Near(NamedTuple):
    """What goes through the memory of hosts."""

    channel: Any  # with the flat operations of ``backends.base.Collectives``
    capabilities: CapabilitySet
    crowded: bool  # whether ranks share cores
    shared: Shared | None  # the channel, where all ranks are on one host


class Planned:
    """The flat operations of a communicator, with plans for those it lacks.

    ``policy`` is ``silent``, ``warn`` or ``error``. Fallbacks run on an inner, silent one: what they use
    is their own affair.
    """

    def __init__(
        self,
        comm: Communicator | Counted,
        capabilities: CapabilitySet,
        policy: str = "silent",
        near: Near | None = None,
    ) -> None:
        self.comm = comm
        self.rank, self.size, self.device = comm.rank, comm.size, comm.device
        self._device = comm.device.type
        self._capabilities = capabilities
        self._policy = policy
        self._near = near
        self._inner = self if policy == "silent" else Planned(comm, capabilities, near=near)
        # (op, reduce op, dtype, layout) -> from which size on through shared memory, and else how a fallback runs it,
        # or None where it is native.
        self._routes: dict[tuple[Any, ...], tuple[float, Runner | None]] = {}

    def plan(self, request: Request) -> Plan:
        """How a request is done; UnsupportedOperation where it cannot be."""
        found = plan(self._capabilities, self.size, request)
        if self._near is not None and self._near.capabilities.native(request):
            return through_shared_memory(request, found, self.comm.name, self.size, self._near.crowded)
        if found is None:
            status, source = self._capabilities.status(request)
            raise UnsupportedOperation(
                f"{request} on backend {self.comm.name}: {status} ({source}), and no chain of fallbacks ends in "
                "native operations"
            )
        return found

    def _decide(self, key: tuple[Any, ...]) -> tuple[float, Runner | None]:
        op, reduce, dtype, layout = key
        found = self.plan(Request(op, reduce, dtype, self._device, layout))
        if found.emulated and self._policy != "silent":
            text = f"{found.request} is emulated on backend {self.comm.name}:\n" + "\n".join(found.lines(1))
            if self._policy == "error":
                raise UnsupportedOperation(f"{text}\n(COMMLAYER_FALLBACK=error forbids it)")
            warnings.warn(text, FallbackWarning, stacklevel=5)
        runner = None if found.fallback is None else found.fallback.run
        self._routes[key] = found.shared_from, runner
        return found.shared_from, runner

    def _run(self, key: tuple[Any, ...], args: tuple[Any, ...], size: int = 0) -> Work:
        """``size``: bytes of the longest vector of it, the same on all ranks; ``ANY`` where they cannot know."""
        try:
            shared_from, runner = self._routes[key]
        except KeyError:
            shared_from, runner = self._decide(key)
        if size >= shared_from:
            assert self._near is not None
            return getattr(self._near.channel, key[0])(*args)
        if runner is None:
            return getattr(self.comm, key[0])(*args)
        return runner(self._inner, key[0], args)

    def all_reduce(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
        return self._run(("all_reduce", op.name, x.dtype, "even"), (out, x, op), x.nbytes)

    def reduce(self, out: torch.Tensor | None, x: torch.Tensor, op: ReduceOp, dst: int) -> Work:
        return self._run(("reduce", op.name, x.dtype, "even"), (out, x, op, dst), x.nbytes)

    def broadcast(self, x: torch.Tensor, src: int) -> Work:
        return self._run(("broadcast", None, x.dtype, "even"), (x, src), x.nbytes)

    def all_gather(self, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
        return self._run(("all_gather", None, x.dtype, _layout(counts)), (out, x, counts), out.nbytes)

    def gathers_in_place(self, dtype: torch.dtype) -> bool:
        """Whether an even all_gather takes this rank's own share of ``out`` for ``x``, as native ones do."""
        return self.plan(Request("all_gather", None, dtype, self._device)).fallback is None

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work:
        return self._run(("reduce_scatter", op.name, x.dtype, _layout(counts)), (out, x, op, counts), x.nbytes)

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor, out_counts: Counts, in_counts: Counts) -> Work:
        size = x.nbytes if in_counts is None else ANY
        return self._run(("all_to_all", None, x.dtype, _layout(in_counts)), (out, x, out_counts, in_counts), size)

    def gather(self, out: torch.Tensor | None, x: torch.Tensor, dst: int, counts: Counts) -> Work:
        return self._run(("gather", None, x.dtype, _layout(counts)), (out, x, dst, counts), self._whole(x, counts))

    def scatter(self, out: torch.Tensor, x: torch.Tensor | None, src: int, counts: Counts) -> Work:
        return self._run(("scatter", None, out.dtype, _layout(counts)), (out, x, src, counts), self._whole(out, counts))

    def _whole(self, share: torch.Tensor, counts: Counts) -> int:
        """Bytes of all ranks' shares."""
        return share.nbytes * self.size if counts is None else sum(counts) * share.itemsize

    def send(self, x: torch.Tensor, dst: int, tag: int) -> Work:
        return self._run(("send", None, x.dtype, "even"), (x, dst, tag))

    def recv(self, x: torch.Tensor, src: int, tag: int) -> Work:
        return self._run(("recv", None, x.dtype, "even"), (x, src, tag))

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], tag: int) -> Work:
        if not sends and not recvs:
            return Work()
        dtype = (sends or recvs)[0][0].dtype
        plans = [self.plan(Request(op, None, dtype, self._device)) for op in ("send", "recv")]
        if all(found.fallback is None for found in plans):
            return self.comm.exchange(sends, recvs, tag)
        carriers = {found.parts[0].request.dtype for found in plans if found.parts and not found.emulated}
        if len(carriers) == 1 and not any(found.emulated for found in plans):
            carrier = carriers.pop()
            sends = [(x.view(carrier), rank) for x, rank in sends]
            recvs = [(x.view(carrier), rank) for x, rank in recvs]
            return self.exchange(sends, recvs, tag)
        works = [self.recv(x, src, tag) for x, src in recvs]
        return gather_works(works + [self.send(x, dst, tag) for x, dst in sends])

    def barrier(self) -> Work:
        return self._run(("barrier", None, torch.uint8, "even"), ())

    def post(self, x: torch.Tensor, dst: int, tag: int) -> Work:
        return self.comm.post(x, dst, tag)

    def fetch(self, x: torch.Tensor, src: int, tag: int) -> Work:
        return self.comm.fetch(x, src, tag)


def _layout(counts: Counts) -> str:
    return "even" if counts is None else "uneven"
