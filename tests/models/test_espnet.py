import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg.layers.images import IMAGENET
from revseg.models import create_model, load_official
from revseg.models.espnet import ESPNet
from revseg.models.espnet_esp import ESP
from tests.helpers import assert_same_result, run_step, small_input
from tests.layers.stack_twins import stirred
from tests.models.networks import count, images


@pytest.mark.parametrize(
    ("options", "parameters"), [({}, 363_462), ({"num_classes": 20}, 365_109), ({"q": 3}, 201_542)]
)
def test_parameter_counts(options, parameters):
    assert count(ESPNet(**options)) == parameters


class Pyramid(nn.Module):
    """ESP by the names of the official code, sums written out."""

    def __init__(self, cin, cout, stride=1, residual=False):
        super().__init__()
        n = cout // 5
        kernel = 3 if stride == 2 else 1
        self.c1 = _conv(cin, n, kernel, stride)
        for d in (1, 2, 4, 8, 16):
            self.add_module(f"d{d}", _conv(n, cout - 4 * n if d == 1 else n, 3, 1, d))
        if stride == 2:
            self.bn, self.act = nn.BatchNorm2d(cout, 1e-3), nn.PReLU(cout)
        else:
            self.bn = _norm(cout)
        self.residual = residual

    def forward(self, x):
        r = self.c1.conv(x)
        d1, d2, d4, d8, d16 = (getattr(self, f"d{d}").conv(r) for d in (1, 2, 4, 8, 16))
        y = torch.cat((d1, d2, d2 + d4, d2 + d4 + d8, d2 + d4 + d8 + d16), 1)
        y = x + y if self.residual else y
        return self.act(self.bn(y)) if hasattr(self, "act") else _norm_forward(self.bn, y)


def _conv(cin, cout, kernel, stride=1, dilation=1):
    module = nn.Module()
    module.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2 * dilation, dilation, bias=False)
    return module


def _norm(channels, conv=None):
    module = nn.Module()
    if conv is not None:
        module.conv = conv
    module.bn, module.act = nn.BatchNorm2d(channels, 1e-3), nn.PReLU(channels)
    return module


def _norm_forward(norm, x):
    x = norm.conv(x) if hasattr(norm, "conv") else x
    return norm.act(norm.bn(x))


class Official(nn.Module):
    """The network by the names of the official code, as the paper's figure 4 (d) draws it."""

    def __init__(self, c, p, q, skip_images=True):
        super().__init__()
        self.skip_images = skip_images
        e = self.encoder = nn.Module()
        e.level1 = _norm(16, nn.Conv2d(3, 16, 3, 2, 1, bias=False))
        e.b1, e.b2, e.b3 = _norm(19), _norm(131), _norm(256)
        e.level2_0, e.level3_0 = Pyramid(19, 64, 2), Pyramid(131, 128, 2)
        e.level2 = nn.ModuleList(Pyramid(64, 64, residual=True) for _ in range(p))
        e.level3 = nn.ModuleList(Pyramid(128, 128, residual=True) for _ in range(q))
        e.classifier = _conv(256, c, 1)
        up = lambda: nn.ConvTranspose2d(c, c, 2, 2, bias=False)
        self.level3_C, self.br = _conv(131, c, 1), nn.BatchNorm2d(c, 1e-3)
        self.conv = _norm(c, nn.Conv2d((19 if skip_images else 16) + c, c, 3, 1, 1, bias=False))
        self.up_l3 = nn.Sequential(up())
        self.combine_l2_l3 = nn.Sequential(_norm(2 * c), Pyramid(2 * c, c))
        self.up_l2 = nn.Sequential(up(), _norm(c))
        self.classifier = up()

    def forward(self, x):
        e, pool = self.encoder, nn.AvgPool2d(3, 2, 1)
        alone = _norm_forward(e.level1, x)
        half = _norm_forward(e.b1, torch.cat((alone, pool(x)), 1))
        skip = half if self.skip_images else alone
        first = last = e.level2_0(half)
        for block in e.level2:
            last = block(last)
        quarter = _norm_forward(e.b2, torch.cat((last, first, pool(pool(x))), 1))
        first = last = e.level3_0(quarter)
        for block in e.level3:
            last = block(last)
        eighth = _norm_forward(e.b3, torch.cat((first, last), 1))
        y = self.up_l3(self.br(e.classifier.conv(eighth)))
        y = _norm_forward(self.combine_l2_l3[0], torch.cat((self.level3_C.conv(quarter), y), 1))
        y = _norm_forward(self.up_l2[1], self.up_l2[0](self.combine_l2_l3[1](y)))
        return self.classifier(_norm_forward(self.conv, torch.cat((y, skip), 1)))


@pytest.mark.parametrize("skip_images", [True, False])
def test_official_weights_give_the_official_outputs(skip_images):
    """In evaluation and in training, where the names of parameters lead to the same gradients."""
    official = stirred(Official(5, 2, 3, skip_images)).double()
    model = create_model("espnet", 5, q=3, skip_images=skip_images).double()
    state = {f"module.{name}": value for name, value in official.state_dict().items()}
    with pytest.raises(
        ValueError, match="known for 20 or 12 classes: for 5 give normalization=Normalization"
    ):
        load_official(model, state)
    load_official(model, state, IMAGENET)
    x = small_input(2, 3, 32, 40, requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), official.eval()(x))
    ours, theirs = run_step(model.train(), x), run_step(official.train(), x)
    del theirs.gradients["input 0"], ours.gradients["input 0"]
    theirs.gradients = ESPNet.from_official(theirs.gradients)
    theirs.buffers = ESPNet.from_official(theirs.buffers)
    for values in (ours.gradients, ours.buffers):
        for name in list(values):
            values[name.replace("module.", "")] = values.pop(name)
    assert_same_result(ours, theirs)


