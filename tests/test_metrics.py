"""The metrics against counting pixel by pixel in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revseg.metrics import ConfusionMatrix, _add_counts, confusion_matrix


def counted(predicted, labels, classes):
    counts = np.zeros((classes, classes), dtype=np.int64)
    for guess, truth in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if 0 <= truth < classes:
            counts[truth, guess] += 1
    return torch.from_numpy(counts)


@st.composite
def batches(draw):
    classes = draw(st.integers(1, 7))
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5)))
    pixels = math.prod(shape)
    dtype = draw(st.sampled_from([torch.uint8, torch.int32, torch.int64]))
    labels = draw(st.lists(st.sampled_from([*range(classes), 255]), min_size=pixels, max_size=pixels))
    predicted = draw(st.lists(st.integers(0, classes - 1), min_size=pixels, max_size=pixels))
    return (
        torch.tensor(predicted, dtype=torch.int64).view(shape),
        torch.tensor(labels, dtype=torch.int64).to(dtype).view(shape),
        classes,
    )


@settings(deadline=None, max_examples=60)
@given(batches())
def test_counts_are_those_of_counting_by_hand(batch):
    predicted, labels, classes = batch
    expected = counted(predicted, labels, classes)
    assert torch.equal(confusion_matrix(predicted, labels, classes), expected)
    matrix = ConfusionMatrix(classes)
    matrix.update(predicted, labels)
    assert torch.equal(matrix.counts(), expected)


@settings(deadline=None, max_examples=30)
@given(batches())
def test_scores_are_those_of_sets_of_pixels(batch):
    predicted, labels, classes = batch
    matrix = ConfusionMatrix(classes)
    matrix.update(predicted, labels)
    valid = labels != 255
    iou = matrix.iou()
    for c in range(classes):
        hits = int(((predicted == c) & (labels == c)).sum())
        either = int((((predicted == c) | (labels == c)) & valid).sum())
        assert math.isnan(iou[c]) if either == 0 else float(iou[c]) == pytest.approx(hits / either)
    present = [float(value) for value in iou if not math.isnan(value)]
    if present:
        assert matrix.mean_iou() == pytest.approx(sum(present) / len(present))
        right = int(((predicted == labels) & valid).sum())
        assert matrix.pixel_accuracy() == pytest.approx(right / int(valid.sum()))
    else:
        assert math.isnan(matrix.mean_iou())
        assert math.isnan(matrix.pixel_accuracy())


def test_rows_are_the_truth():
    predicted = torch.tensor([[[1, 1, 2]]])
    labels = torch.tensor([[[0, 0, 1]]])
    assert confusion_matrix(predicted, labels, 3).tolist() == [[0, 2, 0], [0, 0, 1], [0, 0, 0]]


def test_batches_add_up_and_are_not_averaged():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(4, (6, 9, 7), generator=generator)
    labels = torch.randint(4, (6, 9, 7), generator=generator)
    matrix = ConfusionMatrix(4)
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        matrix.update(predicted[start:stop], labels[start:stop])
    assert torch.equal(matrix.counts(), confusion_matrix(predicted, labels, 4))
    matrix.reset()
    assert int(matrix.counts().sum()) == 0


def test_absent_class_that_is_predicted_counts_as_zero():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]))
    assert matrix.iou()[:2].tolist() == [0.5, 0.0]
    assert math.isnan(matrix.iou()[2])
    assert matrix.mean_iou() == 0.25


def test_predictions_at_ignored_pixels_do_not_count():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 255, 255]]], dtype=torch.uint8))
    assert matrix.counts().tolist() == [[1, 0], [0, 0]]
    assert matrix.pixel_accuracy() == 1.0


@pytest.mark.parametrize(
    ("value", "dtype", "shown"),
    [(3, torch.uint8, "got 3 at 2 pixels"), (254, torch.int64, "got 254"),
     (-1, torch.int64, "outside"), (256, torch.int32, "outside"), (-1, torch.int8, "outside")],
)  # fmt: skip
def test_labels_out_of_range_are_refused(value, dtype, shown):
    matrix = ConfusionMatrix(3)
    matrix.update(
        torch.zeros(1, 2, 2, dtype=torch.int64), torch.tensor([[[0, 1], [value, value]]], dtype=dtype)
    )
    with pytest.raises(ValueError, match=f"labels.*{shown}"):
        matrix.mean_iou()


@pytest.mark.parametrize(
    ("value", "shown"), [(3, "got 3"), (255, "got 255"), (-1, "outside"), (2**40, "outside")]
)
def test_predictions_out_of_range_are_refused(value, shown):
    predicted, labels = torch.tensor([[[0, value]]]), torch.tensor([[[0, 1]]])
    matrix = ConfusionMatrix(3)
    matrix.update(predicted, labels)
    with pytest.raises(ValueError, match=f"predictions.*{shown}"):
        matrix.counts()
    with pytest.raises(ValueError, match=f"predictions.*{value}"):
        confusion_matrix(predicted, labels, 3)


@pytest.mark.parametrize(
    "count", [lambda p, t: confusion_matrix(p, t, 3), lambda p, t: ConfusionMatrix(3).update(p, t)]
)
def test_what_cannot_be_counted_is_refused(count):
    labels = torch.zeros(1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"one shape, got \[1, 2, 3\] and \[1, 2, 2\]"):
        count(torch.zeros(1, 2, 3, dtype=torch.int64), labels)
    with pytest.raises(
        TypeError, match=r"expected predictions to be class indices of an integer type, got torch\.float32"
    ):
        count(torch.zeros(1, 2, 2), labels)
    with pytest.raises(TypeError, match=r"labels.*torch\.bool"):
        count(labels, labels.bool())
    with pytest.raises(ValueError, match="predictions and labels on one device, got meta and cpu"):
        count(labels.to("meta"), labels)


@pytest.mark.parametrize("classes", [0, 256])
def test_number_of_classes_is_checked(classes):
    with pytest.raises(ValueError, match=f"classes, got {classes}"):
        ConfusionMatrix(classes)


def test_counting_for_a_gpu_is_that_for_a_cpu():
    class OnGpu(torch.Tensor):
        is_cuda = True

    cells = torch.randint(50, (1000,), dtype=torch.int32)
    counts, expected = torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.int64)
    _add_counts(counts, cells.as_subclass(OnGpu))
    _add_counts(expected, cells)
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_memory_is_that_of_one_image(dtype):
    matrix, pixels = ConfusionMatrix(19), 512 * 1024
    labels, predicted = torch.zeros(4, 512, 1024, dtype=torch.uint8), torch.zeros(4, 512, 1024, dtype=dtype)
    with torch.profiler.profile(profile_memory=True) as profile:
        matrix.update(predicted, labels)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    assert 0 < peak <= 24 * pixels + matrix.tally.nbytes


def test_counts_made_elsewhere_are_added():
    predicted, labels = torch.randint(0, 4, (2, 3, 5, 6)), torch.randint(0, 4, (2, 3, 5, 6))
    whole, parts = ConfusionMatrix(4), ConfusionMatrix(4)
    whole.update(predicted, labels)
    parts.update(predicted[0], labels[0])
    parts.add(confusion_matrix(predicted[1], labels[1], 4))
    assert torch.equal(parts.counts(), whole.counts())
    with pytest.raises(TypeError, match=r"counts of dtype int64, got torch\.float32"):
        parts.add(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"expected counts \[4, 4\], got shape \[5, 5\]"):
        parts.add(torch.zeros(5, 5, dtype=torch.int64))
