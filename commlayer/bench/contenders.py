"""What is compared: the same operation by whatever a user could call instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

import commlayer
from commlayer import runtime
from commlayer.bench.groups import on_backend, under_mpi, without
from commlayer.bench.measure import Run
from commlayer.bench.operations import OPERATIONS, ROOT, Case, fill
from commlayer.bench.spellings import IN_PLACE, Spellings, commlayer_spellings, mpi4py_spellings, torch_spellings
from commlayer.capability import PAIRED, CapabilitySet, Request, parse_disabled, profile_for
from commlayer.group import Group

RUBBISH = 0xA5  # in every byte of an output that nothing was written to
BASELINE = "gloo"  # torch.distributed's, to which others are compared


class Memory:
    """Input and output of every case, in turn, in the same memory."""

    def __init__(self, make: Callable[[int], torch.Tensor], largest: int) -> None:
        self._input, self._output = make(largest), make(largest)

        self._filled: Case | None = None

    def tensors(self, case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The input of this rank, with its values, and room for the output."""
        size = case.dtype.itemsize
        x, out = self._input[: case.inputs * size], self._output[: case.outputs * size]
        x, out = x.view(case.dtype), out.view(case.dtype)
        if case != self._filled:
            fill(case, rank, x)
            self._filled = case
        return x, out


@dataclass(frozen=True)
class Contender:
    """One implementation."""

    key: str
    label: str
    spellings: Spellings
    memory: Memory
    supports: Callable[[Case], bool]
    in_place: tuple[str, ...] = IN_PLACE
    how: Callable[[Case], str] = lambda case: ""

    def run(self, case: Case, rank: int) -> Run | None:
        """Ready to be called, or None where this implementation has no such operation."""
        if case.op not in self.spellings or not self.supports(case):
            return None
        x, out = self.memory.tensors(case, rank)
        in_place = case.op in self.in_place

        def refill() -> None:
            if in_place and not (case.op == "broadcast" and rank != ROOT):
                out.copy_(x)
            else:
                out.view(torch.uint8).fill_(RUBBISH)

        result = None if OPERATIONS[case.op].rooted and rank != ROOT else out
        return Run(self.spellings[case.op](case, x, out), refill, result, in_place and OPERATIONS[case.op].reduces)


def contenders(world: Group, largest: int, disabled: tuple[str, ...] = ()) -> list[Contender]:
    """All that can be compared here, for arrays of up to ``largest`` bytes; called by every rank.

    ``disabled``: for each of these texts, as COMMLAYER_DISABLE has them, the layer without those capabilities, at the
    operation that it names first.
    """
    ordinary = Memory(lambda size: torch.empty(size, dtype=torch.uint8), largest)
    symmetric = Memory(lambda size: commlayer.empty_symmetric((size,), dtype=torch.uint8, group=world), largest)
    name = world.backend
    found = []
    if not runtime.inside_run_local():
        if under_mpi(world):
            found.append(_mpi4py(ordinary))
        found.append(_torch(world, ordinary))
    found.append(_commlayer("commlayer", f"commlayer, {name}", world, ordinary))
    found.append(_commlayer("symmetric", "commlayer, symmetric", world, symmetric))
    bare = world.twin("bare", shared=False)
    if world.shared is not None:
        found.append(_commlayer(f"{name} alone", f"commlayer, {name} alone", bare, ordinary))
    for other in {"gloo": ["mpi"] if under_mpi(world) else [], "mpi": ["gloo"]}.get(name, ()):
        group = on_backend(world, other).twin("bare", shared=False)
        found.append(_commlayer(f"{other} alone", f"commlayer, {other} alone", group, ordinary))
    for text in disabled:
        group = without(world, text)
        emulated = _commlayer(f"without {text}", f"commlayer without {text}", group, ordinary)
        found.append(replace(emulated, supports=_emulates(text, group, bare)))
    return found


def _emulates(text: str, group: Group, bare: Group) -> Callable[[Case], bool]:
    """Whether a case is the operation that ``text`` names first, and the group does it in another way than natively."""
    first = next(iter(parse_disabled(text)[0].ops or ()))
    op = "sendrecv" if first in PAIRED else first
    return lambda case: case.op == op and plan(group, case) != plan(bare, case)


def _commlayer(key: str, label: str, group: Group, memory: Memory) -> Contender:
    return Contender(key, label, commlayer_spellings(group), memory, lambda case: True, how=lambda c: plan(group, c))


def plan(group: Group, case: Case) -> str:
    """How the group does it: by ``shared memory``, ``native``, or the fallbacks from the outermost on."""
    op = "send" if case.op == "sendrecv" else case.op
    found = group.explain(op, reduce=case.reduce, dtype=case.dtype).plan
    if case.nbytes >= found.shared_from:
        return "shared memory"
    names = []
    while found.fallback is not None:
        names.append(found.fallback.name)
        if not found.parts:
            break
        found = found.parts[0]
    return ", ".join(names) or "native"


def _torch(world: Group, memory: Memory) -> Contender:
    if not dist.is_initialized():
        timeout = timedelta(seconds=world.timeout)
        store = runtime.store_for_torch()
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=timeout)
        runtime.with_the_world(dist.destroy_process_group, owned=False)
    profile = profile_for("gloo", torch.__version__)
    assert profile is not None
    table = CapabilitySet((profile,))

    def native(case: Case) -> bool:
        ops = PAIRED if case.op == "sendrecv" else (case.op,)
        reduce = case.reduce.name if OPERATIONS[case.op].reduces else None
        return all(table.native(Request(op, reduce, case.dtype)) for op in ops)

    spellings = torch_spellings(world.rank, world.size)
    in_place = (*IN_PLACE, "reduce")  # it has no other reduce
    return Contender(BASELINE, "torch.distributed, gloo", spellings, memory, native, in_place)


def _mpi4py(memory: Memory) -> Contender:
    from commlayer.backends.mpi import DATATYPES, MPI
    from commlayer.backends.mpi import OPERATIONS as MPI_OPERATIONS

    def native(case: Case) -> bool:
        return not OPERATIONS[case.op].reduces or (case.dtype in DATATYPES and case.reduce.name in MPI_OPERATIONS)

    return Contender("mpi4py", f"mpi4py, {MPI.get_vendor()[0]}", mpi4py_spellings(), memory, native)
