"""Which samples a rank sees: one global order, cut into global batches, dealt out to the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class ShardedBatches(Sampler[list[int]]):
    """Batch sampler: per step, this rank's share of the global batch, in ``accumulate`` micro-batches.

    The order depends on (seed, epoch) alone, so any number of ranks walks through the same global batches and
    a run on 4 ranks is comparable with a serial one. Every sample is used exactly once per epoch; every rank
    takes the same number of steps. Shares of one batch differ by at most one sample, as do their micro-batches,
    and may be **empty** when the last batch is smaller than their number: nothing is dropped, and nothing is
    counted twice to make up the numbers. So losses have to be divided by :meth:`global_sizes`, not by the local
    size.

    Args:
        samples: size of the data set.
        batch: samples per step over all ranks together.
        rank, size: of the data-parallel group. Ranks that share a sample (tensor, context parallel) pass the
        same.
        accumulate: micro-batches per step.
        shuffle: draw a new order in every epoch; else 0, 1, 2, …
    """

    def __init__(
        self,
        samples: int,
        batch: int,
        *,
        rank: int = 0,
        size: int = 1,
        accumulate: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples: nothing to draw from, got {samples}")
        for name, value in (("batch", batch), ("accumulate", accumulate)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if not 0 <= rank < size:
            raise ValueError(f"rank: expected 0 … {size - 1} for size {size}, got {rank}")
        self.samples, self.batch, self.rank, self.size = samples, batch, rank, size
        self.accumulate, self.shuffle, self.seed = accumulate, shuffle, seed
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of the next pass, and the step that it begins with; call it on every rank alike."""
        self.epoch, self.start = epoch, start

    @property
    def steps(self) -> int:
        """Of a whole epoch."""
        return -(-self.samples // self.batch)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def global_sizes(self) -> list[int]:
        """Samples of each step of a whole epoch, over all ranks: known without communication."""
        return [min(self.batch, self.samples - first) for first in range(0, self.samples, self.batch)]

    def micro_sizes(self, size: int) -> list[int]:
        """Samples of each micro-batch of a step of ``size``, over all ranks."""
        rounds, rest = divmod(size, self.size * self.accumulate)  # of one sample for each rank and micro-batch
        filled = [min(max(rest - micro * self.size, 0), self.size) for micro in range(self.accumulate)]
        return [rounds * self.size + more for more in filled]

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.samples))
        if self.shuffle:
            # NumPy mixes both numbers; a torch generator on the CPU ignores all but 32 bits of its seed.
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.samples).tolist()
        for first in range(self.start * self.batch, self.samples, self.batch):
            share = order[first : first + self.batch][self.rank :: self.size]
            for micro in range(self.accumulate):
                yield share[micro :: self.accumulate]
