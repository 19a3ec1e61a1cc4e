"""What the layer promises about streams: functions of a group.

On a CPU, which has no streams, torch's stand-ins for them do nothing, and the values are what counts.

- ``wait()`` makes the current stream wait for the result, whichever that is, and the host for nothing;
  ``wait(timeout)`` makes the host wait.
- What an operation still reads or writes stays allocated, whatever becomes of the tensors and of the handle.
- Data parallelism reduces gradients that come from several streams.
"""

import time
import warnings
from functools import cache

import torch
from torch import nn

import commlayer as c
from parallel import DataParallel
from tests.contracts.tensor import rand

LONG = 200.0  # milliseconds of a kernel that others have to wait for
ROWS, COLUMNS = 6, 1000


def streams_of(group):
    """torch.cuda, or what stands for it on a CPU."""
    return torch.get_device_module(group.device)


@cache
def cycles(index):
    """Clock cycles in a millisecond of this GPU, as ``torch.cuda._sleep`` counts them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)  # the first one is slow
    begin.record()
    torch.cuda._sleep(20_000_000)
    end.record()
    torch.cuda.synchronize(index)
    return 20_000_000 / begin.elapsed_time(end)


def busy(group, milliseconds=LONG):
    """Keep the current stream from going on for a while."""
    if group.device.type == "cuda":
        torch.cuda._sleep(int(milliseconds * cycles(group.device.index)))


def of(group, rank):
    """What a rank brings: whole numbers, so that sums are exact. As many rows as can be cut among all ranks."""
    x = torch.arange(ROWS * group.size * COLUMNS, dtype=torch.float32).remainder(97).view(-1, COLUMNS)
    return x + 100 * rank


def operations(group):
    """By name: the function, and what it gives on this rank. Native ones, and such as have steps after them."""
    n, me = group.size, group.rank
    inputs = [of(group, rank) for rank in range(n)]
    stacked, chunk = torch.stack(inputs), slice(me * ROWS, (me + 1) * ROWS)
    left, right = (me - 1) % n, (me + 1) % n
    return {
        "all_reduce": (lambda x, **o: c.all_reduce(x, group=group, **o), stacked.sum(0)),
        "broadcast": (lambda x, **o: c.broadcast(x, src=n - 1, group=group, **o), inputs[-1]),
        "all_gather": (lambda x, **o: c.all_gather(x, group=group, **o), torch.cat(inputs)),
        "reduce_scatter": (lambda x, **o: c.reduce_scatter(x, group=group, **o), stacked.sum(0)[chunk]),
        "all_to_all": (lambda x, **o: c.all_to_all(x, group=group, **o), torch.cat([x[chunk] for x in inputs])),
        "sendrecv": (lambda x, **o: c.sendrecv(x, dst=right, src=left, group=group, **o), inputs[left]),
        "all_reduce max": (lambda x, **o: c.all_reduce(x, c.MAX, group=group, **o), stacked.amax(0)),
        "all_gather dim 1": (lambda x, **o: c.all_gather(x, dim=1, group=group, **o), torch.cat(inputs, 1)),
        "all_reduce bf16": (
            lambda x, **o: c.all_reduce(x.remainder(4).bfloat16(), group=group, **o),
            stacked.remainder(4).sum(0).bfloat16(),
        ),
    }


NAMES = tuple(c.run_local(lambda: tuple(operations(c.world())), ranks=1)[0])
COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all")
NATIVE = (*COLLECTIVES, "sendrecv")


def arrived(group, found, expected, what):
    streams_of(group).synchronize()
    assert torch.equal(found.cpu(), expected), what


def overwrite(tensors, group):
    """Take the memory that was just freed, if any was, and fill it; several at once, lest they are one and the same."""
    _ = [torch.full(shape, -1.0, device=group.device, dtype=dtype) for shape, dtype in tensors for _ in range(4)]


def check_long_kernel_before(group, name):
    """The input is written by a kernel that has not begun when the operation is called."""
    function, expected = operations(group)[name]
    x, source = torch.zeros_like(of(group, 0), device=group.device), of(group, group.rank).to(group.device)
    busy(group)
    x.copy_(source)
    arrived(group, function(x) + 0, expected, name)
    busy(group)
    x.copy_(source)
    arrived(group, function(x, async_op=True).wait() + 0, expected, name)


def check_another_stream(group, name):
    """Started on one stream, waited for and used on another."""
    function, expected = operations(group)[name]
    streams = streams_of(group)
    mine = of(group, group.rank).to(group.device)
    side = streams.Stream()
    streams.synchronize()
    busy(group)
    work = function(mine + 0, async_op=True)
    with streams.stream(side):
        used = work.wait() + 0
    arrived(group, used, expected, f"{name}, waited for on another stream")
    with streams.stream(side):
        busy(group)
        work = function(mine + 0, async_op=True)
    used = work.wait() + 0
    arrived(group, used, expected, f"{name}, started on another stream")


def check_freed_and_overwritten(group, name):
    """The input is gone before the operation has read it; or overwritten once it was waited for."""
    function, expected = operations(group)[name]
    mine = of(group, group.rank).to(group.device)
    about = [(mine.shape, mine.dtype)]
    x = mine + 0
    streams_of(group).synchronize()
    busy(group)
    work = function(x, async_op=True)
    del x
    overwrite(about, group)
    arrived(group, work.wait() + 0, expected, f"{name}, its input freed")
    x = mine + 0
    busy(group)
    found = function(x, async_op=True).wait()
    x.fill_(-1)
    del x
    overwrite(about, group)
    arrived(group, found, expected, f"{name}, its input overwritten after wait()")


def check_buffers_outlive_other_streams(group, name):
    """What the layer has allocated on one stream is still read on another, after ``wait()`` has returned."""
    function, expected = operations(group)[name]
    streams = streams_of(group)
    mine, side = of(group, group.rank).to(group.device), streams.Stream()
    work = function(mine, async_op=True)
    streams.synchronize()
    with streams.stream(side):
        busy(group)
        found = work.wait()
    del work
    overwrite([(expected.shape, expected.dtype), (mine.shape, mine.dtype)], group)
    arrived(group, found, expected, f"{name}, waited for on a busy stream")


def check_handle_dropped(group, name):
    """Nobody waits: what NCCL has begun goes on, and the result is in ``out`` once the stream is done with it."""
    function, expected = operations(group)[name]
    mine = of(group, group.rank).to(group.device)
    out = torch.empty(expected.shape, dtype=expected.dtype, device=group.device)
    streams_of(group).synchronize()
    busy(group)
    function(mine + 0, out=out, async_op=True)
    overwrite([(mine.shape, mine.dtype)], group)
    arrived(group, function(mine), expected, f"{name}, after one whose handle was dropped")
    if group.backend in ("nccl", "single"):  # others finish some operations in wait()
        arrived(group, out, expected, f"{name}, its handle dropped")


def check_host_does_not_wait(group, name):
    """Neither the call nor ``wait()`` blocks the host, also behind a long kernel."""
    function, expected = operations(group)[name]
    x, streams = of(group, group.rank).to(group.device), streams_of(group)

    def both(milliseconds):
        begin = time.perf_counter()
        busy(group, milliseconds)
        work = function(x, async_op=True)
        early = work.done()
        found = [work.wait() + 0, function(x) + 0]
        return found, early, (time.perf_counter() - begin) * 1e3

    both(1)  # connections, kernels and memory: all of which the first time takes
    c.barrier(group=group)
    streams.synchronize()
    with NoSynchronisation(group):
        found, early, issued = both(LONG)
        still = group.device.type == "cpu" or not streams.current_stream().query()
    if group.device.type != "cpu":
        assert issued < LONG / 2, f"{name}: the host waited {issued:.0f} ms"
        assert still, f"{name}: the stream is done already, so this shows nothing"
        assert group.size == 1 or not early, f"{name}: done() before its input was there"
    for one in found:
        arrived(group, one, expected, name)


def check_host_waits_with_a_limit(group, name):
    """``wait(timeout)``, and a call with one, block the host; a long kernel before is no failure within the limit."""
    function, expected = operations(group)[name]
    x = of(group, group.rank).to(group.device)
    for call in (lambda: function(x, async_op=True).wait(60.0), lambda: function(x, timeout=60.0)):
        begin = time.perf_counter()
        busy(group, 3 * LONG)
        found = call()
        waited = (time.perf_counter() - begin) * 1e3
        assert group.device.type == "cpu" or group.size == 1 or waited > LONG, f"{name}: only {waited:.0f} ms"
        arrived(group, found, expected, name)


class NoSynchronisation:
    """Inside, what makes the host wait for the GPU (``item()``, copies to the host) is an error."""

    def __init__(self, group):
        self.on = group.device.type == "cuda"

    def set(self, mode):
        if self.on:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is a prototype, and does not see everything
                torch.cuda.set_sync_debug_mode(mode)

    def __enter__(self):
        self.set("error")

    def __exit__(self, *_):
        self.set("default")


class Late(torch.autograd.Function):
    """The identity; its gradient comes after a long kernel."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        busy(ctx.group)
        return grad.clone(), None


