"""CamVid in the 360 x 480 edition with 11 classes, as folders or as list files.

    root/train/x.png  root/trainannot/x.png     image and label share the stem
    root/train.txt                              an image and its label a line; used when present

Pixels without a class are stored as 11, in some copies as 255.

Source: Brostow et al., Semantic object classes in video, Pattern Recognition Letters 2009; the
edition is that of Badrinarayanan et al., SegNet, arXiv:1511.00561.
"""

from pathlib import Path

from torch import Tensor

from revseg.data.base import Transform, check_split
from revseg.data.classes import CAMVID
from revseg.data.from_files import FileDataset
from revseg.data.images import IMAGE_ENDINGS, LABEL_ENDINGS, read_label
from revseg.data.pairs import FilePair, files_by_stem, listed_pairs, paired

SPLITS = ("train", "val", "test")

UNLABELLED = 11  # the id of pixels without a class in the files


class CamVid(FileDataset):
    """CamVid: 367 training, 101 validation and 233 test images in its usual edition.

    Args:
        root: The folder that holds the folders or list files of the splits.
        split: "train", "val" or "test".
        size: (H, W) that image and label are resized to; as stored by default.
        seed: Of what the transform draws.
        samples: Only the first so many; all by default.
        transform: Called with the image, the label and a generator for every sample.

    Raises:
        FileNotFoundError: If a folder, or a file that a list names, is missing.
        ValueError: If there are no images, or images and labels do not belong together.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        samples: int | None = None,
        transform: Transform | None = None,
    ):
        check_split(split, SPLITS, "camvid")
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"expected the folder of CamVid, got {folder}, which is no folder")
        listing = folder / f"{split}.txt"
        pairs = listed_pairs(listing) if listing.is_file() else _folder_pairs(folder, split)
        super().__init__(CAMVID, pairs, size=size, seed=seed, samples=samples, transform=transform)

    def load_label(self, path: Path) -> Tensor:
        label = read_label(path)
        unknown = label[(label > UNLABELLED) & (label != CAMVID.ignore)]
        if unknown.numel():
            raise ValueError(
                f"expected labels 0 to {UNLABELLED} or {CAMVID.ignore}, got {int(unknown.max())}: {path}"
            )
        return label.masked_fill(label == UNLABELLED, CAMVID.ignore)


def _folder_pairs(root: Path, split: str) -> list[FilePair]:
    """The images of a split and their labels, sorted by stem."""
    image_folder, label_folder = root / split, root / f"{split}annot"
    images = files_by_stem(image_folder, IMAGE_ENDINGS)
    labels = files_by_stem(label_folder, (*LABEL_ENDINGS, ".jpg", ".jpeg"))  # those are refused when read
    if not images:
        raise ValueError(
            f"no images in {image_folder}; expected files that end in {', '.join(IMAGE_ENDINGS)}"
        )
    return paired(images, labels, image_folder, label_folder)
