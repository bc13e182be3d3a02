"""Caffe's files: read as written, and networks that compute what Caffe's layers would."""

import json
import struct
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from revseg.files import CheckpointError
from revseg.models import create_model, load_official
from revseg.models.caffe import read_caffemodel
from tests.models.networks import images

RELEASED = json.loads((Path(__file__).parent / "released_icnet.json").read_text())  # shapes of convolutions
STAGES = ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3))  # of VGG-16


def varint(number):
    result = bytearray()
    while number > 127:
        result.append(number & 127 | 128)
        number >>= 7
    return bytes(result) + bytes([number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def blob(values, old):
    data = field(5, values.contiguous().numpy().tobytes())
    if not old:
        return field(7, field(1, b"".join(map(varint, values.shape)))) + data
    shape = [1] * (4 - values.ndim) + list(values.shape)
    return b"".join(varint(i << 3) + varint(side) for i, side in enumerate(shape, 1)) + data


def write(path, layers, old=False):
    """A .caffemodel of layers by name, each a list of tensors; in the old form too, with a layer that has none."""
    name, blobs, layer = (4, 6, 2) if old else (1, 7, 100)
    text = field(1, b"network") + field(layer, field(name, b"relu1"))
    for key, values in layers.items():
        text += field(layer, field(name, key.encode()) + b"".join(field(blobs, blob(v, old)) for v in values))
    path.write_bytes(text + varint(8 << 3 | 5) + struct.pack("<f", 1.0))  # a field of another kind
    return path


def segnet_layers(widths, classes):
    """Random layers by the names and shapes of the authors' prototxt, batch norm as factor and shift."""
    generator = torch.Generator().manual_seed(0)
    layers, before = {}, 3

    def add(name, inputs, outputs, norm=True):
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (3 * inputs**0.5)
        layers[name] = [weight, torch.randn(outputs, generator=generator)]
        if norm:
            pair = [torch.rand(1, outputs, 1, 1, generator=generator) + 0.5 for _ in range(2)]
            layers[f"{name}_bn"] = pair

    for (stage, count), width in zip(STAGES, widths, strict=True):
        for i in range(1, count + 1):
            add(f"conv{stage}_{i}", before if i == 1 else width, width)
            last = i == 1
            outputs = (classes if stage == 1 else widths[stage - 2]) if last else width
            add(f"conv{stage}_{i}_D", width, outputs, norm=(stage, i) != (1, 1))
        before = width
    return layers


def segnet_by_caffe(layers, x):
    """SegNet as Caffe runs it, layer by layer, in inference."""

    def run(x, name):
        x = F.conv2d(x, *layers[name], padding=1)
        if f"{name}_bn" not in layers:
            return x
        factor, shift = layers[f"{name}_bn"]
        return F.relu(factor * x + shift)

    masks = []
    for stage, count in STAGES:
        for i in range(1, count + 1):
            x = run(x, f"conv{stage}_{i}")
        size = x.shape[2:]
        x, mask = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
        masks.append((mask, size))
    for (stage, count), (mask, size) in zip(reversed(STAGES), reversed(masks), strict=True):
        x = F.max_unpool2d(x, mask, 2, 2, output_size=size)
        for i in range(count, 0, -1):
            x = run(x, f"conv{stage}_{i}_D")
    return x


@pytest.mark.parametrize("old", [False, True])
def test_segnet_computes_what_caffe_does(tmp_path, old):
    """From bytes in RGB, where the authors' program hands over those of OpenCV, in BGR."""
    widths = (4, 6, 8, 10, 12)
    layers = segnet_layers(widths, 5)
    if old:  # whose biases are of four sides too
        layers = {
            name: [v[None, None, None] if v.ndim == 1 else v for v in values]
            for name, values in layers.items()
        }
    model = create_model("segnet", 5, widths=widths).eval()
    load_official(model, read_caffemodel(write(tmp_path / "segnet.caffemodel", layers, old)))
    layers = {
        name: [v.flatten() if v.shape[:3] == (1, 1, 1) else v for v in values]
        for name, values in layers.items()
    }
    x = images(45, 60)
    with torch.no_grad():
        torch.testing.assert_close(model(x), segnet_by_caffe(layers, x.flip(1).float()), rtol=1e-4, atol=1e-3)


def icnet_layers(generator):
    """Random layers by the names and shapes of the authors' prototxt, with batch norm of four blobs."""
    layers = {}
    for name, shape in RELEASED.items():
        outputs, inputs, kernel, _ = shape
        weight = torch.randn(shape, generator=generator) / (kernel * inputs**0.5)
        layers[name] = [weight]
        if name == "conv6_cls":
            layers[name].append(torch.randn(outputs, generator=generator))
            continue
        norm = [torch.randn(1, outputs, 1, 1, generator=generator) / 5 for _ in range(3)]
        layers[f"{name}/bn"] = [
            norm[0] + 1,
            *norm[1:],
            torch.rand(1, outputs, 1, 1, generator=generator) + 0.5,
        ]
    return layers


def test_icnet_of_both_files(tmp_path):
    """With batch norm, and with batch norm worked into the convolutions, which then have a bias."""
    layers, merged = icnet_layers(torch.Generator().manual_seed(0)), {}
    for name in RELEASED:
        merged[name] = layers[name]
        if name != "conv6_cls":
            factor, shift, mean, variance = (value.flatten() for value in layers[f"{name}/bn"])
            factor = factor / (variance + 1e-5).sqrt()
            merged[name] = [layers[name][0] * factor[:, None, None, None], shift - mean * factor]
    found = []
    for each in (layers, merged):
        model = create_model("icnet", 19, aux=False).eval()
        load_official(model, read_caffemodel(write(tmp_path / "icnet.caffemodel", each)))
        with torch.no_grad():
            found.append(model(images(65, 97, n=1)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3 * found[0].abs().max().item())
    whole = create_model("icnet", 19, aux=False)
    load_official(whole, read_caffemodel(write(tmp_path / "icnet.caffemodel", layers)))
    state = whole.state_dict()
    assert torch.equal(state["stem.layers.0.1.running_var"], layers["conv1_1_3x3_s2/bn"][3].flatten())
    assert torch.equal(state["down.shortcut.0.weight"], layers["conv3_1_1x1_proj"][0])
    grey = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    grey[:, 0] = 200  # red
    expected = torch.tensor([100 - 103.939, 100 - 116.779, 200 - 123.68])
    torch.testing.assert_close(whole.normalization(grey)[0, :, 0, 0], expected)
    with pytest.raises(RuntimeError, match="aux=False"):
        load_official(create_model("icnet", 19), read_caffemodel(tmp_path / "icnet.caffemodel"))


def test_files_that_are_none(tmp_path):
    path = write(tmp_path / "x.caffemodel", {"conv1_1": [torch.zeros(2, 3, 3, 3)]})
    whole = path.read_bytes()
    for content in (whole[:-30], b"\xff" * 40, b"garbage that is no message", b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.caffemodel is (damaged or )?no \.caffemodel"):
            read_caffemodel(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x0b", "a field of kind 3"),
        (b"\x12\x05ab", "it ends in the middle of a field"),
        (b"\x80" * 11, "a number of more than 64 bits"),
    ],
)
def test_damaged_files_say_where(tmp_path, content, reason):
    (tmp_path / "x.caffemodel").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"is damaged or no .caffemodel: {reason}"):
        read_caffemodel(tmp_path / "x.caffemodel")


def test_a_file_without_weights_is_refused(tmp_path):
    (tmp_path / "x.caffemodel").write_bytes(b"")
    with pytest.raises(CheckpointError, match="it holds no layer with weights"):
        read_caffemodel(tmp_path / "x.caffemodel")


def test_layers_of_another_network_are_refused():
    model = create_model("segnet", 5, widths=(2, 3, 4, 5, 6))
    with pytest.raises(ValueError, match=r"expected layers of the official network, got 'conv1_1_3x3_s2'"):
        load_official(model, {"conv1_1_3x3_s2.0": torch.zeros(2, 3, 3, 3)})
    with pytest.raises(ValueError, match=r"all layers of the official network, 'conv1_1' is missing"):
        load_official(model, {"conv1_2.0": torch.zeros(2, 3, 3, 3)})
    with pytest.raises(ValueError, match=r"expected 2 or 4 blobs of 'conv1_1_bn', got 1"):
        load_official(model, {"conv1_1.0": torch.zeros(2, 3, 3, 3), "conv1_1_bn.0": torch.zeros(2)})
    with pytest.raises(ValueError, match="got ENet: its authors' code is Torch7"):
        load_official(create_model("enet"), {})
