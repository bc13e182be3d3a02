"""Predicted peaks are those that the allocator would see."""

import pytest
import torch
from torch import nn

from benchmarks.memory_levels import CASES, training_step
from revseg import AdditiveCoupling, Recompute, ReversibleSequence
from revseg.memory import peak_bytes, predicted_peak_bytes

SIZE = (2, 16, 64, 96)


class Residual(nn.Module):
    """One map used four times: autograd adds three gradients, in place."""

    def __init__(self, keep_gradient=False):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 1, bias=False) for _ in range(4))
        self.keep_gradient = keep_gradient

    def forward(self, x):
        x = x * 2
        if self.keep_gradient:
            x.retain_grad()
        return torch.stack([conv(x).tanh() for conv in self.convs]).sum(0)


def chain(depth=4, **options):
    def f():
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8))

    return ReversibleSequence([AdditiveCoupling(f(), f()) for _ in range(depth)], **options)


NETWORKS = {
    "residual": Residual,
    "residual whose gradient is kept": lambda: Residual(keep_gradient=True),
    "convolutions": lambda: nn.Sequential(
        *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)), nn.ReLU(True)
    ),
    "reversible": chain,
    "reversible, exact": lambda: chain(exact=True),
    "reversible, keep=2": lambda: chain(keep=2),
    "reversible, saved": lambda: chain(save_activations=True),
    "recomputed": lambda: nn.Sequential(Recompute(chain(save_activations=True)), nn.Conv2d(16, 4, 1)),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_the_prediction_is_the_measurement(network):
    def prepare():
        net, x = network(), torch.ones(SIZE, requires_grad=True)
        for tensor in (x, *net.parameters()):
            tensor.grad = torch.zeros_like(tensor)
        return lambda: net(x).square().mean().backward()

    predicted, measured = predicted_peak_bytes(prepare), peak_bytes(prepare())
    assert predicted == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("case", ["plain", "fastest", "balanced", "lowest"])
def test_every_memory_level_is_predicted(case):
    size = (4, 384, 768)
    predicted = predicted_peak_bytes(lambda: training_step(case, size, values=False))
    assert predicted == pytest.approx(peak_bytes(training_step(case, size)), rel=0.03)


@pytest.mark.parametrize("case", ["lowest", "lowest, lossless, bfloat16"])
def test_a_single_image_is_predicted(case):
    """Where copies inside of convolutions would weigh most."""
    size = (1, 768, 1536)
    predicted = predicted_peak_bytes(lambda: training_step(case, size, values=False))
    assert predicted == pytest.approx(peak_bytes(training_step(case, size)), rel=0.03)


def test_sizes_that_no_machine_holds():
    def peak(images):
        return predicted_peak_bytes(lambda: training_step("balanced", (images, 1024, 2048), values=False))

    assert peak(32) == pytest.approx(8 * peak(4), rel=0.03)  # 6 GiB


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    predicted_peak_bytes(lambda: lambda: torch.randn(10))
    assert torch.equal(torch.get_rng_state(), before)


def test_goals_are_predicted():
    """The table of the memory levels, at full size and without its memory."""
    for case, (_, _, _, goal) in CASES.items():
        if goal is not None:
            predicted = predicted_peak_bytes(
                lambda case=case: training_step(case, (4, 1024, 2048), values=False)
            )
            assert predicted / 2**20 < goal, case
