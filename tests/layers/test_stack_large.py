"""Maps so large that images go one by one and passes are compiled: a second run still gives the same bits."""

import pytest
import torch

from revseg import OneSidedCoupling, ReversibleSequence, ops
from revseg.layers.blocks import asymmetric_pairs
from revseg.layers.layer_input import _LARGE
from revseg.testing import plain_twin
from tests.helpers import assert_bitwise, relative_error, run_step

SIZE = (4, 128, 64, 80)  # of which a convolution with dilation 8 rounds otherwise image by image


def blocks(**options):
    torch.manual_seed(0)
    return ReversibleSequence([OneSidedCoupling(asymmetric_pairs(64, (1, 8))) for _ in range(2)], **options)


def test_the_maps_are_large():
    stream = torch.Size((SIZE[0], SIZE[1] // 2, *SIZE[2:]))
    assert ops.is_large(stream)
    assert stream[1:].numel() >= _LARGE


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("exact", [True, "lossless"])
def test_exact_inversion_is_exact(exact, threads):
    net, x = blocks(exact=exact), torch.randn(SIZE)
    twin = plain_twin(net)
    assert_bitwise(run_step(net, x), run_step(twin, x))


def test_gradients_are_those_of_the_twin(threads):
    net, x = blocks(), torch.randn(SIZE)
    ours, saved = run_step(net, x), run_step(blocks(save_activations=True), x)
    assert relative_error(ours.gradients, saved.gradients) < 1e-3
    for name, value in saved.buffers.items():  # convolutions round otherwise on channels_last
        torch.testing.assert_close(ours.buffers[name], value, rtol=1e-4, atol=1e-6)
