"""The ERA5 layout of the NERSC tutorial "Deep Learning at Scale" (after FourCastNet, Pathak et al. 2022)::

root/train/2010.h5 …      data set `fields`: time × channel × lat × lon, one file a year, 6-hourly
root/valid/2016.h5 …      the same
root/stats/global_means.npy, global_stds.npy      1 × channel × 1 × 1
root/stats/time_means.npy                         1 × channel × lat × lon (optional: the climatology)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.data.fields import FieldPairs, Window, dataset, open_hdf5, whole_windows

AXES = "time × channel × lat × lon"


class ERA5Source:
    """A folder of HDF5 files, read one state at a time; each file is a trajectory.

    Args:
        folder: holds one ``*.h5`` per year.
        channels: indices into the channel axis, in the order wanted; None for all.
        names, units: of all the channels in the files; by default ``channel 0`` … and no unit.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        channels: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        units: Sequence[str] | None = None,
        variable: str = "fields",
    ) -> None:
        self.folder, self.variable = Path(folder), variable
        self.files = sorted(self.folder.glob("*.h5"))
        if not self.files:
            raise FileNotFoundError(f"{self.folder}: no *.h5 files; expected one per year with data set '{variable}'")
        shapes = []
        for path in self.files:
            with open_hdf5(path) as file:
                shapes.append(dataset(file, path, variable, AXES).shape)
            if shapes[-1][1:] != shapes[0][1:]:
                raise ValueError(
                    f"{path}: data set '{variable}' has {shapes[-1][1:]} channel × lat × lon; "
                    f"{self.files[0].name} has {shapes[0][1:]}"
                )
        self.lengths = [shape[0] for shape in shapes]
        self.stored, rows, columns = shapes[0][1:]
        self.index = _chosen(channels, self.stored, self.files[0])
        for what, given in (("names", names), ("units", units)):
            if given is not None and len(given) != self.stored:
                raise ValueError(f"{what}: got {len(given)}, but {self.files[0]} has {self.stored} channels")
        self.channels = tuple(names[i] if names else f"channel {i}" for i in self.index)
        self.units = tuple(units[i] if units else "" for i in self.index)
        # The files carry no coordinates. They are global, from the north pole southwards and from Greenwich
        # eastwards, without the row of the south pole (721 → 720 → 360 rows), as FourCastNet has it.
        self.latitudes = 90 - np.arange(rows) * 180 / rows
        self.longitudes = np.arange(columns) * 360 / columns
        self._open: dict[Path, Any] = {}
        self._owner = os.getpid()

    def read(self, trajectory: int, step: int) -> np.ndarray:
        if self._owner != os.getpid():  # HDF5 handles do not survive the fork into a loader's worker
            self._open, self._owner = {}, os.getpid()
        path = self.files[trajectory]
        if path not in self._open:
            self._open[path] = open_hdf5(path)
        ascending = sorted(self.index)  # all that HDF5 can select; put in order afterwards
        state = self._open[path][self.variable][step, ascending]
        return state[[ascending.index(i) for i in self.index]].astype(np.float32, copy=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def era5_pairs(
    root: str | Path,
    *,
    train: str = "train",
    validation: str = "valid",
    channels: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
    history: int = 1,
    lead: int = 1,
) -> tuple[FieldPairs, FieldPairs]:
    """Training and validation pairs from two sub-folders of ``root``; windows lie within one file.

    ``lead`` is in steps of the files: 1 is 6 h ahead in 6-hourly data.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root} is not a folder; expected {train}/, {validation}/ and stats/ in it")
    parts = []
    for folder in (train, validation):
        source = ERA5Source(root / folder, channels=channels, names=names, units=units)
        windows = [
            Window(trajectory, now)
            for trajectory, length in enumerate(source.lengths)
            for now in whole_windows(0, length, history, lead)
        ]
        if not windows:
            raise ValueError(f"{root / folder}: no file has {history} + {lead} steps or more")
        scalar = (1, source.stored, 1, 1)
        mean = _statistic(root / "stats" / "global_means.npy", scalar)[source.index]
        std = _statistic(root / "stats" / "global_stds.npy", scalar)[source.index]
        if not (std > 0).all():
            raise ValueError(f"{root / 'stats' / 'global_stds.npy'}: expected positive numbers only")
        climatology = None
        if (path := root / "stats" / "time_means.npy").exists():
            climatology = _statistic(path, (1, source.stored, *map(len, (source.latitudes, source.longitudes))))
            climatology = climatology[source.index]
        parts.append(FieldPairs(source, windows, mean, std, climatology=climatology, history=history, lead=lead))
    if parts[0].grid != parts[1].grid:
        raise ValueError(f"{root}: {train} has a grid of {parts[0].grid}, {validation} one of {parts[1].grid}")
    return parts[0], parts[1]


def _statistic(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        values = np.load(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected an array of shape {shape}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a NumPy array ({error})") from None
    if values.shape != shape or not np.isfinite(values).all():
        raise ValueError(f"{path}: expected finite numbers of shape {shape}, got shape {values.shape}")
    return values[0]


def _chosen(channels: Sequence[int] | None, stored: int, path: Path) -> list[int]:
    index = list(range(stored)) if channels is None else [int(channel) for channel in channels]
    if not index or len(set(index)) != len(index) or not all(0 <= i < stored for i in index):
        raise ValueError(f"channels: expected distinct indices 0 … {stored - 1} into {path}, got {index}")
    return index
