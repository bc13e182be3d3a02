"""When another runtime is prepared, and whether it is kept: by a clock that the networks move."""

import math
from types import SimpleNamespace

import pytest
import torch

from revseg.inference import automatic
from revseg.inference.automatic import LITTLE, AutomaticRunner
from revseg.inference.runtimes import RUNTIMES, pytorch
from tests.inference.test_runtimes import Pixels

PREPARING = {False: 4.0, True: 12.0}  # seconds


class Clock:
    def __init__(self, by_pytorch, by_onnx):
        self.now, self.made, self.said = 0.0, [], []
        self.by_pytorch, self.by_onnx = by_pytorch, by_onnx

    def perf_counter(self):
        return self.now


class Slow(Pixels):
    """Moves the clock."""

    def __init__(self, clock):
        super().__init__()
        self.seconds = lambda: setattr(clock, "now", clock.now + clock.by_pytorch)

    def __deepcopy__(self, memo):
        return self

    def forward(self, images):
        self.seconds()
        return super().forward(images)


@pytest.fixture
def here(monkeypatch):
    """A network, and a runtime that is installed, with a clock of their own."""

    def make(by_pytorch=0.5, by_onnx=0.25, any_size=True):
        clock = Clock(by_pytorch, by_onnx)

        def onnx(network, images, for_any):
            if for_any and not any_size:
                raise ValueError("the size is a constant")
            clock.made.append("any" if for_any else tuple(images.shape[2:]))
            clock.now += PREPARING[for_any]

            def run(x):
                clock.now += clock.by_onnx
                return x.float()

            return run

        monkeypatch.setitem(RUNTIMES, "onnx", onnx)
        monkeypatch.setattr(AutomaticRunner, "_guessed", lambda self, images: dict(PREPARING))
        monkeypatch.setattr(automatic, "check_runtime", lambda name, device: None)
        monkeypatch.setattr(automatic, "time", SimpleNamespace(perf_counter=clock.perf_counter))
        return clock, AutomaticRunner(Slow(clock), clock.said.append)

    return make


def image(height=4, width=4):
    return torch.full((1, 3, height, width), 7, dtype=torch.uint8)


def run(model, sizes, known=True, done=0):
    for i, size in enumerate(sizes):
        model.expect(done + i, len(sizes) - i if known else None)
        assert torch.equal(model(image(*size)), image(*size).float())


def test_preparing_is_guessed_from_a_small_image(here, monkeypatch):
    guessed = AutomaticRunner._guessed
    _, model = here(by_pytorch=0.01)
    assert guessed(model, image(100, 100)) == pytest.approx({False: 6.0, True: 18.0})
    monkeypatch.setattr(Slow, "forward", lambda self, images: 1 / 0)
    assert guessed(model, image()) == {False: math.inf, True: math.inf}


def test_few_images_are_run_by_pytorch(here):
    for known in (True, False):
        clock, model = here()
        run(model, [(4, 4)] * 20, known)
        assert clock.made == clock.said == []
        assert clock.now == 20 * clock.by_pytorch
        assert model.summary() == "too few images of a size for another runtime to pay"


def test_a_long_folder_is_prepared_for_at_once_and_the_faster_is_kept(here):
    clock, model = here()
    run(model, [(4, 6)] * 5000)
    assert clock.made == [(4, 6)]
    assert len(clock.said) == 1
    assert clock.said[0].startswith(
        "images of 4 x 6 by ONNX Runtime: 250.0 ms, PyTorch takes 500.0 ms (found out in 7."
    )
    assert clock.now < 5000 * 0.25 + 15


def test_a_slower_runtime_is_left(here):
    clock, model = here(by_onnx=0.75)
    run(model, [(4, 6)] * 5000)
    assert clock.made == [(4, 6)]
    assert "4 x 6 by PyTorch: 500.0 ms, ONNX Runtime takes 750.0 ms" in clock.said[0]
    assert clock.now < 5000 * 0.5 + 15


def test_the_end_of_a_folder_is_not_prepared_for(here):
    clock, model = here(by_pytorch=0.1)
    model.preparing = dict.fromkeys(PREPARING, 1000.0)
    run(model, [(4, 4)] * 3000)
    model.preparing = dict(PREPARING)
    run(model, [(4, 4)] * 20, done=3000)
    assert clock.made == []


@pytest.mark.parametrize("by_onnx", [0.25, 2.0])
def test_whenever_a_stream_ends_it_has_lost_a_tenth_at_most(here, by_onnx):
    """Nobody knows how many there are; preparing takes no longer than it was guessed to."""
    ends = []
    clock, model = here(by_onnx=by_onnx)
    for i in range(400):
        model(image())
        ends.append(clock.now / ((i + 1) * clock.by_pytorch))
    assert len(clock.made) == 1
    lost = 1 + LITTLE * (1 + 2 * by_onnx)  # a slow one was guessed to be as fast as PyTorch
    assert max(ends) < lost
    assert min(ends) < (0.8 if by_onnx == 0.25 else 1.01)


def test_sizes_that_come_seldom_share_one_run(here):
    clock, model = here()
    run(model, [(16 + i % 8, 16 + i % 11) for i in range(5000)])
    assert clock.made.count("any") == 1
    assert len(clock.made) <= 5
    assert any("images like" in said for said in clock.said)
    assert clock.now < 5000 * 0.25 + 100


def test_a_network_without_a_run_for_any_size(here):
    clock, model = here(any_size=False)
    run(model, [(16 + i % 80, 16 + i % 110) for i in range(2000)])
    assert "any" not in clock.made
    assert sum("the size is a constant" in said for said in clock.said) == 1
    assert clock.now < 2000 * 0.5 * (1 + LITTLE)


def test_what_fails_is_left_with_a_word(here, monkeypatch):
    clock, model = here()
    monkeypatch.setitem(RUNTIMES, "onnx", lambda network, images, any_size: 1 / 0)
    run(model, [(4, 4)] * 1000)
    assert (
        clock.said[0]
        == "PyTorch goes on: ONNX Runtime cannot run this network on images of 4 x 4: division by zero"
    )
    assert len(clock.said) <= 2
    assert clock.now == 1000 * 0.5

    def failing_later(network, images, any_size):
        calls = []

        def run(x):
            calls.append(x)
            return 1 / 0 if len(calls) > 20 else pytorch(network, x)(x)

        return run

    clock, model = here()
    monkeypatch.setitem(RUNTIMES, "onnx", failing_later)
    clock.by_pytorch = 0.5
    monkeypatch.setattr(
        model,
        "_faster",
        lambda images, any_size: automatic.prepared(model.plain.network, "onnx", images, any_size),
    )
    run(model, [(4, 4)] * 1000)
    assert clock.said == [
        "PyTorch goes on: ONNX Runtime cannot run this network on images of 4 x 4: division by zero"
    ]


def test_where_nothing_else_is_installed_pytorch_runs_and_says_why(monkeypatch):
    def refuse(name, device):
        raise ImportError("ONNX Runtime needs onnx: pip install 'revseg[export]'")

    monkeypatch.setattr(automatic, "check_runtime", refuse)
    model = AutomaticRunner(Pixels())
    model.expect(0, 10**9)
    for _ in range(5):
        model(image())
    assert model.summary() == "ONNX Runtime needs onnx: pip install 'revseg[export]'"
    assert not model.runs
