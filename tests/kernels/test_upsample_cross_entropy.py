import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revseg.kernels.cpu import bilinear
from revseg.kernels.upsample_cross_entropy.inputs import REDUCTIONS
from revseg.kernels.upsample_cross_entropy.op import reference
from revseg.metrics import confusion_matrix
from revseg.ops import upsample_argmax, upsample_cross_entropy
from tests.kernels.upsample_cross_entropy_cases import (
    DTYPES,
    OPTIONS,
    assert_near,
    eager,
    example,
    reductions,
    run,
    variants,
    with_weights,
)


def test_the_twin_has_the_same_signature():
    assert inspect.signature(upsample_cross_entropy) == inspect.signature(reference)


@variants
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference_is_interpolation_and_cross_entropy(options, align_corners, reduction):
    logits, labels = example()
    options = with_weights({**options, "align_corners": align_corners, "reduction": reduction}, 5)
    for ours, theirs in zip(
        run(reference, logits, labels, **options), run(eager, logits, labels, **options), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@given(
    classes=st.integers(2, 7),
    low=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    ignored=st.sampled_from([0.0, 0.2, 0.95]),
    dtype=st.sampled_from(DTYPES[:-1]),
    options=st.sampled_from(OPTIONS),
    align_corners=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    band_bytes=st.sampled_from([1, 2000, bilinear.BAND_BYTES]),
)
def test_at_most_twice_the_error_of_pytorch(
    classes, low, size, ignored, dtype, options, align_corners, reduction, scale, band_bytes
):
    logits, labels = example(2, classes, low, size, dtype, ignored, scale)
    options = with_weights({**options, "align_corners": align_corners, "reduction": reduction}, classes)
    exact = run(reference, logits.double(), labels, **options)
    plain = run(reference, logits, labels, **options)  # stricter than `eager` in half precision
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bilinear, "BAND_BYTES", band_bytes)
        ours = run(upsample_cross_entropy, logits, labels, **options)
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    assert ours[1].dtype == dtype
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert_near(a, b, truth.double())


@reductions
@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # float16 overflows in plain PyTorch
def test_at_most_twice_the_error_of_pytorch_in_many_bands(dtype, options, reduction):
    logits, labels = example(2, 19, (16, 32), (128, 256), dtype)
    options = with_weights({**options, "reduction": reduction}, 19)
    exact = run(reference, logits.double(), labels, **options)
    plain = run(eager, logits, labels, **options)
    for a, b, truth in zip(run(upsample_cross_entropy, logits, labels, **options), plain, exact, strict=True):
        assert_near(a, b, truth.double())