class Branches(nn.Module):
    """Two branches; with ``side`` given, each on a stream of its own, in backward too."""

    def __init__(self, group=None, side=None):
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.group, self.side = group, side
        generator = torch.Generator().manual_seed(0)
        for p in self.double().parameters():
            p.data.normal_(generator=generator)

    def forward(self, x):
        if self.side is None:
            return self.left(x) * self.right(x)
        streams = streams_of(self.group)
        main = streams.current_stream()
        self.side.wait_stream(main)
        with streams.stream(self.side):
            left = Late.apply(self.left(x), self.group)
        right = self.right(x)
        main.wait_stream(self.side)
        return left * right


def check_gradients_from_several_streams(group, bucket_mb):
    """DataParallel's reduction waits for all streams that its gradients come from."""
    inputs = [rand(4, 6, seed=rank) for rank in range(group.size)]
    side = streams_of(group).Stream()
    model = DataParallel(Branches(group, side).to(group.device), group, bucket_mb=bucket_mb)
    serial = Branches()
    mine = inputs[group.rank].to(group.device)
    for _ in range(2):
        model.zero_grad()
        serial.zero_grad()
        model(mine).square().sum().backward()
        (sum(serial(x).square().sum() for x in inputs) / group.size).backward()
        for (name, p), q in zip(model.module.named_parameters(), serial.parameters(), strict=True):
            torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
