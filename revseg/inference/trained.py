"""A trained network together with its classes: from a weights file to labels.

Weights alone do not say what they tell apart. The header of a file of `revseg train` names the network, its
classes, their colours and where the weights come from, so one file is all that prediction needs.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from revseg.data.classes import CAMVID, CITYSCAPES, ClassTable
from revseg.data.images import read_image
from revseg.files import load_weights
from revseg.inference.augmented import Augmentation, scores_of
from revseg.inference.automatic import AutomaticRunner
from revseg.inference.runner import Runner
from revseg.inference.settings import PREDICTING
from revseg.inference.windows import TensorRows, Windows, predict_rows
from revseg.losses import of_two_classes
from revseg.models import load_model
from revseg.ops import upsample_argmax

SHIPPED = Path(__file__).parents[1] / "weights"


class TrainedNetwork(nn.Module):
    """A network with weights, its classes, and what is known of its training.

    ```python
    model = revseg.load("runs/train/best.safetensors")
    labels = model.predict("street.png")           # [H, W], uint8
    picture = model.classes.colorize(labels)       # [H, W, 3], uint8
    ```

    Args:
        network: Takes images [N, 3, H, W], gives logits [N, C, h, w] at its `stride`.
        classes: Names and colours of its C classes.
        description: What the header of the weights file says.

    Raises:
        ValueError: If the number of classes is not that of the network.
    """

    def __init__(
        self, network: nn.Module, classes: ClassTable, description: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = classes
        self.description = dict(description or {})
        self.stride = int(network.stride)  # type: ignore[arg-type]
        count = self.description.get("num_classes", len(classes))
        count = 2 if count == 1 else count  # a thing, and what is around it
        if count != len(classes):
            raise ValueError(f"expected names for {count} classes, got {len(classes)}: {classes.names}")

    def check_classes(self, data: str, classes: ClassTable) -> None:
        """Refuses a data set of other classes.

        Args:
            data: Its name.
            classes: What it tells apart.

        Raises:
            ValueError: If they differ in number, names or order.
        """
        if self.classes.names != classes.names:
            own, others = (
                f"{len(table)} classes ({', '.join(table.names[:3])}, ...)"
                for table in (self.classes, classes)
            )
            raise ValueError(
                f"the network tells apart {own}, {data} {others}: --data is to be the data set that it was "
                "trained on"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, C, h, w] of the main head for images [N, 3, H, W], uint8 or already normalised."""
        return _main_head(self.network(images))

    def with_runtime(
        self, runtime: str = "auto", tell: Callable[[str], object] | None = None
    ) -> TrainedNetwork:
        """The same, run by another runtime; for evaluation alone.

        ```python
        model = revseg.load("vnet-camvid").with_runtime("onnx")
        ```

        Args:
            runtime: "pytorch", batch norm folded; "compile", torch.compile; "onnx", ONNX Runtime, on a CPU; "auto", by
                PyTorch, and by ONNX Runtime once so many images of a size have come that preparing it pays, if it is
                installed and found to be faster.
            tell: Is told in sentences what was prepared and chosen, as in `tell=print`.

        Returns:
            A network of its own: later changes of the weights do not reach it.

        Memory: what ONNX Runtime takes is no part of what torch counts.

        Numerics: scores of two runtimes differ by rounding, so that a few pixels may be of another class where two
            classes are level. Every runtime is compared with PyTorch on the first image that it runs.

        Raises:
            ImportError: If packages of the runtime are not installed.
            ValueError: If there is no such runtime, or it does not run on the device of the network.
        """
        network = self.network.plain.network if isinstance(self.network, Runner) else self.network
        if runtime not in PREDICTING:
            raise ValueError(f"unknown runtime {runtime!r}; choose one of {', '.join(PREDICTING)}")
        runner = AutomaticRunner(network, tell) if runtime == "auto" else Runner(network, runtime, tell)
        return TrainedNetwork(runner, self.classes, self.description)

    @torch.no_grad()
    def predict(
        self, image: Any, *, windows: Windows | None = None, augmentation: Augmentation | None = None
    ) -> Tensor:
        """The class of every pixel.

        Args:
            image: The path of an image; a PIL image; an array [H, W, 3] or [H, W], uint8; or a tensor [3, H, W] or
                [N, 3, H, W], uint8 or already normalised. Any size.
            windows: How an image larger than the device's memory is gone through; as a whole by default.
            augmentation: Scales and mirror images whose scores are averaged; the image as it is by default.

        Returns:
            Class ids [H, W], or [N, H, W] for a batch, uint8, on the CPU. The mode of the network (training or
            evaluation) is as before.

        Memory: less than a training step of the image takes; with windows that of one window, and the scores of a
            row of windows at the stride of the network.

        Raises:
            TypeError: If the image is of none of these kinds.
            ValueError: If its shape is none of these.
        """
        images, single = as_images(image)
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()
        try:
            labels = [self._labels(each, windows, augmentation) for each in torch.split(images, 1)]
        finally:
            for module, mode in modes:
                module.training = mode
        return labels[0] if single else torch.stack(labels)

    def scores(self, image: Tensor, augmentation: Augmentation | None = None, window: bool = False) -> Tensor:
        """Scores [1, C, h, w] of an image [1, 3, H, W] that may lie on another device: logits, or mean probabilities.

        Args:
            image: uint8 or already normalised.
            augmentation: What to average over.
            window: Whether it is a window of an image. Windows are there to save memory: no runtime that was not named
                is prepared for them.
        """
        image = image.to(next(self.network.parameters()).device)
        run = self.network
        if window and isinstance(run, AutomaticRunner):
            run = run.plain

        def logits(images: Tensor) -> Tensor:
            return _main_head(run(images))

        return logits(image) if augmentation is None else scores_of(logits, image, self.stride, augmentation)

    def _labels(self, image: Tensor, windows: Windows | None, augmentation: Augmentation | None) -> Tensor:
        if windows is None:
            return upsample_argmax(self.scores(image, augmentation), image.shape[2:])[0].cpu()
        scores = partial(self.scores, augmentation=augmentation, window=True)
        strips = predict_rows(scores, TensorRows(image[0]), self.stride, windows)
        return torch.cat([strip.cpu() for strip in strips])


