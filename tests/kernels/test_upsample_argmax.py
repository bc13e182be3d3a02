import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from revseg.kernels.upsample_argmax.op import reference
from revseg.memory import peak_bytes
from revseg.ops import upsample_argmax
from tests.helpers import small_input
from tests.kernels.test_bilinear import SIZES, aligned, fuses


def assert_is_argmax(labels, logits, size, align_corners):
    """Each class has the highest score, as far as `F.interpolate` itself is sure of it.

    Its own results differ in their last bits between memory formats; scores nearer than that are equal.
    """
    assert labels.dtype == torch.uint8
    scores = F.interpolate(logits.double(), size, mode="bilinear", align_corners=align_corners)
    # A position has an error of half a bit of w; it moves a score by that part of the largest difference.
    near = (4 + max(logits.shape[-2:])) * torch.finfo(torch.float32).eps * logits.double().abs().max()
    chosen = scores.gather(1, labels.long()[:, None])
    assert (chosen >= scores.amax(dim=1, keepdim=True) - near).all()


@fuses
@aligned
@pytest.mark.parametrize(("low", "size"), SIZES, ids=str)
def test_equals_argmax_of_interpolate_pixel_for_pixel(low, size, align_corners):
    for levels in (3, 10**6):  # few levels make many equal scores
        logits = torch.randint(0, levels, (2, 19, *low)).float() / 7
        labels = upsample_argmax(logits, size, align_corners=align_corners)
        assert torch.equal(labels, reference(logits, size, align_corners=align_corners))


@given(
    classes=st.integers(1, 7),
    low=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    align_corners=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_class_of_the_highest_score_at_any_size(classes, low, size, align_corners, dtype):
    logits = small_input(2, classes, *low, dtype=dtype, requires_grad=False)
    labels = upsample_argmax(logits, size, align_corners=align_corners)
    assert labels.shape == (2, *size)
    assert_is_argmax(labels, logits, size, align_corners)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_of_equal_scores_wins(dtype):
    logits = small_input(2, 4, 6, 5, dtype=dtype, requires_grad=False)
    twice = torch.cat((logits, logits), dim=1)
    labels = upsample_argmax(twice, (33, 18))
    assert torch.equal(labels, upsample_argmax(logits, (33, 18)))
    assert labels.max() == 3
    assert not upsample_argmax(torch.zeros_like(logits), (33, 18)).any()


def test_255_classes_fit_into_a_byte():
    logits = torch.eye(255)[None, :, None]  # class i at pixel i
    assert torch.equal(upsample_argmax(logits, (1, 255)).flatten(), torch.arange(255, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at most 255 classes, got 256"):
        upsample_argmax(torch.zeros(1, 256, 2, 2), (4, 4))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_no_numbers_give_some_class(value):
    logits = small_input(1, 5, 4, 4, requires_grad=False)
    logits[0, 2] = value
    assert upsample_argmax(logits, (9, 9)).max() < 5
    logits[0, :] = value
    assert upsample_argmax(logits, (9, 9)).max() < 5


def test_any_strides():
    logits = small_input(2, 6, 9, 7, requires_grad=False)
    expected = upsample_argmax(logits, (31, 40))
    assert torch.equal(upsample_argmax(logits.to(memory_format=torch.channels_last), (31, 40)), expected)
    padded = F.pad(logits, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    assert torch.equal(upsample_argmax(padded, (31, 40)), expected)


def test_no_batch():
    assert upsample_argmax(torch.zeros(0, 3, 2, 2), (4, 5)).shape == (0, 4, 5)


def test_memory_is_the_result_and_a_band():
    logits = small_input(2, 19, 64, 128, dtype=torch.float32, requires_grad=False)
    result = 2 * 512 * 1024
    peak = peak_bytes(lambda: upsample_argmax(logits, (512, 1024)))
    assert peak < result + 4 * 2**20 < 19 * 4 * result / 10
    assert peak_bytes(lambda: upsample_argmax(logits[:1], (512, 1024))) < result / 2 + 4 * 2**20


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_shapes_can_be_followed_without_numbers(where):
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        labels = upsample_argmax(torch.empty(2, 19, 8, 16), (64, 128))
    assert labels.shape == (2, 64, 128)
    assert labels.dtype == torch.uint8


def test_compiled_around_it():
    torch.compiler.reset()
    logits = small_input(1, 5, 4, 4, requires_grad=False)
    compiled = torch.compile(lambda x: upsample_argmax(2 * x, (9, 9)) + 1, backend="eager")
    assert torch.equal(compiled(logits), upsample_argmax(2 * logits, (9, 9)) + 1)


def test_what_does_not_fit_is_refused():
    logits = torch.zeros(1, 3, 2, 2)
    with pytest.raises(TypeError, match=r"floating logits of at least 16 bits, got torch\.int64"):
        upsample_argmax(logits.long(), (4, 4))
    with pytest.raises(ValueError, match=r"logits \[N, C, h, w\].*got \[3, 2, 2\]"):
        upsample_argmax(logits[0], (4, 4))
    with pytest.raises(ValueError, match=r"C, h, w at least 1, got \[1, 0, 2, 2\]"):
        upsample_argmax(logits[:, :0], (4, 4))
    for size in ((0, 4), (4,), (4, 4, 4)):
        with pytest.raises(ValueError, match=r"a size \(H, W\) of at least 1 x 1, got"):
            upsample_argmax(logits, size)
