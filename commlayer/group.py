"""Group: an ordered set of ranks on one backend, which does whatever is asked, natively or by a plan."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

from commlayer import near
from commlayer.backends.base import Communicator
from commlayer.backends.shared import SHARING, Hosts, Shared
from commlayer.backends.single import Single
from commlayer.capability import EVERYTHING, OPS, REDUCING, SPLITTABLE, CapabilitySet, Request
from commlayer.control.seat import Seat
from commlayer.errors import CommError
from commlayer.planned import Planned
from commlayer.planner import Plan, native_cost
from commlayer.recorder import Operation, Recorder
from commlayer.reduce_op import SUM, ReduceOp, as_reduce_op, meaningless
from commlayer.volume import Counted
from commlayer.watchdog import Watch, Watchdog
from commlayer.work import Work

_HANDLES = itertools.count()  # each a number of its own, on this process
_GROUPS: WeakValueDictionary[int, Group] = WeakValueDictionary()


class Group:
    """An ordered set of ranks on one backend.

    ``rank`` and ``size`` are group-local, ``ranks`` are the members' ranks in the world. On a process that is not
    a member, ``rank`` is -1 and every operation is a ValueError. ``handle`` is what :meth:`of` takes.
    """

    def __init__(
        self,
        comm: Communicator | None,
        ranks: Sequence[int],
        capabilities: CapabilitySet,
        policy: str = "silent",
        *,
        dog: Watchdog | None = None,
        parent: Group | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self._capabilities = capabilities
        self._policy = policy
        self._comm = comm
        self._hosts = hosts  # of the ranks of the world; None without shared memory
        self.shared: Shared | None = None  # where all ranks are on one host, and share its memory
        self._children: list[Group] = []
        self._closed = False
        self.handle = next(_HANDLES)
        _GROUPS[self.handle] = self
        self.rank: int
        self.backend: str
        self.device: torch.device
        self.timeout: float
        if comm is None:
            assert parent is not None
            self.rank, self.backend, self.device, self.timeout = -1, parent.backend, parent.device, parent.timeout
            return
        self.rank, self.backend, self.device, self.timeout = comm.rank, comm.name, comm.device, comm.timeout
        dog = dog or Watchdog(Recorder(comm.rank, comm.size, comm.name, None))
        label = dog.label(self.ranks) if comm.seat is None else comm.seat.label
        self.watch = Watch(dog, comm, self.ranks, label, self._plan_of)
        count = None if dog.trace is None else self._sent
        self._near = None if hosts is None else near.find(comm, self.ranks, hosts, capabilities, count)
        if self._near is not None:
            self.shared = self._near.shared
        counted: Any = comm if count is None else Counted(comm, count)
        self.flat = Planned(counted, capabilities, policy, self._near)

    @property
    def is_member(self) -> bool:
        return self.rank >= 0

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Group:
        """A group of this process and no other, which needs no init: for modules that also run serially."""
        return cls(Single(torch.device(device), 0.0), (0,), CapabilitySet((EVERYTHING,)))

    @staticmethod
    def of(handle: int) -> Group:
        """The group with this ``handle``: where only numbers can be passed, as into operators of compiled graphs."""
        found = _GROUPS.get(int(handle))  # in graphs it may be symbolic
        if found is None:
            raise CommError(f"handle: {handle} is of no group that still exists; compile again what refers to it")
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # a copied module talks to the same ranks

    def __reduce__(self) -> Any:
        raise TypeError("a Group belongs to its process and cannot be pickled; of a module, save the state_dict()")

    def __repr__(self) -> str:
        place = f"rank {self.rank} of {self.size}" if self.is_member else f"not a member, {self.size} ranks"
        return f"Group({self.backend}, {place}, {self.device})"

    def capabilities(self) -> CapabilitySet:
        """What the backend does natively, as agreed by all ranks."""
        return self._capabilities

    def version(self) -> str:
        """The version of what is underneath."""
        return self._comm.version() if self._comm is not None else ""

    def explain(
        self,
        op: str,
        *,
        reduce: ReduceOp | str = SUM,
        dtype: torch.dtype = torch.float32,
        uneven: bool = False,
    ) -> Explanation:
        """How ``op`` is done here, its cost against a native one, and why: print it.

        Raises ValueError for an unknown op, UnsupportedOperation where nothing works.
        """
        if op not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
        self._check_member()
        name = "premul_sum" if reduce == "premul_sum" else as_reduce_op(reduce).name
        why = meaningless(name, dtype) if op in REDUCING else None
        if why is not None:
            raise TypeError(f"reduce: {name} of {dtype} has no meaning: {why}")
        request = Request(
            op,
            name if op in REDUCING else None,
            torch.uint8 if op == "barrier" else dtype,
            self.device.type,
            "uneven" if uneven and op in SPLITTABLE else "even",
        )
        return Explanation(self.flat.plan(request), self.size, self.backend)

    def subgroup(self, ranks: Sequence[int]) -> Group:
        """The group of these (group-local) ranks, in this order; called by its members, and by them alone.

        One rank costs no communicator; all ranks in order are this very group.
        """
        self._check_member()
        members = _checked_ranks(ranks, self.size)
        if self.rank not in members:
            raise ValueError(f"ranks: only members call subgroup; {list(members)} lacks this rank, {self.rank}")
        if members == tuple(range(self.size)):
            return self
        return self._child(members)

    def _child(self, members: tuple[int, ...], timeout: float | None = None) -> Group:
        assert self._comm is not None
        world_ranks = [self.ranks[rank] for rank in members]
        if self.rank not in members:
            return Group(None, world_ranks, self._capabilities, parent=self)
        dog = self.watch.dog
        if len(members) == 1:
            alone = CapabilitySet((EVERYTHING,))
            return Group(Single(self.device, self.timeout), world_ranks, alone, self._policy, dog=dog)
        seat = self._seat(world_ranks)
        comm = self._comm.subgroup(members, seat)
        if timeout is not None:
            comm.limit_to(timeout)
        child = Group(comm, world_ranks, self._capabilities, self._policy, dog=dog, hosts=self._hosts)
        self._children.append(child)
        return child

    def twin(self, name: str, shared: bool = True) -> Group:
        """The same ranks on a communicator of their own; called by every member, from any thread.

        ``shared``: whether they may share memory.
        """
        assert self._comm is not None
        seat = self._seat(self.ranks, f"{self.watch.label} {name}")
        comm = self._comm.subgroup(range(self.size), seat)
        hosts = self._hosts if shared else None
        child = Group(comm, self.ranks, self._capabilities, self._policy, dog=self.watch.dog, hosts=hosts)
        self._children.append(child)
        return child

    def _seat(self, world_ranks: Sequence[int], label: str = "") -> Seat:
        """At the control channel, for a group of these, once all of them have come."""
        assert self._comm is not None
        assert self._comm.seat is not None
        control, generation = self._comm.seat.control, self._comm.seat.generation
        seat = Seat(control, generation, label or self.watch.dog.label(world_ranks), world_ranks, self._comm.progress)
        # Making a communicator blocks, on MPI without a deadline: so not before everybody is there.
        seat.meet("made", b"", self.timeout)
        return seat

    def around(self, ranks: Sequence[int], comm: Communicator, capabilities: Callable[[], CapabilitySet]) -> Group:
        """The group of these ranks on a communicator that somebody else has made; called by its members.

        For the world's group: ``ranks`` are the world's.
        """
        if len(ranks) > 1:
            comm.seat = self._seat(ranks)
        hosts = self._hosts if comm.name in SHARING else None
        child = Group(comm, ranks, capabilities(), self._policy, dog=self.watch.dog, hosts=hosts)
        self._children.append(child)
        return child

    @classmethod
    def from_process_group(cls, group: Any) -> Group:
        """The layer's group on a ``torch.distributed.ProcessGroup`` of any backend; called by every member.

        Calls ``init`` where it was not yet, which every rank has to call. The process group remains its owner's.
        Raises TypeError for anything else.
        """
        from commlayer.torch_backend import creation  # which stands above groups, as their makers do

        return creation.from_process_group(group)

    def new_group(self, ranks: Sequence[int]) -> Group:
        """The group of these (group-local) ranks, in this order; called by every rank of this group."""
        self._check_member()
        members = _checked_ranks(ranks, self.size)
        return self.watch.begin("new_group", details=(None, None, list(members))).run(
            lambda: (self._child(members), Work())
        )

    def split(self, color: int | None, key: int = 0) -> Group | None:
        """One group per ``color``, ordered by ``key``, then rank (MPI 4.1, MPI_Comm_split); None joins none.

        Called by every rank of this group.
        """
        self._check_member()
        if color is not None and not isinstance(color, int):
            raise TypeError(f"color: expected an int or None, got {color!r}")
        if not isinstance(key, int):
            raise TypeError(f"key: expected an int, got {key!r}")
        assert self._comm is not None
        comm = self._comm

        def start() -> tuple[Group | None, Work]:
            places = [json.loads(text) for text in comm.share(json.dumps([color, key]).encode())]
            if color is None:
                return None, Work()
            members = [rank for rank, (other, _) in enumerate(places) if other == color]
            members.sort(key=lambda rank: (places[rank][1], rank))
            return self._child(tuple(members)), Work()

        return self.watch.begin("split").run(start)

    def _check_member(self) -> None:
        if self.rank < 0:
            raise ValueError(f"group: this process is not a member of the group of ranks {list(self.ranks)}")

    def _plan_of(self, op: Operation) -> str:
        """How an operation was done, for records of it."""
        name = {"sendrecv": "send"}.get(op.name, op.name)
        if name not in OPS or op.dtype is None:
            return ""
        layout = "uneven" if op.detail("sizes") is not None and name in SPLITTABLE else "even"
        request = Request(name, op.reduce.name if op.reduce else None, op.dtype, self.device.type, layout)
        if self.size == 1:
            return "native"
        found = self.flat.plan(request)
        if found.shared_from < math.inf and op.shape is not None:
            whole = math.prod(op.shape) * op.dtype.itemsize * (self.size if name in ("all_gather", "gather") else 1)
            if (layout == "uneven" and name == "all_to_all") or whole >= found.shared_from:
                return "shared memory"
        return found.fallback.name if found.fallback is not None else "native"

    def _sent(self, size: int) -> None:
        """Count it for the newest operation: all that one sends is under way before the next begins."""
        op = self.watch.dog.recorder.last(self.watch.label)
        if op is not None:
            op.sent += size

    def close(self, linger: float = 5.0) -> None:
        """Release the communicators of this group and of the groups made from it.

        Waits up to ``linger`` seconds, in all, for operations that nobody has waited for.
        """
        self._close(time.monotonic() + linger)

    def _close(self, end: float) -> None:
        for child in self._children:
            child._close(end)
        self._children.clear()
        if self._comm is not None and not self._closed:
            self._closed = True
            self.watch.close(end)
            if self._near is not None:
                self._near.channel.close(end)
            self._comm.close(end)


class Explanation:
    """A plan for people (``print`` it) and for programs (``to_dict``)."""

    def __init__(self, plan: Plan, size: int, backend: str) -> None:
        self.plan = plan
        self.size = size
        self.backend = backend

    @property
    def native(self) -> bool:
        return not self.plan.emulated

    @property
    def ratio(self) -> float:
        """Estimated time at 1 MiB over that of a good native implementation."""
        op = self.plan.request.op
        native = native_cost("send" if op == "recv" else op, self.size)  # a message is counted once, as sent
        return self.plan.cost.seconds() / native.seconds() if self.size > 1 else 1.0

    def __str__(self) -> str:
        lines = list(self.plan.lines())
        if self.plan.emulated:
            lines.append(f"cost: about {self.ratio:.1f}x a native one at 1 MiB on {self.size} ranks")
        if self.plan.why:
            lines.append(f"why: {self.plan.request} is {self.plan.why} on backend {self.backend}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend, "ranks": self.size, "ratio": round(self.ratio, 3)} | self.plan.to_dict()


def _checked_ranks(ranks: Sequence[int], size: int) -> tuple[int, ...]:
    members = tuple(ranks)
    if not members:
        raise ValueError("ranks: a group needs at least one rank, got none")
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in members):
        raise TypeError(f"ranks: expected ints, got {list(members)}")
    if len(set(members)) != len(members):
        raise ValueError(f"ranks: each rank at most once, got {list(members)}")
    if not all(0 <= rank < size for rank in members):
        raise ValueError(f"ranks: expected 0 to {size - 1}, got {list(members)}")
    return members
