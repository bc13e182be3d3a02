"""`revseg export`: a network for other runtimes, checked after it is written."""

import os
from pathlib import Path

import torch
from rich.console import Console

from revseg.data import SegmentationDataset, create_dataset
from revseg.inference.export import FORMATS, run_onnx
from revseg.inference.export import export as export_network
from revseg.inference.folded import folded
from revseg.inference.int8 import miou_of, write_int8
from revseg.inference.settings import ExportSettings
from revseg.inference.trained import TrainedNetwork, load
from revseg.training.choices import key_values


def export(settings: ExportSettings) -> Path:
    """Writes the file.

    Args:
        settings: What the command line says.

    Returns:
        The file.

    Raises:
        FileExistsError: If a file is there.
        ExportError: If the network cannot be exported so, or the file is wrong.
    """
    console = Console(highlight=False)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    ending = FORMATS[settings.format][0]
    out = (
        settings.out or settings.weights.with_suffix(f".int8{ending}" if settings.int8 else ending)
    ).expanduser()
    if out.exists() and not settings.overwrite:
        raise FileExistsError(f"{out} is there already: choose another --out, or --overwrite")
    model = load(settings.weights)
    sets = splits_of(settings, model) if settings.int8 else None
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    whole = out.with_name(f".{out.stem}.float32{out.suffix}")
    try:
        off = export_network(
            folded(model.network), part, settings.format, settings.size, settings.dynamic, settings.labels
        )
        console.print(f"{settings.format} off by {off:.1e} from PyTorch")
        if sets:
            os.replace(part, whole)
            console.print(price_of_int8(whole, part, *sets))
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
        whole.unlink(missing_ok=True)
    what = "labels" if settings.labels else "scores"
    sizes = "any size, any number" if settings.dynamic else f"1 x 3 x {settings.size[0]} x {settings.size[1]}"
    console.print(f"{out}: bytes [N, 3, H, W] ({sizes}) to {what}", markup=False)
    return out


def splits_of(
    settings: ExportSettings, model: TrainedNetwork
) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training images to take ranges from, and validation images to tell the price on."""
    options = key_values("--data-args", settings.data_args)
    train, val = (
        create_dataset(settings.data, split, root=settings.root, samples=settings.samples, **options)
        for split in ("train", "val")
    )
    model.check_classes(settings.data, train.classes)
    return train, val


def price_of_int8(
    whole: Path, part: Path, train_set: SegmentationDataset, val_set: SegmentationDataset
) -> str:
    """Writes the file with integer convolutions beside the one without, and says what it costs."""
    write_int8(whole, part, (train_set[i][0] for i in range(len(train_set))))
    scores = miou_of({"float32": run_onnx(whole), "int8": run_onnx(part)}, val_set)
    sizes = [path.stat().st_size / 2**20 for path in (whole, part)]
    return (
        f"int8: mIoU {100 * scores['int8']:.2f} % on {len(val_set)} validation images, float32 "
        f"{100 * scores['float32']:.2f} %; {sizes[1]:.2f} MiB, float32 {sizes[0]:.2f}"
    )
