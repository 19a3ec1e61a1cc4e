"""What ranks do in test_shared_jobs.py; each function is run on every rank, and returns what JSON can carry."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import commlayer
from commlayer import CommError

LIMIT = 3.0  # seconds for an operation


def maps() -> int:
    """Mappings of shared memory in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:commlayer")


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


def numbers(rank: int, size: int, lost: str = "") -> Any:
    """Sums and more, with whatever of the way to shared memory is missing on one rank."""
    where = {"memfd": 0, "proc": size - 1, "mmap": size - 1}.get(lost)
    if rank == where:
        _break(lost)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world = commlayer.init(timeout=30)
    shared = world.shared
    x = (torch.arange(60_000.0) % 17 + rank).view(-1, 6)
    symmetric = commlayer.empty_symmetric((10_000, 6)).copy_(x)
    halves = torch.randn(5000, generator=torch.Generator().manual_seed(rank)).bfloat16()
    got = [
        commlayer.all_reduce(x),
        commlayer.all_reduce(symmetric, "max", out=symmetric),
        commlayer.all_to_all(x[: size * 3]),
        commlayer.reduce_scatter(x[: size * 1000].contiguous()),
        commlayer.all_reduce(halves, "avg").float(),
        commlayer.all_reduce(halves, "sum", async_op=True).wait().float(),
        commlayer.broadcast(x, src=size - 1),
    ]
    digest = [(part.double().sum().item(), part.double().view(-1)[::7].square().sum().item()) for part in got]
    return {
        "shared": shared is not None,
        "kernel": shared is not None and shared.kernel,
        "warnings": [str(one.message) for one in caught],
        "numbers": digest,
    }


def _break(what: str) -> None:
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith("/proc/") and "/fd/" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **kwargs)

    def fail(*args: Any) -> Any:
        raise OSError(38, "Function not implemented")

    if what == "memfd":
        os.memfd_create = fail
    elif what == "proc":
        os.open = refuse
    else:
        from commlayer.backends.shared import memory

        memory.Memory.__init__ = fail  # type: ignore[method-assign]


def loses(rank: int, size: int, how: int, async_op: bool, symmetric: bool, when: str) -> Any:
    """The last rank is killed or stopped, while it works, while it waits, or while the others do."""
    commlayer.init(timeout=LIMIT)
    count = 1 << (23 if when == "working" else 16)
    x = commlayer.empty_symmetric(count) if symmetric else torch.empty(count)
    x.fill_(1)
    commlayer.all_reduce(x[:100])
    last = rank == size - 1
    start = time.monotonic()
    if last and when == "away":
        time.sleep(0.3)
        os.kill(os.getpid(), how)
    if last:
        threading.Timer(0.3 if when == "waiting" else 0.05, lambda: os.kill(os.getpid(), how)).start()
    elif when == "waiting":
        time.sleep(0.8)
    try:
        while time.monotonic() < start + 20:
            result = commlayer.all_reduce(x, "max", out=x, async_op=async_op)
            if async_op:
                result.wait()
    except CommError as error:
        return {"error": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start}
    return "nothing happened"


# What a rank calls, and rank 1 calls otherwise.
DIFFERENT: dict[str, Any] = {
    "operation": lambda r: commlayer.all_reduce(ones()) if r == 1 else commlayer.broadcast(ones()),
    "barrier": lambda r: commlayer.barrier() if r == 1 else commlayer.all_reduce(torch.ones(1)),
    "reduce op": lambda r: commlayer.all_reduce(ones(), "max" if r == 1 else "sum"),
    "dtype": lambda r: commlayer.all_reduce(ones(torch.int32 if r == 1 else torch.float32)),
    "dtype moved": lambda r: commlayer.all_gather(ones(torch.int32 if r == 1 else torch.float32)),
    "size": lambda r: commlayer.all_reduce(ones()[r == 1 :]),
    "size moved": lambda r: commlayer.all_gather(ones()[r == 1 :]),
    "size of little": lambda r: commlayer.all_reduce(ones()[: 1 if r == 1 else None]),
    "size scattered": lambda r: commlayer.scatter(ones()[6 if r == 1 else 0 :]),
    "nothing": lambda r: [commlayer.all_reduce(ones()[: 0 if r == 1 else 5]), commlayer.all_reduce(ones()[: 7 + r])],
    "root of broadcast": lambda r: commlayer.broadcast(ones(), src=int(r == 1)),
    "root of reduce": lambda r: commlayer.reduce(ones(), dst=int(r == 1)),
    "root of gather": lambda r: commlayer.gather(ones(), dst=int(r == 1)),
    "root of scatter": lambda r: commlayer.scatter(ones(), src=int(r == 1)),
    "symmetric size": lambda r: commlayer.empty_symmetric(5000 if r == 1 else 10),
    "splits of all_gather": lambda r: commlayer.all_gather(ones()[: 100 + 50 * r], sizes=unlike(r)),
    "splits of gather": lambda r: commlayer.gather(ones()[: 100 + 50 * r], sizes=unlike(r)),
    "splits of scatter": lambda r: commlayer.scatter(ones()[:450], sizes=unlike(r)),
    "splits of reduce_scatter": lambda r: commlayer.reduce_scatter(ones()[:450], sizes=unlike(r)),
    "splits of all_to_all": lambda r: commlayer.all_to_all(
        ones()[:300],
        input_splits=[100, 100, 100],
        output_splits=[100, 100, 100] if r != 1 else [120, 100, 80],
    ),
}


