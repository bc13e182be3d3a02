"""What holds of a row by bands beside the modules on whole maps, whatever its norm and its dimensions."""

import copy

import torch

from revseg.layers.bands.cut import Bands
from revseg.layers.bands.module import ByBands
from tests.helpers import assert_same_result, relative_error, small_input
from tests.layers.stack_twins import Plain
from tests.layers.test_bands import step


def assert_equals_whole_maps(stack, cuts, size):
    """In float64, each image and band of these sizes, and more or fewer maps kept."""
    for kept, (images, band) in zip((0, 0.5, 2), cuts, strict=True):
        ours = ByBands(copy.deepcopy(stack), Bands(band, kept))
        x = small_input(images, 4, *size)
        assert_same_result(step(ours, x), step(Plain(stack), x), 1e-9)


def assert_twice_plain_at_most(stack, size, dtype):
    """The result by bands in this dtype, whose gradients make no more than twice plain's error."""
    exact = step(Plain(stack).double(), small_input(*size))
    ours, plain = ByBands(copy.deepcopy(stack), Bands(6000)).to(dtype), Plain(stack).to(dtype)
    found, rounded = (step(m, small_input(*size, dtype=dtype)) for m in (ours, plain))
    bound = 2 * relative_error(rounded.gradients, exact.gradients)
    assert relative_error(found.gradients, exact.gradients) <= bound
    return found


def assert_autocast_of_plain(stack, bound):
    x = small_input(2, 4, 9, 8, 7, dtype=torch.float32)
    ours, plain = ByBands(copy.deepcopy(stack), Bands(900)), Plain(stack)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (step(model, x) for model in (ours, plain))
    assert found.outputs[0].dtype == expected.outputs[0].dtype == torch.bfloat16
    assert relative_error(found.gradients, expected.gradients) < bound


def assert_second_derivative_and_frozen_parts(stack, size, frozen_parts):
    """In float64; `frozen_parts` are slices of the names of parameters."""
    x = small_input(2, 4, *size)
    penalties = []
    for model in (ByBands(copy.deepcopy(stack), Bands(300)), Plain(stack)):
        (dx,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), [*model.parameters()], allow_unused=True))
    torch.testing.assert_close(*penalties)
    names = [name for name, _ in stack.named_parameters()]
    for frozen in (names[part] for part in frozen_parts):
        ours, twin = ByBands(copy.deepcopy(stack), Bands(300)), Plain(stack)
        for name, p in zip(names * 2, [*ours.parameters(), *twin.parameters()], strict=True):
            p.requires_grad_(name not in frozen)
        for given in (x, x.detach()):
            assert_same_result(step(ours, given), step(twin, given), 1e-9)
