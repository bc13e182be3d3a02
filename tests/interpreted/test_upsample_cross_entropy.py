import math

import pytest
import torch
import torch.nn.functional as F

from revseg.kernels.upsample_cross_entropy import gpu
from revseg.kernels.upsample_cross_entropy.inputs import REDUCTIONS
from revseg.kernels.upsample_cross_entropy.op import example_inputs, reference
from revseg.losses import OhemCrossEntropy, ohem_reference
from revseg.memory import peak_bytes, saved_bytes
from revseg.ops import upsample_cross_entropy
from tests.helpers import small_input
from tests.interpreted.guarded import guarded
from tests.interpreted.programs import reversed_order
from tests.kernels.test_upsample_cross_entropy import OPTIONS, assert_near, example, run, with_weights

SIZES = [(13, 18), (3, 2), (4, 5), (70, 5), (1, 90), (9, 36)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
variants = pytest.mark.parametrize("options", OPTIONS, ids=str)


def check(logits, labels, **options):
    """Loss, gradient and counts are those of the reference, as far as that is sure of them itself."""
    classes = logits.shape[1]
    counts = torch.ones(2, classes, classes, dtype=torch.int64)
    ours = run(upsample_cross_entropy, logits, labels, counts=counts[0], **options)
    exact = run(reference, logits.double(), labels, counts=counts[1], **options)
    plain = run(reference, logits, labels, **options)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == logits.dtype
    assert ours[1].stride() == logits.stride()
    assert torch.equal(*counts)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert_near(a, b, truth.double())


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_at_most_twice_the_error_of_pytorch_at_any_size(size, align_corners):
    logits, labels = example(1, 4, size=size, dtype=torch.float32)
    check(logits, labels, align_corners=align_corners)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_most_twice_the_error_of_pytorch_in_any_type(dtype, reduction):
    logits, labels = example(dtype=dtype)
    check(logits, labels, reduction=reduction)


@reductions
@variants
def test_at_most_twice_the_error_of_pytorch_with_all_options(options, reduction):
    logits, labels = example(1, low=(2, 3), size=(7, 10), dtype=torch.float32, scale=3.0)
    check(logits, labels.long(), reduction=reduction, **with_weights(options, 5))


@pytest.mark.parametrize("classes", [1, 2, 19, 45, 46, 150])  # from 46 on their counts have no histogram
def test_any_number_of_classes(classes):
    logits, labels = example(1, classes, (1, 3), (6, 13), torch.float32, scale=2.0)
    check(logits, labels, reduction="sum")


def test_256_classes():
    logits, labels = example(1, 256, (1, 2), (4, 5), torch.float32, ignored=0.0)
    labels = labels.long()
    ours, plain, exact = (
        run(f, x, labels, ignore_index=-100)
        for f, x in (
            (upsample_cross_entropy, logits),
            (reference, logits),
            (reference, logits.double()),
        )
    )
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert_near(a, b, truth)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_parts_that_are_added_apart(rows, monkeypatch):
    logits, labels = example(dtype=torch.float32)
    monkeypatch.setattr(gpu, "PARTS_BYTES", rows * 16 * 5 * 6)
    check(logits, labels, reduction="none")


@reductions
def test_same_bits_in_any_order_of_programs(reduction):
    logits, labels = example(1, 3, (2, 40), (11, 300), torch.float32)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    counts = torch.zeros(2, 3, 3, dtype=torch.int64)
    expected = run(upsample_cross_entropy, logits, labels, counts=counts[0], **options)
    with reversed_order():
        found = run(upsample_cross_entropy, logits, labels, counts=counts[1], **options)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(*counts)


@reductions
@variants
def test_everything_ignored_is_zero_with_gradient_zero(reduction, options):
    logits, labels = example(1, dtype=torch.float32, low=(2, 2), size=(5, 5), ignored=2.0)
    loss, gradient = run(
        upsample_cross_entropy, logits, labels, reduction=reduction, **with_weights(options, 5)
    )
    assert not loss.any()
    assert not gradient.any()


@pytest.mark.parametrize(
    ("ignore_index", "dtype"),
    [(255, torch.uint8), (-100, torch.int64), (3, torch.uint8), (2**40, torch.int64)],
)
def test_any_label_can_be_the_ignored_one(ignore_index, dtype):
    logits, labels = example(1, low=(2, 3), size=(5, 8), dtype=torch.float32)
    labels = labels.to(dtype)
    labels[labels == 255] = ignore_index
    check(logits, labels, ignore_index=ignore_index, label_smoothing=0.1)


def test_ignored_label_that_is_no_byte_matches_no_byte():
    logits, labels = example(1, 200, (1, 1), (2, 2), torch.float32, ignored=0.0)
    labels[0, 0] = 156  # -100 as a byte
    with torch.no_grad():
        ours = upsample_cross_entropy(logits, labels, ignore_index=-100)
        assert torch.equal(ours, upsample_cross_entropy(logits, labels.long(), ignore_index=-100))


@reductions
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(5, torch.uint8), (-1, torch.int64), (2**32 + 1, torch.int64), (-(2**40), torch.int64)],
)
def test_label_out_of_range_is_named(value, dtype, reduction):
    logits, labels = example(1, low=(2, 3), size=(5, 8), dtype=torch.float32)
    labels = labels.to(dtype)
    labels[-1, -1, -1] = value
    counts = torch.zeros(5, 5, dtype=torch.int64)
    weight = guarded(torch.ones(5))  # nothing is read at such an index
    with pytest.raises(ValueError, match=rf"labels below 5 .* or 255 \(ignored\), got {value}$"):
        upsample_cross_entropy(logits, labels, counts=counts, weight=weight, reduction=reduction)
    assert not counts.any()


