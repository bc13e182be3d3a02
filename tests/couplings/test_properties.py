"""What holds for every coupling, shape, dtype and depth.

Outputs and buffers of the reversible run are bitwise those of plain autograd. Gradients are taken
at the reconstructed input, so their error has two parts: the one plain autograd makes too, and
the drift. Up to `SHALLOW` blocks the sum stays within twice plain autograd's error; beyond, the
inversion bound says how much more. (Measured in float32: a ratio of 1.0 to 1.2 at 2 blocks, 1.2
at 4 additive and 1.8 at 4 one-sided ones, 25 at 64 additive and 500 at 64 one-sided ones.)
"""

from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from revseg import AdditiveCoupling, HaarDownsample, OneSidedCoupling, ReversibleSequence, Squeeze
from revseg.couplings import COUPLINGS
from revseg.testing import distances, inversion_bound, plain_twin, training_step

SHALLOW = {"additive": 4, "affine": 4, "one_sided": 2}  # blocks
ACTIVATIONS = {"silu": lambda c: nn.SiLU(), "tanh": lambda c: nn.Tanh(), "gelu": lambda c: nn.GELU()}


def function(channels, out, activation, dropout, norm):
    return nn.Sequential(
        nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), bias=not norm),
        nn.BatchNorm2d(channels) if norm else nn.GroupNorm(1, channels),
        ACTIVATIONS[activation](channels),
        nn.Dropout(dropout),
        nn.Conv2d(channels, out, (1, 3), padding=(0, 1)),
        nn.BatchNorm2d(out) if norm else nn.Identity(),
    )


def block(coupling, channels, **f):
    kind, half = COUPLINGS[coupling], channels // 2
    out = half * kind.value_channels
    if coupling == "one_sided":
        return kind(function(half, out, **f))
    return kind(function(half, out, **f), function(half, out, **f))


sizes = st.tuples(st.integers(1, 3), st.sampled_from([4, 8, 16]), st.integers(3, 9), st.integers(3, 11))
functions = st.fixed_dictionaries(
    {
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "dropout": st.sampled_from([0.0, 0.3]),
        "norm": st.booleans(),
    }
)
couplings = st.sampled_from(sorted(COUPLINGS))


def image(size, seed, channels_last):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last) if channels_last else x


