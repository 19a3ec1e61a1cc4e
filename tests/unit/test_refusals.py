"""What looks like a tensor, a derivative or an int, and is or is not one."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import commlayer
from commlayer import UnsupportedOperation, all_gather, all_reduce, broadcast, run_local


@pytest.fixture
def alone():
    """One process: fake tensors and forward mode are not for threads."""
    yield commlayer.init("single")
    commlayer.finalize()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch itself
def test_tensors_without_memory_are_refused(alone):
    with FakeTensorMode():
        fake = torch.ones(2)
    with pytest.raises(TypeError, match="x: a FakeTensor has no memory"):
        all_reduce(fake)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
    with pytest.raises(TypeError, match="x: a nested tensor"):
        all_reduce(nested)
    assert all_reduce(torch.ones(1)).item() == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch itself
def test_forward_mode_and_transforms_say_so_instead_of_losing_the_derivative(alone):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with pytest.raises(UnsupportedOperation, match="no forward-mode derivative"):
            all_reduce(dual)
        assert all_reduce(torch.ones(1)).item() == 1
    with pytest.raises(UnsupportedOperation, match=r"torch\.func"):
        torch.func.vmap(all_reduce)(torch.ones(2, 3))


def test_numpys_ints_are_ints():
    def program():
        x = torch.tensor([float(commlayer.world().rank)])
        assert broadcast(x, src=np.int64(1)).item() == 1
        return all_gather(x, dim=np.int32(0), sizes=np.array([1, 1])).tolist()

    assert run_local(program, ranks=2) == [[0, 1], [0, 1]]


def test_a_factor_is_taken_as_it_is_now():
    def program():
        factor = torch.tensor([2.0])
        x = torch.ones(2, requires_grad=True)
        y = all_reduce(x, commlayer.premul_sum(factor))
        factor.fill_(100.0)
        y.sum().backward()
        return x.grad.tolist()

    assert run_local(program, ranks=2) == [[4, 4], [4, 4]]


def test_one_process_alone_takes_tensors_wherever_they_are(alone):
    assert commlayer.all_reduce(torch.ones(2, device="meta")).device.type == "meta"
