"""What each way of the paper's comparison sees, and that a run goes on where it was cut off."""

import pytest
import torch

from benchmarks import measure, record
from benchmarks.questions import full_resolution as question


def batch():
    labels = torch.arange(2 * 16 * 32).reshape(2, 16, 32).remainder(251).byte()
    return labels[:, None].expand(2, 3, 16, 32), labels


@pytest.mark.parametrize(
    ("way", "size"), [("full", (16, 32)), ("crop", (8, 16)), ("resize 2", (8, 16)), ("resize 4", (4, 8))]
)
def test_images_and_labels_of_a_way(way, size):
    images, labels = batch()
    seen, below = question.shown(images, labels, way, torch.Generator().manual_seed(1))
    assert seen.shape == (2, 3, *size)
    assert below.shape == (2, *size)
    if question.factor_of(way) == 1:
        assert torch.equal(seen[:, 0], below)  # a crop of the labels lies where that of the images lies


def test_crops_come_from_everywhere():
    images, labels = batch()
    dice = torch.Generator().manual_seed(0)
    corners = {int(question.shown(images, labels, "crop", dice)[1][0, 0, 0]) for _ in range(200)}
    assert len(corners) > 60  # of 9 x 17 places


@pytest.mark.parametrize(
    ("way", "budget", "steps"),
    [("full", "steps", 10), ("crop", "pixels", 40), ("resize 2", "pixels", 40), ("resize 4", "pixels", 160)],
)
def test_equal_pixels_take_more_steps(way, budget, steps):
    images, labels = batch()
    seen, _ = question.shown(images, labels, way, torch.Generator().manual_seed(0))
    assert question.steps_of(way, budget, 10) == steps
    assert steps * seen[0, 0].numel() == 10 * images[0, 0].numel()
    assert question.steps_of(way, "steps", 10) == 10


def test_it_goes_on_where_it_was_cut_off(tmp_path, capsys):
    common = [
        "full_resolution",
        "--scenes",
        "none",
        "--steps",
        "2",
        "--size",
        "32",
        "64",
        "--samples",
        "4",
        "2",
    ]
    measure.main([*common, "--ways", "full", "--out", str(tmp_path)])
    first = record.read(tmp_path / "full_resolution.jsonl")["rows"]
    measure.main([*common, "--ways", "full", "resize 2", "--out", str(tmp_path)])
    rows = record.read(tmp_path / "full_resolution.jsonl")["rows"]
    assert rows[0] == first[0]
    assert [question.key_of(row) for row in rows] == [
        ("none", "full", "steps", 0),
        ("none", "resize 2", "steps", 0),
        ("none", "resize 2", "pixels", 0),
    ]
    assert all(0 < row["miou"] < 1 for row in rows)
    text = "\n".join(question.sections(record.Results(tmp_path)))
    assert "| resize 2, equal pixels | " in text
    assert "mean of 1 seed " in text
    gap = 100 * (rows[1]["miou"] - rows[0]["miou"])
    assert f"- resize 2, equal steps: {gap:+.1f} ({gap:+.1f} to {gap:+.1f})" in text


def test_camvid_needs_its_folder(tmp_path):
    with pytest.raises(SystemExit, match="expected --root"):
        measure.main(["full_resolution", "--scenes", "camvid", "--out", str(tmp_path)])
