"""More groups of the same ranks, so that backends and plans can be compared in one run."""

from __future__ import annotations

import itertools

import torch

from commlayer import bootstrap
from commlayer.backends import torch_native
from commlayer.backends.base import Communicator
from commlayer.capability import CapabilitySet, parse_disabled
from commlayer.control import Client
from commlayer.control.store import HubStore
from commlayer.group import Group
from commlayer.launch import discover, mpi_importable
from commlayer.settings import Settings

_NUMBERS = itertools.count()  # the same on all ranks


def under_mpi(world: Group) -> bool:
    """Whether mpi4py connects these very processes, whatever the world's backend."""
    return world.backend == "mpi" or (world.backend == "gloo" and discover().mpi and mpi_importable())


def on_backend(world: Group, name: str) -> Group:
    """The world's ranks on ``gloo`` or ``mpi``, beside what it runs on itself; called by every rank."""
    assert world._comm is not None
    assert world._comm.seat is not None
    comm: Communicator
    if name == "mpi":
        from commlayer.backends import mpi

        comm = mpi.world(world.timeout)
    else:
        control = world._comm.seat.control
        assert isinstance(control, Client)
        store = HubStore(control, world.timeout, f"bench/{next(_NUMBERS)}/", range(world.size))
        address = control.address
        comm = torch_native.create(name, store, world.rank, world.size, torch.device("cpu"), world.timeout, address)
    settings = Settings.from_env()
    return world.around(range(world.size), comm, lambda: bootstrap.capabilities(comm, settings))


def without(world: Group, disabled: str) -> Group:
    """The world's ranks without what COMMLAYER_DISABLE would take away, nor shared memory; called by every rank."""
    twin = world.twin(f"without {disabled}", shared=False)
    assert twin._comm is not None
    have = world.capabilities()
    narrowed = CapabilitySet(have.profiles, have.disabled + parse_disabled(disabled))
    return Group(twin._comm, twin.ranks, narrowed, dog=twin.watch.dog)  # the twin, which the world closes, owns it
