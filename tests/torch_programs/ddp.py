"""DistributedDataParallel, in the ways that change what its reducer asks of the group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import Transformer, fit, mine, mlp, next_token, regression, sample

SMALL = 0.002  # MiB a bucket: several of them
OPTIONS = {
    "plain": {},
    "buckets": {"bucket_cap_mb": SMALL},
    "views": {"bucket_cap_mb": SMALL, "gradient_as_bucket_view": True},
    "static": {"bucket_cap_mb": SMALL, "static_graph": True},
    "unused": {"bucket_cap_mb": SMALL, "find_unused_parameters": True},
}


@program(cases=[(name,) for name in OPTIONS])
def train(options: str) -> Results:
    """Parameters start apart: the constructor must make them rank 0's."""
    model = mlp()
    with torch.no_grad():
        model[0].weight += dist.get_rank()
    return fit(DDP(model, **OPTIONS[options]), steps=4)


@program()
def language_model() -> Results:
    model = DDP(Transformer(), bucket_cap_mb=SMALL)
    return fit(model, next_token, optimizer=torch.optim.AdamW(model.parameters()), steps=2)


class Branches(nn.Module):
    """Uses one of two layers, by rank and step; a third by nobody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return self.branches[(self.step + dist.get_rank()) % 2](x)


@program()
def unused_parameters() -> Results:
    return fit(DDP(Branches(), find_unused_parameters=True, bucket_cap_mb=SMALL))


@program()
def recomputed_activations() -> Results:
    """A static graph with parameters that are used twice."""

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, checkpoint(self.inner, x, use_reentrant=False), use_reentrant=False)

    return fit(DDP(Recomputed(), static_graph=True, bucket_cap_mb=SMALL))


@program()
def accumulation() -> Results:
    """Three micro-batches a step, of which only the last communicates."""
    model = DDP(mlp(), bucket_cap_mb=SMALL)

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        with model.no_sync():
            for micro in range(2):
                regression(model, 10 * step + micro).backward()
        return regression(model, 10 * step + 2)

    return fit(model, loss_of)


@program()
def uneven_inputs() -> Results:
    """Ranks run out of data one after the other; those that have shadow the others' collectives."""
    model = DDP(mlp(), bucket_cap_mb=SMALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with Join([model]):
        for step in range(2 + dist.get_rank()):
            optimizer.zero_grad()
            losses.append(regression(model, step))
            losses[-1].backward()
            optimizer.step()
    results: Results = {f"loss {step}": loss.detach() for step, loss in enumerate(losses)}
    return results | {f"parameter {name}": p.detach() for name, p in model.named_parameters()}


@program()
def uneven_inputs_and_sharded_optimizer() -> Results:
    model = DDP(mlp(), bucket_cap_mb=SMALL)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with Join([model, optimizer]):
        for step in range(2 + dist.get_rank()):
            optimizer.zero_grad()
            regression(model, step).backward()
            optimizer.step()
    return {f"parameter {name}": p.detach() for name, p in model.named_parameters()}


@program(cases=[("separate",), ("buckets",)])
def sharded_optimizer(views: str) -> Results:
    model = DDP(mlp(), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.Adam, lr=0.01, parameters_as_bucket_view=views == "buckets"
    )
    results = fit(model, optimizer=optimizer)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        states = optimizer.state_dict()["state"]
        results |= {f"state {index}": state["exp_avg"] for index, state in states.items()}
    return results


@program()
def buffers() -> Results:
    """Running statistics are those of rank 0 in each forward; one rank's model is in another mode."""
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(12, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12)))
    results = fit(model)
    model.eval()
    results["evaluated"] = model(sample(3, 12)).detach()
    return results | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


@program(sums_in=torch.float32)
def frozen_shared_and_complex_parameters() -> Results:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.second.weight = self.first.weight
            self.frozen = nn.Linear(12, 12).requires_grad_(False)
            self.phase = nn.Parameter(torch.randn(12, dtype=torch.complex64))
            self.precise = nn.Parameter(torch.randn(12, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.frozen(self.second(self.first(x))) * self.phase
            return (y.real + y.imag * self.precise).float()

    return fit(DDP(Odd(), bucket_cap_mb=SMALL))


@program(sums_in=torch.bfloat16)
def parameters_in_bfloat16() -> Results:
    return fit(DDP(mlp(dtype=torch.bfloat16), bucket_cap_mb=SMALL), lambda m, step: regression_in(m, step), steps=2)


def regression_in(model: nn.Module, step: int) -> torch.Tensor:
    x = mine(4, 12, seed=step, dtype=torch.bfloat16)
    return (model(x) - x.flip(-1)).float().square().mean()


@program()
def in_groups() -> Results:
    """Two replicas of two models at once, on pairs of ranks; at two ranks a pair is all."""
    pair, _ = dist.new_subgroups(group_size=2)
    return fit(DDP(mlp(), process_group=pair, bucket_cap_mb=SMALL))


@program()
def local_sgd() -> Results:
    """Models that are averaged every second step."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    model = mlp()
    averager = PeriodicModelAverager(period=2)
    return fit(model, optimizer=PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), averager))


class Rare(nn.Module):
    """A sparse embedding, and a convolution whose gradients lie in another order of memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 12, sparse=True)
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = self.embedding((10 * x.abs()).long().clamp(max=19))
        images = words.view(4, 3, 4, 12).contiguous(memory_format=torch.channels_last)
        return self.conv(images).mean((1, 2, 3))[:, None].expand_as(x)


@program()
def sparse_gradients_and_channels_last() -> Results:
    model = DDP(Rare(), bucket_cap_mb=SMALL)
    results = fit(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    return {name: x.to_dense() if isinstance(x, torch.Tensor) else x for name, x in results.items()}


@program(cases=[(0,), (2,)])
def data_loader(workers: int) -> Results:
    """As a training script has it: a sampler that shuffles, a loss averaged at the end, and forked workers."""
    torch.manual_seed(1)
    data = TensorDataset(sample(22, 12))
    sampler = DistributedSampler(data, shuffle=True)
    model = DDP(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total = torch.zeros(2, dtype=torch.float64)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for (x,) in DataLoader(data, batch_size=3, sampler=sampler, num_workers=workers):
            loss = (model(x) - x.flip(-1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += torch.tensor([loss.item(), 1.0], dtype=torch.float64)
    dist.all_reduce(total)
    # The losses are single precision, however they are added.
    return {"mean loss": (total[0] / total[1]).float(), "weight": model.module[0].weight.detach()}
