"""The registry: names, weights files and official weights. What holds for each model: test_models_contract.py."""

import pytest

from revseg.files import CheckpointError, save_weights
from revseg.models import MODELS, create_model, list_models, load_model, load_official


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


def test_a_model_without_official_weights_says_so():
    with pytest.raises(ValueError, match="expected a model with official PyTorch weights, got VNet"):
        load_official(create_model("vnet"), {})
