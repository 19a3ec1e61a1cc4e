"""Python objects between ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import sample


def thing(rank: int) -> dict[str, object]:
    return {"rank": rank, "text": "é" * 10 * rank, "tensor": sample(rank + 1, seed=rank), "nested": [None, (rank,)]}


def shown(something: object) -> str:
    return repr(something)


@program(lambda: {str(rank): shown(thing(rank)) for rank in range(dist.get_world_size())})
def all_gather_object() -> Results:
    got = [None] * dist.get_world_size()
    dist.all_gather_object(got, thing(dist.get_rank()))
    return {str(rank): shown(one) for rank, one in enumerate(got)}


@program(lambda: {"got": shown([thing(1), None, "three"])})
def broadcast_object_list() -> Results:
    got = [thing(1), None, "three"] if dist.get_rank() == 1 else [None] * 3
    dist.broadcast_object_list(got, src=1)
    return {"got": shown(got)}


@program(lambda: {"got": shown(thing(dist.get_rank()))})
def scatter_object_list() -> Results:
    got: list[object] = [None]
    everything = [thing(rank) for rank in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.scatter_object_list(got, everything, src=0)
    return {"got": shown(got[0])}


@program(lambda: {"got": shown([thing(rank) for rank in range(dist.get_world_size())] if dist.get_rank() == 1 else 0)})
def gather_object() -> Results:
    got = [None] * dist.get_world_size() if dist.get_rank() == 1 else None
    dist.gather_object(thing(dist.get_rank()), got, dst=1)
    return {"got": shown(got or 0)}


@program(lambda: {"got": shown([thing(0), thing(3)] if dist.get_rank() == 1 else 0)})
def send_object_list() -> Results:
    got = [None, None]
    if dist.get_rank() == 0:
        dist.send_object_list([thing(0), thing(3)], dst=1)
    elif dist.get_rank() == 1:
        source = dist.recv_object_list(got, src=0)
        assert source == 0
    return {"got": shown(got if dist.get_rank() == 1 else 0)}


@program(lambda: {"got": shown([thing(rank) for rank in range(dist.get_world_size())][::-1])})
def in_a_group() -> Results:
    """A group in reverse: results come in the group's order, roots are ranks of the world."""
    size = dist.get_world_size()
    reverse = dist.new_group(list(range(size))[::-1], sort_ranks=False)
    got = [None] * size
    dist.all_gather_object(got, thing(dist.get_rank()), group=reverse)
    return {"got": shown(got)}


@program(lambda: {"sum": float(sum(range(dist.get_world_size())))})
def tensors_inside() -> Results:
    """Objects with large tensors, and an exception."""
    got = [None] * dist.get_world_size()
    dist.all_gather_object(got, (torch.full((10_000,), dist.get_rank()), ValueError(str(dist.get_rank()))))
    return {"sum": float(sum(x.float().mean() for x, _ in got))}