@given(
    low=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    options=st.sampled_from(OPTIONS),
    align_corners=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_in_float64_equal_to_the_reference(low, size, options, align_corners, reduction):
    logits, labels = example(2, 5, low, size)
    options = with_weights({**options, "align_corners": align_corners, "reduction": reduction}, 5)
    ours, plain = (run(f, logits, labels, **options) for f in (upsample_cross_entropy, reference))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@reductions
@variants
def test_gradcheck(reduction, options):
    logits, labels = example(low=(3, 4), size=(7, 9))
    options = with_weights(options, 5)
    assert torch.autograd.gradcheck(
        lambda x: upsample_cross_entropy(x, labels, reduction=reduction, **options), logits, fast_mode=True
    )


@reductions
def test_same_bits_twice(reduction):
    logits, labels = example(2, 19, (16, 32), (128, 256), torch.float32)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    first, second = (run(upsample_cross_entropy, logits, labels, **options) for _ in range(2))
    assert all(map(torch.equal, first, second))


@reductions
def test_bytes_and_int64_are_the_same_labels(reduction):
    logits, labels = example()
    ours = [
        run(upsample_cross_entropy, logits, each, reduction=reduction) for each in (labels, labels.long())
    ]
    assert all(map(torch.equal, *ours))


@reductions
@variants
def test_everything_ignored_is_zero_with_gradient_zero(reduction, options):
    logits, labels = example(ignored=2.0)
    loss, gradient = run(
        upsample_cross_entropy, logits, labels, reduction=reduction, **with_weights(options, 5)
    )
    assert not loss.any()
    assert not gradient.any()
    assert loss.isfinite().all()


def test_mean_over_classes_of_weight_zero_is_zero():
    logits, labels = example()
    labels.fill_(2)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    for smoothing in (0.0, 0.1):
        loss, gradient = run(upsample_cross_entropy, logits, labels, weight=weight, label_smoothing=smoothing)
        assert loss == 0
        assert not gradient.any()


def test_one_class_is_always_right():
    logits, labels = example(classes=1, dtype=torch.float32)
    loss, gradient = run(upsample_cross_entropy, logits, labels)
    assert loss == 0
    assert not gradient.any()


@reductions
def test_no_batch(reduction):
    logits, labels = example(n=0)
    loss, gradient = run(upsample_cross_entropy, logits, labels, reduction=reduction)
    assert not loss.any()
    assert gradient.shape == logits.shape


@pytest.mark.parametrize(
    ("ignore_index", "dtype"), [(255, torch.uint8), (-100, torch.int64), (3, torch.uint8), (0, torch.int64)]
)
def test_any_label_can_be_the_ignored_one(ignore_index, dtype):
    logits, labels = example()
    labels = labels.to(dtype)
    labels[labels == 255] = ignore_index
    for reduction in REDUCTIONS:
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": 0.1}
        ours, plain = (run(f, logits, labels, **options) for f in (upsample_cross_entropy, reference))
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_ignored_label_that_is_no_byte_matches_no_byte():
    # 156 == -100 as a byte, which PyTorch's comparison says too.
    logits, labels = example(1, 200, ignored=0.0)
    labels[0, 0] = 156
    ours = upsample_cross_entropy(logits, labels, ignore_index=-100)
    torch.testing.assert_close(ours, upsample_cross_entropy(logits, labels.long(), ignore_index=-100))


@pytest.mark.parametrize(
    ("value", "dtype"), [(5, torch.uint8), (254, torch.uint8), (-1, torch.int64), (300, torch.int64)]
)
def test_label_out_of_range_is_named(value, dtype):
    logits, labels = example()
    labels = labels.to(dtype)
    labels[1, 2, 3] = value
    counts = torch.zeros(5, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"labels below 5 .* or 255 \(ignored\), got {value}$"):
        upsample_cross_entropy(logits, labels, counts=counts)
    assert not counts.any()
    with pytest.raises(ValueError, match=r"or -1 \(ignored\), got 255"):
        upsample_cross_entropy(logits, example()[1], ignore_index=-1)


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@variants
def test_extreme_logits(scale, dtype, options):
    logits, labels = example(dtype=dtype, scale=scale)
    options = with_weights(options, 5)
    exact, plain = (run(reference, x, labels, **options) for x in (logits.double(), logits))
    ours = run(upsample_cross_entropy, logits, labels, **options)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert a.isfinite().all()
        assert_near(a, b, truth.double())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_no_number_is_not_hidden(value):
    logits, labels = example(1, 19, (8, 8), (40, 40), torch.float32)
    with torch.no_grad():
        logits[0, 3, 2, 5] = value
    losses, plain = (f(logits, labels, reduction="none") for f in (upsample_cross_entropy, reference))
    assert torch.equal(losses.isfinite(), plain.isfinite())
    assert not losses.isfinite().all()
    assert not upsample_cross_entropy(logits, labels).isfinite()


@given(
    classes=st.integers(1, 7),
    low=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    levels=st.sampled_from([2, 1000]),  # few levels make many equal scores
    reduction=st.sampled_from(REDUCTIONS),
    align_corners=st.booleans(),
)
def test_counts_are_the_confusion_matrix_of_the_argmax(classes, low, size, levels, reduction, align_corners):
    logits, labels = example(2, classes, low, size)
    logits = (torch.randint(0, levels, logits.shape).float() / 7).requires_grad_()
    counts = torch.ones(classes, classes, dtype=torch.int64)
    options = {"reduction": reduction, "align_corners": align_corners}
    loss = upsample_cross_entropy(logits, labels, counts=counts, **options)
    assert torch.equal(loss, upsample_cross_entropy(logits, labels, **options))
    loss.sum().backward()  # computes "none" a second time, but does not count it
    predicted = upsample_argmax(logits, size, align_corners=align_corners)
    assert torch.equal(counts - 1, confusion_matrix(predicted, labels, classes))


def test_reference_counts_alike():
    logits, labels = example()
    counts = torch.zeros(2, 5, 5, dtype=torch.int64)
    upsample_cross_entropy(logits, labels, counts=counts[0])
    reference(logits, labels, counts=counts[1])
    assert counts[0].any()
    assert torch.equal(*counts)


@pytest.mark.parametrize("scaling", [1.0, 2.0**16])
@pytest.mark.parametrize("size", [(8, 8), (256, 512)])
def test_float16_gradients_neither_vanish_nor_overflow(scaling, size):
    """With GradScaler the mean over a million pixels is multiplied by 65536, without it is what it is."""
    logits, labels = example(2, 5, (8, 8), size, torch.float16)
    weight = torch.full((5,), 50.0)
    for reduction in ("mean", "sum"):
        loss = upsample_cross_entropy(logits, labels, weight=weight, reduction=reduction)
        exact = reference(logits.double(), labels, weight=weight.double(), reduction=reduction)
        scale = scaling if reduction == "mean" else 1e-4
        (ours,) = torch.autograd.grad(loss * scale, logits)
        (truth,) = torch.autograd.grad(exact * scale, logits)
        tiny = 2.0**-24  # the smallest number of the type
        torch.testing.assert_close(ours.double(), truth.double(), rtol=3e-3, atol=tiny)
