"""Messages from rank to rank."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import last, mine, sample

DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float64, torch.complex64]


def ring() -> tuple[int, int]:
    """The rank before and the rank after."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return (rank - 1) % size, (rank + 1) % size


@program(lambda: {str(dtype): sample(3, 2, seed=ring()[0], dtype=dtype) for dtype in DTYPES}, moves=True)
def around_a_ring() -> Results:
    before, after = ring()
    results = {}
    for dtype in DTYPES:
        got = torch.empty(3, 2, dtype=dtype)
        if dist.get_rank() % 2 == 0:
            dist.send(mine(3, 2, dtype=dtype), after)
            dist.recv(got, before)
        else:
            dist.recv(got, before)
            dist.send(mine(3, 2, dtype=dtype), after)
        results[str(dtype)] = got
    return results


@program(lambda: {str(tag): torch.full((2,), 10 * ring()[0] + tag) for tag in range(4)}, moves=True)
def tags() -> Results:
    """Sent in one order, received in another."""
    before, after = ring()
    sends = [dist.isend(torch.full((2,), 10 * dist.get_rank() + tag), after, tag=tag) for tag in range(4)]
    got = {str(tag): torch.empty(2, dtype=torch.int64) for tag in (3, 0, 2, 1)}
    for tag, x in got.items():
        dist.recv(x, before, tag=int(tag))
    for send in sends:
        send.wait()
    return dict(sorted(got.items()))


@program(lambda: {"got": torch.arange(1, dist.get_world_size()) if dist.get_rank() == 0 else "sent"}, moves=True)
def from_any_source() -> Results:
    """Rank 0 takes the messages in the order they come in, and is told who sent each."""
    if dist.get_rank() > 0:
        dist.send(torch.tensor(dist.get_rank()), 0)
        return {"got": "sent"}
    got = []
    for _ in range(dist.get_world_size() - 1):
        source = dist.recv(x := torch.empty((), dtype=torch.int64))
        assert source == x.item(), (source, x)
        got.append(x)
    return {"got": torch.stack(got).sort().values}


@program(lambda: {"got": sample(50_000, seed=ring()[0])}, moves=True)
def both_ways_at_once() -> Results:
    before, after = ring()
    got = torch.empty(50_000)
    works = [dist.irecv(got, before), dist.isend(mine(50_000), after)]
    for work in works:
        work.wait()
    return {"got": got}


def batch_alone() -> Results:
    return {f"from {src}": sample(3, seed=src) for src in range(dist.get_world_size()) if src != dist.get_rank()}


@program(batch_alone, moves=True)
def batch() -> Results:
    """Each with each, in one batch, sends first."""
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    got = {f"from {other}": torch.empty(3) for other in others}
    sends = [dist.P2POp(dist.isend, mine(3), other) for other in others]
    recvs = [dist.P2POp(dist.irecv, got[f"from {other}"], other) for other in others]
    for work in dist.batch_isend_irecv(sends + recvs):
        work.wait()
    return got


@program(lambda: {str(number): sample(number + 1, seed=number) for number in range(5)} if ring()[1] else {},
         moves=True)  # fmt: skip
