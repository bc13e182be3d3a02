import pytest
import torch
from torch import nn

from revseg import reversible
from revseg.models import load_official
from revseg.models.dabnet import DABNet
from revseg.testing import plain_twin
from tests.helpers import assert_same_step
from tests.models.networks import (
    assert_official,
    count,
)

SMALL = {"num_classes": 5, "widths": (4, 16, 32), "dilations": ((2,), (4, 8))}


def small(**options):
    return DABNet(**SMALL, **options)


class Norm(nn.Sequential):
    def __init__(self, channels):
        super().__init__()
        self.add_module("bn", nn.BatchNorm2d(channels, eps=1e-3))
        self.add_module("acti", nn.PReLU(channels))


def conv(channels, out, kernel, stride=1, dilation=1, groups=1, norm=True):
    """A convolution by the official names; one number or two for each setting."""
    padding = [d * (k // 2) for d, k in zip(2 * [dilation], kernel, strict=True)]
    layer = nn.Sequential()
    layer.add_module("conv", nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=False))
    if norm:
        layer.add_module("bn_prelu", Norm(out))
    return layer


class OfficialModule(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        half = c // 2
        self.bn_relu_1, self.bn_relu_2 = Norm(c), Norm(half)
        self.conv3x3 = conv(c, half, (3, 3))
        self.dconv3x1, self.dconv1x3 = (conv(half, half, k, groups=half) for k in ((3, 1), (1, 3)))
        self.ddconv3x1, self.ddconv1x3 = (
            conv(half, half, k, dilation=d, groups=half) for k in ((3, 1), (1, 3))
        )
        self.conv1x1 = conv(half, c, (1, 1), norm=False)

    def forward(self, x):
        z = self.conv3x3(self.bn_relu_1(x))
        z = self.dconv1x3(self.dconv3x1(z)) + self.ddconv1x3(self.ddconv3x1(z))
        return self.conv1x1(self.bn_relu_2(z)) + x


class OfficialDown(nn.Module):
    def __init__(self, c, out):
        super().__init__()
        self.kept = c if c < out else 0
        self.conv3x3, self.bn_prelu = conv(c, out - self.kept, (3, 3), 2, norm=False), Norm(out)

    def forward(self, x):
        maps = [self.conv3x3(x), nn.MaxPool2d(2)(x)]
        return self.bn_prelu(torch.cat(maps, 1) if self.kept else maps[0])


class Official(nn.Module):
    """Plain modules by the names of the official code."""

    def __init__(self, classes, w1, w2, w3, dilations):
        super().__init__()
        self.init_conv = nn.Sequential(conv(3, w1, (3, 3), 2), conv(w1, w1, (3, 3)), conv(w1, w1, (3, 3)))
        for i, (c, out) in enumerate(((w1 + 3, w2), (2 * w2 + 3, w3)), 1):
            row = nn.Sequential()
            for k, d in enumerate(dilations[i - 1]):
                row.add_module(f"DAB_Module_{i}_{k}", OfficialModule(out, d))
            self.add_module(f"downsample_{i}", OfficialDown(c, out))
            self.add_module(f"DAB_Block_{i}", row)
            self.add_module(f"bn_prelu_{i}", Norm(c))
        self.bn_prelu_3 = Norm(2 * w3 + 3)
        self.classifier = nn.Sequential(conv(2 * w3 + 3, classes, (1, 1), norm=False))

    def forward(self, x):
        pool = nn.AvgPool2d(3, 2, 1)
        half, quarter, eighth = pool(x), pool(pool(x)), pool(pool(pool(x)))
        first = self.downsample_1(self.bn_prelu_1(torch.cat([self.init_conv(x), half], 1)))
        joined = torch.cat([self.DAB_Block_1(first), first, quarter], 1)
        second = self.downsample_2(self.bn_prelu_2(joined))
        joined = torch.cat([self.DAB_Block_2(second), second, eighth], 1)
        return self.classifier(self.bn_prelu_3(joined))


def test_the_official_network_has_as_many_parameters():
    assert count(Official(19, 32, 64, 128, ((2,) * 3, (4, 4, 8, 8, 16, 16)))) == 756_643


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("widths", [(4, 16, 32), (4, 16, 64)], ids=str)
def test_official_weights_give_the_official_numbers(prefix, widths):
    """At a size whose maps are even, as the official pools need; with new channels at 1/8 and without."""
    dilations = ((2,), (4, 8))
    model = DABNet(5, widths=widths, dilations=dilations)
    assert_official(model, Official(5, *widths, dilations), torch.randn(2, 3, 32, 64).double(), prefix)


def test_other_names_are_refused():
    with pytest.raises(
        ValueError, match=r"expected names of the official network, got 'init_conv\.3\.conv\.weight'"
    ):
        load_official(small(), {"init_conv.3.conv.weight": torch.ones(1)})


def test_its_rows_can_be_made_reversible():
    model, chains = reversible(small().double(), torch.randn(1, 3, 32, 32).double())
    assert chains == [["row2.0", "row2.1"]]
    assert_same_step(model, plain_twin(model), torch.randn(2, 3, 33, 49).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (32, 64)}, "three positive widths, the last two even, got"),
        ({"widths": (32, 63, 128)}, "three positive widths, the last two even, got"),
        ({"dilations": ((2,),)}, "positive dilations for two rows of bottlenecks, got"),
        ({"dilations": ((2,), ())}, "positive dilations for two rows"),
        ({"dilations": ((2,), (0,))}, "positive dilations for two rows"),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DABNet(**options)
