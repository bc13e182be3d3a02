"""What the commands that use a trained network can be told: one dataclass a command, whose fields are its flags.

Nothing here imports torch, so the command line can answer `--help` and typing errors at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

WRITE = ("colour", "overlay", "train-ids", "label-ids")
FORMATS = ("onnx", "torch-export", "torchscript")
RUNTIMES = ("pytorch", "compile", "onnx", "onnx-int8")
PREDICTING = ("auto", "pytorch", "compile", "onnx")


@dataclass(frozen=True)
class Using:
    """What every use of a network needs."""

    weights: Positional[Path]
    """Weights file of `revseg train`, or the name of a network that is shipped."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    threads: int | None = None
    """Number of CPU threads; by default torch decides."""


@dataclass(frozen=True)
class Gone(Using):
    """How images are gone through."""

    window: tuple[int, int] | None = None
    """Height and width of windows, for images larger than the device's memory; by default the whole image."""
    overlap: float = 0.25
    """The share of a window that it has in common with the next."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes of the image whose scores are averaged, as in: 0.75 1.0 1.25."""
    flip: bool = False
    """Average the scores of the mirror image too."""

    def __post_init__(self) -> None:
        if self.window is not None and min(self.window) < 16:
            raise ValueError(
                f"expected --window of at least 16 x 16, got {self.window[0]} x {self.window[1]}"
            )
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"expected --overlap between 0 and 0.9, got {self.overlap}")
        if not self.scales or not all(0.1 <= scale <= 10 for scale in self.scales):
            raise ValueError(f"expected --scales between 0.1 and 10, got {self.scales}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"expected --threads of at least 1, got {self.threads}")


@dataclass(frozen=True)
class PredictSettings(Gone):
    """Say what every pixel of images is; pictures go into the folder --out."""

    sources: Positional[tuple[str, ...]] = ()
    """Images, folders, patterns, videos, camera:0, or - for a list of paths on the standard input."""
    out: Path = Path("runs/predict")
    """Folder of the results; names and folders below a source are kept."""
    write: tuple[str, ...] = ("colour",)
    """What to write: colour, overlay, train-ids, label-ids (of Cityscapes' files and benchmark); each in a folder."""
    frames: int | None = None
    """At most so many frames of a video or a camera; by default all."""
    overwrite: bool = False
    """Write results anew that are there already; by default they are left, and the rest is done."""
    runtime: str = "auto"
    """What runs the network: pytorch, compile (torch.compile), onnx (ONNX Runtime, on a CPU); auto begins by PyTorch and
    takes ONNX Runtime where preparing it pays and it is faster."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_runtime_name(self.runtime)
        if not self.sources:
            raise ValueError(
                "expected images, folders, patterns, videos, camera:0 or - after the weights, got none"
            )
        for kind in self.write:
            if kind not in WRITE:
                raise ValueError(f"unknown --write {kind}; choose some of {', '.join(WRITE)}")
        if not self.write:
            raise ValueError(f"expected something to write; choose some of {', '.join(WRITE)}")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"expected --frames of at least 1, got {self.frames}")


@dataclass(frozen=True)
class EvaluateSettings(Gone):
    """Score a network on labelled images; tables and the confusion matrix go into the folder --out."""

    data: str = "synthetic"
    """Data set, as for `revseg train`."""
    root: Path | None = None
    """Folder of the data set, for data sets that are read from files."""
    data_args: tuple[str, ...] = ()
    """Options of the data set, as for `revseg train`."""
    split: str = "val"
    """Part of the data set: train, val or test."""
    size: tuple[int, int] | None = None
    """Height and width to evaluate at; by default those of the data set."""
    samples: int | None = None
    """Number of samples; by default all."""
    seed: int = 0
    """Which scenes are generated."""
    light: str = "day"
    """Light of the images: day, as they are; dusk (dark and warm), shade (dark and cold) or glare, always the same."""
    instances: bool = False
    """Score every object alike too (iIoU), with the instance ids of Cityscapes, at full size."""
    out: Path = Path("runs/evaluate")
    """Folder for evaluation.json, confusion.csv and confusion.png."""
    runtime: str = "pytorch"
    """What runs the network: pytorch, compile, onnx or auto, as for `revseg predict`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_runtime_name(self.runtime)
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"expected --samples of at least 1, got {self.samples}")
        if self.instances and (self.data != "cityscapes" or self.size is not None):
            raise ValueError(
                "--instances needs --data cityscapes at its full size, without --size, "
                f"got --data {self.data} and --size {self.size}"
            )


@dataclass(frozen=True)
class ExportSettings(Using):
    """Write a network for other runtimes, and check what was written."""

    format: str = "onnx"
    """onnx, torch-export or torchscript."""
    out: Path | None = None
    """File to write; by default beside the weights."""
    size: tuple[int, int] = (512, 1024)
    """Height and width of the images it is traced at."""
    dynamic: bool = True
    """Take images of any size and any number; refused for networks whose layers depend on the size."""
    labels: bool = True
    """Give labels at the size of the image; --no-labels gives the scores at the network's stride."""
    int8: bool = False
    """Convolutions in 8-bit integers, for onnx; ranges from training images, the price told on validation images."""
    data: str = "synthetic"
    """With --int8: data set, as for `revseg train`."""
    root: Path | None = None
    """With --int8: folder of the data set, for data sets that are read from files."""
    data_args: tuple[str, ...] = ()
    """With --int8: options of the data set, as for `revseg train`."""
    samples: int = 32
    """With --int8: so many training images, and at most so many validation images."""
    overwrite: bool = False
    """Replace a file that is there."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown --format {self.format}; choose one of {', '.join(FORMATS)}")
        if min(self.size) < 32:
            raise ValueError(f"expected --size of at least 32 x 32, got {self.size[0]} x {self.size[1]}")
        if self.int8 and not (self.format == "onnx" and self.labels and self.dynamic):
            raise ValueError(
                "--int8 goes with --format onnx, labels and any size; leave --no-labels and --no-dynamic out"
            )
        if self.samples < 1:
            raise ValueError(f"expected --samples of at least 1, got {self.samples}")


@dataclass(frozen=True)
class BenchmarkSettings(Using):
    """Time a network here, by every runtime that is installed."""

    size: tuple[int, int] = (512, 1024)
    """Height and width of the image."""
    rounds: int = 5
    """How often each runtime is timed, in turn with the others."""
    runtimes: tuple[str, ...] = field(default=RUNTIMES)
    """What to time: pytorch, compile (torch.compile), onnx and onnx-int8 (ONNX Runtime)."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"expected --rounds of at least 1, got {self.rounds}")
        for runtime in self.runtimes:
            if runtime not in RUNTIMES:
                raise ValueError(f"unknown runtime {runtime!r}; choose some of {', '.join(RUNTIMES)}")


def check_runtime_name(name: str) -> None:
    """Refuses what is no runtime of predictions.

    Raises:
        ValueError: If it is none.
    """
    if name not in PREDICTING:
        raise ValueError(f"unknown --runtime {name}; choose one of {', '.join(PREDICTING)}")
