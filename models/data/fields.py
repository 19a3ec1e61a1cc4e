"""Gridded fields for forecasting: pairs (the last states → the next one), normalised, split in time.

Two sources behind one data set: netCDF-4 files of one variable (by default the North American air
temperatures of two climate scenarios that ship with ``iris-sample-data``), and the ERA5 layout of the NERSC
tutorial.

Legend of shape suffixes: C channels, H latitudes, W longitudes, X = history · C input channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset


class Source(Protocol):
    """Raw states in physical units, as trajectories: runs of states at a constant time step."""

    channels: tuple[str, ...]
    units: tuple[str, ...]
    latitudes: np.ndarray
    longitudes: np.ndarray

    def read(self, trajectory: int, step: int) -> np.ndarray:
        """One state, float32 C × H × W."""


class Window(NamedTuple):
    """One sample: forecast ``trajectory`` from step ``now``; ``year`` is that of the target, for captions."""

    trajectory: int
    now: int
    year: float | None = None


class FieldPairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """(x_XHW, y_CHW): the states at now, now - lead, … and the state at now + lead, normalised float32.

    The newest state comes first, so ``x[:C]`` is the persistence forecast whatever the history.

    Args:
        source: where states are read.
        windows: the samples.
        mean, std: what normalises a state; any shape that broadcasts to C × H × W.
        climatology: the mean training state in physical units, C × H × W, where it is known.
        history: number of states in x.  lead: forecast distance in steps.
    """

    def __init__(
        self,
        source: Source,
        windows: Sequence[Window],
        mean: np.ndarray,
        std: np.ndarray,
        *,
        climatology: np.ndarray | None = None,
        history: int = 1,
        lead: int = 1,
    ) -> None:
        self.source, self.windows, self.history, self.lead = source, list(windows), history, lead
        self.channels, self.units = source.channels, source.units
        self.latitudes, self.longitudes = source.latitudes, source.longitudes
        self.mean = torch.as_tensor(mean, dtype=torch.float32)
        self.std = torch.as_tensor(std, dtype=torch.float32)
        self.climatology = None if climatology is None else torch.as_tensor(climatology, dtype=torch.float32)

    @property
    def grid(self) -> tuple[int, int]:
        return len(self.latitudes), len(self.longitudes)

    @property
    def in_channels(self) -> int:
        return self.history * len(self.channels)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        trajectory, now, _ = self.windows[index]
        steps = [now - back * self.lead for back in range(self.history)]
        x_XHW = torch.cat([self._state(trajectory, step) for step in steps])
        return x_XHW, self._state(trajectory, now + self.lead)

    def _state(self, trajectory: int, step: int) -> torch.Tensor:
        return (torch.from_numpy(self.source.read(trajectory, step)) - self.mean) / self.std

    def denormalise(self, state: torch.Tensor) -> torch.Tensor:
        """Back to physical units: … × C × H × W."""
        return state * self.std.to(state.device) + self.mean.to(state.device)

    def collate(self, samples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch, possibly of no samples: a rank without work still has to take part in the step."""
        if not samples:
            return torch.empty(0, self.in_channels, *self.grid), torch.empty(0, len(self.channels), *self.grid)
        xs, ys = zip(*samples, strict=True)
        return torch.stack(xs), torch.stack(ys)


def whole_windows(start: int, stop: int, history: int, lead: int) -> range:
    """The steps ``now`` whose inputs and target all lie in start … stop - 1: no sample straddles a split."""
    if history < 1 or lead < 1:
        raise ValueError(f"history and lead must be at least 1, got history {history}, lead {lead}")
    return range(start + (history - 1) * lead, max(stop - lead, 0))


# netCDF-4 -----------------------------------------------------------------------------------------------


class NetCDFSource:
    """One variable time × lat × lon per netCDF-4 file, held in memory; each file is a trajectory."""

    def __init__(self, files: Sequence[str | Path], variable: str) -> None:
        if not files:
            raise ValueError("files: expected at least one netCDF file")
        loaded = [_read_netcdf(Path(file), variable) for file in files]
        first = loaded[0]
        for file, other in zip(files, loaded, strict=True):
            same = np.array_equal(other.latitudes, first.latitudes)
            if not same or not np.array_equal(other.longitudes, first.longitudes) or other.units != first.units:
                raise ValueError(f"{file}: grid or units of '{variable}' differ from those of {files[0]}")
        self.channels: tuple[str, ...] = (variable,)
        self.units: tuple[str, ...] = (first.units,)
        self.latitudes, self.longitudes = first.latitudes, first.longitudes
        self.years = [entry.years for entry in loaded]
        self.states = [entry.states for entry in loaded]

    def read(self, trajectory: int, step: int) -> np.ndarray:
        return self.states[trajectory][step][None]

    def shared_steps(self, trajectory: int) -> int:
        """How many first states an earlier file holds too: scenarios often branch off one common history."""
        longest = 0
        for earlier in range(trajectory):
            n = min(len(self.years[earlier]), len(self.years[trajectory]))
            equal = self.years[earlier][:n] == self.years[trajectory][:n]
            equal &= (self.states[earlier][:n] == self.states[trajectory][:n]).all((1, 2))
            longest = max(longest, n if equal.all() else int(equal.argmin()))
        return longest


