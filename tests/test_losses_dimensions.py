"""Losses and labels of signals and volumes against the scores at full size."""

import pytest
import torch
import torch.nn.functional as F

from revseg.losses import OhemCrossEntropy, UpsampleCrossEntropy, predict_labels
from revseg.memory import peak_bytes
from tests.helpers import small_input

SIZES = {1: ((5,), (18,)), 3: ((3, 4, 5), (7, 9, 13))}
MODES = {1: "linear", 3: "trilinear"}


def example(dims, classes=5, dtype=torch.float64):
    torch.manual_seed(0)
    low, size = SIZES[dims]
    labels = torch.randint(0, classes, (2, *size), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.2] = 255
    return small_input(2, classes, *low, dtype=dtype), labels


def scores_of(logits, labels, align_corners=False):
    mode = MODES[logits.ndim - 2]
    return F.interpolate(logits, labels.shape[1:], mode=mode, align_corners=align_corners)


def assert_same_loss(ours, plain, logits):
    torch.testing.assert_close(ours, plain)
    weight = torch.linspace(0.5, 1, ours.numel(), dtype=ours.dtype).view(ours.shape)
    gradients = (torch.autograd.grad((loss * weight).sum(), logits)[0] for loss in (ours, plain))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_loss_of_the_scores_at_full_size(dims, reduction, align_corners, weighted):
    logits, labels = example(dims)
    weight = torch.tensor([0.0, 1, 2, 0.5, 3], dtype=torch.float64) if weighted else None
    module = UpsampleCrossEntropy(255, weight, 0.1, reduction, align_corners)
    scores = scores_of(logits, labels, align_corners)
    plain = F.cross_entropy(
        scores, labels.long(), weight, ignore_index=255, reduction=reduction, label_smoothing=0.1
    )
    counts = torch.zeros(5, 5, dtype=torch.int64)
    assert_same_loss(module(logits, labels, counts), plain, logits)
    counted = labels != 255
    cells = labels.long()[counted] * 5 + scores.argmax(1)[counted]
    assert torch.equal(counts, torch.bincount(cells, minlength=25).view(5, 5))
    assert torch.equal(predict_labels(logits, labels.shape[1:], align_corners), scores.argmax(1).byte())


@pytest.mark.parametrize("dims", [1, 3])
def test_a_negative_label_is_ignored_and_a_mean_over_nothing_is_zero(dims):
    logits, labels = example(dims)
    long = labels.long().where(labels != 255, -1)
    plain = F.cross_entropy(scores_of(logits, labels), long, ignore_index=-1)
    assert_same_loss(UpsampleCrossEntropy(-1)(logits, long), plain, logits)
    loss = UpsampleCrossEntropy()(logits, torch.full_like(labels, 255))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("dims", [1, 3])
def test_a_single_class_and_heads(dims):
    logits, labels = example(dims, classes=1)
    labels = (labels == 255).byte()
    scores = torch.cat((torch.zeros_like(logits), logits), 1)
    expected = F.cross_entropy(scores_of(scores, labels), labels.long())
    assert_same_loss(UpsampleCrossEntropy()((logits, logits), labels), 1.4 * expected, logits)
    assert torch.equal(predict_labels(logits, labels.shape[1:]), scores_of(scores, labels).argmax(1).byte())


@pytest.mark.parametrize("dims", [1, 3])
def test_hard_pixels(dims):
    logits, labels = example(dims)
    losses = F.cross_entropy(scores_of(logits, labels), labels.long(), ignore_index=255, reduction="none")
    hard = losses > -torch.tensor(0.3).log()
    assert 0 < hard.sum() < (labels != 255).sum()
    ours = OhemCrossEntropy(0.3, 1)(logits, labels)
    assert_same_loss(ours, losses[hard].mean(), logits)


def test_a_volume_never_has_its_scores_at_full_size():
    logits, labels = (
        torch.randn(1, 8, 8, 8, 8, requires_grad=True),
        torch.zeros(1, 64, 64, 64, dtype=torch.uint8),
    )

    def step():
        UpsampleCrossEntropy()(logits, labels).backward()

    assert peak_bytes(step, before=step) < 8 * labels.numel() * 4 / 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    logits, labels = example(3, dtype=torch.float32)
    low = logits.detach().to(dtype).requires_grad_()
    UpsampleCrossEntropy()(low, labels).backward()
    F.cross_entropy(scores_of(logits, labels), labels.long(), ignore_index=255).backward()
    assert low.grad.dtype == dtype
    torch.testing.assert_close(low.grad.float(), logits.grad, rtol=0.02, atol=1e-3)


def test_what_does_not_fit_is_refused():
    logits, labels = example(3)
    module = UpsampleCrossEntropy()
    for wrong in (labels[:, 0], labels[None]):
        with pytest.raises(ValueError, match="expected labels of 3 dimensions besides N"):
            module(logits, wrong)
    with pytest.raises(ValueError, match="labels"):
        module(logits, labels[:1])
    with pytest.raises(ValueError, match="expected logits"):
        module(logits[None], labels)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(module(logits, labels), logits, create_graph=True)
