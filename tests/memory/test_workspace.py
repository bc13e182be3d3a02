"""What convolutions copy inside, predicted and measured."""

import pytest
import torch
import torch.nn.functional as F

from revseg.memory import peak_bytes, predicted_peak_bytes

CASES = {  # n, c_in, c_out, k, dilation, groups, h, w
    "ordinary": (2, 64, 64, 3, 1, 1, 24, 48),
    "dilated": (2, 64, 64, 3, 2, 1, 24, 48),
    "far": (2, 64, 64, 3, 12, 1, 48, 96),
    "larger than the map": (2, 320, 128, 3, 12, 1, 16, 16),
    "depthwise": (2, 64, 64, 3, 1, 64, 24, 48),
    "depthwise, dilated": (2, 64, 64, 3, 4, 64, 24, 48),
    "thin groups": (2, 64, 64, 3, 1, 32, 24, 48),
    "single": (2, 64, 64, 1, 1, 1, 24, 48),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_backward_of_a_convolution(name, dtype):
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the rules are of oneDNN on a processor with vectors of 512 bits")
    n, c_in, c_out, k, dilation, groups, h, w = CASES[name]
    x = torch.randn(n, c_in, h, w, dtype=dtype)
    weight = torch.randn(c_out, c_in // groups, k, k, dtype=dtype)
    padding = dilation * (k // 2)
    y = F.conv2d(x, weight, None, 1, padding, dilation, groups)
    dy = torch.randn_like(y)

    def backward():
        sizes = ([1, 1], [padding] * 2, [dilation] * 2)
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, *sizes, False, [0, 0], groups, [True, True, False]
        )

    measured = peak_bytes(backward, before=backward)
    beside = sum(t.nbytes for t in (x, y, weight))  # what stands there anyway
    tolerance = (
        0.04 * (measured + beside) + weight.nbytes
    )  # of small ones a copy more is counted than is made
    assert predicted_peak_bytes(lambda: backward) == pytest.approx(measured, abs=tolerance)
