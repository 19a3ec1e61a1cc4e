"""The programs by name. A topic is a module of this package, its programs are the functions marked ``@program``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

TOPICS = (
    "reductions",
    "movements",
    "asynchronous",
    "messages",
    "objects",
    "groups",
    "functional",
    "ddp",
    "ddp_hooks",
    "fsdp",
    "dtensor",
    "tensor_parallel",
    "checkpoint",
    "pipeline",
    "compiled",
)

WAITS = "waits for ever"  # the refusal of a program that deadlocks

Results = dict[str, Any]  # of tensors, numbers and strings: what a program computed on this rank


@dataclass(frozen=True)
class Program:
    """What to run, and how its results on another backend are to be judged.

    ``alone`` computes the same without communication. Where torch's own backend refuses the program with an error that
    matches ``refused``, that is the only judge. ``moves``: nothing is rounded on the way, whatever the plan, so the
    bits must agree. ``sums_in``: the coarsest dtype that sums go through, where it is not that of the results.
    """

    name: str
    run: Callable[[], Results]
    alone: Callable[[], Results] | None = None
    refused: str | None = None
    moves: bool = False
    sums_in: torch.dtype | None = None


_PROGRAMS: dict[str, Program] = {}


def program(
    alone: Callable[..., Results] | None = None,
    *,
    cases: Sequence[tuple[Any, ...]] | None = None,
    refused: str | None = None,
    moves: bool = False,
    sums_in: torch.dtype | None = None,
) -> Callable[[Callable[..., Results]], Callable[..., Results]]:
    """Mark a function as a program, or as one for each of ``cases``, the arguments that it and ``alone`` then get."""

    def mark(function: Callable[..., Results]) -> Callable[..., Results]:
        topic = function.__module__.rpartition(".")[2]
        for case in cases or [()]:
            name = f"{topic}.{function.__name__}" + (f"[{'-'.join(map(str, case))}]" if case else "")
            assert name not in _PROGRAMS, name
            judge = None if alone is None else _with(alone, case)
            _PROGRAMS[name] = Program(name, _with(function, case), judge, refused, moves, sums_in)
        return function

    return mark


def _with(function: Callable[..., Results], case: tuple[Any, ...]) -> Callable[[], Results]:
    return lambda: function(*case)


def programs(only: str = "") -> Iterator[Program]:
    """Those whose name contains ``only``, or any of its parts between commas, topic by topic.

    Those that may be refused come last: the group is begun anew after a failure, and DTensor keeps what it knows of the
    meshes before.
    """
    for topic in TOPICS:
        importlib.import_module(f"{__package__}.{topic}")
    for found in sorted(_PROGRAMS.values(), key=lambda found: found.refused is not None):
        if any(part in found.name for part in only.split(",")):
            yield found
