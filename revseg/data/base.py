"""What every data set of the library is: pairs of an image and its label map, by index.

Images and labels stay bytes here. A data set says how to load a pair; indexing, the names of
the samples and the transform are the same for all.
"""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.data import Dataset

from revseg.data.classes import ClassTable

Pair = tuple[Tensor, Tensor]
Transform = Callable[[Tensor, Tensor], Pair]


class SegmentationDataset(Dataset[Pair]):
    """Images [3, H, W] with label maps [H, W], both uint8.

    Args:
        classes: The table of the classes.
        names: A name for each sample, without folder and ending; names of output files.
        transform: Called with the image and the label of every sample, returns both.
    """

    def __init__(self, classes: ClassTable, names: Sequence[str], transform: Transform | None = None):
        self.classes = classes
        self.names = tuple(names)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        image, label = self.load(index % len(self))
        return (image, label) if self.transform is None else self.transform(image, label)

    def load(self, index: int) -> Pair:
        """The image and the label of a sample as they are stored, before the transform."""
        raise NotImplementedError


def check_samples(samples: int | None) -> None:
    """Refuses a number of samples below one."""
    if samples is not None and samples < 1:
        raise ValueError(f"expected at least one sample, got {samples}")
