"""Batch norm and activation in one pass, against its reference and against the modules of PyTorch."""

import math

import pytest
import torch

from revseg.kernels.batch_statistics.op import batch_statistics
from revseg.kernels.bn_act.op import bn_act, reference
from revseg.kernels.bn_act_backward.op import bn_act_backward, bn_act_sums
from revseg.kernels.cpu import blocks
from revseg.kernels.norm import Norm
from revseg.memory import peak_bytes
from tests.kernels.bn_act_cases import (
    HALF,
    assert_near,
    case,
    layouts,
    ours,
    plain,
    ratios,
    sizes,
    slopes,
    ways,
)


@sizes
@layouts
@slopes
@ways()
def test_equals_the_modules_of_pytorch(size, layout, slope):
    given = case(size, layout=layout, slope=slope)
    assert_near(ours(given), plain(given))
    assert_near({"z": bn_act(given.u, given.norm())}, {"z": reference(given.u, given.norm())})


@layouts
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("train", [True, False])
@slopes
@ways("whole", "blocks")
def test_equals_them_without_parameters_and_with_running_statistics(layout, affine, train, slope):
    given = case(layout=layout, affine=affine, train=train, slope=slope)
    assert_near(ours(given), plain(given))


@pytest.mark.parametrize("train", [True, False])
@layouts
@ways("whole", "blocks")
def test_gradients_are_those_of_the_reference(train, layout):
    given = case(layout=layout, slope="prelu", train=train)
    u, bn, slope = given.u.clone().requires_grad_(), given.bn, given.slope.clone().requires_grad_()
    norm = given.norm()
    if train:
        norm = Norm(u.mean((0, 2, 3)), u.var((0, 2, 3), correction=0), bn.weight, bn.bias, slope, bn.eps)
    else:
        norm = Norm(norm.mean, norm.var, bn.weight, bn.bias, slope, bn.eps)
    asked = {"du": u, "dweight": bn.weight, "dbias": bn.bias, "dslope": slope}
    gradients = torch.autograd.grad(reference(u, norm), list(asked.values()), given.dz)
    expected = dict(zip(asked, gradients, strict=True))
    assert_near({name: g for name, g in ours(given).items() if name != "z"}, expected)


@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 6, 17, 9), (4, 1, 6, 6)], ids=str)
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("slope", ["prelu", 0.01])
@ways()
def test_makes_at_most_twice_the_error_of_plain(size, layout, dtype, train, slope):
    found = ratios(size, dtype, layout, slope, train=train)
    assert max(found.values()) <= 2, found


@layouts
@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.1), (-1000.0, 1.0)])
@ways()
def test_a_mean_far_from_zero_costs_no_digits(layout, mean, std):
    found = ratios((2, 3, 9, 7), torch.float32, layout, "prelu", mean=mean, std=std)
    assert max(found.values()) <= 2, found
    u = case((2, 3, 9, 7), torch.float32, layout, mean=mean, std=std).u
    expected = u.double().mean((0, 2, 3)), u.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(batch_statistics(u), expected, rtol=1e-6, atol=0)


@sizes
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_statistics_are_float64_and_nearer_than_those_of_plain(size, layout, dtype):
    u = case(size, dtype, layout).u
    mean, var = batch_statistics(u)
    assert mean.dtype == var.dtype == torch.float64
    wide = u.double()
    expected = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-7
    torch.testing.assert_close((mean, var), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@layouts
@pytest.mark.parametrize("gradient", ["dense", "expanded", "transposed"])
@pytest.mark.parametrize("train", [True, False])
@ways()
def test_results_may_go_where_arguments_are(dtype, layout, gradient, train):
    given = case(dtype=dtype, layout=layout, slope="prelu", train=train)
    if gradient == "expanded":
        given.dz = given.dz[:1, :, :1, :1].expand_as(given.dz)
    elif gradient == "transposed":
        given.dz = given.dz.transpose(2, 3).contiguous().transpose(2, 3)
    norm, before, dz = given.norm(), given.u.clone(), given.dz.clone()
    z = bn_act(given.u, norm)
    expected = bn_act_backward(given.u, given.dz, norm, train)
    assert torch.equal(given.u, before)
    assert torch.equal(given.dz, dz)
    assert expected[0].stride() == given.u.stride()
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}

    u = given.u.clone()
    assert bn_act(u, norm, out=u) is u
    assert torch.equal(u, z)
    u = given.u.clone()
    found = bn_act_backward(u, given.dz, norm, train, out=u)
    assert found[0] is u
    assert torch.equal(given.dz, dz)
    torch.testing.assert_close(found, expected, **tolerance)
    if gradient == "dense":
        found = bn_act_backward(given.u, dz, norm, train, out=dz)
        assert found[0] is dz
        assert torch.equal(given.u, before)
        torch.testing.assert_close(found, expected, **tolerance)


