"""A stream updated by the activated map in the same pass: the bits of doing it in two."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from revseg.kernels.bn_act.op import bn_act, bn_act_add
from revseg.kernels.cpu import blocks
from tests.kernels.bn_act_cases import added, case, layouts, sizes, slopes, stream, ways

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (F64, F64), (F64, F32)]

dtypes = pytest.mark.parametrize(("wide", "dtype"), DTYPES, ids=str)
signs = pytest.mark.parametrize("sign", [1.0, -1.0])


@sizes
@layouts
@dtypes
@signs
@ways()
def test_equals_the_sum_of_stream_and_map_to_the_bit(size, layout, wide, dtype, sign):
    given = case(size, dtype, layout, "prelu")
    x, norm = stream(given, wide), given.norm()
    found = bn_act_add(given.u, norm, x, sign)
    assert found.dtype == wide
    assert found.stride() == given.u.stride()
    assert torch.equal(found, added(x, bn_act(given.u, norm), sign))


@layouts
@slopes
@signs
@pytest.mark.parametrize("train", [True, False])
def test_equals_it_for_any_activation(layout, slope, sign, train):
    given = case(dtype=F32, layout=layout, slope=slope, train=train)
    x, norm = stream(given, F32), given.norm()
    assert torch.equal(bn_act_add(given.u, norm, x, sign), added(x, bn_act(given.u, norm), sign))


@layouts
@dtypes
@pytest.mark.parametrize("block", [1, 7, 16, 40])
@ways("blocks")
def test_equals_it_for_blocks_of_any_size(monkeypatch, layout, wide, dtype, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    given = case((3, 2, 8, 12), dtype, layout, "prelu")
    x, norm = stream(given, wide), given.norm()
    assert torch.equal(bn_act_add(given.u, norm, x), x + bn_act(given.u, norm))


@layouts
@dtypes
def test_results_may_go_where_arguments_are(layout, wide, dtype):
    given = case(dtype=dtype, layout=layout, slope="prelu")
    x, norm, before = stream(given, wide), given.norm(), given.u.clone()
    expected, kept = bn_act_add(given.u, norm, x, -1.0), x.clone()
    assert torch.equal(x, kept)
    assert bn_act_add(given.u, norm, x, -1.0, out=x) is x
    assert torch.equal(x, expected)
    assert torch.equal(given.u, before)
    if wide == dtype:
        assert bn_act_add(given.u, norm, kept, -1.0, out=given.u) is given.u
        assert torch.equal(given.u, expected)


@layouts
def test_a_stream_of_other_strides_is_added_right(layout):
    given = case(dtype=F32, layout=layout)
    x, norm = stream(given, F32), given.norm()
    expected = x + bn_act(given.u, norm)
    others = (
        x.contiguous(),
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat((x, x), 1)[:, x.shape[1] :],
    )
    for other in others:
        assert torch.equal(bn_act_add(given.u, norm, other), expected)
    assert torch.equal(
        bn_act_add(given.u, norm, x[:1, :, :1, :1].expand_as(x))[0, :, 0, 0], expected[0, :, 0, 0]
    )


class Allocations(TorchDispatchMode):
    """The largest result of any operation, in values, that is not one of `known`."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.numel())
        return out


@layouts
@pytest.mark.parametrize(("wide", "dtype"), [(F32, F32), (F32, BF16)])
@ways("blocks")
def test_no_map_is_made_on_the_way(monkeypatch, layout, wide, dtype):
    monkeypatch.setattr(blocks, "BLOCK", 96)
    given = case((3, 2, 8, 12), dtype, layout, "prelu")
    x, norm = stream(given, wide), given.norm()
    with Allocations(given.u, x) as seen:
        bn_act_add(given.u, norm, x, out=x)
    assert 0 < seen.largest <= 96


def test_wrong_arguments_are_refused():
    given = case(dtype=F32)
    x, norm = stream(given, F32), given.norm()
    with pytest.raises(ValueError, match="expected a stream of the shape of the map"):
        bn_act_add(given.u, norm, x[:1])
    with pytest.raises(TypeError, match=r"got torch\.bfloat16"):
        bn_act_add(given.u, norm, x.bfloat16())
    with pytest.raises(ValueError, match="expected memory of shape"):
        bn_act_add(given.u, norm, x, out=torch.empty_like(x, memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="float64"):
        bn_act(given.u, norm, out=torch.empty_like(x, dtype=F64))
