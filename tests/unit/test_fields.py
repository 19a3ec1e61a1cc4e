"""Fields: the shipped scenarios, the ERA5 layout, files that are wrong, and how ranks share samples."""

import pickle
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from models.data.era5 import era5_pairs
from models.data.fields import decimal_years, netcdf_pairs, whole_windows
from models.data.sampling import ShardedBatches
from models.data.synthetic import synthetic_pairs

h5py = pytest.importorskip("h5py")


# North American temperatures --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenarios():
    pytest.importorskip("iris_sample_data")
    return netcdf_pairs(split=2060, history=3, lead=2)


def test_what_the_shipped_files_hold(scenarios):
    train, validation = scenarios
    for data in scenarios:
        assert data.channels == ("air_temperature",)
        assert data.units == ("K",)
        assert data.grid == (37, 49)
        assert data.latitudes[[0, -1]].tolist() == [15, 60]
        assert data.longitudes[[0, -1]].tolist() == [225, 315]
    x, y = train[0]
    assert x.shape == (3, 37, 49)
    assert y.shape == (1, 37, 49)
    assert x.dtype == y.dtype == torch.float32
    kelvin = validation.denormalise(validation[0][1])
    assert 240 < kelvin.min() < kelvin.max() < 310


def test_samples_are_the_states_they_claim_to_be(scenarios):
    train, _ = scenarios
    for index in (0, 57, len(train) - 1):
        trajectory, now, year = train.windows[index]
        x, y = train[index]
        for position, step in enumerate((now, now - 2, now - 4)):
            raw = torch.from_numpy(train.source.read(trajectory, step))
            torch.testing.assert_close(train.denormalise(x[position : position + 1]), raw, rtol=1e-5, atol=1e-3)
        raw = torch.from_numpy(train.source.read(trajectory, now + 2))
        torch.testing.assert_close(train.denormalise(y), raw, rtol=1e-5, atol=1e-3)
        assert train.source.years[trajectory][now + 2] == year


def test_nothing_of_validation_is_seen_in_training(scenarios):
    train, validation = scenarios

    def years(data):
        for trajectory, now, _ in data.windows:
            for step in (now - 4, now - 2, now, now + 2):
                yield float(data.source.years[trajectory][step])

    assert max(years(train)) < 2060 <= min(years(validation))
    for data in scenarios:
        assert {window.trajectory for window in data.windows} == {0, 1}


def test_the_history_that_scenarios_share_counts_once(scenarios):
    train, _ = scenarios
    assert train.source.shared_steps(0) == 0
    assert train.source.shared_steps(1) == 140  # one model run until 1999
    targets = [train[i][1].numpy().tobytes() for i in range(len(train))]
    assert len(set(targets)) == len(targets)


def test_statistics_come_from_training_years_alone(scenarios):
    train, _ = scenarios
    source = train.source
    states = [source.states[0][t] for t in range(240) if source.years[0][t] < 2060]
    states += [source.states[1][t] for t in range(140, 240) if source.years[1][t] < 2060]
    states = np.stack(states).astype(np.float64)
    for data in scenarios:
        np.testing.assert_allclose(data.mean[0], states.mean(0), rtol=1e-5)
        np.testing.assert_allclose(data.std.item(), (states - states.mean(0)).std(), rtol=1e-5)
        np.testing.assert_allclose(data.climatology[0], states.mean(0), rtol=1e-5)


def test_a_split_without_data_on_one_side():
    with pytest.raises(ValueError, match="no window of 12 \\+ 1 steps after 2095; data cover 1860 … 2099"):
        netcdf_pairs(split=2095, history=12)
    with pytest.raises(ValueError, match="before 1800"):
        netcdf_pairs(split=1800)


# netCDF files ------------------------------------------------------------------------------------------------


