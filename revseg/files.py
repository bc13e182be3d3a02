"""Files that are either old or new, never half, and that say so when a bit of them has changed.

A file is written beside its place, flushed to the disk, and only then renamed over the old one.
So a full disk, an exception or a killed process leaves the last good file as it was.

Weights are safetensors. Their header holds how to build the network they belong to, and a SHA-256
of everything in the file, which the format itself does not have.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

NO_DIGEST = "0" * 64  # stands in the file while its digest is computed


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or not one of ours."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Puts a file in its place in one step.

    Args:
        path: Where the file belongs; what is there stays until the new file is complete.
        write: Called with the path to write to, in the same folder.

    Raises:
        OSError: If the disk does not take it (full, read-only, over a quota); the message names the file.
        Exception: What else `write` raises, after its file is removed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        try:
            write(part)
            _flush(part)
            os.replace(part, path)
        except BaseException:
            _remove(part)
            raise
        _flush_names(path.parent)
    except OSError as error:
        raise _named(error, path) from error
    except RuntimeError as error:
        # torch's writer says "enforce fail at inline_container.cc" where the disk is full
        raise _named(_reason(error, path.parent), path) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_weights(path: Path, weights: Mapping[str, Tensor], description: Mapping[str, object]) -> None:
    """Writes weights as safetensors, with a description and a checksum in the header of the file.

    Args:
        path: The file.
        weights: A state dict.
        description: What JSON can hold; `revseg.models.load_model` wants "model", "num_classes"
            and "hyperparameters".
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = save(tensors, {"revseg": json.dumps(description), "sha256": NO_DIGEST})
    digest = hashlib.sha256(content).hexdigest()
    signed = content.replace(NO_DIGEST.encode(), digest.encode(), 1)
    write_atomically(path, lambda part: part.write_bytes(signed))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and description from a file of `save_weights`.

    Raises:
        CheckpointError: If the file is damaged or from elsewhere.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = path.read_bytes()
    try:
        header = safetensors_header(content)
        weights = load(content)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    if "revseg" not in header:
        raise CheckpointError(f"{path} holds no weights of revseg: its header does not describe a model")
    digest = header.get("sha256", "")
    if hashlib.sha256(content.replace(digest.encode(), NO_DIGEST.encode(), 1)).hexdigest() != digest:
        raise CheckpointError(f"{path} is damaged: its contents do not have the checksum in its header")
    description = json.loads(header["revseg"])
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} holds no weights of revseg: its header does not describe a model")
    return weights, description


def safetensors_header(content: bytes) -> dict[str, str]:
    """What the writer of a safetensors file noted in its header.

    Raises:
        ValueError: If there is no such header.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 + length:
        raise ValueError("it ends within its header")
    header = json.loads(content[8 : 8 + length])
    notes = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("its header is none of safetensors")
    return notes


def _named(error: OSError, path: Path) -> OSError:
    """The error with the file it is about, as one sentence."""
    reason = error.strerror or str(error)
    return type(error)(error.errno or errno.EIO, f"cannot write {path}: {reason}")


def _reason(error: RuntimeError, folder: Path) -> OSError:
    """The error of the disk behind an error of torch's writer; the error itself, if the disk is in order."""
    probe = folder / ".probe.part"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        return reason
    finally:
        _remove(probe)
    if "inline_container" in str(error) or "enforce fail" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise error


def _remove(path: Path) -> None:
    """Removes a file if it is there and can be."""
    with suppress(OSError):  # a read-only disk: what is to be said is that it could not be written
        path.unlink(missing_ok=True)


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


def finite_or_none(value: float) -> float | None:
    """A number as JSON knows it, which has no NaN."""
    return value if math.isfinite(value) else None
