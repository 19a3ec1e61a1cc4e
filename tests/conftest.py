"""What all tests share."""

import os
import tempfile

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_the_users():
    """Profiles that somebody probed on this machine change no test."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
