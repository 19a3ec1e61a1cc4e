"""How a fallback is declared.

A fallback is a function ``(g, op, args) -> Work`` that does one flat operation by calling others on ``g``
(see ``backends.base.Collectives``) and computing locally. What it needs is data, so that the planner can
weigh it without running it. Whatever a fallback does must follow from what every rank knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from commlayer.backends.base import Collectives
from commlayer.capability import Request
from commlayer.work import Work

Lowering = Callable[..., Work]


class Use(NamedTuple):
    """A request that a fallback makes ``times`` over, each on ``scale`` of the bytes it was asked for."""

    request: Request
    times: float = 1.0
    scale: float = 1.0


# (request, ranks) -> what it needs, or None where the fallback does not apply.
Needs = Callable[[Request, int], Sequence[Use] | None]


@dataclass(frozen=True)
class Fallback:
    name: str
    ops: frozenset[str]
    needs: Needs
    passes: float  # how often the request's bytes are read or written locally
    run: Callable[[Collectives, str, tuple[Any, ...]], Work]
    summary: str
    reinterprets: bool = False  # only reads the same bits as another dtype: costs nothing, counts as native


FALLBACKS: list[Fallback] = []


def fallback(
    *ops: str, needs: Needs | Sequence[str], passes: float = 0.0, reinterprets: bool = False
) -> Callable[[Lowering], Lowering]:
    """Declare a lowering of ``ops``.

    ``needs`` is a function, or names of operations on the same dtype, each used once on all bytes; a
    reducing one inherits the reduce op. A lowering of one op is called as ``run(g, *args)``, one of
    several as ``run(g, op, args)``.
    """

    def declare(function: Lowering) -> Lowering:
        single = len(ops) == 1

        def run(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
            return function(g, *args) if single else function(g, op, args)

        FALLBACKS.append(
            Fallback(
                name=function.__name__,
                ops=frozenset(ops),
                needs=needs if callable(needs) else _named(tuple(needs)),
                passes=passes,
                run=run,
                summary=(function.__doc__ or "").split("\n")[0].rstrip("."),
                reinterprets=reinterprets,
            )
        )
        return function

    return declare


def _named(names: tuple[str, ...]) -> Needs:
    def needs(request: Request, size: int) -> Sequence[Use]:
        return [Use(same(request, name)) for name in names]

    return needs


def same(request: Request, op: str, layout: str = "even") -> Request:
    """``op`` on the same dtype, with the reduce op where it takes one."""
    reduces = op in ("all_reduce", "reduce", "reduce_scatter")
    return request.to(op, request.reduce if reduces else None, layout)
