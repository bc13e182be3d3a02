import pytest
import torch
import torch.nn.functional as F

from revseg import reversible
from revseg.models.fpenet import MEU, FPEBlock, FPENet
from revseg.testing import plain_twin
from tests.helpers import assert_same_step

SMALL = {"num_classes": 5, "widths": (4, 8, 16), "blocks": (2, 3), "expansion": 2}


def small(**options):
    return FPENet(**SMALL, **options)


def layer(part, x, **options):
    """A convolution, a new batch norm in evaluation mode, ReLU."""
    return F.relu(F.conv2d(x, part[0].weight, **options) / (1 + 1e-5) ** 0.5)


@pytest.mark.parametrize(("out", "stride"), [(8, 1), (12, 1), (12, 2), (8, 2)])
def test_a_block_adds_every_part_to_the_next(out, stride):
    block = FPEBlock(8, out, expansion=2, dilations=(1, 2, 4, 8), stride=stride).eval().double()
    x = torch.randn(2, 8, 23, 25).double()
    part = out // 2
    wide, joined, total = layer(block.widen, x), [], 0
    for i, d in enumerate((1, 2, 4, 8)):
        y = wide[:, i * part : (i + 1) * part]
        total = total + layer(block.pyramid[i], y, stride=stride, padding=d, dilation=d, groups=part)
        joined.append(total)
    y = layer(block.narrow, torch.cat(joined, 1))
    torch.testing.assert_close(block(x), x + y if (out, stride) == (8, 1) else y)


def test_maps_gate_each_other():
    meu = MEU(4, 6, 8).eval().double()
    low, high = torch.randn(2, 4, 9, 11).double(), torch.randn(2, 6, 5, 6).double()
    where, what = meu.where, meu.what
    a, b = layer(meu.low, low), layer(meu.high, high)
    fine = torch.sigmoid(where.weight.flatten() * a.mean(1, keepdim=True) + where.bias)
    coarse = torch.sigmoid(b.mean((2, 3)) @ what.weight[:, :, 0, 0].T + what.bias)
    b = F.interpolate(b, (9, 11), mode="bilinear", align_corners=True)
    torch.testing.assert_close(meu(low, high), a * coarse[:, :, None, None] + b * fine)


def test_the_way_up_joins_the_stages():
    model = small(memory="fastest").eval()
    x = torch.randn(1, 3, 33, 49)
    half = model.stage1(x)
    quarter = model.stage2(half)
    eighth = model.stage3(quarter)
    torch.testing.assert_close(model(x), model.classifier(model.up1(half, model.up2(quarter, eighth))))
    assert [m.shape[2] for m in (half, quarter, eighth)] == [17, 9, 5]


def test_its_stages_can_be_made_reversible():
    model, chains = reversible(small().double(), torch.randn(1, 3, 32, 32).double())
    assert chains == [["stage3.1", "stage3.2"]]
    assert_same_step(model, plain_twin(model), torch.randn(2, 3, 33, 49).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (16, 32)}, "three positive widths, got"),
        ({"blocks": (3,)}, "two positive numbers of blocks, at 1/4 and 1/8, got"),
        ({"blocks": (3, 0)}, "two positive numbers of blocks"),
        ({"expansion": 0}, "an expansion of at least 1, got 0"),
        ({"dilations": ()}, "positive dilations, got"),
        ({"dilations": (1, 2, 3)}, r"blocks of widths \[16, 128, 256\] inside to divide into 3 parts"),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FPENet(**options)
