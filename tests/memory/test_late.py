"""The loss by bands is the loss of the output, and has no map at full size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import fit
from revseg.losses import OhemCrossEntropy, UpsampleCrossEntropy
from revseg.memory import peak_bytes, predict, saved_bytes
from revseg.memory.late import Late, LateLoss, Upsampled
from tests.memory.nets import ResNet

CRITERIA = {
    "mean": nn.CrossEntropyLoss(),
    "options": nn.CrossEntropyLoss(torch.tensor([1.0, 2, 0.5, 1, 3]), ignore_index=2, label_smoothing=0.1),
    "sum": lambda y, t: F.cross_entropy(y, t, reduction="sum", ignore_index=3),
    "none": lambda y, t: F.cross_entropy(y, t, reduction="none").mean(),
    "and another": lambda y, t: y.square().mean() + F.cross_entropy(y, t),
    "another behind": lambda y, t: F.cross_entropy(y, t) + y.square().mean(),
    "probabilities": lambda y, t: F.cross_entropy(y, F.one_hot(t, 5).movedim(3, 1).float()),
    "looks at it": lambda y, t: F.cross_entropy(y[:, :, : t.shape[1]], t) * (len(y) + y.shape[1] + y.size(2)),
}


class Ends(nn.Module):
    """A network that ends in an upsampling of some kind."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 5, 3, 4, 1), end

    def forward(self, x):
        return self.end(self.conv(x))


ENDS = {
    "module": nn.Upsample(scale_factor=4, mode="bilinear"),
    "corners": nn.UpsamplingBilinear2d(scale_factor=4),
    "nearest": nn.Upsample(scale_factor=4),
    "fraction": nn.Upsample(scale_factor=3.3, mode="bilinear"),
    "bicubic": nn.Upsample(scale_factor=4, mode="bicubic"),
    "smaller": lambda x: F.interpolate(x, (7, 9), mode="bilinear"),
    "twice": lambda x: F.interpolate(
        F.interpolate(x, scale_factor=2.0, mode="bilinear"), (64, 48), mode="bilinear"
    ),
    "as it is": lambda x: x.relu(),
    "same size": lambda x: F.interpolate(x, (16, 12), mode="bilinear"),
    "same size, corners": lambda x: F.interpolate(x, (16, 12), mode="bilinear", align_corners=True),
    "row": nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(5, 5, 1),
        nn.Upsample((64, 48), mode="bilinear"),
    ),
}


