"""What torch.compile must run as it is."""

from __future__ import annotations

import inspect
from typing import TypeVar

from torch._C._dynamo import eval_frame

T = TypeVar("T", bound=type)


def untraced(kind: T) -> T:
    """A class none of whose methods is traced, nor what they call.

    Where torch's C++ calls a method of a process group inside of a compiled region, dynamo would trace it, and fails.
    ``torch.compiler.disable`` does the same, at the cost of importing dynamo in every program, over a second.
    """
    skip = eval_frame._FrameAction.SKIP
    strategy = eval_frame._FrameExecStrategy(skip, skip)  # for its own frame, and for those inside
    for _, method in inspect.getmembers(kind, inspect.isfunction):
        if method.__module__.startswith("commlayer."):
            eval_frame.set_code_exec_strategy(method.__code__, strategy)
    return kind
