"""Estimates of plans: what their predictions give, as the search goes by estimates alone."""

import pytest
import torch
from torch import nn

from revseg.memory.apply import Part, apply_parts
from revseg.memory.fit import Search, _part, _predicted
from revseg.memory.follow import Follower
from revseg.memory.step import Step
from revseg.memory.trace import AGAIN
from tests.helpers import HELD_BY_TORCH
from tests.memory.nets import DOUBLES, UNet

LOSS = nn.CrossEntropyLoss()
IMAGES = torch.empty(4, 3, 192, 192, device="meta")  # where maps are larger than all else


def search_of(model, bands):
    return Search(model, IMAGES, Step(LOSS), bands)


# Where torch holds the gradient of what a row, or what runs again, returned to its end, estimates do not count that.
OFF_BY_BANDS = 0.12 if HELD_BY_TORCH else 0.06
MAP = 4 * 16 * 192 * 192 * 4


@pytest.mark.parametrize(("bands", "off"), [(False, 0.01), (True, OFF_BY_BANDS)], ids=["again", "bands"])
def test_estimates_are_predictions(bands, off):
    search = search_of(UNet(), bands)
    late = search._can_be_late()
    found, standing = search._choices(late, bands)
    for choice in found[:: len(found) // 3]:
        assert choice.peak + standing == pytest.approx(search._plan(late, choice).peak, rel=off)


class Shortcut(nn.Module):
    """The way around is computed last, while the map that it is added to waits."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs // 4, 1, bias=False), nn.BatchNorm2d(outputs // 4)
        self.conv2, self.bn2 = nn.Conv2d(outputs // 4, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)


class Pyramid(nn.Module):
    """A backbone gives several maps, all of which its second run makes again before the first gradient is there."""

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(3))
            self.norms = nn.ModuleList(nn.GroupNorm(4, 16) for _ in range(3))

        def forward(self, x):
            maps = []
            for stage, norm in zip(self.stages, self.norms, strict=True):
                x = torch.tanh(stage(x))
                maps.append(norm(x))
            return maps

    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.Backbone(), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        return sum(self.head(each) for each in self.backbone(x))


SECOND_RUNS = {
    "shortcut": lambda: nn.Sequential(
        Shortcut(3, 16), Shortcut(16, 16), Shortcut(16, 16), nn.Conv2d(16, 5, 1)
    ),
    "pyramid": Pyramid,
}


@pytest.mark.parametrize("net", SECOND_RUNS.values(), ids=SECOND_RUNS)
def test_second_runs_are_estimated_as_a_whole(net):
    """What a call needs while it runs again, and not only while its gradients are computed: each by itself."""
    search = search_of(net(), False)
    estimate = search._estimate(False)
    for key, candidate in estimate.candidates.items():
        if key[3] == AGAIN:
            estimated = int(estimate.live({key: candidate}).max()) + estimate.standing
            fitted = apply_parts(search.model, [_part(key, candidate)])
            peak = _predicted(fitted, IMAGES, search.step).peak
            assert estimated == pytest.approx(peak, abs=0.01 * peak + HELD_BY_TORCH * MAP), key


class Row(nn.Module):
    """Four blocks of large maps."""

    def __init__(self):
        super().__init__()
        self.row = nn.Sequential(*(Shortcut(3 if i == 0 else 32, 32) for i in range(4)))
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, x):
        return self.head(self.row(x))


def test_what_leads_to_a_large_map_runs_again_in_what_leads_to_the_next():
    plan = search_of(Row(), False).plan(time=10)
    led_to = {part.behind for part in plan.parts if part.name == "row" and part.first == 0}
    assert 3 in led_to  # which no cut of four blocks into equal pieces gives


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
