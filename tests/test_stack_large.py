"""Maps so large that images go one by one and passes run merged: a second run still gives the same bits."""

import pytest
import torch

from revseg import OneSidedCoupling, ReversibleSequence
from revseg.kernels.merged import LEAST
from revseg.layers import asymmetric_pairs
from revseg.makers import _LARGE
from revseg.testing import plain_twin
from tests.helpers import assert_bitwise, relative_error, run_step

SIZE = (2, 32, 128, 160)


def blocks(**options):
    torch.manual_seed(0)
    return ReversibleSequence([OneSidedCoupling(asymmetric_pairs(16, (1, 2))) for _ in range(2)], **options)


def test_the_maps_are_large():
    stream = torch.Size((SIZE[0], SIZE[1] // 2, *SIZE[2:]))
    assert stream.numel() >= LEAST
    assert stream[1:].numel() >= _LARGE


@pytest.mark.parametrize("exact", [True, "lossless"])
def test_exact_inversion_is_exact(exact):
    net, x = blocks(exact=exact), torch.randn(SIZE)
    twin = plain_twin(net)
    assert_bitwise(run_step(net, x), run_step(twin, x))


@pytest.mark.parametrize("threads", [1, 2])
def test_streams_come_back(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        net, x = blocks(), torch.randn(SIZE)
        ours, saved = run_step(net, x), run_step(blocks(save_activations=True), x)
    finally:
        torch.set_num_threads(before)
    assert relative_error(ours.gradients, saved.gradients) < 1e-3
    assert all(torch.equal(ours.buffers[name], value) for name, value in saved.buffers.items())
