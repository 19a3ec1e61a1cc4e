"""How ranks find the hub of the control channel, and learn the job's secret.

Through whatever the launcher offers: torchrun's store, MPI, or the address of rank 0 and a key in the user's files.
The hub listens on one address: the one by which other hosts reach rank 0, or the loopback where there is one host.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from commlayer.control import Client, Hub, secret
from commlayer.control.ranks import named
from commlayer.errors import CommError, CommTimeout, LaunchError
from commlayer.launch import Launch, mpi_importable

_client: Client | None = None
_stores: dict[str, Any] = {}
_KEY = "commlayer/hub"
_SIOCGIFADDR = 0x8915


def join(launch: Launch, rank: int, size: int, timeout: float, by_mpi: bool, store: Any = None) -> Client:
    """This process' end of the control channel, kept for its life. Raises LaunchError, CommTimeout.

    ``by_mpi``: MPI runs already and knows all ranks. ``store``: of a program that has one.
    """
    global _client
    if _client is None:
        try:
            _client = _join(launch, rank, size, timeout, by_mpi, store)
        except CommError:
            raise
        except RuntimeError as error:  # of torch's stores
            raise CommTimeout(f"rank {rank} of {size} could not reach the job's store: {error}") from error
    return _client


def fail(why: str) -> None:
    """Tell the other ranks, if there is a channel, that this one's init has failed."""
    if _client is not None:
        with suppress(CommError):
            _client.tell({"event": "failed", "why": why})


def forget() -> None:
    """In a forked child, which is no rank."""
    global _client
    _client = None


def leave(linger: float) -> None:
    """At the end of the process; rank 0 serves the others for up to ``linger`` seconds more."""
    global _client
    if _client is not None:
        _client.close(linger)
        _client = None
        _stores.clear()


def native_store(client: Client, launch: Launch, size: int, timeout: float) -> Any:
    """A store of torch's own, for what may use it from threads of C++ (NCCL), bound as the hub is."""
    if "torch" not in _stores:
        limit = timedelta(seconds=timeout)
        if _by_torchrun():
            _stores["torch"] = _torchrun_store(launch, size, timeout)
        elif client.hub is not None:
            listener = socket.create_server((client.address, 0), backlog=max(128, size))
            port = listener.getsockname()[1]
            _stores["torch"] = dist.TCPStore(
                client.address, port, size, True, limit, wait_for_workers=False, master_listen_fd=listener.detach()
            )
            client.set("torch store", json.dumps([client.address, port]).encode())
        else:
            address, port = json.loads(client.get(["torch store"], timeout)[0])
            _stores["torch"] = dist.TCPStore(address, port, size, False, limit)
    return _stores["torch"]


def _join(launch: Launch, rank: int, size: int, timeout: float, by_mpi: bool, store: Any) -> Client:
    if store is None and not by_mpi and _by_torchrun():
        store = _torchrun_store(launch, size, timeout)
    if store is not None:
        return _by_store(store, rank, size, timeout)
    known = launch.master_addr and launch.master_port
    if by_mpi or (not known and launch.mpi and mpi_importable()):
        return _by_mpi(rank, size, timeout)
    if known:
        return _by_address(launch, rank, size, timeout)
    remedy = "set MASTER_ADDR and MASTER_PORT on every rank"
    if launch.mpi:
        remedy += ", or install mpi4py, through which rank 0 tells"
    raise LaunchError(f"{launch.launcher} does not say where rank 0 is: {remedy}")


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _torchrun_store(launch: Launch, size: int, timeout: float) -> Any:
    if "torchrun" not in _stores:
        found = dist.rendezvous("env://", launch.rank, size, timeout=timedelta(seconds=timeout))
        _stores["torchrun"] = next(iter(found))[0]
    return _stores["torchrun"]


