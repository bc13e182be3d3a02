"""`revseg evaluate`: one confusion matrix over all images, and what is read off it."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from revseg.cli import main
from revseg.data import CAMVID, CITYSCAPES, create_dataset
from revseg.data.lights import LIGHTS
from revseg.data.synthetic.export import label_ids
from revseg.files import save_weights
from revseg.inference.instances import MEAN_SIZES, InstanceScores
from revseg.inference.matrix import CITYSCAPES_CATEGORIES, category_iou
from revseg.inference.trained import TrainedNetwork, load
from revseg.metrics import ConfusionMatrix, confusion_matrix
from revseg.models import create_model
from tests.helpers import refused


def weights_of(path, classes):
    torch.manual_seed(0)
    model = create_model("vnet", len(classes.names))
    description = {"model": "vnet", "num_classes": len(classes.names), "hyperparameters": {}}
    save_weights(path, model.state_dict(), description | {"classes": list(classes.names)})
    return path


def test_scores_are_those_of_all_pixels_together(tmp_path):
    weights = weights_of(tmp_path / "w.safetensors", CITYSCAPES)
    words = ["--size", "32", "64", "--samples", "3", "--out", str(tmp_path / "out"), "--threads", "1"]
    assert main(["evaluate", str(weights), *words, "--data-args", "thin=1"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    model, dataset = load(weights), create_dataset("synthetic", "val", size=(32, 64), samples=3, thin=1)
    counts = torch.zeros(19, 19, dtype=torch.int64)
    for image, label in dataset:
        counts += confusion_matrix(model.predict(image)[None], label[None], 19)
    hits = counts.diagonal().double()
    iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    assert found["miou"] == pytest.approx(iou.nanmean().item())
    assert found["runtime"] == "pytorch"
    assert found["pixel_accuracy"] == pytest.approx((hits.sum() / counts.sum()).item())
    rows = list(csv.reader((tmp_path / "out" / "confusion.csv").open()))
    assert [row[0] for row in rows[1:]] == list(CITYSCAPES.names)
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == counts.tolist()
    assert (tmp_path / "out" / "confusion.png").stat().st_size > 1000
    assert set(found["category_iou"]) == set(CITYSCAPES_CATEGORIES.values())


def test_scores_in_another_light_are_those_of_the_changed_images(tmp_path):
    weights = weights_of(tmp_path / "w.safetensors", CITYSCAPES)
    words = ["--size", "32", "64", "--samples", "2", "--out", str(tmp_path / "out"), "--threads", "1"]
    assert main(["evaluate", str(weights), *words, "--light", "dusk"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    model, matrix = load(weights), ConfusionMatrix(19)
    for image, label in create_dataset("synthetic", "val", size=(32, 64), samples=2):
        matrix.update(model.predict(LIGHTS["dusk"](image))[None], label[None])
    assert found["light"] == "dusk"
    assert found["miou"] == pytest.approx(matrix.mean_iou())


def test_a_light_that_there_is_not_is_refused(tmp_path, capsys):
    weights = weights_of(tmp_path / "w.safetensors", CITYSCAPES)
    message = refused(capsys, "evaluate", str(weights), "--light", "night", "--out", str(tmp_path / "out"))
    assert "unknown light 'night'" in message
    assert not (tmp_path / "out").exists()


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
    assert (
        "the network tells apart 11 classes (sky, building, pole, ...), synthetic 19 classes (road, sidewalk, building, ...): "
        "--data is to be the data set that it was trained on"
    ) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def cityscapes(tmp_path):
    """Two frames of generated scenes with instance ids: objects of some pixels, groups, and what has no instance."""
    root, generator = tmp_path / "cityscapes", np.random.default_rng(0)
    words = ["--size", "64", "128", "--train-samples", "1", "--val-samples", "2", "--out", str(root)]
    assert main(["data", "synthesize", *words]) == 0
    for path in (root / "gtFine").rglob("*_labelIds.png"):
        ids = np.asarray(Image.open(path)).astype(np.int32)
        ids[:20, :60] = generator.choice([24, 25, 26, 33, 0], (4, 12)).repeat(5, 0).repeat(5, 1)
        Image.fromarray(ids.astype(np.uint8)).save(path)
        number = np.arange(ids.size).reshape(ids.shape) // 40 % 7  # the last is a group
        instances = np.where((ids >= 24) & (number < 6), ids * 1000 + number, ids)
        Image.fromarray(instances.astype(np.uint16)).save(
            path.with_name(path.name.replace("labelIds", "instanceIds"))
        )
    return root


def test_scores_are_those_of_the_benchmark(cityscapes, tmp_path, monkeypatch):
    """Of classes and categories, of pixels and of instances, for predictions that are often right."""
    official = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="its package wants a backport of typing: pip install --no-deps cityscapesscripts, and appdirs",
    )
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # newer numpy has it no more
    dataset, predicted, files = create_dataset("cityscapes", "val", root=cityscapes), [], []
    for i in range(len(dataset)):
        label = dataset.load(i)[1].int()
        noise = torch.randint(0, 19, label.shape, dtype=torch.int32)
        guess = torch.where((label == 255) | (torch.rand(label.shape) < 0.3), noise, label)
        predicted.append(guess)
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(label_ids(guess)).save(files[-1])
    left = iter(predicted)
    monkeypatch.setattr(TrainedNetwork, "predict", lambda *_, **__: next(left))
    weights = weights_of(tmp_path / "w.safetensors", CITYSCAPES)
    words = ["--data", "cityscapes", "--root", str(cityscapes), "--instances"]
    assert main(["evaluate", str(weights), *words, "--out", str(tmp_path / "out")]) == 0
    ours = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    monkeypatch.setattr(official.args, "quiet", True)
    monkeypatch.setattr(official.args, "JSONOutput", False)
    truths = [str(pair.label) for pair in dataset.pairs]
    theirs = official.evaluateImgLists([str(path) for path in files], truths, official.args)
    for mine, name in (
        ("iou", "classScores"),
        ("category_iou", "categoryScores"),
        ("instance_iou", "classInstScores"),
        ("category_instance_iou", "categoryInstScores"),
    ):
        assert sum(value is not None and value > 0.2 for value in ours[mine].values()) >= 2
        for key, value in ours[mine].items():
            expected = theirs[name][key]
            assert math.isnan(expected) if value is None else value == pytest.approx(expected, abs=1e-9), key
    assert ours["miou"] == pytest.approx(theirs["averageScoreClasses"], abs=1e-9)


def test_scores_are_those_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional")
    predicted, labels = (torch.randint(0, 5, (3, 20, 30)) for _ in range(2))
    labels[:, :4] = 255
    ours = ConfusionMatrix(5)
    ours.update(predicted, labels)
    options = {"num_classes": 5, "ignore_index": 255}
    theirs = metrics.jaccard_index(predicted, labels, "multiclass", average="none", **options)
    torch.testing.assert_close(ours.iou().float(), theirs)
    accuracy = metrics.accuracy(predicted, labels, "multiclass", average="micro", **options)
    assert ours.pixel_accuracy() == pytest.approx(float(accuracy))


def test_instances_count_alike():
    """Beside a loop over the instances, by the formula of the paper."""
    names, generator = ("road", "person", "rider", "car"), torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 4, (12, 20), generator=generator)
    labels = torch.randint(0, 4, (12, 20), generator=generator)
    labels[0] = 255
    number = torch.randint(0, 3, (12, 20), generator=generator)
    instances = torch.where((labels > 0) & (number < 2), (23 + labels) * 1000 + number, labels)
    scores, matrix = InstanceScores(names), ConfusionMatrix(4)
    scores.update(predicted, labels, instances)
    matrix.update(predicted[None], labels[None])
    counts = matrix.counts()
    found = scores.iou(counts) | scores.category_iou(counts)
    assert set(found) == {"person", "rider", "car", "human", "vehicle"}
    for name, classes in (("rider", [2]), ("human", [1, 2])):
        right = whole = 0.0
        for i in instances[instances >= 1000].unique().tolist():
            if i // 1000 - 23 in classes:
                mask = instances == i
                weight = MEAN_SIZES[names[i // 1000 - 23]] / int(mask.sum())
                right += weight * sum(int((predicted[mask] == each).sum()) for each in classes)
                whole += weight * int(mask.sum())
        others = [each for each in range(4) if each not in classes]
        assert found[name] == pytest.approx(right / (whole + int(counts[others][:, classes].sum())))


def test_instances_need_their_files(cityscapes, tmp_path, capsys):
    weights = weights_of(tmp_path / "w.safetensors", CITYSCAPES)
    for path in cityscapes.rglob("*_instanceIds.png"):
        path.unlink()
    words = ["--data", "cityscapes", "--root", str(cityscapes), "--instances", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(weights), *words]) == 2
    assert "_gtFine_instanceIds.png; expected instance ids beside the labels" in capsys.readouterr().err
    assert "--instances needs --data cityscapes" in refused(capsys, "evaluate", weights, "--instances")
