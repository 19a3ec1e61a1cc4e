"""torch.distributed.checkpoint: saved on one mesh and loaded on another, at once or in the background."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import Transformer, fit, next_token, sample


@contextmanager
def shared_folder() -> Iterator[str]:
    """One for all ranks, removed when the last has left."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    yield str(name[0])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(str(name[0]))


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@program(lambda: {"rows": sample(7, 6), "columns": sample(7, 6, seed=1), "same": sample(3, seed=2), "step": 11},
         moves=True)  # fmt: skip
def other_placements() -> Results:
    """Rows are loaded as columns, columns onto two axes, and something that every rank has."""
    size = dist.get_world_size()
    state = {
        "rows": distribute_tensor(sample(7, 6), line(), [Shard(0)]),
        "columns": distribute_tensor(sample(7, 6, seed=1), line(), [Shard(1)]),
        "same": sample(3, seed=2),
        "step": 11,
    }
    grid = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    again = {
        "rows": zeros(7, 6, device_mesh=line(), placements=[Shard(1)]),
        "columns": zeros(7, 6, device_mesh=grid, placements=[Shard(0), Replicate()]),
        "same": torch.zeros(3),
        "step": 0,
    }
    with shared_folder() as folder:
        dcp.save(state, checkpoint_id=folder)
        dcp.load(again, checkpoint_id=folder)
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in again.items()}


def model_and_optimizer(mesh: DeviceMesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Transformer()
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


@program(cases=[("save",), ("async_save",)])
def training_goes_on(how: str) -> Results:
    """Trained on one axis, saved, loaded into another model on two axes, and trained on."""
    size = dist.get_world_size()
    model, optimizer = model_and_optimizer(line())
    fit(model, next_token, optimizer=optimizer, steps=1)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    with shared_folder() as folder:
        if how == "save":
            dcp.save(states, checkpoint_id=folder)
        else:
            saved = dcp.async_save(states, checkpoint_id=folder, process_group=dist.new_group())
            fit(model, next_token, optimizer=optimizer, steps=1)  # meanwhile
            saved.result()
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "shard"))
        other, its_optimizer = model_and_optimizer(mesh)
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(3.0)
        states = dict(zip(("model", "optimizer"), get_state_dict(other, its_optimizer), strict=True))
        dcp.load(states, checkpoint_id=folder)
        set_state_dict(other, its_optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return fit(other, next_token, optimizer=its_optimizer, steps=1)
