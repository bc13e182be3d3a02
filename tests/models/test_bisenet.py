"""BiSeNet on both backbones: the counts of the official networks, and their numbers."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg.models import load_official
from revseg.models.bisenet import BiSeNetResNet18, BiSeNetXception39
from tests.models.networks import (
    assert_same_as_official,
    count_of,
    images,
    made,
)

WIDTHS = {BiSeNetResNet18: 4, BiSeNetXception39: 1}

both = pytest.mark.parametrize("network", [BiSeNetResNet18, BiSeNetXception39])


def small(network, **options):
    return {"num_classes": 5, "width": WIDTHS[network], **options}


class Layer(nn.Module):
    """Convolution, batch norm and activation as far as wanted, named as in ycszen/TorchSeg."""

    def __init__(self, channels, width, kernel, stride=1, *, norm=True, relu=True):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        if norm:
            self.bn = nn.BatchNorm2d(width)
        self.relu = relu

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x) if hasattr(self, "bn") else x
        return torch.relu(x) if self.relu else x


class Basic(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        if stride > 1:
            conv = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet18(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, w, 7, 2, 3, bias=False), nn.BatchNorm2d(w)
        self.layer1 = nn.Sequential(Basic(w, w, 1), Basic(w, w, 1))
        for i in (1, 2, 3):
            c = w << i
            setattr(self, f"layer{i + 1}", nn.Sequential(Basic(c // 2, c, 2), Basic(c, c, 1)))

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        at16 = self.layer3(self.layer2(self.layer1(x)))
        return at16, self.layer4(at16)


class Separable(nn.Module):
    def __init__(self, channels, width, stride=1, *, relu=True):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.point_wise_cbr = Layer(channels, width, 1, relu=relu)

    def forward(self, x):
        return self.point_wise_cbr(self.conv1(x))


class XceptionBlock(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        if stride > 1:
            self.proj = Separable(channels, 4 * width, stride, relu=False)
        self.residual_branch = nn.Sequential(
            Separable(channels, width, stride),
            Separable(width, width),
            Separable(width, 4 * width, relu=False),
        )

    def forward(self, x):
        return torch.relu(self.residual_branch(x) + (self.proj(x) if hasattr(self, "proj") else x))


class Xception39(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.conv1 = Layer(3, w, 3, 2)
        channels = w
        for i, count in enumerate((4, 8, 4)):
            width = 2 * w << i
            row = [XceptionBlock(channels, width, 2)]
            channels = 4 * width
            row += [XceptionBlock(channels, width, 1) for _ in range(count - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*row))

    def forward(self, x):
        at16 = self.layer2(self.layer1(F.max_pool2d(self.conv1(x), 3, 2, 1)))
        return at16, self.layer3(at16)


class Official(nn.Module):
    """The network in plain PyTorch, its parts named as in ycszen/TorchSeg."""

    def __init__(self, backbone, channels, c, aux, classes=5):
        super().__init__()
        self.context_path = backbone
        self.spatial_path = nn.ModuleDict(
            {
                "conv_7x7": Layer(3, c // 2, 7, 2),
                "conv_3x3_1": Layer(c // 2, c // 2, 3, 2),
                "conv_3x3_2": Layer(c // 2, c // 2, 3, 2),
                "conv_1x1": Layer(c // 2, c, 1),
            }
        )
        self.global_context = nn.Sequential(nn.AdaptiveAvgPool2d(1), Layer(channels[0], c, 1))
        self.arms = nn.ModuleList(
            nn.ModuleDict(
                {
                    "conv_3x3": Layer(each, c, 3),
                    "channel_attention": nn.Sequential(
                        nn.AdaptiveAvgPool2d(1), Layer(c, c, 1, relu=False), nn.Sigmoid()
                    ),
                }
            )
            for each in channels
        )
        self.refines = nn.ModuleList(Layer(c, c, 3) for _ in range(2))
        attention = Layer(2 * c, 2 * c, 1, norm=False), Layer(2 * c, 2 * c, 1, norm=False, relu=False)
        self.ffm = nn.ModuleDict(
            {
                "conv_1x1": Layer(2 * c, 2 * c, 1),
                "channel_attention": nn.Sequential(nn.AdaptiveAvgPool2d(1), *attention, nn.Sigmoid()),
            }
        )
        self.heads = nn.ModuleList(
            nn.Sequential(
                OrderedDict(conv_3x3=Layer(before, inside, 3), conv_1x1=nn.Conv2d(inside, classes, 1))
            )
            for before, inside in ((c, aux), (c, aux), (2 * c, c // 2))
        )

    def forward(self, x):
        spatial = x
        for layer in self.spatial_path.values():
            spatial = layer(spatial)
        at16, at32 = self.context_path(x)
        size = {"mode": "bilinear", "align_corners": True}
        y = F.interpolate(self.global_context(at32), at32.shape[2:], **size)
        found = []
        for fm, arm, refine, like in zip((at32, at16), self.arms, self.refines, (at16, spatial), strict=True):
            z = arm["conv_3x3"](fm)
            y = refine(F.interpolate(z * arm["channel_attention"](z) + y, like.shape[2:], **size))
            found.append(y)
        z = self.ffm["conv_1x1"](torch.cat([spatial, y], 1))
        logits = self.heads[2](z + z * self.ffm["channel_attention"](z))
        return (logits, self.heads[0](found[0]), self.heads[1](found[1])) if self.training else logits


def official(network):
    w = WIDTHS[network]
    if network is BiSeNetResNet18:
        return Official(ResNet18(w), (8 * w, 4 * w), 2 * w, 4 * w)
    return Official(Xception39(w), (32 * w, 16 * w), 16 * w, 16 * w)


@pytest.mark.parametrize(
    ("network", "aux", "parameters"),
    [
        (BiSeNetResNet18, False, 12_894_163),
        (BiSeNetResNet18, True, 13_494_777),
        (BiSeNetXception39, False, 1_541_963),
        (BiSeNetXception39, True, 1_842_289),
    ],
)
def test_parameter_counts(network, aux, parameters):
    assert count_of(network, aux=aux) == parameters


@both
@pytest.mark.parametrize("size", [(33, 49), (65, 81), (64, 64), (1, 9)], ids=str)
def test_any_size(network, size):
    net = network(**small(network)).eval()
    h, w = (-(-side // 8) for side in size)
    x = images(*size, n=1)
    assert net(x).shape == (1, 5, h, w)
    assert net(torch.randn(1, 3, *size)).shape == (1, 5, h, w)
    if size[0] > 32:
        shapes = [tuple(y.shape[2:]) for y in net.train()(x)]
        assert shapes == [(h, w), (-(-h // 2), -(-w // 2)), (h, w)]


@both
def test_step_is_that_of_the_official_network(network):
    assert_same_as_official(made(network, **small(network)), official(network), (65, 81))


@both
def test_unknown_official_names_are_refused(network):
    state = {**official(network).state_dict(), "module.heads.3.conv_1x1.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"got 'module\.heads\.3\.conv_1x1\.bias'"):
        load_official(network(**small(network)), state)


@both
def test_one_image_trains_the_pooled_branches(network):
    net = made(network, **small(network))
    sum(y.square().mean() for y in net(images(65, 81, n=1))).backward()
    assert all(p.grad.any() for p in net.context.parameters())
    for name, p in net.refinements.named_parameters():
        assert "attention" not in name or p.grad.any(), name


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width of at least 1, got 0"),
    ],
)
def test_wrong_hyperparameters_are_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)
