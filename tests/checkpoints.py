"""Models cut in any way, by hand, for the tests of checkpoints; and a process that saves until it is killed."""

import os
import signal
import sys
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

import commlayer
from commlayer import Mesh, run_local
from parallel import checkpoint
from parallel.placement import mark_sharded, mark_stretch


@dataclass(frozen=True)
class Cut:
    """Of one parameter: ``sizes`` of ``dim`` over tp, then ``bounds`` over dp, fractions of each tp rank's part."""

    dim: int | None
    sizes: tuple[int, ...]
    bounds: tuple[tuple[float, ...], ...] | None


@dataclass(frozen=True)
class Layout:
    dp: int
    tp: int
    cuts: tuple[Cut, ...]

    @property
    def ranks(self):
        return self.dp * self.tp


@st.composite
def layouts(draw, shapes):
    """Each parameter cut at any places, with parts and stretches of nothing among them."""
    dp, tp = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 1), (2, 2)]))

    def bounds(total, parts):
        return (0, *sorted(draw(st.lists(st.integers(0, total), min_size=parts - 1, max_size=parts - 1))), total)

    cuts = []
    for shape in shapes:
        dim = draw(st.sampled_from([None, *range(len(shape))]))
        sizes = () if dim is None else tuple(np.diff(bounds(shape[dim], tp)).tolist())
        # As ZeRO has it, at other places on each rank of tp.
        stretched = draw(st.booleans())
        fractions = tuple(tuple(b / 60 for b in bounds(60, dp)) for _ in range(tp)) if stretched else None
        cuts.append(Cut(dim, sizes, fractions))
    return Layout(dp, tp, tuple(cuts))


class Pieces(nn.Module):
    """What ZeRO is to checkpoints: stretches of a module's parameters, under their names."""

    def __init__(self, module, pieces):
        super().__init__()
        self.module, self.pieces, self.refreshed = module, pieces, 0

    def named_parameters(self, *_, **__):
        for name, param in self.module.named_parameters():
            yield name, self.pieces.get(name, param)

    def parameters(self, recurse=True):
        return (param for _, param in self.named_parameters())

    def refresh(self):
        self.refreshed += 1


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(value)


def build(layout, wholes, mesh):
    """A model of this rank's parts of ``wholes``, NumPy arrays."""
    holders, pieces = nn.ModuleList(), {}
    for index, (whole, cut) in enumerate(zip(wholes, layout.cuts, strict=True)):
        holder = Holder(torch.from_numpy(np.array(part(whole, cut, mesh))))
        holders.append(holder)
        if cut.dim is not None:
            mark_sharded(holder.weight, cut.dim, axis="tp", group=mesh["tp"], sizes=cut.sizes)
        if cut.bounds is not None:
            at = bounds_of(holder.weight.numel(), cut, mesh)
            rank = mesh.rank("dp")
            piece = nn.Parameter(holder.weight.detach().reshape(-1)[at[rank] : at[rank + 1]].clone())
            pieces[f"{index}.weight"] = mark_stretch(piece, holder.weight, mesh["dp"], at)
    return Pieces(holders, pieces)


def part(whole, cut, mesh):
    if cut.dim is None:
        return whole
    ends = np.cumsum(cut.sizes)
    return np.split(whole, ends[:-1], cut.dim)[mesh.rank("tp")]


def bounds_of(numel, cut, mesh):
    return [round(fraction * numel) for fraction in cut.bounds[mesh.rank("tp")]]


def expected(whole, cut, mesh):
    """This rank's elements of a whole array, in NumPy."""
    mine = part(whole, cut, mesh)
    if cut.bounds is None:
        return mine
    at, rank = bounds_of(mine.size, cut, mesh), mesh.rank("dp")
    return mine.reshape(-1)[at[rank] : at[rank + 1]]


def values_of(step, size=4096):
    return torch.arange(size, dtype=torch.float64) * 0.5 + step


def filled(step):
    """A model and an optimiser, all of whose values say which step they are of."""
    model = nn.Linear(64, 64, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.no_grad():
        model.weight.copy_(values_of(step).view(64, 64))
    optimizer.state[model.weight]["momentum_buffer"] = model.weight.detach() + 1
    return model, optimizer


def check_step(path):
    """The step of a checkpoint, all of whose values are compared."""
    model, optimizer = filled(-1)
    loaded = checkpoint.load(path, model, optimizer)
    assert torch.equal(model.weight, values_of(loaded.step).view(64, 64))
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], model.weight + 1)
    assert loaded.shared == {"step": loaded.step}
    return loaded.step


def save_for_ever(folder, first, ranks, background, keep, said):
    """Save step after step; write each to ``said`` when it is safe."""

    def rank():
        for step in range(first, first + 10**6):
            model, optimizer = filled(step)
            saving = checkpoint.save(
                folder, step, model, optimizer, shared={"step": step}, own=step, keep=keep, background=background
            )
            saving.wait()
            if commlayer.world().rank == 0:
                os.write(said.fileno(), step.to_bytes(8, "little"))

    run_local(rank, ranks=ranks)


def save_until(folder, steps, keep, operations):
    """Save these steps, and die at an operation on files within the folder: that of this number from the first on."""
    left = [operations]

    def count(event, args):
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir") and any(
            str(folder) in str(arg) for arg in args
        ):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(count)
    for step in steps:
        model, optimizer = filled(step)
        checkpoint.save(folder, step, model, optimizer, shared={"step": step}, keep=keep)


def save_until_full(folder, limit, sending, ranks):
    """Save step 1; then step 2, where no file may grow beyond ``limit`` bytes, if there is one; send what happened."""
    import resource

    def rank():
        checkpoint.save(folder, 1, *filled(1), shared={"step": 1})
        commlayer.barrier()
        if limit and commlayer.world().rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        commlayer.barrier()
        try:
            checkpoint.save(folder, 2, *filled(2), shared={"step": 2})
        except OSError as error:
            return str(error)
        return None

    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sending.send(run_local(rank, ranks=ranks))
    sending.close()


def mesh_of(layout):
    return Mesh(f"dp={layout.dp} tp={layout.tp}")


# Much of torch is imported where the first optimiser is made: once, before processes are forked from one that has this.
filled(0)
