"""Loading: each rank reads what it holds, whatever ranks wrote it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

import commlayer
from commlayer import Group
from parallel.checkpoint import content
from parallel.checkpoint.agreement import agreed, ranks_of
from parallel.checkpoint.history import newest_first
from parallel.checkpoint.manifest import check, read_manifest
from parallel.checkpoint.options import options_by_name, restore_options
from parallel.checkpoint.rest import own_file, read, read_rest
from parallel.checkpoint.targets import Saved, State, Targets, read_metadata, read_tensors

Item = TypeVar("Item")

# Bytes of state that may be in memory on their way to files.
AT_ONCE = 256 * 2**20


@dataclass(frozen=True)
class Loaded:
    """What was saved beside model and optimiser. ``own`` is None where the number of ranks is another one now."""

    step: int
    about: Any
    shared: Any
    own: Any


def load(
    path: Path | str,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    group: Group | None = None,
    verify: bool = True,
) -> Loaded:
    """Put a checkpoint of any layout into ``model`` and ``optimizer``. Collective over ``group``, by default the world.

    Values are converted to the dtype of the model; the optimiser gets its state as it was saved, with nothing more and
    nothing less, and the options of its groups by the names of their parameters.

    ``verify``: read all files first, each by one rank, and compare their checksums. The files are trusted otherwise:
    load your own job's alone, as their index is pickled.

    Little more memory is needed than what the model and its optimiser have afterwards, also where that is in files.

    Raises ValueError, on all ranks and before anything is changed, for a checkpoint that is broken, lacks a name or has
    another shape for it. A file that nobody verified, or that went bad after that, may be found out half way: some
    values are those of the checkpoint then.
    """
    group, path = ranks_of(group), Path(path)
    manifest = check(path, group) if verify else agreed(lambda: read_manifest(path), group)

    def prepare() -> tuple[Saved, Any, Targets, list[State], list[dict[str, Any]]]:
        saved = Saved(path, read_metadata(path), read_rest(path))
        own = read(path / own_file(group.rank)) if manifest.ranks == group.size else None
        targets, states, options = saved.for_model(model), list[State](), []
        if optimizer is not None:
            states = saved.for_optimizer(model, optimizer)
            options = options_by_name(saved.rest, content.names_in(model, optimizer), optimizer)
        return saved, own, targets, states, options

    saved, own, targets, states, options = agreed(prepare, group)
    mine = [key for key, _ in targets.values()] + [slot.key for state in states for slot in state.slots.values()]
    used = commlayer.all_gather_object(mine, group=group)
    wanted = ("model",) if optimizer is None else ("model", "optimizer")
    saved_keys = [key for key, saved_path in saved.metadata.planner_data.items() if saved_path[0] in wanted]
    if left := sorted(set(saved_keys).difference(*used)):
        raise ValueError(f"{path}: has {left[0]}, for which there is no place here")
    agreed(lambda: _read(saved, model, optimizer, targets, states), group)
    if optimizer is not None:
        restore_options(optimizer, options)
    if content.is_zero(model):
        model.refresh()  # type: ignore[operator]
    return Loaded(manifest.step, manifest.about, saved.rest.shared, own)


def _read(saved: Saved, model: nn.Module, optimizer: Optimizer | None, targets: Targets, states: list[State]) -> None:
    """Little by little, so that never much is in memory that belongs into files."""
    for part in _by_bytes(targets.items(), lambda target: target[1][1].nbytes):
        read_tensors(saved.path, dict(part), saved.metadata)
        _settle(model)
    for some in _by_bytes(states, lambda state: state.nbytes):
        assert optimizer is not None
        _read_states(saved, optimizer, some)
        _settle(model)


def _read_states(saved: Saved, optimizer: Optimizer, states: list[State]) -> None:
    targets, fresh = Targets(), []
    for state in states:
        values, places = state.places(optimizer.state.get(state.param, {}))
        fresh.append((state.param, values))
        targets |= places
    read_tensors(saved.path, targets, saved.metadata)
    for param, values in fresh:
        optimizer.state.pop(param, None)
        if values:
            optimizer.state[param] = values


def _settle(model: nn.Module) -> None:
    """Let ZeRO move what is in memory, and belongs into its files, to these."""
    if content.is_zero(model) and (settle := getattr(model, "settle", None)) is not None:
        try:
            settle()
        except OSError as error:
            raise ValueError(f"the state of the optimizer cannot be kept: {error}") from error


def _by_bytes(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """In lists that together have a bounded number of bytes, unless one item has more by itself."""
    some: list[Item] = []
    total = 0
    for item in items:
        total += size(item)
        if some and total > AT_ONCE:
            yield some
            some, total = [], size(item)
        some.append(item)
    if some:
        yield some


def last_good(folder: Path | str, *, group: Group | None = None) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole and as it was written; warns about each newer one that is not.

    That which was saved last is the newest. A run that went back to an earlier step has left those of later steps
    behind: they come after its own.

    With a ``group`` collective, and the same on all its ranks, of which the first warns. None where there is none.
    """
    found = newest_first(Path(folder)) if group is None or group.rank == 0 else []
    if group is not None:
        found = commlayer.broadcast_object(found, group=group)
    for path in found:
        try:
            check(path, group)
        except ValueError as error:
            if group is None or group.rank == 0:
                warnings.warn(f"skipped a broken checkpoint: {error}", stacklevel=2)
        else:
            return path
    return None
