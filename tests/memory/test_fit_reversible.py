"""Where a change of the architecture is allowed, rows of residual blocks become chains if that serves what was asked for."""

import importlib

import pytest
import torch
from torch import nn

from revseg import fit, reversible
from revseg.memory import Plan, predict
from revseg.memory.plan import Choice
from revseg.sequence import set_save_activations
from tests.memory.nets import UNet

IMAGES = torch.empty(2, 3, 64, 96, device="meta")


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def deep(count=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *(Block(8) for _ in range(count)), nn.Conv2d(8, 5, 1))


@pytest.fixture
def nothing_exact(monkeypatch):
    """Exact means find nothing, as if the row were so deep that a chain takes less: some forty blocks, minutes of planning."""
    planning = importlib.import_module("revseg.memory.fit")
    none = lambda estimate, bands=False: [Choice({}, int(estimate.live({}).max()), 1.0)]
    monkeypatch.setattr(planning, "choices", none)


@pytest.fixture
def fitted(nothing_exact):
    return fit(deep(), IMAGES, factor=2, reversible=True)


def test_a_deep_row_becomes_a_chain_where_nothing_exact_does(fitted):
    with pytest.raises(ValueError, match="expected a budget of at least"):
        fit(deep(), IMAGES, factor=2)
    assert fitted.plan.chains == (tuple(str(i) for i in range(1, 9)),)
    assert "reversible, another architecture: 1, 2, 3" in str(fitted.plan)
    assert predict(fitted, IMAGES).peak == pytest.approx(fitted.plan.peak, rel=0.01)
    assert fitted.plan.time > 1


def test_the_network_is_that_of_reversible(fitted):
    """Outputs and gradients are those of the converted network in plain autograd, from the same weights."""
    converted, _ = reversible(deep(), torch.randn(1, 3, 64, 96))
    set_save_activations(converted, True)
    images = torch.randn(2, 3, 64, 96)
    for model in (fitted.double().train(), converted.double().train()):
        model.zero_grad()
        model(images.double()).square().mean().backward()
    assert list(fitted.state_dict()) == list(converted.state_dict())
    for p, q in zip(fitted.parameters(), converted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)


def test_the_plan_is_a_value(fitted, tmp_path):
    fitted.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == fitted.plan
    again = plan.apply(deep())
    assert list(again.state_dict()) == list(fitted.state_dict())
    with pytest.raises(ValueError, match="expected a network with a module '6', got Sequential without"):
        plan.apply(deep(4))


def test_time_counts_for_chains_too(nothing_exact):
    """A step with a chain runs each block twice."""
    model = deep(4)
    assert not fit(model, IMAGES, time=1.2, reversible=True).plan.chains
    assert fit(model, IMAGES, time=2.5, reversible=True).plan.chains


def test_exact_means_are_taken_where_they_do():
    assert not fit(deep(3), IMAGES, factor=1.2, reversible=True).plan.chains


def test_a_network_without_such_rows_is_fitted_as_ever():
    images = torch.empty(2, 3, 64, 64, device="meta")
    plans = [fit(UNet(), images, factor=1.5, reversible=allowed).plan for allowed in (True, False)]
    assert plans[0] == plans[1]


def test_the_example_must_be_positional():
    with pytest.raises(ValueError, match="expected an example of positional arguments"):
        fit(deep(3), {"input": IMAGES}, factor=2, reversible=True)
