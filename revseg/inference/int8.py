"""Convolutions in 8-bit integers by ONNX Runtime, and what that costs in mIoU.

Static quantization: the ranges of the maps are those that the network reaches on images of the training split, the
weights have a scale for each channel. What is no convolution stays in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from revseg.data import SegmentationDataset
from revseg.inference.export import Run
from revseg.metrics import ConfusionMatrix


def write_int8(path: Path, out: Path, images: Iterable[Tensor]) -> None:
    """The ONNX file of a network with integer convolutions.

    Args:
        path: The file in float32, of `write_onnx`.
        out: The file to write.
        images: Images [3, H, W], uint8, of any sizes that the file takes; some dozens are enough.

    Raises:
        ImportError: If ONNX Runtime is not installed.
        ValueError: If there are no images.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, images: Iterator[Tensor]) -> None:
            self.images, self.count = images, 0

        def get_next(self) -> dict[str, npt.NDArray[np.uint8]] | None:
            image = next(self.images, None)
            self.count += image is not None
            return None if image is None else {"images": image[None].numpy()}

    reader = Reader(iter(images))
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises what the exporter has done already
    try:
        quantize_static(
            path,
            out,
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=["Conv"],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    except ValueError:
        if not reader.count:
            raise ValueError("expected images to take the ranges of the maps from, got none") from None
        raise
    finally:
        logger.setLevel(level)


def miou_of(runs: dict[str, Run], dataset: SegmentationDataset) -> dict[str, float]:
    """The mean IoU of each file that gives labels, on the same images.

    Args:
        runs: By name: images [1, 3, H, W], uint8, to labels [1, H, W].
        dataset: Of the classes that the files tell apart.
    """
    matrices = {name: ConfusionMatrix(len(dataset.classes)) for name in runs}
    for i in range(len(dataset)):
        image, label = dataset[i]
        for name, run in runs.items():
            matrices[name].update(run(image[None]), label[None])
    return {name: matrix.mean_iou() for name, matrix in matrices.items()}
