"""The reversible editions of known networks, beside their originals."""

from functools import cache

import pytest
import torch

from revseg.models import create_model
from revseg.sequence import ReversibleSequence
from revseg.testing import inversion_bound
from tests.models.networks import count, peak
from tests.models.test_models_contract import COUNTS

# Name of the original; options of a small edition; and of one with three more units, at 1/4.
EDITIONS = {
    "enet": (
        {"widths": (8, 16, 32), "depth": 1, "repeats": 1, "dropout": (0, 0)},
        {"depth": 4},
    ),
    "erfnet": (
        {"widths": (8, 16, 32), "depth": 1, "repeats": 1, "dilations": (2,), "dropout": (0, 0)},
        {"depth": 4},
    ),
    "espnet": ({"widths": (8, 16, 32), "p": 1, "q": 2}, {"p": 4}),
}
each_edition = pytest.mark.parametrize("original", EDITIONS)


def edition(original, deep=False, **options):
    small, deeper = EDITIONS[original]
    return create_model(f"{original}_rev", 2, **(small | (deeper if deep else {}) | options))


@cache
def peak_at(original, memory, deep=False):
    return peak(edition(original, deep, memory=memory))


@each_edition
def test_size_is_that_of_the_original_within_two_percent(original):
    """Of parameters and operations; that the table is right is a test of its own."""
    assert COUNTS[f"{original}_rev"] == pytest.approx(COUNTS[original], rel=0.02)


@each_edition
def test_a_lower_level_takes_less_memory(original):
    assert peak_at(original, "lowest") < peak_at(original, "balanced") < peak_at(original, "fastest")


@each_edition
def test_depth_costs_no_activations(original):
    """More units take room for the gradients of their parameters, and no map of any unit."""
    balanced, fastest = (
        peak_at(original, memory, deep=True) - peak_at(original, memory) for memory in ("balanced", "fastest")
    )
    gradients = 4 * (count(edition(original, deep=True)) - count(edition(original)))
    assert balanced <= 1.2 * gradients
    assert fastest > 10 * gradients


@each_edition
def test_bodies_invert(original):
    model = edition(original)
    bodies = [module for module in model.modules() if isinstance(module, ReversibleSequence)]
    assert bodies
    for body in bodies:
        channels = next(p for p in body.parameters() if p.ndim == 4).shape[1] * 2
        x = torch.randn(2, channels, 9, 7)
        body.eval()
        with torch.no_grad():
            error = (body.inverse(body(x)) - x).norm() / x.norm()
        assert error <= inversion_bound(body, x)


@each_edition
@pytest.mark.parametrize("exact", [True, "lossless"])
def test_exact_inversion_gives_the_gradients_of_the_twin(original, exact):
    results = []
    for saved in (False, True):
        torch.manual_seed(0)
        model = edition(original, exact=exact, save_activations=saved)
        model(torch.randint(0, 256, (2, 3, 33, 49), dtype=torch.uint8)).square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_edition
def test_odd_widths_are_refused(original):
    widths = (8, 17, 32)
    with pytest.raises(
        ValueError,
        match=r"(expected even widths, got|even widths of .*, got|multiples of 8, got) \(8, 17, 32\)",
    ):
        edition(original, widths=widths)
