"""Weights in files of Caffe, the form in which SegNet and ICNet were released.

A .caffemodel is a protocol buffer: layers with a name and blobs of numbers. What of it is needed is read here, in plain
Python; nothing in the file is run. Caffe's forks know two batch norms. One has four blobs, factor, shift, mean and variance.
The other has two, factor and shift, into which mean and variance were worked after training. Where it was worked into the
convolution altogether there is none, and the convolution has a bias instead.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from revseg.files import CheckpointError

EPS = 1e-5  # of our batch norm, in networks that were released so
Layers = Mapping[str, tuple[str, str | None]]  # our convolution and our batch norm of each of their layers


def read_caffemodel(path: str | Path) -> dict[str, Tensor]:
    """The blobs of a .caffemodel by the name of the layer and their number in it, as in "conv1_1.0".

    Args:
        path: The file.

    Returns:
        Tensors, float32: for `revseg.models.load_official`.

    Raises:
        CheckpointError: If the file is damaged, or no .caffemodel.
    """
    content = memoryview(Path(path).expanduser().read_bytes())
    blobs: dict[str, Tensor] = {}
    try:
        for number, layer in _fields(content):
            if number in (2, 100) and isinstance(layer, memoryview):  # layers of old files, and of new ones
                blobs |= _blobs(layer, *((4, 6) if number == 2 else (1, 7)))
    except (ValueError, struct.error, IndexError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged or no .caffemodel: {error}") from error
    if not blobs:
        raise CheckpointError(f"{path} is no .caffemodel: it holds no layer with weights")
    return blobs


def from_caffe(blobs: Mapping[str, Tensor], layers: Layers, suffix: str, bias: bool) -> dict[str, Tensor]:
    """The state dict of a network from the blobs of its layers.

    Args:
        blobs: Of `read_caffemodel`.
        layers: By name of a convolution there: our convolution, and our batch norm behind it, if there is one.
        suffix: What the name of its batch norm has more than that of a convolution.
        bias: Whether our convolutions before batch norm have a bias.

    Raises:
        ValueError: If a layer is missing, or there is one that the network does not have.
    """
    known = {*layers, *(name + suffix for name in layers)}
    for name in (key.rpartition(".")[0] for key in blobs):
        if name not in known:
            raise ValueError(f"expected layers of the official network, got {name!r}")
    state: dict[str, Tensor] = {}
    for name, (conv, norm) in layers.items():
        if f"{name}.0" not in blobs:
            raise ValueError(f"expected all layers of the official network, {name!r} is missing")
        weight, shift = (
            blobs[f"{name}.0"],
            blobs.get(f"{name}.1", torch.zeros(len(blobs[f"{name}.0"]))).flatten(),
        )
        state[f"{conv}.weight"] = weight
        if bias or norm is None:
            state[f"{conv}.bias"] = shift
        if norm is not None:
            state |= {
                f"{norm}.{key}": value for key, value in _norm(blobs, name + suffix, shift, bias).items()
            }
    return state


def _norm(blobs: Mapping[str, Tensor], name: str, shift: Tensor, bias: bool) -> dict[str, Tensor]:
    """A batch norm from its blobs; from two, or none, one of mean 0 and variance 1."""
    found = [blobs[f"{name}.{i}"].flatten() for i in range(4) if f"{name}.{i}" in blobs]
    if len(found) not in (0, 2, 4):
        raise ValueError(f"expected 2 or 4 blobs of {name!r}, got {len(found)}")
    zero = torch.zeros_like(shift)
    factor, offset = found[:2] if found else (zero + 1, zero if bias else shift)
    mean, variance = found[2:] if len(found) == 4 else (zero, zero + 1)
    kept = 1.0 if len(found) == 4 else math.sqrt(1 + EPS)
    values = {"weight": factor * kept, "bias": offset, "running_mean": mean, "running_var": variance}
    return values | {"num_batches_tracked": torch.zeros((), dtype=torch.int64)}


def _blobs(layer: memoryview, name_field: int, blob_field: int) -> dict[str, Tensor]:
    """The blobs of a layer by its name and their number."""
    name, found = "", list[Tensor]()
    for number, value in _fields(layer):
        if number == name_field and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif number == blob_field and isinstance(value, memoryview):
            found.append(_blob(value))
    return {f"{name}.{i}": blob for i, blob in enumerate(found)}


def _blob(content: memoryview) -> Tensor:
    """The numbers of a blob in its shape, which old files give as four numbers."""
    parts, old, shape = list[bytes](), dict[int, int](), None
    for number, value in _fields(content):
        if number == 5:
            parts.append(bytes(value) if isinstance(value, memoryview) else struct.pack("<I", value))
        elif number == 7 and isinstance(value, memoryview):
            shape = [each for _, dims in _fields(value) for each in _numbers(dims)]
        elif 1 <= number <= 4 and isinstance(value, int):
            old[number] = value
    values = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.float32) if parts else torch.empty(0)
    return values.reshape(shape if shape is not None else [old.get(i, 1) for i in range(1, 5)])


def _numbers(value: memoryview | int) -> list[int]:
    """One number, or several that are packed."""
    if isinstance(value, int):
        return [value]
    numbers, place = [], 0
    while place < len(value):
        number, place = _varint(value, place)
        numbers.append(number)
    return numbers


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Number and value of each field of a message: bytes, or a number (of floats the bits).

    Raises:
        ValueError: If the bytes are no message.
    """
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(content, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, place = _varint(content, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if place + length > len(content):
            raise ValueError("it ends in the middle of a field")
        part = content[place : place + length]
        yield tag >> 3, part if kind == 2 else int.from_bytes(part, "little")
        place += length


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the place behind it."""
    number = shift = 0
    while True:
        byte = content[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
