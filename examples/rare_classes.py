"""Weights whose classifier gives rare classes their due: offsets of the scores for the highest mIoU on the training images.

    python examples/rare_classes.py vnet-camvid --data camvid --root CamVid --out better.safetensors

A network is trained for the likelihood of its labels, and judged by the mean IoU over classes, for which the most likely class is
not always the best answer. One number for each class, added to its score, closes a part of that gap and costs nothing: it
becomes the bias of VNet's classifier. It is chosen on the training images, in the lights that training saw, so validation stays what it is.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import revseg
from revseg.data import StrongPhotometric, create_dataset
from revseg.files import save_weights
from revseg.metrics import ConfusionMatrix

STEPS = (1.0, 0.5, 0.25)


@torch.no_grad()
def pixels(model: torch.nn.Module, images: torch.utils.data.Dataset, share: float) -> tuple[Tensor, Tensor]:
    """Scores [C, P] and labels [P] of a random share of the labelled pixels, every image in its own light and in another."""
    numbers, light = torch.Generator().manual_seed(0), StrongPhotometric(p=1.0)
    scores, labels = [], []
    for image, label in (images[i] for i in range(len(images))):
        for seen in (image, light(image, label, numbers)[0]):
            low = model(seen[None])
            large = F.interpolate(low, label.shape, mode="bilinear")[0].flatten(1)
            taken = (label.flatten() != 255) & (torch.rand(label.numel(), generator=numbers) < share)
            scores.append(large[:, taken].half())
            labels.append(label.flatten()[taken])
    return torch.cat(scores, 1), torch.cat(labels)


def mean_iou(scores: Tensor, labels: Tensor, offsets: Tensor) -> float:
    matrix = ConfusionMatrix(len(offsets))
    matrix.update((scores + offsets[:, None].half()).argmax(0).to(torch.uint8), labels)
    return matrix.mean_iou()


def best_offsets(scores: Tensor, labels: Tensor) -> Tensor:
    """[C]: one class after the other, up or down as long as that helps, in ever smaller steps."""
    offsets = torch.zeros(len(scores))
    best = mean_iou(scores, labels, offsets)
    for step in STEPS:
        for k in range(len(offsets)):
            for change in (step, -step):
                while True:
                    tried = offsets.clone()
                    tried[k] += change
                    found = mean_iou(scores, labels, tried)
                    if found <= best:
                        break
                    best, offsets = found, tried
    return offsets


def main(
    weights: str = "vnet-camvid",
    data: str = "camvid",
    root: str | None = None,
    out: str = "better.safetensors",
    share: float = 1 / 16,
    samples: int | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Writes the weights with the offsets, which are returned [C]."""
    model = revseg.load(weights)
    if model.description["model"] != "vnet":
        raise ValueError(f"expected weights of vnet, got those of {model.description['model']}")
    images = create_dataset(data, "train", root=root, samples=samples, size=size)
    model.check_classes(data, images.classes)
    scores, labels = pixels(model, images, share)
    offsets = best_offsets(scores, labels)
    print(
        f"mIoU on pixels of the training images: {100 * mean_iou(scores, labels, 0 * offsets):.2f} %,",
        end=" ",
    )
    print(f"with offsets {100 * mean_iou(scores, labels, offsets):.2f} %")
    for name, offset in zip(images.classes.names, offsets.tolist(), strict=True):
        print(f"{name:>14} {offset:+.2f}")

    state, said = model.network.state_dict(), dict(model.description)
    bias = state.get("classifier.bias", torch.zeros(len(offsets))) + offsets
    said["hyperparameters"] = said["hyperparameters"] | {"classifier_bias": True}
    said["provenance"] = said.get("provenance", {}) | {"offsets of classes": offsets.tolist()}
    save_weights(Path(out), state | {"classifier.bias": bias}, said)
    return offsets


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights")
    parser.add_argument("--data", default="camvid")
    parser.add_argument("--root")
    parser.add_argument("--out", default="better.safetensors")
    options = parser.parse_args()
    main(options.weights, options.data, options.root, options.out)
