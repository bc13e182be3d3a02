"""`Stack` against the modules it is made of: outputs, gradients, running statistics."""

import copy

import pytest
import torch
from torch import nn

from revseg.layers.blocks import ConvBNAct, ImageConvBNAct, asymmetric_pairs
from revseg.layers.convolution import Convolution
from revseg.layers.images import normalize_images
from revseg.layers.stack import Stack
from tests.helpers import assert_same_result, relative_error, run_step, small_input
from tests.layers.stack_twins import Plain, by_name, layer, small_stack, stirred


def step(module, x, **options):
    result = run_step(module, x, **options)
    result.gradients, result.buffers = by_name(result.gradients), by_name(result.buffers)
    return result


def assert_same(stack, x, tolerance=1e-9):
    """One step of the stack and of its modules."""
    plain = Plain(stack)
    assert_same_result(step(stack, x), step(plain, x), tolerance)


LAYERS = {
    "prelu": lambda: [layer(8, 6), layer(6, 5)],
    "shared slope": lambda: [layer(8, 6, activation="prelu_shared"), layer(6, 5, activation="prelu_shared")],
    "relu": lambda: [layer(8, 6, activation="relu"), layer(6, 5)],
    "leaky": lambda: [layer(8, 6, act=nn.LeakyReLU(0.1)), layer(6, 5, act=nn.LeakyReLU(-0.5))],
    "linear": lambda: [layer(8, 6, act=nn.Identity()), layer(6, 5)],
    "conv bias": lambda: [layer(8, 6, conv=nn.Conv2d(8, 6, 3)), layer(6, 5, conv=nn.Conv2d(6, 5, 1))],
    "groups": lambda: [layer(8, 8, conv=nn.Conv2d(8, 8, 3, groups=8)), layer(8, 6, conv=nn.Conv2d(8, 6, 1, groups=2))],
    "transposed": lambda: [
        layer(8, 6, conv=nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1)),
        layer(6, 4, conv=nn.ConvTranspose2d(6, 4, 2, 2, groups=2, bias=False)),
    ],
    "stride": lambda: [layer(8, 6, stride=2), layer(6, 5, (3, 1), stride=2)],
    "dilation": lambda: [layer(8, 6, dilation=2), layer(6, 5, (1, 3), dilation=3)],
    "affine off": lambda: [layer(8, 6, bn=nn.BatchNorm2d(6, affine=False)), layer(6, 5)],
    "momentum none": lambda: [layer(8, 6, bn=nn.BatchNorm2d(6, momentum=None)), layer(6, 5)],
    "momentum 0": lambda: [layer(8, 6, momentum=0.0), layer(6, 5, momentum=1.0)],
    "no running": lambda: [layer(8, 6, bn=nn.BatchNorm2d(6, track_running_stats=False)), layer(6, 5)],
    "dropout last": lambda: [*asymmetric_pairs(8, (1, 2), dropout=0.5)],
    "one layer": lambda: [layer(8, 6)],
    "nested": lambda: [Stack(layer(8, 6), Stack(layer(6, 6))), Stack(Stack(layer(6, 5)))],
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_its_modules(kind, train, runs):
    stack = stirred(Stack(*LAYERS[kind]())).double().train(train)
    count = sum(isinstance(m, ConvBNAct) for m in stack.modules())
    for layout in (torch.contiguous_format, torch.channels_last):
        x = small_input(2, 8, 9, 7).detach().contiguous(memory_format=layout).requires_grad_()
        assert_same(stack, x)
    assert runs == [count, count]  # the twin is made of other modules


@pytest.mark.parametrize("size", [(1, 8, 5, 7), (2, 8, 1, 1), (3, 8, 2, 9)], ids=str)
def test_equals_them_at_any_size(size, runs):
    assert_same(stirred(Stack(layer(8, 1), layer(1, 6))).double(), small_input(*size))
    assert runs == [2]


@pytest.mark.parametrize(
    ("options", "dilation"),
    [
        ({"kernel_size": (3, 1), "padding": (2, 0), "dilation": (2, 1)}, 2),
        ({"kernel_size": (1, 5), "padding": (0, 6), "dilation": (1, 3)}, 3),
        ({"kernel_size": 1}, 1),
        ({"kernel_size": 3, "padding": 1}, None),
        ({"kernel_size": (3, 1)}, None),
        ({"kernel_size": (3, 1), "padding": (1, 0), "stride": 2}, None),
        ({"kernel_size": (3, 1), "padding": (1, 0), "groups": 2}, None),
        ({"kernel_size": (3, 1), "padding": (1, 0), "bias": True}, None),
        ({"kernel_size": (2, 1), "padding": (1, 0)}, None),
    ],
    ids=str,
)
def test_an_op_knows_whether_it_is_an_asymmetric_convolution(options, dilation):
    op = Convolution.of(nn.Conv2d(4, 4, **{"bias": False, **options}))
    assert op is not None
    assert op.asymmetric == dilation


