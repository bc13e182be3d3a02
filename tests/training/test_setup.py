"""From settings to things: what is taken over, what is refused, what moves."""

import os
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from revseg.data import CITYSCAPES, SyntheticStreets
from revseg.data.classes import ClassTable
from revseg.files import CheckpointError, save_weights
from revseg.models import create_model
from revseg.training import TrainSettings
from revseg.training.distributed import Team
from revseg.training.optimize import averaged, decay_groups, learning_rate
from revseg.training.setup import check_data, check_fit, create_parts, create_transform
from revseg.training.weights import load_starting_weights, read_weights

SMALL = {"widths": (4, 8, 16)}
NAMES = CITYSCAPES.names


def differing(model, other):
    return [name for name, value in other.items() if not torch.equal(model.state_dict()[name], value)]


@pytest.mark.parametrize("form", ["plain", "module.", "_orig_mod.module.", "state_dict", "safetensors"])
def test_weights_to_start_from_come_in_many_forms(form, tmp_path):
    source = create_model("vnet", 19, **SMALL).state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_weights(path, source, {"model": "vnet", "classes": list(NAMES)})
    elif form == "state_dict":
        torch.save({"epoch": 3, "state_dict": source, "arch": "vnet"}, path)
    else:
        prefix = "" if form == "plain" else form
        torch.save({prefix + name: value for name, value in source.items()}, path)
    model = create_model("vnet", 19, **SMALL)
    assert load_starting_weights(model, path, NAMES) == []
    assert differing(model, source) == []


def test_the_head_is_left_out_where_the_classes_differ(tmp_path):
    for network, arguments in (("vnet", SMALL), ("erfnet", {})):
        source = create_model(network, 19, **arguments).state_dict()
        save_weights(tmp_path / "w.safetensors", source, {"classes": list(NAMES)})
        other = create_model(network, 5, **arguments)
        left_out = load_starting_weights(other, tmp_path / "w.safetensors", NAMES[:5])
        assert left_out == [name for name, v in other.state_dict().items() if v.shape != source[name].shape]
        assert left_out
    same_number = create_model("vnet", 19, **SMALL)
    save_weights(
        tmp_path / "w.safetensors", same_number.state_dict(), {"classes": [f"x{i}" for i in range(19)]}
    )
    assert load_starting_weights(create_model("vnet", 19, **SMALL), tmp_path / "w.safetensors", NAMES) == [
        "classifier.weight"
    ]


