"""VNet on a GPU: memory of a training step at each level, its time, and frames a second.

"plain" is the network of ordinary PyTorch modules with `F.interpolate` and `F.cross_entropy`; "compile" is
torch.compile of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu.setup import Setup, name_of
from benchmarks.gpu.timing import MIB, Step, race
from benchmarks.questions.memory_levels import BF16, CASES, training_step
from benchmarks.record import Row
from benchmarks.segmentation import CLASSES, batch, plain_argmax, plain_loss, using_kernels
from revseg.layers.images import normalize_images
from revseg.losses import UpsampleCrossEntropy, predict_labels
from revseg.memory import peak_bytes
from revseg.models import create_model

Loss = Callable[[Tensor, Tensor], Tensor]


def measure_memory(setup: Setup, dtype: torch.dtype) -> Iterator[Row]:
    """A row for each case of `memory_levels` in this dtype: the peak of a training step."""
    for case, (plain, numbers, _, goal) in CASES.items():
        if (numbers == BF16) != (dtype == torch.bfloat16) or setup.seconds_left < 5:
            continue
        row: Row = {"case": "VNet memory", "way": case, "dtype": numbers, "image": list(setup.image)}
        row |= {"goal_mib": goal, "plain": plain}
        try:
            step = training_step(case, setup.image, device=setup.device)
            row["peak_mib"] = round(peak_bytes(step, setup.device, before=step) / MIB, 1)
        except Exception as error:  # noqa: BLE001, the next case may do
            row["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        if setup.device != "cpu":
            torch.cuda.empty_cache()
        yield row


def measure_time(setup: Setup, dtype: torch.dtype) -> Iterator[Row]:
    """Rows of case, way, dtype and times: a training step, and the labels of one image.

    Args:
        setup: How the part runs.
        dtype: bfloat16 by autocast, streams staying float32; or float32 with tf32 products.
    """
    torch.backends.cudnn.allow_tf32 = True
    for way, found in race(step_ways(setup, dtype), setup).items():
        yield {"case": "VNet step", "way": way, "dtype": name_of(dtype), "image": list(setup.image)} | found
    one = (1, *setup.image[1:])
    for way, found in race(frame_ways(setup, dtype, one), setup).items():
        row = {"case": "VNet frame", "way": way, "dtype": name_of(dtype), "image": list(one)}
        if "ms" in found:
            row["frames_per_second"] = round(1e3 / found["ms"]["median"], 1)
        yield row | found


def step_ways(setup: Setup, dtype: torch.dtype) -> dict[str, Step]:
    """Training steps that start with images and labels on the device."""
    images, labels = batch(setup.image, values=True, device=setup.device)

    def of(
        memory: str, kernels: bool, channels_last: bool = False, wrap: Callable[[Loss], Loss] = lambda f: f
    ) -> Step:
        model = _model(setup, memory, channels_last)
        criterion: Loss = UpsampleCrossEntropy() if kernels else plain_loss

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            return criterion(model(images), labels)

        wrapped, parameters = wrap(loss), list(model.parameters())

        def step() -> object:
            with using_kernels(kernels), _autocast(setup, dtype):
                inputs = images if kernels else _images(images, channels_last)
                return torch.autograd.grad(wrapped(inputs, labels), parameters)

        return step

    compiled = partial(torch.compile, backend=setup.compiler)
    return {
        "plain": of("fastest", False),
        "plain channels_last": of("fastest", False, True),
        "compile": of("fastest", False, True, compiled),
        **{f"revseg {memory}": of(memory, True, True) for memory in ("fastest", "balanced", "lowest")},
    }


def frame_ways(setup: Setup, dtype: torch.dtype, size: tuple[int, int, int]) -> dict[str, Step]:
    """From an image on the device to its labels at full size."""
    images, labels = batch(size, values=True, device=setup.device)

    def of(
        kernels: bool,
        channels_last: bool = False,
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> Step:
        model = wrap(_model(setup, "balanced", channels_last).eval())

        @torch.no_grad()
        def step() -> object:
            with using_kernels(kernels), _autocast(setup, dtype):
                if kernels:
                    return predict_labels(model(images), labels.shape[-2:])
                return plain_argmax(model(_images(images, channels_last)), labels)

        return step

    return {
        "plain": of(False),
        "plain channels_last": of(False, True),
        "compile": of(False, True, partial(torch.compile, backend=setup.compiler)),  # type: ignore[arg-type]
        "revseg": of(True, True),
    }


def _model(setup: Setup, memory: str, channels_last: bool) -> nn.Module:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return create_model("vnet", CLASSES, memory=memory).to(setup.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def _images(images: Tensor, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return normalize_images(images).contiguous(memory_format=layout)


def _autocast(setup: Setup, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(setup.device, torch.bfloat16, enabled=dtype == torch.bfloat16)
