"""Whole channels are dropped between a row by bands and its classifier: both go by bands nevertheless."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import fit
from revseg.memory import peak_bytes, predict
from revseg.memory.apply import Part, apply_parts
from tests.memory.nets import conv_norm
from tests.memory.test_fit_bands import LOSS, SIZE, assert_same_step, batch, trained
from tests.memory.test_handed_on import takings

ROW = Part("row", 0, 3, by_bands=True, takes="head")


class Head(nn.Module):
    """As heads of segmentation networks end; `drop` is a module, or a function that is called with the map."""

    def __init__(self, drop, norm=nn.BatchNorm2d, width=16, twice=False):
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 8), nn.ReLU())
        self.row = nn.Sequential(nn.Conv2d(8, width, 3, padding=1), norm(width), nn.LeakyReLU())
        self.drop, self.head, self.twice = drop, nn.Conv2d(width, 5, 1), twice

    def forward(self, x):
        x = self.row(self.stem(x))
        drop = self.drop if isinstance(self.drop, nn.Module) else partial(self.drop, training=self.training)
        scores = self.head(drop(x))
        return scores + drop(x).mean() if self.twice else scores


DROPS = {"module": nn.Dropout2d(0.5), "function": F.dropout2d}


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
def test_a_step_is_that_of_the_network(drop, lengths):
    """The same channels are dropped, and as many random numbers are drawn."""
    torch.manual_seed(0)
    model = Head(drop)
    fitted = apply_parts(model, [ROW])
    assert ("row", "head") in takings(model)
    assert_same_step(model, fitted)
    after = torch.get_rng_state()
    assert_same_step(model, model)
    assert torch.equal(torch.get_rng_state(), after)
    assert 4 in lengths
    assert torch.equal(*(each.eval()(torch.ones(SIZE)) for each in (copy.deepcopy(model), fitted)))


def test_under_autocast_it_is_as_near_to_real_numbers_as_plain(lengths):
    torch.manual_seed(0)
    model, (images, labels) = Head(DROPS["module"]), batch(SIZE)
    fitted = apply_parts(model, [ROW])
    _, exact = trained(copy.deepcopy(model).double(), images.double(), labels)
    errors = []
    for network in (fitted, model):
        _, found = trained(network, images, labels, torch.bfloat16)
        errors.append(sum((a.double() - b).square().sum() for a, b in zip(found[1:], exact[1:], strict=True)))
    assert errors[0] <= 4 * errors[1]  # squares: twice as far at most
    assert 4 in lengths


def test_also_within_what_runs_again(lengths):
    torch.manual_seed(0)
    model = nn.Sequential(Head(DROPS["module"]), nn.Conv2d(5, 5, 1))
    row = Part("0.row", 0, 3, by_bands=True, takes="0.head")
    assert_same_step(model, apply_parts(model, [row, Part("0")]))
    assert 4 in lengths


OTHERS = {
    "none is dropped": (nn.Dropout2d(0.0), {}),
    "all are": (nn.Dropout2d(1.0), {}),
    "in place": (nn.Dropout2d(0.5, inplace=True), {}),
    "and each image has its statistics": (nn.Dropout2d(0.5), {"norm": nn.InstanceNorm2d}),
    "twice": (nn.Sequential(nn.Dropout2d(0.5), nn.Dropout2d(0.5)), {}),
    "of maps laid out as signals": (
        lambda x, training: F.dropout1d(x.flatten(2), 0.5, training).view_as(x),
        {},
    ),
}


@pytest.mark.parametrize(("drop", "options"), OTHERS.values(), ids=OTHERS)
def test_what_does_not_wait_is_made(drop, options, lengths):
    torch.manual_seed(0)
    model = Head(drop, **options)
    assert_same_step(model, apply_parts(model, [ROW]))


def test_a_map_that_is_dropped_from_twice_has_two_readers():
    model = Head(nn.Dropout2d(0.5), twice=True)
    assert ("row", "head") not in takings(model)
    with pytest.raises(RuntimeError, match="expected a map that one convolution alone reads"):
        apply_parts(model, [ROW])(torch.randn(SIZE))


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
def test_a_plan_takes_it_where_it_spares_memory(drop):
    torch.manual_seed(0)
    model, images = Head(drop, width=64), torch.randn(2, 3, 128, 160)
    labels = torch.randint(0, 5, (2, 128, 160))
    fitted = fit(model, images, LOSS, time=10, target=labels, bands=True)
    assert any(part.takes == "head" and part.by_bands for part in fitted.plan.parts)

    def step():
        LOSS(fitted(images), labels).backward()
        fitted.zero_grad()

    step()
    before = predict(fitted, images, LOSS, target=labels).before
    assert peak_bytes(step, before=step) == pytest.approx(fitted.plan.peak - before, rel=0.05)
    assert fitted.plan.peak - before < 4 * 2 * 64 * 128 * 160  # less than the map that is dropped from
