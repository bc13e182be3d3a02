"""Files that are either old or new, never half: checkpoints, weights, logs.

A file is written beside its place, flushed to the disk, and only then renamed over the old one.
So a full disk, an exception or a killed process leaves the last good file as it was.

There are two kinds of checkpoint. `last.pt` holds all that a run needs to continue, in types that
torch loads without executing anything. `best.safetensors` holds weights, and how to build the
network they belong to.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or not one of ours."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Puts a file in its place in one step.

    Args:
        path: Where the file belongs; what is there stays until the new file is complete.
        write: Called with the path to write to, in the same folder.

    Raises:
        Exception: What `write` raises, after its file is removed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        _flush(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _flush_names(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_weights(path: Path, weights: Mapping[str, Tensor], description: Mapping[str, object]) -> None:
    """Writes weights as safetensors, with a description in the header of the file.

    Args:
        path: The file.
        weights: A state dict.
        description: What JSON can hold; `revseg.models.load_model` wants "model", "num_classes"
            and "hyperparameters".
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = save(tensors, {"revseg": json.dumps(description)})
    write_atomically(path, lambda part: part.write_bytes(content))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and description from a file of `save_weights`.

    Raises:
        CheckpointError: If the file is damaged or from elsewhere.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    if "revseg" not in header:
        raise CheckpointError(f"{path} holds no weights of revseg: its header does not describe a model")
    return weights, json.loads(header["revseg"])


def _flush(path: Path) -> None:
    """Waits until the contents of a file are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where a system can be asked for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
