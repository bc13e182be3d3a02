import pytest
import torch
import torch.nn.functional as F

from revseg.kernels.upsample_argmax.gpu import argmax
from revseg.kernels.upsample_argmax.op import example_inputs, reference
from revseg.ops import upsample_argmax
from tests.helpers import small_input
from tests.interpreted.guarded import guarded
from tests.interpreted.programs import reversed_order
from tests.kernels.test_upsample_argmax import assert_is_argmax

SIZES = [(13, 18), (3, 2), (4, 5), (70, 5), (1, 200)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

dtypes = pytest.mark.parametrize("dtype", DTYPES)


@dtypes
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_class_of_the_highest_score(size, align_corners, dtype):
    logits, _ = example_inputs("cpu", dtype)
    labels = upsample_argmax(logits, size, align_corners=align_corners)
    assert labels.shape == (2, *size)
    assert_is_argmax(labels, logits, size, align_corners)


def test_first_of_equal_scores_wins():
    logits = torch.randint(0, 3, (1, 6, 4, 5)).float()
    twice = torch.cat((logits, logits), dim=1)
    labels = upsample_argmax(twice, (31, 19))
    assert torch.equal(labels, reference(logits, (31, 19)))
    assert labels.max() == 5


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter: 0 * inf
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_no_numbers_give_some_class(value):
    logits = small_input(1, 5, 4, 4, dtype=torch.float32, requires_grad=False)
    logits[0, 2] = value
    assert upsample_argmax(logits, (9, 9)).max() < 5
    logits[0, :] = value
    assert upsample_argmax(logits, (9, 9)).max() < 5


def test_255_classes_fit_into_a_byte():
    logits = torch.eye(255)[None, :, None]  # class i at pixel i
    assert torch.equal(upsample_argmax(logits, (1, 255)).flatten(), torch.arange(255, dtype=torch.uint8))


@dtypes
def test_any_strides(dtype):
    logits, size = example_inputs("cpu", dtype)
    expected = upsample_argmax(logits, size)
    assert torch.equal(upsample_argmax(logits.to(memory_format=torch.channels_last), size), expected)
    padded = F.pad(logits, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    assert torch.equal(upsample_argmax(padded, size), expected)


def test_no_batch():
    assert upsample_argmax(torch.zeros(0, 3, 2, 2), (4, 5)).shape == (0, 4, 5)


@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_is_read(end):
    logits, size = example_inputs("cpu", torch.float32)
    assert torch.equal(upsample_argmax(guarded(logits, end=end), size), upsample_argmax(logits, size))


def test_programs_in_any_order():
    logits, size = example_inputs("cpu", torch.float32)
    expected = upsample_argmax(logits, size)
    with reversed_order():
        assert torch.equal(upsample_argmax(logits, size), expected)


def test_the_operation_is_what_torch_expects():
    logits, size = example_inputs("cpu", torch.float32)
    torch.library.opcheck(argmax, (logits, size, False))
