"""A weights file is all that prediction needs."""

import numpy as np
import pytest
import torch
from PIL import Image

import revseg
from revseg.data import CAMVID, CITYSCAPES
from revseg.files import CheckpointError, save_weights
from revseg.inference.augmented import Augmentation, scores_of
from revseg.inference.trained import TrainedNetwork, as_images, classes_of, shipped_weights
from revseg.inference.windows import Windows
from revseg.losses import predict_labels
from revseg.models import create_model
from revseg.ops import upsample_argmax


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vnet.safetensors"
    torch.manual_seed(0)
    model = create_model("vnet", 11)
    description = {"model": "vnet", "num_classes": 11, "hyperparameters": {}, "classes": list(CAMVID.names)}
    save_weights(path, model.state_dict(), description)
    return path


def photo(height=37, width=54):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def test_every_kind_of_image_gives_the_same_labels(weights, tmp_path):
    model, image = revseg.load(weights), photo()
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "photo.png")
    labels = model.predict(image)
    assert labels.shape == (37, 54)
    assert labels.dtype == torch.uint8
    for other in (
        array,
        Image.fromarray(array),
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        image[None][0],
    ):
        assert torch.equal(model.predict(other), labels)
    assert torch.equal(model.predict(image[None]), labels[None])
    assert torch.equal(labels, predict_labels(model.network.eval()(image[None]), (37, 54))[0])


def test_a_batch_is_predicted_image_by_image(weights):
    model = revseg.load(weights)
    batch = torch.stack([photo(), photo().flip(0)])
    assert torch.equal(model.predict(batch), torch.stack([model.predict(batch[0]), model.predict(batch[1])]))


def test_the_mode_of_the_network_is_left_as_it_was(weights):
    model = revseg.load(weights).train()
    model.network.classifier.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.predict(photo())
    assert model.network.training
    assert not model.network.classifier.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@torch.no_grad()
def test_windows_and_augmentation(weights):
    model, image = revseg.load(weights), photo(64, 96)
    assert torch.equal(model.predict(image, windows=Windows(64, 96)), model.predict(image))
    many = Augmentation((0.5, 1.0, 1.5), flip=True)
    scores, mirrored = (scores_of(model, x[None], 8, many) for x in (image, image.flip(2)))
    torch.testing.assert_close(mirrored, scores.flip(3))  # as mirror images count alike
    torch.testing.assert_close(scores.sum(1), torch.ones(1, 8, 12))
    assert torch.equal(model.predict(image, augmentation=many), upsample_argmax(scores, (64, 96))[0])
    with pytest.raises(ValueError, match="expected scales between"):
        Augmentation(())


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (3, TypeError, "expected a path, a PIL image, an array or a tensor, got int"),
        (np.zeros((4, 4, 3)), TypeError, "expected an array of bytes"),
        (np.zeros((4, 4, 5), dtype=np.uint8), ValueError, "expected an array"),
        (torch.zeros(4, 4), ValueError, "expected a tensor"),
        (torch.zeros(1, 4, 4, 4), ValueError, "expected a tensor"),
        ("nothing.png", FileNotFoundError, "nothing.png"),
    ],
)
def test_what_is_no_image_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        as_images(image)


def test_grey_arrays_are_images():
    images, single = as_images(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert single
    assert images.shape == (1, 3, 3, 4)


def test_colours_are_those_of_the_file_or_of_the_data_set_or_new():
    assert classes_of({"num_classes": 11, "classes": list(CAMVID.names)}) == CAMVID
    own = classes_of({"num_classes": 2, "classes": ["a", "b"], "colours": [[1, 2, 3], [4, 5, 6]]})
    assert own.colours == ((1, 2, 3), (4, 5, 6))
    wheel = classes_of({"num_classes": 30})
    assert len(set(wheel.colours)) == 30
    assert wheel.names[3] == "class 3"


def test_a_network_of_one_class_tells_it_from_what_is_around_it(tmp_path):
    torch.manual_seed(0)
    network = create_model("vnet", 1, classifier_bias=True)
    save_weights(
        tmp_path / "w.safetensors",
        network.state_dict(),
        {"model": "vnet", "num_classes": 1, "hyperparameters": {"classifier_bias": True}},
    )
    model = revseg.load(tmp_path / "w.safetensors")
    with torch.no_grad():  # so that some pixels are on either side
        mean = network.eval()(photo()[None]).mean()
        for each in (network, model.network):
            each.classifier.bias -= mean
    labels = model.predict(photo())
    assert labels.unique().tolist() == [0, 1]
    assert torch.equal(labels, predict_labels(network.eval()(photo()[None]), (37, 54))[0])
    assert len(model.classes) == 2


def test_shipped_weights_work_by_name_and_have_a_card():
    shipped = shipped_weights()
    assert "vnet-camvid" in shipped
    for name, path in shipped.items():
        assert path.stat().st_size < 1 << 20
        model, card = revseg.load(name), path.with_suffix(".md").read_text()
        assert card.startswith(f"# {name}\n")
        assert f"{100 * model.description['miou']:.1f} as they are" in card
        assert "licence" in model.description["provenance"]
        assert model.predict(photo()).max() < len(model.classes)


def test_weights_that_are_missing_or_from_elsewhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a weights file"):
        revseg.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(CheckpointError, match=r"text\.safetensors is damaged"):
        revseg.load(tmp_path / "text.safetensors")


def test_classes_of_another_number_are_refused():
    with pytest.raises(ValueError, match="expected names for 11 classes, got 19"):
        TrainedNetwork(create_model("vnet", 11), CITYSCAPES, {"num_classes": 11})


def test_a_runtime_is_chosen_in_python(weights):
    model, said = revseg.load(weights), []
    folded = model.with_runtime("pytorch")
    automatic = folded.with_runtime(tell=said.append)  # from one that has a runtime
    for other in (folded, automatic):
        assert (other.predict(photo()) == model.predict(photo())).double().mean() > 0.999
        assert other.classes == model.classes
        assert other.description == model.description
    assert said == []
    with pytest.raises(
        ValueError, match="unknown runtime 'tensorrt'; choose one of auto, pytorch, compile, onnx"
    ):
        model.with_runtime("tensorrt")
