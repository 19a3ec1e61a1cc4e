"""Random numbers on a mesh: the same on ranks that hold the same value, others on ranks that hold different ones.

A :class:`Stream` is a seed, made of the job's seed, some axes and this rank's coordinates along them, and a counter.
Each draw takes a generator that is seeded with the two, so a stream has no other state: checkpoints store one number,
recomputation sets it back, and a compiled graph carries it as a tensor that it changes. Which stream where:

=====================  ============================================================================================
``along("dp")``        what drops whole samples: :class:`DropPath`
``along("dp-cp")``     tokens outside tensor-parallel regions: alike over tp, whose ranks hold the same tokens
``along("dp-cp-tp")``  inside these regions, and under sequence parallelism: every rank holds numbers of its own
=====================  ============================================================================================
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commlayer import Mesh, UnsupportedOperation

_REPLAYING: ContextVar[bool] = ContextVar("replaying", default=False)  # within the recomputation of a checkpoint


class Stream:
    """Numbers that are the same on all ranks with the same coordinates; made by :meth:`Streams.along`."""

    def __init__(self, axes: str, seed: int) -> None:
        self.axes = axes
        # And how often was drawn: a tensor, for compiled graphs, on the CPU also under another default device.
        self.state = torch.tensor([seed, 0], device="cpu")

    @property
    def draws(self) -> int:
        """How often was drawn so far: all that there is to know about the stream's position."""
        return int(self.state[1])

    @draws.setter
    def draws(self, value: int) -> None:
        self.state[1] = value

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Inside, torch's default generators (CPU and the current accelerator) draw from this stream.

        Afterwards they go on where they were, also after an exception. Forks nest, and each draws other numbers. Not
        inside compiled functions (around them it works), nor on several ranks of ``run_local`` at a time: threads
        share the default generators.
        """
        if torch.compiler.is_compiling():
            raise UnsupportedOperation(
                "Stream.fork inside a compiled function: a graph cannot swap the states of generators; use "
                "parallel.Dropout, or dropout=0 for attention weights"
            )
        seed, before = _take(self.state), _default_states()
        _set_default_states({device: torch.Generator(device).manual_seed(seed).get_state() for device in before})
        try:
            yield
        finally:
            _set_default_states(before)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stream:
        return self  # a copied module draws from the same stream

    def __repr__(self) -> str:
        return f"Stream({self.axes!r}, seed={int(self.state[0])}, draws={self.draws})"


class Streams:
    """The streams of one job on this rank of ``mesh``; without a mesh, of a single process.

    ``seed`` is the same on all ranks. Ranks at different coordinates of pp never share numbers.
    """

    def __init__(self, seed: int, mesh: Mesh | None = None) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {seed!r}")
        # Axes of size 1 change nothing, so a job with them and one without them draw the same numbers.
        self._sizes = {} if mesh is None else {axis: size for axis, size in sorted(mesh.sizes.items()) if size > 1}
        self._place = {} if mesh is None else {axis: mesh.rank(axis) for axis in self._sizes}
        self._seed = seed
        self._streams: dict[str, Stream] = {}

    def along(self, axes: str) -> Stream:
        """The stream that differs between ranks with different coordinates on ``axes``, as ``"dp-cp"``.

        One and the same object each time. Axes that the mesh lacks count as of size 1.
        """
        if not isinstance(axes, str) or not re.fullmatch(r"\w+(-\w+)*", axes):
            raise ValueError(f"axes: expected names joined by '-', such as 'dp-cp', got {axes!r}")
        names = sorted({*axes.split("-"), "pp"})
        name = "-".join(names)
        if name not in self._streams:
            place = [(axis, self._place.get(axis, 0)) for axis in names]
            self._streams[name] = Stream(name, _mix(self._seed, *place))
        return self._streams[name]

    def state_dict(self) -> dict[str, Any]:
        """All positions on this rank, and the states of torch's default generators; ``torch.save`` takes it."""
        return {**self._identity(), "draws": self._positions(), "default": _default_states()}

    def load_state_dict(self, state: Mapping[str, Any], *, moved: bool = False) -> None:
        """Go on with the very numbers that would have followed ``state_dict()``.

        ``moved``: the state may be of another mesh and rank. Streams go on where that rank's were, so that no numbers
        come again, and the default generators as on that rank.

        Raises ValueError, and changes nothing, for the state of another seed, and unless ``moved`` for that of another
        mesh or rank, of a model without one of the streams in use, or of an accelerator that is not here.
        """
        expected = {**self._identity(), "draws": {}, "default": {}}
        if set(state) != set(expected):
            raise ValueError(f"state: expected the keys {', '.join(expected)}, got {', '.join(map(str, state))}")
        for key, here in self._identity().items():
            if state[key] != here and not (moved and key != "seed"):
                raise ValueError(f"state: saved with {key} {state[key]}, but here it is {here}")
        if moved:
            self._go_to(state["draws"])
            _set_default_states({device: old for device, old in state["default"].items() if device in _devices()})
            return
        if unknown := set(self._streams) - set(state["draws"]):
            raise ValueError(
                f"state: nothing about the stream along {', '.join(sorted(unknown))}, which is in use here; it has "
                f"{', '.join(state['draws']) or 'none'}"
            )
        if set(state["default"]) != set(_devices()):
            raise ValueError(
                f"state: generators of {', '.join(state['default'])}, but here are {', '.join(_devices())}"
            )
        self._go_to(state["draws"])
        _set_default_states(state["default"])

    def _positions(self) -> dict[str, int]:
        """How often was drawn from each stream."""
        return {name: stream.draws for name, stream in self._streams.items()}

    def _go_to(self, positions: Mapping[str, int]) -> None:
        """Set every stream to its position; one that has none starts anew."""
        for name in positions:
            self.along(name)
        for name, stream in self._streams.items():
            stream.draws = positions.get(name, 0)

    def _identity(self) -> dict[str, Any]:
        return {"seed": self._seed, "mesh": self._sizes, "coordinates": self._place}


