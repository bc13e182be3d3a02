"""A layer and a classifier by bands: no map between them is whole, nor is its gradient."""

import copy

import pytest
import torch
from torch import nn

from revseg.layers.bands.cut import BandPlan, Bands
from revseg.layers.bands.rows import Whole
from revseg.layers.bands.run import run_by_bands
from revseg.layers.stack_row import layers_in
from revseg.memory import peak_bytes, predicted_peak_bytes
from tests.helpers import assert_same_result, relative_error, small_input
from tests.layers.test_bands import step

CLASSES = 3
ROWS = {
    "1 x 1": lambda: (
        nn.Conv2d(4, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, CLASSES, 1),
    ),
    "3 x 3, dilated": lambda: (
        nn.Conv2d(4, 12, 3, 2, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.PReLU(12),
        nn.Conv2d(12, CLASSES, 3, padding=2, dilation=2),
    ),
    "asymmetric": lambda: (
        nn.Conv2d(4, 12, (1, 3), padding=(0, 1)),
        nn.BatchNorm2d(12),
        nn.LeakyReLU(0.1),
        nn.Conv2d(12, CLASSES, (3, 1), padding=(1, 0)),
    ),
    "without padding, grouped": lambda: (
        nn.Conv2d(4, 12, 1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 6, 3, groups=3),
    ),
    "no norm": lambda: (nn.Conv2d(4, 12, 3, padding=1), nn.GELU(), nn.Conv2d(12, CLASSES, 1)),
    "instance norm": lambda: (
        nn.Conv2d(4, 12, 3, padding=1),
        nn.InstanceNorm2d(12, affine=True, track_running_stats=True),
        nn.ReLU(),
        nn.Conv2d(12, CLASSES, 1),
    ),
    "volumes": lambda: (
        nn.Conv3d(4, 12, 3, padding=1),
        nn.BatchNorm3d(12),
        nn.ReLU(),
        nn.Conv3d(12, CLASSES, (3, 1, 1), padding=(1, 0, 0)),
    ),
    "signals": lambda: (
        nn.Conv1d(4, 12, 3, padding=1),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Conv1d(12, CLASSES, 1),
    ),
}
SIZES = {"volumes": (2, 4, 7, 5, 6), "signals": (3, 4, 23)}
LEAST = Bands(bytes=600, kept=0, part=16)


class ByBands(nn.Sequential):
    def forward(self, x):
        return run_by_bands(layers_in([*self], x.ndim - 2, without_norm=True), (x,), LEAST)[0]


def plan_of(row, x, bands=LEAST):
    return BandPlan(layers_in([*row], x.ndim - 2, without_norm=True), Whole(x), bands)


@pytest.mark.parametrize("name", ROWS)
def test_it_is_the_row(name):
    row = nn.Sequential(*ROWS[name]()).double()
    x = small_input(*SIZES.get(name, (2, 4, 11, 9)))
    assert plan_of(row, x).needs_no_map(Whole(x))
    assert_same_result(step(ByBands(*copy.deepcopy(row)), x), step(row, x), 1e-9)


@pytest.mark.parametrize("frozen", ["0", "1", "3", "013"])
def test_frozen_parts(frozen):
    row = nn.Sequential(*ROWS["1 x 1"]()).double()
    for name, p in row.named_parameters():
        p.requires_grad_(name[0] not in frozen)
    for x in (small_input(2, 4, 11, 9), small_input(2, 4, 11, 9).detach()):
        if frozen != "013" or x.requires_grad:
            assert_same_result(step(ByBands(*copy.deepcopy(row)), x), step(row, x), 1e-9)


def test_half_precision_is_as_near_as_plain():
    row, size = nn.Sequential(*ROWS["3 x 3, dilated"]()), (2, 4, 24, 20)
    exact = step(copy.deepcopy(row).double(), small_input(*size)).gradients
    plain = step(copy.deepcopy(row).bfloat16(), small_input(*size, dtype=torch.bfloat16)).gradients
    ours = step(ByBands(*copy.deepcopy(row).bfloat16()), small_input(*size, dtype=torch.bfloat16)).gradients
    assert relative_error(ours, exact) <= 1.1 * relative_error(plain, exact)


@pytest.mark.parametrize(
    ("modules", "bands"),
    [
        pytest.param([(4, 12, 1), (12, 12, 1)], LEAST, id="as many classes as channels"),
        pytest.param([(12, 12, 1), (12, 2, 1)], LEAST, id="the gradient of the input lies in its place"),
        pytest.param([(4, 12, 1), (12, 2, 1)], Bands(600), id="maps are kept"),
        pytest.param([(4, 12, 1), (12, 2, 3, 2, 1)], LEAST, id="not each row is read"),
        pytest.param([(4, 8, 1), (8, 12, 1), (12, 2, 1)], LEAST, id="three layers"),
    ],
)
def test_where_there_is_a_map(modules, bands):
    row, x = [nn.Conv2d(*arguments) for arguments in modules], torch.zeros(2, modules[0][0], 8, 8)
    assert not plan_of(row, x, bands).needs_no_map(Whole(x))


def test_neither_the_map_nor_its_gradient_is_whole():
    """What stands: scores, their gradient, that of the input, and bands of the map, of which a 16th is one."""

    def prepare():
        layers = (nn.Conv2d(4, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 2, 1))
        row, x = ByBands(*layers), torch.ones(2, 4, 128, 32, requires_grad=True)
        return lambda: torch.autograd.grad(row(x).sum(), [x, *row.parameters()])

    step = prepare()
    measured, of_map = peak_bytes(step, before=step), 4 * 2 * 64 * 128 * 32
    assert measured < 0.6 * of_map
    assert predicted_peak_bytes(prepare) == pytest.approx(measured, rel=0.05)
