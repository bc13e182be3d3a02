"""`saved_bytes`: what the forward pass leaves behind for the backward pass."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from revseg.memory import peak_bytes, saved_bytes
from tests.memory.nets import conv_net


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_a_conv_net_saves_three_maps_a_layer(depth):
    torch.manual_seed(0)
    net = conv_net(depth)
    x = torch.randn(2, 8, 33, 17)
    one = x.nbytes  # the map of every layer has this size
    statistics = 4 * 8 * 4  # mean and 1/std of the batch, and the two buffers
    # conv saves its input, batch norm its input, PReLU its input; the first input is x itself
    assert saved_bytes(lambda: net(x)) == depth * (3 * one + statistics)
    # forward: three new maps a layer, the last of them the output, and the statistics of the batch
    peak = peak_bytes(lambda: net(x), before=lambda: net(x))
    assert 0 <= peak - depth * 3 * one <= one + depth * statistics


def test_saved_inputs_count_and_parameters_do_not():
    layer = nn.Linear(10, 20)
    x = torch.randn(5, 10)
    assert saved_bytes(lambda: layer(x)) == x.nbytes
    assert saved_bytes(lambda: layer(x.requires_grad_())) == x.nbytes  # now the weight is saved too


def test_saved_weight_without_parameter_counts():
    w = torch.randn(10, requires_grad=True)
    x = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: x * w) == 2 * 40
    assert saved_bytes(lambda: x * nn.Parameter(w)) == 40


def test_storage_counts_once_and_in_full():
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x * x) == 400
    assert saved_bytes(lambda: (x[:10] * x[10:20], x.exp().view(10, 10).exp())) == 3 * 400
    assert saved_bytes(lambda: x[3:5] ** 2) == 400


def test_storages_that_die_count_each():
    x = torch.randn(100, requires_grad=True)

    def fn():
        for _ in range(10):  # the heap gives out the same address again
            x.exp()

    assert saved_bytes(fn) == 10 * 400


def test_saved_bytes_frees_what_it_saw():
    x = torch.randn(1000, requires_grad=True)

    def fn():
        for _ in range(10):
            x.exp()

    assert peak_bytes(lambda: saved_bytes(fn)) == peak_bytes(fn)


def test_double_backward_through_the_count():
    x = torch.randn(10, dtype=torch.float64, requires_grad=True)
    net = nn.Linear(10, 10).double()

    def second(measure):
        outputs = []
        measure(lambda: outputs.append((net(x).exp() * x).sum()))
        (dx,) = torch.autograd.grad(outputs[0], x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *net.parameters()], allow_unused=True)

    for ours, plain in zip(second(saved_bytes), second(lambda fn: fn()), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_nothing_saved_without_grad():
    net, x = conv_net(2), torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        assert saved_bytes(lambda: net(x)) == 0


def test_checkpoint_saves_its_inputs_only():
    net, x = conv_net(3), torch.randn(2, 8, 9, 7, requires_grad=True)

    def fn():
        y = x
        for _ in range(4):
            y = checkpoint(net, y, use_reentrant=False)
        return y

    assert saved_bytes(fn) == 4 * x.nbytes


def test_meta_tensors_save_the_same():
    real, x = conv_net(3), torch.randn(2, 8, 9, 7)
    meta = conv_net(3).to("meta")
    assert saved_bytes(lambda: meta(x.to("meta"))) == saved_bytes(lambda: real(x))


def test_gradients_are_unchanged_by_the_count():
    net, x = conv_net(2).double(), torch.randn(2, 8, 9, 7, dtype=torch.float64)
    outputs = []
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    saved_bytes(lambda: outputs.append(net(x)))
    outputs[0].square().sum().backward()
    for p, grad in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)


def test_exception_leaves_no_hook():
    x = torch.randn(10, requires_grad=True)

    def bad():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        saved_bytes(bad)
    assert saved_bytes(lambda: x.exp()) == 40