def ones(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(60_000).to(dtype)


def unlike(rank: int) -> list[int]:
    """Splits of 450 over three, of which rank 1 has another idea; its own share is the same in both."""
    return [100, 150, 200] if rank != 1 else [200, 150, 100]


def calls_something_else(rank: int, size: int, what: str, async_op: bool = False) -> Any:
    world = commlayer.init(timeout=LIMIT)
    start = time.monotonic()
    try:
        DIFFERENT[what](world.rank)
        commlayer.barrier()  # by when every rank has heard of it
    except CommError as error:
        return {"error": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start}
    return "no error"


def makes_and_drops(rank: int, size: int) -> Any:
    """Many symmetric tensors, one after another, and what is left of them."""
    commlayer.init(timeout=20)
    before = files(), maps()
    for number in range(300):
        x = commlayer.empty_symmetric(1000 + number)
        x.fill_(rank + 1)
        if number % 50 == 0:
            assert commlayer.all_reduce(x, out=x)[0] == size * (size + 1) / 2
        del x
    kept = [commlayer.empty_symmetric(1 << 18, torch.uint8) for _ in range(20)]
    between = files(), maps()
    for x in kept:
        x.fill_(1)
    kept.clear()
    del x
    commlayer.barrier()
    commlayer.empty_symmetric(1)
    return {"before": before, "between": between, "after": (files(), maps())}


def interrupted(rank: int, size: int, async_op: bool) -> Any:
    """Ctrl-C on rank 0, which waits for the others."""
    commlayer.init(timeout=LIMIT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    x = torch.ones(100_000)
    commlayer.all_reduce(x)
    if rank == 0:
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    else:
        time.sleep(1)
    result = commlayer.all_reduce(x, async_op=async_op)
    return result.wait() if async_op else "no error"


def awaits_a_message(rank: int, size: int) -> Any:
    """Rank 0 waits for a message that rank 1 sends after an operation that rank 0 has only started."""
    commlayer.init(timeout=20)
    x = torch.full((300_000,), rank + 1.0)
    for _ in range(20):
        if rank == 0:
            work = commlayer.all_reduce(x, async_op=True)
            commlayer.recv(torch.empty(3), 1)
            got = work.wait()
        else:
            got = commlayer.all_reduce(x)
            commlayer.send(torch.ones(3), 0)
        assert got.unique().tolist() == [3.0]
    return "right"


def by_threads(rank: int, size: int, groups: int) -> Any:
    """Two threads at once, each on a group of its own; or in turns on one and the same."""
    world = commlayer.init(timeout=20)
    other = world.new_group(list(range(size))) if groups == 2 else world
    turns, turn, wrong = threading.Condition(), [0], []

    def start(group: commlayer.Group, number: int, step: int) -> Any:
        x = torch.full((1000 * (step % 7 + 1),), rank + 1.0 + number + step)
        return commlayer.all_reduce(x, group=group, async_op=step % 3 == 0 or groups == 1)

    def work(group: commlayer.Group, number: int) -> None:
        for step in range(100):
            if groups == 1:
                with turns:
                    turns.wait_for(lambda: turn[0] % 2 == number)
                    got = start(group, number, step)
                    turn[0] += 1
                    turns.notify_all()
            else:
                got = start(group, number, step)
            got = got.wait() if isinstance(got, commlayer.Work) else got
            if got.unique().tolist() != [sum(r + 1.0 + number + step for r in range(size))]:
                wrong.append((number, step))

    threads = [threading.Thread(target=work, args=pair) for pair in ((world, 0), (other, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong or "right"


def forks(rank: int, size: int, late: bool) -> Any:
    """A child of rank 0 drops its copy of a tensor; with ``late`` while its parent waits for the others."""
    world = commlayer.init(timeout=LIMIT)
    x = commlayer.empty_symmetric(100_000).fill_(rank + 1.0)
    if rank == 0:
        pid = os.fork()
        if pid == 0:
            time.sleep(0.4 * late)
            del x
            gc.collect()
            os._exit(0)
        if not late:
            os.waitpid(pid, 0)
    else:
        x = x.clone()
        time.sleep(0.8 * late)
    commlayer.empty_symmetric(10)
    assert world.size == size
    return commlayer.all_reduce(x).unique().tolist()


def comes_again(rank: int, size: int) -> Any:
    """init and finalize several times; what is mapped afterwards, but for the tensors that are kept."""
    kept, mapped = [], []
    for _ in range(5):
        world = commlayer.init(timeout=20)
        x = commlayer.empty_symmetric(1000).fill_(rank + 1.0)
        commlayer.all_reduce(x, out=x, async_op=True).wait()
        kept.append(x[3:])
        half = world.split(0, key=-rank)
        commlayer.all_reduce(torch.ones(1000), group=half, async_op=True)  # nobody waits for it
        commlayer.barrier(group=half)
        commlayer.finalize()
        del world, half, x
        gc.collect()
        mapped.append(maps() - len(kept))
    for x in kept:
        assert x.unique().tolist() == [3.0]
        x.add_(1)
    return {"mapped": mapped, "threads": threading.active_count()}


def closes_groups(rank: int, size: int) -> Any:
    """Many groups, one after another, and what is left of them."""
    world = commlayer.init(timeout=20)
    before = maps()
    for _ in range(20):
        group = world.new_group(list(range(size)))
        commlayer.all_reduce(torch.ones(1000), group=group, async_op=True).wait()
        group.close()
        del group
    gc.collect()
    return {"before": before, "after": maps()}


def uses_a_closed_group(rank: int, size: int, count: int = 100_000) -> Any:
    world = commlayer.init(timeout=LIMIT)
    group = world.new_group(list(range(size)))
    commlayer.all_reduce(torch.ones(count), group=group)
    group.close()
    start = time.monotonic()
    try:
        if rank == 0:
            commlayer.all_reduce(torch.ones(count), group=group)
    except CommError as error:
        return {"error": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start}
    return "no error"


def ends_unfinished(rank: int, size: int, kept: bool) -> Any:
    """Rank 0 has started what the others never join, and ends."""
    commlayer.init(timeout=20)
    commlayer.barrier()
    if rank == 0:
        work = commlayer.all_reduce(torch.ones(1_000_000), async_op=True)
        if not kept:
            del work
    else:
        time.sleep(1)
    return "ended"


def ends_late(rank: int, size: int) -> Any:
    """Nobody waits for an operation that one rank joins late: it is done all the same, before finalize() returns."""
    commlayer.init(timeout=20)
    out = torch.zeros(1_000_000)
    time.sleep(0.7 * rank)
    commlayer.all_reduce(torch.full((1_000_000,), rank + 1.0), out=out, async_op=True)
    commlayer.finalize()
    return out.unique().tolist()


def takes_turns_with_gloo(rank: int, size: int) -> Any:
    """Seconds of operations of 64 KiB, through shared memory and through gloo, one after the other."""
    world = commlayer.init(timeout=60)
    plain = world.twin("plain", shared=False)
    x = torch.ones(1 << 14)
    names = {"all_reduce": commlayer.all_reduce, "all_gather": commlayer.all_gather, "all_to_all": commlayer.all_to_all}
    found: dict[str, list[list[float]]] = {name: [[], []] for name in names}
    for _ in range(40):
        for name, function in names.items():
            for place, group in enumerate((world, plain)):
                commlayer.barrier(group=group)
                start = time.perf_counter()
                function(x, group=group)
                found[name][place].append(time.perf_counter() - start)
    return found
