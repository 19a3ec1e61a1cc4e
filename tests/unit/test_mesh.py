"""Mesh arithmetic against a brute-force definition, folding, and binding to groups."""

import itertools
import math
import re

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import commlayer
from commlayer.errors import UnsupportedOperation
from commlayer.mesh import Mesh

NAMES = ("dp", "cp", "tp", "ep", "pp")


def brute_coords(sizes, order):
    """Coordinates of rank 0, 1, 2 …: count up, the leftmost axis of the order first, like an odometer."""
    now, coords = dict.fromkeys(order, 0), []
    for _ in range(math.prod(sizes.values())):
        coords.append(dict(now))
        for axis in order:
            now[axis] = (now[axis] + 1) % sizes[axis]
            if now[axis]:
                break
    return coords


def brute_groups(coords, along, order):
    """Ranks alike in every axis but ``along``, sorted by their coordinates, slowest axis first."""
    groups = {}
    for rank, at in enumerate(coords):
        groups.setdefault(tuple(at[a] for a in reversed(order) if a not in along), []).append(rank)

    def place(rank):
        return [coords[rank][a] for a in reversed(order) if a in along]

    return {tuple(sorted(ranks, key=place)) for ranks in groups.values()}


@st.composite
def layouts(draw):
    """Sizes of up to five axes and a rank order, with at most 1,536 ranks."""
    names = draw(st.permutations(NAMES))[: draw(st.integers(1, len(NAMES)))]
    sizes, room = {}, 1536
    for name in names:
        sizes[name] = draw(st.integers(1, min(room, 64)))
        room //= sizes[name]
    return sizes, draw(st.permutations(names))


@settings(max_examples=60, deadline=None)
@given(layouts(), st.data())
def test_agrees_with_brute_force(layout, data):
    sizes, order = layout
    mesh = Mesh(sizes, order="-".join(order))
    coords = brute_coords(sizes, order)
    along = data.draw(st.permutations(order))[: data.draw(st.integers(1, len(order)))]
    axis = "-".join(along)
    groups = brute_groups(coords, along, order)
    assert (mesh.axes, mesh.sizes, mesh.world_size) == (tuple(order), sizes, len(coords))
    assert mesh.size(axis) == math.prod(sizes[a] for a in along)
    assert set(mesh.groups(axis)) == groups
    assert len(mesh.groups(axis)) == len(groups)
    for rank in data.draw(st.lists(st.integers(0, len(coords) - 1), min_size=1, max_size=8)):
        assert mesh.coords(rank) == coords[rank]
        assert mesh.rank_of(**coords[rank]) == rank
        assert [mesh.ranks(axis, rank)] == [group for group in groups if rank in group]


@pytest.mark.parametrize("order", ["-".join(p) for p in itertools.permutations(("tp", "cp", "dp", "pp"))])
def test_every_order_of_four_axes(order):
    sizes = {"dp": 4, "cp": 3, "tp": 2, "pp": 2}
    mesh, coords = Mesh(sizes, order), brute_coords(sizes, order.split("-"))
    assert [mesh.coords(rank) for rank in range(48)] == coords
    for along in (*(itertools.combinations(sizes, 1)), *itertools.combinations(sizes, 2), tuple(sizes)):
        assert set(mesh.groups("-".join(along))) == brute_groups(coords, along, order.split("-"))


