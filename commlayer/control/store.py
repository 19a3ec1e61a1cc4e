"""The hub as a torch.distributed store, through which process groups find their peers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from commlayer.control.client import Client


class HubStore(dist.Store):
    """Keys and values of the hub that begin with ``prefix``; ``ranks`` are those that it is for.

    Who waits for a key is told at once when one of them dies.

    Unlike a TCPStore it admits only who knows the job's secret. For process groups that use their store in the
    calling thread (gloo): a thread of C++ that outlives the interpreter must not call Python.
    """

    def __init__(self, client: Client, timeout: float, prefix: str, ranks: Sequence[int]) -> None:
        super().__init__()
        self._client, self._timeout, self._prefix, self._ranks = client, timeout, prefix, ranks

    def set(self, key: str, value: str | bytes) -> None:
        self._client.set(self._prefix + key, _bytes(value))

    def get(self, key: str) -> bytes:
        return self._get([key], self._timeout)[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._get(keys, self._timeout if timeout is None else timeout.total_seconds())

    def take(self, key: str, timeout: float) -> bytes:
        """The value of a key, once it is there; it is gone then."""
        return self._client.get([self._prefix + key], timeout, self._ranks, take=True)[0]

    def _get(self, keys: Sequence[str], timeout: float) -> list[bytes]:
        return self._client.get([self._prefix + key for key in keys], timeout, self._ranks)

    def add(self, key: str, value: int) -> int:
        return self._client.add(self._prefix + key, value)

    def check(self, keys: list[str]) -> bool:
        return self._client.check([self._prefix + key for key in keys])

    def delete_key(self, key: str) -> bool:
        return self._client.delete(self._prefix + key)

    deleteKey = delete_key  # as C++ calls it

    def compare_set(self, key: str, expected: Any, wanted: Any) -> bytes:
        return self._client.swap(self._prefix + key, _bytes(expected), _bytes(wanted))

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout.total_seconds()


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
