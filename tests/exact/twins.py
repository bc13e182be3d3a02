"""What the tests of the exact modes share: functions that are hard to repeat, and the network to equal."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from revseg import Coupling, ReversibleSequence
from revseg.engine.steps import Update
from tests.helpers import assert_bitwise, run_step, small_block, small_f, small_input

exact_modes = pytest.mark.parametrize("exact", [True, "lossless"], ids=["grid", "lossless"])
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


class Autocast(nn.Module):
    """A network under autocast, its outputs in float32; None for none."""

    def __init__(self, network, dtype):
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x):
        with torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return self.network(x)


def networks(blocks, exact, dtype=None, **options):
    """The reversible network and the plain one that it has to equal."""
    ours = ReversibleSequence(blocks, exact=exact, **options)
    plain = copy.deepcopy(ours)
    plain.save_activations = True
    if exact == "lossless":
        plain = ReversibleSequence(list(plain), save_activations=True)
        assert plain.exact is False
    return Autocast(ours, dtype), Autocast(plain, dtype)


def assert_exact(blocks, x, exact, dtype=None, **options):
    ours, plain = networks(blocks, exact, dtype, **options)
    assert_bitwise(run_step(ours, x), run_step(plain, x))


def float_input(*shape, seed=0):
    return small_input(*shape, dtype=torch.float32, seed=seed)


def blocks_of(coupling, depth):
    return [small_block(coupling) for _ in range(depth)]


class Branches(nn.Module):
    """Reads its input three times."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.a(x) + 0.3 * x + self.b(x).tanh()


class Gate(nn.Module):
    """A value for each channel, [N, C, 1, 1]."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x.mean((2, 3), keepdim=True))


FUNCTIONS = {
    "batch norm": small_f,
    "dropout": lambda: nn.Sequential(small_f(), nn.Dropout(0.4)),
    "no norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1)),
    "spectral norm": lambda: spectral_norm(nn.Conv2d(4, 4, 3, padding=1)),
    "input read three times": Branches,
    "broadcast value": Gate,
    "no parameters": nn.Tanh,
    "frozen": lambda: small_f().requires_grad_(False),
}


class ThreeUpdates(Coupling):
    """Adds, and says so; two of its updates read the same stream."""

    additive = True

    @classmethod
    def couple(cls, x, h):
        return x + h

    @classmethod
    def uncouple(cls, y, h):
        return y - h

    def steps(self, name=""):
        name = name or type(self).__name__
        return [
            Update(f"{name}, f", self.f, self, source=0, target=1),
            Update(f"{name}, g", self.g, self, source=0, target=1),
            Update(f"{name}, sine", torch.sin, self, source=1, target=0),
        ]
