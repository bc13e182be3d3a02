"""Any folder of images and label maps, with one class table.

    root/classes.yaml
    root/images/<split>/x.jpg    root/labels/<split>/x.png       or
    root/<split>/images/x.jpg    root/<split>/labels/x.png       or
    root/<split>.txt             an image and its label a line

Folders inside the folders are fine. Labels hold ids or colours (see `revseg.data.class_file`); images of
16 bits, of more than three channels and arrays (.npy) become three channels of bytes as the table says.
"""

from pathlib import Path

import torch
from torch import Tensor

from revseg.data.base import Transform
from revseg.data.channels import ARRAY_ENDINGS, TIFF_ENDINGS, array_size, read_channels, read_id_array
from revseg.data.class_file import read_class_file
from revseg.data.from_files import FileDataset
from revseg.data.images import IMAGE_ENDINGS, LABEL_ENDINGS, read_colours, read_header, read_ids, read_image
from revseg.data.pairs import FilePair, files_by_stem, listed_pairs, paired

TABLES = ("classes.yaml", "classes.yml")
IMAGES = ("images", "image", "imgs", "img")
LABELS = ("labels", "label", "masks", "mask", "annotations")


class Folder(FileDataset):
    """Images and label maps of a folder.

    Args:
        root: The folder.
        split: Any name that the folder has images for.
        table: The class table, a path from here or from the folder; by default classes.yaml in the folder.
        size: (H, W) that image and label are resized to; as stored by default.
        seed: Of what the transform draws.
        samples: Only the first so many; all by default.
        transform: Called with the image, the label and a generator for every sample.

    Raises:
        FileNotFoundError: If the table, a folder, or a file that a list names is missing.
        ValueError: If the table is wrong, there are no images, or images and labels do not belong together.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        table: str | Path | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        samples: int | None = None,
        transform: Transform | None = None,
    ):
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(
                f"expected a folder of images and labels, got {folder}, which is no folder"
            )
        self.meaning = read_class_file(_table(folder, table))
        pairs = _pairs(folder, split, self.meaning.suffixes)
        super().__init__(
            self.meaning.classes, pairs, size=size, seed=seed, samples=samples, transform=transform
        )

    def load_image(self, path: Path) -> Tensor:
        return read_channels(path, self.meaning) if self._is_special(path) else read_image(path)

    def load_label(self, path: Path) -> Tensor:
        if path.suffix.lower() in ARRAY_ENDINGS:
            return torch.from_numpy(self.meaning.classes_of_ids(read_id_array(path), path))
        if self._holds_colours(path):
            return torch.from_numpy(self.meaning.classes_of_colours(read_colours(path), path))
        return torch.from_numpy(self.meaning.classes_of_ids(read_ids(path), path))

    def stored_size(self, path: Path) -> tuple[int, int]:
        ending = path.suffix.lower()
        is_array = ending in ARRAY_ENDINGS or (ending in TIFF_ENDINGS and self._is_special(path))
        return array_size(path) if is_array else read_header(path).size

    def image_problem(self, path: Path) -> str:
        return "" if self._is_special(path) else super().image_problem(path)

    def label_problem(self, path: Path) -> str:
        if path.suffix.lower() in ARRAY_ENDINGS:
            return ""
        if read_header(path).lossy:
            return super().label_problem(path)
        if self._holds_colours(path) and not self.meaning.colours:
            return f"expected class ids, got colours: {path}; to read colours give classes a colour in {self.meaning.path}"
        return ""

    def origin(self) -> dict[str, object]:
        return {**super().origin(), "table": self.meaning.path.read_text(encoding="utf-8-sig")}

    def _is_special(self, path: Path) -> bool:
        """Whether an image needs the channels or the range of the table."""
        given = self.meaning.channels is not None or self.meaning.range is not None
        return given or path.suffix.lower() in ARRAY_ENDINGS

    def _holds_colours(self, path: Path) -> bool:
        if self.meaning.labels is not None:
            return self.meaning.labels == "colours"
        return read_header(path).mode not in ("1", "L", "P", "I", "I;16", "I;16B")


def _table(root: Path, given: str | Path | None) -> Path:
    """The class table: what was given, from here or else from the folder; or one of `TABLES`."""
    if given is not None:
        path = Path(str(given)).expanduser()
        return root / path if not path.is_file() and (root / path).is_file() else path
    for name in TABLES:
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(
        f"expected a class table {root / TABLES[0]}, got none; see the documentation of data sets"
    )


def _pairs(root: Path, split: str, suffixes: tuple[str, str]) -> list[FilePair]:
    """The files of a split, in the first layout that the folder has."""
    listing = root / f"{split}.txt"
    if listing.is_file():
        return listed_pairs(listing)
    layouts = [(root / images / split, root / labels / split) for images in IMAGES for labels in LABELS]
    layouts += [(root / split / images, root / split / labels) for images in IMAGES for labels in LABELS]
    found = next((pair for pair in layouts if pair[0].is_dir() and pair[1].is_dir()), None)
    if found is None:
        raise FileNotFoundError(
            f"no images and labels of the split {split!r} in {root}; expected {layouts[0][0]} and {layouts[0][1]}, "
            f"or {root / split / 'images'} and {root / split / 'labels'}, or a list {listing}"
        )
    images = _by_key(found[0], (*IMAGE_ENDINGS, *ARRAY_ENDINGS), suffixes[0])
    if not images:
        raise ValueError(f"no images in {found[0]}; expected files that end in {', '.join(IMAGE_ENDINGS)}")
    labels = _by_key(found[1], (*LABEL_ENDINGS, *ARRAY_ENDINGS, ".jpg", ".jpeg", ".webp"), suffixes[1])
    return paired(images, labels, *found)


def _by_key(folder: Path, endings: tuple[str, ...], suffix: str) -> dict[str, Path]:
    return {key.removesuffix(suffix): path for key, path in files_by_stem(folder, endings).items()}