def write_netcdf(path, steps=10, name="t2m", units="days since 2000-01-01", coordinates=True, spoil=None):
    states = np.random.default_rng(steps).normal(280, 5, (steps, 4, 6)).astype(np.float32)
    with h5py.File(path, "w") as file:
        data = file.create_dataset(name, data=states)
        data.attrs["units"] = "K"
        axes = {"time": np.arange(steps) * 365.0, "lat": np.linspace(50, 20, 4), "lon": np.arange(6.0)}
        for axis, (label, values) in enumerate(axes.items()):
            scale = file.create_dataset(label, data=values)
            scale.make_scale(label)
            if coordinates:
                data.dims[axis].attach_scale(scale)
        file["time"].attrs["units"] = units
        if spoil:
            spoil(file)
    return path


def test_other_netcdf_files(tmp_path):
    files = [write_netcdf(tmp_path / f"{steps}.nc", steps) for steps in (10, 12)]
    train, validation = netcdf_pairs(files, "t2m", split=2007.5)
    assert len(train) == 7 + 7
    assert len(validation) == 1 + 3
    assert train.grid == (4, 6)


def spoil_time(file):
    file["time"][5] = 0


def spoil_value(file):
    file["t2m"][3, 1, 1] = np.nan


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "tas"}, r"a\.nc: no data set 't2m' \(time × lat × lon\); it has lat, lon, tas, time"),
        ({"coordinates": False}, r"a\.nc: 't2m' has no coordinates"),
        ({"units": "fortnights since 2000-01-01"}, r"a\.nc: 'time' has units 'fortnights since"),
        ({"units": "days"}, r"a\.nc: 'time' has units 'days'; expected e\.g\."),
        ({"spoil": spoil_time}, r"a\.nc: 'time' must grow in even steps"),
        ({"spoil": spoil_value}, r"a\.nc: 't2m' has missing values"),
    ],
)
def test_bad_netcdf_files(tmp_path, settings, message):
    path = write_netcdf(tmp_path / "a.nc", **settings)
    with pytest.raises(ValueError, match=message):
        netcdf_pairs([path], "t2m", split=2005)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.nc: no such file"):
        netcdf_pairs([tmp_path / "gone.nc"])
    (tmp_path / "text.nc").write_text("no data")
    with pytest.raises(ValueError, match=r"text\.nc: not an HDF5 or netCDF-4 file"):
        netcdf_pairs([tmp_path / "text.nc"])


def test_decimal_years():
    def years(values, units, calendar):
        return decimal_years(np.array(values, dtype=float), units, calendar, None).tolist()

    assert years([0, 720 * 12], "hours since 1970-01-01 00:00:00", "360_day") == [1970, 1971]
    assert years([365], "days since 1999-07-01", "noleap") == [2000.5]


# The ERA5 layout --------------------------------------------------------------------------------------------

CHANNELS, ROWS, COLUMNS = 3, 4, 8


def era5_value(year, step, channel):
    return year + 10 * step + 1000 * channel


@pytest.fixture
def era5(tmp_path):
    """Every value tells its year, step and channel."""
    for folder, years in (("train", {2010: 5, 2011: 4}), ("valid", {2012: 6})):
        (tmp_path / folder).mkdir()
        for year, steps in years.items():
            with h5py.File(tmp_path / folder / f"{year}.h5", "w") as file:
                fields = np.zeros((steps, CHANNELS, ROWS, COLUMNS), np.float32)
                for step in range(steps):
                    for channel in range(CHANNELS):
                        fields[step, channel] = era5_value(year, step, channel)
                file["fields"] = fields
    (tmp_path / "stats").mkdir()
    np.save(tmp_path / "stats/global_means.npy", np.array([1.0, 2, 3], np.float32).reshape(1, 3, 1, 1))
    np.save(tmp_path / "stats/global_stds.npy", np.array([2.0, 4, 8], np.float32).reshape(1, 3, 1, 1))
    return tmp_path


