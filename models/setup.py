"""From a configuration to where a run happens and goes on. Each refuses what it cannot use by its key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from commlayer import Group, Mesh
from models import config as configuration
from models.config import Config
from models.tasks.forecast import Forecasting
from models.tasks.language import LanguageModelling
from models.tasks.task import Task
from parallel import checkpoint

TASKS: dict[str, type[Task]] = {"forecast": Forecasting, "language": LanguageModelling}

AXES = ("dp", "cp", "tp")

CHECKPOINTS = "checkpoints"  # the folder in that of the output


def build_meshes(config: Config, group: Group) -> tuple[Mesh, Mesh]:
    """The ranks of ``group`` along dp, cp and tp, and the same ranks along etp, ep and edp, as experts see them.

    An axis that ``config.mesh`` leaves out has size 1, and so has ep.
    """
    named = [size.partition("=")[0] for size in config.mesh.split()]
    if wrong := [axis for axis in named if axis not in AXES]:
        raise ValueError(f"mesh: the axes are {', '.join(AXES)}; got {wrong[0]!r} in {config.mesh!r}")
    spec = " ".join([config.mesh, *(f"{axis}=1" for axis in AXES if axis not in named)])
    mesh = Mesh(spec, config.order or None, group)
    return mesh, mesh.fold(config.experts or "ep=1")


def find_checkpoint(config: Config, group: Group) -> Path | None:
    """Where the run goes on from, if anywhere: a checkpoint whose files are as they were written. Collective.

    ValueError for one of another run, and if it would mix up two runs; a warning for each that is broken.
    """
    last = checkpoint.last_good(Path(config.output) / CHECKPOINTS, group=group)
    found = None
    if config.resume == "auto":
        found = last
    elif config.resume:
        given = Path(config.resume)
        if (given / CHECKPOINTS).is_dir():
            found = checkpoint.last_good(given / CHECKPOINTS, group=group)
        elif given.is_dir():
            checkpoint.verify(given)
            found = given
        if found is None:
            raise ValueError(f"resume: no checkpoint in {given}")
    if last is not None and (found is None or found.resolve() != last.resolve()):
        raise ValueError(
            f"output: {last} is there from an earlier run; go on from it with --resume, choose another output, or "
            "delete it"
        )
    if found is not None:
        about = checkpoint.read_about(found)
        if "config" not in about:
            raise ValueError(f"resume: {found} is not of a run of this command")
        if wrong := configuration.differences(dataclasses.asdict(config), about["config"]):
            raise ValueError(f"resume: {found} belongs to another run: {'; '.join(wrong)}")
    return found