@settings(max_examples=40)
@given(
    coupling=couplings,
    size=sizes,
    f=functions,
    share=st.sampled_from([None, "blocks", "functions"]),
    frozen=st.sampled_from(["none", "first", "last", "some", "all"]),
    depth=st.integers(1, 4),
    keep=st.integers(0, 3),
    channels_last=st.booleans(),
    per_block=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_step_in_float64_is_plain_autograds(
    coupling, size, f, share, frozen, depth, keep, channels_last, per_block, seed
):
    torch.manual_seed(seed)
    blocks = [block(coupling, size[1], **f) for _ in range(depth)]
    if share == "blocks":
        blocks = [blocks[0]] * depth
    elif share == "functions":
        for each in blocks[1:]:
            each.f = blocks[0].f
    sequence = ReversibleSequence(blocks, keep=keep, per_block=per_block)
    freeze(sequence, frozen)
    sequence.double()
    x = image(size, seed, channels_last)
    found = distances(training_step(sequence, x), training_step(plain_twin(sequence), x))
    assert found["outputs"] == 0
    assert found["buffers"] == 0
    assert found["gradients"] < 1e-10


def freeze(sequence, which):
    parameters = list(sequence.parameters())
    blocks = list(sequence)
    chosen = {
        "none": [],
        "first": list(blocks[0].parameters()),
        "last": list(blocks[-1].parameters()),
        "some": parameters[::2],
        "all": parameters,
    }[which]
    for p in chosen:
        p.requires_grad_(False)


@settings(max_examples=25)
@given(coupling=couplings, size=sizes, f=functions, seed=st.integers(0, 1000), data=st.data())
def test_shallow_float32_gradients_are_as_good_as_plain_autograds(coupling, size, f, seed, data):
    depth = data.draw(st.integers(1, SHALLOW[coupling]))
    torch.manual_seed(seed)
    sequence = ReversibleSequence([block(coupling, size[1], **{**f, "dropout": 0.0}) for _ in range(depth)])
    x = image((2, *size[1:]), seed, channels_last=False)
    truth = training_step(plain_twin(sequence).double(), x)
    ours = distances(training_step(sequence, x), truth)
    plain = distances(training_step(plain_twin(sequence), x), truth)
    assert ours["outputs"] == plain["outputs"]
    assert ours["buffers"] == plain["buffers"]
    assert ours["gradients"] <= 2 * plain["gradients"] + 1e-7


@pytest.mark.parametrize("depth", [16, 64])
@pytest.mark.parametrize("coupling", sorted(COUPLINGS))
def test_deep_float32_gradients_are_off_by_the_drift_and_no_more(coupling, depth):
    f = {"activation": "silu", "dropout": 0.0, "norm": True}
    sequence = ReversibleSequence([block(coupling, 16, **f) for _ in range(depth)])
    x = torch.randn(2, 16, 9, 13)
    truth = training_step(plain_twin(sequence).double(), x)
    ours = distances(training_step(sequence, x), truth)["gradients"]
    plain = distances(training_step(plain_twin(sequence), x), truth)["gradients"]
    assert ours <= 2 * plain + 3 * inversion_bound(sequence, x)
    assert ours < 1e-2  # usable: the direction of the gradient is right to a hundredth


@settings(max_examples=25)
@given(
    coupling=couplings,
    size=sizes,
    f=functions,
    depth=st.sampled_from([1, 2, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_inversion_stays_within_its_bound(coupling, size, f, depth, dtype, training, seed):
    depth = min(depth, 2) if dtype is torch.bfloat16 else depth
    torch.manual_seed(seed)
    sequence = ReversibleSequence([block(coupling, size[1], **{**f, "dropout": 0.0}) for _ in range(depth)])
    sequence.to(dtype).train(training)
    x = image((2, *size[1:]), seed, channels_last=False).to(dtype)
    with torch.no_grad():
        y = sequence(x)
    buffers = [b.clone() for b in sequence.buffers()]
    found = sequence.inverse(y)
    error = max(
        float((a - b).double().norm() / b.double().norm())
        for a, b in zip(found.chunk(2, 1), x.chunk(2, 1), strict=True)
    )
    assert error <= inversion_bound(sequence, x)
    assert all(torch.equal(a, b) for a, b in zip(sequence.buffers(), buffers, strict=True))


def test_the_inversion_bound_is_not_slack():
    sequence = ReversibleSequence(
        [block("additive", 16, activation="silu", dropout=0.0, norm=True) for _ in range(16)]
    )
    x = torch.randn(2, 16, 9, 13)
    with torch.no_grad():
        error = (sequence.inverse(sequence(x)) - x).norm() / x.norm()
    assert error > inversion_bound(sequence, x) / 20


@pytest.mark.parametrize("down", [Squeeze, HaarDownsample])
@settings(max_examples=10)
@given(size=sizes, seed=st.integers(0, 1000), pair=st.booleans())
def test_down_sampling_inside_a_sequence(down, size, seed, pair):
    n, c, h, w = size
    torch.manual_seed(seed)
    f = {"activation": "silu", "dropout": 0.3, "norm": True}
    sequence = ReversibleSequence(
        block("additive", c, **f),
        down(),
        block("one_sided", 4 * c, **f),
        down(),
        block("affine", 16 * c, **f),
    ).double()
    x = image((n, c, 4 * h, 4 * w), seed, channels_last=False).double()
    inputs = x.chunk(2, 1) if pair else x
    found = distances(training_step(sequence, inputs), training_step(plain_twin(sequence), inputs))
    assert found["outputs"] == 0
    assert found["buffers"] == 0
    assert found["gradients"] < 1e-10


def test_squeeze_is_bitwise_exact_and_haar_orthonormal():
    x = torch.randn(2, 3, 6, 10)
    squeeze, haar = Squeeze(), HaarDownsample()
    assert torch.equal(squeeze.up(squeeze.down(x)), x)
    torch.testing.assert_close(haar.up(haar.down(x)), x)
    torch.testing.assert_close(haar.down(x).norm(), x.norm())
    basis = haar.down(torch.eye(24).view(24, 1, 4, 6)).flatten(1)  # a row for each pixel
    torch.testing.assert_close(basis @ basis.T, torch.eye(24))
    first = x[:, :, :2, :2].sum((2, 3)) / 2
    torch.testing.assert_close(haar.down(x)[:, :3, 0, 0], first)


@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 3, 6, 10), (2, 3, 4, 6, 2)])
def test_down_sampling_of_signals_images_and_volumes(shape):
    x, d = torch.randn(shape, dtype=torch.float64), len(shape) - 2
    half = [n // 2 for n in shape[2:]]
    for down in (Squeeze(), HaarDownsample()):
        y = down.down(x)
        assert list(y.shape) == [2, 3 * 2**d, *half]
        torch.testing.assert_close(down.up(y), x)
        torch.testing.assert_close(y.norm(), x.norm())
        corner = x[(..., *[slice(0, 2)] * d)].flatten(2)  # what becomes of it stands in one place
        place = y[(..., *[0] * d)]
        if isinstance(down, Squeeze):
            assert torch.equal(place, corner.flatten(1))
        else:
            signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            wavelets = reduce(torch.kron, [signs] * d) / 2 ** (d / 2)
            torch.testing.assert_close(place, (corner @ wavelets.T).mT.flatten(1))


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv3d])
@pytest.mark.parametrize("down", [Squeeze, HaarDownsample])
def test_down_sampling_inside_a_sequence_of_signals_and_volumes(conv, down):
    d = 1 if conv is nn.Conv1d else 3
    wide = 2 * 2**d
    sequence = ReversibleSequence(
        AdditiveCoupling(conv(2, 2, 3, padding=1), conv(2, 2, 1)),
        down(),
        OneSidedCoupling(conv(wide, wide, 1)),
    ).double()
    x = torch.randn(2, 4, *[4] * d, dtype=torch.float64)
    found = distances(training_step(sequence, x), training_step(plain_twin(sequence), x))
    assert found["outputs"] == 0
    assert found["gradients"] < 1e-10


@pytest.mark.parametrize("down", [Squeeze(), HaarDownsample()])
@pytest.mark.parametrize(
    "shape", [(2, 4, 5, 6), (2, 4, 6, 5), (2, 4, 5), (2, 4, 2, 3, 2), (2, 4), (2, 4, 2, 2, 2, 2)]
)
def test_down_sampling_refuses_odd_sizes(down, shape):
    with pytest.raises(ValueError, match="of even sizes, got"):
        ReversibleSequence(down)(torch.ones(shape))
