"""Saving: what is kept is collected and planned together, then written by each rank for itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.optim import Optimizer

import commlayer
from commlayer import Group
from parallel.checkpoint import files
from parallel.checkpoint.agreement import agreed, ranks_of
from parallel.checkpoint.content import Content, collect
from parallel.checkpoint.planner import Writer
from parallel.checkpoint.rest import SHARED, Rest, merged, own_file, to_bytes
from parallel.checkpoint.writing import PENDING, Saving


def save(
    folder: Path | str,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    shared: Any = None,
    own: Any = None,
    group: Group | None = None,
    keep: int | None = None,
    background: bool = False,
    about: Any = None,
) -> Saving:
    """Write ``folder/step-00000400``, for any other layout to read. Collective over ``group``.

    Each rank writes what it holds; what several hold alike, one of them does. A crash at any moment leaves the
    checkpoints before it as they were. The folder has to be one that all ranks share.

    Args:
        model: of DataParallel, ZeRO or plain. Its parameters and persistent buffers, the latter as the first rank has
            them.
        optimizer: its state and the options of its groups.
        shared: a tree that ``torch.load(weights_only=True)`` reads, such as the state of a scheduler; rank 0's is kept.
        own: the same, of each rank, such as the states of random generators.
        group: by default the world.
        keep: how many stay, once this one is whole: this one and the last ones that the run came by; only then those
            of later steps, which a run that went back has left behind. One that has no manifest does not count, and is
            removed, too; no more of them is read for this.
        background: return when all values are copied to the CPU; write in a thread, and say how it went in
            ``Saving.wait()``. The next save of the group waits for it first, and raises what that raises.
        about: of JSON's types, for people and for checks before loading.

    Raises ValueError on all ranks, before anything is written, for values that cannot be kept, and where ranks hold
    too little or too much of a tensor; OSError on all ranks where one cannot write.
    """
    group, folder = ranks_of(group), Path(folder)
    if (before := PENDING.get(group)) is not None:
        before.wait()

    def prepare() -> tuple[Content, Rest, bytes, Any]:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step: expected an int of at least 0, got {step!r}")
        if keep is not None and keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        content = collect(model, optimizer)
        rest = Rest(shared if group.rank == 0 else None, content.tied, content.groups, content.scalars)
        to_bytes("shared", rest.shared)
        to_bytes("optimizer", replace(rest, shared=None))
        return content, rest, to_bytes("own", own), _json(about)

    content, rest, own_bytes, noted = agreed(prepare, group)
    writer = Writer(content.tensors)
    plan, metadata, aside, rest_bytes = _planned(writer, rest, group, folder, step)
    saving = Saving(group, folder, step, aside, keep, noted)
    if background:
        writer.copy_values()
        PENDING[group] = saving
    parts = {own_file(group.rank): own_bytes} | ({SHARED: rest_bytes} if group.rank == 0 else {})
    saving.begin(plan, writer, metadata, parts, background)
    if not background:
        saving.wait()
    return saving


def _planned(
    writer: Writer, rest: Rest, group: Group, folder: Path, step: int
) -> tuple[SavePlan, Metadata | None, Path, bytes]:
    """What this rank writes, and where; on rank 0 also what is written of all, and the bytes of the rest."""
    metadata, rest_bytes = None, b""
    answers: list[tuple[SavePlan, Path] | Exception] | None = None
    everyone = commlayer.gather_object((writer.create_local_plan(), rest), group=group)
    if everyone is not None:
        try:
            plans, metadata = writer.create_global_plan([plan for plan, _ in everyone])
            rest_bytes = to_bytes("shared", merged([theirs for _, theirs in everyone]))
            aside = files.make_aside(folder, step)
            plans = FileSystemWriter(aside).prepare_global_plan(plans)
            answers = [(plan, aside) for plan in plans]
        except (ValueError, OSError) as error:
            answers = [error for _ in range(group.size)]
    answer = commlayer.scatter_object(answers, group=group)
    if isinstance(answer, Exception):
        raise answer
    plan, aside = answer
    return writer.finish_plan(plan), metadata, aside, rest_bytes


def _json(about: Any) -> Any:
    """As it will be read."""
    try:
        return json.loads(json.dumps(about))
    except (TypeError, ValueError) as error:
        raise ValueError(f"about: not of JSON's types ({error})") from None
