"""From settings to the things they name: device, data, loader, network, loss."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from revseg.data import (
    Compose,
    EpochSampler,
    PhotometricJitter,
    RandomHorizontalFlip,
    RandomScaleCrop,
    SegmentationDataset,
    StrongPhotometric,
    create_dataset,
)
from revseg.data.base import Transform
from revseg.layers.sync_norm import with_synced_norms
from revseg.losses import OhemCrossEntropy, UpsampleCrossEntropy
from revseg.lovasz import LovaszCrossEntropy
from revseg.models import create_model, list_models
from revseg.sequence import set_save_activations
from revseg.training.choices import key_values
from revseg.training.distributed import Team, shared_out
from revseg.training.folder import Parts
from revseg.training.optimize import averaged, create_optimizer
from revseg.training.random_state import seed_everything, seed_worker
from revseg.training.settings import TrainSettings

Batch = tuple[Tensor, Tensor]  # images [N, 3, H, W], labels [N, H, W], both uint8
WEIGHT_OFFSETS = {"enet": 1.02, "erfnet": 1.10}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one, to each process of a machine its own.

    Raises:
        ValueError: If there is no such device.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown --device {name!r}; choose one of auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown --device {name!r}; choose one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no --device {name} here: torch sees {torch.cuda.device_count()} GPUs")
    return device


def create_split(settings: TrainSettings, split: str, *, augment: bool = False) -> SegmentationDataset:
    """The samples of a split, "train" or "val", randomly changed if the settings say so."""
    return create_dataset(
        settings.data,
        split,
        root=settings.root,
        size=settings.size,
        seed=settings.seed,
        samples=settings.train_samples if split == "train" else settings.val_samples,
        transform=create_transform(settings) if augment else None,
        **key_values("--data-args", settings.data_args),
    )


def create_transform(settings: TrainSettings) -> Transform | None:
    """The random changes of training samples."""
    transforms: list[Transform] = []
    if settings.crop is not None:
        scales = settings.scale or (1.0, 1.0)
        transforms.append(RandomScaleCrop(settings.crop, scales, classes=settings.crop_classes))
    if settings.hflip:
        transforms.append(RandomHorizontalFlip())
    if settings.photometric != "none":
        transforms.append(StrongPhotometric() if settings.photometric == "strong" else PhotometricJitter())
    return Compose(transforms) if transforms else None


def check_data(*datasets: SegmentationDataset) -> None:
    """Refuses data sets that nothing can be learned from, before anything is made of them.

    Raises:
        ValueError: If files are broken, there are fewer than two classes, or no pixel has one.
    """
    for dataset in datasets:
        classes = dataset.classes
        if len(classes.names) < 2:
            raise ValueError(
                f"expected at least two classes, got {', '.join(classes.names) or 'none'}: "
                "to tell one thing from all else, make the rest a class too, such as background"
            )
        dataset.verify()
        if not any(bool((dataset.load(i)[1] != classes.ignore).any()) for i in range(len(dataset))):
            raise ValueError(
                f"no pixel of the {len(dataset)} labels has a class, first {dataset.names[0]}: "
                "do the ids in the files match the table of the classes?"
            )


def check_fit(settings: TrainSettings, train_set: SegmentationDataset, processes: int = 1) -> None:
    """Refuses settings that have no meaning for these samples.

    Raises:
        ValueError: If an epoch has fewer batches than a step, or a class to look for is none of the table.
    """
    count, names = len(train_set), train_set.classes.names
    batches = max(1, count // processes // settings.batch)
    if settings.accumulate > batches:
        raise ValueError(
            f"expected --accumulate of at most {batches}, the batches of an epoch ({count} samples, --batch "
            f"{settings.batch}, {processes} processes), got {settings.accumulate}"
        )
    if unknown := [number for number in settings.crop_classes if not 0 <= number < len(names)]:
        raise ValueError(
            f"expected --crop-classes from 0 to {len(names) - 1}, the numbers of the classes of {settings.data}, "
            f"got {unknown[0]}"
        )


def create_loader(
    dataset: SegmentationDataset, settings: TrainSettings, *, shuffle: bool, team: Team | None = None
) -> DataLoader[Batch]:
    """Batches of a data set, of which every process has a share.

    With `shuffle`, samples that do not fill the last batch are left out.
    """
    team = team or Team()
    sampler = EpochSampler(len(dataset), settings.seed, team.rank, team.size, shuffle=shuffle, even=shuffle)
    return DataLoader(
        dataset,
        settings.batch,
        sampler=sampler,
        drop_last=shuffle and len(sampler) > settings.batch,
        num_workers=settings.workers,
        worker_init_fn=seed_worker,
        generator=torch.Generator().manual_seed(settings.seed),
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )


def build_model(settings: TrainSettings, num_classes: int, *, save_activations: bool) -> nn.Module:
    """The network of the settings, in either memory mode.

    Raises:
        ValueError: If the network refuses its hyperparameters.
    """
    try:
        model = create_model(settings.model, num_classes, **settings.hyperparameters())
    except TypeError as error:
        raise ValueError(
            f"wrong kind of value in --model-args {' '.join(settings.model_args)}: {error}"
        ) from error
    except ValueError as error:
        if (settings.exact or settings.lossless) and "exact" in str(error):
            flag, edition = "--exact" if settings.exact else "--lossless", f"{settings.model}_rev"
            hint = f"; --model {edition} has one" if edition in list_models() else ""
            raise ValueError(
                f"{flag} has no meaning for {settings.model}: it has no reversible part{hint}"
            ) from error
        raise
    if save_activations:
        set_save_activations(model, True)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def autocast(settings: TrainSettings, device: torch.device) -> torch.autocast:
    """The context in which a step runs its network and loss: convolutions in the precision of the settings."""
    return torch.autocast(device.type, DTYPES[settings.precision], settings.precision != "float32")


def create_parts(
    settings: TrainSettings, model: nn.Module, team: Team, device: torch.device, description: dict[str, Any]
) -> Parts:
    """The network as it is trained, with its optimizer and what else moves.

    Raises:
        ValueError: If settings exclude each other.
    """
    if settings.parallel == "fsdp" and team.size > 1:
        float16 = settings.precision == "float16"
        for flag, used in (("--ema", settings.ema), ("--pictures", settings.pictures), ("float16", float16)):
            if used:
                raise ValueError(f"{flag} does not go with --parallel fsdp, whose parameters are in pieces")
    if settings.sync_bn:
        model = with_synced_norms(model)
    ema = None if settings.ema is None else averaged(model, settings.ema)
    trained = shared_out(model, settings, team, device)
    optimizer = create_optimizer(settings, trained)
    if settings.compile:
        trained = torch.compile(trained)  # type: ignore[assignment]
    if team.size > 1:
        seed_everything(settings.seed + team.rank)  # dropout of its own for each process
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
    return Parts(trained, optimizer, scaler, ema, description)


def facts_of(
    train_set: SegmentationDataset, val_set: SegmentationDataset, device: torch.device, team: Team
) -> dict[str, object]:
    """What the settings came to here, of what the numbers of a run depend on."""

    def fingerprint(dataset: SegmentationDataset) -> str:
        digest = hashlib.sha256("\n".join(dataset.names).encode()).hexdigest()
        return f"{len(dataset)} samples ({digest[:8]})"

    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "processes": team.size,
        "train_samples": fingerprint(train_set),
        "val_samples": fingerprint(val_set),
        "classes": list(train_set.classes.names),
    }


def create_criterion(settings: TrainSettings, weight: Tensor | None) -> UpsampleCrossEntropy:
    """The loss of the settings."""
    options: dict[str, Any] = {
        "weight": weight,
        "label_smoothing": settings.label_smoothing,
        "aux_weight": settings.aux_weight,
    }
    if settings.loss == "ohem":
        return OhemCrossEntropy(settings.ohem_threshold, **options)
    if settings.loss == "lovasz":
        return LovaszCrossEntropy(**options)
    return UpsampleCrossEntropy(**options)


def class_weights(dataset: SegmentationDataset, kind: str) -> Tensor:
    """1 / ln(c + p) for each class [C], where p is its share of the labelled pixels.

    Args:
        dataset: The training samples; their random changes do not count.
        kind: "enet" for c = 1.02, "erfnet" for c = 1.10.

    Source: Paszke et al., ENet, arXiv:1606.02147, section 5.1; with 1.10 in the published code of
        Romera et al., ERFNet, IEEE T-ITS 2018.
    """
    counts = torch.zeros(256, dtype=torch.int64)
    for i in range(len(dataset)):
        counts += torch.bincount(dataset.sized(i)[1].flatten(), minlength=256)
    shares = counts[: len(dataset.classes.names)].double()
    return (1 / torch.log(WEIGHT_OFFSETS[kind] + shares / shares.sum().clamp(min=1))).float()


def _collate(samples: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    sizes = {tuple(label.shape) for _, label in samples}
    if len(sizes) > 1:
        different = ", ".join(f"{h} x {w}" for h, w in sorted(sizes))
        raise ValueError(
            f"samples of one batch have different sizes ({different}): give --size, or --batch 1"
        )
    images, labels = default_collate(list(samples))
    return images, labels
