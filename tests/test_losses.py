import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from revseg.losses import SegmentationLoss, predict_labels, segmentation_loss
from revseg.memory import peak_bytes


def example(classes=5, size=(13, 18), ignored=0.2):
    logits = torch.randn(2, classes, 4, 5, requires_grad=True)
    labels = torch.randint(0, classes, (2, *size), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < ignored] = 255
    return logits, labels


def plain(logits, labels, **options):
    """PyTorch's own upsampling and mean."""
    scores = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, labels.long(), ignore_index=255, **options)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_torch(weighted, smoothing):
    logits, labels = example()
    weights = torch.rand(5) + 0.1 if weighted else None
    ours = segmentation_loss(logits, labels, class_weights=weights, label_smoothing=smoothing)
    theirs = plain(logits, labels, weight=weights, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


def test_bytes_and_int64_are_the_same_labels():
    logits, labels = example()
    assert torch.equal(segmentation_loss(logits, labels), segmentation_loss(logits, labels.long()))


@pytest.mark.parametrize("weights", [None, torch.ones(5)])
def test_everything_ignored_is_zero_with_gradient_zero(weights):
    logits, labels = example(ignored=2.0)
    loss = segmentation_loss(logits, labels, class_weights=weights)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_auxiliary_heads_count_with_their_weight():
    logits, labels = example()
    head = torch.randn(2, 5, 2, 3)
    expected = segmentation_loss(logits, labels) + 0.3 * segmentation_loss(head, labels)
    torch.testing.assert_close(segmentation_loss((logits, head), labels, aux_weight=0.3), expected)
    assert torch.equal(segmentation_loss((logits,), labels), segmentation_loss(logits, labels))


@pytest.mark.parametrize(
    ("value", "dtype"), [(5, torch.uint8), (254, torch.uint8), (-1, torch.int64), (300, torch.int64)]
)
def test_label_out_of_range_is_named(value, dtype):
    logits, labels = example()
    labels = labels.to(dtype)
    labels[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"labels below 5 .* or 255 \(ignored\), got {value}"):
        segmentation_loss(logits, labels)


def test_wrong_kinds_and_shapes_are_refused():
    logits, labels = example()
    with pytest.raises(TypeError, match=r"uint8 or int64, got torch\.float32"):
        segmentation_loss(logits, labels.float())
    with pytest.raises(ValueError, match=r"labels \[N, H, W\] with N = 2, got shape \[1, 13, 18\]"):
        segmentation_loss(logits, labels[:1])
    with pytest.raises(ValueError, match=r"expected logits \[2, 5, h, w\]"):
        segmentation_loss((logits, logits[:, :4]), labels)
    with pytest.raises(ValueError, match=r"label_smoothing in \[0, 1\), got 1"):
        SegmentationLoss(label_smoothing=1)
    with pytest.raises(ValueError, match=r"expected class weights \[C\]"):
        SegmentationLoss(torch.tensor([1.0, -1.0]))


def test_half_precision_logits_are_summed_in_float32():
    logits, labels = example()
    loss = segmentation_loss(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, segmentation_loss(logits.bfloat16().float(), labels))


def test_module_keeps_its_options():
    logits, labels = example()
    weights = torch.rand(5)
    module = SegmentationLoss(weights, label_smoothing=0.1, aux_weight=0.2)
    expected = segmentation_loss(
        (logits, logits), labels, class_weights=weights, label_smoothing=0.1, aux_weight=0.2
    )
    assert torch.equal(module((logits, logits), labels), expected)
    assert module.double().class_weights.dtype == torch.float64
    assert not module.state_dict()


@given(
    classes=st.integers(1, 7),
    low=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    levels=st.sampled_from([2, 1000]),  # few levels make many equal scores
)
def test_predictions_are_the_argmax_of_the_upsampled_logits(classes, low, size, levels):
    logits = torch.randint(0, levels, (2, classes, *low)).float() / 7
    scores = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    predicted = predict_labels(logits, size)
    assert predicted.dtype == torch.uint8
    assert torch.equal(predicted.long(), scores.argmax(dim=1))


def test_predictions_read_the_main_head():
    logits, _ = example()
    assert torch.equal(predict_labels((logits, -logits), (9, 9)), predict_labels(logits, (9, 9)))


def test_predicting_takes_less_memory_than_one_map_of_scores():
    logits = torch.randn(1, 19, 16, 32)
    pixels = 128 * 256
    assert peak_bytes(lambda: predict_labels(logits, (128, 256))) < 16 * pixels < 19 * 4 * pixels


def test_too_many_classes_for_a_byte():
    with pytest.raises(ValueError, match="at most 255 classes, got 300"):
        predict_labels(torch.zeros(1, 300, 1, 1), (1, 1))
