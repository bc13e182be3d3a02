"""CamVid in the 360 x 480 edition with 11 classes, as folders or as list files.

    root/train/x.png  root/trainannot/x.png     image and label share the stem
    root/train.txt                              an image and its label a line; used when present

List files travel with the paths of the machine that wrote them (`/SegNet/CamVid/train/x.png`),
so a path is also looked for under `root` by its last parts. What belongs together is checked
when the data set is made, the contents of a file when it is loaded.

Source: Brostow et al., Semantic object classes in video, Pattern Recognition Letters 2009; the
edition is that of Badrinarayanan et al., SegNet, arXiv:1511.00561.
"""

from collections.abc import Iterator
from pathlib import Path

from revseg.data.base import Pair, SegmentationDataset, Transform, check_samples
from revseg.data.classes import CAMVID
from revseg.data.images import IMAGE_ENDINGS, read_image, read_label

SPLITS = ("train", "val", "test")

UNLABELLED = 11  # the id of pixels without a class in the files


class CamVid(SegmentationDataset):
    """CamVid: 367 training, 101 validation and 233 test images in its usual edition.

    Args:
        root: The folder that holds the folders or list files of the splits.
        split: "train", "val" or "test".
        samples: Only the first so many; all by default.
        transform: Called with the image and the label of every sample, returns both.

    Raises:
        FileNotFoundError: If a folder, or a file that a list names, is missing.
        ValueError: If there are no images, or images and labels do not belong together.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        samples: int | None = None,
        transform: Transform | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of camvid; choose one of {', '.join(SPLITS)}")
        check_samples(samples)
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"expected the folder of CamVid, got {folder}, which is no folder")
        listing = folder / f"{split}.txt"
        pairs = _listed_pairs(listing) if listing.is_file() else _folder_pairs(folder, split)
        self.pairs = pairs[:samples]
        super().__init__(CAMVID, [image.stem for image, _ in self.pairs], transform)

    def load(self, index: int) -> Pair:
        image_path, label_path = self.pairs[index]
        image, label = read_image(image_path), read_label(label_path)
        if image.shape[1:] != label.shape:
            raise ValueError(
                f"expected image and label of one size, got {list(image.shape[1:])} for {image_path} "
                f"and {list(label.shape)} for {label_path}"
            )
        if (highest := int(label.max())) > UNLABELLED:
            raise ValueError(f"expected labels 0 to {UNLABELLED}, got {highest}: {label_path}")
        return image, label.masked_fill(label == UNLABELLED, CAMVID.ignore)


def _folder_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """The images of a split and their labels, sorted by stem."""
    image_folder, label_folder = root / split, root / f"{split}annot"
    images = _by_stem(image_folder, IMAGE_ENDINGS)
    labels = _by_stem(label_folder, (".png",))
    if not images:
        raise ValueError(
            f"no images in {image_folder}; expected files that end in {', '.join(IMAGE_ENDINGS)}"
        )
    if alone := sorted(images.keys() - labels.keys()):
        raise ValueError(f"{len(alone)} images without a label in {label_folder}, first {images[alone[0]]}")
    if alone := sorted(labels.keys() - images.keys()):
        raise ValueError(f"{len(alone)} labels without an image in {image_folder}, first {labels[alone[0]]}")
    return [(images[stem], labels[stem]) for stem in sorted(images)]


def _by_stem(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"missing folder {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in endings:
            continue
        if path.stem in files:
            raise ValueError(f"expected one file for {path.stem}, got {files[path.stem]} and {path}")
        files[path.stem] = path
    return files


def _listed_pairs(listing: Path) -> list[tuple[Path, Path]]:
    """The pairs of a list file, in its order."""
    pairs: dict[str, tuple[Path, Path]] = {}
    for place, line in _lines(listing):
        words = line.split()
        if len(words) != 2:
            raise ValueError(f"{place}: expected the paths of an image and its label, got {line.strip()!r}")
        image, label = (_locate(Path(word), listing.parent, place) for word in words)
        if image.stem in pairs:
            raise ValueError(f"{place}: the image {image.stem} is listed twice")
        pairs[image.stem] = image, label
    if not pairs:
        raise ValueError(f"no images in the list {listing}")
    return list(pairs.values())


def _lines(listing: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, with their places for errors."""
    text = listing.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{listing}, line {number}", line


def _locate(path: Path, root: Path, place: str) -> Path:
    """The file that a list means: there, under root, or under root by its last parts.

    At least a folder and a file name must agree: an image and its label share the file name. The
    ending may be another one, for the images may have been converted since.
    """
    parts = path.parts[1:] if path.is_absolute() else path.parts
    tails = [Path(*parts[start:]) for start in range(max(1, len(parts) - 1))]
    candidates = [path] * path.is_absolute() + [root / path, root.parent / path]
    candidates += [root / tail for tail in tails]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    for candidate in candidates:
        for ending in IMAGE_ENDINGS:
            if (converted := candidate.with_suffix(ending)).is_file():
                return converted
    raise FileNotFoundError(f"{place}: cannot find {path}, also not by its last parts under {root}")