def _by_store(store: Any, rank: int, size: int, timeout: float) -> Client:
    limit = timedelta(seconds=timeout)
    if rank:
        store.set(f"{_KEY}/{rank}", json.dumps(whereabouts()))
        store.wait([_KEY], limit)
        address, port, token = json.loads(store.get(_KEY))
        return Client(address, port, secret.of_job(token), rank, timeout)
    keys = [f"{_KEY}/{other}" for other in range(1, size)]
    try:
        store.wait(keys, limit)
    except RuntimeError as error:
        missing = [other for other, key in enumerate(keys, 1) if not store.check([key])]
        raise CommTimeout(f"init: {named(missing)} never came within {timeout:g} s") from error
    # Whoever reaches the store can read it: so it holds what tells this job from others, and not the secret.
    token = secret.fresh().hex()
    hub = _hub(seen_from([json.loads(store.get(key)) for key in keys]), 0, secret.of_job(token), size)
    store.set(_KEY, json.dumps([hub[0].address, hub[0].port, token]))
    return _own(hub, timeout)


def _by_mpi(rank: int, size: int, timeout: float) -> Client:
    from commlayer.backends import mpi_job

    rows = mpi_job.exchange(json.dumps(whereabouts()).encode(), timeout)
    hub = None
    if rank == 0:
        hub = _hub(seen_from([json.loads(row) for row in rows]), 0, secret.fresh(), size)
    told = b"" if hub is None else json.dumps([hub[0].address, hub[0].port, hub[1].hex()]).encode()
    address, port, key = json.loads(mpi_job.exchange(told, timeout)[0])
    return _own(hub, timeout) if hub is not None else Client(address, port, bytes.fromhex(key), rank, timeout)


def _by_address(launch: Launch, rank: int, size: int, timeout: float) -> Client:
    assert launch.master_addr is not None
    assert launch.master_port is not None
    # The program may start torch.distributed at MASTER_PORT itself; a port that the layer chose is its own.
    users = launch.variables.get("master_port", "").startswith("MASTER_PORT=")
    port = launch.master_port + users
    key = secret.of_job(f"{launch.master_addr} {port} {size}")
    if rank:
        return Client(launch.master_addr, port, key, rank, timeout)
    try:
        address = socket.gethostbyname(launch.master_addr)
    except OSError as error:
        raise LaunchError(f"MASTER_ADDR={launch.master_addr}: {error}") from error
    if address.startswith("127.") and launch.local_size != size:
        address = _route_to("192.0.2.1")  # Debian has the host's own name there; others see it elsewhere (RFC 5737)
    return _own(_hub(address, port, key, size), timeout)


def _hub(address: str, port: int, key: bytes, size: int) -> tuple[Hub, bytes]:
    try:
        return Hub(address, port, key, size), key
    except OSError as error:
        remedy = "MASTER_ADDR must be an address of rank 0's host, and the port after MASTER_PORT free there"
        raise LaunchError(
            f"rank 0 cannot listen at {address}:{port}: {error.strerror or error}" + (f"; {remedy}" if port else "")
        ) from error


def _own(hub: tuple[Hub, bytes], timeout: float) -> Client:
    return Client(hub[0].address, hub[0].port, hub[1], 0, timeout, hub[0])


def whereabouts() -> list[str]:
    """This host's name, and its own IPv4 addresses but the loopback's, that of its name first."""
    name = socket.gethostname()
    found = []
    with suppress(OSError):
        found.append(socket.gethostbyname(name))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, interface in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
                found.append(socket.inet_ntoa(answer[20:24]))
    return [name, *(address for address in dict.fromkeys(found) if not address.startswith("127."))]


def seen_from(hosts: Sequence[list[str]]) -> str:
    """This host's address on the way to the first other host; the loopback's where there is none."""
    mine = whereabouts()
    other = next((host for host in hosts if host != mine), None)
    if other is None:
        return "127.0.0.1"
    for address in other[1:]:
        found = _route_to(address)
        if not found.startswith("127."):
            return found
    raise LaunchError(f"no way from host {' '.join(mine)} to host {' '.join(other)}")


def _route_to(address: str) -> str:
    """The address that packets to there would come from; none is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((address, 9))
            return sock.getsockname()[0]
    except OSError:
        return "127.0.0.1"
