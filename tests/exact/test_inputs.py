"""Exact modes: layouts, odd sizes, scales, dtypes and options leave not a bit different."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from revseg import (
    AdditiveCoupling,
    AffineCoupling,
    InversionError,
    OneSidedCoupling,
    Squeeze,
)
from tests.exact.twins import (
    DTYPES,
    FUNCTIONS,
    ThreeUpdates,
    assert_exact,
    blocks_of,
    dtypes,
    exact_modes,
    float_input,
    networks,
)
from tests.helpers import Through, assert_bitwise, modes, run_step, small_block, small_input


@exact_modes
@modes
@dtypes
def test_options(options, dtype, exact):
    assert_exact(blocks_of(AdditiveCoupling, 3), float_input(), exact, dtype, **options)


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "pair": lambda x: x.chunk(2, 1),
    "every second column": lambda x: (x[:, :4, :, ::2], x[:, 4:, :, ::2]),
    "pair of layouts": lambda x: (
        x[:, :4].to(memory_format=torch.channels_last),
        x[:, 4:].mT.contiguous().mT,
    ),
    "expanded": lambda x: x[:1, :, :1].expand(2, 8, 5, 7),
    "one image, one row": lambda x: x[:1, :, :1],
    "video": lambda x: x[:, :, None],
}


@exact_modes
@dtypes
@pytest.mark.parametrize("view", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_and_odd_sizes(view, dtype, exact):
    x = float_input(3, 8, 5, 7)
    first = view(x) if isinstance(view(x), torch.Tensor) else view(x)[0]
    conv, norm = (nn.Conv3d, nn.BatchNorm3d) if first.ndim == 5 else (nn.Conv2d, nn.BatchNorm2d)
    blocks = [
        AdditiveCoupling(*(nn.Sequential(conv(4, 4, 1), norm(4), nn.PReLU(4)) for _ in range(2)))
        for _ in "123"
    ]
    ours, plain = (Through(net, view) for net in networks(blocks, exact, dtype))
    assert_bitwise(run_step(ours, x), run_step(plain, x))


@exact_modes
@dtypes
def test_squeeze_inside(dtype, exact):
    blocks = [
        small_block(),
        Squeeze(),
        small_block(OneSidedCoupling, 32),
        Squeeze(),
        small_block(channels=128),
    ]
    assert_exact(blocks, float_input(2, 8, 12, 8), exact, dtype)


@exact_modes
def test_eval_mode_and_inputs_without_gradient(exact):
    ours, plain = networks(blocks_of(AdditiveCoupling, 3), exact)
    x = float_input().detach()
    assert_bitwise(run_step(ours.eval(), x), run_step(plain.eval(), x))


@exact_modes
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_pairs_of_which_one_needs_a_gradient(wanted, exact):
    ours, plain = networks(blocks_of(OneSidedCoupling, 3), exact)
    x = [float_input(2, 4, 6, 5, seed=i).requires_grad_(each) for i, each in enumerate(wanted)]
    assert_bitwise(run_step(ours, x), run_step(plain, x))
    assert_bitwise(  # and a loss of one output alone
        run_step(ours, x, lambda y1, y2: y2.square().mean()),
        run_step(plain, x, lambda y1, y2: y2.square().mean()),
    )


@exact_modes
def test_float64_streams(exact):
    ours, plain = networks(blocks_of(AdditiveCoupling, 30), exact)
    assert_bitwise(run_step(ours.double(), small_input()), run_step(plain.double(), small_input()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coupling", [AdditiveCoupling, OneSidedCoupling, AffineCoupling])
def test_lossless_half_precision_streams(dtype, coupling):
    ours, plain = (net.to(dtype) for net in networks(blocks_of(coupling, 30), "lossless"))
    result = run_step(ours, small_input(dtype=dtype))
    assert result.outputs[0].dtype == dtype
    assert_bitwise(result, run_step(plain, small_input(dtype=dtype)))


@exact_modes
@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 3), st.just(8), st.integers(1, 9), st.integers(1, 11)),
    scale=st.floats(-40, 13),
    coupling=st.sampled_from([AdditiveCoupling, OneSidedCoupling, ThreeUpdates]),
    function=st.sampled_from(["no norm", "group norm", "input read three times", "broadcast value"]),
    depth=st.integers(1, 6),
    dtype=st.sampled_from(list(DTYPES.values())),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_scale(exact, size, scale, coupling, function, depth, dtype, channels_last, seed):
    torch.manual_seed(seed)
    blocks = []
    for _ in range(depth):
        functions = [FUNCTIONS[function]() for _ in range(1 if coupling is OneSidedCoupling else 2)]
        for p in functions[0].parameters():
            p.data *= 2.0 ** torch.randint(-10, 2, ()).item()
        blocks.append(coupling(*functions))
    x = torch.randn(size) * 2.0 ** (scale if exact is True else 3 * scale)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    ours, plain = networks(blocks, exact, dtype)
    if exact is True and not largest_value(ours, x) < 4096:
        with pytest.raises(InversionError, match=r"the input|block \d \(\w+\), \w+: exact=True adds without"):
            run_step(ours, x.requires_grad_())
    else:
        assert_bitwise(run_step(ours, x.requires_grad_()), run_step(plain, x.requires_grad_()))


@torch.no_grad()
def largest_value(net, x):
    """Of all streams, after each update."""
    largest = 0.0
    with torch.autocast("cpu", net.dtype or torch.bfloat16, enabled=net.dtype is not None):
        streams = net.network._enter(x)
        for block in net.network:
            for step in net.network._exactly(block.steps()):
                largest = max(largest, *(s.abs().max().item() for s in streams))
                streams = step.forward(streams)
    return max(largest, *(s.abs().max().item() for s in streams))