def test_era5_layout(era5):
    train, validation = era5_pairs(era5, names=["u10", "v10", "t2m"], units=["m/s", "m/s", "K"])
    assert len(train) == 4 + 3
    assert len(validation) == 5
    assert train.channels == ("u10", "v10", "t2m")
    assert train.mean.flatten().tolist() == [1, 2, 3]
    np.testing.assert_allclose(train.latitudes, [90, 45, 0, -45])
    np.testing.assert_allclose(train.longitudes, np.arange(8) * 45)
    x, y = train[4]  # the first of 2011: windows do not reach into the next file
    for channel, (mean, std) in enumerate(((1, 2), (2, 4), (3, 8))):
        assert (x[channel] == (era5_value(2011, 0, channel) - mean) / std).all()
        assert (y[channel] == (era5_value(2011, 1, channel) - mean) / std).all()
    assert train.climatology is None


def test_era5_channels_lead_and_history(era5):
    train, _ = era5_pairs(era5, channels=[2, 0], names=["u10", "v10", "t2m"], lead=2, history=2)
    assert train.channels == ("t2m", "u10")
    assert len(train) == 1
    x, y = train[0]
    values = train.denormalise(x.view(2, 2, ROWS, COLUMNS))
    expected = [[era5_value(2010, step, channel) for channel in (2, 0)] for step in (2, 0)]
    torch.testing.assert_close(values[:, :, 0, 0], torch.tensor(expected, dtype=torch.float32))
    assert train.denormalise(y)[1, 0, 0] == era5_value(2010, 4, 0)


def test_era5_climatology(era5):
    means = np.random.default_rng(0).normal(size=(1, CHANNELS, ROWS, COLUMNS)).astype(np.float32)
    np.save(era5 / "stats/time_means.npy", means)
    train, _ = era5_pairs(era5, channels=[1])
    np.testing.assert_array_equal(train.climatology, means[0, [1]])


def test_era5_is_read_in_workers_and_pickles(era5):
    train, _ = era5_pairs(era5)
    first = train[0][0]  # leaves a file open
    (handle,) = train.source._open.values()
    train.source._owner -= 1  # as a forked worker finds it
    assert torch.equal(train[0][0], first)
    assert all(new is not handle for new in train.source._open.values()), "a handle of the parent process was used"
    assert torch.equal(pickle.loads(pickle.dumps(train))[0][0], first)
    loader = DataLoader(train, batch_size=2, num_workers=2, collate_fn=train.collate)
    assert torch.equal(torch.cat([x for x, _ in loader]), torch.stack([train[i][0] for i in range(len(train))]))


def remove(path):
    return lambda root: (root / path).unlink()


def rewrite(path, **datasets):
    def spoil(root):
        with h5py.File(root / path, "w") as file:
            for name, shape in datasets.items():
                file[name] = np.zeros(shape)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("valid/2012.h5"), r"valid: no \*\.h5 files; expected one per year with data set 'fields'"),
        (remove("stats/global_stds.npy"), r"global_stds\.npy: no such file; expected .* \(1, 3, 1, 1\)"),
        (
            lambda root: np.save(root / "stats/global_means.npy", np.zeros((1, 2, 1, 1))),
            r"global_means\.npy: expected .* shape \(1, 3, 1, 1\), got shape \(1, 2, 1, 1\)",
        ),
        (
            lambda root: np.save(root / "stats/global_stds.npy", np.zeros((1, 3, 1, 1))),
            r"global_stds\.npy: expected positive numbers",
        ),
        (
            rewrite("train/2011.h5", data=(2, 3, 4, 8)),
            r"2011\.h5: no data set 'fields' \(time × channel × lat × lon\); it has data",
        ),
        (
            rewrite("train/2011.h5", fields=(2, 4, 8)),
            r"2011\.h5: data set 'fields' has shape \(2, 4, 8\); expected time × channel × lat × lon",
        ),
        (
            rewrite("train/2011.h5", fields=(2, 3, 4, 9)),
            r"2011\.h5: .* \(3, 4, 9\).*2010\.h5 has \(3, 4, 8\)",
        ),
        (lambda root: (root / "train/2011.h5").write_text("x"), r"2011\.h5: not an HDF5"),
        (rewrite("valid/2012.h5", fields=(1, 3, 4, 8)), "valid: no file has 1 \\+ 1 steps"),
        (
            rewrite("valid/2012.h5", fields=(3, 3, 5, 8)),
            r"train has a grid of \(4, 8\), valid one of \(5, 8\)",
        ),
    ],
)
def test_bad_era5_folders(era5, spoil, message):
    spoil(era5)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        era5_pairs(era5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": [0, 3]}, "channels: expected distinct indices 0 … 2"),
        ({"channels": [1, 1]}, "channels: expected distinct indices"),
        ({"names": ["a"]}, "names: got 1, but .* has 3 channels"),
        ({"lead": 0}, "must be at least 1, got history 1, lead 0"),
    ],
)
def test_bad_era5_settings(era5, settings, message):
    with pytest.raises(ValueError, match=message):
        era5_pairs(era5, **settings)


