"""Numbers, models and training loops that are the same in every run."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tests.torch_programs.catalogue import Results

INTEGERS = [torch.uint8, torch.int8, torch.int32, torch.int64]
REALS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]


def text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def last() -> int:
    """The highest rank: a root that is not the usual one."""
    return dist.get_world_size() - 1


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small values of any dtype, whose sums and products over a few ranks do not overflow."""
    generator = torch.Generator().manual_seed(1000 + seed)
    if dtype.is_complex or dtype in (torch.float32, torch.float64):
        return torch.randn(shape, generator=generator, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 5, shape, generator=generator).to(dtype)


def mine(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """This rank's."""
    return sample(*shape, seed=100 * seed + dist.get_rank(), dtype=dtype)


def of_all(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """What `mine` is on each rank."""
    return [sample(*shape, seed=100 * seed + rank, dtype=dtype) for rank in range(dist.get_world_size())]


def mlp(width: int = 12, hidden: int = 32, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, width)]
    return nn.Sequential(*layers).to(dtype)


class Block(nn.Module):
    """A transformer's: attention and MLP, with names for plans of tensor parallelism."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-1, -2) / self.head**0.5).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Next-token logits."""

    def __init__(self, vocabulary: int = 32, width: int = 16, heads: int = 4, layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


def tokens(seed: int, batch: int = 2, length: int = 8, vocabulary: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


def regression(model: nn.Module, step: int) -> torch.Tensor:
    """The loss of a step, on this rank's own samples."""
    x = mine(4, 12, seed=step)
    return (model(x).float() - x.flip(-1)).square().mean()


def next_token(model: nn.Module, step: int, seed: int | None = None) -> torch.Tensor:
    """The same for a language model; ``seed``: of ranks that see the same samples."""
    x = tokens(100 * step + (dist.get_rank() if seed is None else seed))
    return nn.functional.cross_entropy(model(x).flatten(0, 1).float(), x.roll(-1, 1).flatten())


def fit(
    model: nn.Module,
    loss_of: Callable[[nn.Module, int], torch.Tensor] = regression,
    *,
    steps: int = 3,
    optimizer: torch.optim.Optimizer | None = None,
    before_step: Callable[[nn.Module], object] = lambda model: None,
    whole: bool = False,
) -> Results:
    """Train, and return losses, the last gradients, and the parameters in the end.

    Of a DTensor they are this rank's shard, or all of it with ``whole``, to be compared with one process.
    """
    value = full if whole else local
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    results: Results = {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        before_step(model)
        if step == steps - 1:
            results |= {f"gradient of {name}": value(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        results[f"loss {step}"] = full(loss)
    return results | {f"parameter {name}": value(p) for name, p in model.named_parameters()}


def full(x: torch.Tensor | None) -> torch.Tensor | str:
    """A copy without gradient, gathered where it is a DTensor."""
    return "none" if x is None else (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def local(x: torch.Tensor | None) -> torch.Tensor | str:
    """A copy without gradient, of this rank's shard where it is a DTensor."""
    return "none" if x is None else (x.to_local() if isinstance(x, DTensor) else x).detach().clone()
