"""What a language model is built from, and the named sizes.

``debug``, ``medium``, ``large`` and ``deepseek-1b`` are those of torchtitan's measurements of expert parallelism on
Intel GPUs, as far as these tell. Ours are, where they say nothing: the hidden channels (chosen so that ``large`` comes
near the 50 B parameters, and ``deepseek-1b`` near the 1 B, that they name), the experts that a token takes, all losses,
untied embeddings, and

- ``debug``: all but the width and that it is small;
- ``medium``: the key-value heads (a third of the heads, as ``large`` has) and the vocabulary (that of ``large``);
- ``deepseek-1b``: that every layer is a mixture, and as many key-value heads as heads.

``NAME-dense`` has no experts and as many active parameters per token; ``large-dense-50b`` has as many in all: they
compare ``large`` with both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from parallel.router import Routing


@dataclass(frozen=True)
class LanguageModelConfig:
    """Everything a :class:`LanguageModel` is built from. Raises ValueError for values that do not fit together.

    - ``kv_heads``: as many as ``heads``, or fewer that divide them.
    - ``hidden``: channels of the MLPs in layers without experts.
    - ``every``: each ``every``-th layer is a mixture of experts; 0: none. ``expert_hidden``: channels of each expert;
      ``routing``: how tokens choose; ``shared``: how many experts take every token beside.
    - ``tied``: the head is the embedding.
    - ``rope_theta``: base of the wave lengths of rotary positions.
    """

    vocab_size: int
    embed: int
    depth: int
    heads: int
    kv_heads: int
    hidden: int = 0
    every: int = 0
    expert_hidden: int = 0
    routing: Routing | None = None
    shared: int = 0
    tied: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        needed = {"vocab_size", "embed", "depth", "heads", "kv_heads"}
        needed |= {"hidden"} if self.every != 1 else set()
        needed |= {"expert_hidden"} if self.every else set()
        for name in sorted(needed):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.embed % self.heads or self.embed // self.heads % 2:
            raise ValueError(f"heads: must cut embed {self.embed} into an even number of channels, got {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: must divide heads {self.heads}, got {self.kv_heads}")
        if not 0 <= self.every <= self.depth:
            raise ValueError(f"every: expected 0 (no experts) to depth {self.depth}, got {self.every}")
        if self.every and self.routing is None:
            raise ValueError(f"routing: missing, but every {self.every} asks for experts")
        if not self.every and self.routing is not None:
            raise ValueError(f"routing: given, but every 0 means no experts; got {self.routing}")
        if self.shared < 0 or (self.shared and not self.every):
            raise ValueError(f"shared: expected 0 or more, and none without experts, got {self.shared}")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: must be positive, got {getattr(self, name)}")

    def has_experts(self, layer: int) -> bool:
        """Whether the layer, counted from 0, is a mixture."""
        return self.every > 0 and (layer + 1) % self.every == 0

    @property
    def mixtures(self) -> int:
        """How many layers are mixtures."""
        return self.depth // self.every if self.every else 0

    def dense(self, *, total: bool = False) -> LanguageModelConfig:
        """The same without experts, its MLPs wider: with as many active parameters, or with ``total`` as many in all.

        But for the routers, and for the remainder where the channels do not divide by the layers.
        """
        if self.routing is None:
            return self
        each = self.routing.experts if total else self.routing.top_k
        channels = self.mixtures * (each + self.shared) * self.expert_hidden
        channels += (self.depth - self.mixtures) * self.hidden
        hidden = round(channels / self.depth)
        return replace(self, hidden=hidden, every=0, expert_hidden=0, routing=None, shared=0)

    @classmethod
    def named(cls, name: str, **changes: Any) -> LanguageModelConfig:
        """One of :data:`SIZES`, with ``changes``."""
        if name not in SIZES:
            raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {name!r}")
        return replace(SIZES[name], **changes)


# Of the weights of the balance and the z-loss the Switch Transformer and ST-MoE found these good.
_TOP_2 = Routing(12, 2, normalise=True, balance_loss=1e-2, z_loss=1e-3)
# As DeepSeek-V3: sigmoid scores, balanced by biases, and a small loss beside.
_DEEPSEEK = Routing(60, 6, score="sigmoid", normalise=True, balance_loss=1e-4, bias_rate=1e-3)

# The first five numbers are vocab_size, embed, depth, heads, kv_heads.
SIZES: dict[str, LanguageModelConfig] = {
    # For tests: heads for up to four ranks.
    "tiny": LanguageModelConfig(
        257, 32, 2, 8, 4, hidden=48, every=2, expert_hidden=24, routing=replace(_TOP_2, experts=4), tied=True
    ),
    # Learns bytes on two cores.
    "laptop": LanguageModelConfig(
        257, 128, 4, 4, 2, hidden=512, every=2, expert_hidden=256, routing=replace(_TOP_2, experts=8), tied=True
    ),
    "debug": LanguageModelConfig(32000, 384, 6, 6, 2, hidden=1536, every=2, expert_hidden=1536, routing=_TOP_2),
    "medium": LanguageModelConfig(32000, 2304, 24, 24, 8, hidden=8192, every=2, expert_hidden=8192, routing=_TOP_2),
    "large": LanguageModelConfig(32000, 4608, 32, 36, 12, hidden=16384, every=2, expert_hidden=16384, routing=_TOP_2),
    "deepseek-1b": LanguageModelConfig(50000, 1024, 10, 8, 8, every=1, expert_hidden=448, routing=_DEEPSEEK, shared=2),
}
SIZES |= {f"{name}-dense": config.dense() for name, config in SIZES.items()}
SIZES["large-dense-50b"] = SIZES["large"].dense(total=True)
