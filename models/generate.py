"""Samples from a language model, on one process or on all ranks of its mesh.

Legend of shape suffixes:
    B batch, T tokens so far, V entries of the vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

import commlayer
from models.moe import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    ids_BT: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``ids_BT`` continued by ``length`` tokens. Collective: all ranks pass the same and get the same.

    Every token takes a forward pass over all that are before it (there is no cache of keys and values): for a look at
    what a model has learnt, not for serving. All ranks draw, and what rank 0 drew counts.

    Args:
        temperature: divides the logits; 0: always the most probable token.
        top_k: draw from the so many most probable tokens alone.
        generator: on the device of the model; by default torch's.

    Raises:
        ValueError: for an empty prompt, and for numbers out of range.
    """
    if ids_BT.ndim != 2 or not ids_BT.numel():
        raise ValueError(f"ids: expected batch × tokens, at least one of each, got shape {tuple(ids_BT.shape)}")
    if length < 0:
        raise ValueError(f"length: expected 0 or more tokens, got {length}")
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    vocabulary = model.config.vocab_size
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k: expected 1 to the {vocabulary} entries of the vocabulary, got {top_k}")
    for _ in range(length):
        logits_BV = model(ids_BT)[:, -1].float()
        chosen_B1 = _draw(logits_BV, temperature, top_k, generator).to(ids_BT.dtype)
        if model.mesh is not None:
            chosen_B1 = commlayer.broadcast(chosen_B1, group=model.mesh["-".join(model.mesh.axes)])
        ids_BT = torch.cat([ids_BT, chosen_B1], 1)
    return ids_BT


def _draw(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if not temperature:
        return logits_BV.argmax(1, keepdim=True)
    best = logits_BV.topk(logits_BV.shape[1] if top_k is None else top_k)
    probabilities = ((best.values - best.values[:, :1]) / temperature).softmax(1)  # also where that is tiny
    return best.indices.gather(1, probabilities.multinomial(1, generator=generator))
