import pytest
import torch
import torch.nn.functional as F

from revseg import reversible
from revseg.models.cfpnet import CFPModule, CFPNet
from revseg.testing import plain_twin
from tests.helpers import assert_same_step

SMALL = {"num_classes": 5, "widths": (4, 16, 32), "dilations": ((2,), (4, 9))}


def small(**options):
    return CFPNet(**SMALL, **options)


@pytest.mark.parametrize(("r", "dilations"), [(2, (1, 1, 1, 2)), (4, (1, 1, 2, 4)), (9, (1, 3, 5, 9))])
def test_a_module_adds_every_channel_of_the_pyramid_to_the_next(r, dilations):
    module = CFPModule(32, r, "relu").eval().double()
    x = torch.randn(2, 32, 23, 25).double()

    def layer(part, x, padding=(0, 0), dilation=1):
        z = F.conv2d(x, part[0].weight, None, 1, padding, dilation)
        return F.relu(z / (1 + 1e-5) ** 0.5)  # a new batch norm

    z, joined, total = layer(module.narrow, x), [], 0
    for channel, d in zip(module.pyramid, dilations, strict=True):
        y, maps = z, []
        for row, column in channel.pairs:
            y = layer(column, layer(row, y, (d, 0), d), (0, d), d)
            maps.append(y)
        assert [len(m[0]) for m in maps] == [2, 2, 4]
        total = total + torch.cat(maps, 1)
        joined.append(total)
    torch.testing.assert_close(module(x), x + layer(module.mix, torch.cat(joined, 1)))


def test_the_images_come_in_at_every_size():
    model = small(memory="fastest").eval().double()
    x = torch.randn(1, 3, 33, 49).double()

    def joined(y):
        return torch.cat((y, F.interpolate(x, y.shape[-2:], mode="bilinear", align_corners=True)), 1)

    def down(part, y):
        return torch.cat((part.conv(y), F.max_pool2d(y, 3, 2, 1)), 1)

    y = model.row1(down(model.down1, joined(model.stem(x))))
    y = model.row2(down(model.down2, joined(y)))
    torch.testing.assert_close(model(x), model.classifier(joined(y)))


def test_its_rows_can_be_made_reversible():
    model, chains = reversible(small().double(), torch.randn(1, 3, 32, 32).double())
    assert chains == [["row2.0", "row2.1"]]
    assert_same_step(model, plain_twin(model), torch.randn(2, 3, 33, 49).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (32, 64)}, "three rising widths, the last two multiples of 16, got"),
        ({"widths": (32, 72, 128)}, "three rising widths, the last two multiples of 16, got"),
        ({"widths": (62, 64, 128)}, "three rising widths"),
        ({"dilations": ((2,),)}, "positive dilations for two rows of modules, got"),
        ({"dilations": ((2,), ())}, "positive dilations for two rows"),
        ({"dilations": ((2,), (0,))}, "positive dilations for two rows"),
        ({"activation": "x"}, "unknown activation 'x'"),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CFPNet(**options)
