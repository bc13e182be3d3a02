"""What a runtime gives is what PyTorch gives, or it is refused in words."""

import importlib.util

import pytest
import torch
from torch import nn

from revseg.inference import runtimes
from revseg.inference.augmented import Augmentation
from revseg.inference.runtimes import RUNTIMES, RuntimeFailedError, check_runtime, prepared
from revseg.inference.trained import TrainedNetwork, classes_of
from revseg.inference.windows import Windows
from revseg.layers.images import normalize_images

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in runtimes.ONNX),
    reason="the extra `export` is not installed",
)


def photo(height, width):
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


class Pixels(nn.Module):
    """One number a channel."""

    stride = 1

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return self.factor * images.float()


class Small(nn.Module):
    """Scores at half size, with batch norm that does something."""

    stride = 2

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 5, 3, 1, 1)
        )
        for buffer in (self.layers[1].running_mean, self.layers[1].running_var):
            buffer.uniform_(0.5, 1.5)

    def forward(self, images):
        return self.layers(normalize_images(images))


@pytest.mark.parametrize(
    "runtime",
    ["pytorch", pytest.param("onnx", marks=needs_onnx), pytest.param("compile", marks=pytest.mark.slow)],
)
def test_labels_are_those_of_the_network(runtime):
    """Whole images, by windows, averaged over scales: all of them by the runtime."""
    plain = TrainedNetwork(Small().eval(), classes_of({"num_classes": 5}))
    model = plain.with_runtime(runtime)
    cases = [
        (photo(48, 64), {}),
        (photo(64, 80), {"windows": Windows(48, 64, overlap=0.5)}),
        (photo(48, 64), {"augmentation": Augmentation((1.0, 1.5), flip=True)}),
    ]
    for image, options in cases:
        assert (model.predict(image, **options) == plain.predict(image, **options)).double().mean() > 0.999
    if runtime != "pytorch":
        assert (
            len(model.network.runs) == 2
        )  # the window is as large as the first image; a scaled one is of floats


@needs_onnx
def test_one_file_for_any_size():
    network = Small().eval()
    run = prepared(network, "onnx", photo(48, 64)[None], any_size=True)
    for size in ((33, 130), (57, 41)):
        image = photo(*size)[None]
        with torch.no_grad():
            torch.testing.assert_close(run(image), network(image), rtol=1e-3, atol=1e-4)


def test_code_is_compiled_for_one_size(monkeypatch):
    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiling(f, backend="eager", **options))
    torch.compiler.reset()
    network = Pixels()
    run = prepared(network, "compile", photo(8, 9)[None], any_size=False)
    assert torch.equal(run(photo(8, 9)[None]), network(photo(8, 9)[None]))
    with pytest.raises(
        RuntimeFailedError, match="images of any size: code is made for one size of images at"
    ):
        prepared(network, "compile", photo(8, 9)[None], any_size=True)


def test_other_scores_are_refused(monkeypatch):
    def wrong(network, images, any_size):
        plain = runtimes.pytorch(network, images)
        return lambda x: plain(x) + (x.shape == images.shape) * 2

    monkeypatch.setitem(RUNTIMES, "onnx", wrong)
    said = r"ONNX Runtime gives other scores on images of 8 x 9, off by 0\.00\d+ of the largest"
    with pytest.raises(RuntimeFailedError, match=said):
        prepared(Pixels(), "onnx", photo(8, 9)[None], any_size=False)

    def wrong_at_others(network, images, any_size):
        plain = runtimes.pytorch(network, images)
        return lambda x: plain(x) + (x.shape != images.shape) * 2

    monkeypatch.setitem(RUNTIMES, "onnx", wrong_at_others)
    prepared(Pixels(), "onnx", photo(8, 9)[None], any_size=False)
    with pytest.raises(RuntimeFailedError, match="gives other scores on images of 6 x 5"):
        prepared(Pixels(), "onnx", photo(8, 9)[None], any_size=True)


def test_what_fails_is_said_in_a_sentence(monkeypatch):
    def failing(network, images, any_size):
        raise NotImplementedError("\n  no such operator\nat some line")

    monkeypatch.setitem(RUNTIMES, "compile", failing)
    with pytest.raises(
        RuntimeFailedError,
        match=r"^torch\.compile cannot run this network on images of 8 x 9: no such operator$",
    ):
        prepared(Pixels(), "compile", photo(8, 9)[None], any_size=False)


def test_a_runtime_that_is_not_here_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="ONNX Runtime runs on the CPU alone, the network is on cuda:1"):
        check_runtime("onnx", torch.device("cuda:1"))
    check_runtime("compile", torch.device("cuda:1"))
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ImportError, match=r"ONNX Runtime needs onnxruntime: pip install 'revseg\[export\]'"):
        check_runtime("onnx-int8", torch.device("cpu"))
