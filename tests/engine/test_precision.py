"""What the engine asks of dtypes and devices, and what a function computes in."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revseg import AdditiveCoupling, OneSidedCoupling, Recompute, ReversibleSequence
from revseg.engine import chain
from revseg.engine.drift import DEFAULT_TOLERANCE, HALF_TOLERANCE


class NoDouble(TorchDispatchMode):
    """A device without float64, as MPS and some of Intel's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)):
            raise TypeError(f"no float64: {func}")
        return out


def conv():
    return nn.Conv2d(8, 8, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReversibleSequence(AdditiveCoupling(conv(), conv()), OneSidedCoupling(conv())),
        lambda: ReversibleSequence(AdditiveCoupling(conv(), conv()), exact=True),
        lambda: ReversibleSequence(AdditiveCoupling(conv(), conv()), exact="lossless"),
        lambda: ReversibleSequence(AdditiveCoupling(conv(), conv()), per_block=True, keep=1),
        lambda: Recompute(nn.Conv2d(16, 8, 1)),
    ],
    ids=["default", "grid", "lossless", "per_block", "recompute"],
)
@pytest.mark.parametrize("size", [7, 40])  # all values are samples, or some
def test_a_device_without_float64_trains_and_is_checked(make, size):
    net = make()
    with NoDouble():
        net(torch.randn(2, 16, size, size)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


class Change(nn.Module):
    """What a block changes: in float32, as the stream is, though computed in another dtype."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x).float() - x


class Down(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv().bfloat16()

    def forward(self, x):
        return self.conv(x.bfloat16()).float()


@pytest.fixture
def tolerances(monkeypatch):
    found = []
    compare = chain.Fingerprint.compare

    def noted(self, reconstructed, finite, check, tolerance):
        found.append(tolerance)
        return compare(self, reconstructed, finite, check, tolerance)

    monkeypatch.setattr(chain.Fingerprint, "compare", noted)
    return found


@pytest.mark.parametrize(
    ("make", "dtype", "half"),
    [
        (conv, torch.bfloat16, True),
        (lambda: Change(conv()), torch.bfloat16, True),
        (lambda: Change(conv()), torch.float16, True),
        (Down, None, True),
        (conv, None, False),
        (lambda: Change(conv()), None, False),
    ],
    ids=["half", "float of half", "float of float16", "half parameters", "float", "float of float"],
)
def test_the_tolerance_follows_from_what_functions_compute_in(tolerances, make, dtype, half):
    """Values that end in float32 but were computed in bfloat16 were held to the tolerance of float32."""
    net = ReversibleSequence(AdditiveCoupling(make(), nn.Conv2d(8, 8, 1)))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = net(torch.randn(2, 16, 6, 5))
    y.square().mean().backward()
    assert tolerances == [HALF_TOLERANCE if half else DEFAULT_TOLERANCE]


@pytest.mark.parametrize("wrap", ["sequence", "recompute"])
def test_attention_takes_the_path_of_training_in_both_runs(wrap):
    """The first run is without gradients, where PyTorch has a path for inference alone: it zeroes what a mask covers."""
    torch.manual_seed(0)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, x):
            return self.encoder(x.transpose(1, 2), src_key_padding_mask=mask).transpose(1, 2)

    if wrap == "recompute":
        net = Recompute(Encoder()).eval()
        x = torch.randn(2, 8, 6, requires_grad=True)
    else:
        net = ReversibleSequence(AdditiveCoupling(Encoder(), Encoder())).eval()
        x = torch.randn(2, 16, 6, requires_grad=True)
    found = []
    for net.save_activations in (True, False):
        x.grad = None
        y = net(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(*found)
    assert torch.backends.mha.get_fastpath_enabled()