def test_published_numbers():
    mesh = Mesh("tp=4 dp=2", order="tp-dp")
    assert mesh.groups("tp") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert mesh.groups("dp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert mesh.ranks("dp", 6) == (2, 6)


def test_largest_published_job():
    mesh = Mesh("dp=16 cp=2 tp=4 pp=12")  # 1,536 ranks: 128 nodes of 12
    assert mesh.ranks("tp", 1535) == (1532, 1533, 1534, 1535)
    assert mesh.ranks("pp", 5) == tuple(range(5, 1536, 128))


def test_combined_axis_keeps_the_faster_axis_fastest():
    mesh = Mesh("dp=2 cp=2 tp=2", order="cp-tp-dp")
    assert mesh.ranks("cp-dp", 2) == mesh.ranks("dp-cp", 2) == (2, 3, 6, 7)
    assert Mesh("dp=2 cp=2 tp=2", order="dp-tp-cp").ranks("cp-dp", 2) == (2, 3, 6, 7)


@pytest.mark.parametrize(
    ("spec", "axes"),
    [
        ("pp=2 dp=2 cp=2 tp=2 ep=2", ("tp", "cp", "ep", "dp", "pp")),
        ("rows=2 dp=3 columns=4 tp=1", ("tp", "dp", "rows", "columns")),
    ],
)
def test_default_order_is_canonical(spec, axes):
    assert Mesh(spec).axes == axes


def test_open_size_is_filled_up():
    assert Mesh("dp=-1 tp=4", world_size=24).sizes == {"tp": 4, "dp": 6}
    assert Mesh("dp=-1 tp=4", group=FakeGroup(0, 8)).sizes == {"tp": 4, "dp": 2}


@pytest.mark.parametrize(
    ("spec", "options", "quoted"),
    [
        ("", {}, "''"),
        ({}, {}, "{}"),
        ("dp=2 tp", {}, "'tp'"),
        ("dp=2 tp=two", {}, "'tp=two'"),
        ("d-p=2", {}, "'d-p=2'"),
        ({"dp": 1.5}, {}, "'dp=1.5'"),
        ("dp=0", {}, "dp=0"),
        ("dp=-2", {}, "dp=-2"),
        ("dp=2 tp=2 dp=4", {}, "axis dp stands twice"),
        ("dp=2 tp=2", {"order": "tp"}, "order 'tp'"),
        ("dp=2 tp=2", {"order": "tp-dp-tp"}, "order 'tp-dp-tp'"),
        ("dp=2 tp=2", {"order": "tp-cp"}, "order 'tp-cp'"),
        ("dp=2 tp=2", {"order": ""}, "order ''"),
        ("dp=-1 tp=2", {}, "world_size="),
        ("dp=-1 tp=-1", {"world_size": 4}, "'dp=-1 tp=-1'"),
        ("dp=-1 tp=3", {"world_size": 8}, "make 3, which does not fit 8"),
        ("dp=2 tp=3", {"world_size": 12}, "make 6, which does not fit 12"),
    ],
)
def test_bad_spec_is_quoted(spec, options, quoted):
    with pytest.raises(ValueError, match=re.escape(quoted)):
        Mesh(spec, **options)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: m.size("cp"), r"axis 'cp': this mesh has tp, dp"),
        (lambda m: m["tp-cp"], r"axis 'tp-cp': this mesh has tp, dp"),
        (lambda m: m.ranks("tp-tp", 0), r"axis 'tp-tp'"),
        (lambda m: m.groups(""), r"axis ''"),
        (lambda m: m.rank("cp"), r"axis 'cp'"),
        (lambda m: m.ranks("tp", 4), r"rank 4: the mesh has the ranks 0 … 3"),
        (lambda m: m.coords(-1), r"rank -1"),
        (lambda m: m.rank_of(tp=2, dp=0), r"tp=2: the coordinate must be in 0 … 1"),
        (lambda m: m.rank_of(tp=-1, dp=0), r"tp=-1"),
        (lambda m: m.rank_of(tp=1), r"one for each of tp, dp"),
        (lambda m: m.rank_of(tp=1, dp=1, pp=0), r"one for each of tp, dp"),
    ],
)
def test_bad_use_names_what_exists(use, message):
    with pytest.raises(ValueError, match=message):
        use(Mesh("tp=2 dp=2", group=FakeGroup(0, 4)))


