"""torch.distributed's process group, on a ``Group``.

torch's C++ calls some methods by their names (``getGroupName``, ``allreduce``), torch's Python all of them; what the
names mean is in torch/csrc/distributed/c10d/ProcessGroup.hpp. Newer names (torch 2.13) stand beside the older.
"""

# mypy: disable-error-code="override, assignment, misc"
# One signature takes what torch spells out as several overloads.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from commlayer.backends.torch_requests import plain
from commlayer.capability import Request
from commlayer.checks import check_rank, check_reduce, check_tag, check_tensor
from commlayer.differentiable import finished
from commlayer.errors import CommError, UnsupportedOperation
from commlayer.functional import if_uneven
from commlayer.group import Group
from commlayer.layout import destination, flat
from commlayer.reduce_op import BY_NAME, ReduceOp, premul_sum
from commlayer.torch_backend import kernels
from commlayer.torch_backend.channel import Channel
from commlayer.torch_backend.untraced import untraced
from commlayer.torch_backend.works import Futures, TorchWork, callback_depth, together
from commlayer.work import Work

Tensor = torch.Tensor


@untraced
class ProcessGroup(dist.ProcessGroup):
    """A ``Group`` as torch.distributed knows it.

    What torch's own backend under the group does natively, on contiguous tensors, is that backend's call and costs
    nothing more; everything else is the group's, native or by a plan. Under COMMLAYER_DEBUG, COMMLAYER_CHECK_NAN and
    COMMLAYER_TRACE all calls are the group's. ``beside``: torch's backends for tensors on other devices, by their type.
    """

    def __init__(self, group: Group, beside: dict[str, Any]) -> None:
        super().__init__(group.rank, group.size)  # type: ignore[call-arg]
        kernels.install()
        assert group._comm is not None
        self.group = group
        self._beside = beside
        self._name = self._desc = ""
        self._then: Callable[[], None] | None = None
        self._futures = Futures(group._comm)
        self._channels = {-1: Channel(group, beside, self._futures)}  # by depth of callbacks
        self._token = torch.empty(0, dtype=torch.uint8, device=group.device)  # what a barrier is asked about with

    def _channel(self) -> Channel:
        """The program's own, or that of callbacks of futures.

        Callbacks run beside the program, and what they start must not be mixed with what it starts, which happens in
        another order on each rank. They have a communicator of their own, made at the first need.
        """
        depth = callback_depth() if self.group.size > 1 else -1
        try:
            return self._channels[depth]
        except KeyError:
            twin = self.group.twin(f"callbacks {depth}")
            return self._channels.setdefault(depth, Channel(twin, self._beside, self._futures))

    # Reductions

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        (x,), opts = _listed(tensors), _options(c10d.AllreduceOptions, opts, timeout, "reduceOp")
        reduce = opts.reduceOp
        channel = self._channel()
        direct = channel.direct("all_reduce", x, reduce)
        if direct is not None and (x.layout is not torch.strided or x.is_contiguous()):
            return channel.started("all_reduce", direct.allreduce([x], opts), [x])
        op = self._checked(x, reduce)

        def start() -> tuple[Any, Work]:
            data = plain(x)
            _, buffer, finish = destination(x.shape, data, data, aliases=True)
            return finished(None, channel.flat.all_reduce(buffer, flat(data), op) if x.numel() else Work(), finish)

        return channel.run("all_reduce", x, start, [x], opts, reduce=op)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:
        each = c10d.AllreduceOptions()
        if opts is not None:
            each.reduceOp, each.timeout = opts.reduceOp, opts.timeout
        return self._each([lambda x=x: self.allreduce([x], each) for x in tensors])

    def reduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: Any = None) -> dist.Work:
        (x,), opts = _listed(tensors), _options(c10d.ReduceOptions, opts, timeout, "rootRank")
        if op is not None:
            opts.reduceOp = op
        reduce, root = opts.reduceOp, check_rank(opts.rootRank, self.group, "dst")
        channel = self._channel()
        direct = channel.direct("reduce", x, reduce)
        if direct is not None and x.is_contiguous():
            return channel.started("reduce", direct.reduce([x], opts), [x])
        op = self._checked(x, reduce)

        def start() -> tuple[Any, Work]:
            data = plain(x)
            if not x.numel():
                return None, Work()
            if self.group.rank != root:
                return None, channel.flat.reduce(None, flat(data), op, root)
            _, buffer, finish = destination(x.shape, data.new_empty(0), data)
            apart = flat(data).clone() if finish is None else flat(data)
            return finished(None, channel.flat.reduce(buffer, apart, op, root), finish)

        return channel.run("reduce", x, start, [x], opts, reduce=op, details=(root,))

    def reduce_scatter_single(self, output: Tensor, x: Tensor, opts: Any = None) -> dist.Work:
        opts = _options(c10d.ReduceScatterOptions, opts)
        reduce = opts.reduceOp
        channel = self._channel()
        direct = channel.direct("reduce_scatter", x, reduce)
        if direct is not None and x.is_contiguous() and output.is_contiguous():
            flat_output, flat_x = _alike(output, x)
            return channel.started("reduce_scatter", direct._reduce_scatter_base(flat_output, flat_x, opts), [output])
        op = self._checked(x, reduce)
        self._check_pair(output, x, output.numel() * self.group.size, x.numel())

        def start() -> tuple[Any, Work]:
            data = plain(x)
            _, buffer, finish = destination(output.shape, data, plain(output))
            work = channel.flat.reduce_scatter(buffer, flat(data), op, None) if x.numel() else Work()
            return finished(None, work, finish)

        return channel.run("reduce_scatter", x, start, [output], opts, reduce=op, details=(None, 0, None))

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        (output,), (parts,) = _listed(outputs), _lists(inputs)
        opts = _options(c10d.ReduceScatterOptions, opts, timeout, "reduceOp")
        channel = self._channel()
        if output.device.type in self._beside:
            return self._beside[output.device.type].reduce_scatter([output], [parts], opts)
        self._check_list(parts, output)
        op = self._checked(output, opts.reduceOp)
        counts = [part.numel() for part in parts]
        if counts[self.group.rank] != output.numel():
            raise ValueError(f"output: has {output.numel()} elements, but this rank's share is of {counts}")

        def start() -> tuple[Any, Work]:
            _, buffer, finish = destination(output.shape, output.new_empty(0), plain(output))
            work = channel.flat.reduce_scatter(buffer, _joined(parts), op, if_uneven(counts)) if sum(counts) else Work()
            return finished(None, work, finish)

        return channel.run("reduce_scatter", output, start, [output], opts, reduce=op, details=(None, 0, counts))

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return self._each([lambda o=o, x=x: self.reduce_scatter_single(o, x, opts) for o, x in pairs])

    # Movement

    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        (x,), opts = _listed(tensors), _options(c10d.BroadcastOptions, opts, timeout, "rootRank")
        channel = self._channel()
        direct = channel.direct("broadcast", x)
        if direct is not None and x.is_contiguous():
            return channel.started("broadcast", direct.broadcast([x], opts), [x])
        root = check_rank(opts.rootRank, self.group, "src")
        check_tensor(x, self.group)

        def start() -> tuple[Any, Work]:
            data = plain(x)
            _, buffer, finish = destination(x.shape, data.new_empty(0), data)
            if self.group.rank == root:
                if finish is not None:
                    buffer.copy_(flat(data))
                finish = None
            return finished(None, channel.flat.broadcast(buffer, root) if x.numel() else Work(), finish)

        return channel.run("broadcast", x, start, [x], opts, details=(root,))

    def all_gather_single(self, output: Tensor, x: Tensor, opts: Any = None) -> dist.Work:
        opts = _options(c10d.AllgatherOptions, opts)
        channel = self._channel()
        direct = channel.direct("all_gather", x)
        if direct is not None and x.is_contiguous() and output.is_contiguous():
            flat_output, flat_x = _alike(output, x)
            return channel.started("all_gather", direct._allgather_base(flat_output, flat_x, opts), [output])
        check_tensor(x, self.group)
        self._check_pair(output, x, output.numel(), x.numel() * self.group.size)

        def start() -> tuple[Any, Work]:
            data, target = plain(x), plain(output)
            own = target.data_ptr() + self.group.rank * data.nbytes
            in_place = data.data_ptr() == own and data.is_contiguous() and target.is_contiguous()
            if in_place and self._in_place(data):  # as FSDP2 gathers
                return None, channel.flat.all_gather(target.view(-1), data.view(-1), None)
            _, buffer, finish = destination(output.shape, data, target)
            return finished(None, channel.flat.all_gather(buffer, flat(data), None) if x.numel() else Work(), finish)

        return channel.run("all_gather", x, start, [output], opts, details=(None, 0, None))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        (rows,), (x,) = _lists(outputs), _listed(inputs)
        opts = _options(c10d.AllgatherOptions, opts, timeout)
        counts = [row.numel() for row in rows]
        uneven = if_uneven(counts)
        channel = self._channel()
        direct = channel.direct("all_gather", x, layout="even" if uneven is None else "uneven")
        if direct is not None and x.is_contiguous() and all(row.is_contiguous() for row in rows):
            return channel.started("all_gather", direct.allgather([rows], [x], opts), rows)
        check_tensor(x, self.group)
        self._check_list(rows, x)
        if counts[self.group.rank] != x.numel():
            raise ValueError(f"tensor: has {x.numel()} elements, but this rank's place in tensor_list is of {counts}")

        def start() -> tuple[Any, Work]:
            buffer = x.new_empty(sum(counts))
            work = channel.flat.all_gather(buffer, flat(plain(x)), uneven) if buffer.numel() else Work()
            return None, work.then(lambda: _deal(buffer, rows))

        return channel.run("all_gather", x, start, rows, opts, details=(None, 0, counts))

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        rows = zip(outputs, inputs, strict=True)
        return self._each([lambda o=o, x=x: self.allgather([o], [x], opts) for o, x in rows])

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return self._each([lambda o=o, x=x: self.all_gather_single(o, x, opts) for o, x in pairs])

    def gather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        (x,), opts = _listed(inputs), _options(c10d.GatherOptions, opts, timeout, "rootRank")
        root = check_rank(opts.rootRank, self.group, "dst")
        at_root = self.group.rank == root
        rows = _lists(outputs)[0] if at_root else []
        channel = self._channel()
        direct = channel.direct("gather", x)
        if direct is not None and x.is_contiguous() and all(row.is_contiguous() for row in rows):
            return channel.started("gather", direct.gather([rows] if at_root else [], [x], opts), rows)
        check_tensor(x, self.group)
        if at_root:
            self._check_list(rows, x, equal=True)

        def start() -> tuple[Any, Work]:
            if not x.numel():
                return None, Work()
            if not at_root:
                return None, channel.flat.gather(None, flat(plain(x)), root, None)
            buffer = x.new_empty(x.numel() * self.group.size)
            return None, channel.flat.gather(buffer, flat(plain(x)), root, None).then(lambda: _deal(buffer, rows))

        return channel.run("gather", x, start, rows, opts, details=(root, 0, None))

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        (output,), opts = _listed(outputs), _options(c10d.ScatterOptions, opts, timeout, "rootRank")
        root = check_rank(opts.rootRank, self.group, "src")
        at_root = self.group.rank == root
        parts = _lists(inputs)[0] if at_root else []
        channel = self._channel()
        direct = channel.direct("scatter", output)
        if direct is not None and output.is_contiguous() and all(part.is_contiguous() for part in parts):
            return channel.started("scatter", direct.scatter([output], [parts] if at_root else [], opts), [output])
        check_tensor(output, self.group)
        if at_root:
            self._check_list(parts, output, equal=True)

        def start() -> tuple[Any, Work]:
            _, buffer, finish = destination(output.shape, output.new_empty(0), plain(output))
            values = _joined(parts) if at_root else None
            work = channel.flat.scatter(buffer, values, root, None) if output.numel() else Work()
            return finished(None, work, finish)

        return channel.run("scatter", output, start, [output], opts, details=(root, 0, None))

    def all_to_all_single(
        self, output: Tensor, x: Tensor, output_splits: Any, input_splits: Any, opts: Any = None
    ) -> dist.Work:
        opts = _options(c10d.AllToAllOptions, opts)
        outgoing, incoming = list(input_splits or ()), list(output_splits or ())
        even = not outgoing and not incoming
        channel = self._channel()
        direct = channel.direct("all_to_all", x, layout="even" if even else "uneven")
        if direct is not None and x.is_contiguous() and output.is_contiguous():
            return channel.started("all_to_all", direct.alltoall_base(output, x, incoming, outgoing, opts), [output])
        check_tensor(x, self.group)
        check_tensor(output, self.group, "output")
        sent, received = self._splits("input", x, outgoing), self._splits("output", output, incoming)
        if output.dtype != x.dtype:
            raise TypeError(f"output: expected dtype {x.dtype}, got {output.dtype}")
        if sent[self.group.rank] != received[self.group.rank]:
            raise ValueError(
                f"output_split_sizes: {received[self.group.rank]} elements from this rank itself, but "
                f"input_split_sizes sends it {sent[self.group.rank]}"
            )

        def start() -> tuple[Any, Work]:
            data = plain(x)
            _, buffer, finish = destination(output.shape, data, plain(output))
            if even:
                work = channel.flat.all_to_all(buffer, flat(data), None, None) if x.numel() else Work()
            else:
                work = channel.flat.all_to_all(buffer, flat(data), received, sent)
            return finished(None, work, finish)

        splits = None if even else (sent, received)
        return channel.run("all_to_all", x, start, [output], opts, details=(None, 0, splits))

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> dist.Work:
        opts = _options(c10d.AllToAllOptions, opts)
        x = inputs[0]
        channel = self._channel()
        if x.device.type in self._beside:
            return self._beside[x.device.type].alltoall(outputs, inputs, opts)
        check_tensor(x, self.group)
        self._check_list(inputs, x)
        self._check_list(outputs, x)
        sent, received = [part.numel() for part in inputs], [part.numel() for part in outputs]

        def start() -> tuple[Any, Work]:
            buffer = x.new_empty(sum(received))
            work = channel.flat.all_to_all(buffer, _joined(inputs), received, sent)
            return None, work.then(lambda: _deal(buffer, outputs))

        return channel.run("all_to_all", x, start, list(outputs), opts, details=(None, 0, (sent, received)))

    # Messages

    def send(self, tensors: Any, dst: int, tag: int) -> dist.Work:
        (x,), tag = _listed(tensors), check_tag(tag)
        channel = self._channel()
        direct = channel.direct("send", x)
        if direct is not None and x.is_contiguous() and dst != self.group.rank:
            return channel.started("send", direct.send([x], dst, tag), [x])
        check_tensor(x, self.group)
        dst = check_rank(dst, self.group, "dst")

        def start() -> tuple[Any, Work]:
            return None, channel.flat.send(flat(plain(x)), dst, tag) if x.numel() else Work()

        return channel.run("send", x, start, [x], details=(None, None, (x.numel(), None), tag), peers=(dst,))

    def recv(self, tensors: Any, src: int, tag: int) -> dist.Work:
        (x,), tag = _listed(tensors), check_tag(tag)
        channel = self._channel()
        direct = channel.direct("recv", x)
        if direct is not None and x.is_contiguous() and src != self.group.rank:
            return channel.started("recv", direct.recv([x], src, tag), [x])
        check_tensor(x, self.group)
        src = check_rank(src, self.group, "src")

        def start() -> tuple[Any, Work]:
            _, buffer, finish = destination(x.shape, x.new_empty(0), plain(x))
            return finished(None, channel.flat.recv(buffer, src, tag) if x.numel() else Work(), finish)

        return channel.run("recv", x, start, [x], details=(None, None, (None, x.numel()), tag), peers=(src,))

    def recv_anysource(self, tensors: Any, tag: int) -> dist.Work:
        (x,), tag = _listed(tensors), check_tag(tag)
        channel = self._channel()
        direct = channel.direct("recv", x)
        if direct is not None and x.is_contiguous():
            return channel.started("recv", direct.recv_anysource([x], tag), [x])
        check_tensor(x, self.group)
        receive = getattr(self.group._comm, "recv_any", None)
        if receive is None:
            raise UnsupportedOperation(f"recv from any source: backend {self.group.backend} cannot; name the source")
        _, buffer, finish = destination(x.shape, x.new_empty(0), plain(x))
        work = receive(buffer, tag)
        return TorchWork(work if finish is None else _Sourced(work, finish), [x], self._futures)

    def barrier(self, opts: Any = None, timeout: Any = None) -> dist.Work:
        opts = _options(c10d.BarrierOptions, opts, timeout)
        channel = self._channel()
        direct = channel.direct("barrier", self._token)
        if direct is not None:
            return channel.started("barrier", direct.barrier(opts), [])
        return channel.run("barrier", None, lambda: (None, channel.flat.barrier()), [], opts)

    # Checks

    def _checked(self, x: Tensor, reduce: Any) -> ReduceOp:
        check_tensor(x, self.group)
        op = _reduce_op(reduce)
        check_reduce(op, x.dtype)
        return op

    def _check_pair(self, output: Tensor, x: Tensor, wanted: int, got: int) -> None:
        check_tensor(output, self.group, "output")
        if output.dtype != x.dtype:
            raise TypeError(f"output: expected dtype {x.dtype}, got {output.dtype}")
        if wanted != got:
            shapes = f"output of shape {tuple(output.shape)}, input of shape {tuple(x.shape)}"
            raise ValueError(f"{shapes}: one must be {self.group.size} times the other")

    def _check_list(self, parts: Sequence[Tensor], x: Tensor, equal: bool = False) -> None:
        if len(parts) != self.group.size:
            raise ValueError(f"tensor list: expected one for each of {self.group.size} ranks, got {len(parts)}")
        for part in parts:
            check_tensor(part, self.group, "tensor list")
            if part.dtype != x.dtype:
                raise TypeError(f"tensor list: expected dtype {x.dtype}, got {part.dtype}")
            if equal and part.numel() != x.numel():
                raise ValueError(f"tensor list: expected {x.numel()} elements in each, got {part.numel()}")

    def _splits(self, name: str, x: Tensor, splits: list[int]) -> list[int]:
        """Elements for each rank, of sizes along the first dim."""
        size = self.group.size
        if not splits:
            if x.dim() and x.shape[0] % size:
                raise ValueError(f"{name}: dim 0 of shape {tuple(x.shape)} does not divide into {size} equal parts")
            return [x.numel() // size] * size
        extent = x.shape[0] if x.dim() else 1
        if len(splits) != size or sum(splits) != extent or min(splits) < 0:
            raise ValueError(
                f"{name}_split_sizes: expected {size} that add up to {extent}, the extent of dim 0 of "
                f"{name}, got {splits}"
            )
        inner = x.numel() // extent if extent else 0
        return [split * inner for split in splits]

    def _in_place(self, x: Tensor) -> bool:
        """Whether an all_gather may read its own share where it is written."""
        return self.group.capabilities().native(Request("all_gather", None, x.dtype, x.device.type))

    def _each(self, calls: Sequence[Callable[[], dist.Work]]) -> dist.Work:
        return together([call() for call in calls] or [TorchWork(Work(), [], self._futures)], self._futures)

    # What torch asks of a group

    supports_splitting = supports_coalescing = False

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(kind) for kind in dict.fromkeys([self.group.device.type, *self._beside])]

    def _get_backend(self, device: torch.device) -> Any:
        return self._beside.get(torch.device(device).type, self)

    def getBackendName(self) -> str:
        return "commlayer"

    name = _get_backend_name = getBackendName

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._desc

    def setGroupDesc(self, desc: str) -> None:
        self._desc = desc

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc
    group_name, group_desc = property(getGroupName), property(getGroupDesc)

    def abort(self) -> None:
        """Wake whoever waits here, with an error."""
        for channel in self._channels.values():
            channel.watch.fail(CommError, "the process group was aborted")

    def shutdown(self) -> None:
        self._futures.close()
        self._beside = {}
        for channel in self._channels.values():
            channel.close()
        if self._then is not None:
            self._then()

    def at_shutdown(self, then: Callable[[], None]) -> None:
        self._then = then

    alltoall_base = all_to_all_single
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


