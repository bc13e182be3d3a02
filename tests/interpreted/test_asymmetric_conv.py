"""The asymmetric convolution as Triton kernels, against its twins and plain PyTorch."""

import dataclasses

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from revseg.kernels.asymmetric_conv import gpu, gpu_backward, gpu_statistics, op
from revseg.kernels.asymmetric_conv.op import asymmetric_conv, asymmetric_conv_backward, has_asymmetric_conv
from revseg.kernels.gpu.norm import parameters_of
from tests.interpreted.guarded import guarded, survives
from tests.kernels.asymmetric_conv_cases import Case, case, error, ours, plain, ratios

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


@pytest.fixture(autouse=True)
def _no_plain_version(monkeypatch):
    monkeypatch.setattr(op, "backward_reference", None)


@pytest.fixture
def large_tiles(monkeypatch):
    """The interpreter takes as long for a large tile as for a small one."""
    monkeypatch.setattr(gpu, "tile_size", lambda vertical, channels_last: (8, 32))


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert error(found[name], value) <= tolerance, f"{name}: {error(found[name], value):.2g}"


CASES = [
    {"kernel": (3, 1), "dilation": 2},
    {"kernel": (1, 5), "channels": 12, "out": 20, "batch": False, "slope": "shared"},
    {"kernel": (1, 3), "dilation": 3, "channels": 33, "out": 40, "first": True, "slope": 0.0},
]


@layouts
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_makes_at_most_twice_the_error_of_plain(layout, dtype, options):
    found = ratios(size=(1, 9, 14), dtype=dtype, layout=layout, **options)
    assert max(found.values()) <= 2, found


@layouts
@pytest.mark.parametrize("size", [(3, 1, 1), (1, 1, 37), (2, 37, 1), (1, 3, 5)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 1), (1, 3), (1, 1)], ids=str)
def test_maps_of_any_shape_also_smaller_than_the_dilation(large_tiles, layout, size, kernel):
    given = case(8, 8, kernel, 4, size, F32, layout, batch=False)
    assert_near(ours(given), plain(given.wide()))


