"""ICNet: the counts of the official layers, and the numbers of its three resolutions."""

import pytest
import torch
import torch.nn.functional as F

from revseg.models.icnet import ICNet
from tests.helpers import assert_same_result, run_step
from tests.models.networks import (
    count_of,
    images,
    made,
    step,
)

SMALL = {"num_classes": 5, "width": 2}


class Plain(torch.nn.Module):
    """The network as functions of tensors by the names of ICNet's state dict."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            key = name.replace(".", "-")
            if value.is_floating_point() and "running" not in name:
                self.register_parameter(key, torch.nn.Parameter(value.clone()))
            else:
                self.register_buffer(key, value.clone())

    def layer(self, x, name, stride=1, dilation=1, relu=True):
        weight = getattr(self, f"{name}-0-weight")
        x = F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation)
        norm = [getattr(self, f"{name}-1-{key}") for key in ("running_mean", "running_var", "weight", "bias")]
        getattr(self, f"{name}-1-num_batches_tracked").add_(1)
        x = F.batch_norm(x, *norm, training=True, momentum=0.1, eps=1e-5)
        return x.relu() if relu else x

    def bottleneck(self, x, name, stride=1, dilation=1):
        y = self.layer(self.layer(x, f"{name}-body-0", stride), f"{name}-body-1", 1, dilation)
        y = self.layer(y, f"{name}-body-2", relu=False)
        if hasattr(self, f"{name}-shortcut-0-weight"):
            x = self.layer(x, f"{name}-shortcut", stride, relu=False)
        return (x + y).relu()

    def stage(self, x, name, count, dilation=1):
        for i in range(count):
            x = self.bottleneck(x, f"{name}-{i}", 1, dilation)
        return x

    def fusion(self, coarse, fine, name):
        fine = self.layer(fine, f"{name}-fine", relu=False)
        return (self.layer(coarse, f"{name}-coarse", 1, 2, relu=False) + fine).relu()

    def classes(self, x, name):
        return F.conv2d(x, getattr(self, f"{name}-weight"), getattr(self, f"{name}-bias"))

    def forward(self, images):
        sizes = [[-(-side // (1 << k)) for side in images.shape[2:]] for k in range(6)]

        def to(x, k):
            return F.interpolate(x, sizes[k], mode="bilinear", align_corners=True)

        x = self.layer(to(images, 1), "stem-layers-0", 2)
        x = self.layer(self.layer(x, "stem-layers-1"), "stem-layers-2")
        x = self.stage(F.max_pool2d(x, 3, 2, 1), "stage2", 3)
        at16 = self.bottleneck(x, "down", 2)
        x = self.stage(to(at16, 5), "stage3", 3)
        x = self.stage(self.stage(x, "stage4", 6, 2), "stage5", 3, 4)
        x = x + sum(to(F.adaptive_avg_pool2d(x, cells), 5) for cells in (1, 2, 3, 6))
        coarse = to(self.layer(x, "pyramid-1"), 4)
        middle = to(self.fusion(coarse, at16, "fusion16"), 3)
        fine = images
        for i in range(3):
            fine = self.layer(fine, f"fine-{i}", 2)
        fine = to(self.fusion(middle, fine, "fusion8"), 2)
        heads = zip((fine, coarse, middle), ("classifier", "aux-0", "aux-1"), strict=True)
        return tuple(self.classes(x, name) for x, name in heads)


@pytest.mark.parametrize(("aux", "parameters"), [(False, 6_699_987), (True, 6_707_321)])
def test_parameter_counts(aux, parameters):
    assert count_of(ICNet, aux=aux) == parameters


@pytest.mark.parametrize("size", [(33, 49), (65, 81), (64, 64), (1, 9)], ids=str)
def test_any_size(size):
    net = ICNet(**SMALL).eval()
    x = images(*size, n=1)
    shape = (1, 5, -(-size[0] // 4), -(-size[1] // 4))
    assert net(x).shape == shape
    assert net(torch.randn(1, 3, *size)).shape == shape
    if size[0] > 32:
        shapes = [tuple(y.shape[2:]) for y in net.train()(x)]
        assert shapes == [tuple(-(-side // step) for side in size) for step in (4, 16, 8)]


@pytest.mark.parametrize("size", [(65, 81), (64, 96)], ids=str)
def test_step_is_that_of_the_plain_network(size):
    net = made(ICNet, **SMALL).double()
    plain = Plain(net.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    ours, theirs = step(net, x), run_step(plain, x)
    for result in (theirs.gradients, theirs.buffers):
        for name in list(result):
            result[name.replace("-", ".")] = result.pop(name)
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert_same_result(ours, theirs, 1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width of at least 1, got 0"),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ICNet(**options)
