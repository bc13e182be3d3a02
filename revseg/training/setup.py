"""From settings to the things they name: device, data, loader, network, class weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from revseg.data import RandomHorizontalFlip, SegmentationDataset, create_dataset
from revseg.models import create_model
from revseg.sequence import set_save_activations
from revseg.training.random_state import seed_worker
from revseg.training.settings import TrainSettings

Batch = tuple[Tensor, Tensor]  # images [N, 3, H, W], labels [N, H, W], both uint8


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        transform=RandomHorizontalFlip() if augment and settings.hflip else None,
    )


def create_loader(
    dataset: SegmentationDataset, settings: TrainSettings, *, shuffle: bool
) -> DataLoader[Batch]:
    """Batches of a data set. With `shuffle`, samples that do not fill the last batch are left out."""
    return DataLoader(
        dataset,
        settings.batch,
        shuffle=shuffle,
        drop_last=shuffle and len(dataset) > settings.batch,
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
    if save_activations:
        set_save_activations(model, True)
    return model


def enet_class_weights(dataset: SegmentationDataset) -> Tensor:
    """1 / ln(1.02 + p) for each class [C], where p is its share of the labelled pixels.

    Source: Paszke et al., ENet, arXiv:1606.02147, section 5.1.
    """
    counts = torch.zeros(256, dtype=torch.int64)
    for i in range(len(dataset)):
        _, label = dataset[i]
        counts += torch.bincount(label.flatten(), minlength=256)
    shares = counts[: len(dataset.classes.names)].double()
    return (1 / torch.log(1.02 + shares / shares.sum().clamp(min=1))).float()


def _collate(samples: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    sizes = {tuple(label.shape) for _, label in samples}
    if len(sizes) > 1:
        different = ", ".join(f"{h} x {w}" for h, w in sorted(sizes))
        raise ValueError(
            f"samples of one batch have different sizes ({different}): give --size, or --batch 1"
        )
    images, labels = default_collate(list(samples))
    return images, labels
