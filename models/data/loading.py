"""Batches for a data-parallel rank, read ahead by worker processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from models.data.sampling import ShardedBatches

Batch = tuple[Tensor, Tensor]  # what the model sees, and what it should say

LOADING = {"workers": 0, "prefetch": 2}  # keys of a configuration's `data`, whatever the source


class Samples(Protocol):
    """What can be trained on: a data set that makes batches itself, also of no samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...

    def collate(self, samples: Sequence[Batch]) -> Batch: ...


class Feed:
    """The batches of one rank, on its device: step by step for training, or all of them in order.

    Args:
        data: the samples.
        shares: which of them are this rank's, and when.
        device: where batches go; for a CUDA GPU through pinned memory, so that the host need not wait for the copy.
        workers: processes that read; 0: this one.  prefetch: batches that each of them is ahead.
    """

    def __init__(
        self, data: Samples, shares: ShardedBatches, device: torch.device, *, workers: int = 0, prefetch: int = 2
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ValueError(f"workers, prefetch: at least 0 and 1, got {workers} and {prefetch}")
        self.shares, self.device = shares, device
        self._loader: DataLoader[Any] = DataLoader(
            data,
            batch_sampler=shares,
            collate_fn=data.collate,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_outlive_sigterm,
            generator=torch.Generator(),  # seeds of workers come from here, not out of the model's random numbers
        )

    @property
    def steps(self) -> int:
        """Of a whole epoch."""
        return self.shares.steps

    def __iter__(self) -> Iterator[Batch]:
        for x, y in self._loader:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def steps_from(self, step: int) -> Iterator[tuple[int, Iterator[Batch]]]:
        """From step ``step`` of the whole run on, without end: samples over all ranks, and my micro-batches."""
        while True:
            epoch, done = divmod(step, self.steps)
            self.shares.set_epoch(epoch + 1, done)
            micro_batches = iter(self)
            for size in self.shares.global_sizes()[done:]:
                yield size, islice(micro_batches, self.shares.accumulate)
                step += 1


def _outlive_sigterm(worker: int) -> None:
    """Ignore SIGTERM from others than the trainer, in a worker.

    Whoever ends a job may send it to every process, but the trainer needs batches until it has saved its state.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
