"""Pictures of a step: what stands when, and nothing that the file would have to fetch."""

import json
import re

import pytest
import torch
from torch import nn

from revseg.memory import predict
from revseg.memory.draw import draw, thinned
from revseg.memory.prediction import KINDS


@pytest.fixture(scope="module")
def prediction():
    return predict(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.ones(4, 8), optimizer="adam")


def test_html_holds_the_peak_and_needs_nothing_else(prediction, tmp_path):
    draw(tmp_path / "step.html", {"plain": prediction, "again": prediction})
    page = (tmp_path / "step.html").read_text()
    assert "http" not in page
    assert "src=" not in page
    data = json.loads(re.search(r"const data = (.*);", page)[1])
    assert data["kinds"] == list(KINDS)
    assert [step["name"] for step in data["steps"]] == ["plain", "again"]
    assert max(sum(moment[2:]) for moment in data["steps"][0]["moments"]) == prediction.peak


def test_png(prediction, tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "step.png", {"plain": prediction})
    assert (tmp_path / "step.png").read_bytes()[:4] == b"\x89PNG"


def test_steps_on_top_of_each_other(prediction, tmp_path):
    both = {"plain": prediction, "fitted": prediction}
    draw(tmp_path / "both.html", both, overlaid=True)
    page = (tmp_path / "both.html").read_text()
    data = json.loads(re.search(r"const data = (.*);", page)[1])
    assert data["overlaid"]
    for step in data["steps"]:
        assert max(sum(moment[2:]) for moment in step["moments"]) == prediction.peak
        phases = [moment[0] for moment in step["moments"]]
        assert phases.index("backward") == len(phases) / 2
    pytest.importorskip("matplotlib")
    draw(tmp_path / "both.png", both, overlaid=True)
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"


def test_thinning_keeps_the_peak(prediction):
    few = thinned(prediction.history, 5)
    assert len(few) <= 5
    assert max(sum(moment.bytes) for moment in few) == prediction.peak


def test_bad_input(prediction, tmp_path):
    with pytest.raises(ValueError, match=r"expected a file that ends in .png or .html"):
        draw(tmp_path / "step.jpg", {"plain": prediction})
    with pytest.raises(ValueError, match=r"expected predictions to draw"):
        draw(tmp_path / "step.png", {})
