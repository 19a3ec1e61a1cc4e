"""Crashes and full disks while saving: the save in flight is lost, and nothing else."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel import checkpoint
from tests.checkpoints import check_step, filled, save_for_ever, save_until, save_until_full

CRASHES = int(os.environ.get("COMMLAYER_TEST_CRASHES", "20"))


@pytest.fixture(scope="module")
def processes():
    """Real ones, that begin in no time: torch is imported once, where nothing else runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoints"])
    return context


def good(folder):
    """The step of the newest checkpoint, whose values are compared; none of them is broken."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpoint.last_good(folder)
    return 0 if found is None else check_step(found)


@pytest.mark.timeout(60 + 10 * CRASHES)
def test_sigkill_at_any_moment(processes, tmp_path):
    told = {"crashes": 0, "steps": 0}

    @settings(
        max_examples=CRASHES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        moment=st.integers(0, 9999),
        ranks=st.sampled_from([1, 2, 3]),
        background=st.booleans(),
        keep=st.sampled_from([None, 1, 2]),
    )
    def crash(moment, ranks, background, keep):
        before = good(tmp_path)
        receiving, sending = processes.Pipe(duplex=False)
        child = processes.Process(
            target=save_for_ever, args=(tmp_path, before + 1, ranks, background, keep, sending), daemon=True
        )
        child.start()
        sending.close()
        said, times = b"", []
        while len(said) < 3 * 8:  # how long does one take?
            said += os.read(receiving.fileno(), 8)
            times.append(time.monotonic())
        time.sleep((times[-1] - times[0]) / 2 * moment / 10_000)
        child.kill()
        child.join()
        while more := os.read(receiving.fileno(), 4096):
            said += more
        receiving.close()
        returned = int.from_bytes(said[-8:], "little")
        assert returned <= good(tmp_path) <= returned + 1
        told["crashes"] += 1
        told["steps"] += len(said) // 8
        if returned > 500:
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()

    crash()
    assert told["crashes"] >= min(CRASHES, 20), told


@pytest.mark.parametrize(("steps", "keep"), [((1, 2), None), ((1, 2), 1), ((1, 1), None)])
@pytest.mark.timeout(900)
def test_sigkill_at_every_operation_on_files(processes, tmp_path, steps, keep):
    """Of a save that follows another, that replaces another, and that removes another."""
    latest, every = 0, 1 if CRASHES >= 200 else 4
    for operations in range(0, 1000, every):
        folder = tmp_path / str(operations)
        child = processes.Process(target=save_until, args=(folder, steps, keep, operations))
        child.start()
        child.join()
        done = child.exitcode == 0
        assert done or child.exitcode == -signal.SIGKILL
        found = good(folder)
        assert latest <= found <= steps[-1], f"at operation {operations}, step {latest} was there before"
        latest = found
        # And the next save makes all well again.
        checkpoint.save(folder, 3, *filled(3), shared={"step": 3})
        assert good(folder) == 3
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
        shutil.rmtree(folder)
        if done:
            break
    assert done
    assert latest == steps[-1]
    assert operations > 30


def failed_on(processes, folder, limit, ranks):
    receiving, sending = processes.Pipe(duplex=False)
    child = processes.Process(target=save_until_full, args=(folder, limit, sending, ranks))
    child.start()
    sending.close()
    texts = receiving.recv()
    child.join()
    assert child.exitcode == 0
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert good(folder) == 1
    return texts


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_file_that_cannot_grow_is_an_error_on_all_ranks(processes, tmp_path, limit):
    """EFBIG from the operating system comes where ENOSPC does."""
    texts = failed_on(processes, tmp_path / "saved", limit, 3)
    assert len(set(texts)) == 1
    assert texts[0].startswith(f"{tmp_path / 'saved' / 'step-00000002'} was not saved: rank ")
    assert "File too large" in texts[0]


def test_a_full_disk(processes, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        texts = failed_on(processes, disk, None, 2)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert len(set(texts)) == 1
    assert "was not saved" in texts[0]
    assert "No space left on device" in texts[0]
