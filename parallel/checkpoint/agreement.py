"""Ranks that stay together: what one of them cannot do is the same error on all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import commlayer
from commlayer import Group

Result = TypeVar("Result")


def ranks_of(group: Group | None) -> Group:
    """``group``, by default the world; this process alone where commlayer is not initialised."""
    if group is not None:
        return group
    return commlayer.world() if commlayer.is_initialized() else _alone()


def agreed(work: Callable[[], Result], group: Group) -> Result:
    """``work()``, collective: a ValueError on one rank is raised on all of them, and says on which it was."""
    problem: ValueError | None = None
    try:
        result = work()
    except ValueError as error:
        problem = error
    texts = commlayer.all_gather_object(None if problem is None else str(problem), group=group)
    if any(text is not None for text in texts):
        raise ValueError(_together(texts)) from problem
    return result


def _together(texts: list[str | None]) -> str:
    if len(set(texts)) == 1:
        return str(texts[0])
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None)


@cache
def _alone() -> Group:
    return Group.alone()
