"""What can run a trained network: PyTorch, torch.compile, ONNX Runtime.

Each takes images in bytes, or normalised ones, to the scores of the main head. Labels are made of scores outside, by
`upsample_argmax`: on a CPU that is as fast as ONNX Runtime's own, and windows and averages want scores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from revseg.inference.export import LARGEST, Deployed, Run, difference, run_onnx, write_onnx
from revseg.inference.int8 import write_int8

Make = Callable[[nn.Module, Tensor, bool], Run]
ONNX = ("onnx", "onnxscript", "onnxruntime")  # what it takes to write a file and to run it


class RuntimeFailedError(RuntimeError):
    """A runtime that cannot run this network, or gives other scores."""


def pytorch(network: nn.Module, images: Tensor, any_size: bool = False) -> Run:
    """PyTorch, module by module; for any size in any case."""
    return Deployed(network, labels=False).eval()


def compiled(network: nn.Module, images: Tensor, any_size: bool = False) -> Run:
    """By torch.compile, for images of this size; the code is made by the first call."""
    if any_size:
        raise RuntimeFailedError("code is made for one size of images at a time")
    run: Run = torch.compile(Deployed(network, labels=False).eval(), dynamic=False)
    return run


def onnx(network: nn.Module, images: Tensor, any_size: bool = False, int8: bool = False) -> Run:
    """ONNX Runtime on a CPU, from a file for images of this size or of any; integers have the ranges of these images."""
    check_runtime("onnx", images.device)
    with tempfile.TemporaryDirectory() as folder:
        path, rounded = Path(folder) / "network.onnx", Path(folder) / "int8.onnx"
        write_onnx(Deployed(network, labels=False).eval(), images, path, dynamic=any_size)
        if int8:
            write_int8(path, rounded, images)
        return run_onnx(rounded if int8 else path)


RUNTIMES: dict[str, Make] = {
    "pytorch": pytorch,
    "compile": compiled,
    "onnx": onnx,
    "onnx-int8": partial(onnx, int8=True),
}
NAMES = {"pytorch": "PyTorch", "compile": "torch.compile", "onnx": "ONNX Runtime"}


def check_runtime(name: str, device: torch.device) -> None:
    """Refuses a runtime that is not here.

    Args:
        name: A name in `RUNTIMES`.
        device: Where the network is.

    Raises:
        ImportError: If packages are not installed.
        ValueError: If it does not run on this device.
    """
    if not name.startswith("onnx"):
        return
    if device.type != "cpu":
        raise ValueError(
            f"ONNX Runtime runs on the CPU alone, the network is on {device}: use --device cpu or torch.compile"
        )
    if missing := [each for each in ONNX if find_spec(each) is None]:
        raise ImportError(f"ONNX Runtime needs {', '.join(missing)}: pip install 'revseg[export]'")


def prepared(network: nn.Module, name: str, images: Tensor, any_size: bool) -> Run:
    """The network by a runtime, after a comparison with PyTorch on these images.

    Args:
        network: In evaluation mode, batch norm folded.
        name: A name in `RUNTIMES`.
        images: [N, 3, H, W], as they are to be predicted.
        any_size: For images of any size, compared on a part of these too; by default those of this size alone.

    Returns:
        A function from images to scores, which raises `RuntimeFailedError` too if it fails.

    Raises:
        RuntimeFailedError: If it fails, or gives other scores.
    """
    plain = Deployed(network, labels=False).eval()
    tried = [images]
    if any_size:
        tried.append(images[:, :, : -(-3 * images.shape[2] // 4), : -(-images.shape[3] // 2)].contiguous())
    try:
        made = RUNTIMES[name](network, images, any_size)
    except Exception as error:  # runtimes raise nearly anything
        raise _failed(name, error, "any size" if any_size else size_of(images)) from error

    def run(images: Tensor) -> Tensor:
        try:
            return made(images)
        except Exception as error:
            raise _failed(name, error, size_of(images)) from error

    for each in tried:
        off = difference(run(each), plain(each))
        if not off <= LARGEST:
            raise RuntimeFailedError(
                f"{NAMES[name]} gives other scores on images of {size_of(each)}, off by {off:.2g} of the largest"
            )
    return run


def size_of(images: Tensor) -> str:
    """For sentences."""
    return f"{images.shape[2]} x {images.shape[3]}"


def _failed(name: str, error: Exception, size: str) -> RuntimeFailedError:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return RuntimeFailedError(f"{NAMES[name]} cannot run this network on images of {size}: {first[:200]}")
