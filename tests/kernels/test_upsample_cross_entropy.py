import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from revseg.kernels.cpu import bilinear
from revseg.kernels.upsample_cross_entropy.inputs import REDUCTIONS
from revseg.kernels.upsample_cross_entropy.op import reference
from revseg.memory import peak_bytes, saved_bytes
from revseg.metrics import confusion_matrix
from revseg.ops import upsample_argmax, upsample_cross_entropy
from tests.helpers import small_input

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPTIONS = [{}, {"weight": True}, {"label_smoothing": 0.1}, {"weight": True, "label_smoothing": 0.3}]

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
variants = pytest.mark.parametrize("options", OPTIONS, ids=str)


def example(n=2, classes=5, low=(4, 5), size=(13, 18), dtype=torch.float64, ignored=0.2, scale=1.0):
    logits = (scale * small_input(n, classes, *low, requires_grad=False)).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (n, *size), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < ignored] = 255
    return logits, labels


def with_weights(options, classes, dtype=torch.float64):
    if not options.get("weight"):
        return options
    return {**options, "weight": small_input(classes, requires_grad=False).abs().to(dtype) + 0.1}


def run(loss, logits, labels, **options):
    """The loss and the gradient of the logits, for some gradient of the loss."""
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    result = loss(logits, labels, **options)
    dresult = small_input(*result.shape, seed=5, requires_grad=False).to(result) if result.ndim else None
    return result.detach(), *torch.autograd.grad(result, logits, dresult)


def eager(logits, labels, **options):
    """What users write, in the type of the logits."""
    align_corners = options.pop("align_corners", False)
    if options.get("weight") is not None:
        options["weight"] = options["weight"].to(logits.dtype)
    scores = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(scores, labels.long(), ignore_index=255, **options)


def assert_near(ours, plain, exact):
    """At most twice the error of plain PyTorch, in length, and a last bit: one number can be right by luck."""
    ours, plain, last_bit = ours.double(), plain.double(), torch.finfo(ours.dtype).eps
    allowed = 2 * (plain - exact).norm() + last_bit * exact.norm()
    assert (ours - exact).norm() <= allowed, f"{(ours - exact).norm():.3g} > {allowed:.3g}"


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


def test_backward_twice_and_scaled():
    logits, labels = example()
    for reduction in REDUCTIONS:
        loss = upsample_cross_entropy(logits, labels, reduction=reduction).sum()
        once, twice = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, twice)
        (third,) = torch.autograd.grad(-3 * loss, logits)
        torch.testing.assert_close(third, -3 * once)


@reductions
def test_second_derivatives_are_refused(reduction):
    logits, labels = example()
    loss = upsample_cross_entropy(logits, labels, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match=r"no second derivatives.*create_graph=True.*reference"):
        torch.autograd.grad(loss, logits, create_graph=True)
    (gradient,) = torch.autograd.grad(reference(logits, labels), logits, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), logits)[0].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
def test_forward_derivatives_are_refused():
    logits, labels = example()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward (mode )?AD|jvp"),
    ):
        upsample_cross_entropy(torch.autograd.forward_ad.make_dual(logits, logits), labels)


def test_function_transforms_follow_the_reference():
    logits, labels = example()
    x = logits.detach()
    (expected,) = torch.autograd.grad(upsample_cross_entropy(logits, labels), logits)
    found = torch.func.grad(lambda x: upsample_cross_entropy(x, labels))(x)
    torch.testing.assert_close(found, expected)
    each = torch.func.vmap(lambda x, y: upsample_cross_entropy(x[None], y[None]))(x, labels)
    torch.testing.assert_close(
        each, torch.stack([upsample_cross_entropy(x[i : i + 1], labels[i : i + 1]) for i in range(2)])
    )


def test_gradient_of_an_ignored_pixel_is_not_looked_at():
    logits, labels = example()
    losses = upsample_cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    dlosses = torch.ones_like(losses)
    (expected,) = torch.autograd.grad(losses, logits, dlosses, retain_graph=True)
    dlosses[labels == 255] = torch.nan
    assert torch.equal(*torch.autograd.grad(losses, logits, dlosses), expected)


def test_what_backward_needs_cannot_change_unseen():
    logits, labels = example()
    x = logits * 1
    loss = upsample_cross_entropy(x, labels, reduction="none").sum()
    x.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    x = logits * 1
    loss = upsample_cross_entropy(x, labels)
    (expected,) = torch.autograd.grad(upsample_cross_entropy(logits, labels), logits)
    x.detach().add_(1)  # the mean has its gradient already
    torch.testing.assert_close(*torch.autograd.grad(loss, logits), expected)


def test_arguments_are_left_alone():
    logits, labels = example()
    before = logits.detach().clone(), labels.clone()
    weight = torch.rand(5)
    kept = weight.clone()
    upsample_cross_entropy(
        logits, labels, weight=weight, label_smoothing=0.1, reduction="none"
    ).sum().backward()
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])
    assert torch.equal(weight, kept)


