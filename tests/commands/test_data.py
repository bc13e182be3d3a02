"""`revseg data`, from a wrong table to a cache that a run can read."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from revseg.cli import main
from revseg.commands.data import (
    CacheSettings,
    CheckSettings,
    DataSettings,
    ShowSettings,
    SynthesizeSettings,
    cache,
    check,
    show,
    synthesize,
)
from revseg.data import BrokenDatasetError, create_dataset


@pytest.fixture
def root(tmp_path):
    values = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "labels"):
            (tmp_path / "mine" / kind / split).mkdir(parents=True)
        for i in range(count):
            picture = values.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / f"mine/images/{split}/{i}.png")
            Image.fromarray(values.integers(0, 2, (12, 16), dtype=np.uint8)).save(
                tmp_path / f"mine/labels/{split}/{i}.png"
            )
    (tmp_path / "mine/classes.yaml").write_text("classes: [soil, plant]")
    return tmp_path / "mine"


def test_a_good_set(root, tmp_path, capsys):
    check(CheckSettings(root=root, out=tmp_path / "report.json"))
    out = capsys.readouterr().out
    assert "train: 4 samples of 12 x 16, 100.0% of the pixels labelled" in out
    assert out.endswith("nothing is broken\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"] == report["odd"] == []
    assert report["splits"]["val"]["samples"] == 2


def test_everything_broken_is_named(root, tmp_path, capsys):
    (root / "images/train/0.png").write_bytes(b"no image")
    label = np.array(Image.open(root / "labels/train/1.png"))
    label[0, :5] = 9
    Image.fromarray(label).save(root / "labels/train/1.png")
    (root / "labels/val/0.png").unlink()
    (root / "images/val/1.png").unlink()
    (root / "images/train/3.png").write_bytes((root / "images/train/2.png").read_bytes())
    with pytest.raises(BrokenDatasetError, match="4 broken samples or files"):
        check(CheckSettings(root=root, out=tmp_path / "report.json"))
    out = capsys.readouterr().out
    for words in (
        "broken: train: cannot read the image", "the id 9 in 5 pixels", "val/0.png: an image without a label",
        "val/1.png: a label without an image", "odd: images that occur twice in a split: 1: train/2 = train/3",
    ):  # fmt: skip
        assert words in out
    assert len(json.loads((tmp_path / "report.json").read_text())["problems"]) == 4


def test_a_missing_split_does_not_hide_the_others(root, capsys):
    with pytest.raises(BrokenDatasetError, match="1 broken"):
        check(CheckSettings(root=root, splits=("train", "test")))
    out = capsys.readouterr().out
    assert "train: 4 samples" in out
    assert "broken: test: no images and labels of the split 'test'" in out


def test_show(root, tmp_path):
    show(ShowSettings(root=root, out=tmp_path / "shown", drawn=2))
    assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == [
        "classes.json",
        "classes.png",
        "samples.png",
    ]
    assert set(json.loads((tmp_path / "shown/classes.json").read_text())) == {"train", "val"}


def test_cache(root, tmp_path):
    cache(CacheSettings(root=root, out=tmp_path / "cache", size=(6, 8)))
    dataset = create_dataset("folder", "val", root=root, size=(6, 8), cache=tmp_path / "cache")
    assert len(dataset) == 2
    (root / "images/val/1.png").write_bytes(b"broken")
    with pytest.raises(BrokenDatasetError, match=r"cannot read the image .*val.1\.png"):
        cache(CacheSettings(root=root, out=tmp_path / "cache", splits=("val",)))


def test_a_wrong_table_and_then_the_right_one(root, capsys):
    right = (root / "classes.yaml").read_text()
    (root / "classes.yaml").write_text("classes: [soil, {name: plant, id: 2}]")
    words = ["data", "check", "--root", str(root), "--splits", "train"]
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert "broken: train: expected labels with a class, got the id 1 in" in out
    assert "4 broken samples or files" in error
    (root / "classes.yaml").write_text("clases: [soil]")
    assert main(words) == 2
    assert "unknown key 'clases'; choose from classes, ignore" in capsys.readouterr().err
    (root / "classes.yaml").write_text(right)
    assert main(words) == 0


def test_synthesize(tmp_path, capsys):
    settings = SynthesizeSettings(tmp_path / "city", size=(32, 64), train_samples=3, val_samples=1)
    synthesize(settings)
    assert "revseg train --data cityscapes --root" in capsys.readouterr().out
    assert [
        len(create_dataset("cityscapes", split, root=tmp_path / "city")) for split in ("train", "val")
    ] == [3, 1]
    with pytest.raises(ValueError, match="expected an empty or new folder for --out, got"):
        synthesize(settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CheckSettings(data_args=("table",)), "--data-args as key=value, got 'table'"),
        (lambda: CheckSettings(samples=0), "--samples of at least 1, got 0"),
        (lambda: CheckSettings(splits=()), "at least one split"),
        (lambda: ShowSettings(drawn=0), "--drawn of at least 1, got 0"),
        (lambda: SynthesizeSettings("x", layout="voc"), "unknown --layout 'voc'; choose one of cityscapes"),
        (lambda: DataSettings(data="fodler"), "unknown --data 'fodler'; did you mean folder"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_import_no_torch():
    code = "import sys, revseg.commands.data; print('torch' in sys.modules, 'numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
