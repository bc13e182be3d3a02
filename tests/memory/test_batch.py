"""The largest batch is found, and nothing is left of the search."""

import copy

import pytest
import torch
from torch import nn

from revseg.memory import find_batch_size

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


class Limited(nn.Sequential):
    """Stands for a device whose memory ends at so many images."""

    def __init__(self, most, error=OUT_OF_MEMORY):
        super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.most, self.error, self.tried = most, error, []

    def forward(self, x):
        self.tried.append(len(x))
        if len(x) > self.most:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("most", [0, 1, 2, 13, 64, 100])
def test_the_largest_batch(most):
    model = Limited(most)
    assert find_batch_size(model, torch.randn(2, 3, 4, 4), nn.CrossEntropyLoss(), limit=64) == min(most, 64)
    assert len(model.tried) <= 14


def test_model_and_random_state_are_left_as_they_were():
    model, images = Limited(5), torch.randn(1, 3, 4, 4)
    model[0].weight.grad = gradient = torch.ones_like(model[0].weight)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert find_batch_size(model, images) == 5
    assert model[0].weight.grad is gradient
    assert model[0].bias.grad is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="a bug"):
        find_batch_size(Limited(3, RuntimeError("a bug")), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"expected a limit of 1 or more, got 0"):
        find_batch_size(Limited(3), torch.randn(1, 3, 4, 4), limit=0)
