"""Text as bytes: which documents, in which order, on which side, cut how; and the counts that need no training."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from models.data.text import END, VOCABULARY, TextSequences, text, text_sequences
from models.ngrams import cross_entropies


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        path = tmp_path / f"{'abc'[i % 3]}/{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([i, 255, 0]) * (i + 1))
    return tmp_path


def documents(part):
    """The contents of the documents of a part, in their order."""
    ends = np.flatnonzero(part.tokens == END)
    assert ends[-1] == len(part.tokens) - 1
    assert part.documents == len(ends)
    return [bytes(piece[piece != END].astype(np.uint8)) for piece in np.split(part.tokens, ends + 1)[:-1]]


def split(folder, **settings):
    """The documents that train, and those that validate."""
    train, validation = text_sequences(str(folder), **{"validation": 0.3, "seq_len": 8, **settings})
    return documents(train), documents(validation)


def test_every_document_is_on_one_side_whole(folder):
    train, validation = split(folder)
    assert sorted(train + validation) == sorted(path.read_bytes() for path in folder.rglob("*.txt"))
    assert 4 <= len(validation) <= 20, "about 0.3 of 40"
    assert train != sorted(train), "the order was meant to be mixed"
    assert split(folder) == (train, validation)


def test_sides_and_order_stay_when_files_are_added(folder, tmp_path_factory):
    before = split(folder)
    for i in range(40):
        (folder / f"more-{i}").write_bytes(b"more" * (i + 1))
    after = split(folder)
    for old, new in zip(before, after, strict=True):
        assert [document for document in new if not document.startswith(b"more")] == old
        assert len(new) > len(old)
    moved = tmp_path_factory.mktemp("elsewhere") / "text"
    folder.rename(moved)
    assert split(moved) == after


@pytest.mark.parametrize("count", [33, 34, 48, 49])
def test_each_token_but_the_first_is_predicted_once(count):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, count).astype(np.uint16)
    data = TextSequences(tokens, 16)
    assert len(data) == (count - 1) // 16
    samples = [data[i] for i in range(len(data))]
    ids, targets = data.collate(samples)
    assert ids.dtype == targets.dtype == torch.int64
    assert ids.shape == targets.shape == (len(data), 16)
    predicted = count - 1 - data.left_over
    assert torch.equal(ids.flatten(), torch.from_numpy(tokens[:predicted].astype(np.int64)))
    assert torch.equal(targets.flatten(), torch.from_numpy(tokens[1 : predicted + 1].astype(np.int64)))
    assert 0 <= data.left_over < 16
    assert [t.shape for t in data.collate([])] == [(0, 16)] * 2


def test_which_files_count(folder):
    (folder / ".git").mkdir()
    for name in (".git/object", ".hidden", "a/.hidden.txt", "empty.txt"):
        (folder / name).write_bytes(b"" if name.startswith("empty") else b"not this")
    (folder / "notes.md").write_bytes(b"this")
    train, validation = split(folder)
    assert len(train + validation) == 41
    assert b"this" in train + validation
    train, validation = split(folder, glob="[ab]/*.txt")
    assert len(train + validation) == 27


def test_a_limit_takes_the_first_of_all(folder):
    whole = split(folder)
    some = split(folder, max_bytes=1500)
    assert 1500 - 120 < sum(map(len, some[0] + some[1])) <= 1500
    for few, all_ in zip(some, whole, strict=True):
        assert 0 < len(few) < len(all_)
        assert few == all_[: len(few)]


def test_the_library_of_this_python():
    train, validation = text_sequences(max_bytes=300_000, validation=0.5)
    assert train.tokens.dtype == np.uint16
    assert len(train.tokens) + len(validation.tokens) <= 300_000 + train.documents + validation.documents
    assert "import" in text(train.tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": "nowhere"}, "root: nowhere is not a folder"),
        ({"glob": "*.rst"}, r"glob: no file in .* matches '\*\.rst'"),
        ({"seq_len": 5000}, r"root: the training part of .* is \d+ tokens of \d+ of 40 files; .* seq_len \+ 1 = 5001"),
        ({"validation": 1e-9}, "root: the validation part of .* is 0 tokens of 0 of 40 files"),
        ({"max_bytes": 10}, "root: the training part of .* is 0 tokens of 0 of 40 files"),
        ({"max_bytes": -1}, "max_bytes: must be at least 0, got -1"),
        ({"seq_len": 0}, "seq_len: must be at least 1, got 0"),
        ({"validation": 1.0}, "validation: expected a share between 0 and 1, got 1.0"),
    ],
)
def test_wrong_settings_are_named(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        text_sequences(**{"root": str(folder), "seq_len": 8, "validation": 0.3, **settings})


def test_text_for_people():
    assert text([*"né".encode(), END, 104, 105, END]) == "né␄hi␄"
    assert text([255, 104]) == "�h"


def test_counts_are_plain_ones(monkeypatch):
    monkeypatch.setattr("models.ngrams.CHUNK", 7)  # several of them
    draw = np.random.default_rng(0)
    training, validation = (np.minimum(draw.geometric(0.1, n) - 1, END).astype(np.uint16) for n in (500, 60))
    single, pairs = Counter(training.tolist()), Counter(zip(training[:-1].tolist(), training[1:].tolist(), strict=True))
    before = Counter(training[:-1].tolist())
    unigram, bigram = [], []
    for a, b in zip(validation[:-1].tolist(), validation[1:].tolist(), strict=True):
        unigram.append(-math.log((single[b] + 1) / (500 + VOCABULARY)))
        bigram.append(-math.log((pairs[a, b] + 1) / (before[a] + VOCABULARY)))
    expected = {"byte unigram": sum(unigram) / 59, "byte bigram": sum(bigram) / 59}
    assert cross_entropies(training, validation) == pytest.approx(expected)