@pytest.mark.parametrize("scale", [1e4, 1e30])
@variants
def test_extreme_logits(scale, options):
    logits, labels = example(1, low=(2, 3), size=(5, 8), dtype=torch.float32, scale=scale)
    check(logits, labels, **with_weights(options, 5))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter: 0 * inf
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_no_number_is_not_hidden(value):
    logits, labels = example(1, 5, (3, 3), (20, 20), torch.float32)
    for c in (0, 3):
        with torch.no_grad():
            logits[0, c, 2, 1] = value
        losses, plain = (f(logits, labels, reduction="none") for f in (upsample_cross_entropy, reference))
        assert torch.equal(losses.isfinite(), plain.isfinite())
        assert not losses.isfinite().all()


def test_offset_of_all_logits_changes_nothing():
    logits, labels = example(dtype=torch.float32)
    with torch.no_grad():
        logits += 3000
    check(logits, labels, reduction="none", label_smoothing=0.5)


@pytest.mark.parametrize("scaling", [1.0, 2.0**16])
def test_float16_gradients_neither_vanish_nor_overflow(scaling):
    logits, labels = example(1, 5, (2, 2), (64, 64), torch.float16)
    weight = torch.full((5,), 50.0)
    for reduction in ("mean", "sum"):
        loss = upsample_cross_entropy(logits, labels, weight=weight, reduction=reduction)
        exact = reference(logits.double(), labels, weight=weight.double(), reduction=reduction)
        scale = scaling if reduction == "mean" else 1e-4
        (ours,) = torch.autograd.grad(loss * scale, logits)
        (truth,) = torch.autograd.grad(exact * scale, logits)
        torch.testing.assert_close(ours.double(), truth.double(), rtol=3e-3, atol=2.0**-24)


def test_gradient_of_an_ignored_pixel_is_not_looked_at():
    logits, labels = example(1, low=(2, 3), size=(5, 8), dtype=torch.float32)
    losses = upsample_cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    dlosses = torch.ones_like(losses)
    (expected,) = torch.autograd.grad(losses, logits, dlosses, retain_graph=True)
    dlosses[labels == 255] = torch.nan
    assert torch.equal(*torch.autograd.grad(losses, logits, dlosses), expected)


