"""What an examination finds: broken samples by name, and what is only odd."""

import numpy as np
import pytest
import torch

from revseg.data import ClassTable, SegmentationDataset, SyntheticStreets, create_dataset
from revseg.data.draw import draw_sheet, draw_statistics, overlay
from revseg.data.examine import examine, oddities
from revseg.data.images import read_image
from revseg.data.synthetic.export import write_cityscapes

TABLE = ClassTable(("road", "car", "train"), ((9, 9, 9), (0, 0, 200), (200, 0, 0)))


class Given(SegmentationDataset):
    def __init__(self, **pairs):
        super().__init__(TABLE, list(pairs))
        self.pairs = list(pairs.values())

    def load(self, index):
        if isinstance(self.pairs[index], Exception):
            raise self.pairs[index]
        return self.pairs[index]


def pair(seed, size=(20, 30), label=0):
    image = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, *size), dtype=np.uint8))
    return image, torch.full(size, label, dtype=torch.uint8)


def test_numbers():
    mixed = pair(1)
    mixed[1][:5] = 1
    mixed[1][5:10] = 255
    report = examine(Given(a=pair(0), b=mixed, c=ValueError("cannot read x.png"), d=OSError("gone: y.png")))
    assert report.problems == ["cannot read x.png", "gone: y.png"]
    assert report.sizes == {(20, 30): 2}
    assert report.pixels == [600 + 300, 150, 0]
    assert report.images_with == [2, 1, 0]
    assert report.labelled == 1050 / 1200
    assert report.as_json()["classes"]["car"] == {"pixels": 150, "share": 150 / 1050, "samples": 1}


def test_oddities():
    rare = pair(3)
    rare[1][0, :1] = 2
    rare[1][0, 1:] = 1
    flat = torch.full((3, 20, 30), 7, dtype=torch.uint8), torch.ones(20, 30, dtype=torch.uint8)
    few = pair(5)
    few[1][2:] = 255
    train = Given(a=pair(0), b=pair(1, (10, 30)), c=pair(0), d=pair(2, label=255), e=flat, f=few)
    reports = {"train": examine(train), "val": examine(Given(x=pair(1, (10, 30)), y=rare))}
    for sample in reports["val"].samples:
        assert sample.problem == ""
    assert oddities(reports) == [
        "train: samples of 2 sizes: 20 x 30 (5), 10 x 30 (1); batches need --size or a crop",
        "train: classes that never occur: train",
        "train: samples without any labelled pixel: d",
        "train: samples with less than half of their pixels labelled: f",
        "train: images of one colour: e",
        "val: samples of 2 sizes: 10 x 30 (1), 20 x 30 (1); batches need --size or a crop",
        "images that occur in two splits: 1: train/b = val/x",
        "images that occur twice in a split: 1: train/a = train/c",
    ]


def test_rare_classes():
    large = pair(0, (200, 300))
    large[1][0, :2] = 1
    large[1][1:, :150] = 2
    assert oddities({"train": examine(Given(a=large))}) == [
        "train: classes with less than 0.0001 of the pixels: car (3.3e-05)"
    ]


def test_workers_find_the_same():
    dataset = create_dataset("synthetic", "val", size=(32, 48), samples=4)
    assert examine(dataset).samples == examine(dataset, workers=2).samples


def test_overlay():
    image, label = pair(0)
    label[:10] = 255
    picture = overlay(image, label, TABLE)
    assert torch.equal(picture[:, :10], image[:, :10])
    expected = (image[0, 10:].float() * 0.45 + 9 * 0.55).round()
    assert float((picture[0, 10:].float() - expected).abs().max()) <= 1


def test_pictures(tmp_path):
    dataset = create_dataset("synthetic", "val", size=(32, 64), samples=2)
    draw_sheet(tmp_path / "a" / "samples.png", [dataset[0], dataset[1]], dataset.classes)
    assert read_image(tmp_path / "a" / "samples.png").shape == (3, 2 * 244, 3 * 484)
    draw_statistics(tmp_path / "classes.png", {"val": examine(dataset), "train": examine(dataset)})
    assert int(read_image(tmp_path / "classes.png").float().std()) > 10


def test_scenes_in_the_folders_of_cityscapes(tmp_path):
    scenes = SyntheticStreets("val", size=(48, 96), samples=5, seed=4)
    steps = []
    write_cityscapes(scenes, tmp_path, "val", lambda: steps.append(1))
    assert len(steps) == 5
    stored = create_dataset("cityscapes", "val", root=tmp_path)
    stored.verify()
    by_place = sorted(range(5), key=lambda i: stored.names[i].split("_")[1])
    for index, place in enumerate(by_place):
        for ours, theirs in zip(scenes[index], stored[place], strict=True):
            assert torch.equal(ours, theirs)
    for path in (tmp_path / "gtFine").rglob("*_labelIds.png"):
        path.unlink()
    assert torch.equal(
        create_dataset("cityscapes", "val", root=tmp_path)[0][1], stored_label(scenes, by_place)
    )


def stored_label(scenes, by_place):
    return scenes[by_place.index(0)][1]


@pytest.mark.parametrize("method", ["load", "origin", "sample_origin"])
def test_the_base_says_what_is_missing(method):
    dataset = SegmentationDataset(TABLE, ["a"])
    with pytest.raises(NotImplementedError):
        getattr(dataset, method)(*([0] if method != "origin" else []))
    dataset.verify()
