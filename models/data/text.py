"""Text as bytes: the files of a folder, one after the other, cut into sequences for a language model.

The vocabulary is that of bytes, 0 … 255, and END, which follows every document. Which documents validate, and in which
order all of them come, a hash of their names decides: it mixes them, it is the same everywhere, and a file more moves
no other to the other side.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

END = 256
VOCABULARY = 257

# In Python's library: what is not part of it, and tests, which are not there in every installation.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests"}


class TextSequences(Dataset[tuple[Tensor, Tensor]]):
    """(ids_T, targets_T): ``seq_len`` tokens, and for each of them the next one; int64.

    Sequences lie end to end, so that each token but the first is predicted once, and all documents together are one
    text: a sequence may begin and end in the midst of one. The last tokens, fewer than ``seq_len``, are left over.

    Args:
        tokens: all documents, each with its END; uint16.
        documents: how many these are.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, documents: int = 1) -> None:
        self.tokens, self.seq_len, self.documents = tokens, seq_len, documents
        self.left_over = (len(tokens) - 1) % seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first = index * self.seq_len
        window = torch.from_numpy(self.tokens[first : first + self.seq_len + 1].astype(np.int64))
        return window[:-1], window[1:]

    def collate(self, samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A batch, possibly of no samples: a rank without work still has to take part in the step."""
        if not samples:
            nothing = torch.empty(0, self.seq_len, dtype=torch.int64)
            return nothing, nothing
        ids, targets = zip(*samples, strict=True)
        return torch.stack(ids), torch.stack(targets)


def text_sequences(
    root: str = "",
    *,
    glob: str = "",
    seq_len: int = 256,
    validation: float = 0.1,
    max_bytes: int = 0,
) -> tuple[TextSequences, TextSequences]:
    """Training and validation sequences of all files under a folder; hidden and empty files do not count.

    Args:
        root: the folder; by default the library of this Python, its ``*.py`` without tests and installed packages.
        glob: which files, ``*.txt`` (``*`` stands for folders, too); by default all of a folder that is given.
        validation: the share of documents that validate.
        max_bytes: of all documents together; those that come first by their hashes, as many as fit. 0: no limit.

    Raises:
        ValueError: for a folder without such files, and where one of the parts is shorter than a sequence.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len: must be at least 1, got {seq_len}")
    if not 0 < validation < 1:
        raise ValueError(f"validation: expected a share between 0 and 1, got {validation}")
    if max_bytes < 0:
        raise ValueError(f"max_bytes: must be at least 0, got {max_bytes}")
    folder = Path(root or sysconfig.get_paths()["stdlib"])
    if not folder.is_dir():
        raise ValueError(f"root: {folder} is not a folder")
    pattern = glob or ("*" if root else "*.py")
    documents = _documents(folder, pattern, set() if root else NOT_LIBRARY)
    if not documents:
        raise ValueError(f"glob: no file in {folder} matches {pattern!r}")
    parts: tuple[list[_Document], list[_Document]] = ([], [])
    total = 0
    for document in documents:
        total += document.size
        if max_bytes and total > max_bytes:
            break
        parts[document.side < validation].append(document)
    made = []
    for name, part in zip(("training", "validation"), parts, strict=True):
        tokens = _read(folder, part)
        if len(tokens) <= seq_len:
            raise ValueError(
                f"root: the {name} part of {folder} is {len(tokens)} tokens of {len(part)} of {len(documents)} files; "
                f"a sequence takes seq_len + 1 = {seq_len + 1}"
            )
        made.append(TextSequences(tokens, seq_len, len(part)))
    return made[0], made[1]


def text(tokens: Sequence[int]) -> str:
    """Tokens for people to read; the end of a document as ``␄``, what is no UTF-8 as ``�``."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        parts[-1].append(token) if token < END else parts.append([])
    return "␄".join(bytes(part).decode(errors="replace") for part in parts)


class _Document(NamedTuple):
    order: bytes
    side: float  # from 0 to 1, evenly
    name: str
    size: int


def _documents(folder: Path, pattern: str, without: set[str]) -> list[_Document]:
    """All that match, in the order of their hashes."""
    found = []
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]  # not walked into
        for path in (Path(at, name) for name in files if not name.startswith(".")):
            name = path.relative_to(folder).as_posix()
            if not fnmatch.fnmatchcase(name, pattern) or not path.is_file() or not (size := path.stat().st_size):
                continue
            digest = hashlib.blake2b(os.fsencode(name), digest_size=16).digest()
            found.append(_Document(digest[:8], int.from_bytes(digest[8:], "big") / 2**64, name, size))
    return sorted(found)


def _read(folder: Path, documents: Sequence[_Document]) -> np.ndarray:
    """Each document and its END."""
    tokens = np.full(sum(document.size + 1 for document in documents), END, dtype=np.uint16)
    first = 0
    for document in documents:
        content = np.fromfile(folder / document.name, dtype=np.uint8)
        if len(content) != document.size:
            raise ValueError(f"{folder / document.name}: changed while it was read")
        tokens[first : first + len(content)] = content
        first += len(content) + 1
    return tokens
