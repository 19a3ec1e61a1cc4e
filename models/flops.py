"""How many floating-point operations training takes: what model FLOPs utilisation (MFU) is reckoned from."""

from __future__ import annotations

from models.moe import LanguageModelConfig, parameters


def flops_per_token(config: LanguageModelConfig, length: int) -> int:
    """Of forward and backward for one token in a sequence of ``length``: 6 · N + 12 · depth · embed · length.

    As the PaLM paper has it (Chowdhery et al. 2022, arXiv:2204.02311, appendix B):

    - N are the active parameters that are multiplied with: the experts that a token takes, the router, the head, not
      the lookup of the embedding, no norms. Each costs a multiplication and an addition in forward, twice that in
      backward.
    - Scores and their sums of values cost 2 · 2 · length operations per channel in forward, twice that in backward, for
      all heads (embed channels) of each layer. Under causal attention half of them are not needed; as in PaLM and
      Megatron-LM (Narayanan et al. 2021, arXiv:2104.04473) they are counted all the same, so that figures compare.

    What is computed again in backward does not count, so recomputation lowers the utilisation. MFU is this times tokens
    per second, over the peak of the devices.
    """
    if length < 1:
        raise ValueError(f"length: expected at least 1 token, got {length}")
    return 6 * parameters(config).multiplied + 12 * config.depth * config.embed * length
