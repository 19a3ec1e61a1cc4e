"""Made-up fields for benchmarks and tests: waves that run around a globe, at any size, without a file.

Each channel is a sum of plane waves of different wavelength and speed, so it is smooth, changes steadily, and the
next state follows from the present one: there is something to learn, and persistence can be beaten. A state is a
closed formula of its time, so that any rank and any worker makes any state by itself.

Legend of shape suffixes: C channels, K waves, H latitudes, W longitudes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.data.fields import FieldPairs, Window, whole_windows


class WaveSource:
    """Two trajectories of the same waves, which start apart: one to train on, one to validate on.

    Each wave has its own speed, and each channel its own amplitudes and phases, its own mean and spread.
    """

    def __init__(self, channels: int, grid: Sequence[int], waves: int, seed: int) -> None:
        for name, value in (("channels", channels), ("waves", waves), ("grid", min(grid))):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value if name != 'grid' else list(grid)}")
        rows, columns = grid
        self.channels = tuple(f"wave {i}" for i in range(channels))
        self.units = ("",) * channels
        self.latitudes = 90 - np.arange(rows) * 180 / rows  # as in models.data.era5
        self.longitudes = np.arange(columns) * 360 / columns
        draw = np.random.default_rng(seed)
        around_K = 1 + np.arange(waves) % 8  # whole wavelengths around the globe
        across_K = draw.integers(-4, 5, waves)
        self.speed_K = 2 * np.pi * draw.uniform(0.02, 0.06, waves)  # radians per step: 17 to 50 steps a period
        self.amplitude_CK = draw.uniform(0.5, 1, (channels, waves))
        self.amplitude_CK *= np.sqrt(2 / np.square(self.amplitude_CK).sum(1, keepdims=True))  # variance 1
        self.phase_CK = draw.uniform(0, 2 * np.pi, (channels, waves))
        self.start_K = draw.uniform(0, 2 * np.pi, (2, waves))
        self.mean_C, self.std_C = draw.uniform(-50, 50, channels), draw.uniform(1, 10, channels)
        # cos(a + b) of a latitude and a longitude is a product of two thin matrices.
        north_HK = np.deg2rad(self.latitudes)[:, None] * 2 * across_K
        east_KW = around_K[:, None] * np.deg2rad(self.longitudes)
        self.north_HK = np.exp(1j * north_HK).astype(np.complex64)
        self.east_KW = np.concatenate([np.cos(east_KW), -np.sin(east_KW)]).astype(np.float32)

    def read(self, trajectory: int, step: int) -> np.ndarray:
        angle_CK = self.phase_CK + self.start_K[trajectory] - self.speed_K * step
        weight_CK = (self.amplitude_CK * self.std_C[:, None] * np.exp(1j * angle_CK)).astype(np.complex64)
        north_CHK = weight_CK[:, None] * self.north_HK
        parts = np.concatenate([north_CHK.real, north_CHK.imag], axis=2) @ self.east_KW
        return parts + self.mean_C[:, None, None].astype(np.float32)


def synthetic_pairs(
    *,
    channels: int = 4,
    grid: Sequence[int] = (32, 64),
    samples: int = 512,
    validation_samples: int = 64,
    waves: int = 12,
    seed: int = 0,
    history: int = 1,
    lead: int = 1,
) -> tuple[FieldPairs, FieldPairs]:
    """Training and validation pairs of the numbers asked for; the same seed gives the same fields everywhere."""
    source = WaveSource(channels, grid, waves, seed)
    parts = []
    for trajectory, (name, count) in enumerate((("samples", samples), ("validation_samples", validation_samples))):
        if count < 1:
            raise ValueError(f"{name}: must be at least 1, got {count}")
        steps = whole_windows(0, count + history * lead, history, lead)
        windows = [Window(trajectory, now) for now in steps]
        mean, std = source.mean_C[:, None, None], source.std_C[:, None, None]
        parts.append(FieldPairs(source, windows, mean, std, climatology=mean, history=history, lead=lead))
    return parts[0], parts[1]
