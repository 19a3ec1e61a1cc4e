"""broadcast, all_gather, gather, scatter and all_to_all of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from commlayer.backends.torch_requests import plain
from commlayer.capability import Request
from commlayer.checks import check_rank, check_tensor
from commlayer.differentiable import finished, shaped
from commlayer.functional import if_uneven
from commlayer.layout import destination, flat
from commlayer.torch_backend.arguments import (
    alike,
    as_it_lies,
    check_list,
    check_pair,
    check_tensors,
    counts_of,
    deal,
    joined,
    listed,
    lists,
    one,
    options_of,
    own,
)
from commlayer.torch_backend.calls import Calls
from commlayer.torch_backend.works import together
from commlayer.work import Work

Tensor = torch.Tensor


class Movement(Calls):
    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        x, opts = one(tensors, self.group), options_of(c10d.BroadcastOptions, opts, timeout, "rootRank")
        root = check_rank(opts.rootRank, self.group, "src")
        channel = self._channel()
        direct = channel.direct("broadcast", x)
        if direct is not None and as_it_lies(x):
            return channel.started("broadcast", direct.broadcast([x], opts), [x], opts)
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
        output, x, opts = own(output, self.group), own(x, self.group), options_of(c10d.AllgatherOptions, opts)
        check_pair(output, x, output.numel(), x.numel() * self.group.size, self.group)
        channel = self._channel()
        direct = channel.direct("all_gather", x)
        if direct is not None and as_it_lies(x, output):
            flat_output, flat_x = alike(output, x)
            return channel.started("all_gather", direct._allgather_base(flat_output, flat_x, opts), [output], opts)
        check_tensors([x, output], self.group)

        def start() -> tuple[Any, Work]:
            data, target = plain(x), plain(output)
            place = target.data_ptr() + self.group.rank * data.nbytes
            in_place = data.data_ptr() == place and data.is_contiguous() and target.is_contiguous()
            if in_place and self._in_place(data):  # as FSDP2 gathers
                return None, channel.flat.all_gather(target.view(-1), data.view(-1), None)
            _, buffer, finish = destination(output.shape, data, target)
            return finished(None, channel.flat.all_gather(buffer, flat(data), None) if x.numel() else Work(), finish)

        return channel.run("all_gather", x, start, [output], opts, details=(None, 0, None))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        (rows,), x = lists(outputs, self.group), one(inputs, self.group)
        opts = options_of(c10d.AllgatherOptions, opts, timeout)
        check_list(rows, x, self.group)
        counts = [row.numel() for row in rows]
        if counts[self.group.rank] != x.numel():
            raise ValueError(f"tensor: has {x.numel()} elements, but this rank's place in tensor_list is of {counts}")
        uneven = if_uneven(counts)
        channel = self._channel()
        direct = channel.direct("all_gather", x, layout="even" if uneven is None else "uneven")
        if direct is not None and as_it_lies(x, *rows):
            return channel.started("all_gather", direct.allgather([rows], [x], opts), rows, opts)
        check_tensors([x, *rows], self.group)

        def start() -> tuple[Any, Work]:
            buffer = x.new_empty(sum(counts))
            work = channel.flat.all_gather(buffer, flat(plain(x)), uneven) if buffer.numel() else Work()
            return None, work.then(lambda: deal(buffer, rows))

        return channel.run("all_gather", x, start, rows, opts, details=(None, 0, counts))

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        rows = zip(zip(*outputs, strict=True), inputs, strict=True)  # outputs[rank][number]
        return together([self.allgather([list(o)], [x], opts) for o, x in rows], self._futures)

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return together([self.all_gather_single(o, x, opts) for o, x in pairs], self._futures)

    def gather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        x, opts = one(inputs, self.group), options_of(c10d.GatherOptions, opts, timeout, "rootRank")
        root = check_rank(opts.rootRank, self.group, "dst")
        at_root = self.group.rank == root
        rows = lists(outputs, self.group)[0] if at_root else []
        if at_root:
            check_list(rows, x, self.group, equal=True)
        channel = self._channel()
        direct = channel.direct("gather", x)
        if direct is not None and as_it_lies(x, *rows):
            return channel.started("gather", direct.gather([rows] if at_root else [], [x], opts), rows, opts)
        check_tensors([x, *rows], self.group)

        def start() -> tuple[Any, Work]:
            if not x.numel():
                return None, Work()
            if not at_root:
                return None, channel.flat.gather(None, flat(plain(x)), root, None)
            buffer = x.new_empty(x.numel() * self.group.size)
            return None, channel.flat.gather(buffer, flat(plain(x)), root, None).then(lambda: deal(buffer, rows))

        return channel.run("gather", x, start, rows, opts, details=(root, 0, None))

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        output, opts = one(outputs, self.group), options_of(c10d.ScatterOptions, opts, timeout, "rootRank")
        root = check_rank(opts.rootRank, self.group, "src")
        at_root = self.group.rank == root
        parts = lists(inputs, self.group)[0] if at_root else []
        if at_root:
            check_list(parts, output, self.group, equal=True)
        channel = self._channel()
        direct = channel.direct("scatter", output)
        if direct is not None and as_it_lies(output, *parts):
            return channel.started(
                "scatter", direct.scatter([output], [parts] if at_root else [], opts), [output], opts
            )
        check_tensors([output, *parts], self.group)
        data = joined(parts) if at_root else shaped((output.numel() * self.group.size,), output)

        def start() -> tuple[Any, Work]:
            _, buffer, finish = destination(output.shape, output.new_empty(0), plain(output))
            values = data if at_root else None
            work = channel.flat.scatter(buffer, values, root, None) if output.numel() else Work()
            return finished(None, work, finish)

        return channel.run("scatter", data, start, [output], opts, details=(root, 0, None))

    def all_to_all_single(
        self, output: Tensor, x: Tensor, output_splits: Any, input_splits: Any, opts: Any = None
    ) -> dist.Work:
        output, x, opts = own(output, self.group), own(x, self.group), options_of(c10d.AllToAllOptions, opts)
        outgoing, incoming = list(input_splits or ()), list(output_splits or ())
        even = not outgoing and not incoming
        sent, received = counts_of("input", x, outgoing, self.group), counts_of("output", output, incoming, self.group)
        if output.dtype != x.dtype:
            raise TypeError(f"output: expected dtype {x.dtype}, got {output.dtype}")
        if sent[self.group.rank] != received[self.group.rank]:
            raise ValueError(
                f"output_split_sizes: {received[self.group.rank]} elements from this rank itself, but "
                f"input_split_sizes sends it {sent[self.group.rank]}"
            )
        channel = self._channel()
        direct = channel.direct("all_to_all", x, layout="even" if even else "uneven")
        if direct is not None and as_it_lies(x, output):
            return channel.started(
                "all_to_all", direct.alltoall_base(output, x, incoming, outgoing, opts), [output], opts
            )
        check_tensors([x, output], self.group)

        # A rank may leave its sizes away where they are equal, and another give them.
        mixed = self.group._comm is not None and (self.group._comm.uneven_apart or self.group.shared is not None)

        def start() -> tuple[Any, Work]:
            data = plain(x)
            _, buffer, finish = destination(output.shape, data, plain(output))
            if even and not mixed:
                work = channel.flat.all_to_all(buffer, flat(data), None, None) if x.numel() else Work()
            else:
                work = channel.flat.all_to_all(buffer, flat(data), received, sent)
            return finished(None, work, finish)

        splits = None if even else (sent, received)
        return channel.run("all_to_all", x, start, [output], opts, details=(None, 0, splits))

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> dist.Work:
        opts = options_of(c10d.AllToAllOptions, opts)
        outputs, inputs = listed(outputs, self.group), listed(inputs, self.group)
        x = inputs[0]
        channel = self._channel()
        if x.device.type in self._beside:
            return self._beside[x.device.type].alltoall(outputs, inputs, opts)
        check_list(inputs, x, self.group)
        check_list(outputs, x, self.group)
        check_tensors([*inputs, *outputs], self.group)
        sent, received = [part.numel() for part in inputs], [part.numel() for part in outputs]
        data = joined(inputs)

        def start() -> tuple[Any, Work]:
            buffer = x.new_empty(sum(received))
            work = channel.flat.all_to_all(buffer, data, received, sent)
            return None, work.then(lambda: deal(buffer, outputs))

        return channel.run("all_to_all", data, start, list(outputs), opts, details=(None, 0, (sent, received)))

    def _in_place(self, x: Tensor) -> bool:
        """Whether an all_gather may read its own share where it is written."""
        return self.group.capabilities().native(Request("all_gather", None, x.dtype, x.device.type))

    alltoall_base = all_to_all_single
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
