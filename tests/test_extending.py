"""`docs/extending.md` in practice: a coupling, a network and a data set, each in one file and one line.

(An operation of one's own stands in tests/kernels.)
"""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from revseg import ReversibleSequence, create_model, load, testing
from revseg.cli import main
from revseg.couplings import COUPLINGS
from revseg.data import DATASETS, ClassTable, SegmentationDataset, create_dataset
from revseg.layers.blocks import ConvBNAct, ImageConvBNAct
from revseg.losses import UpsampleCrossEntropy
from revseg.models import MODELS
from revseg.models.network import Network
from revseg.models.policy import Memory, MemoryPolicy
from tests.helpers import assert_same_step, small_f

DOCS = Path(__file__).parents[1] / "docs" / "extending.md"


def test_a_coupling(monkeypatch):
    """The one of the page, word for word."""
    page = DOCS.read_text()
    source = re.search(r"```python\n(# revseg/couplings/.*?)```", page, re.DOTALL)[1]
    made = {}
    exec(compile(source, "moving_average.py", "exec"), made)  # noqa: S102
    monkeypatch.setitem(COUPLINGS, "moving_average", made["MovingAverageCoupling"])
    block = COUPLINGS["moving_average"](small_f(), small_f())
    x = torch.randn(2, 8, 5, 7)
    testing.check(block, x)
    sequence = ReversibleSequence(block, COUPLINGS["moving_average"](small_f(), small_f())).double()
    assert_same_step(sequence, testing.plain_twin(sequence), x.double())


class TinyNetwork(Network):
    """Three convolutions at half size."""

    stride = 2

    def __init__(self, num_classes: int = 19, *, in_channels: int = 3, memory: Memory = "balanced") -> None:
        super().__init__(num_classes, in_channels)
        policy = MemoryPolicy.of(memory)
        self.stem = ImageConvBNAct(in_channels, 8, stride=2)
        self.body = policy.stage(nn.Sequential(*(policy.block(ConvBNAct(8, 8)) for _ in range(2))))
        self.classifier = nn.Conv2d(8, num_classes, 1)

    def logits(self, images):
        return self.classifier(self.body(self.stem(images)))


@pytest.mark.parametrize("memory", ["fastest", "balanced", "lowest"])
def test_a_network(memory, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TinyNetwork)
    torch.manual_seed(0)
    plain, model = create_model("tiny", 5, memory="fastest"), create_model("tiny", 5, memory=memory)
    model.load_state_dict(plain.state_dict())
    images = torch.randint(0, 256, (2, 3, 17, 23), dtype=torch.uint8)
    labels = torch.randint(0, 5, (2, 17, 23))
    for each in (plain, model):
        UpsampleCrossEntropy()(each(images), labels).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


class Chequers(SegmentationDataset):
    """Squares of two colours."""

    def __init__(self, split, *, size=None, samples=None, transform=None, seed=0):
        table = ClassTable(("dark", "light"), ((0, 0, 0), (255, 255, 255)))
        super().__init__(table, [f"{split}{i}" for i in range(samples or 4)], transform, seed=seed, size=size)

    def load(self, index):
        label = ((torch.arange(32)[:, None] // 8 + torch.arange(32) // 8 + index) % 2).to(torch.uint8)
        return (label * 200 + 20).expand(3, -1, -1).contiguous(), label


def test_a_data_set(monkeypatch, tmp_path):
    monkeypatch.setitem(DATASETS, "chequers", Chequers)
    image, label = create_dataset("chequers", "train", size=(16, 24))[1]
    assert image.shape == (3, 16, 24)
    assert label.unique().tolist() == [0, 1]
    out = tmp_path / "run"
    words = ["--data", "chequers", "--epochs", "1", "--batch", "2", "--threads", "1", "--out", str(out)]
    assert main(["train", *words]) == 0
    weights = str(out / "best.safetensors")
    model = load(weights)
    assert model.classes == Chequers("val").classes
    assert model.description["size"] == [32, 32]
    assert model.description["provenance"]["data"] == "chequers"
    assert model.predict(Chequers("val")[0][0]).shape == (32, 32)
    assert (
        main(["evaluate", weights, "--data", "chequers", "--out", str(tmp_path / "scores"), "--threads", "1"])
        == 0
    )


def test_the_page_names_the_registries():
    page = textwrap.dedent(DOCS.read_text())
    root = DOCS.parents[1]
    for name, place in re.findall(r"`(COUPLINGS|OPERATIONS|MODELS|DATASETS|COMMANDS)` \(`([\w/.]+)`\)", page):
        assert re.search(rf"^{name}\b", (root / place).read_text(), re.MULTILINE), f"{place} has no {name}"
