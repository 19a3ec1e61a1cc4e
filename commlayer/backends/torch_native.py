"""The process groups of torch.distributed: gloo, nccl, xccl, ccl, and any other that torch knows.

Works on ``ProcessGroup`` methods rather than on ``torch.distributed`` functions: the same calls, without
the functions' checks and logging.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from commlayer.backends.base import INTERNAL_TAG, Closed, Communicator, Counts, Message, pieces
from commlayer.backends.process_groups import DEVICE_OF, constructor
from commlayer.backends.single import Single
from commlayer.backends.torch_requests import FromAny, Letter, Native, plain, translate
from commlayer.control.client import Client
from commlayer.control.seat import Seat
from commlayer.control.store import HubStore
from commlayer.errors import CommError, UnsupportedOperation
from commlayer.reduce_op import ReduceOp
from commlayer.work import Work, gather_works

OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "band": dist.ReduceOp.BAND,
    "bor": dist.ReduceOp.BOR,
    "bxor": dist.ReduceOp.BXOR,
}
# Backends that run a batch of messages as one, and would deadlock on opposite single ones.
BATCHED = frozenset({"nccl", "xccl", "ccl"})


UNLIMITED = timedelta(days=1)  # for the process groups: deadlines are the layer's own
LARGE = 1 << 18  # bytes from which on bandwidth decides, and not latency
STUCK = 2.0  # seconds for the worker threads of a broken group to end
POISON_TAG = (1 << 31) - 1


class TorchCommunicator(Communicator):
    """Ranks of a torch.distributed process group."""

    def __init__(
        self,
        group: Any,
        name: str,
        device: torch.device,
        store: Any,
        timeout: float,
        address: str | None = None,
        owned: bool = True,
    ) -> None:
        self.group = group
        self.address = address  # of this host, as the other ranks know it
        self.owned = owned
        self.name = name
        self.device = device
        self.rank = group.rank()
        self.size = group.size()
        self.timeout = timeout
        # Accelerators' waits order streams and do not block, unless they are given a limit.
        self.asynchronous = device.type != "cpu"
        self._store = store
        self._timedelta = UNLIMITED if name == "gloo" and owned else timedelta(seconds=timeout)
        self._posted: Counter[tuple[int, int, int]] = Counter()
        self._fetched: Counter[tuple[int, int, int]] = Counter()
        self._reduce_options: dict[str, Any] = {}
        self._messages: deque[Any] = deque()  # that nobody waits for, and so the collectives
        self._collectives: deque[Any] = deque()
        self._ending = threading.Lock()  # nobody else holds the group while it is closed
        self._batched = name in BATCHED and getattr(group, "supports_coalescing", True)
        self._alone = Single(device, timeout)  # for messages to oneself, which gloo refuses

    def version(self) -> str:
        if self.name == "nccl":
            return ".".join(map(str, torch.cuda.nccl.version()))
        return f"torch {torch.__version__}"

    def translated(self, error: RuntimeError, what: str) -> CommError:
        return self.failure or translate(error, f"{what} on rank {self.rank} of {self.size}")

    def limit_to(self, timeout: float) -> None:
        super().limit_to(timeout)
        if self._timedelta is not UNLIMITED:
            self._timedelta = timedelta(seconds=timeout)

    def _start(self, what: str, call: Callable[..., Any], *arguments: Any, keep: Any = ()) -> Work:
        try:
            work = call(*arguments)
        except RuntimeError as error:
            raise self.translated(error, what) from error
        return Native(self, work, what, arguments, keep)

    def _operation(self, op: ReduceOp) -> Any:
        if op.factor is not None:
            # As a number: NCCL would read a tensor's memory in the dtype of the values.
            return dist._make_nccl_premul_sum(float(op.factor))
        return OPERATIONS[op.name]

    def _options(self, kind: Any, **values: Any) -> Any:
        options = kind()
        options.timeout = self._timedelta
        for name, value in values.items():
            setattr(options, name, value)
        return options

    def all_reduce(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
        if out.data_ptr() != x.data_ptr():
            out.copy_(x)
        options = self._reduce_options.get(op.name)
        if options is None:
            options = self._options(c10d.AllreduceOptions, reduceOp=self._operation(op))
            if op.factor is None:
                self._reduce_options[op.name] = options
        return self._start("all_reduce", self.group.allreduce, [plain(out)], options)

    def reduce(self, out: torch.Tensor | None, x: torch.Tensor, op: ReduceOp, dst: int) -> Work:
        # Process groups reduce in place and use the buffers of other ranks as scratch.
        target = torch.empty_like(x) if out is None else out
        target.copy_(x)
        options = self._options(c10d.ReduceOptions, reduceOp=self._operation(op), rootRank=dst)
        return self._start("reduce", self.group.reduce, [plain(target)], options)

    def broadcast(self, x: torch.Tensor, src: int) -> Work:
        return self._start(
            "broadcast", self.group.broadcast, [plain(x)], self._options(c10d.BroadcastOptions, rootRank=src)
        )

    def all_gather(self, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
        options = self._options(c10d.AllgatherOptions)
        if counts is None and self.name == "gloo" and x.nbytes >= LARGE:
            # Gloo gathers into memory of its own, and copies it from there.
            places = out.view(self.size, -1)
            places[self.rank].copy_(x)
            return gather_works([self.broadcast(place, src) for src, place in enumerate(places)])
        if counts is None:
            return self._start("all_gather", self.group._allgather_base, plain(out), x, options)
        rows = [plain(row) for row in pieces(out, counts, self.size)]
        return self._start("all_gather", self.group.allgather, [rows], [x], options)

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work:
        if counts is None and self.name == "gloo" and op.name == "sum" and x.is_floating_point() and x.nbytes >= LARGE:
            # Gloo reduces all of it on every rank.
            received = torch.empty_like(x)
            exchange = self.all_to_all(received, x, None, None)
            return exchange.then(lambda: torch.sum(received.view(self.size, -1), 0, out=out))
        options = self._options(c10d.ReduceScatterOptions, reduceOp=self._operation(op))
        if self.name == "gloo":
            # An all_reduce does it there, and a wait for it passes no limit on: that one's own must be right.
            options.timeout = timedelta(seconds=self.limit(None))
        if counts is None:
            return self._start("reduce_scatter", self.group._reduce_scatter_base, plain(out), x, options)
        rows = pieces(x, counts, self.size)
        return self._start("reduce_scatter", self.group.reduce_scatter, [plain(out)], [rows], options)

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor, out_counts: Counts, in_counts: Counts) -> Work:
        options = self._options(c10d.AllToAllOptions)
        splits = (list(out_counts or ()), list(in_counts or ()))
        return self._start("all_to_all", self.group.alltoall_base, plain(out), x, *splits, options)

    def gather(self, out: torch.Tensor | None, x: torch.Tensor, dst: int, counts: Counts) -> Work:
        options = self._options(c10d.GatherOptions, rootRank=dst)
        rows = [] if out is None else [[plain(row) for row in pieces(out, counts, self.size)]]
        return self._start("gather", self.group.gather, rows, [x], options)

    def scatter(self, out: torch.Tensor, x: torch.Tensor | None, src: int, counts: Counts) -> Work:
        options = self._options(c10d.ScatterOptions, rootRank=src)
        rows = [] if x is None else [pieces(x, counts, self.size)]
        return self._start("scatter", self.group.scatter, [plain(out)], rows, options)

    def send(self, x: torch.Tensor, dst: int, tag: int) -> Work:
        if dst == self.rank:
            return self._alone.send(x, 0, tag)
        if self._batched:
            return self.exchange([(x, dst)], [], tag)
        return self._start("send", self.group.send, [x], dst, tag)

    def recv(self, x: torch.Tensor, src: int, tag: int) -> Work:
        if src == self.rank:
            return self._alone.recv(x, 0, tag)
        if self._batched:
            return self.exchange([], [(x, src)], tag)
        return self._start("recv", self.group.recv, [plain(x)], src, tag)

    def recv_any(self, x: torch.Tensor, tag: int) -> FromAny:
        try:
            return FromAny(self, self.group.recv_anysource([plain(x)], tag), "recv", x)
        except RuntimeError as error:
            raise self.translated(error, "recv") from error

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], tag: int) -> Work:
        # Messages to oneself first, sends before receives; they never reach the process group.
        works = [self._alone.send(x, 0, tag) for x, dst in sends if dst == self.rank]
        works += [self._alone.recv(x, 0, tag) for x, src in recvs if src == self.rank]
        sends = [message for message in sends if message[1] != self.rank]
        recvs = [message for message in recvs if message[1] != self.rank]
        if not self._batched:
            works += [self.recv(x, src, tag) for x, src in recvs]
            works += [self.send(x, dst, tag) for x, dst in sends]
            return gather_works(works)
        if 0 < tag < INTERNAL_TAG:
            raise UnsupportedOperation(f"tag: messages on {self.name} carry none and match in order; got {tag}")
        if sends or recvs:
            works.append(self._batch(sends, recvs))
        return gather_works(works)

    def _batch(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Work:
        # Always a batch, also of one: these libraries use other communicators, and another order, for messages
        # outside of a batch, so the two never match.
        def start() -> Any:
            self.group._start_coalescing()
            try:
                for x, src in recvs:
                    self.group.recv([plain(x)], src, 0)
                for x, dst in sends:
                    self.group.send([x], dst, 0)
            finally:
                work = self.group._end_coalescing()
            return work

        return self._start("exchange", start, keep=(sends, recvs))

    def post(self, x: torch.Tensor, dst: int, tag: int) -> Work:
        self._store.set(self._address(self._posted, self.rank, dst, tag), x.cpu().view(torch.uint8).numpy().tobytes())
        return Work()

    def fetch(self, x: torch.Tensor, src: int, tag: int) -> Work:
        return Letter(self, self._address(self._fetched, src, self.rank, tag), x)

    def _address(self, counter: Counter[tuple[int, int, int]], src: int, dst: int, tag: int) -> str:
        counter[src, dst, tag] += 1
        return f"mail/{src}/{dst}/{tag}/{counter[src, dst, tag]}"

    def barrier(self) -> Work:
        options = self._options(c10d.BarrierOptions)
        if self.device.type != "cpu":
            options.device = self.device
        return self._start("barrier", self.group.barrier, options)

    def fail(self, error: CommError) -> None:
        """Wake who waits: by the group's own abort, or by what ends all connections of a gloo group."""
        self.failure = error
        with self._ending, suppress(RuntimeError, CommError):
            if self.name == "gloo":
                self._poison()
            else:
                self.group.abort()

    def _poison(self) -> None:
        # In gloo, a message that times out closes every pair, and each pending operation ends with an error; from a
        # rank whose pair is closed already, it does not come so far.
        nothing = torch.empty(1, dtype=torch.uint8)
        for step in range(1, self.size):
            try:
                source = (self.rank + step) % self.size
                self.group.recv([nothing], source, POISON_TAG).wait(timedelta(milliseconds=1))
            except RuntimeError as error:
                if "imed out" in str(error):
                    break

    def subgroup(self, ranks: Sequence[int], seat: Seat) -> TorchCommunicator:
        name = f"{seat.generation}/{seat.label}/"
        if self.name == "gloo":
            assert isinstance(seat.control, Client)
            store: Any = HubStore(seat.control, self.timeout, name, seat.ranks)
        else:
            store = dist.PrefixStore(name, self._store)
        place = list(ranks).index(self.rank), len(ranks)
        made = create(self.name, store, *place, self.device, self.timeout, self.address)
        made.seat = seat
        return made

    def adopt(self, work: Any, message: bool, tensors: Any) -> None:
        """Keep what nobody waits for until it is complete."""
        # A garbage collector may call this from any thread: deques alone are safe then.
        if message:
            self._messages.append((work, tensors))  # whether one is complete can only be found out by waiting
        elif not work.is_completed():
            while self._collectives and self._collectives[0].is_completed():
                self._collectives.popleft()
            self._collectives.append(work)

    def close(self, end: float = 0.0) -> None:
        """Join the process group's worker threads, by dropping the last reference to it.

        They must not outlive the interpreter: a worker that lets go of a tensor during shutdown asks for the GIL and
        ends in std::terminate (torch 2.13, gloo).
        """
        for work, _ in self._messages:
            with suppress(RuntimeError):  # a peer that never took it, or has left
                work.wait(timedelta(seconds=max(end - time.monotonic(), 1e-3)))
        for work in self._collectives:
            while not work.is_completed() and self.failure is None:
                if time.monotonic() > end:
                    self.fail(CommError("closed while a collective was unfinished"))
                time.sleep(0.002)
        self._messages.clear()
        self._collectives.clear()
        with self._ending:
            group, self.group = [self.group], Closed()
        if self.owned and self.name != "gloo" and hasattr(group[0], "shutdown"):
            group[0].shutdown()
        if self.failure is None or not self.owned:
            group.clear()
        elif not _cleared_in_time(group):
            stuck.append(group)


