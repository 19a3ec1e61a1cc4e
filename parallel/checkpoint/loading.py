"""Loading: each rank reads what it holds, whatever ranks wrote it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

import commlayer
from commlayer import Group
from parallel.checkpoint import content, files
from parallel.checkpoint.agreement import agreed, ranks_of
from parallel.checkpoint.manifest import check, read_manifest
from parallel.checkpoint.options import options_by_name, restore_options
from parallel.checkpoint.rest import Rest, own_file, read, read_rest
from parallel.checkpoint.targets import Saved, States, Targets, read_metadata, read_tensors


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

    Raises ValueError, on all ranks and before anything is changed, for a checkpoint that is broken, lacks a name or has
    another shape for it.
    """
    group, path = ranks_of(group), Path(path)
    manifest = check(path, group) if verify else agreed(lambda: read_manifest(path), group)

    def prepare() -> tuple[Rest, Any, Metadata, Targets, States, list[dict[str, Any]]]:
        rest, metadata = read_rest(path), read_metadata(path)
        own = read(path / own_file(group.rank)) if manifest.ranks == group.size else None
        saved = Saved(path, metadata, rest)
        targets, states, options = saved.for_model(model), States(), []
        if optimizer is not None:
            states, more = saved.for_optimizer(model, optimizer)
            options = options_by_name(rest, content.names_in(model, optimizer), optimizer)
            targets = targets | more
        return rest, own, metadata, targets, states, options

    rest, own, metadata, targets, states, options = agreed(prepare, group)
    used = commlayer.all_gather_object([source for source, _ in targets.values()], group=group)
    wanted = ("model",) if optimizer is None else ("model", "optimizer")
    saved_keys = [key for key, saved_path in metadata.planner_data.items() if saved_path[0] in wanted]
    if left := sorted(set(saved_keys).difference(*used)):
        raise ValueError(f"{path}: has {left[0]}, for which there is no place here")
    agreed(lambda: read_tensors(path, targets, metadata), group)
    if optimizer is not None:
        restore_options(optimizer, options)
        for param in content.names_in(model, optimizer):
            optimizer.state.pop(param, None)
            if param in states:
                optimizer.state[param] = states[param]
    if content.is_zero(model):
        model.refresh()  # type: ignore[operator]
    return Loaded(manifest.step, manifest.about, rest.shared, own)


def last_good(folder: Path | str, *, group: Group | None = None) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole and as it was written; warns about each that is not.

    With a ``group`` collective, and the same on all its ranks, of which the first warns. None where there is none.
    """
    found = files.checkpoints(Path(folder))
    if group is not None:
        found = commlayer.broadcast_object(found, group=group)
    for path in reversed(found):
        try:
            check(path, group)
        except ValueError as error:
            if group is None or group.rank == 0:
                warnings.warn(f"skipped a broken checkpoint: {error}", stacklevel=2)
        else:
            return path
    return None