class _Sourced(Work):
    """A message from anybody, and what is left to do when it is there."""

    __slots__ = ("_finish", "_work")

    def __init__(self, work: Any, finish: Callable[[], object]) -> None:
        super().__init__()
        self._work, self._finish = work, finish

    @property
    def source(self) -> int:
        return self._work.source

    def done(self) -> bool:
        return self._work.done()

    def wait(self, timeout: float | None = None) -> Any:
        self._work.wait(timeout)
        with torch.no_grad():
            self._finish()


def _listed(tensors: Any) -> Any:
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors


def _lists(tensors: Any) -> Any:
    return [tensors] if isinstance(tensors[0], torch.Tensor) else tensors


def _options(kind: Any, given: Any, timeout: Any = None, field: str = "") -> Any:
    """The options of a call; where it was called by values (a reduce op, a root), those as options."""
    if type(given) is kind:
        return given
    if given is not None and not field:
        return given
    options = kind()
    if given is not None:
        setattr(options, field, given)
    if timeout is not None:
        options.timeout = timeout
    return options


def _reduce_op(reduce: Any) -> ReduceOp:
    kind, factor = reduce.__getstate__()
    return premul_sum(factor) if kind == dist.ReduceOp.PREMUL_SUM else BY_NAME[kind.name.lower()]


def _alike(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """In a row, where one is stacked of the other: gloo takes what is concatenated alone."""
    return (output, x) if output.dim() == x.dim() else (output.view(-1), x.view(-1))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([flat(plain(part)) for part in parts])


def _deal(buffer: Tensor, rows: Sequence[Tensor]) -> None:
    for row, values in zip(rows, buffer.split([row.numel() for row in rows]), strict=True):
        plain(row).copy_(values.view(row.shape))
