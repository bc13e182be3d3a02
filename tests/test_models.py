"""What holds for every model of the registry."""

import pytest
import torch

from revseg.checkpoint import CheckpointError, save_weights
from revseg.models import MODELS, create_model, list_models, load_model


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("size", [(32, 64), (97, 131)])
def test_logits_at_the_stride_of_the_model(name, size):
    model = create_model(name, num_classes=7).eval()
    logits = model(torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8))
    assert logits.shape == (1, 7, -(-size[0] // model.stride), -(-size[1] // model.stride))
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("name", list_models())
def test_weights_do_not_depend_on_the_memory_mode(name):
    with torch.device("meta"):
        lean, saved = create_model(name, memory="lowest"), create_model(name, memory="fastest")
    assert list(lean.state_dict()) == list(saved.state_dict())
    saved.load_state_dict(lean.state_dict())


@pytest.mark.parametrize("name", list_models())
def test_weights_file_rebuilds_the_model(name, tmp_path):
    model = create_model(name, num_classes=4).eval()
    path = tmp_path / "weights.safetensors"
    save_weights(path, model.state_dict(), {"model": name, "num_classes": 4, "hyperparameters": {}})
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(load_model(path)(images), model(images))
    assert torch.equal(load_model(path, memory="fastest")(images), model(images))


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown model 'vnte'; choose one of .*vnet"):
        create_model("vnte")
    with pytest.raises(
        ValueError, match="unknown hyperparameter 'width' of vnet; choose one of widths, alpha"
    ):
        create_model("vnet", width=3)
    assert list_models() == sorted(MODELS)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    weights = create_model("vnet", num_classes=4).state_dict()
    save_weights(path, weights, {"model": "vnet", "num_classes": 5, "hyperparameters": {}})
    with pytest.raises(CheckpointError, match=r"weights\.safetensors does not fit the model it names"):
        load_model(path)
    save_weights(path, weights, {"model": "vnet"})
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model(path)
