"""Where the values of a checkpoint go on this rank, and getting them there."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from parallel.checkpoint import content
from parallel.checkpoint.content import NUMBERS, Held, key_of
from parallel.checkpoint.planner import Reader
from parallel.checkpoint.rest import Rest
from parallel.placement import full_shape

# By the key that it would have in a checkpoint of this rank: the key that it has in the one to load, and the place.
Targets = dict[str, tuple[str, Held]]


@dataclass(frozen=True)
class Slot:
    """One state of a parameter: its key in the checkpoint, and the tensor to make for it. ``cut``: as the parameter."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    cut: bool

    def fits(self, values: Tensor) -> bool:
        return (tuple(values.shape), values.dtype, values.device) == (self.shape, self.dtype, self.device)


@dataclass(frozen=True)
class State:
    """What the optimiser is to have for one parameter: no tensor is made before its turn has come to be read."""

    name: str
    param: nn.Parameter
    scalars: dict[str, Any]
    slots: dict[str, Slot]

    @property
    def nbytes(self) -> int:
        """On this rank."""
        return sum(slot.dtype.itemsize * prod(slot.shape) for slot in self.slots.values())

    def places(self, old: dict[str, Any]) -> tuple[dict[str, Any], Targets]:
        """The new state, to be read into; tensors of the old one that fit are used again."""
        state, targets = dict(self.scalars), Targets()
        for key, slot in self.slots.items():
            before = old.get(key)
            if isinstance(before, Tensor) and slot.fits(before):
                values = before
            else:
                values = torch.empty(slot.shape, dtype=slot.dtype, device=slot.device)
            state[key] = values
            held = content.cut_like(values, self.param) if slot.cut else content.whole(values)
            targets[key_of(("optimizer", "state", self.name, key))] = (slot.key, held)
        return state, targets


@dataclass(frozen=True)
class Saved:
    """A checkpoint as far as it is known before tensors are read."""

    path: Path
    metadata: Metadata
    rest: Rest

    def for_model(self, model: nn.Module) -> Targets:
        """Raises ValueError where a name is missing, or belongs to another shape."""
        targets: Targets = {}
        for name, param in content.parameters(model).items():
            self._add(targets, name, self.source(name), content.cut_like(param, param))
        for name, buffer in content.buffers(model).items():
            self._add(targets, name, name, content.whole(buffer))
        return targets

    def for_optimizer(self, model: nn.Module, optimizer: Optimizer) -> list[State]:
        """Raises ValueError where there is none, or one that cannot be cut as its parameter is here."""
        if self.rest.groups is None:
            raise ValueError(f"{self.path}: was saved without an optimizer")
        keys: dict[str, list[str]] = defaultdict(list)
        for path in self.metadata.planner_data.values():
            if path[:2] == ("optimizer", "state"):
                keys[path[2]].append(path[3])
        devices = _devices_of_numbers(optimizer)
        found = []
        for param, name in content.names_in(model, optimizer).items():
            source = self.source(name)
            slots = {key: self._slot(name, source, key, param, devices[param]) for key in keys[source]}
            found.append(State(name, param, self.rest.scalars.get(source, {}), slots))
        return found

    def source(self, name: str) -> str:
        """The name that a parameter of the model has in the checkpoint, where it may have been tied to another."""
        return name if name in self._names else self.rest.tied.get(name, name)

    @cached_property
    def _names(self) -> set[str]:
        """Of the model's tensors."""
        return {path[1] for path in self.metadata.planner_data.values() if path[0] == "model"}

    def _add(self, targets: Targets, name: str, source: str, held: Held) -> None:
        key, saved = key_of(("model", name)), self._tensor(key_of(("model", source)))
        if tuple(saved.size) != held.shape:
            raise ValueError(f"{key}: {list(held.shape)} here, but {list(saved.size)} in {self.path}")
        if content.kind(saved.properties.dtype) != content.kind(held.dtype):
            raise ValueError(f"{key}: {held.dtype} here, but {saved.properties.dtype} in {self.path}")
        targets[key] = (key_of(("model", source)), held)

    def _slot(self, name: str, source: str, key: str, param: nn.Parameter, device: torch.device) -> Slot:
        """``device``: of states that are one number."""
        whole, saved_key = full_shape(param), key_of(("optimizer", "state", source, key))
        saved = self._tensor(saved_key)
        number = not saved.size and (key in NUMBERS or bool(whole))
        cut = not number and list(saved.size) == whole
        if not number and not cut and content.is_cut(param):
            raise ValueError(
                f"optimizer: {key} of {name} has the shape {list(saved.size)}, its parameter {whole}, which is cut "
                "over ranks here, so nobody can tell how to cut the state"
            )
        shape = tuple(param.shape if cut else saved.size)
        return Slot(saved_key, shape, saved.properties.dtype, device if number else param.device, cut)

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found = self.metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(f"{key}: not in {self.path}")
        return found


def read_metadata(path: Path) -> Metadata:
    """torch's index of the files."""
    try:
        return FileSystemReader(path).read_metadata()
    except Exception as error:  # unpickling broken data may raise anything
        raise ValueError(f"{path / '.metadata'}: cannot be read ({type(error).__name__}: {error})") from error


def read_tensors(path: Path, targets: Targets, metadata: Metadata) -> None:
    """Raises ValueError where a file cannot be read; the targets have some of the values then."""
    storage, planner = FileSystemReader(path), Reader(targets, metadata)
    try:
        storage.set_up_storage_reader(metadata, is_coordinator=False)
        storage.read_data(storage.prepare_local_plan(planner.create_local_plan()), planner).wait()
    except Exception as error:  # as above
        raise ValueError(f"{path}: a file cannot be read ({type(error).__name__}: {error})") from error


def _devices_of_numbers(optimizer: Optimizer) -> dict[nn.Parameter, torch.device]:
    """As ``Optimizer.load_state_dict``: on the CPU, unless a kernel of the device needs them there."""
    found = {}
    for group in optimizer.param_groups:
        on_device = group.get("capturable") or group.get("fused")
        for param in group["params"]:
            found[param] = param.device if on_device else torch.device("cpu")
    return found
