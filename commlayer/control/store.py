"""The hub as a torch.distributed store, through which process groups find their peers."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from commlayer.control.client import Client


class HubStore(dist.Store):
    """Keys and values of the hub, under a prefix of their own.

    Unlike a TCPStore it admits only who knows the job's secret. For process groups that use their store in the
    calling thread (gloo): a thread of C++ that outlives the interpreter must not call Python.
    """

    def __init__(self, client: Client, timeout: float) -> None:
        super().__init__()
        self._client = client
        self._timeout = timeout

    def set(self, key: str, value: str | bytes) -> None:
        self._client.set(key, _bytes(value))

    def get(self, key: str) -> bytes:
        return self._client.get([key], self._timeout)[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._client.get(keys, self._timeout if timeout is None else timeout.total_seconds())

    def add(self, key: str, value: int) -> int:
        return self._client.add(key, value)

    def check(self, keys: list[str]) -> bool:
        return self._client.check(keys)

    def delete_key(self, key: str) -> bool:
        return self._client.delete(key)

    deleteKey = delete_key  # as C++ calls it

    def compare_set(self, key: str, expected: Any, wanted: Any) -> bytes:
        return self._client.swap(key, _bytes(expected), _bytes(wanted))

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout.total_seconds()


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
