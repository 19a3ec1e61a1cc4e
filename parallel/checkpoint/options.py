"""The options of an optimiser's groups (learning rate and so on), saved and put back by the names of parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.checkpoint.rest import Rest

Options = dict[str, Any]


def options_by_name(rest: Rest, names: dict[nn.Parameter, str], optimizer: Optimizer) -> list[Options]:
    """Those of each group of ``optimizer``. Raises ValueError where its names had none, or not the same ones."""
    saved = {name: group["options"] for group in rest.groups or [] for name in group["names"]}
    found: list[Options] = []
    for index, group in enumerate(optimizer.param_groups):
        first: tuple[str, Options] | None = None
        for param in group["params"]:
            name = names[param]
            options = saved.get(name, saved.get(rest.tied.get(name, name)))
            if options is None:
                raise ValueError(f"optimizer: {name} was not in the one that was saved")
            if first is None:
                first = (name, options)
            elif (other := _different(first[1], options)) is not None:
                raise ValueError(
                    f"optimizer: {first[0]} and {name} are in group {index} here, but were saved with different values "
                    f"of {other}: {first[1].get(other)!r} and {options.get(other)!r}"
                )
        found.append({} if first is None else first[1])
    return found


def restore_options(optimizer: Optimizer, options: list[Options]) -> None:
    """Options that are tensors become new ones, since groups may share a tensor at first; on the old one's device."""
    for group, values in zip(optimizer.param_groups, options, strict=True):
        for key, value in values.items():
            old = group.get(key)
            if isinstance(value, Tensor):
                value = value.to(old.device if isinstance(old, Tensor) else value.device, copy=True)
            group[key] = value


def _different(a: Options, b: Options) -> str | None:
    """The first option in which they differ."""
    return next((key for key in [*a, *b] if key not in a or key not in b or not _same(a[key], b[key])), None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)
