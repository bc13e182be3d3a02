"""What is prepared is kept and bounded, whatever sizes the images have."""

import pytest
import torch

from revseg.inference import runner
from revseg.inference.runner import OWN, Runner
from revseg.inference.runtimes import RUNTIMES, RuntimeFailedError, pytorch
from tests.inference.test_runtimes import Pixels


def counted(monkeypatch, any_size=True):
    """A runtime that notes what it was prepared for."""
    made = []

    def make(network, images, for_any):
        if for_any and not any_size:
            raise ValueError("the size is a constant")
        made.append("any" if for_any else tuple(images.shape[2:]))
        return pytorch(network, images)

    monkeypatch.setattr(runner, "check_runtime", lambda name, device: None)
    monkeypatch.setitem(RUNTIMES, "onnx", make)
    return made


def image(height, dtype=torch.uint8):
    return torch.full((1, 3, height, 4), 7).to(dtype)


def test_many_sizes_share_one_run(monkeypatch):
    made, said = counted(monkeypatch), []
    model = Runner(Pixels(), "onnx", said.append)
    for height in [*range(1, 60), *range(1, 60)]:
        assert torch.equal(model(image(height)), image(height).float())
    assert made == [(1, 4), (2, 4), (3, 4), (4, 4), "any"]
    assert len(said) == len(made) == OWN + 1
    assert said[1].startswith("ONNX Runtime for images of 2 x 4, prepared in")
    model(image(1, torch.float32))  # as scaled images are
    assert made[5:] == ["any"]


def test_pytorch_runs_further_sizes_where_there_is_no_run_for_all(monkeypatch):
    made, said = counted(monkeypatch, any_size=False), []
    model = Runner(Pixels(), "onnx", said.append)
    for height in range(1, 60):
        assert torch.equal(model(image(height)), image(height).float())
    assert len(made) == OWN
    (last,) = said[OWN:]
    assert "on images of any size: the size is a constant; images of further sizes are run by PyTorch" in last


def test_a_size_that_fails_among_the_first_is_an_error(monkeypatch):
    counted(monkeypatch)
    monkeypatch.setitem(RUNTIMES, "onnx", lambda *given: 1 / 0)
    with pytest.raises(RuntimeFailedError, match="images of 2 x 4: division by zero"):
        Runner(Pixels(), "onnx")(image(2))


def test_it_is_for_evaluation_alone():
    network = Pixels().train()
    model = Runner(network, "pytorch").train()
    assert not any(module.training for module in model.modules())
    assert not model(image(2)).requires_grad
    assert network.training
