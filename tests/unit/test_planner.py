"""Plans and capability sets: what every rank must work out alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlayer import recv, run_local, send, sendrecv, world
from commlayer.capability import (
    DTYPES,
    EVERYTHING,
    CapabilitySet,
    Profile,
    Request,
    Rule,
    load_profile,
    parse_disabled,
    requests,
    shipped_profiles,
)
from commlayer.planner import OVERHEAD, Cost, native_cost, plan
from tests.contracts.cases import disabled

ALL = list(requests("cpu"))
SETS = {"everything": CapabilitySet((EVERYTHING,))}
SETS |= {name: CapabilitySet((load_profile(name),)) for name in shipped_profiles()}
SETS["nothing"] = CapabilitySet((Profile("nothing", ()),))


def leaves(tree):
    return [tree] if tree.fallback is None else [leaf for part in tree.parts for leaf in leaves(part)]


def walk(tree, above=()):
    """Every node with the requests it is used for."""
    yield tree, above
    for part in tree.parts:
        yield from walk(part, (*above, tree.request))


@pytest.mark.parametrize("size", [1, 2, 4, 7])
@pytest.mark.parametrize("name", SETS)
def test_there_is_a_plan_for_everything(name, size):
    """Even for a backend that can do nothing: the control channel is always there."""
    capabilities = SETS[name]
    assert [str(request) for request in ALL if plan(capabilities, size, request) is None] == []
    for request in ALL:
        found = plan(capabilities, size, request)
        assert found.request == request
        assert found.cost.seconds() >= 0
        if capabilities.native(request):
            assert found.fallback is None, f"{request} is native, and yet emulated"
        for leaf in leaves(found):
            assert leaf.request.op == "control" or capabilities.native(leaf.request), f"{request}: {leaf.request}"
        for node, above in walk(found):
            assert node.request not in above, f"{request}: a cycle at {node.request}"


@pytest.mark.parametrize("name", ["only-all-reduce", "only-send-recv", "xccl-2.7", "nothing"])
def test_the_cost_of_a_plan_is_that_of_its_parts(name):
    def cost(tree):
        if tree.fallback is None:
            return native_cost(tree.request.op, 4)
        total = Cost(0 if tree.fallback.reinterprets else OVERHEAD, touched=tree.fallback.passes)
        for use, part in zip(tree.fallback.needs(tree.request, 4), tree.parts, strict=True):
            assert use.request == part.request
            total = total.plus(cost(part), use.times, use.scale)
        return total

    for request in ALL:
        found = plan(SETS[name], 4, request)
        assert found.cost.seconds() == pytest.approx(cost(found).seconds()), str(request)


@pytest.mark.parametrize("name", SETS)
def test_a_plan_is_a_function_of_its_inputs(name):
    for request in ALL[::5]:
        first = plan(SETS[name], 4, request)
        again = plan.__wrapped__(SETS[name].agreed([SETS[name].to_bytes()]), 4, request)
        assert list(first.lines()) == list(again.lines())
        assert first.cost == again.cost


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(request=st.sampled_from(ALL), name=st.sampled_from(list(SETS)), less=disabled(), size=st.integers(1, 9))
def test_having_less_is_never_cheaper(request, name, less, size):
    full = SETS[name]
    fewer = CapabilitySet(full.profiles, parse_disabled(less))
    assert plan(fewer, size, request).cost.seconds() >= plan(full, size, request).cost.seconds() * (1 - 1e-9)


def test_send_and_recv_are_planned_alike():
    """Each end of a message decides alone, so both must decide the same."""
    for text in ("recv", "send", "recv@float32", "send@bfloat16,recv@float32", "send@int32"):
        for dtype in ("float32", "bfloat16", "int8"):

            def program(dtype=dtype):
                right, left = (world().rank + 1) % 3, (world().rank - 1) % 3
                x = torch.full((3,), world().rank).to(DTYPES[dtype])
                work = send(x, right, async_op=True)
                assert recv(torch.empty_like(x), left).tolist() == [left] * 3
                work.wait()
                assert sendrecv(x, dst=left, src=right).tolist() == [right] * 3

            run_local(program, 3, disable=text, timeout=5)


def test_explanations():
    def program():
        group = world()
        text = str(group.explain("all_to_all", dtype=torch.bfloat16))
        assert text.startswith("all_to_all bfloat16 cpu ⇐ ")
        assert "native" in text
        assert "why: all_to_all bfloat16 cpu is absent (only-send-recv" in text
        assert "x a native one at 1 MiB on 4 ranks" in text
        assert group.explain("send").native
        told = group.explain("reduce_scatter", reduce="max", uneven=True).to_dict()
        assert told["request"] == "reduce_scatter max float32 cpu uneven"
        assert told["parts"]
        assert told["ratio"] > 0
        assert told["ranks"] == 4
        assert str(group.explain("send")) == "send float32 cpu: native"
        group.explain("all_reduce", reduce="premul_sum")
        group.explain("barrier")
        with pytest.raises(TypeError, match=r"avg of torch\.int32"):
            group.explain("all_reduce", reduce="avg", dtype=torch.int32)

    run_local(program, 4, profile="only-send-recv")


@pytest.mark.parametrize(
    "text",
    ["all_redcue", "all_reduce:mean", "all_reduce@float31", "all_reduce@", "all_reduce:", "@float32", "send:avg",
     "all_gather:sum", "all_reduce:uneven", "all_reduce:avg@int32", "all_reduce avg", "all_reduce;send", ":avg"],
)  # fmt: skip
def test_what_cannot_be_disabled(text):
    with pytest.raises(ValueError, match="disabled capabilities") as caught:
        parse_disabled(f"all_gather,{text}")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "gone", "stays"),
    [
        ("", [], [("all_reduce", "sum")]),
        (" all_to_all , ", [("all_to_all",)], [("all_gather",)]),
        ("all_reduce:avg", [("all_reduce", "avg")], [("all_reduce", "sum"), ("reduce", "avg")]),
        ("all_reduce:avg@bfloat16", [("all_reduce", "avg", torch.bfloat16)], [("all_reduce", "avg")]),
        ("all_gather:uneven", [("all_gather", None, torch.int8, "cpu", "uneven")], [("all_gather",)]),
        ("all_gather:even", [("all_gather",)], [("all_gather", None, torch.int8, "cpu", "uneven")]),
    ],
)
def test_what_disabling_takes_away(text, gone, stays):
    capabilities = CapabilitySet((EVERYTHING,), parse_disabled(text))
    for agreed in (capabilities, capabilities.agreed([capabilities.to_bytes()])):
        assert not any(agreed.native(Request(*request)) for request in gone)
        assert all(agreed.native(Request(*request)) for request in stays)


def test_intersection():
    one, other = SETS["only-all-reduce"], SETS["only-send-recv"]
    for both in (one & other, one.agreed([one.to_bytes(), other.to_bytes()])):
        assert not any(map(both.native, ALL))
    both = SETS["everything"] & one
    assert [request for request in ALL if both.native(request)] == [request for request in ALL if one.native(request)]
    assert one & one == one
    assert (one & other).digest() == (one & other).digest() != one.digest()


@pytest.mark.parametrize("name", SETS)
def test_a_set_survives_its_bytes(name):
    capabilities = CapabilitySet(SETS[name].profiles, parse_disabled("all_to_all:uneven@int8,reduce:min"))
    again = capabilities.agreed([capabilities.to_bytes()] * 3)
    assert [again.status(request) for request in ALL] == [capabilities.status(request) for request in ALL]
    assert again.to_bytes() == capabilities.to_bytes()
    assert again.digest() == capabilities.digest()


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_are_sourced(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.summary
    for rule in profile.rules:
        assert rule.source in profile.sources, f"{name}: {rule}"
        assert not rule.dtypes or rule.dtypes <= set(DTYPES)
    assert Profile.from_json(profile.to_json(), name) == profile


def test_the_last_rule_decides():
    profile = Profile(
        "p", (Rule("native"), Rule("absent", frozenset({"gather"})), Rule("native", dtypes=frozenset({"int8"})))
    )
    capabilities = CapabilitySet((profile,))
    assert not capabilities.native(Request("gather"))
    assert capabilities.native(Request("gather", None, torch.int8))
    assert capabilities.native(Request("recv"))
