"""The check for hidden state sees a change anywhere in a map."""

import itertools

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, InversionError, Recompute, ReversibleSequence
from revseg.engine.drift import SAMPLES, Fingerprint

SHAPES = [
    (2, 32, 128, 256),
    (1, 3, 515, 517),
    (4, 16, 24, 20),
    (2, 4, 12, 24, 20),
    (8, 384, 65),
    (3, 5),
    (16384,),
]
LEAST = 1e-3  # of a map


def boxes(shape, generator):
    """A contiguous run, and boxes of several proportions, each at least a thousandth of the map."""
    numel = torch.Size(shape).numel()
    if len(shape) > 2:
        area = torch.Size(shape[2:]).numel()
        side = (LEAST * area) ** (1 / (len(shape) - 2))
        yield (slice(None), slice(None), *(window(size, side, generator) for size in shape[2:]))  # a mask's
        yield (*(window(size, size * LEAST ** (1 / len(shape)), generator) for size in shape),)
        yield (window(shape[0], 1, generator), slice(None), window(shape[2], 1, generator))
    count = max(1, int(LEAST * numel) + 1)
    start = int(torch.randint(numel - count + 1, (), generator=generator))
    yield torch.unravel_index(torch.arange(start, start + count), shape)


def window(size, length, generator):
    length = min(size, int(length) + 1)
    start = int(torch.randint(size - length + 1, (), generator=generator))
    return slice(start, start + length)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_change_of_a_thousandth_of_the_map_is_seen_wherever_it_is(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    note = Fingerprint.of([x])
    assert note.distance([x]) == 0
    for _ in range(10):
        for box in boxes(shape, generator):
            changed = x.clone()
            changed[box] += 1
            assert note.distance([changed]) > 0.05


@pytest.mark.parametrize("numel", [1, 100, SAMPLES, SAMPLES + 1])
def test_in_small_maps_every_value_is_compared(numel):
    x = torch.randn(numel)
    note = Fingerprint.of([x])
    for place in {0, numel // 2, min(numel, SAMPLES) - 1}:
        changed = x.clone()
        changed[place] += 10
        assert note.distance([changed]) > 0.5 or numel > SAMPLES


def test_the_layout_makes_no_difference():
    x = torch.randn(2, 16, 40, 50)
    others = [
        x.to(memory_format=torch.channels_last),
        torch.randn(2, 32, 40, 100)[:, 3:19, :, ::2].copy_(x),
        x.transpose(1, 3).contiguous().transpose(1, 3),
    ]
    assert all(Fingerprint.of([x]).distance([other]) == 0 for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_no_other_dtype_than_that_of_the_tensors_is_needed(dtype):
    note = Fingerprint.of([torch.randn(3, 4, dtype=dtype)])
    assert note.samples[0].dtype == torch.promote_types(dtype, torch.float32)


class Masked(nn.Module):
    """Valid pixels, handed over as an attribute."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return torch.tanh(self.conv(x)) * self.mask


@pytest.mark.parametrize(
    ("wrap", "where"),
    list(
        itertools.product(
            ["sequence", "recompute"], [(40, 44, 10, 20), (8, 56, 1, 2), (31, 32, 0, 96), (63, 64, 60, 96)]
        )
    ),
)
def test_a_mask_changed_between_the_passes_is_an_error(wrap, where):
    """A mask that changes inside of the map gave gradients 11 % off without a word: only its border was looked at."""
    torch.manual_seed(0)
    f = Masked()
    net = Recompute(f) if wrap == "recompute" else ReversibleSequence(AdditiveCoupling(f, f))
    f.mask = torch.ones(2, 1, 64, 96)
    y = net(torch.randn(2, 8 if wrap == "recompute" else 16, 64, 96))
    f.mask = f.mask.clone()
    top, bottom, left, right = where
    f.mask[:, :, top:bottom, left:right] = 0
    with pytest.raises(InversionError, match="hidden state"):
        y.square().mean().backward()