def shipped_weights() -> dict[str, Path]:
    """The weights files that the library brings, by name; beside each lies its model card."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.safetensors"))}


def load(path: str | os.PathLike[str], **hyperparameters: object) -> TrainedNetwork:
    """The network of a weights file with its classes, in evaluation mode, on the CPU.

    Args:
        path: A safetensors file, as `revseg train` writes it; or the name of one that is shipped.
        **hyperparameters: Replace those in the file, as in `memory="lowest"`.

    Raises:
        CheckpointError: If the file is damaged, from elsewhere, or does not fit the network.
        FileNotFoundError: If there is no such file.
    """
    shipped = shipped_weights()
    path = shipped.get(str(path), Path(path).expanduser())
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a weights file or a name of shipped ones ({', '.join(shipped)}), got {path}, which does not exist"
        )
    network = load_model(path, **hyperparameters)
    description = load_weights(path)[1]
    return TrainedNetwork(network, classes_of(description), description)


def classes_of(description: dict[str, Any]) -> ClassTable:
    """Names and colours of the classes; of older files, which hold names alone, colours of the data set or a wheel."""
    count = description["num_classes"]
    unnamed = ("background", "object") if count == 1 else tuple(f"class {i}" for i in range(count))
    names = tuple(description.get("classes") or unnamed)
    if "colours" in description:
        return ClassTable(names, tuple((r, g, b) for r, g, b in description["colours"]))
    known = next((table for table in (CITYSCAPES, CAMVID) if table.names == names), None)
    return known or ClassTable(names, tuple(_wheel(i, len(names)) for i in range(len(names))))


def as_images(image: Any) -> tuple[Tensor, bool]:
    """Images [N, 3, H, W] from what `predict` takes, and whether it was one image.

    Raises:
        TypeError: If the image is of no kind that is known.
        ValueError: If its shape is none of those.
    """
    if isinstance(image, str | os.PathLike):
        image = read_image(Path(image).expanduser())
    elif hasattr(image, "convert"):  # of PIL, which need not be installed
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"expected an array of bytes (uint8), got {image.dtype}")
        pixels = image if image.ndim == 3 else np.stack([image] * 3, -1) if image.ndim == 2 else None
        if pixels is None or pixels.shape[2] != 3:
            raise ValueError(f"expected an array [H, W, 3] or [H, W], got shape {list(image.shape)}")
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()
    if not isinstance(image, Tensor):
        raise TypeError(f"expected a path, a PIL image, an array or a tensor, got {type(image).__name__}")
    single = image.ndim == 3
    images = image[None] if single else image
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"expected a tensor [3, H, W] or [N, 3, H, W], got shape {list(image.shape)}")
    return images, single


def _main_head(logits: Tensor | tuple[Tensor, ...]) -> Tensor:
    return of_two_classes(logits if isinstance(logits, Tensor) else logits[0])


def _wheel(i: int, count: int) -> tuple[int, int, int]:
    """A colour of its own for each class, in turns light and dark."""
    r, g, b = colorsys.hsv_to_rgb(i / max(count, 1), 0.75, 0.95 if i % 2 else 0.65)
    return round(255 * r), round(255 * g), round(255 * b)
