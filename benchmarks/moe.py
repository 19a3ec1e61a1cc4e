"""Training with the experts spread over the ranks, against all experts on every rank, and every way to dispatch.

    torchrun --nproc-per-node 2 -m benchmarks.moe
    mpiexec -n 4 python -m benchmarks.moe --models laptop --rounds 20

A step is forward, backward, the reduction of gradients, clipping and AdamW of a language model on random bytes; the
variants take turns, so that all see the same machine. Times are medians over rounds, each the slowest rank's; memory is
that of all tensors alive on the fullest rank, at the peak of a step (parameters, gradients, Adam's state, activations).

=================  =========================================================================================
variant
=================  =========================================================================================
no EP              every rank has all experts; DataParallel reduces their gradients
EP                 ep = all ranks, tokens go to their experts by the backend's own all_to_all
dense              no experts, and as many active parameters a token
EP, …              the same as EP, with this emulation of all_to_all: the backend is denied what would be cheaper
=================  =========================================================================================
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import commlayer
from benchmarks.memory import MIB, Alive
from commlayer import Group, Mesh
from commlayer.capability import parse_disabled
from commlayer.planned import Planned
from models.moe import LanguageModel
from models.moe_sizes import LanguageModelConfig
from parallel import DataParallel, clip_grad_norm_

# Sequences and their length on each rank: few tokens a step, and many.
BATCHES = {"laptop": ((1, 128), (16, 256)), "debug": ((1, 64), (8, 128))}
# What a backend must lack for the planner to choose each emulation.
EMULATIONS = {
    "pairwise": "all_to_all",
    "padded_all_gather": "all_to_all,send,recv",
    "broadcasts": "all_to_all,send,recv,all_gather",
}
Step = Callable[[], Tensor]  # returns the loss of this rank


class Variant(NamedTuple):
    config: LanguageModelConfig
    group: Group
    ep: int  # ranks that share the experts


def without(group: Group, disable: str) -> Group:
    """A group of the same ranks that lacks these capabilities, as all groups do under COMMLAYER_DISABLE."""
    made = group.new_group(range(group.size))
    lacking = replace(group.capabilities(), disabled=parse_disabled(disable))
    made._capabilities, made.flat = lacking, Planned(made.flat.comm, lacking)
    return made


def training(variant: Variant, batch: int, tokens: int) -> Step:
    """A step of training on ``batch`` sequences of ``tokens`` on every rank."""
    config, group, ep = variant
    mesh = Mesh(f"dp={group.size}", group=group)
    experts = mesh.fold(f"ep={ep}") if config.every else None
    torch.manual_seed(0)
    model = DataParallel(LanguageModel(config, mesh, experts), mesh=mesh, experts=experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(group.rank)
    ids = torch.randint(config.vocab_size, (batch, tokens + 1), generator=generator)

    def step() -> Tensor:
        optimizer.zero_grad()
        found = model(ids[:, :-1], ids[:, 1:])
        loss = found.loss / (group.size * batch * tokens) + sum(load.loss for load in found.loads)
        (loss * group.size).backward()
        clip_grad_norm_(model, 1.0, mesh=mesh)
        optimizer.step()
        return loss.detach()

    return step


def against_none(config: LanguageModelConfig, group: Group) -> dict[str, Variant]:
    return {
        "no EP": Variant(config, group, 1),
        "EP": Variant(config, group, group.size),
        "dense": Variant(config.dense(), group, 1),
    }


def emulated(config: LanguageModelConfig, group: Group) -> dict[str, Variant]:
    found = {"EP": Variant(config, group, group.size)}
    for name, disable in EMULATIONS.items():
        lacking = without(group, disable)
        plan = lacking.explain("all_to_all", uneven=True).plan
        assert plan.fallback is not None
        assert plan.fallback.name == name, plan
        found[f"EP, {name}"] = Variant(config, lacking, group.size)
    return found


def measure(variants: dict[str, Variant], shape: tuple[int, int], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step, and MiB, of each; AssertionError where two do not compute the same."""
    steps: dict[str, Step] = {}
    memory: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[LanguageModelConfig, Tensor] = {}
    for name, variant in variants.items():
        with Alive() as alive:
            steps[name] = training(variant, *shape)
            steps[name]()
            loss = steps[name]()  # Adam's state came with the first step
        torch.testing.assert_close(loss, losses.setdefault(variant.config, loss), rtol=1e-3, atol=0)
        memory[name] = largest(alive.peak / MIB)
    for _ in range(rounds):
        for name, step in steps.items():
            commlayer.barrier()
            start = time.perf_counter()
            step()
            times[name].append(largest(time.perf_counter() - start) * 1e3)
    return {name: {"ms": statistics.median(times[name]), "MiB": memory[name]} for name in variants}


def largest(mine: float) -> float:
    """The largest of all ranks' values."""
    return float(commlayer.all_reduce(torch.tensor(mine, dtype=torch.float64), commlayer.MAX))


def report(found: dict[str, dict[str, float]], model: str, shape: Sequence[int], group: Group) -> None:
    first = next(iter(found.values()))
    batch, tokens = shape
    print(f"\n{model}, {batch} × {tokens} tokens on each of {group.size} ranks, {group.backend}")
    print(f"{'':24}{'ms':>9}{'tokens/s':>10}{'ratio':>7}{'MiB':>9}{'ratio':>7}")
    for name, row in found.items():
        rate = batch * tokens * group.size / row["ms"] * 1e3
        print(
            f"{name:24}{row['ms']:9.1f}{rate:10.0f}{first['ms'] / row['ms']:7.2f}"
            f"{row['MiB']:9.1f}{row['MiB'] / first['MiB']:7.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Expert parallelism against none, and every way to dispatch")
    parser.add_argument("--models", choices=BATCHES, nargs="+", default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    group = commlayer.init()
    rows = []
    for model in args.models:
        config = LanguageModelConfig.named(model)
        for shape in BATCHES[model]:
            for table in (against_none, emulated):
                found = measure(table(config, group), shape, args.rounds)
                rows.append({"model": model, "batch": shape, "ranks": group.size, "found": found})
                if group.rank == 0 and not args.json:
                    report(found, model, shape, group)
    if group.rank == 0 and args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
