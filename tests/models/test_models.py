"""The registry: names, weights files and official weights. What holds for each model: test_models_contract.py."""

import warnings
from dataclasses import asdict

import pytest
import torch
from torch import nn

from revseg.files import CheckpointError, save_weights
from revseg.layers.blocks import ConvBNAct, ImageConvBNAct
from revseg.layers.images import Normalization, normalize_images
from revseg.layers.recompute import Recompute
from revseg.layers.stack import Stack
from revseg.models import MODELS, create_model, list_models, load_model, load_official
from revseg.models.network import Network
from revseg.models.policy import MemoryPolicy
from tests.models.networks import images


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


def test_normalization_goes_with_a_weights_file(tmp_path):
    model, x = create_model("vnet", 4, widths=(4, 8, 16)).eval(), images(33, 49)
    model.normalization = Normalization.of_bytes((99.6, 103.3, 105.7), (1.0, 1.0, 1.0), flipped=True)
    path = tmp_path / "weights.safetensors"
    description = {"model": "vnet", "num_classes": 4, "hyperparameters": {"widths": (4, 8, 16)}}
    description |= {"normalization": asdict(model.normalization)}
    save_weights(path, model.state_dict(), description)
    assert torch.equal(load_model(path)(x), model(x))
    assert load_model(path).normalization == model.normalization
    with pytest.raises(ValueError, match="a mean and a positive deviation for each channel"):
        Normalization((0.5,), (0.0,))


def test_a_model_without_official_weights_says_so():
    with pytest.raises(ValueError, match="official weights, got a reversible ESPNet"):
        load_official(create_model("espnet_rev"), {})
    with pytest.raises(ValueError, match="expected a model with official weights, got VNet"):
        load_official(create_model("vnet"), {})


class Toy(Network):
    stride = 4

    def __init__(self, num_classes=19, *, width=8, in_channels=3, memory="balanced"):
        super().__init__(num_classes, in_channels)
        policy = MemoryPolicy.of(memory)
        self.stem = policy.block(ImageConvBNAct(in_channels, width, stride=2))
        self.body = policy.stage(Stack(policy.block(ConvBNAct(width, width, stride=2))))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def logits(self, images):
        return self.classifier(self.body(self.stem(images)))


def test_a_new_network_is_a_class_and_a_line_of_the_registry(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "toy", Toy)
    model, x = create_model("toy", 5, memory="lowest", width=4), images(33, 49)
    assert model(x).shape == (2, 5, 9, 13)
    assert sum(isinstance(module, Recompute) for module in model.modules()) == 3
    assert list(model.state_dict()) == list(create_model("toy", 5, memory="fastest", width=4).state_dict())
    path = tmp_path / "toy.safetensors"
    save_weights(
        path, model.state_dict(), {"model": "toy", "num_classes": 5, "hyperparameters": {"width": 4}}
    )
    assert torch.equal(load_model(path)(x), model.eval()(x))


@pytest.mark.parametrize(("factor", "said"), [(1, "from 0 to 1 "), (255, "from 0 to 255 ")])
def test_floats_that_nobody_normalised_are_noticed_once(factor, said):
    model = Toy(5).eval()
    x = images(33, 49).float() / 255 * factor
    x[0, 0, 0, 0] = factor
    with pytest.warns(UserWarning, match=f"{said}are taken as they are.*give them as bytes"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        Toy(5).eval()(normalize_images(images(33, 49)))
        Toy(5).eval()(torch.zeros(1, 3, 8, 8))


def test_exact_inversion_needs_something_to_invert():
    with pytest.raises(ValueError, match="exact=True is a way to invert: expected reversible=True with it"):
        create_model("enet", exact=True)


def test_a_policy_of_ones_own_builds_a_network():
    class Last(MemoryPolicy):
        def block(self, module):
            return module if isinstance(module, ImageConvBNAct) else super().block(module)

    model = create_model("dabnet", memory=Last(), widths=(4, 16, 32), dilations=((2,), (4,)))
    kinds = [type(module) for module in model.row1]
    assert kinds == [Recompute]
    assert create_model("vnet", memory=MemoryPolicy(sequences=False)).stage2.save_activations