@layouts
@pytest.mark.parametrize("block", [1, 7, 16, 40, 1000])
@pytest.mark.parametrize("size", [(3, 2, 8, 12), (2, 3, 5, 7), (1, 5, 4, 4)], ids=str)
@ways("blocks")
def test_blocks_of_any_size_give_the_same(monkeypatch, layout, block, size):
    given = case(size, layout=layout, slope="prelu")
    expected = ours(given) | dict(zip(("mean", "var"), batch_statistics(given.u), strict=True))
    monkeypatch.setattr(blocks, "BLOCK", block)
    found = ours(given) | dict(zip(("mean", "var"), batch_statistics(given.u), strict=True))
    assert_near(found, expected, 1e-13)


@pytest.mark.parametrize(("block", "parts", "rows"), [(24, 4, [1] * 24), (96, 1, [1] * 6), (400, 1, [4, 2])])
def test_large_rows_are_split_and_the_last_block_is_shorter(monkeypatch, block, parts, rows):
    """What the test before relies on: one thread, maps of 8 x 12, six of them."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    matrix = blocks.Matrix(torch.zeros(3, 2, 8, 12))
    assert matrix.parts == parts
    assert [len(each) for each in matrix.blocks()] == [len(each) for each in matrix.scratch()] == rows


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ways("blocks")
def test_same_bits_twice(monkeypatch, layout, dtype):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    given = case((3, 4, 8, 12), dtype, layout, "prelu")
    first, second = ours(given), ours(given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@layouts
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("slope", ["prelu", 0.0, 0.01, 1.0], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@ways()
def test_nan_and_infinity_flow_as_in_plain(layout, train, slope, value):
    given = case(layout=layout, train=train, slope=slope, affine=False)
    given.u[0, 1, 2, 3] = value
    z, expected = bn_act(given.u, given.norm()), plain(given)["z"]
    torch.testing.assert_close(z, expected, equal_nan=True)
    du = bn_act_backward(given.u, given.dz, given.norm(), train)[0]
    expected = plain(given)["du"]
    if slope == 0.0 and not train and math.isnan(value):
        expected[0, 1, 2, 3] = 0.0  # where its input is NaN, ReLU alone hands the gradient on
    torch.testing.assert_close(du, expected, equal_nan=True)


@ways()
def test_nan_in_the_gradient_reaches_all_of_its_channel():
    given = case(slope="prelu")
    given.dz[1, 2, 0, 0] = float("nan")
    found = ours(given)
    assert found["du"][:, 2].isnan().all()
    assert found["du"][:, :2].isfinite().all()
    assert [found[name].isnan().tolist() for name in ("dweight", "dbias")] == [[False, False, True]] * 2


@layouts
@slopes
@pytest.mark.parametrize("train", [True, False])
def test_sums_are_those_of_the_gradients(layout, slope, train):
    given = case(layout=layout, slope=slope, train=train)
    norm = given.norm()
    _, dweight, dbias, dslope = bn_act_backward(given.u, given.dz, norm, train)
    found = bn_act_sums(given.u, given.dz, norm)
    expected = torch.stack((dbias, dweight / norm.inverse_deviation, dslope))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    turned = given.dz.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(bn_act_sums(given.u, turned, norm), found)


@layouts
@pytest.mark.parametrize("channels", [8, 32])
def test_sums_over_a_large_map_make_no_map(channels, layout):
    given = case((4, channels, 128, 256), torch.float32, layout)
    norm, dz = given.norm(), torch.ones_like(given.u)

    def sums():
        bn_act_sums(given.u, dz, norm)

    assert peak_bytes(sums, before=sums) < given.u.nbytes / 2
