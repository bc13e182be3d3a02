"""A reversible training step as a CUDA graph."""

import copy

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, OneSidedCoupling, ReversibleSequence
from revseg.layers.blocks import asymmetric_pairs
from tests.helpers import needs_cuda

SHAPE = (2, 32, 24, 40)


def sequence():
    blocks = [
        OneSidedCoupling(asymmetric_pairs(16, (1, 2))),
        AdditiveCoupling(*(asymmetric_pairs(16, (1,)) for _ in "fg")),
    ]
    return ReversibleSequence(blocks).cuda().to(memory_format=torch.channels_last)


def some_map():
    return torch.randn(SHAPE, device="cuda").contiguous(memory_format=torch.channels_last)


def training_step(net, x, dy):
    """Output, and gradients of the input and the parameters."""
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *net.parameters()], dy)]


def captured(step):
    """The graph, and the tensors that its replays write to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@needs_cuda
@pytest.mark.parametrize("kernels", ["0", "1"], ids=["modules", "kernels"])
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
def test_a_captured_step_is_the_step(kernels, exact, monkeypatch):
    monkeypatch.setenv("REVSEG_KERNELS", kernels)
    net, x, dy = sequence(), some_map().requires_grad_(), some_map()
    for part in net.modules():
        if isinstance(part, ReversibleSequence):
            part.exact = exact
    graph, results = captured(lambda: training_step(net, x, dy))
    plain = copy.deepcopy(net)
    for _ in range(2):
        new, gradient = some_map(), some_map()
        expected = training_step(plain, new.clone().requires_grad_(), gradient)
        with torch.no_grad():
            x.copy_(new)
            dy.copy_(gradient)
        graph.replay()
        torch.cuda.synchronize()
        for found, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        for (name, found), wanted in zip(net.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(found, wanted, msg=name)


@needs_cuda
def test_dropout_in_a_captured_step_is_refused():
    f = nn.Sequential(asymmetric_pairs(16, (1,)), nn.Dropout(0.5))
    net, x = ReversibleSequence(OneSidedCoupling(f)).cuda(), some_map()
    net(x)
    torch.cuda.synchronize()
    graph, message = torch.cuda.CUDAGraph(), ""
    with torch.cuda.graph(graph):
        try:
            net(x.requires_grad_())
        except RuntimeError as error:
            message = str(error)
    assert "draws random numbers inside of a reversible block" in message
