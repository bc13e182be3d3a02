"""Upsampling and cross-entropy, and upsampling and argmax, in one and as two functions of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.setup import Setup, name_of
from benchmarks.gpu.timing import Step, race
from benchmarks.questions.upsample_cross_entropy import TASKS, example, step
from benchmarks.record import Row
from benchmarks.segmentation import CLASSES

MEASURED = ("loss and gradient", "loss only", "argmax")


def measure(setup: Setup, dtype: torch.dtype) -> Iterator[Row]:
    """Rows of case, way, dtype, shape of the logits, times, and the peak beyond logits and labels."""
    n, height, width = setup.image
    shape = (n, CLASSES, height // 8, width // 8)
    for task in MEASURED:
        plain, ours, trained = TASKS[task]
        logits, labels = example(shape, dtype, trained, setup.device)
        compiled: Callable[..., Tensor] = torch.compile(plain, backend=setup.compiler)
        ways: dict[str, Step] = {
            way: partial(step, function, logits, labels)
            for way, function in (("revseg", ours), ("PyTorch", plain), ("compile", compiled))
        }
        for way, found in race(ways, setup, memory=True).items():
            yield {"case": task, "way": way, "dtype": name_of(dtype), "shape": list(shape)} | found