@pytest.mark.parametrize(
    ("file", "options", "mean", "std"),
    [
        (
            "espnet_p_2_q_3.pth",
            {"num_classes": 20, "q": 3, "skip_images": False},
            (72.3923111, 82.90893555, 73.15840149),
            (45.3192215, 46.15289307, 44.91483307),
        ),
        (
            "espnet_p_2_q_8_camvid.pth",
            {"num_classes": 12},
            (105.65775, 103.329834, 99.625404),
            (71.11642, 71.676155, 67.87634),
        ),
    ],
)
def test_released_files_fit_and_bytes_are_read_as_the_authors_read_them(file, options, mean, std):
    """The first of them once did not fit any of ours, and bytes gave 1.4 % mIoU in place of 69.4 on CamVid."""
    layout = json.loads((Path(__file__).parent / "released_espnet.json").read_text())[file]
    state = {name: torch.rand(shape) for name, shape in layout.items()}
    model = create_model("espnet", **options).eval()
    load_official(model, state)
    x = images(32, 48)
    blue_first = x.flip(1).float()  # as OpenCV reads files
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    with torch.no_grad():
        torch.testing.assert_close(model(x), model((blue_first - mean) / std / 255), rtol=1e-4, atol=1e-4)
    with pytest.raises(
        RuntimeError, match=r"(?s)size mismatch.*num_classes=20, p=2, q=3, 5 or 8, skip_images=False"
    ):
        load_official(create_model("espnet", 20, q=options.get("q", 8)), state)


def test_unknown_official_names_are_refused():
    state = Official(5, 1, 1).state_dict()
    state["encoder.level2.0.d3.conv.weight"] = state.pop("encoder.level2.0.d4.conv.weight")
    with pytest.raises(
        ValueError, match=r"expected names of the official network, got 'encoder\.level2\.0\.d3"
    ):
        ESPNet.from_official(state)


def pyramids(cin, cout, **options):
    """ESP as a layer, and by the official code's names with the same weights."""
    ours, plain = stirred(ESP(cin, cout, **options)).double(), Pyramid(cin, cout, **options).double()
    modules = [plain.c1.conv, *(getattr(plain, f"d{d}").conv for d in (1, 2, 4, 8, 16))]
    modules += [plain.bn, plain.act] if hasattr(plain, "act") else [plain.bn.bn, plain.bn.act]
    for module, source in zip(modules, [ours.reduce, *ours.dilated, *ours.norm], strict=True):
        module.load_state_dict(source.state_dict())
    return ours, plain


ESPS = [(8, 8, {"residual": True}), (6, 13, {"stride": 2}), (20, 7, {}), (5, 5, {"residual": True})]


@pytest.mark.parametrize(("cin", "cout", "options"), ESPS, ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_a_pyramid_is_that_of_its_modules(cin, cout, options, n, runs):
    ours, plain = pyramids(cin, cout, **options)
    x = small_input(n, cin, 9, 7)
    result, expected = run_step(ours, x), run_step(plain, x)
    for values in (result, expected):  # both register the same tensors in the same order
        values.gradients = dict(enumerate(values.gradients.values()))
        values.buffers = dict(enumerate(values.buffers.values()))
    assert_same_result(result, expected)
    assert runs == [1]


def test_frozen_parts_of_a_pyramid_get_no_gradient():
    ours, plain = pyramids(8, 8, residual=True)
    x = small_input(2, 8, 9, 7, requires_grad=False)
    for frozen in ((0,), (0, 2), (1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)):
        for network in (ours, plain):
            for i, p in enumerate(network.parameters()):
                p.requires_grad_(i not in frozen)
        result, expected = (run_step(network, x).gradients for network in (ours, plain))
        for found, wanted in zip(result.values(), expected.values(), strict=True):
            assert (found is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(found, wanted)


def test_the_image_is_joined_as_floats_of_the_model():
    """Bytes through a network in double precision or bfloat16 change no dtype on the way."""
    x = torch.randint(0, 256, (1, 3, 33, 49), dtype=torch.uint8)
    for dtype in (torch.float64, torch.bfloat16):
        model = ESPNet(5, widths=(4, 8, 16), p=1, q=1).to(dtype)
        assert model(x).dtype == dtype


def test_few_classes_have_a_decoder_of_five_channels():
    assert ESPNet(2)(torch.zeros(1, 3, 33, 49)).shape == (1, 2, 33, 49)
    assert ESPNet(2).decoder.level1.state_dict()["classify.1.weight"].shape == (5, 2, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (16, 64)}, "three rising widths, got"),
        ({"widths": (1, 4, 128)}, "at least 5 channels after ESP, got 4"),
        ({"p": 0}, "p and q of at least 1, got 0 and 8"),
        ({"q": 0}, "p and q of at least 1, got 2 and 0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ESPNet(**options)


def test_pools_count_their_padding():
    model = ESPNet(5, widths=(4, 8, 16), p=1, q=1)
    _, image = model.level1(torch.ones(1, 3, 8, 8))
    small = F.pad(torch.ones(8, 8), (1, 1, 1, 1)).unfold(0, 3, 2).unfold(1, 3, 2).mean((-1, -2))[:4, :4]
    smaller = F.pad(small, (1, 1, 1, 1)).unfold(0, 3, 2).unfold(1, 3, 2).mean((-1, -2))[:2, :2]
    torch.testing.assert_close(image[0, 0], smaller)
