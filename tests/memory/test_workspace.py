"""What convolutions copy inside, predicted and measured."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg.memory import peak_bytes, predict, predicted_peak_bytes

CASES = {  # n, c_in, c_out, k, dilation, groups, h, w
    "ordinary": (2, 64, 64, 3, 1, 1, 24, 48),
    "dilated": (2, 64, 64, 3, 2, 1, 24, 48),
    "far": (2, 64, 64, 3, 12, 1, 48, 96),
    "larger than the map": (2, 320, 128, 3, 12, 1, 16, 16),
    "depthwise": (2, 64, 64, 3, 1, 64, 24, 48),
    "depthwise, dilated": (2, 64, 64, 3, 4, 64, 24, 48),
    "depthwise, wide": (2, 64, 64, 7, 1, 64, 24, 48),
    "thin groups": (2, 64, 64, 3, 1, 32, 24, 48),
    "single": (2, 64, 64, 1, 1, 1, 24, 48),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_backward_of_a_convolution(name, dtype):
    assert_backward_is_predicted(name, dtype, torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_backward_on_channels_last_maps(name, dtype):
    """ConvNeXt's blocks are so: weights of 7 x 7, depthwise, are copied 256 times, more than all their maps."""
    assert_backward_is_predicted(name, dtype, torch.channels_last)


def assert_backward_is_predicted(name, dtype, memory_format):
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the rules are of oneDNN on a processor with vectors of 512 bits")
    n, c_in, c_out, k, dilation, groups, h, w = CASES[name]
    x = torch.randn(n, c_in, h, w, dtype=dtype).to(memory_format=memory_format)
    weight = torch.randn(c_out, c_in // groups, k, k, dtype=dtype)
    padding = dilation * (k // 2)
    y = F.conv2d(x, weight, None, 1, padding, dilation, groups)
    dy = torch.randn_like(y)

    def backward():
        sizes = ([1, 1], [padding] * 2, [dilation] * 2)
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, *sizes, False, [0, 0], groups, [True, True, False]
        )

    measured = peak_bytes(backward, before=backward)
    beside = sum(t.nbytes for t in (x, y, weight))  # what stands there anyway
    tolerance = (
        0.04 * (measured + beside) + weight.nbytes
    )  # of small ones a copy more is counted than is made
    assert predicted_peak_bytes(lambda: backward) == pytest.approx(measured, abs=tolerance)


@pytest.mark.parametrize("wanted", [None, (True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_copies_of_large_weights_on_channels_last_maps(order, wanted):
    """Weights that lie as the maps do are not copied for it; forward and for the map alone there is a copy in blocks."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the rules are of oneDNN on a processor with vectors of 512 bits")
    x = torch.randn(1, 256, 8, 16).to(memory_format=torch.channels_last)
    weight = torch.randn(128, 256, 3, 3).to(memory_format=order)
    dy, sizes = torch.randn_like(F.conv2d(x, weight, padding=1)), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def run():
        if wanted is None:
            return torch.ops.aten.convolution(x, weight, None, *sizes)
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *sizes, [*wanted, False])

    assert predicted_peak_bytes(lambda: run) == pytest.approx(
        peak_bytes(run, before=run), abs=0.1 * weight.nbytes
    )


CONVOLUTIONS = {
    "3-D": lambda: nn.Sequential(*(nn.Conv3d(16, 16, 3, padding=1) for _ in range(3))),
    "3-D, strided": lambda: nn.Sequential(nn.Conv3d(16, 16, 3, 2, 1), nn.Conv3d(16, 16, 3, padding=1)),
    "strided": lambda: nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 16, 3, 2, 1)),
    "depthwise": lambda: nn.Sequential(*(nn.Conv2d(16, 16, 3, 1, 1, groups=16) for _ in range(3))),
    "grouped": lambda: nn.Sequential(*(nn.Conv2d(16, 16, 3, 1, 1, groups=4) for _ in range(3))),
    "transposed": lambda: nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ConvTranspose2d(16, 8, 2, 2)),
    "few channels": lambda: nn.Sequential(nn.Conv2d(16, 4, 3, 1, 1), nn.Tanh(), nn.Conv2d(4, 4, 3, 1, 1)),
}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("network", CONVOLUTIONS.items(), ids=lambda item: item[0])
def test_copies_inside_of_convolutions(network, images):
    """A Conv3d at batch 1 takes 27 times its input inside: 5.6 times the prediction without it."""
    name, make = network
    size = (16, 16, 24) if name.startswith("3-D") else (128, 192)
    net, x = make(), torch.randn(images, 16, *size, requires_grad=True)

    def step():
        net(x).square().mean().backward()
        net.zero_grad()
        x.grad = None

    predicted = predict(net, x, lambda y: y.square().mean()).step_bytes
    assert predicted == pytest.approx(peak_bytes(step, before=step), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "orders", [*itertools.product([torch.contiguous_format, torch.channels_last], repeat=2)]
)
def test_backward_of_a_norm(orders, dtype):
    """Of maps that lie alike, in one way or the other, PyTorch makes memory for the gradient twice."""

    def prepare():
        dy, x = (torch.randn(2, 64, 32, 48, dtype=dtype).contiguous(memory_format=order) for order in orders)
        weight, mean, inverse = torch.ones(3, 64)
        vectors = (weight, None, None, mean, inverse, True, 1e-5, [True, True, True])
        return lambda: torch.ops.aten.native_batch_norm_backward(dy, x, *vectors)

    assert predicted_peak_bytes(prepare) == pytest.approx(peak_bytes(prepare()), rel=0.02)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("function", [F.softmax, F.log_softmax], ids=lambda f: f.__name__)
def test_softmax_copies_maps_that_lie_otherwise(function, order):
    """A channels_last network that ends in full size: its loss takes one map more than of contiguous logits."""
    x = torch.randn(2, 19, 64, 96).to(memory_format=order).requires_grad_()
    step = lambda: function(x, 1).sum().backward()
    measured = peak_bytes(step, before=step)
    assert predicted_peak_bytes(lambda: step) == pytest.approx(measured, rel=0.02)
