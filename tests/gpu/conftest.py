"""One world for the whole session, as in tests/spmd: NCCL, or Gloo where COMMLAYER_BACKEND says so."""

import os

import pytest
import torch

import commlayer
from commlayer.launch import discover
from tests.spmd.conftest import agreed, control, shared_folder  # noqa: F401 (fixtures)

STAGED = "test_staged"  # what ranks can do that talk through CPU tensors
SHARING = "test_sharing"  # which starts jobs


def pytest_collection_modifyitems(items):
    gloo, alone = os.environ.get("COMMLAYER_BACKEND") == "gloo", discover().launcher == "none"
    for item in items:
        if item.path.parent.name != "gpu":
            continue
        if not torch.cuda.is_available():
            skip(item, "torch.cuda is not available: needs an NVIDIA GPU and a CUDA build of torch")
        elif gloo and item.path.stem != STAGED:
            skip(item, "the backend is gloo, whose tensors are on the CPU")
        elif not gloo and item.path.stem == STAGED:
            skip(item, "for COMMLAYER_BACKEND=gloo and several ranks")
        elif not alone and item.path.stem == SHARING:
            skip(item, "starts jobs of its own, from one process alone")


def skip(item, why):
    item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def everyone():
    """The group of all ranks; a minute, since ranks that share a GPU take turns on it."""
    return commlayer.init(timeout=60)


@pytest.fixture
def several(everyone):
    """The same, of two ranks or more."""
    if everyone.size == 1:
        pytest.skip("needs two ranks: torchrun, or what test_sharing starts")
    return everyone
