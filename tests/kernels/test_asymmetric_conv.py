"""The asymmetric convolution in plain PyTorch, against functions of PyTorch and autograd."""

import pytest
import torch

from revseg.kernels.asymmetric_conv.op import asymmetric_conv, asymmetric_conv_backward
from tests.kernels.asymmetric_conv_cases import case, error, ours, plain

layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


@layouts
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 1), 1), ((1, 3), 4), ((1, 5), 2), ((1, 1), 1)])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("slope", ["prelu", "shared", 0.01])
def test_equals_functions_of_pytorch(layout, kernel, dilation, batch, slope):
    given = case(5, 6, kernel, dilation, (2, 5, 7), layout=layout, batch=batch, slope=slope)
    found, expected = ours(given), plain(given)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert error(found[name], value) < 1e-11, name


def test_the_first_layer_of_a_chain_reads_its_input_as_it_is():
    given = case(5, 6, size=(2, 5, 7), first=True)
    found, expected = ours(given), plain(given)
    assert found.keys() == expected.keys()
    assert max(error(found[name], value) for name, value in expected.items()) < 1e-11


def test_what_is_not_wanted_is_none():
    given = case(5, 6, size=(2, 5, 7))
    assert asymmetric_conv(given.x, given.norm_x, given.weight, 1, False)[1:] == (None, None)
    for wanted in ((True, False), (False, True), (False, False)):
        found = asymmetric_conv_backward(
            given.u, given.dz, given.norm, given.sums(), True, given.x, given.norm_x, given.weight, 1, wanted
        )
        assert [g is not None for g in found] == [*wanted, wanted[0]]


@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (4, 5, 2, 1), (4, 6, 3, 1)])
def test_other_weights_are_refused(shape):
    with pytest.raises(ValueError, match="expected a weight"):
        asymmetric_conv(torch.ones(1, 5, 4, 4), None, torch.ones(shape), 1, False)


def test_a_dilation_below_one_is_refused():
    with pytest.raises(ValueError, match="expected a dilation of at least 1, got 0"):
        asymmetric_conv(torch.ones(1, 5, 4, 4), None, torch.ones(4, 5, 3, 1), 0, False)


def test_two_dtypes_are_refused():
    with pytest.raises(TypeError, match="expected a map and a weight of one dtype"):
        asymmetric_conv(torch.ones(1, 5, 4, 4), None, torch.ones(4, 5, 3, 1).double(), 1, False)
