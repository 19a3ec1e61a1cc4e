"""What the channel needs of the communicator whose ranks it serves."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Ranks(Protocol):
    """A ``Communicator``, or a part of one; see there."""

    rank: int
    size: int
    device: torch.device
    threads: bool
    synchronous: bool

    @property
    def failure(self) -> Any: ...

    def limit(self, timeout: float | None) -> float: ...

    def progress(self) -> None: ...

    def share(self, value: bytes) -> list[bytes]: ...
