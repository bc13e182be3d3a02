"""What a run needs to continue, in one file.

The file is what `torch.save` writes, in types alone that torch loads without executing anything,
and behind that a SHA-256 of it: torch does not look whether a bit has changed.
"""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from revseg.files import CheckpointError, write_atomically

FORMAT = "revseg training run, version 2"
MARK = b"\nrevseg sha256 "  # and the digest, as 64 letters
TRAILER = len(MARK) + 64


def save_checkpoint(path: Path, state: Mapping[str, object]) -> None:
    """Writes what a run needs to continue.

    Args:
        path: The file.
        state: Tensors, numbers, strings, and dicts, lists and tuples of them.

    Raises:
        OSError: If the disk does not take it; the message names the file, what was there is still there.
    """

    def write(part: Path) -> None:
        torch.save({"format": FORMAT, **state}, part)
        digest = _digest(part, part.stat().st_size)
        with open(part, "ab") as file:
            file.write(MARK + digest.encode())

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU. Executes nothing that is in the file.

    Raises:
        CheckpointError: If the file is damaged or from elsewhere.
        OSError: If it cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - TRAILER))
        trailer = file.read()
    if not trailer.startswith(MARK):
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of revseg: it does not end in its checksum"
        )
    if _digest(path, size - TRAILER).encode() != trailer[len(MARK) :]:
        raise CheckpointError(f"{path} is damaged: its contents do not have the checksum at its end")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is no checkpoint that can be loaded safely") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of revseg: expected the format {FORMAT!r}")
    return state


def _digest(path: Path, length: int) -> str:
    """SHA-256 of the first bytes of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while length > 0 and (block := file.read(min(length, 2**20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()
