"""Every collective of torch.distributed that moves data, on many dtypes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import COMPLEX, INTEGERS, REALS, last, mine, of_all, sample, text

RARE = [torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn]  # torch's own backend lacks them
COMMON = [torch.bool, *INTEGERS, *REALS, *COMPLEX]


def gathered(dtypes: list[torch.dtype]) -> Results:
    results = {}
    for dtype in dtypes:
        parts = of_all(2, 3, dtype=dtype)
        results |= {f"list {text(dtype)} {rank}": part for rank, part in enumerate(parts)}
        results[f"rows {text(dtype)}"] = torch.cat(parts)
    return results


def all_gathers(dtypes: list[torch.dtype]) -> Results:
    results, size = {}, dist.get_world_size()
    for dtype in dtypes:
        x = mine(2, 3, dtype=dtype)
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x)
        results |= {f"list {text(dtype)} {rank}": part for rank, part in enumerate(parts)}
        dist.all_gather_into_tensor(rows := torch.empty(2 * size, 3, dtype=dtype), x)
        results[f"rows {text(dtype)}"] = rows
    return results


@program(lambda: gathered(COMMON), moves=True)
def all_gather() -> Results:
    return all_gathers(COMMON)


@program(lambda: gathered(RARE), refused="Invalid scalar type", moves=True)
def all_gather_of_rare_dtypes() -> Results:
    return all_gathers(RARE)


@program(lambda: {"stacked": torch.stack(of_all(2, 3)), "numbers": torch.stack(of_all())},
         refused="invalid tensor size", moves=True)  # fmt: skip
def all_gather_stacked() -> Results:
    """An output with one dim more than the input, as the reference of torch allows."""
    size = dist.get_world_size()
    dist.all_gather_into_tensor(stacked := torch.empty(size, 2, 3), mine(2, 3))
    dist.all_gather_into_tensor(numbers := torch.empty(size), mine())
    return {"stacked": stacked, "numbers": numbers}


@program(lambda: {"total": torch.arange(2 * dist.get_world_size())}, moves=True)
def all_gather_in_place() -> Results:
    """The input is this rank's part of the output, as FSDP2 does it; so with reduce_scatter."""
    total, rank = torch.zeros(2 * dist.get_world_size(), dtype=torch.int64), dist.get_rank()
    total[2 * rank : 2 * rank + 2] = torch.arange(2) + 2 * rank
    dist.all_gather_into_tensor(total, total[2 * rank : 2 * rank + 2])
    return {"total": total}


def broadcast_alone(dtypes: list[torch.dtype]) -> Results:
    return {text(dtype): sample(4, seed=last(), dtype=dtype) for dtype in dtypes}


def broadcasts(dtypes: list[torch.dtype]) -> Results:
    results = {text(dtype): mine(4, dtype=dtype) for dtype in dtypes}
    for x in results.values():
        dist.broadcast(x, last())
    return results


@program(lambda: broadcast_alone(COMMON), moves=True)
def broadcast() -> Results:
    return broadcasts(COMMON)


@program(lambda: broadcast_alone(RARE), refused="Invalid scalar type", moves=True)
def broadcast_of_rare_dtypes() -> Results:
    return broadcasts(RARE)


def gather_scatter_alone() -> Results:
    here, rank, results = dist.get_rank() == last(), dist.get_rank(), {}
    for dtype in [torch.bool, *INTEGERS, *REALS]:
        parts = of_all(3, dtype=dtype)
        results |= {f"gathered {text(dtype)} {other}": part for other, part in enumerate(parts) if here}
        results[f"scattered {text(dtype)}"] = sample(2 * dist.get_world_size(), dtype=dtype).split(2)[rank]
    return results


@program(gather_scatter_alone, moves=True)
def gather_scatter() -> Results:
    results, here, size = {}, dist.get_rank() == last(), dist.get_world_size()
    for dtype in [torch.bool, *INTEGERS, *REALS]:
        x = mine(3, dtype=dtype)
        parts = [torch.empty_like(x) for _ in range(size)] if here else None
        dist.gather(x, parts, dst=last())
        results |= {f"gathered {text(dtype)} {other}": part for other, part in enumerate(parts or [])}
        part = torch.empty(2, dtype=dtype)
        dist.scatter(part, list(sample(2 * size, dtype=dtype).split(2)) if here else None, src=last())
        results[f"scattered {text(dtype)}"] = part
    return results


