import pytest
import torch
from torch import nn

from revseg import reversible
from revseg.layers.images import IMAGENET
from revseg.memory import saved_bytes
from revseg.models import create_model, load_official
from revseg.models.cgnet import CGNet, Surroundings
from revseg.models.policy import MEMORY_LEVELS
from revseg.testing import plain_twin
from tests.helpers import assert_same_step
from tests.models.networks import (
    assert_modules_agree,
    assert_official,
    count,
    images,
)

SMALL = {"num_classes": 5, "widths": (4, 16, 32), "blocks": (2, 3)}


def small(**options):
    return CGNet(**SMALL, **options)


class Official(nn.Module):
    """Plain modules by the names of the official code: three lists of layers and what joins them."""

    def __init__(self, classes, w1, w2, w3, m, n):
        super().__init__()

        def block(channels, inner, kernel, stride, dilation, reduction, final=None):
            part = nn.ModuleDict({"conv1x1": conv(channels, inner, kernel, stride)})
            for name, d in (("F_loc", 1), ("F_sur", dilation)):
                depthwise = nn.Conv2d(inner, inner, 3, 1, d, d, groups=inner, bias=False)
                part[name] = nn.ModuleDict({"conv": depthwise})
            if final is None:
                part["bn_prelu"] = norm(2 * inner)
            else:
                part.update(norm(2 * inner).items())
                part["reduce"] = nn.ModuleDict({"conv": nn.Conv2d(2 * inner, final, 1, bias=False)})
            out = final or 2 * inner
            fc = nn.Linear(out, out // reduction), nn.ReLU(), nn.Linear(out // reduction, out), nn.Sigmoid()
            part["F_glo"] = nn.ModuleDict({"fc": nn.Sequential(*fc)})
            return part

        def norm(channels):
            return nn.ModuleDict({"bn": nn.BatchNorm2d(channels, eps=1e-3), "act": nn.PReLU(channels)})

        def conv(channels, out, kernel, stride=1):
            layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
            return nn.ModuleDict({"conv": layer, **norm(out)})

        self.level1_0, self.level1_1, self.level1_2 = conv(3, w1, 3, 2), conv(w1, w1, 3), conv(w1, w1, 3)
        self.b1, self.bn_prelu_2, self.bn_prelu_3 = norm(w1 + 3), norm(2 * w2 + 3), norm(2 * w3)
        self.level2_0 = block(w1 + 3, w2, 3, 2, 2, 8, final=w2)
        self.level2 = nn.ModuleList(block(w2, w2 // 2, 1, 1, 2, 8) for _ in range(m - 1))
        self.level3_0 = block(2 * w2 + 3, w3, 3, 2, 4, 16, final=w3)
        self.level3 = nn.ModuleList(block(w3, w3 // 2, 1, 1, 4, 16) for _ in range(n - 1))
        self.classifier = nn.Sequential(nn.ModuleDict({"conv": nn.Conv2d(2 * w3, classes, 1, bias=False)}))

    @staticmethod
    def apply_conv(part, x):
        return part["act"](part["bn"](part["conv"](x)))

    def context(self, part, x):
        x = self.apply_conv(part["conv1x1"], x)
        x = torch.cat([part["F_loc"]["conv"](x), part["F_sur"]["conv"](x)], 1)
        normed = part["bn_prelu"] if "bn_prelu" in part else part  # noqa: SIM401, a ModuleDict has no get
        x = normed["act"](normed["bn"](x))
        x = part["reduce"]["conv"](x) if "reduce" in part else x
        return x * part["F_glo"]["fc"](x.mean((2, 3)))[..., None, None]

    def forward(self, x):
        pool = nn.AvgPool2d(3, 2, 1)
        half = pool(x)
        for part in (self.level1_0, self.level1_1, self.level1_2):
            x = self.apply_conv(part, x)
        x = self.b1["act"](self.b1["bn"](torch.cat([x, half], 1)))
        first = x = self.context(self.level2_0, x)
        for part in self.level2:
            x = x + self.context(part, x)
        x = torch.cat([x, first, pool(half)], 1)
        first = x = self.context(self.level3_0, self.bn_prelu_2["act"](self.bn_prelu_2["bn"](x)))
        for part in self.level3:
            x = x + self.context(part, x)
        x = self.bn_prelu_3["act"](self.bn_prelu_3["bn"](torch.cat([first, x], 1)))
        return self.classifier[0]["conv"](x)


def test_the_official_network_has_as_many_parameters():
    assert count(Official(19, 32, 64, 128, 3, 21)) == 496_306


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("size", [(33, 49), (32, 64)])
def test_official_weights_give_the_official_numbers(prefix, size):
    assert_official(small(), Official(5, 4, 16, 32, 2, 3), torch.randn(2, 3, *size).double(), prefix)


def test_the_classifier_behind_dropout_has_another_name():
    weight = torch.ones(1)
    assert CGNet.from_official({"classifier.1.conv.weight": weight}) == {"head.classifier.weight": weight}


def test_other_names_are_refused():
    with pytest.raises(
        ValueError, match=r"expected names of the official network, got 'level4\.conv\.weight'"
    ):
        load_official(small(), {"level1_0.conv.weight": torch.ones(1), "level4.conv.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="expected a model with official weights, got VNet"):
        load_official(create_model("vnet"), {})
    with pytest.raises(RuntimeError, match="Missing key"):
        load_official(small(), {}, IMAGENET)


@pytest.mark.parametrize("large", [1 << 18, 1])
def test_a_step_is_that_of_plain_modules(monkeypatch, large):
    monkeypatch.setattr("revseg.layers.layer_input._LARGE", large)  # images from this size on go one by one
    assert_modules_agree(small, images(33, 49), monkeypatch)


def test_the_surroundings_keep_one_raw_map():
    x = torch.randn(2, 8, 33, 49, requires_grad=True)
    layer, raw = Surroundings(8, 2), 2 * 16 * 33 * 49 * 4
    assert saved_bytes(lambda: layer(x)) <= 1.05 * (raw + x.nbytes)
    assert saved_bytes(lambda: layer.norm(torch.cat((x, x), 1))) > 2 * raw


@pytest.mark.parametrize("memory", MEMORY_LEVELS)
def test_its_stages_can_be_made_reversible(memory):
    model, chains = reversible(small(memory=memory).double(), torch.randn(1, 3, 32, 32).double())
    row = "stage3.module" if memory in ("lowest", "least") else "stage3"
    assert chains == [[f"{row}.0", f"{row}.1"]]
    assert_same_step(model, plain_twin(model), torch.randn(2, 3, 33, 49).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (32, 64)}, "three positive widths, the last two even, got"),
        ({"widths": (32, 64, 127)}, "three positive widths, the last two even, got"),
        ({"blocks": (0, 3)}, "two positive blocks, for stages 2 and 3, got"),
        ({"dilations": (2,)}, "two positive dilations"),
        ({"reductions": (0, 1)}, "two positive reductions"),
        ({"reductions": (65, 16)}, r"reductions of at most the widths \(64, 128\)"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CGNet(**options)
