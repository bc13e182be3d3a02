import os
import random

import numpy as np
import pytest
import torch

from revseg.files import CheckpointError, load_weights, save_weights, write_atomically, write_text
from revseg.training.checkpoint import load_checkpoint, save_checkpoint
from revseg.training.random_state import random_state, restore_random_state


def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(part):
        part.write_text("half of the new")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, broken):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})

    def fail(*_):
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="Input/output"):
            save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".file.part").write_text("half")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_checkpoint_comes_back(tmp_path):
    state = {"model": {"w": torch.randn(3)}, "history": [{"loss": 0.5, "miou": None}], "n": 3}
    save_checkpoint(tmp_path / "last.pt", state)
    back = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(back["model"]["w"], state["model"]["w"])
    assert back["history"] == state["history"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_checkpoint_is_refused(tmp_path, share):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"w": torch.randn(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged or no checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("load", [load_checkpoint, load_weights])
def test_every_flipped_bit_is_refused_by_name(tmp_path, load):
    """40 of 40 flipped bits in weights loaded; of 1,100 in a checkpoint one did, and 28 were a traceback."""
    path = tmp_path / "file"
    if load is load_checkpoint:
        save_checkpoint(path, {"w": torch.randn(30), "history": [{"loss": 0.5, "miou": None}]})
    else:
        save_weights(path, {"w": torch.randn(30)}, {"model": "vnet", "num_classes": 3})
    content = path.read_bytes()
    load(path)
    said = set()
    for bit in range(0, 8 * len(content), 7):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=rf"{path} (is damaged|holds no weights)") as error:
            load(path)
        said.add(str(error.value).removeprefix(f"{path} is damaged"))
    assert said & {
        ": its contents do not have the checksum in its header",
        ": its contents do not have the checksum at its end",
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff" * 20, "it ends within its header"),
        (b"\x02" + b"\0" * 7 + b"[]", "its header is none of safetensors"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(content, reason, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"w\.safetensors is damaged or no safetensors file: {reason}"):
        load_weights(tmp_path / "w.safetensors")


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_malicious_checkpoint_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": Malicious()}, "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged or no checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    save_checkpoint(tmp_path / "signed.pt", {"history": Malicious()})  # with the right checksum
    with pytest.raises(CheckpointError, match=r"signed\.pt is no checkpoint that can be loaded safely"):
        load_checkpoint(tmp_path / "signed.pt")
    assert not (tmp_path / "executed").exists()


def test_foreign_checkpoint_is_refused(tmp_path, monkeypatch):
    torch.save({"epoch": 3}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged or no checkpoint of revseg"):
        load_checkpoint(tmp_path / "last.pt")
    save_checkpoint(tmp_path / "last.pt", {"format": "revseg training run, version 99"})
    with pytest.raises(CheckpointError, match=r"last\.pt is not a checkpoint of revseg: expected the format"):
        load_checkpoint(tmp_path / "last.pt")


def test_weights_come_back_with_their_description(tmp_path):
    path = tmp_path / "w.safetensors"
    weights = {"a": torch.randn(3, 2).t(), "n": torch.tensor(3)}
    save_weights(path, weights, {"model": "vnet", "miou": None})
    back, description = load_weights(path)
    assert description == {"model": "vnet", "miou": None}
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_damaged_and_foreign_weights_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.randn(100)}, {})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"w\.safetensors is damaged"):
        load_weights(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="no weights of revseg"):
        load_weights(path)


def test_random_generators_continue(tmp_path):
    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.rand(3).tolist(),
        )

    np.random.randn()  # leaves a second normal number for later
    random.gauss(0, 1)
    save_checkpoint(tmp_path / "last.pt", {"random": random_state()})
    first = draw()
    restore_random_state(load_checkpoint(tmp_path / "last.pt")["random"])
    assert draw() == first
