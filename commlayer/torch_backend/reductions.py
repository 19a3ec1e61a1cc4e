"""all_reduce, reduce and reduce_scatter of a process group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from commlayer.backends.torch_requests import plain
from commlayer.checks import check_rank, check_tensor
from commlayer.differentiable import finished
from commlayer.errors import UnsupportedOperation
from commlayer.functional import if_uneven
from commlayer.layout import destination, flat
from commlayer.reduce_op import SUM, ReduceOp
from commlayer.torch_backend.arguments import (
    alike,
    as_it_lies,
    check_list,
    check_pair,
    check_tensors,
    joined,
    lists,
    one,
    options_of,
    own,
    reduce_op,
)
from commlayer.torch_backend.calls import Calls
from commlayer.torch_backend.channel import Channel
from commlayer.torch_backend.works import together
from commlayer.work import Work

Tensor = torch.Tensor


class Reductions(Calls):
    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        x, opts = one(tensors, self.group), options_of(c10d.AllreduceOptions, opts, timeout, "reduceOp")
        reduce = opts.reduceOp
        channel = self._channel()
        direct = channel.direct("all_reduce", x, reduce)
        if direct is not None and (x.layout is not torch.strided or as_it_lies(x)):
            return channel.started("all_reduce", direct.allreduce([x], opts), [x], opts)
        if x.layout is torch.sparse_coo:
            return self._sparse(channel, x, opts)
        op = self._checked(x, reduce)

        def start() -> tuple[Any, Work]:
            data = plain(x) if x.requires_grad or x.is_inference() else x
            if as_it_lies(data):
                line = data if data.dim() == 1 else data.view(-1)
                return None, channel.flat.all_reduce(line, line, op) if x.numel() else Work()
            _, buffer, finish = destination(x.shape, data, data, aliases=True)
            return finished(None, channel.flat.all_reduce(buffer, flat(data), op), finish)

        return channel.run("all_reduce", x, start, [x], opts, reduce=op)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:
        each = c10d.AllreduceOptions()
        if opts is not None:
            each.reduceOp, each.timeout = opts.reduceOp, opts.timeout
        return together([self.allreduce([x], each) for x in tensors], self._futures)

    def reduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: Any = None) -> dist.Work:
        x, opts = one(tensors, self.group), options_of(c10d.ReduceOptions, opts, timeout, "rootRank")
        if op is not None:
            opts.reduceOp = op
        reduce, root = opts.reduceOp, check_rank(opts.rootRank, self.group, "dst")
        channel = self._channel()
        direct = channel.direct("reduce", x, reduce)
        if direct is not None and as_it_lies(x):
            return channel.started("reduce", direct.reduce([x], opts), [x], opts)
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
        output, x, opts = own(output, self.group), own(x, self.group), options_of(c10d.ReduceScatterOptions, opts)
        reduce = opts.reduceOp
        check_pair(output, x, output.numel() * self.group.size, x.numel(), self.group)
        channel = self._channel()
        direct = channel.direct("reduce_scatter", x, reduce)
        if direct is not None and as_it_lies(x, output):
            flat_output, flat_x = alike(output, x)
            return channel.started(
                "reduce_scatter", direct._reduce_scatter_base(flat_output, flat_x, opts), [output], opts
            )
        check_tensor(output, self.group, "output")
        op = self._checked(x, reduce)

        def start() -> tuple[Any, Work]:
            data = plain(x)
            _, buffer, finish = destination(output.shape, data, plain(output))
            work = channel.flat.reduce_scatter(buffer, flat(data), op, None) if x.numel() else Work()
            return finished(None, work, finish)

        return channel.run("reduce_scatter", x, start, [output], opts, reduce=op, details=(None, 0, None))

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        output, (parts,) = one(outputs, self.group), lists(inputs, self.group)
        opts = options_of(c10d.ReduceScatterOptions, opts, timeout, "reduceOp")
        channel = self._channel()
        if output.device.type in self._beside:
            return self._beside[output.device.type].reduce_scatter([output], [parts], opts)
        check_list(parts, output, self.group)
        check_tensors(parts, self.group)
        op = self._checked(output, opts.reduceOp)
        counts = [part.numel() for part in parts]
        if counts[self.group.rank] != output.numel():
            raise ValueError(f"output: has {output.numel()} elements, but this rank's share is of {counts}")

        data = joined(parts)

        def start() -> tuple[Any, Work]:
            _, buffer, finish = destination(output.shape, output.new_empty(0), plain(output))
            work = channel.flat.reduce_scatter(buffer, data, op, if_uneven(counts)) if data.numel() else Work()
            return finished(None, work, finish)

        return channel.run("reduce_scatter", data, start, [output], opts, reduce=op, details=(None, 0, counts))

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return together([self.reduce_scatter_single(o, x, opts) for o, x in pairs], self._futures)

    def _sparse(self, channel: Channel, x: Tensor, opts: Any) -> dist.Work:
        """The sum of sparse tensors, as everybody's elements one after the other."""
        if hash(opts.reduceOp) != hash(dist.ReduceOp.SUM):
            raise UnsupportedOperation("all_reduce of sparse tensors: SUM alone, as in torch's own backends")
        mine = x.detach().coalesce()
        indices, values = mine.indices().t().contiguous(), mine.values()
        sizes = torch.empty(self.group.size, dtype=torch.int64, device=x.device)

        def everybodys(part: Tensor) -> Tensor:
            width = math.prod(part.shape[1:])
            counts = [size * width for size in sizes.tolist()]
            gathered = part.new_empty(sum(counts))
            channel.flat.all_gather(gathered, flat(part), counts).wait()
            return gathered.view(-1, *part.shape[1:])

        def start() -> tuple[Any, Work]:
            channel.flat.all_gather(sizes, sizes.new_tensor([len(values)]), None).wait()
            if sizes.any():
                total = torch.sparse_coo_tensor(everybodys(indices).t(), everybodys(values), x.shape).coalesce()
                with torch.no_grad():
                    x.copy_(total)
            return None, Work()

        return channel.run("all_reduce", values, start, [x], opts, reduce=SUM)

    def _checked(self, x: Tensor, reduce: Any) -> ReduceOp:
        check_tensor(x, self.group)
        return reduce_op(reduce, x.dtype)

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
