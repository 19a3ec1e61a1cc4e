"""Optimiser state in files that are mapped into memory: the disk holds it, and memory only what is being stepped."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from commlayer import UnsupportedOperation
from parallel.zero.flat import Flat
from parallel.zero.optimizer import limited


class DiskState:
    """What ``optimizer`` keeps of each element, in files in ``folder``, one vector after the other.

    A file has no name once it is open, so that nothing is left of it when the process ends, however it does. Its space
    is reserved at once: a full disk is an OSError then, and no crash later.
    """

    def __init__(self, optimizer: Optimizer, flats: Sequence[Flat], folder: Path) -> None:
        self.optimizer, self.flats, self.folder = optimizer, flats, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.maps: dict[Flat, dict[tuple[int, str], mmap.mmap]] = {flat: {} for flat in flats}
        for flat in flats:
            if flat.whole and flat.separate:  # master weights are state, too
                flat.shard = self._move(flat, (-1, "master"), flat.shard)
                for member in flat.members:
                    member.piece.data = flat.mine(member, flat.shard)
            self._settle(flat)

    def step(self) -> None:
        """Step every vector by itself. Takes the gradients: a step of all finds nothing left to do."""
        for flat in self.flats:
            pieces = [member.piece for member in flat.members]
            part = limited(self.optimizer, pieces)
            before = [_options(group) for group in part.param_groups]
            part.step()
            if [_options(group) for group in part.param_groups] != before:
                raise UnsupportedOperation(
                    f"offload: {type(self.optimizer).__name__} keeps a count in its groups, so that vectors cannot be "
                    "stepped one after the other, as offload='disk' does"
                )
            for piece in pieces:
                piece.grad = None
            self._settle(flat)

    def settle(self) -> None:
        """Move what is not there yet."""
        for flat in self.flats:
            self._settle(flat)

    def forget(self) -> None:
        """Memory for the pages of all files."""
        for maps in self.maps.values():
            for mapped in maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: they stay in the file

    def _settle(self, flat: Flat) -> None:
        """Move what has come into being to files, and give its memory back."""
        maps = self.maps[flat]
        for i, member in enumerate(flat.members):
            state: dict[str, Any] = self.optimizer.state.get(member.piece, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == member.piece.shape and value.numel():
                    mapped = maps.get((i, name))
                    if mapped is None or value.data_ptr() != torch.frombuffer(mapped, dtype=value.dtype).data_ptr():
                        state[name] = self._move(flat, (i, name), value)
        for mapped in maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def _move(self, flat: Flat, key: tuple[int, str], value: Tensor) -> Tensor:
        if not value.numel():
            return value
        with tempfile.TemporaryFile(dir=self.folder, prefix="commlayer-") as file:
            os.posix_fallocate(file.fileno(), 0, value.nbytes)
            mapped = self.maps[flat][key] = mmap.mmap(file.fileno(), value.nbytes)
        moved = torch.frombuffer(mapped, dtype=value.dtype).view(value.shape)
        return moved.copy_(value.detach())


def _options(group: dict[str, Any]) -> dict[str, str]:
    return {key: repr(value) for key, value in group.items() if key != "params"}
