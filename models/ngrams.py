"""What a language model has to beat: bytes guessed by how often they come, or by the byte before alone."""

from __future__ import annotations

import numpy as np

from models.data.text import VOCABULARY

CHUNK = 1 << 24  # tokens at a time, for the sake of memory


def cross_entropies(training: np.ndarray, validation: np.ndarray) -> dict[str, float]:
    """Nats per token of predicting each token of ``validation`` but the first, after counting in ``training``.

    One is added to every count, so that nothing is impossible.
    """
    unigram = np.bincount(training, minlength=VOCABULARY) + 1
    bigram = _pairs(training) + 1
    seen = _pairs(validation)

    def nats(counts: np.ndarray) -> float:
        return float(-(seen * np.log(counts / counts.sum(-1, keepdims=True))).sum() / seen.sum())

    return {"byte unigram": nats(unigram), "byte bigram": nats(bigram)}


def _pairs(tokens: np.ndarray) -> np.ndarray:
    """How often each token follows each: a row for each token before."""
    counts = np.zeros(VOCABULARY**2, dtype=np.int64)
    for first in range(0, len(tokens) - 1, CHUNK):
        chunk = tokens[first : first + CHUNK + 1].astype(np.int32)
        counts += np.bincount(chunk[:-1] * VOCABULARY + chunk[1:], minlength=len(counts))
    return counts.reshape(VOCABULARY, VOCABULARY)
