"""What the trainer, its reports and its results have to be told about what is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

import commlayer
from commlayer import Mesh
from models.config import Config
from models.data.loading import Batch, Samples
from parallel.amp import autocast
from parallel.rng import Streams


class Loss(NamedTuple):
    """Of this rank's part of a micro-batch, both with gradient.

    ``total``: the sum over what is counted. ``part``: a term of a sum over ranks that is a mean over the micro-batch
    already, such as the losses that balance experts; None: there is none.
    """

    total: Tensor
    part: Tensor | None = None


class Task(ABC):
    """One model on one kind of data; made and used on all ranks alike.

    Scores are of a type of the task's own, which nobody else looks into.

    Args:
        data: the training and the validation samples.
        experts: the same ranks as ``mesh``, folded for experts.
        streams: the random numbers that the model draws from.
    """

    name: ClassVar[str]  # of the model, in tables
    unit: ClassVar[str]  # what is counted, for losses and speed
    no_skill: ClassVar[str]  # what to say about a model that its simple rivals beat
    summed_over: ClassVar[str]  # axes whose ranks' losses add up to that of a micro-batch
    per_sample = 1  # so many of the unit
    leaves_meta = False  # a model from the meta device gets the same values by its reset_parameters()

    def __init__(
        self, config: Config, data: tuple[Samples, Samples], mesh: Mesh, experts: Mesh, streams: Streams
    ) -> None:
        self.config, (self.data, self.validation) = config, data
        self.device, self.group = commlayer.world().device, mesh[self.summed_over]
        if config.zero == 3 and self.leaves_meta:
            with torch.device("meta"):
                self.model = self.build(mesh, experts, streams)
        else:
            self.model = self.build(mesh, experts, streams).to(self.device)

    @staticmethod
    @abstractmethod
    def load(config: Config) -> tuple[Samples, Samples]:
        """The training and the validation samples; the same on all ranks."""

    @abstractmethod
    def build(self, mesh: Mesh, experts: Mesh, streams: Streams) -> nn.Module:
        """This rank's part of the model; all parts together are the same one on any mesh."""

    # Training ----------------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Before a run begins, or goes on: returns the scores of its rivals, which need no training, on these batches.

        Collective.
        """

    def run(self, model: nn.Module, *inputs: Tensor) -> Any:
        """``model(*inputs)``, in the precision that is configured."""
        with autocast(self.config.amp, self.device.type):
            return model(*inputs)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Of a micro-batch, perhaps of no samples. ``model``: the very one, or a wrapper of it."""

    def stepped(self) -> None:  # noqa: B027
        """After each step of the optimizer."""

    def compilable(self) -> Sequence[nn.Module]:
        """The modules that are compiled, each by itself, where that is asked for."""
        return ()

    def rates(self, per_second: float) -> dict[str, float]:
        """How fast it goes, at so many of the unit in a second over all ranks."""
        return {f"{self.unit}_per_second": per_second}

    def state_dict(self) -> dict[str, Any]:
        """What it keeps beside the model, for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        pass

    # How good it is ----------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, batches: Iterable[Batch]) -> Any:
        """How good the model is on the validation batches, over all ranks. Collective."""

    @abstractmethod
    def entry(self, score: Any) -> dict[str, Any]:
        """What the history keeps of a validation; called once for each."""

    # What is shown and kept --------------------------------------------------------------------------------

    @abstractmethod
    def describe(self) -> str:
        """What it is trained on, for the headline."""

    @abstractmethod
    def line(self, entry: dict[str, Any], rivals: dict[str, Any]) -> str:
        """An entry of the history in a few words."""

    @abstractmethod
    def scalars(self, score: Any) -> dict[str, float]:
        """What TensorBoard gets of a validation."""

    def histograms(self) -> dict[str, Sequence[int]]:
        """And how often each of 0, 1, … came up since the validation before."""
        return {}

    @abstractmethod
    def metrics(self, scores: dict[str, Any]) -> dict[str, Any]:
        """What metrics.json gets beside what all tasks have; ``scores`` of the model, by its name, and of its rivals.

        ``skill`` is above 0 where the model is better than the rival that counts.
        """

    @abstractmethod
    def table(self, metrics: dict[str, Any]) -> Table:
        """The scores side by side."""

    @abstractmethod
    def write(self, folder: Path | None, metrics: dict[str, Any]) -> None:
        """Pictures and samples; all ranks take part, and only rank 0 gets the folder."""
