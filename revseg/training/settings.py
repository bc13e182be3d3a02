"""What a command can be told: one dataclass per command, whose fields are its flags.

Nothing here imports torch, so the command line can answer `--help` and typing errors at once.
What can be wrong with a value is checked when the settings are made, what can be wrong with a
folder by `check_folders`, before anything is read or written.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from revseg.training.choices import (
    check_bounds,
    check_choice,
    flag,
    key_values,
    registered_names,
)

OUTPUTS = (
    "settings.json",
    "log.jsonl",
    "last.pt",
    "best.safetensors",
    "summary.json",
    "curves.png",
    "samples.png",
)

CHOICES = {
    "memory": ("least", "lowest", "balanced", "fastest"),
    "loss": ("cross_entropy", "ohem", "lovasz"),
    "class_weights": ("none", "enet", "erfnet"),
    "optimizer": ("adam", "adamw", "sgd"),
    "decay": ("weights", "all"),
    "schedule": ("poly", "cosine", "constant"),
    "photometric": ("none", "mild", "strong"),
    "precision": ("float32", "bfloat16", "float16"),
    "parallel": ("ddp", "fsdp"),
}

LOGGERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class TrainSettings:
    """Train a segmentation network; everything it makes goes into the folder --out."""

    config: Path | None = None
    """YAML file of settings, named as these flags; flags count more."""
    data: str = "synthetic"
    """Data set by its name; synthetic (generated street scenes) needs no files."""
    root: Path | None = None
    """Folder of the data set, for data sets that are read from files."""
    data_args: tuple[str, ...] = ()
    """Options of the data set, as in: table=coarse.yaml, or cache=FOLDER of `revseg data cache`."""
    size: tuple[int, int] | None = None
    """Height and width to train at; by default those of the data set."""
    train_samples: int | None = None
    """Number of training samples; by default all."""
    val_samples: int | None = None
    """Number of validation samples; by default all."""
    hflip: bool = True
    """Mirror training samples at random."""
    scale: tuple[float, float] | None = None
    """Resize training samples by a random factor between these two; needs --crop."""
    crop: tuple[int, int] | None = None
    """Height and width of a random window of each training sample."""
    crop_classes: tuple[int, ...] = ()
    """With --crop: classes by number that windows are laid around, half of the time."""
    photometric: str = "none"
    """Change light and colours of training samples at random: none, mild, or strong with blur and noise."""
    model: str = "vnet"
    """Network by its name."""
    model_args: tuple[str, ...] = ()
    """Hyperparameters of the network, as in: widths=8,64,128 coupling=additive."""
    weights: Path | None = None
    """Weights to start from, all but the head where the classes differ: safetensors or a state dict of torch."""
    memory: str = "balanced"
    """Memory level: least, lowest, balanced or fastest; the same numbers with more or less computed again."""
    save_activations: bool = False
    """Train the plain twin: same numbers, ordinary autograd, more memory."""
    exact: bool = False
    """Invert bit for bit: streams rounded to multiples of 2^-12, same memory."""
    lossless: bool = False
    """Invert bit for bit without changing the network; keeps about a tenth of a stream per update."""
    budget: str | None = None
    """Memory that a step may take, as in 11GB: the fastest memory level that is predicted to fit."""
    compile: bool = False
    """Compile the network by torch.compile; reversible sequences stay as they are, and keep their saving."""
    channels_last: bool = False
    """Lay out the network's maps as convolutions want them."""
    precision: str = "float32"
    """Of the convolutions: float32, or bfloat16 or float16 by autocast; streams stay float32."""
    loss: str = "cross_entropy"
    """Loss: cross_entropy; ohem, which counts the hard pixels only; lovasz, which adds Lovász-softmax, for the mean IoU."""
    ohem_threshold: float = 0.7
    """With --loss ohem: a pixel is hard if the probability of its class is below."""
    class_weights: str = "none"
    """Weights of the classes in the loss by their shares p of the pixels: none, enet 1/ln(1.02+p), erfnet 1/ln(1.10+p)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    aux_weight: float = 0.4
    """Weight of each auxiliary head in the loss, beside the main one's 1."""
    epochs: int = 300
    """Number of passes over the training samples; may grow on --resume."""
    batch: int = 4
    """Samples in a batch, of each process."""
    accumulate: int = 1
    """Batches whose gradients are added up before a step of the optimizer."""
    optimizer: str = "adam"
    """Optimizer: adam, adamw or sgd."""
    lr: float = 5e-4
    """Learning rate at the start."""
    schedule: str = "poly"
    """Learning rate over the steps: poly lr * (1 - step / steps) ** power, cosine or constant."""
    power: float = 0.9
    """Exponent of --schedule poly."""
    warmup: int = 0
    """Steps at the start over which the learning rate rises to that of the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two averages of adam and adamw."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 1e-4
    """Weight decay."""
    decay: str = "weights"
    """What decays: weights, not norms, biases and slopes; or all."""
    clip: float | None = None
    """Largest norm of the gradient, to which longer ones are cut."""
    ema: float | None = None
    """Validate and keep averaged weights, which keep this share of themselves at each step, as in 0.999."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    threads: int | None = None
    """Number of CPU threads; by default torch decides."""
    workers: int = 0
    """Number of processes that load samples; 0 loads them in the main process."""
    parallel: str = "ddp"
    """Between the processes of torchrun: ddp, or fsdp, which shards parameters and optimizer."""
    sync_bn: bool = False
    """Between the processes of torchrun: batch norm over the batches of all."""
    save_minutes: float = 10.0
    """Write last.pt whenever so many minutes have passed, and after every epoch."""
    save_steps: int | None = None
    """Write last.pt also after so many steps."""
    keep: int = 0
    """How many checkpoints of whole epochs to keep beside last.pt: epoch-0012.pt."""
    log: tuple[str, ...] = ()
    """Log to these too, beside log.jsonl: tensorboard, wandb."""
    pictures: int | None = None
    """Draw predictions every so many epochs: samples-0010.png."""
    out: Path = Path("runs/train")
    """Folder for checkpoints, log, tables and pictures."""
    resume: bool | Path = False
    """Continue the run in --out where it was saved last, or from another of its checkpoints."""
    allow_change: tuple[str, ...] = ()
    """With --resume: settings that may differ from those of the run so far; its numbers then do too."""
    overwrite: bool = False
    """Replace the run in --out, once the new one has something to keep."""
    dry_run: bool = False
    """Check everything, predict the memory, print the plan, and stop."""

    def __post_init__(self) -> None:
        for field in ("config", "root", "weights", "out", "resume"):
            path = getattr(self, field)
            if isinstance(path, (str, Path)):
                object.__setattr__(self, field, Path(path).expanduser())
        check_bounds(self)
        for field, choices in CHOICES.items():
            check_choice(flag(field), getattr(self, field), choices)
        check_choice("--model", self.model, registered_names("models", "MODELS"))
        check_choice("--data", self.data, registered_names("data", "DATASETS"))
        for logger in self.log:
            check_choice("--log", logger, LOGGERS)
        for name in self.allow_change:
            check_choice("--allow-change", name, (*type(self).__dataclass_fields__, "processes"))
        if self.crop is None and (self.scale is not None or self.crop_classes):
            raise ValueError("--scale and --crop-classes need the size of a window: give --crop too")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues a run and --overwrite replaces it: choose one of them")
        if self.exact and self.lossless:
            raise ValueError("--exact and --lossless are two ways to the same end: choose one of them")
        if self.budget is not None:
            from revseg.memory.budget import bytes_of  # and with it torch, for this flag alone

            bytes_of(self.budget)
        key_values("--data-args", self.data_args)
        self.hyperparameters()

    def hyperparameters(self) -> dict[str, object]:
        """What `model_args`, `exact` and `lossless` say, as keyword arguments.

        Raises:
            ValueError: If an entry is not key=value, or says what another flag says.
        """
        result: dict[str, object] = {"memory": self.memory}
        if self.exact or self.lossless:
            result["exact"] = self.exact or "lossless"
        given = key_values("--model-args", self.model_args)
        for key in ("num_classes", "memory", "save_activations", "exact"):
            if key in given:
                raise ValueError(f"--model-args cannot set {key}: the data set or a flag of its own says it")
        return result | given

    def checkpoint(self) -> Path:
        """The file that `resume` means: last.pt of a folder, of `out` by default."""
        path = self.resume if isinstance(self.resume, Path) else self.out
        return path / "last.pt" if path.is_dir() or path == self.out else path

    def check_folders(self) -> None:
        """Refuses folders that cannot serve, before any work is done.

        Raises:
            ValueError: If `root` is no folder, or `out` cannot be used in the way asked for.
        """
        if self.root is not None and not self.root.is_dir():
            raise ValueError(f"expected --root to be a folder, got {self.root}, which is none")
        if self.weights is not None and not self.weights.is_file():
            raise ValueError(f"expected --weights to be a file, got {self.weights}, which is none")
        folder = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not folder.is_dir():
            raise ValueError(f"cannot write to --out {self.out}: {folder} is a file")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write to --out {self.out}: no permission to write in {folder}")
        if self.resume and not self.checkpoint().is_file():
            raise ValueError(f"nothing to resume: {self.checkpoint()} does not exist")
        if not (self.resume or self.overwrite or self.dry_run):
            self._check_free()

    def _check_free(self) -> None:
        """Refuses a folder with a run; one that failed before it had anything to keep counts as none."""
        present = [
            path.name
            for path in (self.out / name for name in OUTPUTS)
            if path.exists() and path.stat().st_size
        ]
        if "last.pt" in present:
            raise ValueError(
                f"{self.out} holds a run already (last.pt): choose another --out, "
                "--resume to continue it, or --overwrite to replace it"
            )
        if set(present) - {"settings.json"}:
            raise ValueError(
                f"{self.out} holds results already ({present[0]}), but no last.pt to continue: "
                "choose another --out, or --overwrite to replace them"
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
