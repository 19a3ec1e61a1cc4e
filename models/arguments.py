"""The command line of the trainer: ``key=value`` for every key, and named options for those one changes most."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """What was asked for; ``options`` are configuration keys with their values, and win over ``overrides``."""

    config: str
    overrides: list[str]
    options: dict[str, Any]


def parse(arguments: Sequence[str] | None = None) -> Arguments:
    """Read the command line, by default that of the process. Exits with status 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m models.train",
        description="Train a ViT to forecast gridded fields, or a language model on text, on any number of ranks.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", default="demo", help="a YAML file, or the name of a shipped configuration")
    parser.add_argument("--output", help="folder for the results")
    parser.add_argument("--mesh", metavar="SPEC", help='e.g. "dp=2 cp=1 tp=2"; one size may be -1')
    parser.add_argument("--order", help="axes of the mesh, the fastest first: tp-cp-dp")
    parser.add_argument(
        "--experts", metavar="SPEC", help='the same ranks as experts are spread over them: "ep=4 etp=1"'
    )
    parser.add_argument("--zero", type=int, help="share out optimiser state (1), gradients (2), parameters (3) over dp")
    parser.add_argument("--offload", help="where the optimiser's state is, with --zero: none, cpu or disk")
    parser.add_argument("--amp", help="mixed precision: none, bf16 or fp16")
    parser.add_argument("--compile", action="store_true", help="run the blocks of the model through torch.compile")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FOLDER",
        help="go on from a checkpoint; without FOLDER from the newest in the output folder, if there is one",
    )
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="steps between checkpoints")
    parser.add_argument("--keep", type=int, metavar="COUNT", help="how many of the newest checkpoints stay")
    parser.add_argument("--require-skill", action="store_true", help="exit status 1 unless it beats its rival")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. epochs=5 optimizer.lr=1e-3")
    options = vars(parser.parse_intermixed_args(arguments))
    config, overrides = options.pop("config"), list(options.pop("overrides", ()))
    if "=" in options.get("resume", ""):  # `--resume epochs=5`: no folder, but what comes next
        overrides.insert(0, options["resume"])
        options["resume"] = "auto"
    return Arguments(config, overrides, options)
