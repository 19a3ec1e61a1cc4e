"""NCCL and its kin run messages in batches; what is asked of them, seen by a stand-in that records it."""

import pytest
import torch

from commlayer import CommError, UnsupportedOperation
from commlayer.backends.torch_native import TorchCommunicator


class Recorder:
    """A process group that takes messages in batches only."""

    supports_coalescing = True

    def __init__(self, fails=False):
        self.batches, self.open, self.fails = [], None, fails

    def rank(self):
        return 1

    def size(self):
        return 3

    def _start_coalescing(self):
        assert self.open is None
        self.open = []

    def _end_coalescing(self):
        self.batches.append(self.open)
        self.open = None

    def send(self, tensors, dst, tag):
        if self.fails:
            raise RuntimeError("broken")
        self.open.append(("send", dst))

    def recv(self, tensors, src, tag):
        self.open.append(("recv", src))


def communicator(group, name="nccl"):
    return TorchCommunicator(group, name, torch.device("cpu"), None, 60.0)


def test_every_message_is_part_of_a_batch():
    group = Recorder()
    comm, x = communicator(group), torch.ones(2)
    comm.send(x, 0, 0).wait()
    comm.recv(x, 2, 0).wait()
    comm.exchange([(x, 0), (x, 2)], [(x, 2)], 0).wait()
    assert group.batches == [[("send", 0)], [("recv", 2)], [("recv", 2), ("send", 0), ("send", 2)]]


def test_messages_to_oneself_stay_at_home():
    group = Recorder()
    comm, got = communicator(group), torch.zeros(2)
    comm.exchange([(torch.full((2,), 5.0), 1)], [(got, 1)], 0).wait()
    assert got.tolist() == [5, 5]
    assert group.batches == []


def test_tags_are_refused_since_they_would_be_ignored():
    with pytest.raises(UnsupportedOperation, match="tag: messages on nccl carry none"):
        communicator(Recorder()).send(torch.ones(1), 0, 7)


def test_a_failing_message_ends_its_batch():
    group = Recorder(fails=True)
    with pytest.raises(CommError, match="broken"):
        communicator(group).send(torch.ones(1), 0, 0)
    assert group.open is None


def test_no_batches_where_the_library_has_none():
    group = Recorder()
    group.supports_coalescing = False
    group.open = []
    communicator(group, "xccl").exchange([(torch.ones(1), 0)], [], 0)
    assert group.open == [("send", 0)]
    assert group.batches == []
