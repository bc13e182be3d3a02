"""The bands of an upsampled map, put together, are the map; their gradients are its transpose."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from revseg.kernels.cpu import bilinear
from revseg.kernels.cpu.bilinear import Upsampling
from tests.helpers import TORCH, small_input

# Positions are rounded with FMA, and so are the sums of products.
fuses = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512") or TORCH < (2, 9),
    reason="needs a CPU, and a build of torch, that fuses",
)
aligned = pytest.mark.parametrize("align_corners", [False, True])
SIZES = [((16, 32), (128, 256)), ((21, 17), (168, 300)), ((60, 80), (61, 1000)), ((64, 64), (64, 64))]


def upsampled(source, size, align_corners):
    """All bands in one map; every pixel is written once."""
    upsampling = Upsampling(source, size, align_corners)
    result = torch.full((*source.shape[:2], *size), torch.nan, dtype=upsampling.dtype)
    for band in upsampling.bands():
        assert result[band.images, :, band.rows].isnan().all()
        result[band.images, :, band.rows] = upsampling.forward(band)
    return result


def transposed(source, doutput, align_corners):
    upsampling = Upsampling(source, doutput.shape[-2:], align_corners)
    dsource = torch.zeros_like(source)
    for band in upsampling.bands():
        upsampling.add_gradient(band, doutput[band.images, :, band.rows], dsource)
    return dsource


@fuses
@aligned
@pytest.mark.parametrize(("low", "size"), SIZES, ids=str)
def test_bits_are_those_of_interpolate(low, size, align_corners):
    source = small_input(2, 19, *low, dtype=torch.float32, requires_grad=False)
    expected = F.interpolate(source, size, mode="bilinear", align_corners=align_corners)
    assert torch.equal(upsampled(source, size, align_corners), expected)


@fuses
@aligned
@pytest.mark.parametrize("w", [1, 2, 7, 33, 256, 1000])
@pytest.mark.parametrize("width", [1, 2, 5, 34, 511, 2048])
def test_weights_are_those_of_interpolate(w, width, align_corners):
    columns = torch.eye(w)[None, :, None]  # interpolated: how much each source has of each output
    expected = F.interpolate(columns, (1, width), mode="bilinear", align_corners=align_corners)
    assert torch.equal(upsampled(columns, (1, width), align_corners), expected)
    rows, expected = columns.transpose(2, 3), expected.transpose(2, 3)
    assert torch.equal(upsampled(rows, (width, 1), align_corners), expected)


@given(
    low=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    align_corners=st.booleans(),
    band_bytes=st.sampled_from([1, 500, 3000, bilinear.BAND_BYTES]),
)
def test_any_size_in_bands_of_any_height(low, size, align_corners, band_bytes):
    source = small_input(3, 4, *low)
    expected = F.interpolate(source, size, mode="bilinear", align_corners=align_corners)
    doutput = small_input(*expected.shape, seed=1, requires_grad=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bilinear, "BAND_BYTES", band_bytes)
        found = upsampled(source.detach(), size, align_corners)
        gradient = transposed(source.detach(), doutput, align_corners)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, source, doutput), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 19, 128, 256), (8, 19, 16, 32), (2, 150, 64, 64), (1, 2, 512, 512)])
@pytest.mark.parametrize("factor", [8, 1])
def test_bands_are_small_but_not_tiny(shape, factor):
    height, width = (factor * side for side in shape[-2:])
    upsampling = Upsampling(torch.empty(shape, device="meta"), (height, width), False)
    sizes = [upsampling.forward(band).nbytes for band in upsampling.bands()]
    row = shape[1] * width * 4
    assert max(sizes) <= max(bilinear.BAND_BYTES, row)
    everything = shape[0] * height * row
    together = everything if factor == 1 else shape[0] * factor * row  # between two rows of the source
    assert max(sizes) > 0.4 * min(bilinear.BAND_BYTES, together, everything)


def test_infinite_values_stay_where_interpolate_leaves_them():
    source = small_input(1, 19, 8, 8, dtype=torch.float32, requires_grad=False)
    source[0, 3, 2, 5] = -torch.inf
    expected = F.interpolate(source, (40, 40), mode="bilinear")
    found = upsampled(source, (40, 40), False)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@aligned
def test_a_map_is_what_it_is_at_its_own_size(align_corners):
    """Infinite values too, which F.interpolate makes NaN of there."""
    source = small_input(2, 5, 8, 9, dtype=torch.float32, requires_grad=False)
    source[0, 3, 2, 5] = -torch.inf
    assert torch.equal(upsampled(source, (8, 9), align_corners), source)
    half = source.bfloat16()
    assert torch.equal(upsampled(half, (8, 9), align_corners), half.float())


def test_without_values_one_band_stands_for_all_of_its_shape():
    source = torch.empty(1, 19, 64, 128, device="meta")
    shapes = [
        Upsampling(source, (512, 1024), False).forward(band).shape
        for band in Upsampling(source, (512, 1024), False).bands()
    ]
    real = Upsampling(torch.empty(1, 19, 64, 128), (512, 1024), False)
    assert sorted(shapes) == sorted({real.forward(band).shape for band in real.bands()})