@reductions
def test_any_strides(reduction):
    logits, labels = example(1, 3, (2, 3), (5, 8), torch.float32)
    logits, columns = logits.detach(), labels.transpose(1, 2).contiguous().transpose(1, 2)
    weight = torch.rand(6)[::2]
    expected = run(upsample_cross_entropy, logits, labels, reduction=reduction, weight=weight.contiguous())
    last = logits.to(memory_format=torch.channels_last)
    padded = F.pad(logits, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    for x, y in ((last, labels), (padded, columns)):
        found = run(upsample_cross_entropy, x, y, reduction=reduction, weight=weight)
        assert all(map(torch.equal, found, expected))
    x = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(
        upsample_cross_entropy(x, labels, reduction=reduction).sum(), x
    )  # strides of 0
    losses = upsample_cross_entropy(x, labels, reduction=reduction)
    assert torch.equal(found, *torch.autograd.grad(losses, x, torch.ones_like(losses)))


@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_is_read(end):
    logits, labels = example_inputs("cpu", torch.float32)
    options = {"label_smoothing": 0.1, "weight": torch.rand(5), "reduction": "none"}
    expected = run(upsample_cross_entropy, logits, labels, **options)
    x, y, weight = (guarded(each.detach(), end=end) for each in (logits, labels, options["weight"]))
    x.requires_grad_()
    losses = upsample_cross_entropy(x, y, **(options | {"weight": weight}))
    dlosses = guarded(small_input(*losses.shape, seed=5, dtype=torch.float32, requires_grad=False), end=end)
    assert torch.equal(losses, expected[0])
    assert torch.equal(*torch.autograd.grad(losses, x, dlosses), expected[1])


def test_a_gradient_that_nobody_wants_is_not_computed():
    logits, labels = example(dtype=torch.float32)
    with torch.no_grad():
        loss = upsample_cross_entropy(logits, labels)
        assert saved_bytes(lambda: upsample_cross_entropy(logits, labels)) == 0
    assert torch.equal(loss, upsample_cross_entropy(logits, labels).detach())
    assert not loss.requires_grad


def test_no_map_at_full_size():
    logits, labels = example(1, 5, (2, 8), (32, 128), torch.float32)
    scores = 5 * 4 * labels.numel()

    def step(reduction):
        upsample_cross_entropy(logits, labels, reduction=reduction).sum().backward()
        logits.grad = None

    step("mean")  # once for what is kept for each size
    assert peak_bytes(lambda: step("mean")) < scores / 10
    assert peak_bytes(lambda: step("none")) < scores / 10 + 4 * labels.numel()


def test_kernels_can_be_turned_off(monkeypatch):
    logits, labels = example(dtype=torch.float32)
    expected = upsample_cross_entropy(logits, labels)

    def refuse(*args):
        raise AssertionError("a kernel")

    monkeypatch.setattr(gpu, "pixel_pass", refuse)
    with pytest.raises(AssertionError, match="a kernel"):
        upsample_cross_entropy(logits, labels)
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    torch.testing.assert_close(upsample_cross_entropy(logits, labels), expected)


@pytest.mark.parametrize(
    "options", [{}, {"weight": torch.linspace(0.2, 1, 5)}, {"reduction": "sum"}], ids=str
)
def test_hard_examples(options):
    logits, labels = example(dtype=torch.float32)
    exact = ohem_reference(logits.double(), labels, 0.2, 20, **options)
    plain = ohem_reference(logits, labels, 0.2, 20, **options)
    ours = OhemCrossEntropy(0.2, 20, **options)(logits, labels)
    assert_near(ours.detach(), plain.detach(), exact.detach())
    gradients = (torch.autograd.grad(loss, logits)[0].double() for loss in (ours, plain, exact))
    assert_near(next(gradients).float(), *gradients)


@pytest.mark.parametrize("dloss", [None, 0.5])
def test_the_operation_is_what_torch_expects(dloss):
    logits, labels = (x[:1] for x in example_inputs("cpu", torch.float32))
    counts = torch.zeros(5, 5, dtype=torch.int64)
    inputs = (torch.rand(5), torch.ones(labels.shape), counts, 255, 0.1, False, dloss, dloss is None)
    torch.library.opcheck(gpu.pixel_pass, (logits.detach(), labels, *inputs))


def test_pieces_cover_every_output_once():
    from revseg.kernels.gpu.bilinear import grid

    for size in (*SIZES, (257, 300)):
        pieces = grid(torch.empty(1, 1, 4, 5), size, False)
        for axis, outputs in zip((pieces.rows, pieces.columns), size, strict=True):
            bounds = axis.bounds
            assert bounds[0, 0] == 0
            assert bounds[-1, 1] == outputs
            assert torch.equal(bounds[1:, 0], bounds[:-1, 1])
            assert ((bounds[:, 1] - bounds[:, 0]) <= axis.side).all()
            assert axis.side == 2 ** int(math.log2(axis.side))
