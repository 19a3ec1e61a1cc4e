"""What a model and its optimiser hold on this rank, by name, as boxes of whole tensors.

Names are those of the plain module: without a wrapper's prefix, and of tied parameters the first one. A state of the
optimiser that has the shape of its parameter is cut like it; all else is alike on the ranks that have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.checkpoint.boxes import Box, stretch_boxes
from parallel.data import DataParallel
from parallel.placement import full_shape, placement

Path = tuple[str, ...]

# States of torch's optimisers that are one number also where the parameter is one element, cut or not.
NUMBERS = ("step", "eta", "mu", "mu_product")


@dataclass(frozen=True)
class Held:
    """This rank's boxes of a tensor that is ``shape`` as a whole, with views of their values.

    ``alike``: every rank that has it has all of it, and the first one's counts.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[tuple[Box, Tensor]]
    alike: bool = False

    @property
    def nbytes(self) -> int:
        """On this rank."""
        return sum(values.nbytes for _, values in self.pieces)


@dataclass
class Content:
    """``tensors`` by their path in a nested state dict; what is not a tensor beside them."""

    tensors: dict[Path, Held] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # another name of a parameter: the name it is kept under
    groups: list[dict[str, Any]] | None = None  # {"names": [...], "options": {...}} of each group of the optimiser
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)  # state that is not a tensor, by parameter


def key_of(path: Path) -> str:
    """As torch flattens nested state dicts."""
    return ".".join(path)


def is_zero(model: nn.Module) -> bool:
    """Whether it holds shards of its module's parameters, and has to be told when they have changed."""
    return callable(getattr(model, "refresh", None)) and isinstance(getattr(model, "module", None), nn.Module)


def plain(model: nn.Module) -> nn.Module:
    """The module within a wrapper, whose names count."""
    module = model.module if isinstance(model, DataParallel) or is_zero(model) else model
    assert isinstance(module, nn.Module)
    return module


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """This rank's parts, each once."""
    return dict((model if is_zero(model) else plain(model)).named_parameters())


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent ones."""
    found = {}
    for name, value in plain(model).state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: a module's extra state is not kept; pass it in shared or own")
        if not isinstance(value, nn.Parameter):
            found[name] = value
    return found


def tied(model: nn.Module) -> dict[str, str]:
    """Other names of parameters, and the first name of each."""
    first: dict[int, str] = {}
    found = {}
    for name, param in plain(model).named_parameters(remove_duplicate=False):
        if first.setdefault(id(param), name) != name:
            found[name] = first[id(param)]
    return found


def cut_like(values: Tensor, param: Tensor) -> Held:
    """``values``, which have the shape of this rank's part of ``param``."""
    found = placement(param)
    offsets = [0] * len(full_shape(param))
    for shard in found.shards:
        offsets[shard.dim] += sum(shard.sizes[: shard.group.rank])
    if (cut := found.stretch) is None:
        pieces = [(Box(tuple(offsets), tuple(values.shape)), values)]
    else:
        pieces, at = [], 0
        for box in stretch_boxes(cut.shape, cut.start, cut.stop):
            pieces.append((box.shifted(offsets), values.detach().narrow(0, at, box.numel).view(box.sizes)))
            at += box.numel
    return Held(tuple(full_shape(param)), values.dtype, [piece for piece in pieces if piece[0].numel])


def whole(values: Tensor) -> Held:
    """A tensor that is alike on all ranks."""
    box = Box((0,) * values.ndim, tuple(values.shape))
    return Held(box.sizes, values.dtype, [(box, values)] if box.numel else [], alike=True)


def collect(model: nn.Module, optimizer: Optimizer | None) -> Content:
    """All that is kept of them. Raises ValueError for a state that cannot be kept."""
    content = Content(tied=tied(model))
    for name, param in parameters(model).items():
        content.tensors["model", name] = cut_like(param, param)
    for name, buffer in buffers(model).items():
        content.tensors["model", name] = whole(buffer)
    if optimizer is not None:
        content.groups = []
        names = names_in(model, optimizer)
        for group in optimizer.param_groups:
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            content.groups.append({"names": [names[p] for p in group["params"]], "options": options})
        for param, name in names.items():
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    content.tensors["optimizer", "state", name, key] = _state(name, key, value, param)
                else:
                    content.scalars.setdefault(name, {})[key] = value
    return content


def _state(name: str, key: str, value: Tensor, param: Tensor) -> Held:
    if value.shape == param.shape and not (key in NUMBERS and not value.ndim):
        return cut_like(value, param)
    if value.ndim and is_cut(param):
        raise ValueError(
            f"optimizer: {key} of {name} has the shape {list(value.shape)}, but this rank's part of the parameter "
            f"{list(param.shape)}, so nobody can tell how it is cut"
        )
    return whole(value)


def is_cut(param: Tensor) -> bool:
    return placement(param).stretch is not None or full_shape(param) != list(param.shape)


def kind(dtype: torch.dtype) -> str:
    """Values of one kind are converted to another dtype of it, and to no other."""
    if dtype.is_floating_point:
        return "real"
    if dtype.is_complex:
        return "complex"
    return "bool" if dtype == torch.bool else "int"


def names_in(model: nn.Module, optimizer: Optimizer) -> dict[nn.Parameter, str]:
    """Of the optimiser's parameters, in its order. Raises ValueError for one that is not the model's."""
    names = {param: name for name, param in parameters(model).items()}
    for param in _params(optimizer):
        if param not in names:
            raise ValueError(f"optimizer: it has a parameter of shape {list(param.shape)} that is not the model's")
    return {param: names[param] for param in _params(optimizer)}


def _params(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]
