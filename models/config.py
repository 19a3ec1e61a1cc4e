"""Configuration of a training run: a YAML file, overrides ``key=value``, and errors that name the key."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "configs"

CHOICES = {
    "task": ("forecast", "language"),
    "amp": ("none", "bf16", "fp16"),
    "context": ("ring", "all_gather", "ulysses"),
    "recompute": ("none", "selective", "full"),
    "zero": (0, 1, 2, 3),
    "offload": ("none", "cpu", "disk"),
}

# Keys that only one task reads: with another they keep their defaults.
ONLY = {"forecast": ("latitude_weighted", "variable"), "language": ("experts",)}

# What may change when a run goes on from a checkpoint: where things are, how the model is spread and computed, and what
# is shown and kept. Any other key shapes the numbers, and not by rounding alone.
FREE = (
    *("name", "output", "resume", "variable", "require_skill"),
    *("threads", "mesh", "order", "experts", "sequence_parallel", "context", "recompute", "compile"),
    *("zero", "offload", "replicas", "bucket_mb"),
    *("log_every", "validate_every", "validate_steps", "save_every", "keep"),
    *("data.workers", "data.prefetch", "data.root", "data.files"),
)


@dataclass
class Optimizer:
    """AdamW on a cosine schedule; ``warmup`` is a fraction of all steps, ``final`` one of the peak rate."""

    lr: float = 5e-4
    reference_batch: int = 0  # if set, the batch that lr is meant for: another one has lr · √(batch / reference_batch)
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup: float = 0.05
    final: float = 0.0
    clip: float = 1.0  # largest gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        if self.clip < 0:
            raise ValueError(f"optimizer.clip: must be at least 0, got {self.clip}")


@dataclass
class Config:
    """One training run.

    ``data`` has ``workers`` and ``prefetch`` (batches per worker), and

    - for forecasts: ``source`` (of ``models.tasks.forecast.SOURCES``) and the arguments of that source's function;
    - for language: the arguments of ``models.data.text.text_sequences``.

    ``model`` is ``size`` (of ``models.vit.SIZES`` or ``models.moe.SIZES``) and whatever differs from it. ``batch`` is
    global: the ranks share it.
    """

    task: str = "forecast"  # what is trained: forecast (a ViT, on fields) or language (a decoder, on bytes of text)
    name: str = "run"
    output: str = "runs/run"
    resume: str = ""  # a checkpoint, or the output folder of a run; auto: the newest in output, if there is one
    seed: int = 0
    threads: int = 0  # CPU threads per rank; 0: torch's choice
    tf32: bool = True  # float32 products in TF32, on GPUs that have it
    mesh: str = "dp=-1"  # sizes of the axes dp, cp and tp; -1: all ranks that are left
    order: str = ""  # of the axes, fastest first; "": tp-cp-dp
    experts: str = ""  # the same ranks as the experts see them, "ep=4 etp=1"; "": every rank has all experts
    sequence_parallel: bool = False
    context: str = "ring"  # attention over cp: ring, all_gather or ulysses
    zero: int = 0  # what dp ranks share out: 1 the optimiser's state, 2 gradients too, 3 parameters too; 0: nothing
    offload: str = "none"  # where the optimiser's state is: none (with the model), cpu or disk (output/offload)
    replicas: int = 1  # with zero: so many blocks of dp ranks, each of which has all of it
    recompute: str = "none"  # what backward computes again: none, full (blocks), selective (all but products)
    compile: bool = False
    amp: str = "none"  # mixed precision: none, bf16 or fp16
    epochs: int = 10
    steps: int = 0  # if set, the length of the run instead of epochs
    batch: int = 16
    accumulate: int = 1  # micro-batches per step: the same gradients in less memory
    log_every: int = 10  # steps; also how often SIGTERM is looked for
    validate_every: int = 1  # epochs
    validate_steps: int = 0  # if set, the steps between validations, instead of epochs
    save_every: int = 0  # steps between checkpoints; 0: only when SIGTERM ends the run
    keep: int = 2  # so many of the newest checkpoints stay
    latitude_weighted: bool = True  # loss and RMSE weighted by cos(latitude), the area of a grid cell
    variable: str = ""  # the channel for headlines and pictures; "": the first
    require_skill: bool = False  # exit status 1 unless it beats persistence, or the byte bigram
    bucket_mb: float = 25.0
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "log_every", "validate_every", "keep", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "save_every", "validate_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0, got {getattr(self, name)}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name in ("offload", "replicas"):
            if not self.zero and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}: is for zero 1, 2 or 3, and this is 0; got {getattr(self, name)!r}")
        for task, names in ONLY.items():
            for name in names:
                if task != self.task and getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name}: is for task {task}, and this is {self.task}; got {getattr(self, name)!r}"
                    )


def load(name: str, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None) -> Config:
    """Read a file by its path, or a shipped one by its bare name; apply ``a.b=value`` overrides, then ``options``."""
    tree = _parse_file(_find(name))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override: expected key=value, got {override!r}")
        _set(tree, key, _yaml().safe_load(value))
    tree |= options or {}
    if isinstance(tree.get("recompute"), bool):  # all or nothing, and how YAML reads yes and no
        tree["recompute"] = "full" if tree["recompute"] else "none"
    config: Config = typed(tree, Config(), "")
    return config


def dump(config: Config) -> str:
    """As YAML; :func:`load` reads it back."""
    return str(_yaml().safe_dump(asdict(config), sort_keys=False))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What of two configurations, as ``asdict`` makes them, keeps one from going on where the other stopped."""
    found = []
    for key in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b and prefix + key not in FREE:
            found.append(f"{prefix}{key} is {a!r} here and {b!r} there")
    return found


