"""What a trace counts as sent: the formulas of docs/experts.md, worked out here from the splits alone."""

from collections import Counter

import pytest
import torch

import commlayer
from commlayer import Mesh, balanced_sizes, run_local, world
from commlayer.fallbacks import all_to_all as emulations
from parallel.expert import MoE
from parallel.recompute import checkpoint
from parallel.router import Routing
from tests.contracts.moe import PLANS
from tests.contracts.tensor import drawn, rand

COUNT = 8  # bytes


class Records:
    """A trace that stays in memory."""

    def __init__(self):
        self.operations = []

    def write(self, operation):
        self.operations.append(operation)

    def close(self):
        pass


def traced(program, ranks, **options):
    """What each rank's operations in ``program(group)`` leave in a trace."""

    def run():
        world().watch.dog.trace = records = Records()
        program(world().new_group(range(ranks)))
        return records.operations

    return run_local(run, ranks, timeout=30, **options)


def sent_by_all_to_all(plan, matrix, rank, item, uneven=True, workspace=64 << 20):
    """Bytes that a rank sends where ``matrix[src][dst]`` elements of ``item`` bytes are under way."""
    ranks = len(matrix)
    others = ranks - 1
    if plan in ("native", "pairwise", "post"):
        return (sum(matrix[rank]) - matrix[rank][rank]) * item
    counts = ranks * COUNT if uneven else 0  # a row of the matrix, which everybody must know
    if plan == "padded_all_gather":
        longest = max(map(max, matrix))
        slice_ = max(1, min(longest, workspace // (ranks * (ranks + 1) * item)))
        slices = -(-longest // slice_)
        return others * (ranks * slices * slice_ * item + counts)
    if plan == "broadcasts":
        return others * (sum(matrix[rank]) * item + counts)
    # A broadcast is a sum with zeros, an all_gather a sum of disjoint slots: all ranks send for each of them.
    return sum(2 * others * sum(row) * item // ranks for row in matrix) + 2 * others * counts


MATRICES = {
    "uneven": lambda n: [[(3 * src + 5 * dst) % 7 for dst in range(n)] for src in range(n)],
    "skewed": lambda n: [[40 if dst == 1 else 1 for dst in range(n)] for _ in range(n)],
    "one sender": lambda n: [[9 if src == 0 else 0 for _ in range(n)] for src in range(n)],
    "nothing": lambda n: [[0] * n for _ in range(n)],
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128], ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_of_all_to_all_sends_what_its_formula_says(plan, ranks, dtype):
    matrices = [make(ranks) for make in MATRICES.values()]
    even = [[6] * ranks] * ranks

    def program(group):
        told = str(group.explain("all_to_all", dtype=dtype, uneven=True))
        assert (": native" if plan == "native" else f"⇐ {plan}") in told
        for matrix in matrices:
            row, column = matrix[group.rank], [source[group.rank] for source in matrix]
            commlayer.all_to_all(
                torch.zeros(sum(row), 2, dtype=dtype), input_splits=row, output_splits=column, group=group
            )
        commlayer.all_to_all(torch.zeros(6 * ranks, 2, dtype=dtype), group=group)

    for rank, operations in enumerate(traced(program, ranks, **PLANS[plan])):
        item = 2 * dtype.itemsize
        wanted = [sent_by_all_to_all(plan, matrix, rank, item) for matrix in matrices]
        wanted.append(sent_by_all_to_all(plan, even, rank, item, uneven=False))
        assert [operation["sent"] for operation in operations] == wanted
        assert [operation["bytes"] for operation in operations] == [
            sum(matrix[rank]) * item for matrix in [*matrices, even]
        ]


@pytest.mark.parametrize("workspace", [1, 100, 240, 1000, 10_000])
def test_slices_of_a_bounded_workspace_are_all_of_one_size(monkeypatch, workspace):
    monkeypatch.setattr(emulations, "WORKSPACE", workspace)
    matrix = MATRICES["skewed"](3)

    def program(group):
        row, column = matrix[group.rank], [source[group.rank] for source in matrix]
        commlayer.all_to_all(torch.zeros(sum(row)), input_splits=row, output_splits=column, group=group)

    for rank, [operation] in enumerate(traced(program, 3, **PLANS["padded_all_gather"])):
        wanted = sent_by_all_to_all("padded_all_gather", matrix, rank, 4, workspace=workspace)
        assert operation["sent"] == wanted


def everything(group):
    """Each operation once, on 12 float64 (96 bytes) a rank."""
    x, n = torch.zeros(12, dtype=torch.float64), group.size
    sizes = [1, *[2] * (n - 2), 12 - 1 - 2 * (n - 2)]
    mine = x[: sizes[group.rank]]
    commlayer.all_reduce(x, group=group)
    commlayer.reduce(x, dst=1, group=group)
    commlayer.broadcast(x, src=1, group=group)
    commlayer.all_gather(x, group=group)
    commlayer.all_gather(mine, sizes=sizes, group=group)
    commlayer.reduce_scatter(x, group=group)
    commlayer.reduce_scatter(x, sizes=sizes, group=group)
    commlayer.gather(mine, dst=1, sizes=sizes, group=group)
    commlayer.scatter(x, src=1, sizes=sizes, group=group)
    commlayer.sendrecv(x, dst=(group.rank + 1) % n, src=(group.rank - 1) % n, group=group)
    commlayer.sendrecv(x, dst=group.rank, src=group.rank, group=group)
    commlayer.barrier(group=group)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_native_operations_by_the_convention(ranks):
    for rank, operations in enumerate(traced(everything, ranks)):
        own = [1, *[2] * (ranks - 2), 12 - 1 - 2 * (ranks - 2)][rank] * 8
        root = rank == 1
        assert [(operation["op"], operation["sent"]) for operation in operations] == [
            ("all_reduce", 2 * 96 * (ranks - 1) // ranks),
            ("reduce", 0 if root else 96),
            ("broadcast", 96 * (ranks - 1) if root else 0),
            ("all_gather", 96 * (ranks - 1)),
            ("all_gather", own * (ranks - 1)),
            ("reduce_scatter", 96 - 96 // ranks),
            ("reduce_scatter", 96 - own),
            ("gather", 0 if root else own),
            ("scatter", 96 - own if root else 0),
            ("sendrecv", 96),
            ("sendrecv", 0),
            ("barrier", 0),
        ]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_emulations_by_messages_alone_show_their_price(ranks):
    """A ring, trees and pairs send what the convention says of a native one, or more: and somebody must send it."""
    native = traced(everything, ranks)
    only = "all_reduce,reduce,broadcast,all_gather,reduce_scatter,all_to_all,gather,scatter,barrier"
    emulated = traced(everything, ranks, disable=only)
    for place, calls in enumerate(zip(*emulated, strict=True)):
        name = calls[0]["op"]
        least, total = (sum(rank[place]["sent"] for rank in done) for done in (native, emulated))
        assert total >= least, name
        if name not in ("reduce_scatter", "all_reduce", "reduce", "barrier"):  # these add up locally, or send a token
            assert total == least, name
    tree = [calls[2]["sent"] for calls in emulated]
    assert max(tree) == 96 * (ranks - 1).bit_length()
    assert tree[1] == max(tree)


def test_messages_through_the_control_channel_count_too():
    def program(group):
        if group.rank == 0:
            commlayer.send(torch.zeros(5), 1, group=group)
        else:
            commlayer.recv(torch.zeros(5), 0, group=group)

    sender, receiver = traced(program, 2, disable="send,recv")
    assert (sender[0]["plan"], sender[0]["sent"], receiver[0]["sent"]) == ("post", 20, 0)


def test_asynchronous_and_backward_operations_each_count_their_own():
    def program(group):
        x = torch.ones(4, 3, requires_grad=True)
        splits = {"input_splits": [1, 3] if group.rank == 0 else [4, 0]}
        splits["output_splits"] = [1, 4] if group.rank == 0 else [3, 0]
        first = commlayer.all_gather(torch.ones(2), group=group, async_op=True)
        y = commlayer.all_to_all(x, **splits, group=group, async_op=True)
        last = commlayer.all_reduce(torch.ones(6), group=group, async_op=True)
        last.wait()
        y.wait().sum().backward()
        first.wait()

    expected = {"all_gather": [8], "all_reduce": [24]}
    for rank, operations in enumerate(traced(program, 2)):
        found = {}
        for operation in operations:
            found.setdefault(operation["op"], []).append(operation["sent"])
        assert found == expected | {"all_to_all": [36, 48] if rank == 0 else [48, 36]}


def test_without_a_trace_nothing_is_counted_or_in_the_way():
    def program():
        group = world()
        commlayer.all_reduce(torch.ones(4))
        assert group.flat.comm is group._comm
        assert group.watch.dog.recorder.last(group.watch.label).to_dict()["sent"] is None

    run_local(program, 2)


def test_one_rank_sends_nothing():
    def program(group):
        commlayer.all_to_all(torch.ones(4), input_splits=[4], group=group)
        commlayer.broadcast(torch.ones(4), group=group)

    assert [operation["sent"] for operation in traced(program, 1)[0]] == [0, 0, 0]


# One layer of experts, forward and backward -----------------------------------------------------------------

EMBED = 12  # so that nothing has to be rounded
EXPERTS = 8


def sent_by_a_layer(plan, matrix, rank, row):
    """The table of docs/experts.md: ``matrix[src][dst]`` rows of ``row`` bytes go to experts, on as many ranks."""
    n = len(matrix)
    own, other = matrix[rank][rank], sum(matrix[rank])
    home = sum(source[rank] for source in matrix)
    total, longest = sum(map(sum, matrix)), max(map(max, matrix))
    return {
        "native": 2 * row * (other + home - 2 * own),
        "pairwise": 2 * row * (other + home - 2 * own),
        "post": 2 * row * (other + home - 2 * own),
        "padded_all_gather": 4 * (n - 1) * (n * longest * row + COUNT * n),
        "broadcasts": 2 * (n - 1) * ((other + home) * row + 2 * COUNT * n),
        "sum_with_zeros": 8 * (n - 1) * (total * row // n + COUNT * n),
    }[plan]


def layer(tokens, routing, fold, chosen, dtype=torch.float64, keep=None):
    """One layer under a trace, forward and backward; ``chosen[rank]`` takes the counts of its tokens' choices."""

    def program(group):
        experts = Mesh(f"dp={group.size}", group=group).fold(fold)
        for axes in ("ep", "etp", "etp-ep", "etp-ep-edp"):
            experts[axes]  # collective, and what draws holds a lock
        moe = drawn(lambda: MoE(EMBED, 5, routing, mesh=experts)).to(dtype)
        x = rand(tokens[group.rank], EMBED, seed=group.rank).to(dtype).requires_grad_()
        y, load = moe(x) if keep is None else checkpoint(moe, x, keep=keep)
        (y.sum() + load.loss).backward()
        chosen[group.rank] = load.counts.tolist()

    return program


def rows_between(chosen, ranks):
    """How many rows each rank sends to each, by where the experts are."""
    sizes = balanced_sizes(EXPERTS, ranks)
    ends = [sum(sizes[: place + 1]) for place in range(ranks)]
    return [
        [sum(counts[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
        for _, counts in sorted(chosen.items())
    ]


def by_operation(operations):
    found = Counter()
    for operation in operations:
        found[operation["op"]] += operation["sent"]
    return +found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(5, 5, 5, 5), (7, 0, 3, 2)], ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("plan", PLANS)
def test_a_layer_sends_what_the_table_says(plan, ranks, tokens, dtype):
    chosen = {}
    routing = Routing(EXPERTS, 3, balance_loss=0.1)
    each = traced(layer(tokens, routing, f"ep={ranks}", chosen, dtype), ranks, **PLANS[plan])
    matrix = rows_between(chosen, ranks)
    assert sum(map(sum, matrix)) == 3 * sum(tokens[:ranks])
    for rank, operations in enumerate(each):
        assert by_operation(operations) == {
            "all_to_all": sent_by_a_layer(plan, matrix, rank, EMBED * dtype.itemsize),
            "all_gather": COUNT * EXPERTS * (ranks - 1) * (2 if plan == "sum_with_zeros" else 1),
        }
        assert sum(operation["op"] == "all_to_all" for operation in operations) == 4


def test_a_layer_in_slices(monkeypatch):
    workspace, ranks, chosen = 1000, 3, {}
    monkeypatch.setattr(emulations, "WORKSPACE", workspace)
    each = traced(layer((9, 1, 4), Routing(EXPERTS, 3), "ep=3", chosen), ranks, **PLANS["padded_all_gather"])
    matrix = rows_between(chosen, ranks)
    slice_ = workspace // (ranks * (ranks + 1) * 8) * 8
    padded = -(-max(map(max, matrix)) * EMBED * 8 // slice_) * slice_
    for operations in each:
        wanted = 4 * (ranks - 1) * (ranks * padded + COUNT * ranks)
        assert by_operation(operations)["all_to_all"] == wanted


@pytest.mark.parametrize(("keep", "exchanges"), [("products", 4), ("nothing", 6)])
def test_recomputing_a_layer_sends_its_tokens_again_and_not_its_counts(keep, exchanges):
    ranks, chosen = 2, {}
    each = traced(layer((6, 3), Routing(EXPERTS, 2), "ep=2", chosen, keep=keep), ranks)
    matrix = rows_between(chosen, ranks)
    for rank, operations in enumerate(each):
        once = sent_by_a_layer("native", matrix, rank, EMBED * 8)
        wanted = {"all_to_all": once * exchanges // 4, "all_gather": COUNT * EXPERTS * (ranks - 1)}
        assert by_operation(operations) == wanted


def test_experts_that_are_cut_send_their_rows_once_more():
    """etp=2 ep=2: what arrives is gathered along etp, the results are added up there; the same in backward."""
    tokens, chosen, row = (5, 2, 0, 4), {}, EMBED * 8
    each = traced(layer(tokens, Routing(EXPERTS, 2), "etp=2 ep=2", chosen), 4)
    for rank, operations in enumerate(each):
        column = [rank % 2, rank % 2 + 2]  # the ranks that this one exchanges tokens with
        matrix = rows_between({other: chosen[other] for other in column}, 2)
        beside = rows_between({other: chosen[other] for other in (1 - rank % 2, 3 - rank % 2)}, 2)
        mine, theirs = (sum(source[rank // 2] for source in rows) for rows in (matrix, beside))
        assert by_operation(operations) == +Counter(
            {
                "all_to_all": sent_by_a_layer("native", matrix, rank // 2, row),
                "all_gather": 2 * mine * row + COUNT * EXPERTS * 3,
                "reduce_scatter": 2 * theirs * row,
            }
        )
