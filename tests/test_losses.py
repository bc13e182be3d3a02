import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from revseg.losses import OhemCrossEntropy, UpsampleCrossEntropy, ohem_reference, predict_labels
from revseg.memory import peak_bytes, saved_bytes
from revseg.ops import upsample_argmax, upsample_cross_entropy
from tests.helpers import small_input


def example(classes=5, size=(13, 18), ignored=0.2, low=(4, 5)):
    logits = small_input(2, classes, *low)
    labels = torch.randint(0, classes, (2, *size), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < ignored] = 255
    return logits, labels


def assert_same_loss(ours, plain, logits):
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, plain))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_every_option_reaches_the_loss(reduction, align_corners):
    logits, labels = example()
    labels[labels == 255] = 77
    weight = torch.rand(5, dtype=torch.float64) + 0.1
    module = UpsampleCrossEntropy(77, weight, 0.1, reduction, align_corners)
    scores = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=align_corners)
    plain = F.cross_entropy(
        scores, labels.long(), weight, ignore_index=77, reduction=reduction, label_smoothing=0.1
    )
    assert_same_loss(module(logits, labels), plain, logits)


@pytest.mark.parametrize("weight", [None, torch.ones(5)])
@pytest.mark.parametrize("loss", [UpsampleCrossEntropy, OhemCrossEntropy])
def test_everything_ignored_is_zero_with_gradient_zero(loss, weight):
    logits, labels = example(ignored=2.0)
    value = loss(weight=weight)((logits, logits), labels)
    assert value == 0
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_auxiliary_heads_count_with_their_weight(reduction):
    logits, labels = example()
    head = small_input(2, 5, 2, 3, seed=1)
    module = UpsampleCrossEntropy(reduction=reduction, aux_weight=0.3)
    one, two = module(logits, labels), module(head, labels)
    torch.testing.assert_close(module((logits, head, head), labels), one + 0.6 * two)
    assert torch.equal(module([logits], labels), one)


@pytest.mark.parametrize("loss", [UpsampleCrossEntropy(), OhemCrossEntropy(min_kept=3)])
def test_counts_are_of_all_pixels_of_the_main_head(loss):
    logits, labels = example()
    found, expected = torch.zeros(2, 5, 5, dtype=torch.int64)
    loss((logits, -logits), labels, found)
    upsample_cross_entropy(logits, labels, counts=expected)
    assert torch.equal(found, expected)
    assert found.sum() == (labels != 255).sum()


def test_weights_move_with_the_module_and_are_not_in_its_state():
    module = UpsampleCrossEntropy(weight=torch.rand(5))
    assert module.double().weight.dtype == torch.float64
    assert not module.state_dict()


def test_wrong_options_and_heads_are_refused():
    logits, labels = example()
    for weight in (torch.tensor([1.0, -1.0]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"expected class weights \[C\], none below 0"):
            UpsampleCrossEntropy(weight=weight)
    with pytest.raises(
        ValueError, match=r"heads with the same classes, got \[\[2, 5, 4, 5\], \[2, 4, 4, 5\]\]"
    ):
        UpsampleCrossEntropy()((logits, logits[:, :4]), labels)
    with pytest.raises(ValueError, match=r"heads with the same classes, got \[\]"):
        UpsampleCrossEntropy()((), labels)
    with pytest.raises(ValueError, match=r"label_smoothing in \[0, 1\], got 2"):
        UpsampleCrossEntropy(label_smoothing=2)(logits, labels)
    labels[0, 0, 0] = 9
    with pytest.raises(ValueError, match=r"labels below 5 .* got 9"):
        UpsampleCrossEntropy()(logits, labels)
    for threshold in (0, 1.5):
        with pytest.raises(ValueError, match=rf"threshold in \(0, 1\], got {threshold}"):
            OhemCrossEntropy(threshold)
    with pytest.raises(ValueError, match="min_kept of at least 0, got -1"):
        OhemCrossEntropy(min_kept=-1)


@given(
    threshold=st.sampled_from([1e-6, 0.2, 0.7, 1.0]),
    min_kept=st.sampled_from([None, 0, 1, 10, 200, 1000]),
    ignored=st.sampled_from([0.0, 0.3, 0.98]),
    ignore_index=st.sampled_from([255, 254, -100]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    align_corners=st.booleans(),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1]),
)
def test_ohem_is_its_definition(threshold, min_kept, ignored, ignore_index, weighted, **options):
    logits, labels = example(ignored=ignored)
    if ignore_index < 0:
        labels = labels.long()
    labels[labels == 255] = ignore_index
    options["ignore_index"] = ignore_index
    options["weight"] = torch.rand(5, dtype=torch.float64) if weighted else None
    ours = OhemCrossEntropy(threshold, min_kept, **options)(logits, labels)
    assert_same_loss(ours, ohem_reference(logits, labels, threshold, min_kept, **options), logits)


