"""Estimates of plans: what their predictions give, as the search goes by estimates alone."""

import pytest
import torch
from torch import nn

from revseg.memory.apply import Part, apply_parts
from revseg.memory.fit import Search
from revseg.memory.follow import Follower
from revseg.memory.step import Step
from tests.helpers import HELD_BY_TORCH
from tests.memory.nets import DOUBLES, UNet

LOSS = nn.CrossEntropyLoss()
IMAGES = torch.empty(4, 3, 192, 192, device="meta")  # where maps are larger than all else


def search_of(model, bands):
    return Search(model, IMAGES, Step(LOSS), bands)


# Where torch holds the gradient of a row's output to its end estimates do not count that.
OFF_BY_BANDS = 0.12 if HELD_BY_TORCH else 0.06


@pytest.mark.parametrize(("bands", "off"), [(False, 0.01), (True, OFF_BY_BANDS)], ids=["again", "bands"])
def test_estimates_are_predictions(bands, off):
    search = search_of(UNet(), bands)
    late = search._can_be_late()
    found, standing = search._choices(late, bands)
    for choice in found[:: len(found) // 3]:
        assert choice.peak + standing == pytest.approx(search._plan(late, choice).peak, rel=off)


class DenseBlock(nn.Module):
    """Every layer reads what all before it made: kept inputs are shared."""

    class Layer(nn.Module):
        def __init__(self, inputs):
            super().__init__()
            self.norm, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 16, 1)
            self.act, self.conv2 = nn.ReLU6(inplace=True), nn.Conv2d(16, 4, 3, padding=1)

        def forward(self, maps):
            return self.conv2(self.act(self.conv1(self.norm(torch.cat(maps, 1)))))

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(3 + 4 * i) for i in range(8))
        self.head = nn.Conv2d(35, 5, 1)

    def forward(self, x):
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps))
        return self.head(torch.cat(maps, 1))


def test_layers_that_keep_the_same_inputs_run_again_together():
    search = search_of(DenseBlock(), False)
    groups = search._estimate(False).groups()
    assert [f"layers.{i}" for i in range(1, 8)] in [[c.key[0] for c in group] for group in groups]
    plan = search.plan(time=1.4)
    assert sum(part.name.startswith("layers.") for part in plan.parts) >= 6
    assert plan.peak < 0.4 * plan.before


def test_what_an_operation_in_place_saves_is_a_copy():
    """`relu6_` saves what it was given, and so a copy, made behind its own node."""
    search = search_of(DenseBlock(), False)
    found, standing = search._choices(False, False)
    for choice in found[:: len(found) // 4]:
        assert choice.peak + standing == pytest.approx(search._plan(False, choice).peak, rel=0.02)


def test_rows_by_bands_are_by_bands_in_first_runs_too():
    """What is joined in what runs again never is whole, in neither run."""
    search = search_of(UNet(), True)
    rows = tuple(Part(name, 0, 6, by_bands=True) for name in DOUBLES)
    fitted = apply_parts(search.model, [Part("join"), *rows])
    follower, _ = search.step.run(fitted, IMAGES, Follower)
    joined = 4 * 16 * 192 * 192 * 4
    assert max(event.size for event in follower.events) < joined
