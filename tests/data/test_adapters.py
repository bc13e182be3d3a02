"""Transforms of other libraries: the same samples from the same generator, and no trace left."""

import random
import sys
import types

import numpy as np
import pytest
import torch

from revseg.data import AlbumentationsTransform, TorchvisionTransform, create_dataset

IMAGE = torch.arange(3 * 6 * 8, dtype=torch.uint8).view(3, 6, 8)
LABEL = torch.arange(48, dtype=torch.uint8).view(6, 8)


def drawing(seed):
    return torch.Generator().manual_seed(seed)


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def flips(image, mask):
    """In the style of albumentations; draws from Python, numpy and torch."""
    if random.random() < 0.5:
        image, mask = image[::-1], mask[::-1]
    if np.random.rand() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    shift = int(torch.randint(3, ()))
    return {"image": np.roll(image, shift, 0), "mask": np.roll(mask, shift, 0)}


def both(image, mask):
    changed = flips(image.permute(1, 2, 0).numpy(), mask.numpy())
    return torch.from_numpy(changed["image"].copy()).permute(2, 0, 1), torch.from_numpy(
        changed["mask"].copy()
    )


@pytest.mark.parametrize("adapter", [AlbumentationsTransform(flips), TorchvisionTransform(both)])
def test_the_generator_decides(adapter):
    before = states()
    results = {}
    for seed in range(12):
        image, label = adapter(IMAGE, LABEL, drawing(seed))
        again, label_again = adapter(IMAGE, LABEL, drawing(seed))
        assert torch.equal(image, again)
        assert torch.equal(label, label_again)
        assert torch.equal(image[0], label)  # both went the same way
        results[tuple(label.flatten().tolist())] = seed
    assert len(results) > 5
    assert states() == before


def test_defaults_are_restored_after_an_error():
    def fails(image, mask):
        random.random()
        raise RuntimeError("no")

    before = states()
    with pytest.raises(RuntimeError):
        TorchvisionTransform(fails)(IMAGE, LABEL, drawing(0))
    assert states() == before


def test_a_seed_of_its_own():
    class Own:
        def set_random_seed(self, seed):
            self.values = np.random.default_rng(seed)

        def __call__(self, image, mask):
            shift = self.values.integers(8)
            return {"image": np.roll(image, shift, 1), "mask": np.roll(mask, shift, 1)}

    adapter = AlbumentationsTransform(Own())
    labels = [adapter(IMAGE, LABEL, drawing(seed))[1] for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(labels[0], labels[1])
    assert len({tuple(label.flatten().tolist()) for label in labels}) > 2


def test_torchvision_knows_which_is_the_mask(monkeypatch):
    class Image(torch.Tensor):
        pass

    class Mask(torch.Tensor):
        pass

    module = types.ModuleType("torchvision.tv_tensors")
    module.Image, module.Mask = lambda x: x.as_subclass(Image), lambda x: x.as_subclass(Mask)
    monkeypatch.setitem(sys.modules, "torchvision.tv_tensors", module)

    def transform(image, mask):
        assert isinstance(image, Image)
        assert isinstance(mask, Mask)
        return image, mask

    image, label = TorchvisionTransform(transform)(IMAGE, LABEL, drawing(0))
    assert type(image) is type(label) is torch.Tensor


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            lambda image, mask: (image.float() / 255, mask),
            r"image \[3, H, W\] of uint8, got torch\.float32 .*leave",
        ),
        (lambda image, mask: (image, mask.long()), r"label \[H, W\] of uint8, got torch\.int64"),
        (lambda image, mask: (image, mask[None]), r"label \[H, W\] of uint8, got torch\.uint8 \[1, 6, 8\]"),
        (lambda image, mask: (image[:, :3], mask), r"one size, got \[3, 3, 8\] and \[6, 8\]"),
    ],
)
def test_what_comes_back_is_checked(transform, message):
    with pytest.raises(ValueError, match=message):
        TorchvisionTransform(transform)(IMAGE, LABEL, drawing(0))
    with pytest.raises(TypeError, match="image and label, got Tensor"):
        TorchvisionTransform(lambda image, mask: image)(IMAGE, LABEL, drawing(0))


def test_in_a_data_set():
    dataset = create_dataset("synthetic", "train", size=(32, 48), transform=AlbumentationsTransform(flips))
    assert torch.equal(dataset[3][0], dataset[3][0])
    first = dataset[3][0]
    dataset.set_epoch(1)
    assert not torch.equal(dataset[3][0], first)
