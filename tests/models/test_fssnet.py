import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import reversible
from revseg.models.fssnet import FSSNet, doubled
from revseg.testing import plain_twin
from tests.helpers import assert_same_step
from tests.models.networks import (
    count,
)

SMALL = {"num_classes": 5, "widths": (8, 16, 32), "factorized": 2, "dilations": (2, 5)}


def small(**options):
    return FSSNet(**SMALL, **options)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({}, 199_603), ({"num_classes": 11}, 198_443), ({"activation": "relu"}, 199_603 - 55)],
    ids=str,
)
def test_parameter_counts(options, parameters):
    assert count(FSSNet(**options)) == parameters


def test_the_decoder_adds_what_left_the_down_sampling():
    """The order of the network, with the convolutions as they are called by hand."""
    model = small(memory="fastest").eval().double()
    x = torch.randn(1, 3, 32, 48).double()

    def up(block, x, skip):
        y = block.widen(F.conv_transpose2d(block.narrow(x), block.upsample.weight, None, 2, 1, 1))
        conv, bn, _ = block.shortcut
        main = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)(bn(conv(x + skip)))
        return block.act(main + y)

    half = torch.cat((model.initial.conv(x), F.max_pool2d(x, 3, 2, 1)), 1)
    quarter = model.down1(half)
    eighth = model.down2(model.factorized(quarter))
    y = model.refine2(up(model.up2, model.dilated(eighth), eighth))
    y = model.refine1(up(model.up1, y, quarter))
    y = F.conv_transpose2d(y, model.classifier.weight, model.classifier.bias, 2, 1, 1)
    torch.testing.assert_close(model(x), y)


def test_a_bottleneck_is_activated_after_the_sum():
    block = small(memory="fastest").factorized[0].eval()
    x = torch.randn(2, 16, 7, 9)
    convs = [layer[0] for layer in block.branch]
    assert [conv.kernel_size for conv in convs] == [(1, 1), (1, 3), (3, 1), (1, 1)]
    z = x
    for conv, activated in zip(convs, (True, False, True, False), strict=True):
        z = conv(z) / (1 + 1e-5) ** 0.5  # a new batch norm
        z = F.prelu(z, torch.tensor([0.25])) if activated else z
    torch.testing.assert_close(block(x), F.prelu(x + z, torch.tensor([0.25])))


def test_its_stages_can_be_made_reversible():
    model, chains = reversible(small().double(), torch.randn(1, 3, 32, 32).double())
    assert chains == [
        [f"{stage}.0", f"{stage}.1"] for stage in ("factorized", "dilated", "refine2", "refine1")
    ]
    assert_same_step(model, plain_twin(model), torch.randn(2, 3, 33, 49).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (16, 64)}, "three widths that are multiples of 4, got"),
        ({"widths": (16, 62, 128)}, "three widths that are multiples of 4, got"),
        ({"factorized": 0}, "at least 1 factorized block, got 0"),
        ({"dilations": ()}, "positive dilations, one for each block at 1/8, got"),
        ({"dilations": (0,)}, "positive dilations"),
        ({"activation": "x"}, "unknown activation 'x'"),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FSSNet(**options)


@pytest.mark.parametrize("size", [(13, 9), (14, 10), (13, 10)], ids=str)
def test_doubling_for_an_open_size_is_the_same(size, monkeypatch):
    conv, x = nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 7, 5)
    expected = doubled(conv, x, size)
    assert expected.shape == (2, 5, *size)
    for module in ("models.fssnet", "layers.images"):
        monkeypatch.setattr(f"revseg.{module}.is_size_open", lambda x: True)
    torch.testing.assert_close(doubled(conv, x, size), expected)
