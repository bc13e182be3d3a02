"""VNet at the memory levels: the same numbers, less and less memory.

At the least level sums go by bands and round otherwise, so it is compared in float64, and by its error."""

import copy

import pytest
import torch

from revseg.layers.bands.cut import Bands
from revseg.memory import peak_bytes
from revseg.models.policy import MEMORY_LEVELS, MemoryPolicy
from revseg.models.vnet import VNet
from revseg.testing import plain_twin
from tests.helpers import assert_bitwise, assert_same_result, relative_error
from tests.models.networks import images, step

SMALL = {"num_classes": 3, "widths": (4, 8, 16)}
OTHER_LEVELS = ("lowest", "balanced")
BY_BANDS = MemoryPolicy(
    stages=True, bands=Bands(bytes=3000)
)  # the least level, with bands that are small here too


def at_level(memory, **options):
    """VNet from one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VNet(**SMALL, memory=memory, **options)


@pytest.mark.parametrize("memory", [*OTHER_LEVELS, BY_BANDS], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"coupling": "additive"}, {"layout": "block_per_pair"}, {"skip": True}, {"skip": 2}],
    ids=str,
)
def test_state_and_names_do_not_depend_on_the_level(memory, options):
    fastest, other = at_level("fastest", **options), at_level(memory, **options)
    mine, theirs = other.state_dict(), fastest.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    changed = {name: value + 1 for name, value in theirs.items()}
    other.load_state_dict(changed)
    assert all(torch.equal(value, changed[name]) for name, value in other.state_dict().items())
    fastest.load_state_dict(other.state_dict())


@pytest.mark.parametrize("memory", OTHER_LEVELS)
@pytest.mark.parametrize("size", [(33, 49), (16, 17), (64, 32)], ids=str)
def test_outputs_are_bitwise_those_of_the_fastest(memory, size):
    x = images(*size)
    ours, fastest = step(at_level(memory), x), step(at_level("fastest"), x)
    assert torch.equal(ours.outputs[0], fastest.outputs[0])
    assert all(torch.equal(ours.buffers[name], value) for name, value in fastest.buffers.items())
    with torch.no_grad():
        found, expected = (at_level(level).eval()(x) for level in (memory, "fastest"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("memory", [*OTHER_LEVELS, BY_BANDS], ids=str)
@pytest.mark.parametrize("size", [(33, 49), (1, 1), (17, 64)], ids=str)
def test_gradients_are_those_of_the_fastest(memory, size):
    n = 9 if size == (1, 1) else 2  # batch norm needs several values
    ours, fastest = (step(at_level(level).double(), images(*size, n=n)) for level in (memory, "fastest"))
    assert_same_result(ours, fastest, 1e-9)


@pytest.mark.parametrize("memory", [*OTHER_LEVELS, BY_BANDS], ids=str)
def test_gradients_are_as_near_to_float64_as_those_of_the_modules(memory, monkeypatch):
    net, x = at_level(memory), images(33, 49)
    ours = step(net, x)
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    plain, exact = step(at_level("fastest"), x), step(at_level("fastest").double(), x)
    assert relative_error(ours.gradients, exact.gradients) <= 2 * relative_error(
        plain.gradients, exact.gradients
    )


@pytest.mark.parametrize("exact", [True, "lossless"])
@pytest.mark.parametrize("memory", [*OTHER_LEVELS, "fastest"])
def test_exact_gradients_are_bitwise_those_of_the_twin(memory, exact):
    net, x = at_level(memory, exact=exact), images(33, 49)
    twin, saved = plain_twin(net), at_level(memory, exact=exact, save_activations=True)
    ours = step(net, x)
    assert_bitwise(ours, step(twin, x))
    assert_bitwise(ours, step(saved, x))


@pytest.mark.parametrize("exact", [True, "lossless"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inversion_is_exact_by_bands(exact, dtype):
    """The second run cuts maps otherwise than the first, and finds the same bits, or it would raise an error."""
    if exact is True and dtype == torch.bfloat16:
        pytest.skip("the grid takes float32 and float64")
    net, x = at_level(BY_BANDS, exact=exact).to(dtype), images(65, 49, n=1)
    ours, plain = step(net, x), step(plain_twin(net), x)
    worst = {torch.float32: 1e-3, torch.bfloat16: 0.5}[dtype]
    assert relative_error(ours.gradients, plain.gradients) < worst


KINDS = [
    {"cpp_pool": "max"},
    {"cpp_pool": "max", "cpp_merge": "mean"},
    {"cpp_merge": "mean"},
    {"cpp_sizes": (1,)},
    {"cpp_sizes": (1, 3)},
    {"cpp_sizes": (9, 5)},
    {"cpp_style": "bins", "cpp_sizes": (1, 2, 3)},
    {"cpp_style": "bins", "cpp_pool": "max", "cpp_sizes": (1, 2)},
    {"cpp_post_norm": False},
    {"activation": "relu"},
    {"activation": "prelu_shared", "dropout": 0.3},
    {"skip": True},
    {"skip": 2},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("memory", ["lowest", "fastest", BY_BANDS], ids=str)
def test_every_kind_of_network_equals_its_modules(options, memory, monkeypatch):
    x = images(65, 81)
    net = at_level(memory, **options).double()
    plain = copy.deepcopy(net)
    ours = step(net, x)
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    assert_same_result(ours, step(plain, x), 1e-9)


def peak(memory, size, **options):
    """Of a training step, with gradients made anew."""
    torch.manual_seed(0)
    net, x = VNet(num_classes=3, memory=memory, **options), images(*size, n=1)

    def training():
        net.zero_grad()
        net(x).square().mean().backward()

    return peak_bytes(training, before=training)


def test_each_level_takes_less_memory_than_the_next():
    by_bands = MemoryPolicy(stages=True, bands=Bands(bytes=1 << 15))
    least, lowest, balanced, fastest = (peak(level, (256, 256)) for level in (by_bands, *MEMORY_LEVELS[1:]))
    assert least < 0.85 * lowest
    assert lowest < 0.9 * balanced < 0.9 * 0.8 * fastest


def test_depth_takes_no_memory():
    """Eight times as deep, within 2 %; narrow, so that maps count and not the gradients of parameters."""
    options = {"widths": (8, 16, 32)}
    shallow = peak("lowest", (256, 256), **options)
    assert peak("lowest", (256, 256), alpha=8, beta=16, **options) <= 1.02 * shallow
    by_bands = MemoryPolicy(stages=True, bands=Bands(bytes=1 << 16))
    shallow = peak(by_bands, (128, 256), **options)
    assert peak(by_bands, (128, 256), alpha=2, beta=4, **options) <= 1.02 * shallow


def test_an_unknown_level_is_refused():
    with pytest.raises(
        ValueError, match="unknown memory level 'low'; choose one of least, lowest, balanced, fastest"
    ):
        VNet(memory="low")
