"""What a run shows: plain lines without a terminal, a bar on one, tables, pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from revseg.data import CAMVID, CITYSCAPES
from revseg.training.report import (
    LINE_EVERY,
    draw_curves,
    draw_samples,
    epoch_line,
    memory_table,
    result_table,
    step_progress,
)


def shown(steps, terminal):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=80, highlight=False)
    with step_progress(console, "epoch 1/2", steps) as show:
        for _ in range(steps):
            show(0.5)
    return text.getvalue()


def test_progress_without_a_terminal_is_a_plain_line_now_and_then():
    assert shown(2 * LINE_EVERY + 1, terminal=False).splitlines() == [
        f"epoch 1/2  loss 0.5000  step {LINE_EVERY}/{2 * LINE_EVERY + 1}",
        f"epoch 1/2  loss 0.5000  step {2 * LINE_EVERY}/{2 * LINE_EVERY + 1}",
    ]
    assert shown(LINE_EVERY - 1, terminal=False) == ""


def test_progress_on_a_terminal_is_a_bar_that_leaves_nothing_behind():
    text = shown(3, terminal=True)
    assert "3/3" in text
    assert "step" not in text
    assert text.endswith("\x1b[2K")  # the line is cleared


def test_an_epoch_without_a_class_has_no_number():
    record = {"epoch": 1, "loss": 1.0, "val_loss": 2.0, "miou": None, "lr": 1e-3, "seconds": 3.0}
    assert epoch_line(record, 5) == "epoch 1/5  loss 1.0000  val loss 2.0000  mIoU -  lr 1.00e-03  3.0 s"


def test_tables_say_percent_mebibytes_and_ratios():
    text = io.StringIO()
    console = Console(file=text, width=80)
    predicted = {"reversible": 2**21, "saved": 5 * 2**20}
    console.print(memory_table({"reversible": 2**20, "saved": 3 * 2**20}, predicted, (4, 3, 128, 256)))
    console.print(memory_table({"reversible": 2**20}, predicted, (4, 3, 128, 256)))
    console.print(result_table("Validation IoU, best epoch (7)", {"road": 0.5, "sky": None}, 0.5))
    lines = [" ".join(line.strip("│┃").replace("│", " ").split()) for line in text.getvalue().splitlines()]
    for line in (
        "reversible 1.0 2.0 1.00",
        "saved 3.0 5.0 3.00",
        "saved does not fit 5.0 2.50",
        "road 50.00",
        "sky -",
        "mean 50.00",
    ):
        assert line in lines
    assert "Peak memory of a training step, batch 4 x 3 x 128 x 256" in lines
    assert "Validation IoU, best epoch (7)" in lines


@pytest.mark.parametrize(
    ("classes", "size"), [(CAMVID, (360, 480)), (CITYSCAPES, (128, 256)), (CAMVID, (16, 24))]
)
def test_samples_stand_side_by_side_in_their_colours(classes, size, tmp_path):
    h, w = size
    image = torch.full((3, h, w), 200, dtype=torch.uint8)
    label = torch.full((h, w), 3, dtype=torch.uint8)
    label[0] = classes.ignore
    draw_samples(tmp_path / "x.png", [(image, label, torch.full_like(label, 5))] * 2, classes)
    pixels = np.array(Image.open(tmp_path / "x.png"))
    assert pixels.shape[1] == 3 * w + 8
    top = int((pixels[:, 1] == 200).all(-1).argmax())
    for first in (top, top + h + 4):
        assert (pixels[first : first + h, :w] == 200).all()
        assert (pixels[first, w + 4 : 2 * w + 4] == 0).all()
        assert (pixels[first + 1 : first + h, w + 4 : 2 * w + 4] == classes.colours[3]).all()
        assert (pixels[first : first + h, 2 * w + 8 :] == classes.colours[5]).all()
    legend = pixels[top + 2 * h + 8 :].reshape(-1, 3)
    for colour in (*classes.colours, (0, 0, 0)):
        assert (legend == colour).all(-1).any(), colour


def test_curves_of_one_epoch_without_a_number_can_be_drawn(tmp_path):
    draw_curves(tmp_path / "x.png", [{"epoch": 1, "loss": 1.0, "val_loss": 2.0, "miou": None}])
    assert Image.open(tmp_path / "x.png").size == (900, 350)