stuck: list[Any] = []  # groups whose worker threads do not end: such a process can only leave by os._exit


def _cleared_in_time(group: list[Any]) -> bool:
    """Drop the last reference to a broken group, whose end waits for threads that may wait for ever."""
    try:
        thread = threading.Thread(target=group.clear, name="commlayer-close", daemon=True)
        thread.start()
    except RuntimeError:  # too late in the life of this process
        return False
    thread.join(STUCK)
    return not thread.is_alive()


def create(
    name: str, store: Any, rank: int, size: int, device: torch.device, timeout: float, address: str | None = None
) -> TorchCommunicator:
    """A communicator on a fresh process group; ``address`` is this host's, as the other ranks know it.

    Raises BackendUnavailable where this torch does not have the backend, CommError where the ranks do not meet.
    """
    make = constructor(name, address)
    try:
        group = make(dist.PrefixStore("torch", store), rank, size, timedelta(seconds=timeout))
        if name == "gloo":
            group._set_default_timeout(UNLIMITED)  # the other one was for meeting
        if name in BATCHED and hasattr(group, "eager_connect_single_device"):
            # A batch of messages must not be the first call of a group that some of its ranks take no part in.
            group.eager_connect_single_device(device)
    except CommError:  # of the hub's store, which knows what has happened
        raise
    except RuntimeError as error:
        raise translate(error, f"connecting rank {rank} of {size} by {name}") from error
    return TorchCommunicator(group, name, device, store, timeout, address)


def wrap(group: Any, store: Any, timeout: float | None = None) -> TorchCommunicator:
    """A process group that the program has made itself; its own timeout where None is given."""
    pairs = dict(item.split(":") for item in dist.get_backend_config(group).split(",") if ":" in item)
    # An accelerator only where its own library serves it: plain gloo lists every device it could stage.
    kinds = [kind for kind in ("cuda", "xpu") if DEVICE_OF.get(pairs.get(kind, "")) == kind]
    kind = next((kind for kind in kinds if getattr(torch, kind).is_available()), "cpu")
    name = pairs.get(kind, dist.get_backend(group))
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, getattr(torch, kind).current_device())
    backend = group._get_backend(torch.device(kind))
    theirs = getattr(getattr(backend, "options", None), "_timeout", dist.default_pg_timeout)
    seconds = timeout if timeout is not None else theirs.total_seconds()
    return TorchCommunicator(backend, name, device, store, seconds, owned=False)


def host_store() -> Any:
    """The store of a program that has initialised torch.distributed itself."""
    return c10d._get_default_store()
