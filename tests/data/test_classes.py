"""The tables of classes, and what all data sets have in common."""

import subprocess
import sys

import pytest
import torch

from revseg.data import CAMVID, CITYSCAPES, ClassTable, create_dataset, list_datasets


@pytest.mark.parametrize(("table", "classes"), [(CITYSCAPES, 19), (CAMVID, 11)])
def test_tables_are_complete(table, classes):
    assert len(table) == len(table.names) == len(set(table.names)) == len(set(table.colours)) == classes
    assert all(0 <= value <= 255 for colour in table.colours for value in colour)
    assert table.ignore == 255


def test_ids_are_those_of_the_data_sets():
    assert [CITYSCAPES.names.index(name) for name in ("road", "sky", "car", "bicycle")] == [0, 10, 13, 18]
    assert [CAMVID.names.index(name) for name in ("sky", "road", "car", "bicyclist")] == [0, 3, 8, 10]


def test_colorize():
    label = torch.tensor([[0, 18, 255]], dtype=torch.uint8)
    picture = CITYSCAPES.colorize(label)
    assert picture.dtype == torch.uint8
    assert picture.tolist() == [[[128, 64, 128], [119, 11, 32], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.tensor([[19]], dtype=torch.uint8), "below 19 or 255, got 19"),
        (torch.tensor([[0]]), r"\[H, W\] of uint8, got \[1, 1\] of torch\.int64"),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), r"got \[1, 2, 2\]"),
    ],
)
def test_colorize_refuses(label, message):
    with pytest.raises(ValueError, match=message):
        CITYSCAPES.colorize(label)


def test_a_table_needs_a_colour_for_each_class():
    with pytest.raises(ValueError, match="2 names and 1 colours"):
        ClassTable(("a", "b"), ((0, 0, 0),))


def test_factory_names():
    assert list_datasets() == ["camvid", "cityscapes", "folder", "synthetic"]
    with pytest.raises(
        ValueError,
        match=r"unknown data set 'camvids'; choose one of camvid, cityscapes, .*did you mean 'camvid'",
    ):
        create_dataset("camvids", "train")
    with pytest.raises(ValueError, match=r"camvid needs the folder .* as root"):
        create_dataset("camvid", "train")
    with pytest.raises(ValueError, match="has no root, got somewhere"):
        create_dataset("synthetic", "train", root="somewhere")


def test_index_out_of_range_ends_an_iteration():
    dataset = create_dataset("synthetic", "val", size=(32, 32), samples=2)
    assert len(list(dataset)) == 2
    assert torch.equal(dataset[-1][0], dataset[1][0])
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"below 2, got {index}"):
            dataset[index]


def test_pillow_is_imported_for_files_only(tmp_path):
    code = f"""
import sys
sys.modules["PIL"] = None
from pathlib import Path
from revseg.data import create_dataset
create_dataset("synthetic", "val", size=(32, 32), samples=1)[0]
for folder in ("train", "trainannot"):
    Path({str(tmp_path)!r}, folder).mkdir()
    Path({str(tmp_path)!r}, folder, "x.png").touch()
try:
    create_dataset("camvid", "train", root={str(tmp_path)!r})[0]
except ImportError as error:
    assert "pip install revseg[data]" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
