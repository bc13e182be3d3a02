"""How often a row by bands makes each of its layers, and what of that an estimate counts."""

from collections import Counter

import pytest
import torch
from torch import nn

from revseg.layers.bands.cut import Bands
from revseg.layers.bands.run import run_by_bands
from revseg.layers.convolution import Convolution
from revseg.layers.stack import layers_in
from revseg.memory.estimate import Estimate
from revseg.memory.step import Step
from revseg.memory.time_again import SECOND_RUN, runs_of_layers
from revseg.memory.trace import AGAIN, Tracer
from tests.memory.nets import UNet
from tests.memory.test_fit_bands import LOSS

ALL = Bands(bytes=1 << 30, kept=0)  # in one band


@pytest.mark.parametrize("ends_linear", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_runs_are_those_of_the_backward_pass(layers, ends_linear, monkeypatch):
    made, make_band = Counter(), Convolution.make_band

    def counted(self, *args):
        made[id(self)] += 1
        return make_band(self, *args)

    monkeypatch.setattr(Convolution, "make_band", counted)
    row = [m for _ in range(layers) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    found = layers_in(row[:-2] if ends_linear else row, without_norm=True)
    assert len(found) == layers
    (y,) = run_by_bands(found, (torch.randn(2, 4, 8, 8, requires_grad=True),), ALL)
    made.clear()
    y.sum().backward()
    assert [made[id(layer.op)] for layer in found] == runs_of_layers(layers, ends_linear)


def test_runs_of_a_layer_and_its_scores(monkeypatch):
    """Both runs count: the first one makes the layer for its statistics, and for the scores."""
    made, make_band, back = Counter(), Convolution.make_band, Convolution.band_input_gradient

    def counted(self, *args):
        made[id(self)] += 1
        return make_band(self, *args)

    def counted_back(self, *args):
        made[id(self), "back"] += 1
        return back(self, *args)

    monkeypatch.setattr(Convolution, "make_band", counted)
    monkeypatch.setattr(Convolution, "band_input_gradient", counted_back)
    layers = layers_in(
        [nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)], without_norm=True
    )
    (y,) = run_by_bands(layers, (torch.randn(2, 4, 8, 8, requires_grad=True),), ALL)
    y.sum().backward()
    first, last = (id(layer.op) for layer in layers)
    plainly = 1  # each runs once, and the scores' gradient is taken once
    again = [made[first] - plainly, made[last] - plainly + made[last, "back"] - plainly]
    assert again == runs_of_layers(2, ends_linear=True, needs_no_map=True)


def estimate(device):
    model = UNet()
    step = Step(LOSS, device=device)
    tracer, standing = step.run(model, torch.empty(2, 3, 256, 256, device="meta"), Tracer, Tracer.noting)
    return Estimate(tracer, model, standing)


def test_a_row_costs_its_runs_and_spares_copies():
    """Of contiguous maps a CPU copies as much as it computes in; bands lie as convolutions read them."""
    row, alone = ("join.1", 0, 6, 1), ("join.1", 0, 6, 0)
    on_cpu, on_gpu = (
        {key: each.candidates[key].cost / each.seconds for key in (row, alone)}
        for each in (estimate("cpu"), estimate("cuda"))
    )
    assert 1.5 * on_gpu[alone] < on_gpu[row] < 3.5 * on_gpu[alone]
    assert on_cpu[row] < on_gpu[row]


def test_making_the_input_again_counts():
    """A raised map is made again by who keeps what it was made of."""
    found = estimate("cuda")
    (call,) = found.candidates["join.1", 0, 6, 0].calls
    assert call.spared
    assert found.candidates["join.1", 0, 6, 0].cost > call.cost


def test_each_second_run_takes_a_moment_beside_its_operations():
    """Modules that run again as one take less than one by one."""
    found = estimate("cuda")
    one = [c for c in found.candidates.values() if c.key[3] == AGAIN and len(c.calls) == 1]
    assert len(one) > 2
    assert found.time([]) == 1
    for those in (one[:1], one):
        moment = found.time(those) - found.extra(those)
        assert moment == pytest.approx(len(those) * SECOND_RUN / found.seconds)
