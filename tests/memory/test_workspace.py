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


STRIDED = {  # n, c_in, c_out, k, stride, padding, h, w, wanted
    "map": (2, 64, 64, 3, 2, 1, 48, 96, (True, False)),
    "map, one place": (2, 128, 256, 1, 2, 0, 48, 96, (True, False)),
    "weight, one place": (2, 128, 256, 1, 2, 0, 48, 96, (False, True)),
    "both": (2, 64, 64, 3, 2, 1, 48, 96, (True, True)),
    "weight of images": (2, 3, 32, 3, 2, 1, 192, 384, (False, True)),
    "wide weight of images": (2, 3, 32, 7, 2, 3, 192, 384, (False, True)),
    "large weight": (2, 256, 128, 3, 1, 1, 12, 24, (True, True)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", STRIDED)
def test_backward_with_a_stride_and_of_images(name, order, dtype):
    """One image of the gradient that arrives is copied, a weight of images was counted four times too large."""
    n, c_in, c_out, k, stride, padding, h, w, wanted = STRIDED[name]
    x = torch.randn(n, c_in, h, w, dtype=dtype).to(memory_format=order)
    weight, sizes = torch.randn(c_out, c_in, k, k, dtype=dtype), ([stride] * 2, [padding] * 2, [1, 1])
    dy = torch.randn_like(F.conv2d(x, weight, None, *sizes))

    def backward():
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, *sizes, False, [0, 0], 1, [*wanted, False]
        )

    assert_predicted(backward, x, weight, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("kernel", "dilation"), [((3, 3), 4), ((3, 1), 6), ((1, 3), 6), ((3, 3), 3), ((3, 3), 2)]
)
def test_weight_of_a_kernel_that_is_higher_than_the_map(kernel, dilation, order, dtype):
    """ICNet's last stage at 1/32 of 192 x 384: columns and four sums of the weight, where the map is wide enough too."""
    x = torch.randn(2, 128, 6, 12, dtype=dtype).to(memory_format=order)
    weight, padding = torch.randn(128, 128, *kernel, dtype=dtype), [dilation * (k // 2) for k in kernel]
    sizes = ([1, 1], padding, [dilation] * 2)
    dy = torch.randn_like(F.conv2d(x, weight, None, *sizes))

    def backward():
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, *sizes, False, [0, 0], 1, [False, True, False]
        )

    assert_predicted(backward, x, weight, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 64])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_part_of_a_larger_map_is_copied(order, groups, dtype):
    """Gradients of joined maps are such parts: those of every branch of a pyramid."""
    x, both = (
        torch.randn(2, channels, 48, 96, dtype=dtype).to(memory_format=order) for channels in (64, 128)
    )
    weight = torch.randn(64, 64 // groups, 3, 3, dtype=dtype)

    def backward():
        sizes = ([1, 1], [1, 1], [1, 1], False, [0, 0], groups)
        return torch.ops.aten.convolution_backward(both[:, 64:], x, weight, None, *sizes, [True, True, False])

    assert_predicted(backward, x, weight, x)


def assert_predicted(run, *stands):
    """Within three of a hundred, of all that stands there."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the rules are of oneDNN on a processor with vectors of 512 bits")
    measured = peak_bytes(run, before=run)
    tolerance = 0.03 * (measured + sum(x.nbytes for x in stands))
    assert predicted_peak_bytes(lambda: run) == pytest.approx(measured, abs=tolerance)


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


PASSES = {
    "larger": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "smaller": lambda x: F.interpolate(x, size=(12, 24), mode="bilinear", align_corners=True),
    "nearest": lambda x: F.interpolate(x, size=(12, 24), mode="nearest"),
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "mean of cells": lambda x: F.adaptive_avg_pool2d(x, 3),
    "mean of pools": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "mean": lambda x: x.mean((2, 3)),
    "sum of channels": lambda x: x.sum((0, 2, 3)),
    "sum of pixels": lambda x: x.sum((2, 3)),
    "sum": lambda x: x.sum(),
    "wider sum": lambda x: x.sum(dtype=torch.float64),
    "extremes": torch.aminmax,
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "part": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "part, channels last": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("function", PASSES.values(), ids=PASSES)
def test_copies_of_pools_resizing_and_sums(function, layout, dtype):
    """Of maps that lie otherwise, and in half precision in float32: a mean took twice its map, unseen."""
    x = layout(torch.randn(2, 16, 48, 96, dtype=dtype))
    run = lambda: function(x)
    assert predicted_peak_bytes(lambda: run) == pytest.approx(
        peak_bytes(run, before=run), abs=0.02 * x.nbytes
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["larger", "smaller", "nearest", "max", "mean of cells", "mean of pools"])
def test_copies_of_gradients_of_pools_and_resizing(name, layout):
    x = torch.randn(2, 16, 48, 96, requires_grad=True)
    y = PASSES[name](x)
    dy = layout(torch.randn_like(y))
    run = lambda: torch.autograd.grad(y, x, dy, retain_graph=True)
    assert predicted_peak_bytes(lambda: run) == pytest.approx(
        peak_bytes(run, before=run), abs=0.02 * (x.nbytes + y.nbytes)
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_three_channels_are_resized_by_pixels(channels):
    x = torch.randn(2, channels, 96, 192)
    run = lambda: F.interpolate(x, scale_factor=2, mode="bilinear")
    assert predicted_peak_bytes(lambda: run) == pytest.approx(peak_bytes(run, before=run), rel=0.05)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("function", [F.softmax, F.log_softmax], ids=lambda f: f.__name__)
def test_softmax_copies_maps_that_lie_otherwise(function, order):
    """A channels_last network that ends in full size: its loss takes one map more than of contiguous logits."""
    x = torch.randn(2, 19, 64, 96).to(memory_format=order).requires_grad_()
    step = lambda: function(x, 1).sum().backward()
    measured = peak_bytes(step, before=step)
    assert predicted_peak_bytes(lambda: step) == pytest.approx(measured, rel=0.02)
