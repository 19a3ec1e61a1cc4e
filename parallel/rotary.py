"""Rotary positions: queries and keys are turned by their place in the sequence (Su et al. 2021, arXiv:2104.09864).

Channel i is paired with i + D/2, as in Llama and GPT-NeoX. Scores then depend on how far apart two tokens are alone.

Legend of shape suffixes:
    T tokens of this rank, C = D/2 pairs of channels, D channels of a head, ... any others
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions_T: Tensor, channels: int, *, like: Tensor, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles position · theta^(-2i/channels), each T × C, for :func:`rotate`.

    Computed in float64 on the CPU (far positions would lose digits), then float32, or float64 if ``like`` is, on its
    device. ``positions_T``: where in the whole sequence this rank's tokens are. Raises ValueError for odd ``channels``.
    """
    if channels < 2 or channels % 2:
        raise ValueError(f"channels: rotary positions turn pairs, so a head needs an even number, got {channels}")
    frequency_C = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64, device="cpu") / channels)
    angle_TC = positions_T.cpu().unsqueeze(1) * frequency_C
    wide = torch.promote_types(like.dtype, torch.float32)
    return angle_TC.cos().to(like.device, wide), angle_TC.sin().to(like.device, wide)


def rotate(x: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """``x``, ... × T × D, turned, in its own dtype. Raises ValueError for tables that do not fit it."""
    if cos_TC.shape != sin_TC.shape or x.ndim < 2 or (*x.shape[-2:-1], x.shape[-1] / 2) != tuple(cos_TC.shape):
        raise ValueError(
            f"rotary: tables of shapes {tuple(cos_TC.shape)} and {tuple(sin_TC.shape)} do not fit {tuple(x.shape)}: "
            "tokens × half of the channels of a head"
        )
    first, second = x.chunk(2, -1)
    turned = torch.cat([first * cos_TC - second * sin_TC, second * cos_TC + first * sin_TC], -1)
    return turned.to(x.dtype)
