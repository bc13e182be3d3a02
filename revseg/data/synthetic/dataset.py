"""Street scenes that are generated instead of read: nothing to download, any size, any number.

A scene is a function of the seed, the split and the index, and of the size it is painted at.
Classes, their ids and roughly their shares are those of Cityscapes. Every split has cities of
its own, and every city its own colours, so colour alone does not carry over from training to
validation.
"""

import torch

from revseg.data.base import Pair, SegmentationDataset, Transform, check_samples, check_split
from revseg.data.classes import CITYSCAPES
from revseg.data.synthetic import render as synthetic_render
from revseg.data.synthetic.canvas import Canvas
from revseg.data.synthetic.city import found_city
from revseg.data.synthetic.dials import Box, Dials, dialled_street
from revseg.data.synthetic.dice import Dice
from revseg.data.synthetic.scene import painted_street

SPLITS = {"train": 500, "val": 100, "test": 100}  # with the number of samples

MINIMUM = 32  # pixels on each side

CITIES = 12  # of each split

VERSION = 1  # of the scenes: another one when the same seed gives other bytes


class SyntheticStreets(SegmentationDataset):
    """Generated street scenes with the 19 classes of Cityscapes.

    Args:
        split: "train", "val" or "test".
        size: (H, W) of the scenes, at least 32 each.
        seed: Another seed gives other cities and scenes, and other draws of the transform.
        samples: How many scenes; by default 500 for training and 100 otherwise.
        transform: Called with the image, the label and a generator for every sample.
        thin: A dial from 0 to 1: how many things are a few pixels wide. With any dial set the others are at 0,
            and what no dial asks for is large and has the colour of its class: see `revseg.data.synthetic.dials`.
        small: A dial: how many far signs and signal heads there are.
        context: A dial: in how many scenes an arrow far away says what the ground is.

    Raises:
        ValueError: If the split is unknown, the size too small, the seed negative, a dial out of range or
            there are no samples.
    """

    def __init__(
        self,
        split: str,
        *,
        size: tuple[int, int] = (256, 512),
        seed: int = 0,
        samples: int | None = None,
        transform: Transform | None = None,
        thin: float | None = None,
        small: float | None = None,
        context: float | None = None,
    ):
        check_split(split, tuple(SPLITS), "synthetic")
        if len(size) != 2 or min(size) < MINIMUM:
            raise ValueError(f"expected a size (H, W) of at least {MINIMUM} each, got {size}")
        check_samples(samples)
        self.drawn_size = int(size[0]), int(size[1])
        self.stream = seed, list(SPLITS).index(split)
        set_dials = [dial for dial in (thin, small, context) if dial is not None]
        self.dials = Dials(thin or 0.0, small or 0.0, context or 0.0) if set_dials else None
        count = SPLITS[split] if samples is None else samples
        super().__init__(
            CITYSCAPES,
            [f"{split}_{index:06d}" for index in range(count)],
            transform,
            seed=seed,
            size=self.drawn_size,
        )

    def load(self, index: int) -> Pair:
        canvas, _, dice, grain = self._painted(index)
        image = synthetic_render.image(canvas, dice, grain)
        return torch.from_numpy(image), torch.from_numpy(synthetic_render.label_map(canvas))

    def cue(self, index: int) -> Box | None:
        """Top, left, bottom and right of the arrow that the ground of a scene is read by; None without one."""
        return self._painted(index)[1]

    def city(self, index: int) -> int:
        """The number of the city in which a scene lies, below `CITIES`."""
        return Dice(*self.stream, 1, index).integer(0, CITIES - 1)

    def origin(self) -> dict[str, object]:
        return {
            "kind": "SyntheticStreets",
            "version": VERSION,
            "stream": self.stream,
            "size": self.size,
            "dials": str(self.dials),
        }

    def sample_origin(self, index: int) -> object:
        return index

    def _painted(self, index: int) -> tuple[Canvas, Box | None, Dice, Dice]:
        dice, grain = Dice(*self.stream, 1, index), Dice(*self.stream, 2, index)
        city = found_city(Dice(*self.stream, 3, dice.integer(0, CITIES - 1)))
        if self.dials is None:
            return painted_street(self.drawn_size, city, dice, grain), None, dice, grain
        return *dialled_street(self.drawn_size, city, dice, grain, self.dials), dice, grain