# Folding ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(layouts(), st.data())
def test_fold_lays_each_stage_out_anew(layout, data):
    sizes, order = layout
    mesh, coords = Mesh(sizes, "-".join(order)), brute_coords(sizes, order)
    stage = len(coords) // sizes.get("pp", 1)
    etp = data.draw(st.sampled_from([n for n in range(1, stage + 1) if stage % n == 0]))
    ep = data.draw(st.sampled_from([n for n in range(1, stage // etp + 1) if stage // etp % n == 0]))
    folded = mesh.fold({"etp": etp, "ep": ep})
    assert folded.axes == (("etp", "ep", "edp", "pp") if "pp" in sizes else ("etp", "ep", "edp"))
    assert folded.sizes["edp"] == stage // etp // ep
    seen = dict.fromkeys(range(sizes.get("pp", 1)), 0)  # ranks of each stage so far, in rank order
    for rank, at in enumerate(coords):
        place = seen[at.get("pp", 0)]
        seen[at.get("pp", 0)] += 1
        expected = {"etp": place % etp, "ep": place // etp % ep, "edp": place // etp // ep}
        assert folded.coords(rank) == expected | ({"pp": at["pp"]} if "pp" in at else {})
        assert folded.rank_of(**folded.coords(rank)) == rank


def test_fold_with_pp_in_the_middle():
    mesh = Mesh("tp=2 pp=2 dp=2", order="tp-pp-dp")  # stages {0 1 4 5} and {2 3 6 7}
    folded = mesh.fold("etp=1 ep=4")
    assert folded.groups("ep") == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert folded.groups("pp") == mesh.groups("pp") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert folded.sizes == {"etp": 1, "ep": 4, "edp": 1, "pp": 2}
    assert mesh.fold("ep=2").groups("edp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert folded.fold("etp=4").groups("etp") == [(0, 1, 4, 5), (2, 3, 6, 7)]  # a mesh like any other


@pytest.mark.parametrize(
    ("spec", "message"),
    [("ep=3", "make 3, which does not fit 4"), ("ep=2 edp=4", "make 8"), ("tp=2", "'tp=2'"), ("", "no axis")],
)
def test_fold_that_does_not_fit(spec, message):
    with pytest.raises(ValueError, match=message):
        Mesh("tp=2 dp=2 pp=2").fold(spec)


# Groups -----------------------------------------------------------------------------------------------------


class FakeGroup:
    """A group that only remembers what was made of it."""

    device = torch.device("cpu")

    def __init__(self, rank, size, ranks=None):
        self.rank, self.size, self.ranks, self.made = rank, size, ranks or tuple(range(size)), []

    def subgroup(self, ranks):
        assert self.rank in ranks
        self.made.append(tuple(ranks))
        return FakeGroup(ranks.index(self.rank), len(ranks), tuple(self.ranks[r] for r in ranks))


def test_first_use_makes_all_single_axes_in_the_same_order_on_every_rank():
    for rank, first in itertools.product(range(12), ("dp", "tp", "cp", "tp-dp")):
        group = FakeGroup(rank, 12)
        mesh = Mesh("dp=3 cp=2 tp=2", order="tp-cp-dp", group=group)
        assert group.made == []
        mesh[first]
        assert group.made[:3] == [mesh.ranks(axis, rank) for axis in ("tp", "cp", "dp")]


def test_groups_are_made_once():
    group = FakeGroup(5, 12)
    mesh = Mesh("dp=3 cp=2 tp=2", order="tp-cp-dp", group=group)
    assert mesh["dp-tp"] is mesh["tp-dp"]
    assert mesh["dp"] is mesh["dp"]
    assert group.made == [(4, 5), (5, 7), (1, 5, 9), (0, 1, 4, 5, 8, 9)]
    assert (mesh["dp-tp"].rank, mesh["dp-tp"].size) == (mesh.rank("dp-tp"), mesh.size("dp-tp")) == (3, 6)


def test_ranks_are_those_of_the_group():
    mesh = Mesh("tp=2 dp=2", group=FakeGroup(2, 4, ranks=(7, 5, 3, 1)))
    assert mesh.rank("dp") == 1
    assert mesh.rank("tp") == 0
    assert mesh["dp"].ranks == (7, 3)
    assert mesh.fold("ep=4")["ep"].ranks == (7, 5, 3, 1)


def test_size_of_the_group_is_checked():
    with pytest.raises(ValueError, match=r"make 6, .* 8 ranks"):
        Mesh("tp=2 dp=3", group=FakeGroup(0, 8))


def test_default_group_is_the_world_of_the_moment(monkeypatch):
    """One mesh, used by several threads as ranks, or after finalize and init, must not mix their groups."""
    mesh, worlds = Mesh("tp=2 dp=2"), [FakeGroup(0, 4), FakeGroup(3, 4)]
    for world in worlds:
        monkeypatch.setattr("commlayer.mesh.world", lambda world=world: world)
        assert mesh["tp"].rank == mesh.rank("tp") == world.rank % 2
    assert [world.made for world in worlds] == [[(0, 1), (0, 2)], [(2, 3), (1, 3)]]
    monkeypatch.setattr("commlayer.mesh.world", lambda: FakeGroup(0, 8))
    with pytest.raises(ValueError, match="4 ranks, but the group has 8"):
        mesh.rank("tp")


def test_one_mesh_shared_by_thread_ranks():
    mesh = Mesh("tp=2 pp=2 dp=2", order="tp-pp-dp")

    def sums():
        rank = torch.tensor(commlayer.world().rank)
        folded = mesh.fold("ep=4")
        return [int(commlayer.all_reduce(rank, group=group)) for group in (mesh["dp"], mesh["dp-tp"], folded["ep"])]

    def expected(rank):
        groups = (mesh.ranks("dp", rank), mesh.ranks("tp-dp", rank), mesh.fold("ep=4").ranks("ep", rank))
        return [sum(ranks) for ranks in groups]

    assert commlayer.run_local(sums, ranks=8) == [expected(rank) for rank in range(8)]


# torch ------------------------------------------------------------------------------------------------------


def test_device_mesh_is_not_for_threads():
    with pytest.raises(UnsupportedOperation, match="threads"):
        commlayer.run_local(lambda: Mesh("tp=2").to_device_mesh(), ranks=2)


def test_device_mesh_has_the_same_ranks():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=12)
    try:
        for mesh in (
            Mesh("dp=3 cp=2 tp=2", order="cp-tp-dp", group=FakeGroup(5, 12)),
            Mesh("tp=3 pp=2 dp=2", order="tp-pp-dp", group=FakeGroup(5, 12)).fold("ep=2"),
            Mesh("tp=2 dp=2", group=FakeGroup(2, 4, ranks=(1, 3, 5, 7))),
        ):
            device_mesh = mesh.to_device_mesh()
            assert device_mesh.mesh_dim_names == mesh.axes[::-1]
            for axis in mesh.axes:
                assert dist.get_process_group_ranks(device_mesh[axis].get_group()) == list(mesh[axis].ranks)
                assert device_mesh[axis].get_local_rank() == mesh.rank(axis)
    finally:
        dist.destroy_process_group()


# Printing ---------------------------------------------------------------------------------------------------


def test_repr_makes_the_same_mesh():
    mesh = Mesh({"dp": 2, "pp": 2, "tp": 3}, order="tp-pp-dp").fold("ep=2")
    assert repr(mesh) == "Mesh('dp=2 pp=2 tp=3', order='tp-pp-dp').fold('etp=1 ep=2 edp=3')"
    assert eval(repr(mesh)).groups("ep-pp") == mesh.groups("ep-pp")


def test_str_shows_the_groups_and_stays_short():
    assert str(Mesh("tp=2 dp=2")).splitlines()[1:] == ["  tp=2: [0 1] [2 3]", "  dp=2: [0 2] [1 3]"]
    large = str(Mesh("tp=96 dp=16")).splitlines()
    assert large[2] == "  dp=16: [0 96 192 288 384 480 …] [1 97 193 289 385 481 …] [2 98 194 290 386 482 …] …"
