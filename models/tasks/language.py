"""To predict the next byte of text with a decoder, better than from the byte before alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

import commlayer
from commlayer import Mesh
from models import config as configuration
from models import plots
from models.config import Config
from models.data.loading import LOADING, Batch
from models.data.text import VOCABULARY, TextSequences, text, text_sequences
from models.devices import peak
from models.flops import flops_per_token
from models.generate import generate
from models.moe import SIZES, LanguageModel, LanguageModelConfig, Output
from models.ngrams import cross_entropies
from models.tasks.task import Loss, Task
from parallel.amp import autocast
from parallel.balance import LoadCounter
from parallel.rng import Streams

RIVAL = "byte bigram"  # the one that counts


def load_data(config: Config) -> tuple[TextSequences, TextSequences]:
    """The training and the validation sequences that ``config.data`` describes."""
    return text_sequences(**configuration.arguments(text_sequences, config.data, "data.", LOADING))


def model_config(config: Config) -> LanguageModelConfig:
    """What ``config.model`` describes: a size, and what differs from it."""
    settings = dict(config.model)
    size = settings.pop("size", "laptop")
    if size not in SIZES:
        raise ValueError(f"model.size: expected one of {', '.join(SIZES)}, got {size!r}")
    made: LanguageModelConfig = configuration.typed(settings, SIZES[size], "model")
    if made.vocab_size < VOCABULARY:
        raise ValueError(f"model.vocab_size: bytes and the end of a document make {VOCABULARY}, got {made.vocab_size}")
    if config.experts and not made.every:
        raise ValueError(f"experts: size {size} has none to spread, got {config.experts!r}")
    return made


def build_model(config: Config, mesh: Mesh | None = None, experts: Mesh | None = None) -> LanguageModel:
    """The language model that ``config`` describes: this rank's part of it on a mesh.

    All parts together are the same model as without a mesh, bit for bit.
    """
    made = model_config(config)
    torch.manual_seed(config.seed)
    return LanguageModel(
        made,
        mesh,
        experts,
        sequence_parallel=config.sequence_parallel,
        context=config.context,
        recompute=config.recompute,
    )


class LanguageModelling(Task):
    """Bytes from those before them. Losses are in nats per token, scores as well, and shown as bits per byte.

    What is counted: each prediction of a token by those before it in its sequence. The ends of documents are tokens
    like bytes, and predicted like them, by the model as by its rivals.
    """

    name, unit, summed_over = "LM", "tokens", "dp-cp"
    no_skill = "the model does not beat the byte bigram"
    leaves_meta = True

    model: LanguageModel
    data: TextSequences
    validation: TextSequences

    load = staticmethod(load_data)

    def __init__(
        self, config: Config, data: tuple[TextSequences, TextSequences], mesh: Mesh, experts: Mesh, streams: Streams
    ) -> None:
        super().__init__(config, data, mesh, experts, streams)
        self.per_sample = data[0].seq_len
        self.flops = flops_per_token(self.model.config, self.per_sample)
        self.layers = [i for i, block in enumerate(self.model.blocks) if hasattr(block, "moe")]
        self.counter = LoadCounter(self.model, experts["etp-ep-edp"]) if self.layers else None
        routing = self.model.config.routing
        # Choices of each expert, and dropped ones: of the steps since the last validation, and between the last two.
        shape = (len(self.layers), (routing.experts if routing else 0) + 1)
        self.since = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.loads = self.since.clone()

    def build(self, mesh: Mesh, experts: Mesh, streams: Streams) -> LanguageModel:
        return build_model(self.config, mesh, experts)

    # Training ----------------------------------------------------------------------------------------------

    def begin(self, batches: Iterable[Batch]) -> dict[str, float]:
        full = "tf32" if self.config.tf32 and self.device.type == "cuda" else "fp32"
        self.peak = peak(full if self.config.amp == "none" else self.config.amp, commlayer.world())
        last = len(self.validation) * self.per_sample  # the last token that the model predicts
        return cross_entropies(self.data.tokens, self.validation.tokens[: last + 1])

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        output: Output = self.run(model, *batch)
        if self.counter is None:
            return Loss(output.loss)
        self.counter.add(output.loads)
        return Loss(output.loss, torch.stack([load.loss for load in output.loads]).sum())

    def stepped(self) -> None:
        if self.counter is not None:
            totals = self.counter.step()  # which also moves the routers' biases
            self.since += torch.cat([totals.counts, totals.dropped[:, None]], 1)

    def compilable(self) -> Sequence[nn.Module]:
        # How many tokens an expert gets depends on the data, which no graph foresees.
        return [block.attention if hasattr(block, "moe") else block for block in self.model.blocks]

    def rates(self, per_second: float) -> dict[str, float]:
        return {"tokens_per_second": per_second, "mfu": per_second * self.flops / self.peak.flops}

    def state_dict(self) -> dict[str, Any]:
        return {"since": self.since, "loads": self.loads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.since.copy_(state["since"])
        self.loads.copy_(state["loads"])

    # How good it is ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, batches: Iterable[Batch]) -> float:
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for ids, targets in batches:
            total += self.run(self.model, ids, targets).loss
        return commlayer.all_reduce(total, group=self.group).item() / (len(self.validation) * self.per_sample)

    def entry(self, score: float) -> dict[str, Any]:
        self.loads, self.since = self.since, torch.zeros_like(self.since)
        return {"validation_loss": score, "bits_per_byte": score / math.log(2), **self._busy()}

    def _busy(self) -> dict[str, Any]:
        """How uneven the experts' loads were, layer by layer, and what share of all choices was dropped."""
        counts, dropped = self.loads[:, :-1].double(), self.loads[:, -1]
        if not counts.sum():
            return {}
        return {
            "busiest_over_mean": (counts.amax(1) / counts.mean(1)).tolist(),
            "drop_rate": (dropped.sum() / counts.sum()).item(),
        }

    # What is shown and kept --------------------------------------------------------------------------------

    def describe(self) -> str:
        sizes = [
            f"{len(part.tokens) / 1e6:.2f} MB of {part.documents} documents" for part in (self.data, self.validation)
        ]
        return f"{sizes[0]}, validated on {sizes[1]}, in sequences of {self.per_sample}"

    def line(self, entry: dict[str, Any], rivals: dict[str, float]) -> str:
        text = f"{entry['bits_per_byte']:.3f} bits per byte (bigram {rivals[RIVAL] / math.log(2):.3f})"
        if "drop_rate" in entry:
            busiest = max(entry["busiest_over_mean"])  # of the worst layer
            text += f"  busiest expert {busiest:.2f} × mean, {entry['drop_rate']:.1%} dropped"
        return text

    def scalars(self, score: float) -> dict[str, float]:
        values = {"validation/bits per byte": score / math.log(2)}
        if busy := self._busy():
            values["experts/drop rate"] = busy["drop_rate"]
            for layer, value in zip(self.layers, busy["busiest_over_mean"], strict=True):
                values[f"experts/busiest over mean, layer {layer}"] = value
        return values

    def histograms(self) -> dict[str, Sequence[int]]:
        return {f"experts/layer {layer}": counts for layer, counts in self._load_by_layer().items()}

    def _load_by_layer(self) -> dict[int, list[int]]:
        return dict(zip(self.layers, self.loads[:, :-1].tolist(), strict=True)) if self.loads.any() else {}

    def metrics(self, scores: dict[str, float]) -> dict[str, Any]:
        bits = {name: score / math.log(2) for name, score in scores.items()}
        found = {
            "bits_per_byte": bits,
            "skill": 1 - bits[self.name] / bits[RIVAL],
            "validation_loss": scores,
            "sequence_length": self.per_sample,
            "training_text": _about(self.data),
            "validation_text": _about(self.validation),
            "flops_per_token": self.flops,
            "peak_flops": self.peak.flops,
            "peak_source": self.peak.source,
        }
        if loads := self._load_by_layer():
            layers = {f"layer {layer}": counts for layer, counts in loads.items()}
            found["experts"] = {"load": layers, "dropped": self.loads[:, -1].tolist(), **self._busy()}
        return found

    def table(self, metrics: dict[str, Any]) -> Table:
        """Bits per byte, and the skill 1 - bits / bits of the bigram."""
        title = f"Bits per byte, {metrics['validation_samples'] * self.per_sample} predictions"
        table = Table(title=title, title_justify="left")
        table.add_column("model")
        table.add_column("bits per byte", justify="right")
        table.add_column(f"better than the {RIVAL} by", justify="right")
        for name, value in metrics["bits_per_byte"].items():
            skill = "" if name == RIVAL else f"{1 - value / metrics['bits_per_byte'][RIVAL]:+.1%}"
            table.add_row(name, f"{value:.3f}", skill, style="bold" if name == self.name else None)
        return table

    def write(self, folder: Path | None, metrics: dict[str, Any]) -> None:
        prompt, sample = self._sample()
        if folder is None:
            return
        (folder / "sample.txt").write_text(f"{prompt}\n\n── the model goes on ──\n\n{sample}\n", encoding="utf-8")
        rivals = {name: value for name, value in metrics["bits_per_byte"].items() if name != self.name}
        plots.loss_curve(
            folder / "loss.png",
            metrics["curve"],
            metrics["history"],
            rivals,
            key="bits_per_byte",
            name=self.name,
            loss="cross entropy [nats per token]",
            label="bits per byte",
        )
        if loads := self._load_by_layer():
            plots.expert_loads(folder / "load.png", loads, metrics["experts"]["drop_rate"])

    def _sample(self) -> tuple[str, str]:
        """The beginning of the validation text, and what the model makes of it."""
        known = max(self.per_sample // 4, 1)
        ids = torch.from_numpy(self.validation.tokens[:known].astype("int64"))[None].to(self.device)
        self.model.eval()
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        with autocast(self.config.amp, self.device.type):
            made = generate(self.model, ids, self.per_sample - known, temperature=0.8, generator=generator)
        tokens = made[0].tolist()
        return text(tokens[:known]), text(tokens[known:])


def _about(part: TextSequences) -> dict[str, int]:
    return {"documents": part.documents, "tokens": len(part.tokens), "left_over": part.left_over}
