"""What a command can be told: one dataclass per command, whose fields are its flags.

Nothing here imports torch, so the command line can answer `--help` and typing errors at once.
What can be wrong with a value is checked when the settings are made, what can be wrong with a
folder by `check_folders`, before anything is read or written.
"""

import ast
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

OUTPUTS = (
    "settings.json",
    "log.jsonl",
    "last.pt",
    "best.safetensors",
    "summary.json",
    "curves.png",
    "samples.png",
)


@dataclass(frozen=True)
class TrainSettings:
    """Train a segmentation network; everything it makes goes into the folder --out."""

    data: str = "synthetic"
    """Data set: synthetic (generated street scenes) or camvid."""
    root: Path | None = None
    """Folder of the data set, for data sets that are read from files."""
    size: tuple[int, int] | None = None
    """Height and width to train at; by default those of the data set."""
    train_samples: int | None = None
    """Number of training samples; by default all."""
    val_samples: int | None = None
    """Number of validation samples; by default all."""
    hflip: bool = True
    """Mirror training samples at random."""
    model: str = "vnet"
    """Network."""
    model_args: tuple[str, ...] = ()
    """Hyperparameters of the network, as in: widths=8,64,128 coupling=additive."""
    memory: str = "balanced"
    """Memory level: lowest, balanced or fastest; the same numbers with more or less computed again."""
    save_activations: bool = False
    """Train the plain twin: same numbers, ordinary autograd, more memory."""
    exact: bool = False
    """Invert bit for bit: streams rounded to multiples of 2^-12, same memory."""
    lossless: bool = False
    """Invert bit for bit without changing the network; keeps about a tenth of a stream per update."""
    class_weights: str = "none"
    """Weights of the classes in the loss: none, or enet for 1 / ln(1.02 + share of the pixels)."""
    epochs: int = 300
    """Number of passes over the training samples."""
    batch: int = 4
    """Samples in a batch."""
    lr: float = 5e-4
    """Learning rate at the start."""
    power: float = 0.9
    """The learning rate of a step is lr * (1 - step / steps) ** power."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two averages."""
    weight_decay: float = 1e-4
    """Weight decay of Adam."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    threads: int | None = None
    """Number of CPU threads; by default torch decides."""
    workers: int = 0
    """Number of processes that load samples; 0 loads them in the main process."""
    out: Path = Path("runs/train")
    """Folder for checkpoints, log, tables and pictures."""
    resume: bool = False
    """Continue the run in --out after its last whole epoch."""
    overwrite: bool = False
    """Replace the run in --out."""

    def __post_init__(self) -> None:
        for flag in ("batch", "epochs", "train_samples", "val_samples", "threads"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise ValueError(f"expected {_flag(flag)} of at least 1, got {value}")
        for flag in ("lr", "power", "weight_decay", "workers", "seed"):
            value = getattr(self, flag)
            if value < 0 or not math.isfinite(value):
                raise ValueError(f"expected {_flag(flag)} of at least 0, got {value}")
        if self.seed >= 2**32:
            raise ValueError(f"expected --seed below 2**32, got {self.seed}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected --betas in [0, 1), got {self.betas}")
        if self.size is not None and min(self.size) < 16:
            raise ValueError(f"expected --size of at least 16 x 16, got {self.size[0]} x {self.size[1]}")
        if self.class_weights not in ("none", "enet"):
            raise ValueError(f"unknown --class-weights {self.class_weights!r}; choose one of none, enet")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues a run and --overwrite replaces it: choose one of them")
        if self.exact and self.lossless:
            raise ValueError("--exact and --lossless are two ways to the same end: choose one of them")
        self.hyperparameters()

    def hyperparameters(self) -> dict[str, object]:
        """What `model_args`, `exact` and `lossless` say, as keyword arguments.

        Raises:
            ValueError: If an entry is not key=value, or says what another flag says.
        """
        result: dict[str, object] = {}
        result["memory"] = self.memory
        if self.exact or self.lossless:
            result["exact"] = self.exact or "lossless"
        for entry in self.model_args:
            key, equals, text = entry.partition("=")
            if not equals or not key.isidentifier():
                raise ValueError(f"expected --model-args as key=value, got {entry!r}")
            if key in ("num_classes", "memory", "save_activations", "exact"):
                raise ValueError(f"--model-args cannot set {key}: the data set or a flag of its own says it")
            try:
                result[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                result[key] = text
        return result

    def check_folders(self) -> None:
        """Refuses folders that cannot serve, before any work is done.

        Raises:
            ValueError: If `root` is no folder, or `out` cannot be used in the way asked for.
        """
        if self.root is not None and not self.root.is_dir():
            raise ValueError(f"expected --root to be a folder, got {self.root}, which is none")
        folder = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not folder.is_dir():
            raise ValueError(f"cannot write to --out {self.out}: {folder} is a file")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write to --out {self.out}: no permission to write in {folder}")
        if self.resume and not (self.out / "last.pt").is_file():
            raise ValueError(f"nothing to resume: {self.out / 'last.pt'} does not exist")
        present = [name for name in OUTPUTS if (self.out / name).exists()]
        if present and not (self.resume or self.overwrite):
            raise ValueError(
                f"{self.out} holds a run already ({present[0]}): choose another --out, "
                "--resume to continue it, or --overwrite to replace it"
            )

    def as_json(self) -> dict[str, object]:
        """The settings with values that JSON knows."""
        values = asdict(self)
        return {
            key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
        }


@dataclass(frozen=True)
class DoctorSettings:
    """Say what is installed, which kernels run, and whether they are right on this device."""

    device: str = "auto"
    """Where to check: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
