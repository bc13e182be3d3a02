"""Cityscapes over miniature trees with the real names."""

import numpy as np
import pytest
import torch
from PIL import Image

from revseg.data import CITYSCAPES, Cityscapes, create_dataset
from revseg.data.cityscapes import LABEL_IDS

SIZE = (6, 10)


def write_frame(
    root, split="train", city="aachen", frame="000000_000019", truth="gtFine", seed=0, kinds=("labelIds",)
):
    values = np.random.default_rng(seed)
    images, labels = root / "leftImg8bit" / split / city, root / truth / split / city
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    picture = values.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    ids = values.integers(0, 34, SIZE, dtype=np.uint8)
    stem = f"{city}_{frame}" if "_" not in city else frame
    Image.fromarray(picture).save(images / f"{stem}_leftImg8bit.png")
    trained = np.full(256, 255, dtype=np.uint8)
    trained[list(LABEL_IDS)] = np.arange(19)
    stored = {"labelIds": ids, "labelTrainIds": trained[ids], "instanceIds": ids, "color": picture}
    for kind in kinds:
        Image.fromarray(stored[kind]).save(labels / f"{stem}_{truth}_{kind}.png")
    return picture, trained[ids]


def test_ids_are_mapped_as_they_are_loaded(tmp_path):
    frames = [write_frame(tmp_path, city=city, seed=seed, kinds=("labelIds", "instanceIds", "color"))
              for seed, city in enumerate(("ulm", "aachen"))]  # fmt: skip
    dataset = Cityscapes(tmp_path, "train")
    assert dataset.classes is CITYSCAPES
    assert dataset.names == ("aachen_000000_000019", "ulm_000000_000019")
    for (image, label), (picture, classes) in zip(dataset, frames[::-1], strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), picture)
        assert np.array_equal(label.numpy(), classes)
    dataset.verify()
    assert create_dataset("cityscapes", "train", root=tmp_path, size=(3, 5))[0][1].shape == (3, 5)


def test_the_table_of_ids_is_the_official_one():
    # id of each class in cityscapesScripts, helpers/labels.py
    official = {
        "road": 7,
        "building": 11,
        "pole": 17,
        "sky": 23,
        "rider": 25,
        "car": 26,
        "train": 31,
        "bicycle": 33,
    }
    for name, label_id in official.items():
        assert LABEL_IDS[CITYSCAPES.names.index(name)] == label_id


def test_train_ids_are_recognised(tmp_path):
    _, classes = write_frame(tmp_path, kinds=("labelTrainIds",))
    assert np.array_equal(Cityscapes(tmp_path, "train")[0][1].numpy(), classes)
    write_frame(tmp_path, kinds=("labelIds",))
    assert np.array_equal(Cityscapes(tmp_path, "train")[0][1].numpy(), classes)


def test_coarse_labels(tmp_path):
    _, classes = write_frame(tmp_path, "train_extra", truth="gtCoarse")
    assert np.array_equal(Cityscapes(tmp_path, "train_extra")[0][1].numpy(), classes)
    write_frame(tmp_path, "train", truth="gtCoarse")
    assert len(create_dataset("cityscapes", "train", root=tmp_path, labels="coarse")) == 1
    with pytest.raises(FileNotFoundError, match=r"missing folder .*gtFine.train"):
        Cityscapes(tmp_path, "train")
    with pytest.raises(ValueError, match="the split train_extra has coarse labels only"):
        Cityscapes(tmp_path, "train_extra", labels="fine")


def test_frames_of_one_name_in_two_cities(tmp_path):
    frames = [
        write_frame(tmp_path, city=city, frame="000019", seed=i) for i, city in enumerate(("a_1", "b_1"))
    ]
    dataset = Cityscapes(tmp_path, "train")
    assert dataset.names == ("a_1_000019", "b_1_000019")
    assert [np.array_equal(dataset[i][1].numpy(), frames[i][1]) for i in range(2)] == [True, True]


def test_what_is_alone_is_named(tmp_path):
    write_frame(tmp_path)
    write_frame(tmp_path, frame="000001_000019", kinds=())
    with pytest.raises(
        ValueError, match=r"aachen_000001_000019_leftImg8bit\.png: an image without a label in"
    ):
        Cityscapes(tmp_path, "train")
    next((tmp_path / "leftImg8bit").rglob("*000001*")).unlink()
    next((tmp_path / "leftImg8bit").rglob("*000000*")).unlink()
    with pytest.raises(ValueError, match=r"no images in .*train; expected <city>/\*_leftImg8bit\.png"):
        Cityscapes(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"missing folder .*val; expected the folder of Cityscapes"):
        Cityscapes(tmp_path, "val")


def test_unknown_ids_are_counted(tmp_path):
    write_frame(tmp_path)
    path = next((tmp_path / "gtFine").rglob("*labelIds.png"))
    ids = np.zeros(SIZE, dtype=np.uint8)
    ids[0, :3] = 77
    Image.fromarray(ids).save(path)
    with pytest.raises(ValueError, match=r"label ids 0 to 33 or 255, got 77 in 3 pixels: .*labelIds\.png"):
        Cityscapes(tmp_path, "train")[0]


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="unknown split 'trian' of cityscapes; choose one of train, val"):
        Cityscapes(tmp_path, "trian")
    with pytest.raises(ValueError, match="unknown labels 'course' of cityscapes; choose one of fine, coarse"):
        Cityscapes(tmp_path, "train", labels="course")
    with pytest.raises(
        ValueError, match=r"unknown option 'label' of the data set cityscapes.*did you mean 'labels'"
    ):
        create_dataset("cityscapes", "train", root=tmp_path, label="fine")


def test_a_whole_frame(tmp_path):
    # the real size, once: 1024 x 2048
    write_frame(tmp_path)
    for path in tmp_path.rglob("*.png"):
        Image.open(path).resize((2048, 1024), 0).save(path)
    image, label = Cityscapes(tmp_path, "train")[0]
    assert image.shape == (3, 1024, 2048)
    assert label.shape == (1024, 2048)
    assert label.dtype == torch.uint8