def test_era5_without_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root: .*nowhere is not a folder; expected train/, valid/"):
        era5_pairs(tmp_path / "nowhere")


def test_whole_windows():
    assert list(whole_windows(0, 5, history=1, lead=1)) == [0, 1, 2, 3]
    assert list(whole_windows(10, 16, history=2, lead=2)) == [12, 13]
    assert list(whole_windows(0, 2, history=2, lead=3)) == []


# Made-up fields ---------------------------------------------------------------------------------------------


def test_made_up_fields_are_smooth_steady_and_as_normalised():
    train, validation = synthetic_pairs(channels=3, grid=(24, 48), samples=300, validation_samples=40)
    assert (len(train), len(validation)) == (300, 40)
    assert train.grid == (24, 48)
    assert train.channels == ("wave 0", "wave 1", "wave 2")
    for data in (train, validation):
        x, y = (torch.stack([data[i][part] for i in range(len(data))]) for part in (0, 1))
        assert x.dtype == torch.float32
        assert torch.equal(x[1:], y[:-1])
        assert x.mean().abs() < 0.1
        assert x.std(dim=(0, 2, 3)).tolist() == pytest.approx([1, 1, 1], rel=0.1)
        assert x.diff(dim=2).square().mean() < 1, "neighbours differ as much as any two points, by 2"
        eastwards = x.diff(dim=3).square().mean().item()
        assert eastwards < 0.5
        assert (x[..., 0] - x[..., -1]).square().mean().item() == pytest.approx(eastwards, rel=0.2), (
            "not around a globe"
        )
        assert 0.1 < (y - x).square().mean().sqrt() < 0.5, "steps too small to learn from, or too large"
    assert not torch.equal(train[0][0], validation[0][0])


def test_made_up_fields_are_linear_in_the_present():
    """What the next state is follows from this one: a linear map, found on one trajectory, holds on the other."""
    train, validation = synthetic_pairs(channels=2, grid=(8, 16), samples=200, waves=5)

    def matrices(data):
        return (torch.stack([data[i][part].flatten() for i in range(len(data))]).double() for part in (0, 1))

    x, y = matrices(train)
    step = torch.linalg.lstsq(x, y, rcond=1e-6, driver="gelsd").solution
    x, y = matrices(validation)
    assert (x @ step - y).square().mean().sqrt() < 1e-3


def test_made_up_fields_depend_on_the_seed_alone():
    def state(seed):
        return synthetic_pairs(seed=seed)[0][7][0]

    assert torch.equal(state(1), state(1))
    assert not torch.equal(state(1), state(2))