def test_weights_of_another_network_are_refused_with_a_reason(tmp_path):
    path = tmp_path / "w.pth"
    model = create_model("vnet", 19, **SMALL)
    torch.save(create_model("vnet", 19, widths=(4, 8, 24)).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"w.pth does not fit the network: \S+ is \[.*\] there and \[.*\] here"
    ):
        load_starting_weights(model, path, NAMES)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"of \d+ tensors \d+ missing, first \S+ and 1 unknown, first a"):
        load_starting_weights(model, path, NAMES)


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage" * 50, pickle.dumps(Malicious(), 2), pickle.dumps([1], 2), b"\x80\x02}."],
    ids=len,
)
def test_files_that_are_no_weights_run_nothing_and_are_named(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_weights(tmp_path / name)
    torch.save({"state_dict": Malicious()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w.pth is damaged, or no weights that can be loaded safely"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[1], {}, {"model": {"a": 3}}, 3], ids=str)
def test_well_formed_files_of_another_shape_are_named(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w.pth holds no weights: expected"):
        read_weights(tmp_path / "w.pth")


def test_norms_biases_and_slopes_do_not_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 2, 1, bias=False))
    decaying, others = decay_groups(model, 0.1)
    assert [p.ndim for p in decaying["params"]] == [4, 4]
    assert [p.ndim for p in others["params"]] == [1, 1, 1, 1]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    (everything,) = decay_groups(model, 0.1, everything=True)
    assert len(everything["params"]) == 6
    model[0].weight.requires_grad_(False)
    assert len(decay_groups(model, 0.1)[0]["params"]) == 1


def test_schedules():
    settings = TrainSettings(lr=1.0, power=0.9)
    for schedule, middle in (("poly", 0.5**0.9), ("cosine", 0.5), ("constant", 1.0)):
        settings = replace(settings, schedule=schedule, warmup=0)
        assert learning_rate(settings, 0, 100) == 1.0
        assert learning_rate(settings, 50, 100) == pytest.approx(middle)
        warm = replace(settings, warmup=20)
        rates = [learning_rate(warm, step, 120) for step in range(120)]
        assert rates[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
        assert rates[20:] == pytest.approx([learning_rate(settings, step, 100) for step in range(100)])


def test_averaged_weights_follow_each_step_a_little():
    model = nn.BatchNorm2d(2)
    ema = averaged(model, 0.9)
    ema.update_parameters(model)  # the first time it is the network
    with torch.no_grad():
        model.weight += 1
        model.running_mean += 1
    ema.update_parameters(model)
    torch.testing.assert_close(ema.module.weight, torch.full((2,), 1.1))
    torch.testing.assert_close(ema.module.running_mean, torch.full((2,), 0.1))


class Scenes(SyntheticStreets):
    """Generated scenes under another table, or without labels."""

    def __init__(self, classes=CITYSCAPES, empty=False):
        super().__init__("train", size=(32, 64), samples=2)
        self.classes, self.empty = classes, empty

    def load(self, index):
        image, label = super().load(index)
        return image, torch.full_like(label, 255) if self.empty else label


def test_sets_from_which_nothing_can_be_learned_are_refused():
    """They trained to "loss 0.0000"."""
    with pytest.raises(ValueError, match="no pixel of the 2 labels has a class, first train_000000"):
        check_data(Scenes(), Scenes(empty=True))
    one = ClassTable(names=("road",), colours=((1, 2, 3),))
    with pytest.raises(ValueError, match=r"expected at least two classes, got road: .* such as background"):
        check_data(Scenes(one))


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        (
            {"batch": 1, "accumulate": 3},
            1,
            r"--accumulate of at most 2, .* \(2 samples, --batch 1, 1 processes\), got 3",
        ),
        ({"batch": 1, "accumulate": 2}, 2, "--accumulate of at most 1"),
        (
            {"crop": (32, 32), "crop_classes": (0, 19)},
            1,
            "--crop-classes from 0 to 18, .* of synthetic, got 19",
        ),
    ],
)
def test_settings_that_mean_nothing_for_the_samples_are_refused(settings, processes, message):
    """More batches to a step than there are divided by zero; a class that is none was never found."""
    with pytest.raises(ValueError, match=message):
        check_fit(TrainSettings(**settings), Scenes(), processes)


@pytest.mark.parametrize(
    ("chosen", "flag"),
    [({"ema": 0.9}, "--ema"), ({"pictures": 1}, "--pictures"), ({"precision": "float16"}, "float16")],
)
def test_what_needs_whole_parameters_is_refused_where_they_are_in_pieces(chosen, flag):
    settings = replace(TrainSettings(), parallel="fsdp", **chosen)
    with pytest.raises(
        ValueError, match=f"{flag} does not go with --parallel fsdp, whose parameters are in pieces"
    ):
        create_parts(settings, nn.Conv2d(3, 2, 1), Team(0, 2), torch.device("cpu"), {})


def test_augmentation_has_the_size_of_the_window():
    settings = TrainSettings(crop=(32, 48), scale=(0.5, 2.0), photometric="strong", crop_classes=(0,))
    image, label = torch.zeros(3, 40, 60, dtype=torch.uint8), torch.zeros(40, 60, dtype=torch.uint8)
    image, label = create_transform(settings)(image, label, torch.Generator().manual_seed(0))
    assert image.shape == (3, 32, 48)
    assert label.shape == (32, 48)
    assert create_transform(TrainSettings(hflip=False)) is None