def trained(model, loss_of, double=False):
    model = copy.deepcopy(model).double() if double else copy.deepcopy(model)
    loss = loss_of(model)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def assert_equal_up_to_rounding(model, criterion, labels, shape):
    """Our error against float64 is at most twice that of plain PyTorch."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    truth = trained(model, lambda m: criterion(m(images.double()), labels), double=True)
    plain = trained(model, lambda m: criterion(m(images), labels))
    ours = trained(model, lambda m: LateLoss(m, criterion)(images, labels))
    for a, b, c in zip(ours, plain, truth, strict=True):
        floor = 1e-6 * (1e-6 + float(c.abs().max()))
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + floor


@pytest.mark.parametrize("name", CRITERIA)
def test_it_is_the_loss_of_the_output(name):
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (2, 64, 48))
    criterion = CRITERIA[name]
    if name == "options":
        model = Ends(ENDS["module"])
        images = torch.randn(2, 3, 64, 48)
        plain = trained(model, lambda m: criterion(m(images), labels))
        ours = trained(model, lambda m: LateLoss(m, criterion)(images, labels))
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        return
    assert_equal_up_to_rounding(Ends(ENDS["module"]), criterion, labels, (2, 3, 64, 48))


@pytest.mark.parametrize("name", ENDS)
def test_upsampling_of_any_kind(name):
    torch.manual_seed(0)
    model = Ends(ENDS[name])
    size = model(torch.randn(2, 3, 64, 48)).shape[2:]
    labels = torch.randint(0, 5, (2, *size))
    assert_equal_up_to_rounding(model, nn.CrossEntropyLoss(), labels, (2, 3, 64, 48))
    with Late() as late:
        F.cross_entropy(model(torch.randn(2, 3, 64, 48)), labels)
    as_they_are = name in ("as it is", "nearest", "fraction", "bicubic", "smaller")
    assert len(late.used) == (not as_they_are)
    assert late.whole == as_they_are * 2 * 5 * size.numel() * 4


@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes(dims):
    torch.manual_seed(0)
    conv, mode = ((nn.Conv1d, "linear"), None, (nn.Conv3d, "trilinear"))[dims - 1]
    model = nn.Sequential(conv(3, 5, 1), nn.Upsample(scale_factor=2, mode=mode))
    labels = torch.randint(0, 5, (2, *(8,) * dims))
    assert_equal_up_to_rounding(model, nn.CrossEntropyLoss(), labels, (2, 3, *(4,) * dims))


def ends_at_full_size(classes, width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, classes, 1))


@pytest.mark.parametrize("criterion", ["cross entropy", "upsampled to their own size"])
def test_logits_at_full_size_by_bands(criterion):
    """Neither their logarithmic softmax nor another map of all classes stands beside them and their gradient."""
    torch.manual_seed(0)
    losses = {
        "cross entropy": nn.CrossEntropyLoss(),
        "upsampled to their own size": lambda y, t: F.cross_entropy(
            F.interpolate(y, t.shape[1:], mode="bilinear"), t
        ),
    }
    model, loss = ends_at_full_size(60), losses[criterion]
    images, labels = torch.randn(2, 3, 128, 128), torch.randint(0, 60, (2, 128, 128))
    full = 2 * 60 * 128 * 128 * 4
    fitted = fit(model, images, loss, time=2, target=labels)
    assert fitted.plan.by_bands

    def step():
        fitted.loss(images, labels).backward()
        fitted.zero_grad()

    step()
    before = sum(x.nbytes for x in (*fitted.parameters(), *fitted.buffers(), images, labels))
    peak = peak_bytes(step, before=step)
    assert peak < 2.5 * full
    assert peak + before == pytest.approx(fitted.plan.peak, rel=0.05)
    assert_equal_up_to_rounding(model, loss, labels[:, :64, :64], (2, 3, 64, 64))


def test_few_classes_are_no_reason_for_another_loss():
    images = torch.randn(2, 3, 128, 128)
    model, labels = ends_at_full_size(2, width=256), torch.zeros(2, 128, 128, dtype=torch.int64)
    assert not fit(model, images, nn.CrossEntropyLoss(), time=2, target=labels).plan.by_bands


def test_what_is_no_cross_entropy_of_pixels_is_computed_as_ever():
    with Late() as late:
        F.cross_entropy(torch.randn(4, 7), torch.randint(0, 7, (4,)))
        F.cross_entropy(torch.randn(4, 7, 5), torch.randn(4, 7, 5).softmax(1))
    assert (late.used, late.whole) == ([], 0)


def test_nothing_stands_at_full_size():
    model, images, labels = ResNet(), torch.randn(2, 3, 128, 128), torch.randint(0, 5, (2, 128, 128))
    full = 2 * 5 * 128 * 128 * 4
    loss = nn.CrossEntropyLoss()
    plain = saved_bytes(lambda: loss(model(images), labels))
    assert saved_bytes(lambda: LateLoss(model, loss)(images, labels)) < plain - full / 2

    def step():
        LateLoss(model, loss)(images, labels).backward()
        model.zero_grad()

    predicted = predict(model, images, loss, target=labels, by_bands=True).step_bytes
    assert predicted == pytest.approx(peak_bytes(step, before=step), rel=0.05)


def test_what_waits_describes_itself_and_is_made_once():
    with Late():
        low = torch.randn(1, 2, 3, 4, requires_grad=True)
        waits = F.interpolate(low, (6, 8), mode="bilinear")
        assert isinstance(waits, Upsampled)
        assert (waits.shape, waits.dtype, waits.requires_grad) == ((1, 2, 6, 8), torch.float32, True)
        assert torch.equal(waits + 0, F.interpolate(low.detach().clone(), (6, 8), mode="bilinear") + 0)
        assert waits.make() is waits.make()
        below = Upsampled.__torch_dispatch__(torch.ops.aten.relu.default, (), (waits,))
        assert type(below) is torch.Tensor
        assert torch.equal(below, torch.relu(waits))
    assert type(F.interpolate(low, (6, 8), mode="bilinear")) is torch.Tensor


def test_a_budget_below_the_maps_at_full_size():
    """Without bands the logits at full size stand, whatever runs again."""
    torch.manual_seed(0)
    model, loss = ResNet(classes=60), nn.CrossEntropyLoss()
    images, labels = torch.randn(2, 3, 128, 128), torch.randint(0, 60, (2, 128, 128))
    at_full_size = 2 * 60 * 128 * 128 * 4
    plan = fit(model, images, loss, time=3).plan
    assert plan.by_bands
    assert "by bands" in str(plan)
    fitted = fit(model, images, loss, budget=int(1.1 * plan.peak))
    assert fitted.plan.by_bands
    assert fitted.plan.peak < 2 * at_full_size

    def step():
        fitted.loss(images, labels).backward()
        fitted.zero_grad()

    step()
    before = sum(x.nbytes for x in (*fitted.parameters(), *fitted.buffers(), images, labels))
    assert peak_bytes(step, before=step) + before == pytest.approx(fitted.plan.peak, rel=0.05)
    assert fitted.plan.apply(model, loss).loss(images, labels) == fitted.loss(images, labels)
    assert not hasattr(fitted.plan.apply(model), "loss")


def test_a_network_with_a_loss_keeps_it():
    model = ResNet()
    model.loss = "mine"
    fitted = fit(model, torch.empty(2, 3, 64, 64, device="meta"), nn.CrossEntropyLoss(), time=2)
    assert fitted.loss == "mine"
    assert not fitted.plan.by_bands


HELD = torch.randint(0, 4, (2, 16, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "loss",
    [
        lambda y: F.cross_entropy(y, HELD),
        lambda y: F.cross_entropy(F.interpolate(y, HELD.shape[1:], mode="bilinear"), HELD),
        lambda y: UpsampleCrossEntropy()(y, HELD),
        lambda y: OhemCrossEntropy(min_kept=8)(y, HELD),
    ],
    ids=["cross entropy", "upsampled", "ours", "ohem"],
)
def test_a_loss_may_hold_its_labels(loss):
    """Nobody asks for the values of real labels where the logits have none."""
    model, images = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 16, 24)
    fitted = fit(model, images, loss=loss, time=2)
    assert predict(model, images, loss=loss).peak == fitted.plan.before
    loss(fitted(images)).backward()
