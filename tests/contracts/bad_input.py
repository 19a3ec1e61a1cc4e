"""Calls that must be refused, with the exact error, before anything is communicated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import commlayer as c

Call = Callable[[c.Group], Any]


class Refused(NamedTuple):
    call: Call
    error: type[Exception]
    message: str  # a regular expression: the argument, what it got, and what fits


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def _function(name: str, *args: Any, **kwargs: Any) -> Call:
    """A call of a public function on the given group."""
    return lambda g: getattr(c, name)(*args, group=g, **kwargs)


def _sized(name: str, argument: str, value: Callable[[int], Any], **more: Any) -> Call:
    """A call with an argument that depends on the number of ranks; its input has 2 elements per rank."""
    return lambda g: getattr(c, name)(x(2 * g.size), group=g, **{argument: value(g.size)}, **more)


fp8 = torch.ones(4).to(torch.float8_e4m3fn)
sparse = torch.eye(2).to_sparse()
quantized = torch.empty(2, dtype=torch.float32, device="meta")

_TABLE: dict[str, tuple[Call, type[Exception], str]] = {
    # what is no tensor, or one the layer cannot move
    "all_reduce of a list": (_function("all_reduce", [1, 2]), TypeError, r"x: expected a torch.Tensor, got list"),
    "broadcast of a number": (_function("broadcast", 1.0), TypeError, r"x: expected a torch.Tensor, got float"),
    "all_gather of None": (_function("all_gather", None), TypeError, r"x: .*got NoneType"),
    "send of an array": (_function("send", x(2).numpy(), 0), TypeError, r"x: .*got ndarray"),
    "recv into a shape": (_function("recv", (2, 2), 0), TypeError, r"x: .*got tuple"),
    "sparse tensor": (_function("all_reduce", sparse), TypeError, r"x: .*strided.*sparse_coo.*to_dense"),
    "tensor on another device": (_function("all_reduce", quantized), ValueError, r"x: is on meta.*works on cpu"),
    "out on another device": (_function("all_reduce", x(2), out=quantized), ValueError, r"out: is on meta.*cpu"),
    # reduce operations
    "unknown op": (_function("all_reduce", x(2), "mean"), ValueError, r"op: expected one of sum, avg.*got 'mean'"),
    "op of another library": (
        _function("all_reduce", x(2), torch.distributed.ReduceOp.SUM),
        ValueError,
        r"op: expected one of .*got ",
    ),
    "op none": (_function("reduce", x(2), None), ValueError, r"op: expected one of .*got None"),
    "avg of integers": (
        _function("all_reduce", x(2, dtype=torch.int32), c.AVG),
        TypeError,
        r"op: AVG of torch.int32.*floating",
    ),
    "avg of bool": (_function("reduce", x(2).bool(), c.AVG), TypeError, r"op: AVG of torch.bool"),
    "bitwise op on floats": (_function("all_reduce", x(2), c.BAND), TypeError, r"op: BAND of torch.float32.*integer"),
    "xor of complex": (
        _function("reduce", x(2, dtype=torch.complex64), "bxor"),
        TypeError,
        r"op: BXOR of torch.complex64",
    ),
    "minimum of complex": (
        _function("all_reduce", x(2, dtype=torch.complex64), c.MIN),
        TypeError,
        r"op: MIN of torch.complex64.*order",
    ),
    "sum of 8-bit floats": (_function("all_reduce", fp8), TypeError, r"op: SUM of torch.float8_e4m3fn.*float32"),
    "reduce_scatter of 8-bit floats": (
        lambda g: c.reduce_scatter(torch.ones(g.size).to(torch.float8_e5m2), group=g),
        TypeError,
        r"op: SUM of torch.float8",
    ),
    "premul_sum of integers": (
        _function("all_reduce", x(2, dtype=torch.int64), c.premul_sum(2)),
        TypeError,
        r"op: premul_sum\(2\) of torch.int64",
    ),
    "factor of several elements": (lambda g: c.premul_sum(x(2)), ValueError, r"factor.*one element.*\(2,\)"),
    "factor of a wrong type": (lambda g: c.premul_sum("2"), TypeError, r"factor.*number.*got '2'"),
    # roots and peers
    "root too large": (
        lambda g: c.broadcast(x(2), src=g.size, group=g),
        ValueError,
        r"src: expected a rank from 0 to .*, got \d",
    ),
    "root negative": (_function("reduce", x(2), dst=-1), ValueError, r"dst: expected a rank from 0 to .*got -1"),
    "root a float": (_function("gather", x(2), dst=0.0), TypeError, r"dst: expected a rank.*got 0\.0"),
    "root a bool": (_sized("scatter", "src", lambda n: True), TypeError, r"src: expected a rank.*got True"),
    "send beyond the group": (lambda g: c.send(x(2), g.size + 3, group=g), ValueError, r"dst: .*got \d"),
    "receive from nobody": (_function("recv", x(2), -1), ValueError, r"src: expected a rank.*got -1"),
    "sendrecv to nobody": (_function("sendrecv", x(2), dst=99, src=0), ValueError, r"dst: .*got 99"),
    "sendrecv from nobody": (_function("sendrecv", x(2), dst=0, src=99), ValueError, r"src: .*got 99"),
    "root of objects": (_function("broadcast_object", 1, src=99), ValueError, r"src: .*got 99"),
    "gather objects to nobody": (_function("gather_object", 1, dst=-2), ValueError, r"dst: .*got -2"),
    # tags
    "tag negative": (_function("send", x(2), 0, -1), ValueError, r"tag: expected 0 to 32767.*got -1"),
    "tag too large": (_function("recv", x(2), 0, 1 << 15), ValueError, r"tag: expected 0 to 32767.*got 32768"),
    "tag a string": (_function("sendrecv", x(2), dst=0, src=0, tag="a"), TypeError, r"tag: expected an int, got 'a'"),
    # dims
    "dim too large": (
        _function("all_gather", x(2, 2), dim=2),
        ValueError,
        r"dim: expected -2 to 1 for shape \(2, 2\), got 2",
    ),
    "dim too negative": (_sized("all_to_all", "dim", lambda n: -2), ValueError, r"dim: expected -1 to 0.*got -2"),
    "dim a float": (_sized("reduce_scatter", "dim", lambda n: 1.0), TypeError, r"dim: expected an int, got 1\.0"),
    "dim of a number": (_function("all_gather", x(), dim=1), ValueError, r"dim: .*shape \(\), got 1"),
    "scatter of a number": (_function("scatter", x()), ValueError, r"x: a 0-dim tensor cannot be split"),
    "all_to_all of a number": (_function("all_to_all", x()), ValueError, r"x: a 0-dim tensor cannot be split"),
    "reduce_scatter of a number": (_function("reduce_scatter", x()), ValueError, r"x: a 0-dim tensor.*reshape\(1\)"),
    # extents that do not divide, sizes and splits that do not fit
    "reduce_scatter that does not divide": (
        lambda g: c.reduce_scatter(x(g.size + 1), group=g),
        ValueError,
        r"x: dim 0 of shape \(\d,\) does not divide into \d.*sizes=",
    ),
    "scatter that does not divide": (
        lambda g: c.scatter(x(3, 2 * g.size - 1), dim=1, group=g),
        ValueError,
        r"x: dim 1 .*does not divide",
    ),
    "all_to_all that does not divide": (
        lambda g: c.all_to_all(x(g.size - 1), group=g),
        ValueError,
        r"x: .*input_splits=",
    ),
    "too few sizes": (
        _sized("all_gather", "sizes", lambda n: [2] * (n - 1)),
        ValueError,
        r"sizes: expected one per rank, \d, got \d: \[",
    ),
    "too many sizes": (
        _sized("reduce_scatter", "sizes", lambda n: [2] * n + [0]),
        ValueError,
        r"sizes: expected one per rank",
    ),
    "sizes an int": (
        _sized("scatter", "sizes", lambda n: 2),
        TypeError,
        r"sizes: expected a sequence of \d ints, got 2",
    ),
    "sizes a string": (
        _sized("gather", "sizes", lambda n: "2" * n),
        TypeError,
        r"sizes: expected a sequence of .*got '2",
    ),
    "sizes of floats": (
        _sized("all_gather", "sizes", lambda n: [2.0] * n),
        TypeError,
        r"sizes: expected ints, got \[2\.0",
    ),
    "negative sizes": (
        _sized("scatter", "sizes", lambda n: [2 * n + 2, *[0] * (n - 2), -2]),
        ValueError,
        r"sizes: must not be negative.*-2",
    ),
    "sizes that lie about this rank": (
        _sized("all_gather", "sizes", lambda n: [3] * n),
        ValueError,
        r"sizes: \[3.*but dim 0 of x has \d",
    ),
    "sizes that do not add up": (
        _sized("reduce_scatter", "sizes", lambda n: [1] * n),
        ValueError,
        r"sizes: \[1.* add up to \d, but dim 0 of x has \d",
    ),
    "input splits that do not add up": (
        _sized("all_to_all", "input_splits", lambda n: [3] * n),
        ValueError,
        r"input_splits: \[3.* add up to",
    ),
    "output splits alone": (
        _sized("all_to_all", "output_splits", lambda n: [2] * n),
        ValueError,
        r"output_splits: given without input_splits",
    ),
    "too few input splits": (
        _sized("all_to_all", "input_splits", lambda n: [2] * (n - 1)),
        ValueError,
        r"input_splits: expected one per rank",
    ),
    "negative output splits": (
        _sized("all_to_all", "output_splits", lambda n: [-1] * n, input_splits=None),
        ValueError,
        r"output_splits: must not be negative",
    ),
    "splits that disagree about this rank": (
        lambda g: c.all_to_all(x(2 * g.size), input_splits=[2] * g.size, output_splits=[3] * g.size, group=g),
        ValueError,
        r"output_splits: expects 3 from this rank itself, but input_splits sends it 2",
    ),
    # destinations
    "out of another shape": (
        _function("all_reduce", x(2, 3), out=x(3, 2)),
        ValueError,
        r"out: expected shape \(2, 3\), got \(3, 2\)",
    ),
    "out of all_gather too small": (
        lambda g: c.all_gather(x(2), out=x(2), group=g),
        ValueError,
        r"out: expected shape \(\d+,\), got \(2,\)",
    ),
    "out of another dtype": (
        _function("broadcast", x(2), out=x(2).double()),
        TypeError,
        r"out: expected dtype torch.float32, got torch.float64",
    ),
    "out no tensor": (_function("all_reduce", x(2), out=[0, 0]), TypeError, r"out: expected a torch.Tensor, got list"),
    "out expanded": (_function("all_reduce", x(3), out=x(1).expand(3)), ValueError, r"out: .*share memory"),
    "out overlapping itself": (
        _function("all_reduce", x(4, 3), out=x(6).unfold(0, 3, 1)),
        ValueError,
        r"out: .*share memory",
    ),
    "out requires grad": (_function("all_reduce", x(2), out=x(2).requires_grad_()), ValueError, r"out: .*grad"),
    "recv into an expanded tensor": (_function("recv", x(1).expand(3), 0), ValueError, r"x: .*share memory"),
    "like of another dtype": (
        _function("sendrecv", x(2), dst=0, src=0, like=x(2).long()),
        TypeError,
        r"like: expected dtype torch.float32.*int64",
    ),
    "like no tensor": (_function("sendrecv", x(2), dst=0, src=0, like=(2,)), TypeError, r"like: .*got tuple"),
    # groups
    "group a list of ranks": (
        lambda g: c.all_reduce(x(2), group=[0, 1]),
        TypeError,
        r"group: expected a commlayer Group, got list",
    ),
    "group of nobody": (lambda g: g.new_group([]), ValueError, r"ranks: .*at least one"),
    "group beyond the world": (lambda g: g.new_group([0, g.size]), ValueError, r"ranks: expected 0 to \d, got \["),
    "group with a rank twice": (
        lambda g: g.new_group([0, 0]),
        ValueError,
        r"ranks: each rank at most once, got \[0, 0\]",
    ),
    "group of floats": (lambda g: g.new_group([0.0]), TypeError, r"ranks: expected ints, got \[0\.0\]"),
    "color a string": (lambda g: g.split("red"), TypeError, r"color: expected an int or None, got 'red'"),
    "key a float": (lambda g: g.split(0, key=1.5), TypeError, r"key: expected an int, got 1\.5"),
    "explain something unknown": (
        lambda g: g.explain("allreduce"),
        ValueError,
        r"op: expected one of all_reduce.*got 'allreduce'",
    ),
    # objects
    "too few objects": (
        lambda g: c.scatter_object([1] * (g.size - 1), src=g.rank, group=g),
        ValueError,
        r"values: expected one per rank, \d, got \d",
    ),
    "objects in a string": (
        lambda g: c.scatter_object("abcd", src=g.rank, group=g),
        TypeError,
        r"values: expected a sequence.*got str",
    ),
    "another backend at once": (
        lambda g: c.init("nosuch"),
        ValueError,
        r"backend: already running on \w+, asked for nosuch",
    ),
    "backend a number": (lambda g: c.init(3), TypeError, r"backend: expected a name, got 3"),
    "no time at all": (
        lambda g: c.init(timeout=0),
        ValueError,
        r"timeout: expected a positive number of seconds, got 0",
    ),
}
CASES = {name: Refused(*case) for name, case in _TABLE.items()}


def still_works(g: c.Group) -> None:
    """Every rank has sent nothing that another one could take for something else."""
    assert c.all_reduce(torch.tensor(g.rank + 1), group=g).item() == g.size * (g.size + 1) // 2
    assert c.all_gather(torch.tensor([g.rank]), group=g).tolist() == list(range(g.size))
