"""The loss among other things: autograd, transforms, autocast, compilation, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from revseg.kernels.upsample_cross_entropy.inputs import REDUCTIONS
from revseg.kernels.upsample_cross_entropy.op import reference
from revseg.memory import peak_bytes, saved_bytes
from revseg.ops import upsample_cross_entropy
from tests.helpers import small_input
from tests.kernels.upsample_cross_entropy_cases import example, reductions, run


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
