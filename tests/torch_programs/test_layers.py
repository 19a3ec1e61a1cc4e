"""Unmodified torch programs compute on "commlayer", over every layer underneath, what they compute on plain gloo.

``COMMLAYER_TEST_PROGRAMS=all`` runs every layer at 2 and 4 ranks; a short form is the default.
"""

from __future__ import annotations

import os
from functools import cache, partial
from typing import Any

import pytest

from tests.faults.job import MPI
from tests.torch_programs.catalogue import TOPICS
from tests.torch_programs.compare import judge
from tests.torch_programs.jobs import REFERENCE, Layer, run

LAYERS = [
    Layer("gloo"),
    Layer("gloo as xccl-2.7", profile="xccl-2.7"),
    Layer("gloo with send and recv alone", profile="only-send-recv"),
    Layer("gloo with all_reduce alone", profile="only-all-reduce"),
    Layer("MPI", "mpi"),
]
ALL = os.environ.get("COMMLAYER_TEST_PROGRAMS") == "all"
SHORT = [("gloo as xccl-2.7", 2), ("MPI", 2)]


def topics(ranks: int) -> tuple[str, ...]:
    """Compilers take their time: at two ranks only."""
    return TOPICS if ranks == 2 else tuple(topic for topic in TOPICS if topic != "compiled")


JOBS = [(layer, ranks) for ranks in (2, 4) for layer in LAYERS if ALL or (layer.name, ranks) in SHORT]
CASES = [(topic, layer, ranks) for layer, ranks in JOBS for topic in topics(ranks)]

# Where messages are emulated, rank 0 cannot take the next one from whoever sent it.
REFUSED = {"gloo with all_reduce alone": ("messages.from_any_source", "messages.from_any_source_in_a_group")}

# What the layer adds up in another order than plain gloo even on gloo: four ranks, or halves, show it.
REORDERED = (
    "reductions.all_reduce[AVG]",  # halves are averaged in single precision
    "reductions.reduce_to_root[AVG]",
    "fsdp.mixed_precision[reductions_too]",
    "reductions.reduce_scatter",  # a list is one tensor
    "asynchronous.every_kind",
    "functional.gradients",
    "reductions.layouts",  # the elements of a transposed tensor travel in the order of its memory
    "asynchronous.all_reduces_coalesced",  # several are one tensor to gloo
)


def exact(layer: Layer, ranks: int, program: str) -> bool:
    """Two numbers give the same sum in any order; more do on torch's own operations alone."""
    return (ranks == 2 or layer.name == "gloo") and not program.startswith(REORDERED)


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """The records of a job, which is run once, also if it fails."""

    @cache
    def outcome(layer: Layer, ranks: int) -> list[dict[str, Any]] | Exception:
        options = ["--only", ",".join(f"{topic}." for topic in topics(ranks))]
        options += [] if ALL else ["--but", "inductor"]  # which calls a C++ compiler
        options += ["--reference"] if layer == REFERENCE else []
        try:
            return run(layer, ranks, tmp_path_factory.mktemp("programs"), *options)
        except AssertionError as error:
            return error

    def records(layer: Layer, ranks: int) -> list[dict[str, Any]]:
        found = outcome(layer, ranks)
        if isinstance(found, Exception):
            raise found
        return found

    return records


@pytest.mark.parametrize(("topic", "layer", "ranks"), CASES, ids=[f"{t} {n} ranks {x.name}" for t, x, n in CASES])
def test_programs_compute_what_they_do_on_gloo(job, topic, layer, ranks):
    if layer.backend == "mpi" and not MPI:
        pytest.skip("no mpiexec beside this interpreter: pip install 'commlayer[mpi]'")
    wrong = []
    for rank, (got, reference) in enumerate(zip(job(layer, ranks), job(REFERENCE, ranks), strict=True)):
        reference = {name: record for name, record in reference.items() if name.startswith(f"{topic}.")}
        assert reference
        for name in REFUSED.get(layer.name, ()):
            refused = "recv from any source" in got[name].get("error", "")
            if reference.pop(name, None) and rank == 0 and not refused:
                wrong.append(f"{name}: should be refused")
        wrong += [f"rank {rank}: {line}" for line in judge(got, reference, partial(exact, layer, ranks))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not ALL, reason="takes as long as a timeout: COMMLAYER_TEST_PROGRAMS=all")
def test_what_is_said_to_wait_for_ever_on_gloo_does(tmp_path):
    try:
        records = run(REFERENCE, 4, tmp_path, "--only", "power_sgd_in_buckets")
        said = [record["ddp_hooks.power_sgd_in_buckets"].get("error", "") for record in records]
    except AssertionError as error:  # ended by the program's own watch
        said = [str(error)]
    assert all("Timed out" in words or "Timeout" in words for words in said)
