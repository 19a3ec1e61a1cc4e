"""Which checkpoints stay, and which one is the newest, also where a run goes back to an earlier step."""

import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import checkpoint
from parallel.checkpoint import files, history
from parallel.checkpoint.manifest import Manifest, write_manifest
from tests.checkpoints import filled


def publish(folder, step, keep=None):
    """A checkpoint of nothing but a manifest."""
    aside = files.make_aside(folder, step)
    write_manifest(aside, Manifest(step, history.next_number(folder), 1, None, {}))
    new = files.publish(aside, folder, step)
    files.release(aside)
    if keep is not None:
        history.remove_old(folder, new, keep)


def steps_in(folder):
    return [files.step_of(path) for path in history.newest_first(folder)]


def spoil(folder, *steps):
    for step in steps:
        (files.final(folder, step) / "more").touch()


def last(folder, skipped=0):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoint.last_good(folder)
    assert len(caught) == skipped
    return files.step_of(found)


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 6, 20])
def test_keep(tmp_path, keep):
    for step in range(1, 9):
        checkpoint.save(tmp_path, step, *filled(step), keep=keep)
        there = sorted(path.name for path in tmp_path.iterdir())
        assert there == [f"step-{kept:08}" for kept in range(max(1, step - keep + 1), step + 1)]


def test_newer_is_what_was_saved_later(tmp_path):
    for step in (9, 10, 99_999_999, 100_000_000):
        publish(tmp_path, step)
    assert steps_in(tmp_path) == [100_000_000, 99_999_999, 10, 9]
    publish(tmp_path, 12)
    publish(tmp_path, 11)
    assert steps_in(tmp_path) == [11, 10, 9, 12, 100_000_000, 99_999_999]
    assert last(tmp_path) == 11


def test_a_run_that_goes_back_from_broken_checkpoints(tmp_path):
    """Neither do they count as kept, nor is the one that the run has come from removed for them."""
    for step in (50, 200, 300):
        publish(tmp_path, step)
    spoil(tmp_path, 200, 300)
    assert last(tmp_path, skipped=2) == 50
    publish(tmp_path, 100, keep=2)
    assert steps_in(tmp_path) == [100, 50]
    publish(tmp_path, 150, keep=2)
    assert steps_in(tmp_path) == [150, 100]


def test_a_run_that_goes_back_at_will(tmp_path):
    for step in (50, 200, 300):
        publish(tmp_path, step)
    for step in (100, 150):
        publish(tmp_path, step)
        assert last(tmp_path) == step
    spoil(tmp_path, 150)
    assert last(tmp_path, skipped=1) == 100
    spoil(tmp_path, 100, 50)
    assert last(tmp_path, skipped=3) == 300
    publish(tmp_path, 250, keep=6)
    assert steps_in(tmp_path) == [250, 150, 100, 50, 300, 200]
    publish(tmp_path, 260, keep=6)
    assert steps_in(tmp_path) == [260, 250, 150, 100, 50, 300]


def test_without_a_manifest_one_is_skipped_and_not_kept(tmp_path):
    for step in (1, 2, 3):
        publish(tmp_path, step)
    for step in (2, 3):
        (files.final(tmp_path, step) / "manifest.json").unlink()
    assert last(tmp_path, skipped=2) == 1
    publish(tmp_path, 4)
    assert last(tmp_path) == 4
    assert steps_in(tmp_path) == [4, 3, 2, 1]
    publish(tmp_path, 5, keep=3)
    assert steps_in(tmp_path) == [5, 4, 1]


@settings(max_examples=60, deadline=None)
@given(saves=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([None, None, 1, 2, 3])), max_size=10))
def test_the_last_ones_of_the_run_are_there(saves):
    line, there = [], set()
    with tempfile.TemporaryDirectory() as folder:
        for step, keep in saves:
            publish(Path(folder), step, keep)
            there |= {step}
            # Whatever this run has saved of later steps it has left behind.
            line = [step, *(before for before in line if before < step)][:keep]
            found = steps_in(Path(folder))
            assert len(found) == min(keep or len(there), len(there))
            assert found[: len(line)] == line
            there = set(found)
