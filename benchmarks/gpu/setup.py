"""What all parts of the GPU benchmark are told, and the sizes they run at."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Setup:
    """How a part runs.

    Attributes:
        device: "cuda", or "cpu" for a toy run.
        toy: Sizes that a CPU, or Triton's interpreter, finishes in seconds.
        warm: Call everything once and time nothing: what has to be compiled is then in the caches.
        deadline: `time.time()` by which the part has to be done.
    """

    device: str
    toy: bool
    warm: bool
    deadline: float

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    @property
    def stream(self) -> tuple[int, int, int, int]:
        """N, C, H, W of one of the two streams of a block, at 1/4 of 1024 x 2048."""
        return (1, 16, 5, 8) if self.toy else (4, 32, 256, 512)

    @property
    def image(self) -> tuple[int, int, int]:
        """N, H, W of the images of a training step."""
        return (1, 16, 32) if self.toy else (4, 1024, 2048)

    @property
    def compiler(self) -> str:
        """The backend of torch.compile; a real one takes too long for toys."""
        return "aot_eager" if self.toy else "inductor"


def random(shape: tuple[int, ...], setup: Setup, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers, channels_last if they are a map."""
    generator = torch.Generator(setup.device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=setup.device, dtype=torch.float32).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def rounded(value: float) -> float:
    """Three digits of it."""
    return float(f"{value:.3g}")


def name_of(dtype: torch.dtype) -> str:
    """The dtype in words; products of float32 are rounded to tf32 here, as PyTorch's convolutions do."""
    return "tf32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
