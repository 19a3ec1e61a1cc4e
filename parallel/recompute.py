"""Activation checkpointing for parallel modules: what a forward pass computed is computed again, not kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from parallel import operators
from parallel.notes import Notes
from parallel.rng import Replay, Streams

KEEP = ("nothing", "products")

# Matrix products and attention, as far as torch does them; ours are kept by parallel.notes.
PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,  # Intel GPUs
]


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    streams: Streams | None = None,
    keep: str = "nothing",
    **kwargs: Any,
) -> Any:
    """``function(*args, **kwargs)``, whose activations are computed again in backward instead of being kept.

    Activation checkpointing (Chen et al. 2016, arXiv:1604.06174) by torch's, without re-entrance. The recomputation
    draws the same numbers, from torch's default generators and from ``streams``, which stand where they stood after
    it, and sends tokens to the same experts. With ``keep="nothing"`` it communicates again; ``"products"`` keeps the
    results of matrix products, attention and communication, so that only what is cheap is done again (selective
    recomputation: Korthikanti et al. 2022, arXiv:2205.05198).

    Around compiled modules, and inside of ``torch.compile``. There masks and what was communicated is kept: a graph
    cannot draw again what its forward has drawn, and collectives stay in the order that they have on all ranks.
    """
    if keep not in KEEP:
        raise ValueError(f"keep: expected one of {', '.join(KEEP)}, got {keep!r}")
    if torch.compiler.is_compiling():
        ops = [torch.ops.commlayer.keep_mask.default, *operators.MADE, *(PRODUCTS if keep == "products" else ())]
        contexts = partial(create_selective_checkpoint_contexts, ops)
    else:
        contexts = partial(_contexts, streams, keep == "products")
    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(streams: Streams | None, products: bool) -> tuple[Any, Any]:
    """What to enter in the forward, and in every recomputation."""
    notes = Notes(products)
    torch_forward, torch_again = create_selective_checkpoint_contexts(PRODUCTS) if products else (nullcontext(),) * 2
    again = nullcontext() if streams is None else Replay(streams)
    # Streams are set back outside of torch's mode, which takes every operation for one of the function's.
    return _Together(notes.writing, torch_forward), _Together(again, notes.reading, torch_again)


class _Together:
    """Several contexts as one, which can be entered again where they can."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context)
            self.stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)
