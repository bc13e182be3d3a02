"""`revseg evaluate`: one confusion matrix over all images, and what is read off it."""

import csv
import json

import pytest
import torch

from revseg.cli import main
from revseg.data import CAMVID, CITYSCAPES, create_dataset
from revseg.files import save_weights
from revseg.inference.matrix import CITYSCAPES_CATEGORIES, category_iou
from revseg.inference.trained import load
from revseg.metrics import confusion_matrix
from revseg.models import create_model


def weights_of(path, classes):
    torch.manual_seed(0)
    model = create_model("vnet", len(classes.names))
    description = {"model": "vnet", "num_classes": len(classes.names), "hyperparameters": {}}
    save_weights(path, model.state_dict(), description | {"classes": list(classes.names)})
    return path


def test_scores_are_those_of_all_pixels_together(tmp_path):
    weights = weights_of(tmp_path / "w.safetensors", CITYSCAPES)
    words = ["--size", "32", "64", "--samples", "3", "--out", str(tmp_path / "out"), "--threads", "1"]
    assert main(["evaluate", str(weights), *words]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    model, dataset = load(weights), create_dataset("synthetic", "val", size=(32, 64), samples=3)
    counts = torch.zeros(19, 19, dtype=torch.int64)
    for image, label in dataset:
        counts += confusion_matrix(model.predict(image)[None], label[None], 19)
    hits = counts.diagonal().double()
    iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    assert found["miou"] == pytest.approx(iou.nanmean().item())
    assert found["pixel_accuracy"] == pytest.approx((hits.sum() / counts.sum()).item())
    rows = list(csv.reader((tmp_path / "out" / "confusion.csv").open()))
    assert [row[0] for row in rows[1:]] == list(CITYSCAPES.names)
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == counts.tolist()
    assert (tmp_path / "out" / "confusion.png").stat().st_size > 1000
    assert set(found["category_iou"]) == set(CITYSCAPES_CATEGORIES.values())


def test_categories_sum_up_their_classes():
    counts = torch.randint(0, 50, (19, 19), generator=torch.Generator().manual_seed(0))
    found = category_iou(counts, CITYSCAPES.names)
    flat = [0, 1]
    hits = counts[flat][:, flat].sum()
    union = counts[flat].sum() + counts[:, flat].sum() - hits
    assert found["flat"] == pytest.approx((hits / union).item())
    assert category_iou(torch.zeros(19, 19, dtype=torch.int64), CITYSCAPES.names)["sky"] is None


def test_a_network_of_other_classes_is_refused(tmp_path, capsys):
    weights = weights_of(tmp_path / "w.safetensors", CAMVID)
    assert main(["evaluate", str(weights), "--samples", "1", "--out", str(tmp_path / "out")]) == 2
    assert "the network tells apart 11 classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
