import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg.losses import UpsampleCrossEntropy
from revseg.models import create_model, load_official
from revseg.models.erfnet import ERFNet, NonBottleneck1D
from tests.helpers import assert_same_result, run_step, small_input
from tests.layers.stack_twins import stirred
from tests.models.networks import count, images

SMALL = {"num_classes": 5, "widths": (4, 8, 16), "depth": 2, "repeats": 1, "dilations": (2, 4)}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 2_064_191),
        ({"encoder_head": True}, 2_066_642),
        ({"num_classes": 20, "encoder_head": True}, 2_066_836),
    ],
)
def test_parameter_counts(options, parameters):
    assert count(ERFNet(**options)) == parameters


def test_a_unit_by_hand():
    unit = stirred(NonBottleneck1D(6, dilation=2)).double()
    layers = list(unit.factorized)
    x = small_input(2, 6, 9, 7)
    y = F.relu(F.conv2d(x, layers[0].weight, layers[0].bias, padding=(1, 0)))
    y = F.conv2d(y, layers[2].weight, layers[2].bias, padding=(0, 1))
    y = F.relu(F.batch_norm(y, None, None, layers[3].weight, layers[3].bias, True, eps=1e-3))
    y = F.relu(F.conv2d(y, layers[5].weight, layers[5].bias, padding=(2, 0), dilation=(2, 1)))
    y = F.conv2d(y, layers[7].weight, layers[7].bias, padding=(0, 2), dilation=(1, 2))
    y = F.relu(x + F.batch_norm(y, None, None, layers[8].weight, layers[8].bias, True, eps=1e-3))
    torch.testing.assert_close(unit(x), y)


class Official(nn.Module):
    """The network by the names of the official code, as the paper's table lists it."""

    def __init__(self, classes):
        super().__init__()
        eighth = [_unit(128, d) for d in (2, 4, 8, 16) * 2]
        self.encoder = _named(
            initial_block=_half(3, 16),
            layers=nn.ModuleList([_half(16, 64), *(_unit(64, 1) for _ in range(5)), _half(64, 128), *eighth]),
            output_conv=nn.Conv2d(128, classes, 1),
        )
        self.decoder = _named(
            layers=nn.ModuleList(
                [_up(128, 64), _unit(64, 1), _unit(64, 1), _up(64, 16), _unit(16, 1), _unit(16, 1)]
            ),
            output_conv=nn.ConvTranspose2d(16, classes, 2, 2),
        )

    def forward(self, x):
        for layer in (self.encoder.initial_block, *self.encoder.layers, *self.decoder.layers):
            if hasattr(layer, "pool"):
                x = F.relu(layer.bn(torch.cat((layer.conv(x), layer.pool(x)), 1)))
            elif hasattr(layer, "conv"):
                x = F.relu(layer.bn(layer.conv(x)))
            else:
                y = layer.conv1x3_1(F.relu(layer.conv3x1_1(x)))
                y = layer.conv1x3_2(F.relu(layer.conv3x1_2(F.relu(layer.bn1(y)))))
                x = F.relu(x + layer.bn2(y))
        return self.decoder.output_conv(x)


def _named(**modules):
    module = nn.Module()
    for name, each in modules.items():
        module.add_module(name, each)
    return module


def _half(c, out):
    return _named(conv=nn.Conv2d(c, out - c, 3, 2, 1), pool=nn.MaxPool2d(2, 2), bn=nn.BatchNorm2d(out, 1e-3))


def _up(c, out):
    return _named(conv=nn.ConvTranspose2d(c, out, 3, 2, 1, 1), bn=nn.BatchNorm2d(out, 1e-3))


def _unit(c, d):
    return _named(
        conv3x1_1=nn.Conv2d(c, c, (3, 1), 1, (1, 0)),
        conv1x3_1=nn.Conv2d(c, c, (1, 3), 1, (0, 1)),
        bn1=nn.BatchNorm2d(c, 1e-3),
        conv3x1_2=nn.Conv2d(c, c, (3, 1), 1, (d, 0), (d, 1)),
        conv1x3_2=nn.Conv2d(c, c, (1, 3), 1, (0, d), (1, d)),
        bn2=nn.BatchNorm2d(c, 1e-3),
    )


def test_official_weights_give_the_official_outputs():
    """In evaluation and in training, where the names of parameters lead to the same gradients."""
    official = stirred(Official(5)).double()
    model = create_model("erfnet", 5, encoder_head=True, dropout=(0, 0)).double()
    load_official(model, {f"module.{name}": value for name, value in official.state_dict().items()})
    x, image = small_input(2, 3, 32, 40, requires_grad=False), images(32, 40)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), official.eval()(x))
        torch.testing.assert_close(model(image), official(image.double() / 255), rtol=1e-5, atol=1e-5)
    ours, theirs = run_step(model.train(), x), run_step(official.train(), x)
    converted = ERFNet.from_official({k: v for k, v in theirs.gradients.items() if "." in k})
    assert converted.keys() == {name.replace("module.", "") for name, _ in model.named_parameters()}
    theirs.gradients = {"input 0": None, **converted}
    theirs.buffers = ERFNet.from_official(theirs.buffers)
    for values in (ours.gradients, ours.buffers):
        for name in list(values):
            values[name.replace("module.", "")] = values.pop(name)
    assert_same_result(ours, theirs)


def test_unknown_official_names_are_refused():
    state = Official(5).state_dict()
    state["encoder.layers.1.conv5x1.weight"] = state.pop("encoder.layers.1.conv3x1_1.weight")
    with pytest.raises(
        ValueError, match=r"expected names of the official .* got 'encoder\.layers\.1\.conv5x1"
    ):
        ERFNet.from_official(state)
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*num_classes=20, encoder_head=True"):
        load_official(create_model("erfnet", 5), Official(5).state_dict())


def test_head_of_the_encoder_is_unused():
    model = ERFNet(**SMALL, encoder_head=True)
    x, labels = small_input(2, 3, 33, 49, dtype=torch.float32), torch.zeros(2, 33, 49, dtype=torch.uint8)
    UpsampleCrossEntropy()(model(x), labels).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == [
        "encoder_head.weight",
        "encoder_head.bias",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (16, 64)}, "three rising widths above 3, got"),
        ({"widths": (3, 64, 128)}, "three rising widths above 3, got"),
        ({"depth": 0}, "depth and repeats of at least 1, got 0 and 2"),
        ({"repeats": 0}, "depth and repeats of at least 1, got 5 and 0"),
        ({"dilations": ()}, "one or more dilations of at least 1"),
        ({"dropout": (0.1, 1.0)}, "two probabilities of dropout"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ERFNet(**options)