def several_in_order() -> Results:
    """A line: rank r takes five messages of one tag from the rank before and hands them on; the last keeps none."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    stock = {str(number): sample(number + 1, seed=number) for number in range(5)}
    if rank > 0:
        stock = {number: torch.empty_like(x) for number, x in stock.items()}
        for work in [dist.irecv(x, rank - 1) for x in stock.values()]:
            work.wait()
    if rank < last:
        for work in [dist.isend(x, rank + 1) for x in stock.values()]:
            work.wait()
    return stock if rank < last else {}


@program(lambda: {"got": 2 * sample(4, seed=ring()[0])}, moves=True)
def between_collectives() -> Results:
    """A message under way while the whole group reduces and gathers."""
    before, after = ring()
    got = torch.empty(4)
    receive, send = dist.irecv(got, before, tag=7), dist.isend(mine(4), after, tag=7)
    dist.all_reduce(mine(100))
    dist.all_gather_object([None] * dist.get_world_size(), "something")
    send.wait()
    receive.wait()
    return {"got": got * 2}


@program(lambda: {"got": sample(3, seed=dist.get_world_size() - 1 - dist.get_rank())}, moves=True)
def in_a_group() -> Results:
    """Ranks of the world and ranks of a group of the last two, which come in reverse, name the same peers."""
    size, rank = dist.get_world_size(), dist.get_rank()
    pairs = [dist.new_group([size - 1 - first, first]) for first in range(size // 2)]
    pair = pairs[min(rank, size - 1 - rank)]
    peer, got = size - 1 - rank, torch.empty(3)
    works = [dist.isend(mine(3), peer, group=pair), dist.irecv(got, peer, group=pair)]
    for work in works:
        work.wait()
    dist.send(got, group=pair, group_dst=1 - pair.rank()) if rank < peer else None
    again = torch.empty(3)
    if rank > peer:
        dist.recv(again, group=pair, group_src=1 - pair.rank())
        assert torch.equal(again, mine(3))
    return {"got": got}


@program(lambda: {str(number): sample(3000, seed=10 * ring()[0] + number) for number in range(6)}, moves=True)
def temporaries() -> Results:
    """Nobody holds the tensors that are sent, and handles are waited for last."""
    before, after = ring()
    rank, got = dist.get_rank(), {str(number): torch.empty(3000) for number in range(6)}
    sends = [dist.isend(sample(3000, seed=10 * rank + number), after, tag=number) for number in range(6)]
    dist.barrier()
    for number, x in got.items():
        dist.recv(x, before, tag=int(number))
    for send in sends:
        send.wait()
    return got


@program(lambda: {"first": sample(2, seed=ring()[0]), "second": 2 * sample(2, seed=ring()[0])}, moves=True)
def two_groups_one_tag() -> Results:
    """Messages between the same ranks with one tag in two groups, received in the other order."""
    before, after = ring()
    first, second = dist.new_group(), dist.new_group()
    sends = [dist.isend(mine(2), after, group=first), dist.isend(2 * mine(2), after, group=second)]
    got = {"first": torch.empty(2), "second": torch.empty(2)}
    dist.recv(got["second"], before, group=second)
    dist.recv(got["first"], before, group=first)
    for send in sends:
        send.wait()
    return got


@program(lambda: {"from": dist.get_world_size() - 1 if dist.get_rank() == 0 else 0}, moves=True)
def from_any_source_in_a_group() -> Results:
    """The source is named by its rank in the world; the group's is another."""
    end, rank = last(), dist.get_rank()
    ends, source = dist.new_group([end, 0], sort_ranks=False), 0
    if rank == end:
        dist.send(torch.ones(3), 0, group=ends, tag=5)
    if rank == 0:
        work = dist.irecv(x := torch.zeros(3), group=ends, tag=5)
        work.wait()
        assert torch.equal(x, torch.ones(3))
        source = dist.get_global_rank(ends, work._source_rank())
    if rank in (0, end):  # torch names groups by how many a rank has, and members must agree
        dist.destroy_process_group(ends)
    return {"from": source}


@program(lambda: {"got": sample(2, seed=ring()[0])}, moves=True)
def batch_in_a_group() -> Results:
    """By ranks of the group, as pipelines do."""
    group, size, rank = dist.new_group(), dist.get_world_size(), dist.get_rank()
    got = torch.empty(2)
    after = dist.P2POp(dist.isend, mine(2), group=group, group_peer=(rank + 1) % size)
    before = dist.P2POp(dist.irecv, got, group=group, group_peer=(rank - 1) % size)
    for work in dist.batch_isend_irecv([before, after] if rank % 2 else [after, before]):
        work.wait()
    return {"got": got}
