"""The checks of tests/gpu as far as a CPU can do them: that they are right themselves, before a GPU sees them."""

import pytest
import torch

import commlayer as c
from commlayer.capability import REDUCING
from tests.contracts.cases import FUNCTIONS
from tests.contracts.checks import check
from tests.contracts.oracle import DTYPES
from tests.gpu import collectives, staged, streams

CHECKS = (
    streams.check_long_kernel_before,
    streams.check_another_stream,
    streams.check_freed_and_overwritten,
    streams.check_buffers_outlive_other_streams,
)


def on_ranks(function, ranks=3):
    c.run_local(lambda: function(c.world()), ranks, timeout=20)


@pytest.mark.parametrize("check", CHECKS)
def test_streams(check):
    on_ranks(lambda group: [check(group, name) for name in streams.NAMES])
    on_ranks(lambda group: [check(group, name) for name in streams.NAMES], ranks=1)


def test_the_host_and_handles():
    on_ranks(lambda group: [streams.check_host_does_not_wait(group, name) for name in streams.NATIVE])
    on_ranks(lambda group: [streams.check_host_waits_with_a_limit(group, name) for name in streams.NATIVE])
    on_ranks(lambda group: [streams.check_handle_dropped(group, name) for name in streams.COLLECTIVES])


def test_gradients_from_several_streams():
    on_ranks(lambda group: streams.check_gradients_from_several_streams(group, 1e-6))


@pytest.mark.parametrize("function", [collectives.check_messages, collectives.check_refusals])
def test_collectives(function):
    on_ranks(function)


def test_sizes(monkeypatch):
    monkeypatch.setattr(collectives, "SIZES", (1, 3, 1000))
    on_ranks(collectives.check_sizes)


@pytest.mark.parametrize("op", [op for op in FUNCTIONS if op != "messages"])
def test_every_reduction_of_a_dtype(op):
    def run(group):
        with torch.device(group.device):
            for dtype in ("bool", "int64", "bfloat16", "float32", "complex64"):
                assert check_all(op, dtype, group)

    on_ranks(run, ranks=2)


def check_all(op, dtype, group):
    return [check(case, group) for case in collectives.every_reduction(op, dtype)]


def test_what_has_no_reduction_has_no_case():
    for op in FUNCTIONS:
        for dtype in DTYPES:
            assert bool([*collectives.every_reduction(op, dtype)]) != (op in REDUCING and dtype.startswith("float8"))


@pytest.mark.parametrize("function", staged.CHECKS)
def test_staged(function):
    on_ranks(lambda group: function(group, torch.device("cpu")))
