"""From a configuration to what a run is made of: fields, mesh, model. Each refuses what it cannot use by its key."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path

import torch

from commlayer import Group, Mesh
from models import checkpoint
from models import config as configuration
from models.config import Config
from models.data.era5 import era5_pairs
from models.data.fields import FieldPairs, netcdf_pairs
from models.data.synthetic import synthetic_pairs
from models.vit import SIZES, ViT, ViTConfig
from parallel.rng import Streams

SOURCES: dict[str, Callable[..., tuple[FieldPairs, FieldPairs]]] = {
    "netcdf": netcdf_pairs,
    "era5": era5_pairs,
    "synthetic": synthetic_pairs,
}
LOADING = {"workers": 0, "prefetch": 2}  # of `data`, for every source

AXES = ("dp", "cp", "tp")

CHECKPOINTS = "checkpoints"  # the folder in that of the output


def load_data(config: Config) -> tuple[FieldPairs, FieldPairs]:
    """The training and the validation pairs that ``config.data`` describes."""
    settings = dict(config.data)
    source = settings.pop("source", None)
    if source not in SOURCES:
        raise ValueError(f"data.source: expected one of {', '.join(SOURCES)}, got {source!r}")
    parameters = inspect.signature(SOURCES[source]).parameters.values()
    known = {p.name: None if p.default is p.empty else p.default for p in parameters}
    settings = configuration.section(settings, known | LOADING, "data.")
    for p in parameters:
        if p.default is p.empty and p.name not in settings:
            raise ValueError(f"data.{p.name}: missing; source {source} needs it")
    train, validation = SOURCES[source](**{key: value for key, value in settings.items() if key not in LOADING})
    if config.variable and config.variable not in train.channels:
        raise ValueError(f"variable: expected one of {', '.join(train.channels)}, got {config.variable!r}")
    return train, validation


def build_mesh(config: Config, group: Group) -> Mesh:
    """The ranks of ``group`` along dp, cp and tp; an axis that ``config.mesh`` leaves out has size 1."""
    named = [size.partition("=")[0] for size in config.mesh.split()]
    if wrong := [axis for axis in named if axis not in AXES]:
        raise ValueError(f"mesh: the axes are {', '.join(AXES)}; got {wrong[0]!r} in {config.mesh!r}")
    spec = " ".join([config.mesh, *(f"{axis}=1" for axis in AXES if axis not in named)])
    return Mesh(spec, config.order or None, group)


def build_model(config: Config, data: FieldPairs, mesh: Mesh | None = None, streams: Streams | None = None) -> ViT:
    """The ViT that ``config.model`` describes, for these data: this rank's part of it on a mesh.

    All parts together are the same model as without a mesh, bit for bit.
    """
    shape = {"grid": data.grid, "in_channels": data.in_channels, "out_channels": len(data.channels)}
    known = {field.name: field.default for field in dataclasses.fields(ViTConfig) if field.name not in shape}
    settings = configuration.section(config.model, known | {"size": "", "patch": None}, "model.")
    size = settings.pop("size", "demo")
    if size not in SIZES:
        raise ValueError(f"model.size: expected one of {', '.join(SIZES)}, got {size!r}")
    made = ViTConfig.named(size, **settings, **shape)
    if config.compile and made.dropout:
        raise ValueError(f"compile: with model.dropout {made.dropout} it cannot be; model.drop_path can")
    torch.manual_seed(config.seed)
    return ViT(
        made,
        mesh,
        streams=streams,
        sequence_parallel=config.sequence_parallel,
        context=config.context,
        recompute=config.recompute,
    )


def find_checkpoint(config: Config, mesh: Mesh) -> Path | None:
    """Where the run goes on from, if anywhere; ValueError for one of another run, and if it would mix up two runs."""
    last = checkpoint.newest(Path(config.output) / CHECKPOINTS)
    found = None
    if config.resume == "auto":
        found = last
    elif config.resume:
        given = Path(config.resume)
        found = given if (given / "about.json").exists() else checkpoint.newest(given / CHECKPOINTS)
        if found is None:
            raise ValueError(f"resume: no checkpoint in {given}")
    if last is not None and (found is None or found.resolve() != last.resolve()):
        raise ValueError(
            f"output: {last} is there from an earlier run; go on from it with --resume, choose another output, or "
            "delete it"
        )
    if found is not None:
        there = checkpoint.about(found)
        wrong = configuration.differences(dataclasses.asdict(config), there["config"])
        if there["mesh"] != repr(mesh):
            wrong.insert(0, f"mesh is {mesh!r} here and {there['mesh']} there")
        if wrong:
            raise ValueError(f"resume: {found} belongs to another run: {'; '.join(wrong)}")
    return found