@reductions
def test_any_strides(reduction):
    logits, labels = example(size=(31, 40))
    expected = run(upsample_cross_entropy, logits, labels, reduction=reduction)
    last = logits.detach().to(memory_format=torch.channels_last)
    padded = F.pad(logits.detach(), (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    columns = labels.transpose(1, 2).contiguous().transpose(1, 2)
    for x, y in ((last, labels), (padded, columns), (logits, columns)):
        found = run(upsample_cross_entropy, x, y, reduction=reduction)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert run(upsample_cross_entropy, last, labels)[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype):
    logits, labels = example(dtype=dtype)
    for reduction in REDUCTIONS:
        expected = run(upsample_cross_entropy, logits, labels, reduction=reduction, label_smoothing=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(upsample_cross_entropy, logits, labels, reduction=reduction, label_smoothing=0.1)
        assert all(map(torch.equal, found, expected))


def test_no_map_at_full_size():
    logits, labels = example(2, 19, (64, 128), (512, 1024), torch.float32)
    band, gradient, pixels = 4 * 2**20, logits.nbytes, labels.numel()

    def step(reduction):
        upsample_cross_entropy(logits, labels, reduction=reduction).sum().backward()
        logits.grad = None

    scores = 19 * 4 * pixels
    assert peak_bytes(lambda: upsample_cross_entropy(logits, labels)) < gradient + band < scores / 10
    assert peak_bytes(lambda: step("mean")) < 2 * gradient + band
    assert peak_bytes(lambda: step("none")) < 4 * pixels + gradient + band
    with torch.no_grad():
        counts = torch.zeros(19, 19, dtype=torch.int64)
        assert peak_bytes(lambda: upsample_cross_entropy(logits, labels, counts=counts)) < band
    assert peak_bytes(lambda: upsample_cross_entropy(logits.detach(), labels)) < band


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_the_gradient_of_the_logits_is_saved(dtype):
    logits, labels = example(2, 19, (16, 32), (128, 256), dtype)
    assert saved_bytes(lambda: upsample_cross_entropy(logits, labels)) == logits.nbytes + 4  # and a factor
    kept = saved_bytes(lambda: upsample_cross_entropy(logits, labels, reduction="none"))
    assert kept == logits.nbytes + labels.nbytes
    with torch.no_grad():
        assert saved_bytes(lambda: upsample_cross_entropy(logits, labels)) == 0


@reductions
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_shapes_can_be_followed_without_numbers(where, reduction):
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        logits = torch.empty(4, 19, 128, 256, requires_grad=True)
        labels = torch.empty(4, 1024, 2048, dtype=torch.uint8)
        counts = torch.empty(19, 19, dtype=torch.int64)
        loss = upsample_cross_entropy(logits, labels, reduction=reduction, counts=counts)
        loss.sum().backward()
    assert loss.shape == (labels.shape if reduction == "none" else ())
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_around_it(backend):
    """The compiler breaks its graph here, it does not store maps at full size."""
    torch.compiler.reset()
    images, (_, labels) = small_input(2, 3, 4, 5, requires_grad=False), example()
    nets = [nn.Conv2d(3, 5, 1).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())

    def loss_of(net):
        return upsample_cross_entropy(net(images), labels, label_smoothing=0.1) * 2

    compiled = torch.compile(lambda: loss_of(nets[0]), backend=backend)
    compiled()
    assert saved_bytes(compiled) <= saved_bytes(lambda: loss_of(nets[1])) + images.nbytes
    for loss in (compiled(), loss_of(nets[1])):
        loss.backward()
    torch.testing.assert_close(nets[0].weight.grad, nets[1].weight.grad)
    torch.compiler.reset()


def test_wrong_kinds_are_refused():
    logits, labels = example()
    refused = [
        (logits.long(), labels, {}, r"floating logits of at least 16 bits, got torch\.int64"),
        (logits, labels.float(), {}, r"labels of dtype uint8 or int64, got torch\.float32"),
        (logits, labels.int(), {}, r"labels of dtype uint8 or int64, got torch\.int32"),
        (logits, labels, {"weight": torch.ones(5).long()}, r"floating class weights, got torch\.int64"),
        (logits, labels, {"counts": torch.zeros(5, 5)}, r"counts of dtype int64, got torch\.float32"),
    ]
    for x, y, options, message in refused:
        with pytest.raises(TypeError, match=message):
            upsample_cross_entropy(x, y, **options)


def test_what_does_not_fit_is_refused():
    logits, labels = example()
    counts = torch.zeros(5, 10, dtype=torch.int64)
    many = torch.zeros(2, 300, 2, 2)
    refused = [
        (logits[0], labels, {}, r"logits \[N, C, h, w\].*got \[5, 4, 5\]"),
        (logits[:, :, :0], labels, {}, r"C, h, w at least 1, got \[2, 5, 0, 5\]"),
        (logits, labels[:1], {}, r"labels \[N, H, W\] with N = 2 .*got \[1, 13, 18\]"),
        (logits, labels[:, :0], {}, r"H, W at least 1, got \[2, 0, 18\]"),
        (logits, labels[0], {}, r"got \[13, 18\]"),
        (logits, labels, {"weight": torch.ones(4)}, r"class weights \[C\] with C = 5, got \[4\]"),
        (logits, labels, {"counts": counts}, r"counts \[C, C\] with C = 5, got \[5, 10\]"),
        (logits, labels, {"counts": counts[:, ::2]}, r"contiguous counts"),
        (
            many,
            labels,
            {"counts": torch.zeros(300, 300, dtype=torch.int64)},
            r"expected at most 255 classes to count",
        ),
        (logits, labels.to("meta"), {}, r"labels on cpu, where the logits are, got meta"),
        (logits, labels, {"weight": torch.ones(5, device="meta")}, r"class weights on cpu"),
        (logits, labels, {"label_smoothing": 1.5}, r"label_smoothing in \[0, 1\], got 1\.5"),
        (logits, labels, {"reduction": "avg"}, r"unknown reduction 'avg'; choose one of mean, sum, none"),
    ]
    for x, y, options, message in refused:
        with pytest.raises(ValueError, match=message):
            upsample_cross_entropy(x, y, **options)
