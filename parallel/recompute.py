"""Activation checkpointing for parallel modules: what a forward pass computed is computed again, not kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from parallel import operators
from parallel.rng import Replay, Streams


def checkpoint(function: Callable[..., Any], *args: Any, streams: Streams | None = None, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, whose activations are computed again in backward instead of being kept.

    Activation checkpointing (Chen et al. 2016, arXiv:1604.06174) by torch's, without re-entrance. The recomputation
    communicates again, and draws the same numbers, from torch's default generators and from ``streams``, which stand
    where they stood after it.

    Around compiled modules, and inside of ``torch.compile``. There masks and what was communicated is kept: a graph
    cannot draw again what its forward has drawn, and collectives stay in the order that they have on all ranks.
    """
    if torch.compiler.is_compiling():
        kept = [torch.ops.commlayer.keep_mask.default, *operators.MADE]
        contexts = partial(create_selective_checkpoint_contexts, kept)
    elif streams is not None:
        contexts = partial(_contexts, streams)
    else:
        return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)
    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(streams: Streams) -> tuple[Any, Any]:
    return nullcontext(), Replay(streams)
