"""Context parallelism between processes, also inside a graph of torch.compile."""

import pytest
import torch

from tests.contracts.attention import METHODS, Case, check


@pytest.mark.parametrize("method", METHODS)
def test_equals_serial_attention(everyone, agreed, method):
    few = everyone.size - 1  # tokens: a rank has none
    for case in (
        Case(16, method),
        Case(13, method, mask="float"),
        Case(21, method, causal=True, zigzag=True, heads=(6, 2)),
        Case(14, method, causal=True, zigzag=True, mask="bool"),
        Case(few, method, causal=True, mask="padding", heads=(5, 5)),
    ):
        agreed(lambda c=case: check(c, everyone), str(case))


def test_in_halves_of_the_ranks(everyone, agreed):
    half = everyone.split(everyone.rank % 2)
    for method in METHODS:
        agreed(lambda m=method: check(Case(11, m, causal=True, zigzag=True), half), method)


@pytest.mark.parametrize("method", METHODS)
def test_inside_a_graph(everyone, agreed, method):
    torch._dynamo.reset()
    case = Case(13, method, causal=True, zigzag=method == "ring", mask="padding", heads=(8, 4))
    agreed(lambda: check(case, everyone, compiled=True), str(case))
