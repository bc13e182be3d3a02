"""A run is what its settings say: schedule, seed, class weights, network, device, exactness."""

import json
from dataclasses import replace

import pytest
import torch

from revseg.layers.recompute import Recompute
from revseg.memory import peak_bytes
from revseg.models import create_model
from revseg.ops import upsample_cross_entropy
from revseg.training import train
from revseg.training.loop import validate
from revseg.training.setup import build_model, choose_device, class_weights, create_split
from tests.training.tiny import TINY, assert_same, weights

pytestmark = pytest.mark.usefixtures("quick")


def test_learning_rate_follows_the_poly_schedule(tmp_path):
    train(replace(TINY, epochs=2, out=tmp_path / "run"))  # 2 steps an epoch
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["lr"] for record in log] == pytest.approx(
        [5e-3 * (1 - step / 4) ** 0.9 for step in (1, 3)]
    )


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(replace(TINY, out=tmp_path / name, seed=seed))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    name = "classifier.weight"
    assert not torch.equal(weights(tmp_path / "a")[name], weights(tmp_path / "c")[name])


def test_validation_takes_less_memory_than_a_training_step():
    model = create_model("vnet")
    images = torch.randint(0, 256, (2, 3, 128, 256), dtype=torch.uint8)
    labels = torch.randint(0, 19, (2, 128, 256), dtype=torch.uint8)

    def step():
        model.zero_grad()
        upsample_cross_entropy(model(images), labels).backward()

    training_peak = peak_bytes(step, before=step)
    batches = [(images, labels)]
    assert peak_bytes(lambda: validate(model, batches, 19, torch.device("cpu"))) < 0.7 * training_peak


def test_enet_weights_are_high_for_rare_classes():
    dataset = create_split(TINY, "train")
    counts = sum(torch.bincount(label.flatten(), minlength=256)[:19] for _, label in dataset)
    shares = counts / counts.sum()
    torch.testing.assert_close(
        class_weights(dataset, "enet"), 1 / torch.log(1.02 + shares), rtol=1e-5, atol=0
    )


def test_class_weights_reach_the_loss(tmp_path):
    losses = [
        train(replace(TINY, out=tmp_path / kind, class_weights=kind))["last"]["loss"]
        for kind in ("none", "enet")
    ]
    assert losses[0] != losses[1]


def test_hyperparameters_reach_the_model():
    settings = replace(TINY, model_args=("widths=4,8,16", "coupling=additive", "classifier_bias=True"))
    model = build_model(settings, 3, save_activations=False)
    assert model.classifier.weight.shape == (3, 16, 1, 1)
    assert model.classifier.bias is not None


@pytest.mark.parametrize("save_activations", [False, True])
def test_every_network_can_be_trained_in_both_modes(save_activations, tmp_path):
    settings = replace(TINY, model="cgnet", model_args=("widths=4,16,32", "blocks=2,2"), out=tmp_path / "run")
    model = build_model(settings, 3, save_activations=save_activations)
    assert {m.save_activations for m in model.modules() if isinstance(m, Recompute)} == {save_activations}
    train(replace(settings, save_activations=save_activations))


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "meta"):
        with pytest.raises(ValueError, match=f"unknown --device '{name}'; choose one of auto, cpu, cuda"):
            choose_device(name)
    with pytest.raises(ValueError, match=r"no --device cuda:99 here: torch sees \d+ GPUs"):
        choose_device("cuda:99")


@pytest.mark.parametrize("mode", ["exact", "lossless"])
def test_an_exact_run_ends_with_the_weights_of_its_plain_twin_bit_for_bit(mode, tmp_path):
    settings = replace(TINY, size=(48, 64), epochs=2, **{mode: True})
    train(replace(settings, out=tmp_path / "reversible"))
    train(replace(settings, out=tmp_path / "plain", save_activations=True))
    assert_same(weights(tmp_path / "reversible"), weights(tmp_path / "plain"))
    if mode == "lossless":  # and the network is the ordinary one
        train(replace(settings, out=tmp_path / "ordinary", lossless=False, save_activations=True))
        assert_same(weights(tmp_path / "reversible"), weights(tmp_path / "ordinary"))