def netcdf_pairs(
    files: Sequence[str | Path] | None = None,
    variable: str = "air_temperature",
    *,
    split: float = 2060.0,
    history: int = 1,
    lead: int = 1,
) -> tuple[FieldPairs, FieldPairs]:
    """Training pairs before the year ``split``, validation pairs from then on, in every file alike.

    Windows lie wholly on one side and in one file. What several files share (E1 and A1B are one run until
    1999) counts once. States are normalised by the mean map and the standard deviation of the anomalies
    around it, both from the training part alone. The default files are yearly means 1860–2099 on 37 × 49
    points, in K.
    """
    source = NetCDFSource(files or _iris_files(), variable)
    parts: tuple[list[Window], list[Window]] = ([], [])
    training_states = []
    for trajectory, years in enumerate(source.years):
        cut, shared = int(np.searchsorted(years, split)), source.shared_steps(trajectory)
        training_states.append(source.states[trajectory][min(shared, cut) : cut])
        for part, (start, stop) in zip(parts, ((0, cut), (cut, len(years))), strict=True):
            for now in whole_windows(start, stop, history, lead):
                if now + lead >= shared:
                    part.append(Window(trajectory, now, float(years[now + lead])))
    for part, what in zip(parts, ("before", "after"), strict=True):
        if not part:
            span = f"{min(y[0] for y in source.years):.0f} … {max(y[-1] for y in source.years):.0f}"
            raise ValueError(f"split: no window of {history} + {lead} steps {what} {split:g}; data cover {span}")
    states = np.concatenate(training_states).astype(np.float64)
    mean = states.mean(0, keepdims=True)
    std = (states - mean).std().reshape(1, 1, 1)
    train, validation = (
        FieldPairs(source, part, mean, std, climatology=mean, history=history, lead=lead) for part in parts
    )
    return train, validation


class _NetCDF(NamedTuple):
    states: np.ndarray
    years: np.ndarray
    latitudes: np.ndarray
    longitudes: np.ndarray
    units: str


def _read_netcdf(path: Path, variable: str) -> _NetCDF:
    with open_hdf5(path) as file:
        data = dataset(file, path, variable, "time × lat × lon")
        try:
            time, latitude, longitude = (data.dims[axis][0] for axis in range(3))
        except (IndexError, RuntimeError):
            raise ValueError(f"{path}: '{variable}' has no coordinates for time, lat and lon attached") from None
        states = data[...].astype(np.float32) * np.float32(data.attrs.get("scale_factor", 1))
        states += np.float32(data.attrs.get("add_offset", 0))
        fill = data.attrs.get("_FillValue")
        if not np.isfinite(states).all() or (fill is not None and (data[...] == fill).any()):
            raise ValueError(f"{path}: '{variable}' has missing values; expected complete fields")
        years = decimal_years(time[...], _text(time, "units"), _text(time, "calendar"), path)
        steps = np.diff(years)
        if len(steps) and (steps.min() <= 0 or steps.max() > 1.5 * np.median(steps)):
            raise ValueError(f"{path}: 'time' must grow in even steps; it goes back or has gaps")
        return _NetCDF(states, years, latitude[...], longitude[...], _text(data, "units"))


def decimal_years(values: np.ndarray, units: str, calendar: str, path: Path) -> np.ndarray:
    """CF time (``hours since 1970-01-01``) as years: to a day or so, enough for splits and captions."""
    unit, _, since = units.partition(" since ")
    per_day = {"day": 1, "hour": 24, "minute": 1440, "second": 86400}.get(unit.rstrip("s"))
    try:
        year, month, day = (int(part) for part in since.split()[0].split("-"))
    except (ValueError, IndexError):
        per_day = None
    if per_day is None:
        raise ValueError(f"{path}: 'time' has units '{units}'; expected e.g. 'hours since 1970-01-01'")
    days_per_year = {"360_day": 360.0, "365_day": 365.0, "noleap": 365.0}.get(calendar, 365.2425)
    return year + (month - 1) / 12 + (day - 1) / days_per_year + np.asarray(values) / per_day / days_per_year


def _iris_files() -> list[Path]:
    try:
        import iris_sample_data
    except ImportError:
        raise ImportError("the sample fields need iris-sample-data: pip install commlayer[train]") from None
    return [Path(iris_sample_data.path) / f"{scenario}_north_america.nc" for scenario in ("E1", "A1B")]


# Shared with era5.py ------------------------------------------------------------------------------------


def open_hdf5(path: Path) -> Any:  # h5py.File, of a module that is imported only when needed
    """Open for reading; an error names the file and what is wrong with it."""
    h5py = _h5py()
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: not an HDF5 or netCDF-4 file ({error})") from None


def dataset(file: Any, path: Path, name: str, axes: str) -> Any:  # h5py.Dataset
    """The data set ``name`` of an open file, checked to have the axes given as ``time × lat × lon``."""
    data = file.get(name)
    if not hasattr(data, "shape"):
        raise ValueError(f"{path}: no data set '{name}' ({axes}); it has {', '.join(sorted(file)) or 'none'}")
    if len(data.shape) != axes.count("×") + 1 or 0 in data.shape:
        raise ValueError(f"{path}: data set '{name}' has shape {data.shape}; expected {axes}")
    if data.dtype.kind not in "fiu":
        raise ValueError(f"{path}: data set '{name}' has dtype {data.dtype}; expected numbers")
    return data


def _h5py() -> ModuleType:
    try:
        import h5py
    except ImportError:
        raise ImportError("reading fields needs h5py: pip install commlayer[train]") from None
    return h5py


def _text(data: Any, attribute: str) -> str:
    value = data.attrs.get(attribute, "")
    return value.decode() if isinstance(value, bytes) else str(value)
