"""Maps are predicted to lie as a CPU lays them, not as fake tensors do."""

import pytest
import torch
from torch import nn

from revseg.memory import peak_bytes, predicted_peak_bytes


def test_maps_that_are_joined_with_one_of_a_pixel_lie_as_they_really_do():
    """Behind PSPNet's pyramid maps are contiguous: predicted in channels_last, a step took 15 % more in bfloat16."""
    norm, conv = nn.BatchNorm2d(8), nn.Conv2d(16, 8, 3, padding=1)
    x = torch.randn(2, 8, 32, 48).to(memory_format=torch.channels_last).requires_grad_()

    def step():
        mean = norm(nn.functional.adaptive_avg_pool2d(x, 1))
        joined = torch.cat([x, nn.functional.interpolate(mean, x.shape[2:], mode="bilinear")], 1)
        strides.append(joined.stride())
        conv(joined).sum().backward()

    strides = []
    measured = peak_bytes(step, before=step)
    assert predicted_peak_bytes(lambda: step) == pytest.approx(measured, rel=0.03)
    assert len(set(strides)) == 1
