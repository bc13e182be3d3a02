"""What the page about training says can be run."""

import re
from pathlib import Path

import yaml

from revseg.training import train
from revseg.training.config import settings_from

PAGE = (Path(__file__).parents[2] / "docs/training.md").read_text()


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


def test_ten_lines_train_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in block("python").splitlines() if line]
    assert len(lines) <= 10
    names: dict = {}
    exec("\n".join(lines), names)  # noqa: S102, it is our own page
    assert names["train"] is train
    assert not names["model"].training
    assert (tmp_path / "runs/notebook/samples.png").exists()


def test_the_settings_file_is_one():
    settings = settings_from(yaml.safe_load(block("yaml")), root=None)
    assert (settings.size, settings.hyperparameters()["widths"]) == ((360, 480), [8, 64, 128])