@pytest.mark.parametrize("channels", [(72, 100), (128, 8), (16, 128)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_many_channels_go_block_by_block(channels, dtype):
    found = ratios(channels=channels[0], out=channels[1], size=(1, 9, 6), dtype=dtype)
    assert max(found.values()) <= 2, found


@pytest.mark.parametrize("channels", [(129, 8), (8, 129), (7, 8)])
def test_too_many_or_too_few_channels_have_no_kernel(channels):
    weight = torch.ones(channels[1], channels[0], 3, 1)
    assert not has_asymmetric_conv(torch.ones(1, channels[0], 2, 2), weight)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("slope", ["shared", 0.0, 0.01, 1.0], ids=str)
def test_norms_of_all_kinds(large_tiles, slope, affine):
    given = case(dtype=F32, size=(1, 9, 21), slope=slope, affine=affine)
    assert_near(ours(given), plain(given.wide()))


@layouts
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_statistics_are_those_of_what_is_stored(layout, dtype, monkeypatch):
    monkeypatch.setattr(gpu_statistics, "ROWS", 4)  # several levels
    given = case(size=(2, 9, 21), dtype=dtype, layout=layout)
    u, mean, var = asymmetric_conv(given.x, given.norm_x, given.weight, 1, True)
    assert mean.dtype == var.dtype == torch.float64
    assert u.stride() == given.x.stride()
    expected = u.double().mean((0, 2, 3)), u.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close((mean, var), expected, rtol=2e-7, atol=2e-7)
    assert torch.equal(asymmetric_conv(given.x, given.norm_x, given.weight, 1, False)[0], u)


@pytest.mark.parametrize("channels", [8, 48], ids=["one pass", "two passes"])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_wanted_is_none_and_the_rest_the_same(large_tiles, channels, first):
    given = case(channels, channels, dtype=BF16, size=(1, 9, 21), first=first)
    both = ours(given)
    for wanted in ((True, False), (False, True), (False, False)):
        found = gradients(given, wanted)
        assert [g is not None for g in found] == [*wanted, wanted[0] and not first]
        for g, name in zip(found, ("dx", "dweight", "sums"), strict=True):
            assert g is None or torch.equal(g, both[name])


def gradients(given: Case, wanted=(True, True)):
    return asymmetric_conv_backward(
        given.u, given.dz, given.norm, given.sums(), given.batch, given.x, given.norm_x, given.weight,
        given.dilation, wanted,
    )  # fmt: skip


@pytest.mark.parametrize("programs", [1, 3])
def test_programs_share_the_gradient_of_the_weight(monkeypatch, programs):
    monkeypatch.setattr(gpu_backward, "PROGRAMS", programs)
    given = case(dtype=F32, size=(2, 9, 21))
    assert_near(ours(given), plain(given.wide()))


@layouts
@pytest.mark.parametrize("gradient", ["expanded", "transposed"])
def test_maps_of_other_strides(large_tiles, layout, gradient):
    given = case(dtype=F32, size=(1, 9, 9), layout=layout)
    if gradient == "expanded":
        given.dz = given.dz[:, :, :1, :1].expand_as(given.dz)
    else:
        given.dz = given.dz.mT.contiguous().mT
    given.x = torch.cat((given.x, given.x), 1)[:, :8]
    given.weight = given.weight.contiguous(memory_format=torch.channels_last)
    assert_near(ours(given), plain(given.wide()))


@layouts
def test_offsets_of_large_maps_are_right(monkeypatch, large_tiles, layout):
    """Those of 64 bits, on a small map."""
    given, of = case(dtype=F32, layout=layout), gpu.Tiles.of
    expected = ours(given)

    def large(*args):
        tiles = of(*args)
        return dataclasses.replace(tiles, constants=tiles.constants | {"LARGE": True})

    monkeypatch.setattr(gpu.Tiles, "of", large)
    found = ours(given)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("channels", [8, 48], ids=["one pass", "two passes"])
def test_the_order_of_programs_makes_no_difference(monkeypatch, channels):
    given = case(channels, channels, dtype=BF16, size=(1, 9, 9))
    expected, set_place = ours(given), type(interpreter_builder).set_grid_idx

    def reversed_(self, *place):
        set_place(self, *(size - 1 - i for size, i in zip(self.grid_dim, place, strict=True)))

    monkeypatch.setattr(type(interpreter_builder), "set_grid_idx", reversed_)
    found = ours(given)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@layouts
@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_of_the_arguments_is_touched(large_tiles, layout, end):
    given = case(9, 9, dtype=F32, size=(1, 9, 21), layout=layout)
    guard = {name: guarded(getattr(given, name), end) for name in ("x", "weight", "u", "dz")}
    norms = {}
    for name in ("norm", "norm_x"):
        norm = getattr(given, name)
        vectors = ("mean", "var", "weight", "bias", "slope")
        norms[name] = dataclasses.replace(norm, **{v: guarded(getattr(norm, v), end) for v in vectors})
    assert survives(lambda: ours(dataclasses.replace(given, **guard, **norms)))


def test_that_would_show(large_tiles):
    given, of = case(dtype=F32, size=(1, 9, 21)), gpu.Tiles.of
    given.x = guarded(given.x, end=True)

    def call():
        def taller(*args):
            tiles = of(*args)
            return dataclasses.replace(tiles, sizes=(tiles.sizes[0] + 1, *tiles.sizes[1:]))

        gpu.Tiles.of = taller
        ours(given)

    assert not survives(call)


def test_nan_spreads_as_far_as_the_taps(large_tiles):
    given = case(dtype=F32, size=(1, 9, 21), dilation=2)
    given.x[0, 3, 4, 5] = float("nan")
    u = asymmetric_conv(given.x, given.norm_x, given.weight, 2, False)[0]
    assert u.isnan().nonzero()[:, 2:].unique(dim=0).tolist() == [[2, 5], [4, 5], [6, 5]]


@pytest.mark.parametrize("first", [True, False])
def test_operations_are_registered_as_torch_wants_them(large_tiles, first):
    given = case(dtype=F32, size=(1, 5, 7), first=first)
    of_x = gpu.NO_NORM if first else parameters_of(given.norm_x)
    check = torch.library.opcheck
    check(gpu._asymmetric_conv, (given.x, *of_x, given.weight, 1, first))
    sums, wanted = (given.sums(), (True, True)) if first else (None, (False, True))
    maps = given.u, given.dz, *parameters_of(given.norm), sums, given.x, *of_x
    check(gpu_backward._asymmetric_conv_backward, (*maps, given.weight, 1, *wanted))


def test_the_example_runs():
    x, norm, weight, dilation, statistics = op.example_inputs(torch.device("cpu"), F32)
    assert has_asymmetric_conv(x, weight)
    found = asymmetric_conv(x, norm, weight, dilation, statistics)
    expected = op.reference(x, norm, weight, dilation, statistics)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
