"""What docs/data.md shows works as it stands there."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from revseg.data import DATASETS, create_dataset
from revseg.data.class_file import read_class_file

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_class_table(tmp_path):
    (tmp_path / "classes.yaml").write_text(blocks("yaml")[0])
    meaning = read_class_file(tmp_path / "classes.yaml")
    assert meaning.classes.names == ("background", "crop", "weed")
    assert dict(meaning.ids) == {0: 0, 7: 1, 8: 2, 9: 2, 255: 255}


def test_the_transform(tmp_path):
    (tmp_path / "example.py").write_text(blocks("python")[0])
    names = runpy.run_path(str(tmp_path / "example.py"))
    assert names["image"].shape == (3, 128, 256)
    assert torch.equal(names["image"], names["dataset"][0][0])


def test_a_data_set_is_one_file_and_one_line(tmp_path, monkeypatch):
    (tmp_path / "roads_of_a_test.py").write_text(blocks("python")[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(DATASETS, "roads", "roads_of_a_test:Roads")
    for folder, value in (("pictures", 40), ("roads", 255)):
        (tmp_path / "train" / folder).mkdir(parents=True)
        Image.fromarray(np.full((6, 8), value, dtype=np.uint8)).save(tmp_path / "train" / folder / "x.png")
    dataset = create_dataset("roads", "train", root=tmp_path, size=(3, 4), samples=1)
    dataset.verify()
    assert dataset[0][1].tolist() == [[1] * 4] * 3
    with pytest.raises(ValueError, match="needs the folder of its files as root"):
        create_dataset("roads", "train")