def all_to_all_alone(dtypes: list[torch.dtype]) -> Results:
    results, rank = {}, dist.get_rank()
    for dtype in dtypes:
        blocks = [sent(other, dtype) for other in range(dist.get_world_size())]
        results[f"even {text(dtype)}"] = torch.stack([block[rank][0] for block in blocks])
        results[f"uneven {text(dtype)}"] = torch.cat([block[rank] for block in blocks])
        results |= {f"list {text(dtype)} {other}": block[rank][0] for other, block in enumerate(blocks)}
    return results


def sent(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What a rank sends to each: to rank d the more rows, the more d and its own rank are apart; one at the least."""
    size = dist.get_world_size()
    return [sample(1 + (dst - rank) % size, 2, seed=10 * rank + dst, dtype=dtype) for dst in range(size)]


def all_to_alls(dtypes: list[torch.dtype]) -> Results:
    results, rank, size = {}, dist.get_rank(), dist.get_world_size()
    for dtype in dtypes:
        blocks = sent(rank, dtype)
        first = [block[0].clone() for block in blocks]
        dist.all_to_all_single(even := torch.empty(size, 2, dtype=dtype), torch.stack(first))
        dist.all_to_all(parts := [torch.empty(2, dtype=dtype) for _ in range(size)], first)
        come = [1 + (rank - src) % size for src in range(size)]
        uneven = torch.empty(sum(come), 2, dtype=dtype)
        dist.all_to_all_single(uneven, torch.cat(blocks), come, [len(block) for block in blocks])
        results |= {f"even {text(dtype)}": even, f"uneven {text(dtype)}": uneven}
        results |= {f"list {text(dtype)} {src}": part for src, part in enumerate(parts)}
    return results


@program(lambda: all_to_all_alone(COMMON), moves=True)
def all_to_all() -> Results:
    return all_to_alls(COMMON)


@program(lambda: all_to_all_alone(RARE), refused="Invalid scalar type", moves=True)
def all_to_all_of_rare_dtypes() -> Results:
    return all_to_alls(RARE)


def uneven_lists_alone() -> Results:
    rank = dist.get_rank()
    return {f"from {src}": sent(src, torch.float32)[rank] for src in range(dist.get_world_size())}


@program(uneven_lists_alone, refused="invalid tensor size", moves=True)
def all_to_all_of_uneven_lists() -> Results:
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = [torch.empty(1 + (rank - src) % size, 2) for src in range(size)]
    dist.all_to_all(parts, sent(rank, torch.float32))
    return {f"from {src}": part for src, part in enumerate(parts)}


@program(lambda: {"got": torch.full((dist.get_rank() % 2,), 1.0)}, moves=True)
def all_to_all_of_nothing() -> Results:
    """Only rank 0 sends, and only to odd ranks: an expert that no token goes to."""
    rank, size = dist.get_rank(), dist.get_world_size()
    splits = [dst % 2 if rank == 0 else 0 for dst in range(size)]
    got = torch.empty(rank % 2)
    dist.all_to_all_single(got, torch.ones(sum(splits)), [rank % 2] + [0] * (size - 1), splits)
    return {"got": got}


@program(lambda: {"parts": torch.cat([torch.full((rank + 1,), rank) for rank in range(dist.get_world_size())])},
         refused="invalid tensor size", moves=True)  # fmt: skip
def all_gather_of_uneven_parts() -> Results:
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = [torch.empty(other + 1, dtype=torch.int64) for other in range(size)]
    dist.all_gather(parts, torch.full((rank + 1,), rank))
    return {"parts": torch.cat(parts)}


@program(lambda: {"fine": 1})
def barriers() -> Results:
    dist.barrier()
    dist.barrier(async_op=True).wait()
    return {"fine": 1}


@program(lambda: {f"{number} of {rank}": sample(number + 1, seed=rank)
                  for rank in range(dist.get_world_size()) for number in range(3)}, moves=True)  # fmt: skip
def all_gather_coalesced() -> Results:
    """The older function, with a list of lists."""
    size = dist.get_world_size()
    parts = [[torch.empty(number + 1) for number in range(3)] for _ in range(size)]
    dist.all_gather_coalesced(parts, [sample(number + 1, seed=dist.get_rank()) for number in range(3)])
    return {f"{number} of {rank}": part for rank, row in enumerate(parts) for number, part in enumerate(row)}
