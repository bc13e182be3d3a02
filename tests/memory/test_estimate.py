"""Estimates of plans: what their predictions give, as the search goes by estimates alone."""

import pytest
import torch
from torch import nn

from revseg.memory.apply import Part, apply_parts
from revseg.memory.fit import Search
from revseg.memory.follow import Follower
from revseg.memory.step import Step
from tests.memory.nets import DOUBLES, UNet

LOSS = nn.CrossEntropyLoss()
IMAGES = torch.empty(4, 3, 192, 192, device="meta")  # where maps are larger than all else


def search_of(model, bands):
    return Search(model, IMAGES, Step(LOSS), bands)


@pytest.mark.parametrize(("bands", "off"), [(False, 0.01), (True, 0.06)], ids=["again", "bands"])
def test_estimates_are_predictions(bands, off):
    search = search_of(UNet(), bands)
    late = search._can_be_late()
    found, standing = search._choices(late, bands)
    for choice in found[:: len(found) // 3]:
        assert choice.peak + standing == pytest.approx(search._plan(late, choice).peak, rel=off)


def test_rows_by_bands_are_by_bands_in_first_runs_too():
    """What is joined in what runs again never is whole, in neither run."""
    search = search_of(UNet(), True)
    rows = tuple(Part(name, 0, 6, by_bands=True) for name in DOUBLES)
    fitted = apply_parts(search.model, [Part("join"), *rows])
    follower, _ = search.step.run(fitted, IMAGES, Follower)
    joined = 4 * 16 * 192 * 192 * 4
    assert max(event.size for event in follower.events) < joined
