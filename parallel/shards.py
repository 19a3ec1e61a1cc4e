"""Which tokens of a sequence each rank of a context-parallel group holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from commlayer import Group, balanced_sizes
from parallel.mappings import gather_from_region, scatter_to_region


@dataclass(frozen=True)
class SequenceShards:
    """``length`` tokens over ``parts`` ranks, as evenly as they go; a short sequence leaves ranks without any.

    Contiguous by default. Under causal attention the last rank then has 2·parts − 1 times the work of the first:
    ``zigzag`` cuts the sequence into 2·parts chunks and gives rank r the chunks r and 2·parts − 1 − r, so that all
    work alike (Dubey et al. 2024, arXiv:2407.21783, section 3.3.2).

    >>> SequenceShards(8, 2, zigzag=True).intervals(0)
    [(0, 2), (6, 8)]
    """

    length: int
    parts: int
    zigzag: bool = False

    def __post_init__(self) -> None:
        if self.length < 0 or self.parts < 1:
            raise ValueError(f"expected length >= 0 and parts >= 1, got {self.length} and {self.parts}")

    @property
    def sizes(self) -> list[int]:
        """Tokens of each rank."""
        chunks = self._chunks()
        return [sum(chunks[c] for c in self._held(rank)) for rank in range(self.parts)]

    def intervals(self, rank: int) -> list[tuple[int, int]]:
        """The (start, stop) that a rank holds, in its order, which is that of the sequence; none is empty."""
        bounds = list(pairwise(accumulate(self._chunks(), initial=0)))
        found: list[tuple[int, int]] = []
        for start, stop in (bounds[c] for c in self._held(rank)):
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], stop)
            elif start < stop:
                found.append((start, stop))
        return found

    def positions(self, rank: int) -> Tensor:
        """Where in the whole sequence the tokens of a rank are, as for positional embeddings."""
        return torch.cat([torch.arange(0), *(torch.arange(*interval) for interval in self.intervals(rank))])

    def shard(self, x: Tensor, dim: int, group: Group) -> Tensor:
        """This rank's tokens of the whole sequence; gradients as of scatter_to_region."""
        self._check(group)
        if x.shape[dim] != self.length:
            raise ValueError(f"x: expected {self.length} tokens along dim {dim}, got shape {tuple(x.shape)}")
        return scatter_to_region(self.by_rank(x, dim), dim, group, self.sizes)

    def unshard(self, x: Tensor, dim: int, group: Group) -> Tensor:
        """The whole sequence, in order, of all ranks' tokens; gradients as of gather_from_region."""
        self._check(group)
        return self.in_order(gather_from_region(x, dim, group, self.sizes), dim)

    def by_rank(self, x: Tensor, dim: int) -> Tensor:
        """A whole sequence rearranged: the tokens of rank 0, then those of rank 1, …"""
        return _picked(x, dim, self._chunks(), self._order()) if self.zigzag else x

    def in_order(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of ``by_rank``."""
        if not self.zigzag:
            return x
        chunks, order = self._chunks(), self._order()
        return _picked(x, dim, [chunks[c] for c in order], sorted(range(len(order)), key=order.__getitem__))

    def _chunks(self) -> list[int]:
        """The extents that the sequence is cut into."""
        return balanced_sizes(self.length, 2 * self.parts if self.zigzag else self.parts)

    def _held(self, rank: int) -> list[int]:
        """Which of the chunks a rank holds."""
        return [rank, 2 * self.parts - 1 - rank] if self.zigzag else [rank]

    def _order(self) -> list[int]:
        return [chunk for rank in range(self.parts) for chunk in self._held(rank)]

    def _check(self, group: Group) -> None:
        if group.size != self.parts:
            raise ValueError(f"group: the sequence is cut into {self.parts} parts, but there are {group.size} ranks")


def _picked(x: Tensor, dim: int, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    pieces = x.split(list(sizes), dim)  # not narrow, whose gradient is as long as x for each of the pieces
    return torch.cat([pieces[i] for i in order], dim)
