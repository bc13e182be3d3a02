"""A cache gives bitwise the samples it was made from, or says why it does not."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from revseg.data import CachedDataset, Compose, PhotometricJitter, RandomHorizontalFlip, create_dataset
from revseg.data.cache import write_cache

CHANGES = Compose([RandomHorizontalFlip(), PhotometricJitter()])


@pytest.fixture
def root(tmp_path):
    values = np.random.default_rng(0)
    for split in ("train", "trainannot"):
        (tmp_path / "set" / split).mkdir(parents=True)
    for i, size in enumerate([(6, 9), (5, 7), (6, 9), (8, 4)]):
        picture = values.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"set/train/{i}.png")
        Image.fromarray(values.integers(0, 12, size, dtype=np.uint8)).save(
            tmp_path / f"set/trainannot/{i}.png"
        )
    return tmp_path / "set"


def camvid(root, **settings):
    return create_dataset("camvid", "train", root=root, **settings)


def same(ours, theirs):
    return all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [None, (4, 6)])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_samples(root, tmp_path, size, workers):
    steps = []
    write_cache(camvid(root, size=size), tmp_path / "cache" / "train", lambda: steps.append(1))
    assert len(steps) == 4
    settings = {"size": size, "transform": CHANGES, "seed": 3}
    plain, cached = camvid(root, **settings), camvid(root, cache=tmp_path / "cache", **settings)
    assert isinstance(cached, CachedDataset)
    assert cached.names == plain.names
    for epoch in range(2):
        plain.set_epoch(epoch)
        cached.set_epoch(epoch)
        context = "fork" if workers else None
        loader = DataLoader(cached, batch_size=None, num_workers=workers, multiprocessing_context=context)
        assert same(list(loader), list(plain))
    assert same(
        camvid(root, size=size, samples=2, cache=tmp_path / "cache"), camvid(root, size=size, samples=2)
    )


def test_generated_scenes(tmp_path):
    scenes = create_dataset("synthetic", "val", size=(32, 48), samples=3)
    cached = write_cache(scenes, tmp_path / "val")
    assert same(cached, scenes)
    assert same(
        create_dataset("synthetic", "val", size=(32, 48), samples=2, cache=tmp_path), [scenes[0], scenes[1]]
    )
    for settings in ({"seed": 1}, {"size": (32, 64)}):
        with pytest.raises(ValueError, match="was made from other samples"):
            create_dataset("synthetic", "val", **{"size": (32, 48), "samples": 2, **settings}, cache=tmp_path)
    with pytest.raises(ValueError, match=r"1 of 4 samples are not in the cache .*first val_000003"):
        create_dataset("synthetic", "val", size=(32, 48), samples=4, cache=tmp_path)


def test_a_sample_may_be_changed(root, tmp_path):
    cached = write_cache(camvid(root), tmp_path / "train")
    cached[0][0].fill_(7)
    assert same(cached, camvid(root))


def test_what_changed_is_noticed(root, tmp_path):
    write_cache(camvid(root), tmp_path / "train")
    with pytest.raises(ValueError, match=r"other samples \(size None there, \[4, 6\] here\): make it again"):
        camvid(root, size=(4, 6), cache=tmp_path)
    os.utime(root / "trainannot/2.png", (1, 1))
    with pytest.raises(
        ValueError, match=r"1 of 4 samples are not in the cache .* or have changed since, first 2"
    ):
        camvid(root, cache=tmp_path)
    write_cache(camvid(root), tmp_path / "train")
    assert same(camvid(root, cache=tmp_path), camvid(root))


@pytest.mark.parametrize("damage", ["short", "gone", "index", "format"])
def test_damage_is_noticed(root, tmp_path, damage):
    folder = tmp_path / "train"
    write_cache(camvid(root), folder)
    if damage == "short":
        os.truncate(folder / "labels.bin", 40)
    elif damage == "gone":
        (folder / "images.bin").unlink()
    elif damage == "index":
        (folder / "index.json").write_text("{}")
    else:
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, "format": 0}))
    with pytest.raises(ValueError, match=r"is damaged: make .* again|has format 0, expected"):
        camvid(root, cache=tmp_path)


def test_a_cache_that_was_not_finished_is_none(root, tmp_path):
    folder = tmp_path / "train"
    write_cache(camvid(root), folder)
    (root / "train/2.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot read the image .*2\.png"):
        write_cache(camvid(root), folder)
    assert not [path for path in folder.iterdir() if "part" in path.name]
    with pytest.raises(FileNotFoundError, match=r"no complete cache in .*: make it with revseg data cache"):
        camvid(root, cache=tmp_path)


def test_a_disk_that_is_too_small(root, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError, match=r"the cache needs about .* GB, and 0\.0 GB are free in"):
        write_cache(camvid(root), tmp_path / "train")
    assert list((tmp_path / "train").iterdir()) == []
