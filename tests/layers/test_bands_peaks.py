"""Peaks of rows of layers by bands: what the arithmetic says, and what is predicted."""

import pytest
import torch
from torch import nn

from revseg import Stack
from revseg.layers.bands.cut import Bands
from revseg.layers.bands.module import ByBands
from revseg.memory import peak_bytes, predicted_peak_bytes

SIZE = (3, 8, 40, 12, 12)
NORMS = {
    "none": lambda: (),
    "batch": lambda: (nn.BatchNorm3d(8),),
    "instance": lambda: (nn.InstanceNorm3d(8, affine=True),),
}
# In maps: the gradient of the input, and that of a raw map, of all images or of one. The largest band is here a 16th of a
# map in the first run, a 64th in the second, and some of them stand at a time.
EXPECTED = {"none": 2, "batch": 2, "instance": 1 + 1 / 3}
BANDS = 0.5


@pytest.mark.parametrize("norm", NORMS)
def test_the_peak_of_volumes_is_what_arithmetic_says_and_predicted(norm):
    def prepare():
        layers = [(nn.Conv3d(8, 8, 3, padding=1), *NORMS[norm](), nn.LeakyReLU(0.01)) for _ in range(2)]
        row = ByBands(Stack(*(module for layer in layers for module in layer)), Bands(1 << 14, kept=0))
        x = torch.ones(SIZE, requires_grad=True)
        return lambda: torch.autograd.grad(row(x).sum(), [x, *row.parameters()])

    size, step = 4 * torch.Size(SIZE).numel(), prepare()
    measured = peak_bytes(step, before=step)
    assert EXPECTED[norm] <= measured / size <= EXPECTED[norm] + BANDS
    assert predicted_peak_bytes(prepare) == pytest.approx(measured, rel=0.05)