def test_made_up_fields_with_history():
    train, _ = synthetic_pairs(channels=2, grid=(4, 6), samples=9, history=3, lead=2)
    assert len(train) == 9
    x, y = train[0]
    raw = [train.source.read(0, step) for step in (4, 2, 0, 6)]
    expected = [(torch.from_numpy(state) - train.mean) / train.std for state in raw]
    torch.testing.assert_close(x, torch.cat(expected[:3]))
    torch.testing.assert_close(y, expected[3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "channels: must be at least 1, got 0"),
        ({"grid": [4, 0]}, r"grid: must be at least 1, got \[4, 0\]"),
        ({"validation_samples": 0}, "validation_samples: must be at least 1, got 0"),
        ({"lead": 0}, "must be at least 1, got history 1, lead 0"),
    ],
)
def test_wrong_made_up_fields(settings, message):
    with pytest.raises(ValueError, match=message):
        synthetic_pairs(**settings)


# Sharing samples among ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 7, 16, 33])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_sample_once_per_epoch_in_equal_steps(samples, batch, size):
    shares = [list(ShardedBatches(samples, batch, rank=r, size=size, seed=3)) for r in range(size)]
    assert {len(share) for share in shares} == {len(ShardedBatches(samples, batch))}
    assert Counter(i for share in shares for step in share for i in step) == Counter(range(samples))
    for step, total in enumerate(ShardedBatches(samples, batch).global_sizes()):
        sizes = [len(share[step]) for share in shares]
        assert sum(sizes) == total
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches_are_the_share_of_a_step(accumulate):
    for rank in range(3):
        whole = list(ShardedBatches(23, 8, rank=rank, size=3, seed=3))
        cut = list(ShardedBatches(23, 8, rank=rank, size=3, seed=3, accumulate=accumulate))
        assert len(cut) == len(ShardedBatches(23, 8, accumulate=accumulate)) == len(whole) * accumulate
        for step, share in enumerate(whole):
            micro_batches = cut[step * accumulate : (step + 1) * accumulate]
            assert sorted(chain(*micro_batches)) == sorted(share)
            sizes = [len(micro_batch) for micro_batch in micro_batches]
            assert max(sizes) - min(sizes) <= 1


def test_an_epoch_can_begin_at_any_step():
    shares = ShardedBatches(23, 8, rank=1, size=2, seed=3, accumulate=2)
    shares.set_epoch(4)
    whole = list(shares)
    for start in range(4):
        shares.set_epoch(4, start)
        assert list(shares) == whole[2 * start :]
        assert len(shares) == len(whole) - 2 * start
        assert shares.steps == 3


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    def epoch(size):
        shares = [list(ShardedBatches(33, 8, rank=r, size=size, seed=3)) for r in range(size)]
        return [sorted(i for share in step for i in share) for step in zip(*shares, strict=True)]

    assert epoch(1) == epoch(2) == epoch(4)


def test_the_order_is_fixed_by_seed_and_epoch():
    def order(seed, epoch, shuffle=True):
        batches = ShardedBatches(50, 50, seed=seed, shuffle=shuffle)
        batches.set_epoch(epoch)
        return next(iter(batches))

    assert order(1, 2) == order(1, 2)
    orders = {tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order(1, 2, shuffle=False) == list(range(50))


def test_a_rank_without_samples_gets_an_empty_batch(era5):
    train, _ = era5_pairs(era5)
    shares = ShardedBatches(len(train), 4, rank=3, size=4)
    *_, (x, y) = DataLoader(train, batch_sampler=shares, collate_fn=train.collate)
    assert x.shape == (0, 3, 4, 8)
    assert y.shape == (0, 3, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples: nothing to draw from"),
        ({"batch": 0}, "batch: must be at least 1"),
        ({"accumulate": 0}, "accumulate: must be at least 1"),
        ({"rank": 2}, "rank: expected 0 … 1 for size 2, got 2"),
    ],
)
def test_wrong_shares(arguments, message):
    settings = {"samples": 5, "batch": 2, "rank": 0, "size": 2} | arguments
    with pytest.raises(ValueError, match=message):
        ShardedBatches(**settings)
