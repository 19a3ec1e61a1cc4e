"""Whole models: the state dict of the plain module, and the safetensors file, from any layout and into any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import commlayer
from parallel.checkpoint import content, files
from parallel.checkpoint.agreement import agreed, ranks_of
from parallel.checkpoint.boxes import Box
from parallel.checkpoint.content import Held
from parallel.checkpoint.manifest import verify
from parallel.checkpoint.rest import read_rest
from parallel.checkpoint.targets import read_metadata, read_tensors
from parallel.placement import gather_full


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """On rank 0 of the world the whole model on the CPU, as the plain module's ``state_dict()``; None elsewhere.

    Collective. Tied parameters are under all their names, as one tensor. Values have the dtype in which they are
    trained: of ZeRO that of the master weights, float32 also where it computes in a smaller one.
    """
    first = ranks_of(None).rank == 0
    found: dict[str, Tensor] = {}
    for name, param in content.parameters(model).items():
        full = gather_full(param, param)
        if first:
            found[name] = full.to("cpu", copy=True)
    if not first:
        return None
    found |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in content.buffers(model).items()}
    found |= {name: found[other] for name, other in content.tied(model).items()}
    return {name: found[name] for name in content.plain(model).state_dict(keep_vars=True)}


def load_full_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put a whole model, such as the plain module's ``state_dict()``, into ``model``: each rank takes its part.

    Collective. Every rank passes the same. Of tied parameters one name is enough. Raises ValueError on all ranks,
    before anything is changed, for a name that is missing or too much, for another shape, for values of another kind
    (complex ones for a real parameter), and where names that are tied here have different values.
    """
    _put(model, {name: tuple(t.shape) for name, t in state.items()}, lambda name, box: state[name][box.slices])


def export_safetensors(model: nn.Module, path: Path | str) -> None:
    """Write the whole model to a file that ``safetensors.torch.load_file`` reads for the plain module. Collective.

    Tied parameters are written under each of their names, since the file cannot say that they are one; so
    ``load_state_dict`` finds all that it looks for. Dtypes as of :func:`full_state_dict`.

    Raises OSError on all ranks where rank 0 cannot write.
    """
    group, problem = ranks_of(None), None
    if (state := full_state_dict(model)) is not None:
        try:
            _write(state, Path(path))
        except OSError as error:
            problem = str(error)
    if problem := commlayer.broadcast_object(problem, group=group):
        raise OSError(f"{path} was not written: {problem}")


def import_safetensors(model: nn.Module, path: Path | str) -> None:
    """Put the whole model in a safetensors file into ``model``; each rank reads only its own slices.

    Collective; errors as of :func:`load_full_state_dict`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no mapping

            def read(name: str, box: Box) -> Tensor:
                value: Tensor = slices[name][box.slices] if box.sizes else file.get_tensor(name)
                return value

            _put(model, {name: tuple(part.get_shape()) for name, part in slices.items()}, read)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def checkpoint_to_safetensors(path: Path | str, file: Path | str) -> None:
    """Turn the model in a checkpoint into a safetensors file: one process, no model, no communication.

    Tied parameters as in :func:`export_safetensors`. Raises ValueError for a checkpoint that is broken.
    """
    path = Path(path)
    verify(path)
    metadata, tied = read_metadata(path), read_rest(path).tied
    state = {}
    for key, where in metadata.planner_data.items():
        if where[0] == "model":
            described: Any = metadata.state_dict_metadata[key]
            state[where[1]] = torch.empty(described.size, dtype=described.properties.dtype)
    targets = {f"model.{name}": (f"model.{name}", content.whole(values)) for name, values in state.items()}
    read_tensors(path, targets, metadata)
    _write(state | {name: state[other] for name, other in tied.items()}, Path(file))


@torch.no_grad()
def _put(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str, Box], Tensor]) -> None:
    """Each rank reads its boxes. ``shapes``: of what there is."""
    places = {name: content.cut_like(param, param) for name, param in content.parameters(model).items()}
    places |= {name: content.whole(buffer) for name, buffer in content.buffers(model).items()}
    other_names: dict[str, list[str]] = {name: [] for name in places}
    for other, name in content.tied(model).items():
        other_names[name].append(other)

    def sources() -> dict[str, Held]:
        found, known = {}, set()
        for name, held in places.items():
            names = [n for n in (name, *other_names[name]) if n in shapes]
            known.update(names)
            if not names:
                raise ValueError(f"{name}: missing")
            for source in names:
                _check_fits(source, held, shapes[source], read)
            for other in names[1:]:
                if any(not _same(read(names[0], box), read(other, box)) for box, _ in held.pieces):
                    raise ValueError(f"{names[0]} and {other} are one parameter here, but have different values there")
            found[names[0]] = held
        if more := sorted(shapes.keys() - known):
            raise ValueError(f"{more[0]}: there is no place for it here")
        return found

    for source, held in agreed(sources, ranks_of(None)).items():
        for box, values in held.pieces:
            values.copy_(read(source, box))
    if content.is_zero(model):
        model.refresh()  # type: ignore[operator]


def _check_fits(name: str, held: Held, shape: tuple[int, ...], read: Callable[[str, Box], Tensor]) -> None:
    if tuple(shape) != held.shape:
        raise ValueError(f"{name}: {list(held.shape)} here, but {list(shape)} there")
    no_elements = (0,) * len(shape)
    if content.kind(dtype := read(name, Box(no_elements, no_elements)).dtype) != content.kind(held.dtype):
        raise ValueError(f"{name}: {held.dtype} here, but {dtype} there")


def _same(a: Tensor, b: Tensor) -> bool:
    """Also where both are no number."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _write(state: Mapping[str, Tensor], path: Path) -> None:
    """Aside, to disk, and renamed."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Each with memory of its own: the format does not share.
    separate = {name: values.clone(memory_format=torch.contiguous_format) for name, values in state.items()}
    aside = path.with_name(f".{path.name}.part")
    try:
        save_file(separate, aside, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    files.to_disk(aside)
    aside.rename(path)
    files.to_disk(path.parent)
