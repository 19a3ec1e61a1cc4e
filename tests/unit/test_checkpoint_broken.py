"""Broken checkpoints are errors that name the file, and are skipped: never a silent wrong load."""

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import commlayer
from commlayer import run_local
from parallel import checkpoint
from parallel.checkpoint.manifest import read_manifest, write_manifest
from tests.checkpoints import check_step, filled

FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "own-00000.pt", "own-00001.pt", "shared.pt")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Steps 1 and 2, by two ranks."""
    folder = tmp_path_factory.mktemp("original")

    def rank():
        for step in (1, 2):
            checkpoint.save(folder, step, *filled(step), shared={"step": step}, own=step, about={"lr": 0.5, "of": [1]})

    run_local(rank, ranks=2)
    assert tuple(sorted(path.name for path in (folder / "step-00000002").iterdir())) == FILES
    return folder


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder, name):
    """Step 2 is an error that names the file, on all ranks, and nothing has changed; step 1 is found."""
    broken = folder / "step-00000002"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        checkpoint.verify(broken)
    assert str(broken / name) in str(caught.value)

    def rank():
        model, optimizer = filled(0)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            checkpoint.load(broken, model, optimizer)
        assert torch.equal(model.weight, filled(0)[0].weight)
        return str(caught.value)

    texts = run_local(rank, ranks=2)
    assert texts[0] == texts[1]
    assert str(broken / name) in texts[0]
    with pytest.warns(UserWarning, match="skipped a broken checkpoint") as warned:
        found = checkpoint.last_good(folder)
    assert str(broken / name) in str(warned[0].message)
    assert check_step(found) == 1
    return str(caught.value)


def test_last_good_is_the_newest(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_step(checkpoint.last_good(folder)) == 2
        (folder / "step-00000003.copy").mkdir()
        (folder / ".step-00000004.12345678").mkdir()
        assert check_step(checkpoint.last_good(folder)) == 2
        assert checkpoint.last_good(folder / "nowhere") is None


def test_last_good_is_the_same_on_all_ranks(folder):
    (folder / "step-00000002/shared.pt").unlink()

    def rank():
        return checkpoint.last_good(folder, group=commlayer.world())

    with pytest.warns(UserWarning, match="skipped a broken checkpoint") as warned:
        assert run_local(rank, ranks=3) == [folder / "step-00000001"] * 3
    assert len(warned) == 1


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit(original, tmp_path_factory, name, place, bit):
    folder = tmp_path_factory.mktemp("flipped") / "copy"
    shutil.copytree(original, folder)
    data = bytearray((folder / "step-00000002" / name).read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    (folder / "step-00000002" / name).write_bytes(data)
    refused(folder, name)
    shutil.rmtree(folder)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file(original, tmp_path_factory, name, place):
    folder = tmp_path_factory.mktemp("truncated") / "copy"
    shutil.copytree(original, folder)
    with (folder / "step-00000002" / name).open("r+b") as file:
        file.truncate(int(place * len(file.read())))
    refused(folder, name)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder, name):
    (folder / "step-00000002" / name).unlink()
    refused(folder, name)


def test_a_file_more(folder):
    (folder / "step-00000002/__2_0.distcp").write_bytes(b"")
    assert "not in the manifest" in refused(folder, "__2_0.distcp")


def test_files_of_another_step(folder):
    shutil.copy(folder / "step-00000001/__0_0.distcp", folder / "step-00000002/__0_0.distcp")
    refused(folder, "__0_0.distcp")


def test_a_manifest_of_another_version(folder):
    path = folder / "step-00000002"
    write_manifest(path, replace(read_manifest(path), version=2))
    assert "of version 2, this program reads version 1" in refused(folder, "manifest.json")


def test_a_manifest_that_reads_the_same_but_is_not(folder):
    path = folder / "step-00000002/manifest.json"
    path.write_text(path.read_text().replace("\n ", "\n  ", 1))
    assert "by its checksum" in refused(folder, "manifest.json")
