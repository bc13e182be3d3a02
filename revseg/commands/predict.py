"""`revseg predict`: what every pixel of images is, as pictures or ids.

A run that stopped goes on where it stopped: results that are there are left alone. An image that cannot be read is
named and passed over, and the command then ends with an error.
"""

import contextlib
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from revseg.data.classes import ClassTable
from revseg.files import write_atomically
from revseg.inference.augmented import Augmentation
from revseg.inference.automatic import AutomaticRunner
from revseg.inference.pictures import converter, write_png
from revseg.inference.settings import PredictSettings
from revseg.inference.sources import Source, sources_of
from revseg.inference.tiff import write_rows
from revseg.inference.trained import TrainedNetwork, load
from revseg.inference.windows import Rows, Windows, predict_rows
from revseg.training.setup import choose_device

LARGE_WINDOW = (1024, 1024)  # for images that are not read as a whole, if --window says nothing


class UnreadableImageError(RuntimeError):
    """Images that could not be predicted; all others were."""


def predict(settings: PredictSettings) -> list[Path]:
    """Predicts every image and writes the results.

    Args:
        settings: What the command line says.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: If weights or a source are missing.
        ImportError: If packages of the runtime are not installed.
        RuntimeFailedError: If the runtime cannot run the network.
        ValueError: If a setting does not fit the network.
        UnreadableImageError: If some images could not be read; after all others are done.
    """
    console = Console(highlight=False)
    device = choose_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    tell = partial(console.print, markup=False, soft_wrap=True)
    model = load(settings.weights).to(device).with_runtime(settings.runtime, tell)
    for kind in settings.write:
        converter(kind, model.classes)  # what does not fit the network is said before any work
    written: list[Path] = []
    left, done, failed = 0, 0, []
    for source in sources_of(settings.sources, settings.frames):
        missing = {
            kind: path
            for kind, path in results_of(source, settings).items()
            if settings.overwrite or not path.exists()
        }
        if not missing:
            left += 1
            continue
        if isinstance(model.network, AutomaticRunner):
            model.network.expect(done, None if source.coming is None else source.coming + 1)
        try:
            predict_one(model, source, missing, settings)
        except (ValueError, OSError) as error:
            if (
                isinstance(error, OSError)
                and error.errno is not None
                and not isinstance(error, FileNotFoundError)
            ):
                raise  # the disk, not the image
            console.print(f"passed over {source.origin}: {error}", markup=False)
            failed.append(source.origin)
            continue
        written.extend(missing.values())
        done += 1
    if isinstance(model.network, AutomaticRunner) and done and not model.network.runs:
        tell(f"run by PyTorch: {model.network.summary()}")
    console.print(f"{len(written)} files written below {settings.out}", markup=False)
    if left:
        console.print(f"{left} images had all their results already: --overwrite predicts them again")
    if failed:
        raise UnreadableImageError(f"{len(failed)} images could not be predicted, the first is {failed[0]}")
    return written


def results_of(source: Source, settings: PredictSettings) -> dict[str, Path]:
    """The file of each kind of result."""
    ending = ".png" if source.rows is None else ".tif"
    return {kind: settings.out / kind / f"{source.name}{ending}" for kind in settings.write}


def predict_one(
    model: TrainedNetwork, source: Source, results: dict[str, Path], settings: PredictSettings
) -> None:
    """Predicts one image and writes its results."""
    augmentation = Augmentation.of(settings.scales, settings.flip)
    windows = Windows.of(settings.window, settings.overlap)
    if source.rows is not None:
        windows = windows or Windows(*LARGE_WINDOW, settings.overlap)
        for kind, path in results.items():  # one after another: rows are read again rather than kept
            predict_large(model, source.rows(), kind, path, windows, augmentation)
        return
    image = source.read()
    labels = model.predict(image, windows=windows, augmentation=augmentation)
    for kind, path in results.items():
        pixels = converter(kind, model.classes)(labels, image)
        write_png(path, pixels, model.classes if kind == "train-ids" else None)


@torch.no_grad()
def predict_large(
    model: TrainedNetwork,
    rows: Rows,
    kind: str,
    path: Path,
    windows: Windows,
    augmentation: Augmentation | None,
) -> None:
    """Predicts an image by windows into a TIFF, neither of which is in memory as a whole."""
    strips = predict_rows(
        partial(model.scores, augmentation=augmentation, window=True), rows, model.stride, windows
    )
    converted = _converted(strips, rows, kind, model.classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(converted):
        write_atomically(path, lambda part: write_rows(part, converted, rows.height, rows.width))


def _converted(
    strips: Iterator[Tensor], rows: Rows, kind: str, classes: ClassTable
) -> Generator[Tensor, None, None]:
    convert, top = converter(kind, classes), 0
    for strip in strips:
        strip = strip.cpu()
        pixels = rows.read((top, top + len(strip)), (0, rows.width)) if kind == "overlay" else None
        yield convert(strip, pixels)
        top += len(strip)
