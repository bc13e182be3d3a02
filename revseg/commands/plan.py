"""`revseg plan`: will it fit, and what would?

Nothing is allocated: the step of a network runs on shapes alone (`revseg.memory.predict`). Printed are the table of that step,
every memory level beside the others, and what fits a budget: the largest batch, the largest images, the level to choose.
The settings stand here and import no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from torch import nn

    from revseg.memory import Prediction

_DTYPES = ("float32", "bf16")
_OPTIMIZERS = ("adam", "adamw", "rmsprop", "sgd", "none")
OWN = "as it is"  # in the place of memory levels, of networks that have none
_LARGEST = 1 << 16  # images of a batch, or pixels of a side


@dataclass(frozen=True)
class PlanSettings:
    """Which step."""

    model: Positional[str]
    """A network by name, or module:factory, a function of yours that makes one without arguments."""
    size: tuple[int, int] = (1024, 2048)
    """Height and width of the images."""
    batch: int = 4
    """Images of a batch."""
    classes: int = 19
    """Number of classes."""
    dtype: str = "float32"
    """float32, or bf16: autocast to bfloat16."""
    optimizer: str = "adam"
    """adam, adamw, rmsprop, sgd or none."""
    memory: str | None = None
    """Memory level whose table is printed; by default the one to choose."""
    budget: str | None = None
    """What there is, as in 12GB: prints what fits."""
    device: str = "cuda"
    """Where the step will run: cpu counts the copies that convolutions make there."""

    def __post_init__(self) -> None:
        for name, choices in (("dtype", _DTYPES), ("optimizer", _OPTIMIZERS), ("device", ("cpu", "cuda"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(choices)}"
                )
        if min(*self.size, self.batch, self.classes) < 1:
            raise ValueError(
                "expected --size, --batch and --classes of at least 1, "
                f"got {self.size[0]} x {self.size[1]}, {self.batch} and {self.classes}"
            )


def plan(settings: PlanSettings) -> None:
    """Prints the tables.

    Raises:
        ValueError: If the network, its level or the budget is unknown.
    """
    from revseg.memory.budget import bytes_of

    budget = None if settings.budget is None else bytes_of(settings.budget)
    makers = _makers(settings)
    predictions = {
        level: _predicted(settings, make, settings.batch, settings.size) for level, make in makers.items()
    }
    level = settings.memory or _level(predictions, budget)
    height, width = settings.size
    print(
        f"{settings.model}: {settings.batch} x {height} x {width}, {settings.dtype}, optimizer {settings.optimizer}"
    )
    print(f"memory level {level}\n{predictions[level]}" if len(makers) > 1 else predictions[level])
    if len(makers) > 1:
        print("all levels: " + ", ".join(f"{name} {_gb(p.peak)}" for name, p in predictions.items()))
    if budget is not None:
        print(_what_fits(settings, makers[level], budget, predictions[level]))


def _what_fits(settings: PlanSettings, make: Callable[[], nn.Module], budget: float, here: Prediction) -> str:
    """The largest batch, and the largest images of this shape."""
    height, width = settings.size

    def of_batch(batch: int) -> int:
        return _predicted(settings, make, batch, settings.size).peak

    def of_size(steps: int) -> int:
        return _predicted(settings, make, settings.batch, (32 * steps, _wide(steps, settings))).peak

    batch = largest(of_batch, budget, settings.batch, 1)
    steps = largest(of_size, budget, max(1, height // 32), 2)
    fits = "fits" if here.peak <= budget else "does not fit"
    lines = [f"{settings.budget}: this step {fits}; the largest batch of {height} x {width} is {batch}"]
    if steps:
        size = f"{32 * steps} x {_wide(steps, settings)}"
        lines.append(f"the largest images of this shape in a batch of {settings.batch}: {size}")
    return "\n".join(lines)


def _wide(steps: int, settings: PlanSettings) -> int:
    """The width of images of this many times 32 rows, a multiple of 32 too."""
    height, width = settings.size
    return max(32, round(steps * width / height) * 32)


def largest(peak: Callable[[int], int], budget: float, start: int, power: int) -> int:
    """The largest number whose peak is within the budget, 0 if not even that of 1 is.

    Args:
        peak: Bytes of a number, which grow about as a + b n^power.
        budget: Bytes.
        start: Where to begin.
        power: 1 for images of a batch, 2 for sides.
    """
    peaks: dict[int, int] = {}

    def fits(n: int) -> bool:
        peaks[n] = peak(n)
        return peaks[n] <= budget

    low, high = 0, _LARGEST
    guess = start
    while high - low > 1:
        if fits(guess):
            low = guess
        else:
            high = guess
        if len(peaks) == 1:
            guess = 2 * start
        else:
            (a, of_a), (b, of_b) = sorted(peaks.items(), key=lambda item: abs(item[1] - budget))[:2]
            slope = (of_b - of_a) / (b**power - a**power)
            there = a**power + (budget - of_a) / slope if slope > 0 else 0
            guess = int(max(there, 0) ** (1 / power))
        guess = min(max(guess, low + 1), high - 1)
    return low


def _level(predictions: dict[str, Prediction], budget: float | None) -> str:
    """The fastest level that fits; the fastest of all without a budget, the lowest where none fits."""
    fastest_first = list(predictions)
    if budget is None:
        return fastest_first[0]
    return next((level for level in fastest_first if predictions[level].peak <= budget), fastest_first[-1])


def _makers(settings: PlanSettings) -> dict[str, Callable[[], nn.Module]]:
    """What makes the network at each memory level, the fastest first; at one alone if it has none."""
    import importlib

    from revseg.models import create_model
    from revseg.models.policy import MEMORY_LEVELS

    if ":" in settings.model:
        module, _, name = settings.model.partition(":")
        try:
            factory = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"expected module:factory, got {settings.model!r}: {error}") from error
        if settings.memory is not None:
            raise ValueError(f"expected no memory level for a network of your own, got {settings.memory!r}")
        return {OWN: factory}
    levels = tuple(reversed(MEMORY_LEVELS))
    if settings.memory is not None and settings.memory not in levels:
        raise ValueError(f"unknown memory level {settings.memory!r}; choose one of {', '.join(levels)}")

    def maker(level: str) -> Callable[[], nn.Module]:
        return lambda: create_model(settings.model, settings.classes, memory=level)

    return {level: maker(level) for level in levels if settings.memory in (None, level)}


def _predicted(
    settings: PlanSettings, make: Callable[[], nn.Module], batch: int, size: tuple[int, int]
) -> Prediction:
    import torch

    from revseg.losses import UpsampleCrossEntropy
    from revseg.memory import predict

    own = ":" in settings.model
    images = torch.empty(batch, 3, *size, dtype=torch.float32 if own else torch.uint8, device="meta")
    return predict(
        make(),
        images,
        UpsampleCrossEntropy(),
        None if settings.optimizer == "none" else settings.optimizer,
        autocast=torch.bfloat16 if settings.dtype == "bf16" else None,
        device=settings.device,
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
