"""Evaluation and prediction of every network take less memory than a training step of the same images."""

from functools import partial

import pytest
import torch

from revseg.inference.trained import TrainedNetwork, classes_of
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import peak_bytes
from revseg.models import create_model, list_models

SIZE = (48, 64)


@pytest.mark.parametrize("name", list_models())
def test_prediction_takes_less_than_training(name):
    torch.manual_seed(0)
    network = create_model(name, 19, memory="lowest")
    images = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    labels = torch.randint(0, 19, (1, *SIZE), dtype=torch.uint8)
    loss = UpsampleCrossEntropy()

    def step():
        outputs = network(images)
        each = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(loss(scores, labels) for scores in each).backward()

    network.train()
    training = peak_bytes(step, before=step)  # gradients stand, as they do in training
    trained = TrainedNetwork(network, classes_of({"num_classes": 19}), {})
    prediction = peak_bytes(lambda: trained.predict(images), before=lambda: trained.predict(images))
    assert prediction < training, f"{prediction / 2**20:.2f} MiB against {training / 2**20:.2f}"


@pytest.mark.parametrize("name", ["vnet", "enet"])
def test_batch_norm_that_is_folded_takes_no_memory(name):
    """As every command predicts, until another runtime was chosen."""
    torch.manual_seed(0)
    plain = TrainedNetwork(create_model(name, 19), classes_of({"num_classes": 19}))
    images = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    peaks = [
        peak_bytes(partial(model.predict, images), before=partial(model.predict, images))
        for model in (plain, plain.with_runtime("auto"))
    ]
    assert peaks[1] <= peaks[0]
