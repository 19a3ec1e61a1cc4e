"""Where the values of a checkpoint go on this rank, and getting them there."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
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


# Of an optimiser.
States = dict[nn.Parameter, dict[str, Any]]


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
            self._add(targets, ("model", name), self.source(name), content.cut_like(param, param))
        for name, buffer in content.buffers(model).items():
            self._add(targets, ("model", name), name, content.whole(buffer))
        return targets

    def for_optimizer(self, model: nn.Module, optimizer: Optimizer) -> tuple[States, Targets]:
        """New states for its parameters, to be read into; tensors that fit are used again."""
        if self.rest.groups is None:
            raise ValueError(f"{self.path}: was saved without an optimizer")
        keys: dict[str, list[str]] = defaultdict(list)
        for path in self.metadata.planner_data.values():
            if path[:2] == ("optimizer", "state"):
                keys[path[2]].append(path[3])
        states, targets = States(), Targets()
        devices = _devices_of_numbers(optimizer)
        for param, name in content.names_in(model, optimizer).items():
            source = self.source(name)
            state = dict(self.rest.scalars.get(source, {}))
            for key in keys[source]:
                saved = self._tensor(key_of(("optimizer", "state", source, key)))
                old = optimizer.state.get(param, {}).get(key)
                state[key], held = _place(name, key, saved, param, old, devices[param])
                path = ("optimizer", "state", name, key)
                self._add(targets, path, source, held)
            if state:
                states[param] = state
        return states, targets

    def source(self, name: str) -> str:
        """The name that a parameter of the model has in the checkpoint, where it may have been tied to another."""
        return name if ("model", name) in self.metadata.planner_data.values() else self.rest.tied.get(name, name)

    def _add(self, targets: Targets, path: content.Path, source: str, held: Held) -> None:
        key = key_of((*path[:-1], source)) if path[0] == "model" else key_of((*path[:2], source, path[3]))
        saved = self._tensor(key)
        if tuple(saved.size) != held.shape:
            raise ValueError(f"{key_of(path)}: {list(held.shape)} here, but {list(saved.size)} in {self.path}")
        if _kind(saved.properties.dtype) != _kind(held.dtype):
            raise ValueError(f"{key_of(path)}: {held.dtype} here, but {saved.properties.dtype} in {self.path}")
        targets[key_of(path)] = (key, held)

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


def _place(
    name: str, key: str, saved: TensorStorageMetadata, param: nn.Parameter, old: Any, device: torch.device
) -> tuple[Tensor, Held]:
    """A tensor for one state of a parameter, and the boxes that belong in it."""
    dtype, whole = saved.properties.dtype, full_shape(param)
    number = not saved.size and (key in NUMBERS or bool(whole))
    cut = not number and list(saved.size) == whole
    if not number and not cut and content.is_cut(param):
        raise ValueError(
            f"optimizer: {key} of {name} has the shape {list(saved.size)}, its parameter {whole}, which is cut over "
            "ranks here, so nobody can tell how to cut the state"
        )
    if not cut:
        fresh = torch.empty(saved.size, dtype=dtype, device=device if number else param.device)
    else:
        fresh = torch.empty_like(param, dtype=dtype, requires_grad=False)
    if isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (fresh.shape, dtype, fresh.device):
        fresh = old
    return fresh, content.cut_like(fresh, param) if cut else content.whole(fresh)


def _devices_of_numbers(optimizer: Optimizer) -> dict[nn.Parameter, torch.device]:
    """As ``Optimizer.load_state_dict``: on the CPU, unless a kernel of the device needs them there."""
    found = {}
    for group in optimizer.param_groups:
        on_device = group.get("capturable") or group.get("fused")
        for param in group["params"]:
            found[param] = param.device if on_device else torch.device("cpu")
    return found


def _kind(dtype: torch.dtype) -> str:
    return (
        "real"
        if dtype.is_floating_point
        else "complex"
        if dtype.is_complex
        else "bool"
        if dtype == torch.bool
        else "int"
    )