def section(given: Any, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a section, each of the type of its default (None: any).

    ValueError for a wrong type, and for a key that nobody reads, with the nearest one that somebody does.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{where.rstrip('.') or 'configuration'}: expected a section of keys, got {given!r}")
    for key in given:
        if key not in defaults:
            near = difflib.get_close_matches(str(key), defaults, 1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ValueError(f"unknown key '{where}{key}': {hint}known here: {', '.join(defaults)}")
    return {key: typed(value, defaults[key], where + key) for key, value in given.items()}


def arguments(
    function: Callable[..., Any], given: Any, where: str, others: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A section as the arguments of ``function``, which have the types of its defaults.

    ``others``: keys that may stand there too, with their defaults, and are left out. ValueError as of :func:`section`,
    and for a missing argument.
    """
    parameters = inspect.signature(function).parameters
    defaults = {name: None if p.default is p.empty else p.default for name, p in parameters.items()}
    settings = section(given, {**defaults, **(others or {})}, where)
    for name, p in parameters.items():
        if p.default is p.empty and name not in settings:
            raise ValueError(f"{where}{name}: missing, and it has no default")
    return {name: value for name, value in settings.items() if name in defaults}


def _find(name: str) -> Path:
    for path in (Path(name), SHIPPED / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
    raise FileNotFoundError(f"config: no file {name!r}, and no shipped configuration of this name ({shipped})")


def _parse_file(path: Path) -> dict[str, Any]:
    yaml = _yaml()
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(tree).__name__}")
    return tree


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override: '{parent}' in '{key}' is not a section")
    tree[last] = value


def typed(value: Any, default: Any, key: str) -> Any:
    """``value`` of the type of ``default``; of a dataclass, which a section may change, a copy with the changes."""
    if is_dataclass(default) and not isinstance(default, type):
        defaults = {f.name: getattr(default, f.name) for f in fields(default)}
        return replace(default, **section(value, defaults, f"{key}." if key else ""))
    if isinstance(default, float) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 3e-4, without a point, as text
        except (TypeError, ValueError):
            pass
    elif isinstance(default, (list, tuple)):
        if isinstance(value, list) and len(value) == len(default):
            return [typed(v, d, f"{key}[{i}]") for i, (v, d) in enumerate(zip(value, default, strict=True))]
    elif default is None or type(value) is type(default):
        return value
    expected = f"a list like {list(default)}" if isinstance(default, (list, tuple)) else type(default).__name__
    raise ValueError(f"{key}: expected {expected}, got {value!r}")


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError("configurations need PyYAML: pip install commlayer[train]") from None
    return yaml
