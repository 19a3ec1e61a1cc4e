"""all_to_all by messages, by gathering everything, or by broadcasts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from commlayer.backends.base import INTERNAL_TAG, Collectives, Counts, messages_to_all, offsets, pieces
from commlayer.capability import Request
from commlayer.fallbacks.registry import Use, fallback
from commlayer.work import Work

TAG = INTERNAL_TAG + 1

# The most that an emulation may hold beside the caller's tensors, in bytes.
WORKSPACE = 64 << 20


def _messages(request: Request, size: int) -> list[Use]:
    return [Use(request.to(op), size - 1, 1 / size) for op in ("send", "recv")]


@fallback("all_to_all", needs=_messages, passes=0.1)
def pairwise(g: Collectives, out: torch.Tensor, x: torch.Tensor, out_counts: Counts, in_counts: Counts) -> Work:
    """A message to and from every other rank, all under way at once."""
    return g.exchange(*messages_to_all(g, out, x, out_counts, in_counts), TAG)


def _gathers(request: Request, size: int) -> list[Use]:
    return [Use(request.to("all_gather"), 1, size), *_metadata(request, size)]


@fallback("all_to_all", needs=_gathers, passes=2)
def padded_all_gather(
    g: Collectives, out: torch.Tensor, x: torch.Tensor, out_counts: Counts, in_counts: Counts
) -> Work:
    """Everybody gathers everybody's rows, padded to one length, and keeps its own column.

    In slices, so that the workspace stays bounded however large or skewed the load is.
    """
    outgoing, incoming = pieces(x, in_counts, g.size), pieces(out, out_counts, g.size)
    longest = x.numel() // g.size if in_counts is None else max(map(max, _count_matrix(g, in_counts, x)))
    width = max(1, min(longest, WORKSPACE // (g.size * (g.size + 1) * x.element_size())))
    mine = x.new_empty(g.size, width)
    everything = x.new_empty(g.size, g.size, width)
    for start in range(0, longest, width):
        for row, piece in zip(mine, outgoing, strict=True):
            part = piece[start : start + width]
            row[: part.numel()] = part
        g.all_gather(everything.view(-1), mine.view(-1), None).wait()
        for src, piece in enumerate(incoming):
            part = piece[start : start + width]
            part.copy_(everything[src, g.rank, : part.numel()])
    return Work()


def _broadcasts(request: Request, size: int) -> list[Use]:
    return [Use(request.to("broadcast"), size, 1), *_metadata(request, size)]


@fallback("all_to_all", needs=_broadcasts, passes=2)
def broadcasts(g: Collectives, out: torch.Tensor, x: torch.Tensor, out_counts: Counts, in_counts: Counts) -> Work:
    """Every rank in turn broadcasts all it has, and each keeps its share, in slices of bounded size."""
    incoming = pieces(out, out_counts, g.size)
    if in_counts is None:
        matrix = [[x.numel() // g.size] * g.size for _ in range(g.size)]
    else:
        matrix = _count_matrix(g, in_counts, x)
    width = WORKSPACE // x.element_size()
    for src, counts in enumerate(matrix):
        begin = offsets(counts)[g.rank]
        total = sum(counts)
        for start in range(0, total, width):
            stop = min(start + width, total)
            part = x[start:stop].clone() if src == g.rank else x.new_empty(stop - start)
            g.broadcast(part, src).wait()
            low, high = max(begin, start), min(begin + counts[g.rank], stop)
            if low < high:
                incoming[src][low - begin : high - begin].copy_(part[low - start : high - start])
    return Work()


def _metadata(request: Request, size: int) -> list[Use]:
    if request.layout == "even":
        return []
    return [Use(Request("all_gather", None, torch.int64, request.device), 1, 0.0)]


def _count_matrix(g: Collectives, in_counts: Sequence[int], like: torch.Tensor) -> list[list[int]]:
    """How many elements every rank sends to every rank, known to all."""
    mine = torch.tensor(in_counts, dtype=torch.int64, device=like.device)
    matrix = mine.new_empty(g.size * g.size)
    g.all_gather(matrix, mine, None).wait()
    return matrix.view(g.size, g.size).tolist()
