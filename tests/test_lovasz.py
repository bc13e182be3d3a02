"""Lovász-softmax and its gradient are those of its definition; the loss is that and cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from revseg.losses import UpsampleCrossEntropy
from revseg.lovasz import LovaszCrossEntropy
from revseg.memory import peak_bytes, predicted_peak_bytes


def definition(logits, labels, ignore_index=255):
    """Algorithm 1 of the paper, as it stands there, in plain autograd."""
    kept = (labels != ignore_index).flatten()
    p, truth = logits.softmax(1).movedim(1, 0).flatten(1)[:, kept], labels.flatten()[kept]
    losses = []
    for k, p_of_class in enumerate(p):
        is_class = (truth == k).to(p.dtype)
        if is_class.any():
            errors, order = (is_class - p_of_class).abs().sort(descending=True)
            right = is_class[order]
            intersection = right.sum() - right.cumsum(0)
            union = right.sum() + (1 - right).cumsum(0)
            jaccard = 1 - intersection / union
            losses.append(errors @ jaccard.diff(prepend=jaccard.new_zeros(1)))
    return sum(losses) / max(len(losses), 1) if losses else logits.sum() * 0


def case(*size, classes=5, dtype=torch.float64, label_dtype=torch.uint8):
    """Logits and labels, of which the last class is absent and some are ignored."""
    torch.manual_seed(0)
    logits = torch.randn(2, classes, *size, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, classes - 1, (2, *size), dtype=label_dtype)
    labels[0, :2] = 255
    return logits, labels


@pytest.mark.parametrize("size", [(9, 11), (1, 1), (64, 5), (33,), (4, 5, 6)], ids=str)
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int64])
def test_loss_and_gradient_are_those_of_the_definition(size, label_dtype):
    logits, labels = case(*size, label_dtype=label_dtype)
    criterion = LovaszCrossEntropy()
    found = criterion(logits, labels)
    expected = UpsampleCrossEntropy()(logits, labels) + definition(logits, labels)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_pixels_lose_no_digits(dtype):
    """The slope of a pixel is one by their number: differences of losses in float32 would lose it."""
    logits, labels = case(300, 400, dtype=dtype)
    (ours,) = torch.autograd.grad(LovaszCrossEntropy()(logits, labels), logits)
    exact = logits.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(UpsampleCrossEntropy()(exact, labels) + definition(exact, labels), exact)
    off = (ours.double() - truth).norm() / truth.norm()
    assert off < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]


def test_labels_are_read_where_the_logits_are():
    logits, labels = case(8, 12)[0], torch.randint(0, 5, (2, 32, 48))
    nearest = F.interpolate(labels[:, None].float(), (8, 12), mode="nearest-exact")[:, 0].long()
    expected = UpsampleCrossEntropy()(logits, labels) + definition(logits, nearest)
    torch.testing.assert_close(LovaszCrossEntropy()(logits, labels), expected)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int64])
def test_an_ignored_label_that_bytes_do_not_have(label_dtype):
    logits, labels = case(6, 7, label_dtype=label_dtype)
    labels = labels.clamp(max=4)
    found = LovaszCrossEntropy(ignore_index=-100)(logits, labels)
    torch.testing.assert_close(found, LovaszCrossEntropy()(logits, labels))


def test_all_ignored():
    logits, labels = case(4, 4)
    loss = LovaszCrossEntropy()(logits, torch.full_like(labels, 255))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_heads_and_weights():
    """Class weights are of the cross-entropy; auxiliary heads have the whole loss; a single class is one of two."""
    logits, labels = case(6, 7)
    weight = torch.tensor([1.0, 2, 3, 4, 5])
    both = LovaszCrossEntropy(weight=weight, aux_weight=0.5)((logits, logits * 2), labels)
    one, other = (
        UpsampleCrossEntropy(weight=weight)(x, labels) + definition(x, labels) for x in (logits, logits * 2)
    )
    torch.testing.assert_close(both, one + 0.5 * other)
    thing = torch.randn(2, 1, 6, 7, dtype=torch.float64)
    two = torch.cat((torch.zeros_like(thing), thing), 1)
    labels = labels.clamp(max=1)
    torch.testing.assert_close(LovaszCrossEntropy()(thing, labels), LovaszCrossEntropy()(two, labels))


def test_a_better_answer_has_a_lower_loss():
    logits, labels = case(9, 11)
    labels = labels.clamp(max=4)
    right = F.one_hot(labels.long(), 5).movedim(3, 1).double()
    losses = [LovaszCrossEntropy()(s * right + logits.detach(), labels).item() for s in (0, 2, 50)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-6


def test_memory_is_predicted_and_small():
    """Six maps of the size of the logits, beside the images and labels: no scores at full size."""

    def prepare():
        model = torch.nn.Conv2d(3, 8, 3, stride=4, padding=1)

        def step():
            images, labels = torch.zeros(1, 3, 512, 512), torch.zeros(1, 512, 512, dtype=torch.uint8)
            LovaszCrossEntropy()(model(images), labels).backward()

        return step

    step = prepare()
    step()
    measured, logits = peak_bytes(step), 8 * 128 * 128 * 4
    assert predicted_peak_bytes(prepare) == measured
    assert measured < (3 * 4 + 1) * 512 * 512 + 6 * logits


def test_no_loss_of_pixels():
    with pytest.raises(ValueError, match='expected reduction "mean" or "sum"'):
        LovaszCrossEntropy(reduction="none")
