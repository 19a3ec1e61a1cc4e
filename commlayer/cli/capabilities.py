"""``commlayer capabilities``: what is native, what is emulated and at what cost, without starting a rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from commlayer import bootstrap
from commlayer.backends.torch_native import DEVICE_OF
from commlayer.capability import (
    DTYPES,
    LAYOUTS,
    OPS,
    REDUCING,
    SPLITTABLE,
    CapabilitySet,
    Request,
    load_profile,
    requests,
    shipped_profiles,
)
from commlayer.cli.backends import capability_set
from commlayer.cli.console import console, print_json, write
from commlayer.cli.matrix import Cell, show
from commlayer.errors import UnsupportedOperation
from commlayer.group import Explanation
from commlayer.launch import Launch, discover
from commlayer.planner import plan
from commlayer.reduce_op import NAMES as REDUCE_NAMES
from commlayer.reduce_op import meaningless
from commlayer.settings import Settings


def main(
    backend: Annotated[
        str, typer.Option(envvar="COMMLAYER_BACKEND", help="Whose capabilities; auto is what several ranks would use.")
    ] = "auto",
    profile: Annotated[
        str | None,
        typer.Option(envvar="COMMLAYER_PROFILE", help="A profile, by name or file; with --backend, replayed on it."),
    ] = None,
    disable: Annotated[
        str, typer.Option(envvar="COMMLAYER_DISABLE", help="Do without these, as all_to_all,all_reduce:avg@bfloat16.")
    ] = "",
    ranks: Annotated[int, typer.Option("-n", "--ranks", min=2, help="How many ranks plans are made for.")] = 4,
    device: Annotated[str, typer.Option(help="cpu, cuda or xpu; if not given, the backend's.")] = "",
    explain: Annotated[str, typer.Option(metavar="OP", help="Show how one operation is done, and why.")] = "",
    dtype: Annotated[str, typer.Option(help="One dtype only, as bfloat16 (for --explain: float32).")] = "",
    reduce: Annotated[str, typer.Option(help="One reduce op only, as avg (for --explain: sum).")] = "",
    uneven: Annotated[bool, typer.Option("--uneven", help="Ranks' extents differ.")] = False,
    list_profiles: Annotated[bool, typer.Option("--list", help="List the shipped profiles.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show which operations a backend does natively, and which the layer emulates at what cost."""
    if list_profiles:
        return _list(as_json)
    dtype = dtype.removeprefix("torch.")
    _check("--dtype", dtype, DTYPES)
    _check("--reduce", reduce, REDUCE_NAMES)
    _check("--explain", explain, OPS)
    _check("--device", device, ("cpu", "cuda", "xpu"))
    name = backend.lower()
    if name == "auto":
        name = load_profile(profile).backend or "any" if profile else _automatic()
    capabilities = capability_set(name, Settings(profile=profile, disable=disable))
    device = device or DEVICE_OF.get(name, "cpu")
    layout = LAYOUTS[uneven]
    if explain:
        return _explain(capabilities, name, ranks, _request(explain, reduce, dtype, device, layout), as_json)
    cells = [
        _cell(capabilities, ranks, request)
        for request in requests(device)
        if request.layout == (layout if request.op in SPLITTABLE else "even")
        and (not dtype or request.dtype == DTYPES[dtype] or request.op == "barrier")
        and (not reduce or request.reduce in (reduce, None))
    ]
    head = {
        "backend": name,
        "profiles": [profile.name for profile in capabilities.profiles],
        "disabled": disable,
        "ranks": ranks,
        "device": device,
        "layout": layout,
    }
    if as_json:
        return print_json({**head, "requests": [cell.to_dict() for cell in cells]})
    show(head, cells)


def _check(option: str, value: str, known: Any) -> None:
    if value and value not in known:
        raise ValueError(f"{option} {value}: expected one of {', '.join(known)}")


def _automatic() -> str:
    """The backend of a program of several ranks, whether or not this process is one of them."""
    launch = discover()
    return bootstrap.choose(launch if launch.launcher != "none" else Launch("torchrun", 0, 2))


def _request(op: str, reduce: str, dtype: str, device: str, layout: str) -> Request:
    if op not in REDUCING and reduce:
        raise ValueError(f"--reduce {reduce}: {op} does not reduce")
    if op not in SPLITTABLE and layout == "uneven":
        raise ValueError(f"--uneven: in {op}, all ranks bring the same extent")
    request = Request(op, None, DTYPES[dtype or "float32"], device, layout)
    if op == "barrier":
        return request._replace(dtype=DTYPES["uint8"])
    if op in REDUCING:
        request = request._replace(reduce=reduce or "sum")
        why = meaningless(reduce or "sum", request.dtype)
        if why:
            raise ValueError(f"{request}: {why}")
    return request


def _cell(capabilities: CapabilitySet, ranks: int, request: Request) -> Cell:
    found = plan(capabilities, ranks, request)
    if found is None:
        return Cell(request, "absent")
    if not found.emulated:
        return Cell(request, "native", 1.0)
    return Cell(request, "emulated", Explanation(found, ranks, "").ratio)


def _explain(capabilities: CapabilitySet, name: str, ranks: int, request: Request, as_json: bool) -> None:
    found = plan(capabilities, ranks, request)
    if found is None:
        status, source = capabilities.status(request)
        raise UnsupportedOperation(
            f"{request} on backend {name}: {status} ({source}), and no chain of fallbacks ends in native operations"
        )
    explanation = Explanation(found, ranks, name)
    if as_json:
        return print_json(explanation.to_dict())
    console().print(Text(str(explanation)), soft_wrap=True)


def _list(as_json: bool) -> None:
    profiles = [replace(load_profile(name), name=name) for name in shipped_profiles()]
    if as_json:
        return print_json([{"name": p.name, "backend": p.backend, "summary": p.summary} for p in profiles])
    grid = Table.grid(padding=(0, 2, 1, 0))
    grid.add_column(no_wrap=True, style="bold")
    for profile in profiles:
        grid.add_row(profile.name, Text(profile.summary))
    write(grid)
