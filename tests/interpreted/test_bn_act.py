"""Batch norm and activation as Triton kernels, against the modules of PyTorch and the plain twins."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from revseg.kernels.batch_statistics import gpu as batch_statistics_gpu
from revseg.kernels.batch_statistics import op as batch_statistics_op
from revseg.kernels.batch_statistics.op import batch_statistics
from revseg.kernels.bn_act import gpu as bn_act_gpu
from revseg.kernels.bn_act import op as bn_act_op
from revseg.kernels.bn_act.op import bn_act, bn_act_add
from revseg.kernels.bn_act_backward import gpu as bn_act_backward_gpu
from revseg.kernels.bn_act_backward import op as bn_act_backward_op
from revseg.kernels.bn_act_backward.op import bn_act_backward, bn_act_sums
from revseg.kernels.gpu import tiles as tiling
from revseg.kernels.gpu.norm import parameters_of
from revseg.kernels.norm import Norm
from tests.interpreted.guarded import guarded, survives
from tests.kernels.bn_act_cases import (
    HALF,
    Case,
    added,
    assert_near,
    case,
    layouts,
    ours,
    plain,
    ratios,
    slopes,
    stream,
)

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ODD = (2, 5, 9, 7)


@pytest.fixture(autouse=True)
def _no_plain_version(monkeypatch):
    """What the plain versions go by."""
    for op in (batch_statistics_op, bn_act_op, bn_act_backward_op):
        monkeypatch.setattr(op, "Matrix", None)
        monkeypatch.setattr(op, "native", None)


@pytest.fixture
def many_tiles(monkeypatch):
    """Several tiles for each program, several programs for each channel, and the last tile not full."""
    monkeypatch.setattr(tiling, "SIZE", 32)
    monkeypatch.setattr(tiling, "PROGRAMS", 10)


def everything(given: Case) -> dict[str, Tensor]:
    found = ours(given) | dict(zip(("mean", "var"), batch_statistics(given.u), strict=True))
    norm = given.norm()
    found["sums"] = bn_act_sums(given.u, given.dz, norm)
    found["added"] = bn_act_add(given.u, norm, given.dz, -1.0)
    return found


@layouts
@pytest.mark.parametrize("dtype", [F32, *HALF], ids=str)
@pytest.mark.parametrize(("train", "slope"), [(True, "prelu"), (True, 0.01), (False, "prelu")])
def test_makes_at_most_twice_the_error_of_plain(layout, dtype, train, slope):
    found = ratios((1, 6, 17, 9), dtype, layout, slope, train=train)
    assert max(found.values()) <= 2, found


@layouts
@slopes
def test_results_are_those_of_the_modules_of_pytorch(layout, slope):
    given = case(ODD, F32, layout, slope)
    assert_near(ours(given), plain(given.to(F64)), 1e-6)


@layouts
@pytest.mark.parametrize("size", [(3, 4, 1, 1), (1, 1, 3, 2), (2, 3, 1, 9), (1, 130, 2, 2)], ids=str)
def test_maps_of_any_shape(layout, size):
    given = case(size, F32, layout, "prelu", train=False)
    assert_near(ours(given), plain(given.to(F64)), 1e-6)


@layouts
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_many_tiles_make_no_difference(many_tiles, layout, dtype):
    given = case(ODD, dtype, layout, "prelu")
    tiles = tiling.Tiles.of(given.u)
    assert tiles.count >= 2 * tiles.parts() >= 4
    exact = plain(given.to(F64))
    tolerance = 1e-6 if dtype == F32 else 4e-3
    assert_near(ours(given), exact, tolerance)
    wide = given.u.double()
    expected = {"mean": wide.mean((0, 2, 3)), "var": wide.var((0, 2, 3), correction=0)}
    assert_near(dict(zip(expected, batch_statistics(given.u), strict=True)), expected, 2e-7)


@layouts
def test_offsets_of_large_maps_are_right(monkeypatch, many_tiles, layout):
    """Those of 64 bits, on a small map."""
    given, of = case((2, 3, 9, 5), F32, layout, "prelu"), tiling.Tiles.of
    expected = everything(given)

    def large(u):
        tiles = of(u)
        return dataclasses.replace(tiles, constants=tiles.constants | {"LARGE": True})

    monkeypatch.setattr(tiling.Tiles, "of", large)
    found = everything(given)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_map_with_gaps_is_refused():
    given = case(ODD, F32)
    with pytest.raises(ValueError, match="expected a map contiguous or in channels_last"):
        batch_statistics(given.u[:, :, :, ::2])


@layouts
@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.1), (-1000.0, 1.0)])
def test_a_mean_far_from_zero_costs_no_digits(many_tiles, layout, mean, std):
    u = case(ODD, F32, layout, mean=mean, std=std).u
    u[:, :, :2] += 5 * std  # tiles of different means
    expected = u.double().mean((0, 2, 3)), u.double().var((0, 2, 3), correction=0)
    found = batch_statistics(u)
    assert found[0].dtype == found[1].dtype == F64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@layouts
def test_the_order_of_programs_makes_no_difference(monkeypatch, many_tiles, layout):
    given = case((2, 3, 9, 5), F32, layout, "prelu")
    expected, forward = everything(given), type(interpreter_builder).set_grid_idx

    def backward(self, *place):
        forward(self, *(size - 1 - i for size, i in zip(self.grid_dim, place, strict=True)))

    monkeypatch.setattr(type(interpreter_builder), "set_grid_idx", backward)
    found = everything(given)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@layouts
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("wide", "dtype"), [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F64, F32)])
def test_a_stream_is_updated_by_the_bits_of_the_map(many_tiles, layout, sign, wide, dtype):
    given = case(ODD, dtype, layout, "prelu")
    x, norm = stream(given, wide), given.norm()
    found, z = bn_act_add(given.u, norm, x, sign), bn_act(given.u, norm)
    assert found.dtype == wide
    assert torch.equal(found, added(x, z, sign))


@layouts
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("gradient", ["dense", "expanded", "transposed"])
def test_results_may_go_where_arguments_are(dtype, layout, gradient):
    given = case(ODD, dtype, layout, "prelu")
    if gradient == "expanded":
        given.dz = given.dz[:1, :, :1, :1].expand_as(given.dz)
    elif gradient == "transposed":
        given.dz = given.dz.mT.contiguous().mT
    norm, before, dz = given.norm(), given.u.clone(), given.dz.clone()
    expected = bn_act_backward(given.u, given.dz, norm, True)
    assert torch.equal(given.u, before)
    assert torch.equal(given.dz, dz)
    assert expected[0].stride() == given.u.stride()
    for name in ("u", "dz") if gradient == "dense" else ("u",):
        u, dz = given.u.clone(), given.dz.clone()
        out = {"u": u, "dz": dz}[name]
        found = bn_act_backward(u, dz, norm, True, out=out)
        assert found[0] is out
        assert all(map(torch.equal, found, expected))
    z, u, x = bn_act(given.u, norm), given.u.clone(), given.u.clone()
    assert bn_act(u, norm, out=u) is u
    assert torch.equal(u, z)
    assert bn_act_add(given.u, norm, x, out=x) is x
    assert torch.equal(x, given.u + z)


@pytest.mark.parametrize("slope", ["prelu", 0.0, 0.01, 1.0], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_infinity_flow_as_in_plain(slope, value):
    given = case(ODD, F32, slope=slope, train=False)
    given.u[0, 1, 2, 3] = value
    found, expected = ours(given), plain(given)
    if slope == 0.0 and math.isnan(value):
        expected["du"][0, 1, 2, 3] = 0.0  # where its input is NaN, ReLU alone hands the gradient on
    for name in ("z", "du"):
        torch.testing.assert_close(found[name], expected[name], equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.3e38])
def test_rounding_to_bfloat16_is_that_of_torch(value):
    values = torch.tensor([value, -value, 1.00390625, 1.01171875, 1e-30, 0.0]).view(1, 1, 2, 3)
    one = torch.ones(1, dtype=F64)
    norm = Norm(0 * one, one, None, None, 1.0, 0.0)
    u, out = values.bfloat16(), torch.empty(1, 1, 2, 3, dtype=BF16)
    bn_act(u, norm, out=out)
    torch.testing.assert_close(out, u, rtol=0, atol=0, equal_nan=True)


@layouts
@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_of_the_arguments_is_touched(layout, end):
    given = case(ODD, F32, layout, "prelu")
    given.u, given.dz, x = (guarded(t, end) for t in (given.u, given.dz, given.u))
    parts = given.norm()
    fields = {name: getattr(parts, name).detach() for name in ("mean", "var", "weight", "bias", "slope")}
    norm = dataclasses.replace(parts, **{name: guarded(t, end) for name, t in fields.items()})

    def calls():
        batch_statistics(given.u)
        bn_act_add(given.u, norm, x, out=x)
        bn_act_backward(given.u, given.dz, norm, True, out=given.u)

    assert survives(calls)


def test_that_would_show():
    u = guarded(case(ODD, F32).u, end=True)

    def call():
        tiles = tiling.Tiles.of(u)
        tiling.Tiles.of = lambda u: dataclasses.replace(tiles, pixels=tiles.pixels + 1)
        batch_statistics(u)

    assert not survives(call)


@pytest.mark.parametrize("slope", ["prelu", 0.01])
def test_operations_are_registered_as_torch_wants_them(slope):
    given = case(ODD, F32, slope=slope)
    norm, out = given.norm(), torch.zeros_like(given.u)
    parameters = parameters_of(norm)
    check = torch.library.opcheck
    check(batch_statistics_gpu.batch_statistics, (given.u,))
    check(bn_act_gpu._bn_act, (given.u, *parameters, None, 1.0, out))
    check(bn_act_gpu._bn_act, (given.u, *parameters, given.dz, -1.0, out))
    check(bn_act_backward_gpu._bn_act_sums, (given.u, given.dz, *parameters))
    sums = bn_act_backward_gpu._bn_act_sums(given.u, given.dz, *parameters)
    check(bn_act_backward_gpu._bn_act_gradient, (given.u, given.dz, *parameters, sums, 90, out))
    check(bn_act_backward_gpu._bn_act_gradient, (given.u, given.dz, *parameters, None, 90, out))


def test_the_example_runs():
    u, norm = bn_act_op.example_inputs(torch.device("cpu"), F32)
    torch.testing.assert_close(bn_act(u, norm), bn_act_op.reference(u, norm))