OTHERS = {
    "dropout between": lambda: [layer(8, 6), nn.Dropout(0.4), layer(6, 5)],
    "unknown activation": lambda: [layer(8, 6), layer(6, 6, act=nn.SiLU()), layer(6, 5)],
    "unknown norm": lambda: [layer(8, 6), layer(6, 6, bn=nn.GroupNorm(2, 6)), layer(6, 5)],
    "reflected": lambda: [layer(8, 6), layer(6, 6, conv=nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")), layer(6, 5)],
    "same": lambda: [layer(8, 6), layer(6, 6, conv=nn.Conv2d(6, 6, 3, padding="same")), layer(6, 5)],
    "other modules": lambda: [layer(8, 6), nn.MaxPool2d(2), nn.Tanh(), layer(6, 5)],
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_it_does_not_know_is_called(kind, runs):
    assert_same(stirred(Stack(*OTHERS[kind]())).double(), small_input(2, 8, 9, 7))
    assert runs == [1, 1]


@pytest.mark.parametrize("frozen", ["some", "norm", "convolutions", "first", "all", "slopes"])
@pytest.mark.parametrize("input_grad", [True, False])
def test_frozen_parts_get_no_gradient_and_others_theirs(frozen, input_grad, runs):
    stack = small_stack()
    chosen = {
        "some": lambda i, name, p: i % 2 == 0,
        "norm": lambda i, name, p: ".1." in name,
        "convolutions": lambda i, name, p: p.ndim == 4,
        "first": lambda i, name, p: name.startswith("0"),
        "all": lambda i, name, p: True,
        "slopes": lambda i, name, p: name.endswith("2.weight"),
    }[frozen]
    for i, (name, p) in enumerate(stack.named_parameters()):
        p.requires_grad_(not chosen(i, name, p))
    x = small_input(2, 8, 9, 7, requires_grad=input_grad)
    if frozen == "all" and not input_grad:
        assert not stack(x).requires_grad
        torch.testing.assert_close(stack(x), Plain(stack)(x))
    else:
        assert_same(stack, x)
    assert set(runs) == {3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_makes_at_most_twice_the_error_of_its_modules(dtype, train):
    stack = small_stack(torch.float32).to(dtype).train(train)
    x = small_input(2, 8, 33, 29, dtype=dtype)
    exact = copy.deepcopy(stack).double()
    plain, exact = step(Plain(stack), x), step(Plain(exact), x.detach().double().requires_grad_())
    ours = step(stack, x)
    assert relative_error(ours.gradients, exact.gradients) <= 2 * relative_error(
        plain.gradients, exact.gradients
    )
    for part in (lambda r: dict(enumerate(r.outputs)), lambda r: r.buffers):
        mine, theirs = (relative_error(part(r), part(exact)) for r in (ours, plain))
        assert mine <= 2 * theirs


@pytest.mark.parametrize("train", [True, False])
def test_without_gradients_it_gives_the_same(train, runs):
    stack = small_stack().train(train)
    x, plain = small_input(2, 8, 9, 7), Plain(stack)
    before = x.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(stack(x), plain(x))
    with torch.inference_mode():
        torch.testing.assert_close(stack(x), plain(x))
    assert torch.equal(x, before)
    for mine, theirs in zip(stack.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert runs == [3, 3]


def test_kernels_can_be_turned_off(monkeypatch, runs):
    stack, x = small_stack(), small_input(2, 8, 9, 7)
    plain = copy.deepcopy(stack)
    ours = step(stack, x)
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    assert_same_result(ours, step(plain, x), 1e-9)
    assert runs == [3]


def test_one_value_a_channel_is_refused_as_by_batch_norm():
    for module in (stack := Stack(layer(8, 6)), Plain(stack)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            module(torch.zeros(1, 8, 1, 1))
    assert stack.eval()(torch.zeros(1, 8, 1, 1)).shape == (1, 6, 1, 1)


def test_an_empty_batch_is_that_of_its_modules():
    stack = small_stack().eval()
    assert_same(stack, small_input(0, 8, 9, 7))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 7, 5, 5), torch.zeros(2, 8, 5, 5).long(), torch.zeros(2, 8)]
)
def test_wrong_inputs_are_refused_as_by_its_modules(wrong):
    for module in (stack := Stack(layer(8, 6)), Plain(stack)):
        with pytest.raises((RuntimeError, ValueError)):
            module(wrong)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bytes_are_normalised_where_they_are_used(train, layout, runs):
    images = torch.randint(0, 256, (3, 3, 9, 7), dtype=torch.uint8).contiguous(memory_format=layout)
    before = images.clone()
    stack = stirred(Stack(ImageConvBNAct(3, 6, stride=2), layer(6, 5))).double().train(train)
    plain = Plain(Stack(*(m for block in stack for m in block)))
    expected = step(plain, normalize_images(images).double())
    ours = step(stack, images)
    expected.gradients = dict(zip(ours.gradients, expected.gradients.values(), strict=True))
    expected.buffers = dict(zip(ours.buffers, expected.buffers.values(), strict=True))
    assert_same_result(ours, expected, 1e-9)
    assert torch.equal(images, before)
    assert runs == [2]


@pytest.mark.parametrize("kernels", ["0", "1"])
def test_wrong_images_are_refused(monkeypatch, kernels):
    monkeypatch.setenv("REVSEG_KERNELS", kernels)
    stack = Stack(ImageConvBNAct(3, 6), layer(6, 5))
    with pytest.raises(TypeError, match=r"uint8 or float, got torch\.int64"):
        stack(torch.zeros(2, 3, 5, 5, dtype=torch.int64))
    for wrong in (torch.zeros(2, 1, 5, 5), torch.zeros(2, 1, 5, 5, dtype=torch.uint8), torch.zeros(3, 5, 5)):
        with pytest.raises(ValueError, match=r"expected images \[N, 3, H, W\], got shape"):
            stack(wrong)
    with pytest.raises(RuntimeError, match=r"(?i)double"):
        stack(torch.zeros(2, 3, 5, 5, dtype=torch.float64))
    assert stack.double()(torch.zeros(2, 3, 5, 5, dtype=torch.uint8)).dtype == torch.float64
