"""Residues restore every bit pattern, and cost what they say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from revseg import AdditiveCoupling, AffineCoupling, OneSidedCoupling, ReversibleSequence
from revseg.exact import residue as module
from revseg.exact.residue import add, pack, restore
from revseg.memory import peak_bytes, saved_bytes
from revseg.tensors import bits
from tests.exact.twins import blocks_of, float_input, networks
from tests.helpers import run_step, small_f

FLOATS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
floats = pytest.mark.parametrize("dtype", FLOATS)
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 1e-45, -1e-45, 6e-8, 3e38]


def same_bits(a, b):
    return a.stride() == b.stride() and torch.equal(bits(a), bits(b))


def assert_restored(x, back):
    packed, layout = pack(x, back)
    assert same_bits(restore(back.clone(), packed, layout), x)
    return packed


@pytest.fixture
def chunks_of_eight(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 8)


# --- every pattern ------------------------------------------------------------------------------


@floats
def test_special_values(dtype):
    values = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    x, back = (each.flatten() for each in torch.meshgrid(values, values, indexing="ij"))
    assert_restored(x.contiguous(), back.contiguous())


@floats
def test_differences_around_every_threshold(dtype):
    differences = [0, 1, -1, 2, -2, 3, -3, 126, 127, 128, 129, -126, -127, -128, -129, 2**15 - 1, -(2**15)]
    ends = torch.iinfo(FLOATS[dtype])
    start = torch.full((len(differences) + 2,), 12345, dtype=FLOATS[dtype])
    x = start + torch.tensor([*differences, ends.min, ends.max], dtype=FLOATS[dtype])  # wraps around
    assert_restored(x.view(dtype), start.view(dtype))


@floats
@settings(max_examples=40)
@given(data=st.data(), size=st.integers(1, 40))
def test_any_patterns(dtype, data, size, chunks_of_eight):
    ends = torch.iinfo(FLOATS[dtype])
    patterns = st.lists(st.integers(ends.min, ends.max), min_size=size, max_size=size)
    x, back = (torch.tensor(data.draw(patterns), dtype=FLOATS[dtype]).view(dtype) for _ in "xy")
    assert_restored(x, back)
    near = bits(x) + torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size)))
    assert_restored(x, near.to(FLOATS[dtype]).view(dtype))


@floats
@pytest.mark.parametrize("every", ["escapes", "wide", "equal"])
@pytest.mark.parametrize("size", [1, 3, 8, 17])
def test_chunks_of_one_kind(every, size, dtype, chunks_of_eight):
    x = torch.zeros(size, dtype=FLOATS[dtype])
    assert_restored((x + {"escapes": 2, "wide": 200, "equal": 0}[every]).view(dtype), x.view(dtype))


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "a part of a larger tensor": lambda x: torch.cat((x, x))[2:],
    "one value": lambda x: x[:1, :1, :1, :1].clone(),
}


@floats
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    x = LAYOUTS[layout](float_input(2, 3, 5, 7).detach().to(dtype))
    h = float_input(2, 3, 5, 7, seed=1).detach().to(dtype)[: len(x), : x.shape[1], : x.shape[2], : x.shape[3]]
    back = (x + h - h).contiguous()
    packed, layout = pack(x, back)
    assert same_bits(restore(back, packed, layout), x)


def test_other_shapes_and_dtypes_are_refused():
    x = torch.ones(2, 3)
    for back in (x.double(), x[:, :2], x.half()):
        with pytest.raises(
            ValueError, match=r"uncouple must give back a stream \[2, 3\] float32 on cpu, got \["
        ):
            pack(x, back)


# --- what it costs ------------------------------------------------------------------------------


def test_bytes_of_known_differences():
    x = torch.zeros(1000, dtype=torch.int32)
    x[:100] = 50  # a byte more
    x[500:510] = 1000  # a byte and a value more
    packed, _ = pack(x.view(torch.float32), torch.zeros(1000))
    assert len(packed) == 1000 // 4 + 110 + 10 * 4


@pytest.mark.parametrize("coupling", [AdditiveCoupling, OneSidedCoupling, AffineCoupling])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_realistic_blocks_cost_a_sixteenth_and_escapes(coupling, dtype):
    shape = (2, 8, 32, 32)
    default, lossless = (networks(blocks_of(coupling, 16), exact, dtype)[0] for exact in (False, "lossless"))
    x = float_input(*shape)
    side = saved_bytes(lambda: lossless(x)) - saved_bytes(lambda: default(x))
    stream = x.nbytes / 2
    assert 1 / 16 < side / (32 * stream) < 1 / 10


def test_tensors_without_values_have_residues_of_about_the_size():
    side = {}
    for device in ("cpu", "meta"):
        default, lossless = (
            ReversibleSequence(blocks_of(AdditiveCoupling, 4), exact=exact).to(device)
            for exact in (False, "lossless")
        )
        x = float_input(2, 8, 32, 32).to(device)
        side[device] = saved_bytes(lambda x=x, net=lossless: net(x)) - saved_bytes(
            lambda x=x, net=default: net(x)
        )
        run_step(lossless, x.detach().requires_grad_(), lambda y: y.sum()) if device == "meta" else None
    assert side["meta"] == pytest.approx(side["cpu"], rel=0.2)


def test_fake_tensors_run_a_whole_step():
    with FakeTensorMode():
        sequence = ReversibleSequence(AdditiveCoupling(small_f(), small_f()), exact="lossless")
        x = torch.randn(2, 8, 6, 5, requires_grad=True)
        sequence(x).sum().backward()
    assert x.grad.shape == x.shape
    assert sequence[0].f[0].weight.grad is not None


# --- the peak of a step -------------------------------------------------------------------------

SHAPE, DEPTH = (2, 16, 64, 64), 16


def peak(exact):
    net = ReversibleSequence(
        [
            AdditiveCoupling(
                *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8)) for _ in "fg")
            )
            for _ in range(DEPTH)
        ],
        exact=exact,
    )
    x = float_input(*SHAPE)
    side = saved_bytes(lambda: net(x))

    def step():
        net(x).sum().backward()

    return peak_bytes(step, before=step), side


def test_the_grid_needs_no_memory_and_lossless_its_residues(monkeypatch):
    monkeypatch.setattr(
        module, "_CHUNK", 1 << 12
    )  # so that the chunk in work is small beside this stream too
    (default, saved), (grid, saved_grid), (lossless, saved_lossless) = map(peak, (False, True, "lossless"))
    assert saved_grid == saved
    assert grid <= 1.05 * default
    assert lossless <= default + (saved_lossless - saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spent", [True, False])
def test_a_sum_is_packed_as_it_is_added(dtype, spent):
    """In parts, without the difference as a whole; over the value, if nobody else needs that."""
    x, h = torch.randn(2, 300_000).to(dtype)
    value, out = h.clone(), h if spent else torch.empty_like(h)
    packed, layout = add(x, h, out)
    expected, expected_layout = pack(x, (x + value) - value)
    assert torch.equal(out, x + value)
    assert torch.equal(h, out if spent else value)
    assert torch.equal(packed, expected)
    assert layout == expected_layout
    assert torch.equal(restore(out - value, packed, layout), x)
