"""``commlayer probe``: find out what a backend can do on this machine, by running it."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from commlayer.backends.process_groups import DEVICE_OF
from commlayer.capability import STATUSES, CapabilitySet, Profile, requests
from commlayer.cli.console import console, print_error, print_json, write
from commlayer.errors import BackendUnavailable
from commlayer.probe import SECONDS, incomplete, keep, probe, save

_EVERY = 10.0  # seconds between lines, where no terminal shows a bar
_SHOWN = 5  # names in a row, before the rest are counted
_STYLES = {"absent": "dim", "error": "", "crash": "red", "hang": "red"}


def main(
    backend: Annotated[str, typer.Option(help="gloo, mpi, nccl, xccl, ccl, or what an imported module registers.")],
    file: Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Also write the profile here.")] = None,
    ranks: Annotated[
        int | None, typer.Option("-n", "--ranks", min=2, help="How many ranks; if not given, 3, or as many GPUs.")
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import this first: a module that registers the backend."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Find out what a backend can do here, by running it and comparing values. Takes 4 minutes at most.

    Every operation, reduce op, dtype and layout runs over a sweep of sizes in child processes, which may hang or
    crash. The profile is kept in the user's cache folder, where jobs on this machine find it.
    """
    name = backend.lower()
    if name in ("single", "threads", "auto"):
        raise ValueError(f"--backend {name}: there is nothing to probe; name gloo, mpi, nccl, xccl, ccl or another")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so that the ranks end too
    if modules:
        sys.path.insert(0, "")  # as python -m has it
    begun = time.monotonic()
    with _progress() as progress:
        profile = probe(name, ranks=ranks, modules=modules or (), progress=progress)
    seconds = time.monotonic() - begun
    kept = None
    try:
        kept = keep(profile)
    except OSError as error:
        print_error(f"the profile cannot be kept: {error}")
    if file is not None:
        try:
            save(file, profile)
        except OSError as error:
            raise BackendUnavailable(f"--save {file}: {error.strerror}") from error
    found = CapabilitySet((profile,))
    counts = Counter(found.status(request)[0] for request in requests(DEVICE_OF.get(name, "cpu")))
    if as_json:
        head = {"backend": name, "seconds": round(seconds, 1), "complete": not incomplete(profile)}
        where = {"kept": kept and str(kept), "saved": file and str(file)}
        return print_json({**head, **where, "requests": counts, "profile": json.loads(profile.to_json())})
    _show(profile, seconds, counts, kept, file)


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, else a line now and then; both on stderr."""
    out = console(stderr=True)
    if out.is_terminal:
        columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=out, transient=True) as bar:
            task = bar.add_task("starting", total=None)
            yield lambda done, total, now: bar.update(task, completed=done, total=total, description=now)
        return
    last = time.monotonic()

    def say(done: int, total: int, now: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            sys.stderr.write(f"probed {done} of {total}, now {now}\n")
            sys.stderr.flush()

    sys.stderr.write(f"probing, {SECONDS:g} s at most\n")
    yield say


def _show(profile: Profile, seconds: float, counts: Counter[str], kept: Path | None, file: Path | None) -> None:
    total = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    how = ", ".join(profile.sources.values())
    lines = [Text.assemble((profile.backend, "bold"), f", {how}, in {seconds:.0f} s"), Text(f"{total}\n")]
    for rule in profile.rules:
        if rule.status != "native":
            columns = (rule.ops, rule.reduce, rule.dtypes, rule.layouts if rule.layouts != {"even"} else None)
            what = ", ".join(filter(None, map(_names, columns)))
            lines.append(Text.assemble((f"{rule.status:<14}", _STYLES.get(rule.status, "yellow")), what))
            lines.append(Text(f"{'':14}{rule.note}", "dim"))
    lines.append(Text())
    if incomplete(profile):
        lines.append(Text(f"The {SECONDS:g} s did not suffice for all of it: the rest counts as absent.", "yellow"))
    write(*lines)
    for path in filter(None, (kept, file)):
        print(f"Written to {path}", flush=True)  # plain, so that it is never folded
    if kept or file:
        print(f"commlayer capabilities --profile {file or kept} shows what the layer makes of it.", flush=True)


def _names(values: frozenset[str] | None) -> str:
    names = sorted(values or ())
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN + 1 else ""
    return " ".join(names[: _SHOWN if rest else None]) + rest