class Dropout(nn.Module):
    """Zero each element with probability ``p`` in training and scale the rest by 1 / (1 - p).

    ``stream``: where the numbers come from, by default torch's default generator.
    """

    def __init__(self, p: float = 0.5, stream: Stream | None = None) -> None:
        super().__init__()
        self.p, self.stream = _checked_probability("p", p), stream

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return F.dropout(x, self.p) if self.stream is None else _drop(x, x.shape, self.p, self.stream)

    def extra_repr(self) -> str:
        return f"p={self.p}, stream={self.stream}"


class DropPath(nn.Module):
    """Zero whole samples (along the first dim) with probability ``rate`` in training and scale the rest alike.

    For residual branches: stochastic depth (Huang et al. 2016, arXiv:1603.09382).
    """

    def __init__(self, rate: float = 0.0, stream: Stream | None = None) -> None:
        super().__init__()
        self.rate, self.stream = _checked_probability("rate", rate), stream

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return _drop(x, [x.shape[0]] + [1] * (x.ndim - 1), self.rate, self.stream)

    def extra_repr(self) -> str:
        return f"rate={self.rate}, stream={self.stream}"


class Replay:
    """A context in which the streams draw again what they drew from the moment on that this was made."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.start = streams, streams._positions()

    def __enter__(self) -> None:
        self.now, self.token = self.streams._positions(), _REPLAYING.set(True)
        self.streams._go_to(self.start)

    def __exit__(self, *error: object) -> None:
        _REPLAYING.reset(self.token)
        self.streams._go_to(self.now)


# Drawing --------------------------------------------------------------------------------------------------


def _take(state: Tensor) -> int:
    """The seed of the next draw."""
    if torch._C._current_graph_task_id() != -1 and not _REPLAYING.get():
        raise RuntimeError(
            "a Stream is drawn from within backward: a checkpoint recomputes its forward with other numbers than it "
            "had; use parallel.recompute.checkpoint(..., streams=streams)"
        )
    seed, draws = state.tolist()
    state[1] += 1
    return _mix(seed, draws)


def _mix(*parts: object) -> int:
    """63 bits that depend on all of ``parts``."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _draw_mask(state: Tensor, shape: Sequence[int], keep: float, device: torch.device) -> Tensor:
    generator = torch.Generator(device)
    generator.manual_seed(_take(state))
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(keep, generator=generator)


# That it changes its state keeps calls in a graph apart, and in order.
_keep_mask = torch.library.custom_op("commlayer::keep_mask", _draw_mask, mutates_args=("state",))
_keep_mask.register_fake(lambda state, shape, keep, device: torch.empty(shape, dtype=torch.bool, device=device))


def _drop(x: Tensor, shape: Sequence[int], p: float, stream: Stream | None) -> Tensor:
    """``x`` times a mask of ``shape``, scaled; autograd keeps it as bools."""
    if stream is None:
        mask = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
    else:
        draw = _keep_mask if torch.compiler.is_compiling() else _draw_mask
        mask = draw(stream.state, shape, 1 - p, x.device)
    scale = 1 / (1 - p) if p < 1 else 0.0
    return x * mask * scale if mask.numel() == x.numel() else x * (mask.to(x.dtype) * scale)


def _checked_probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a probability, 0 to 1, got {value!r}")
    return value


# Torch's default generators -------------------------------------------------------------------------------


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _default_states() -> dict[str, Tensor]:
    return {device: _module(device).get_rng_state() for device in _devices()}


def _set_default_states(states: Mapping[str, Tensor]) -> None:
    for device, state in states.items():
        _module(device).set_rng_state(state.cpu())  # where generators take it, whatever a checkpoint was mapped to


def _module(device: str) -> Any:
    return torch.random if device == "cpu" else torch.get_device_module(device)