def kept(logits, labels, *args, **options):
    """Which pixels have a gradient."""
    return OhemCrossEntropy(*args, reduction="none", **options)(logits, labels) > 0


def test_ohem_keeps_what_is_below_the_threshold_or_among_the_hardest():
    logits, labels = example(size=(4, 5))  # at factor 1 the probabilities are those of the logits
    true = logits.softmax(1).gather(1, labels.long().clamp(max=4)[:, None])[:, 0]
    true[labels == 255] = 1
    assert torch.equal(kept(logits, labels, 0.3, 0), true < 0.3)
    for least in (1, 5, 17):
        assert kept(logits, labels, 1e-9, least).sum() == least
        assert torch.equal(kept(logits, labels, 1e-9, least), true <= true.flatten().sort().values[least - 1])
    assert torch.equal(kept(logits, labels, 1e-9, 10**6), labels != 255)
    assert kept(logits, labels, 1e-9).sum() == labels.numel() // 16


def test_ohem_keeps_all_of_equally_hard_pixels():
    logits = torch.zeros(1, 3, 2, 2, requires_grad=True)
    labels = torch.ones(1, 8, 8, dtype=torch.uint8)
    assert kept(logits, labels, 0.1, 5).all()


def test_ohem_reads_bytes_with_an_ignored_label_that_is_no_byte():
    logits, labels = example(ignored=0)
    loss = OhemCrossEntropy(0.3, 4, ignore_index=-1)
    torch.testing.assert_close(loss(logits, labels), loss(logits, labels.long()))
    torch.testing.assert_close(loss(logits, labels), OhemCrossEntropy(0.3, 4)(logits, labels))


def test_every_head_has_hard_pixels_of_its_own():
    logits, labels = example()
    loss = OhemCrossEntropy(0.2, 10, aux_weight=1.0)
    torch.testing.assert_close(loss((logits, -logits), labels), loss(logits, labels) + loss(-logits, labels))


def test_ohem_holds_no_map_of_scores():
    logits, labels = example(19, (512, 1024), low=(64, 128))
    logits = logits.detach().float().requires_grad_()
    loss, pixels = OhemCrossEntropy(), labels.numel()
    assert peak_bytes(lambda: loss(logits, labels)) < 8 * pixels + 4 * 2**20 < 19 * 4 * pixels / 5
    assert saved_bytes(lambda: loss(logits, labels)) == logits.nbytes + 4


def test_half_precision_logits_are_summed_in_float32():
    logits, labels = example()
    for module in (UpsampleCrossEntropy(), OhemCrossEntropy()):
        loss = module(logits.bfloat16(), labels)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, module(logits.bfloat16().float(), labels))


def test_predictions_read_the_main_head():
    logits, _ = example()
    expected = upsample_argmax(logits, (9, 11))
    assert torch.equal(predict_labels(logits, (9, 11)), expected)
    assert torch.equal(predict_labels((logits, -logits), (9, 11)), expected)
    with pytest.raises(ValueError, match="at most 255 classes, got 300"):
        predict_labels(torch.zeros(1, 300, 1, 1), (1, 1))


@pytest.mark.parametrize("align_corners", [False, True])
def test_a_single_class_is_the_second_of_two(align_corners):
    """Binary cross-entropy of its score, and its label where that is above 0, both upsampled alike."""
    logits = torch.randn(2, 1, 4, 5, requires_grad=True)
    labels = torch.randint(0, 2, (2, 9, 11))
    labels[:, :2] = 255
    full = F.interpolate(logits, (9, 11), mode="bilinear", align_corners=align_corners)[:, 0]
    counted = labels != 255
    expected = F.binary_cross_entropy_with_logits(full[counted], labels[counted].float())
    loss = UpsampleCrossEntropy(align_corners=align_corners)(logits, labels)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, expected))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(predict_labels(logits, (9, 11), align_corners), (full > 0).byte())
