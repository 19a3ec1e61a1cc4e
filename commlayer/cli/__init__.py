"""The ``commlayer`` command; one module per subcommand."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer

from commlayer import __version__
from commlayer.cli import bench, capabilities, demo, doctor, job, launch, probe, trace
from commlayer.cli.console import print_error
from commlayer.errors import CommError


class OneLineErrors(typer.core.TyperGroup):
    """What the layer itself reports is news for the user, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:  # wrong settings, profiles, names
            print_error(str(error))
            raise typer.Exit(2) from error
        except CommError as error:
            print_error(str(error))
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("doctor")(doctor.main)
app.command("capabilities")(capabilities.main)
app.command("probe")(probe.main)
app.command("launch", context_settings={"allow_interspersed_args": False})(launch.main)
app.command("bench")(bench.main)
app.command("demo", context_settings={"allow_interspersed_args": False})(demo.main)
app.add_typer(job.app, name="job")
app.add_typer(trace.app, name="trace")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"commlayer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One communication layer for PyTorch, on NCCL, XCCL, Gloo and MPI."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without ● or ✗ shows their codes
