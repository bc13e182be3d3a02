"""A network for other runtimes: bytes in, labels or scores out, and a check of what was written.

What an exporter gives is not believed: the file is run at the size it was traced at and, if it is to take any size,
at another size and another number of images, and compared with the network.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 1e-3  # difference of scores, relative to the largest
AGREEING = (
    0.999  # share of the pixels whose labels are equal: scores of two classes may differ by rounding alone
)
Run = Callable[[Tensor], Tensor]


class ExportError(RuntimeError):
    """A network that cannot be exported as it was asked for."""


class Deployed(nn.Module):
    """Images in bytes [N, 3, H, W] to labels [N, H, W], uint8; or to scores [N, C, h, w], float32.

    Args:
        network: In evaluation mode.
        labels: Whether to give labels.
    """

    def __init__(self, network: nn.Module, labels: bool) -> None:
        super().__init__()
        self.network, self.labels = network, labels

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        logits = logits if isinstance(logits, Tensor) else logits[0]
        if not self.labels:
            return logits
        size = images.shape[2:]
        return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1).to(torch.uint8)


def write_onnx(model: nn.Module, images: Tensor, path: Path, dynamic: bool) -> None:
    """An ONNX file, in which the exporter's optimizer has folded constants; for any size, and any number if these are several."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    shapes = {"images": _dimensions(len(images))} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own code
        torch.onnx.export(
            model,
            (images,),
            path,
            dynamo=True,
            verbose=False,
            dynamic_shapes=shapes,
            input_names=["images"],
            output_names=["labels" if getattr(model, "labels", False) else "scores"],
            external_data=False,
        )


def write_torch_export(model: nn.Module, images: Tensor, path: Path, dynamic: bool) -> None:
    """What `torch.export.load` reads."""
    shapes = {"images": _dimensions(len(images))} if dynamic else None
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    torch.export.save(program, path)


def write_torchscript(model: nn.Module, images: Tensor, path: Path, dynamic: bool) -> None:
    """What `torch.jit.load` reads."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of sizes that tracing takes for constants: the check says which matter
        torch.jit.trace(model, images, check_trace=False).save(str(path))  # type: ignore[no-untyped-call]


def run_onnx(path: Path) -> Run:
    """The file by ONNX Runtime on a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # torch's threads run between two images
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def run_torch_export(path: Path) -> Run:
    """The file by PyTorch."""
    run: Run = torch.export.load(path).module()
    return run


def run_torchscript(path: Path) -> Run:
    """The file by PyTorch."""
    run: Run = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return run


Writer = Callable[[nn.Module, Tensor, Path, bool], None]
FORMATS: dict[str, tuple[str, Writer, Callable[[Path], Run]]] = {  # ending, how to write, how to run
    "onnx": (".onnx", write_onnx, run_onnx),
    "torch-export": (".pt2", write_torch_export, run_torch_export),
    "torchscript": (".ts", write_torchscript, run_torchscript),
}


@torch.no_grad()
def export(
    network: nn.Module, path: Path, format: str, size: tuple[int, int], dynamic: bool, labels: bool
) -> float:
    """Writes the file, runs it, and compares.

    Args:
        network: In evaluation mode, on the CPU.
        path: The file; what is there is written over.
        format: One of `FORMATS`.
        size: (H, W) of the images it is traced at.
        dynamic: Whether it takes any size and any number of images.
        labels: Whether it gives labels, at the size of the images.

    Returns:
        The largest difference of scores relative to the largest score; of labels the share that differ.

    Raises:
        ExportError: If the exporter fails, or the file gives other results at this or at another size.
    """
    _, write, run = FORMATS[format]
    model = Deployed(network, labels).eval()
    images = _images(2 if dynamic else 1, size)  # a dimension of one would be taken for a constant
    hint = "; --no-dynamic writes a file for this size alone" if dynamic else ""
    try:
        write(model, images, path, dynamic)
        found = run(path)
    except ImportError:
        raise
    except Exception as error:  # exporters raise nearly anything
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"torch cannot export this network as {format}: {first[:200]}{hint}") from error
    tried = [images]
    if dynamic:
        tried.append(_images(1, (size[0] + 40, size[1] // 2 + 24)))
    worst = 0.0
    for x in tried:
        shape = f"{len(x)} x 3 x {x.shape[2]} x {x.shape[3]}"
        try:
            ours = found(x)
        except Exception as error:  # runtimes too
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ExportError(f"the file does not run on images {shape}: {first[:200]}{hint}") from error
        off = difference(ours, model(x))
        if not off <= (1 - AGREEING if labels else LARGEST):
            raise ExportError(f"the file gives other results on images {shape}, off by {off:.2g}{hint}")
        worst = max(worst, off)
    return worst


def difference(ours: Tensor, expected: Tensor) -> float:
    """The largest difference of scores relative to the largest score; of labels the share that differ."""
    if ours.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return (ours != expected).double().mean().item()
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def _images(count: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)


def _dimensions(count: int) -> dict[int, Any]:
    dim = torch.export.Dim
    sizes = {2: dim("height", min=32, max=16384), 3: dim("width", min=32, max=16384)}
    return sizes if count == 1 else {0: dim("batch", min=1, max=1024), **sizes}
