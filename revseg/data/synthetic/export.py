"""Generated scenes as files, in the folders of Cityscapes: for tests, demonstrations and other programs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from revseg.data.cityscapes import LABEL_IDS
from revseg.data.classes import CITYSCAPES
from revseg.data.synthetic.dataset import SyntheticStreets
from revseg.files import write_atomically

UNLABELLED = 0  # the label id of pixels without a class

CITY_NAMES = (
    "ahlen", "borken", "celle", "dahlem", "emden", "fulda", "gotha", "husum", "iserlohn", "jena", "kleve", "lohr",
)  # fmt: skip


def write_cityscapes(
    dataset: SyntheticStreets, root: Path, split: str, show: Callable[[], object] = lambda: None
) -> None:
    """Writes scenes as `leftImg8bit` and `gtFine` with label ids, train ids and colours.

    Args:
        dataset: The scenes; its transform is not applied.
        root: The folder; made if needed.
        split: The name of the split there.
        show: Called after each scene, for a progress bar.

    Raises:
        OSError: If a file cannot be written; none is left half.
    """
    for index in range(len(dataset)):
        image, label = dataset.load(index)
        city = CITY_NAMES[dataset.city(index)]
        frame = f"{city}_{index:06d}_000019"
        truth = root / "gtFine" / split / city / f"{frame}_gtFine"
        _write(root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png", image.permute(1, 2, 0))
        _write(truth.with_name(f"{truth.name}_labelTrainIds.png"), label)
        _write(truth.with_name(f"{truth.name}_labelIds.png"), label_ids(label))
        _write(truth.with_name(f"{truth.name}_color.png"), CITYSCAPES.colorize(label))
        show()


def label_ids(label: Tensor) -> npt.NDArray[np.uint8]:
    """The label ids of Cityscapes [H, W] for train ids [H, W]."""
    ids = np.full(256, UNLABELLED, dtype=np.uint8)
    ids[: len(LABEL_IDS)] = LABEL_IDS
    return np.asarray(ids[label.numpy()])


def _write(path: Path, pixels: Tensor | npt.NDArray[np.uint8]) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    write_atomically(path, lambda part: picture.save(part, format="PNG", compress_level=1))
