"""PSPNet: the counts of the official networks, and their numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg.models import load_official
from revseg.models.pspnet import PSPNet
from tests.models.networks import (
    assert_same_as_official,
    count_of,
    images,
    made,
)

SMALL = {"num_classes": 5, "depth": 50, "width": 2}


class Bottleneck(nn.Module):
    def __init__(self, channels, width, stride, dilation):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        if channels != 4 * width:
            conv = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
        return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


def triple(channels, width, stride=1):
    return nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()


def stage(channels, width, count, stride, dilation):
    row = [Bottleneck(channels, width, stride, dilation)]
    return nn.Sequential(*row, *(Bottleneck(4 * width, width, 1, dilation) for _ in range(count - 1)))


class Official(nn.Module):
    """The network in plain PyTorch, its parts named as in hszhao/semseg."""

    def __init__(self, classes=5, w=2, bins=(1, 2, 3, 6)):
        super().__init__()
        self.layer0 = nn.Sequential(*triple(3, w, 2), *triple(w, w), *triple(w, 2 * w), nn.MaxPool2d(3, 2, 1))
        self.layer1 = stage(2 * w, w, 3, 1, 1)
        self.layer2 = stage(4 * w, 2 * w, 4, 2, 1)
        self.layer3 = stage(8 * w, 4 * w, 6, 1, 2)
        self.layer4 = stage(16 * w, 8 * w, 3, 1, 4)
        self.ppm = nn.Module()
        self.ppm.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(b),
                nn.Conv2d(32 * w, 8 * w, 1, bias=False),
                nn.BatchNorm2d(8 * w),
                nn.ReLU(),
            )
            for b in bins
        )
        self.cls = nn.Sequential(*triple(64 * w, 8 * w), nn.Dropout2d(0.0), nn.Conv2d(8 * w, classes, 1))
        self.aux = nn.Sequential(*triple(16 * w, 4 * w), nn.Dropout2d(0.0), nn.Conv2d(4 * w, classes, 1))

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        y = self.layer4(x)
        size = y.shape[2:]
        pooled = [F.interpolate(f(y), size, mode="bilinear", align_corners=True) for f in self.ppm.features]
        logits = self.cls(torch.cat([y, *pooled], 1))
        return (logits, self.aux(x)) if self.training else logits


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"aux": False}, 65_707_475),
        ({}, 68_072_166),
        ({"depth": 50, "aux": False}, 46_715_347),
    ],
)
def test_parameter_counts(options, parameters):
    assert count_of(PSPNet, **options) == parameters


@pytest.mark.parametrize("size", [(33, 49), (65, 81), (64, 64), (1, 9)], ids=str)
def test_any_size(size):
    net = PSPNet(**SMALL).eval()
    shape = (1, 5, -(-size[0] // 8), -(-size[1] // 8))
    x = images(*size, n=1)
    assert net(x).shape == shape
    assert net(torch.randn(1, 3, *size)).shape == shape
    if size[0] > 8:
        assert [y.shape for y in net.train()(x)] == [shape, shape]


def test_step_is_that_of_the_official_network():
    assert_same_as_official(made(PSPNet, **SMALL, dropout=0.0), Official(), (65, 81))


def test_official_names_of_the_full_network_are_known():
    with torch.device("meta"):
        net, official = PSPNet(5, depth=50, width=16), Official(w=16)
    ours = {name: value.shape for name, value in net.state_dict().items()}
    renamed = PSPNet.from_official(official.state_dict())
    assert {name: value.shape for name, value in renamed.items()} == ours


def test_unknown_official_names_are_refused():
    state = {"module.layer0.0.weight": torch.zeros(1), "module.layer5.0.conv1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"got 'module\.layer5\.0\.conv1\.weight'"):
        load_official(PSPNet(**SMALL), state)


def test_one_image_trains_every_parameter_of_the_pyramid():
    net = made(PSPNet, **SMALL, dropout=0.0)
    before = {name: b.clone() for name, b in net.named_buffers() if "branches.0" in name}
    y, _ = net(images(65, 81, n=1))
    y.square().mean().backward()
    assert len(before) == 3
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers() if name in before)
    for name, p in net.named_parameters():
        if "branches" in name:
            assert p.grad.any(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 18}, "unknown depth 18; choose one of 50, 101, 152"),
        ({"width": 0}, "width of at least 1, got 0"),
        ({"bins": ()}, "positive bins whose number divides 2048 channels"),
        ({"bins": (1, 2, 3)}, "positive bins whose number divides 2048 channels"),
        ({"bins": (1, 0)}, "positive bins"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PSPNet(**options)
