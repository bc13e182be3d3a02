"""`reversible`: networks as users have them, converted, against the plain twin and by formula."""

import copy

import pytest
import torch
from torch import nn

from revseg import ResidualChain, ReversibleSequence, Stack, reversible
from revseg.layers.blocks import ConvBNAct
from revseg.memory import peak_bytes, saved_bytes
from revseg.testing import plain_twin
from tests.helpers import assert_bitwise, assert_same_result, assert_same_step, relative_error, run_step
from tests.residual_nets import (
    Bottleneck,
    NonBottleneck1D,
    NormAfterSum,
    PreActivation,
    Projected,
    ResNet,
    images,
    row,
)

BLOCKS = [NonBottleneck1D, PreActivation, lambda c: NonBottleneck1D(c, dropout=0.3)]


def test_a_resnet_is_converted_and_the_original_left_as_it_is():
    model = ResNet()
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    x, state = images(32, 32, dtype=torch.float32), torch.get_rng_state()
    converted, chains = reversible(model, x)
    assert chains == [["layer1.1", "layer1.2"], ["layer2.1", "layer2.2", "layer2.3"]]
    assert torch.equal(torch.get_rng_state(), state)
    assert names == [name for name, _ in model.named_modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert converted.training
    assert not any(p.data_ptr() == q.data_ptr() for p in model.parameters() for q in converted.parameters())
    assert sum(p.numel() for p in converted.parameters()) == sum(p.numel() for p in model.parameters())
    assert isinstance(converted.layer1[1], ResidualChain)
    assert len(converted.layer1) == 2


def test_names_in_the_state_dict_follow_the_rule_of_the_docstring():
    model = ResNet()
    converted, chains = reversible(model, images(32, 32, dtype=torch.float32))
    prefixes = {
        f"{name}.": f"{chain[0]}.sequence.blocks.{i}.f.block."
        for chain in chains
        for i, name in enumerate(chain)
    }
    weights = {}
    for name, value in model.state_dict().items():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        weights[prefixes.get(prefix, "") + name.removeprefix(prefix)] = value
    assert weights.keys() == converted.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in converted.state_dict().items())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(33, 49), (32, 64)], ids=str)
@pytest.mark.parametrize("options", [{}, {"per_block": True}, {"keep": 1}], ids=str)
def test_a_step_of_a_resnet_is_that_of_the_plain_twin(training, size, options):
    model = ResNet().double().train(training)
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(bn.bias)  # or ReLU stands at its kink wherever a map is zero
    model, _ = reversible(model, images(33, 33), **options)
    assert_same_step(model, plain_twin(model), images(*size))


@pytest.mark.parametrize("block", BLOCKS)
def test_a_step_of_other_blocks_is_that_of_the_plain_twin(block):
    model, chains = reversible(row(block).double(), images(8, 8))
    assert chains == [["1", "2", "3"]]
    assert_same_step(model, plain_twin(model), images(7, 9))


@pytest.mark.parametrize("block", BLOCKS[:2])
def test_lossless_gradients_are_bitwise_those_of_the_plain_twin(block):
    model, _ = reversible(row(block), images(8, 8, dtype=torch.float32), exact="lossless")
    twin, x = plain_twin(model), images(7, 9, dtype=torch.float32)
    assert_bitwise(run_step(model, x), run_step(twin, x))


def test_gradients_are_as_near_to_float64_as_those_of_the_plain_twin():
    model, _ = reversible(row(PreActivation, depth=8), images(8, 8, dtype=torch.float32))
    x = images(9, 11, dtype=torch.float32)
    exact = run_step(plain_twin(model).double(), x.double()).gradients
    ours, plain = (run_step(net, x).gradients for net in (model, plain_twin(model)))
    assert relative_error(ours, exact) <= 2 * relative_error(plain, exact)


@pytest.mark.parametrize("block", [lambda c: Bottleneck(c, c), NonBottleneck1D, PreActivation])
def test_two_blocks_compute_what_they_did(block):
    """Outputs, gradients and statistics of the network before the conversion."""
    model = row(block, depth=2).double()
    converted, _ = reversible(model, images(8, 8))
    x = images(7, 9).requires_grad_()
    ours, plain = run_step(converted, x), run_step(model, x)
    for result in (ours, plain):
        for values in (result.gradients, result.buffers):
            for name in list(values):
                plain_name = name.replace("1.sequence.blocks.1.f.block", "2")
                values[plain_name.replace("1.sequence.blocks.0.f.block", "1")] = values.pop(name)
    assert_same_result(ours, plain, 1e-9)


def test_longer_chains_follow_the_equations():
    blocks = [NonBottleneck1D(4).eval() for _ in range(3)]
    x = torch.randn(1, 4, 5, 6).relu()
    y1 = x + blocks[0](x) - x
    y2 = x + blocks[1](y1) - y1
    y1 = y1 + blocks[2](y2) - y2
    torch.testing.assert_close(ResidualChain(*blocks)(x), y1 + y2 - x)


def test_memory_does_not_grow_with_depth():
    def saved(depth, convert):
        model = row(PreActivation, depth)
        if convert:
            model, _ = reversible(model, images(8, 8, dtype=torch.float32))
        x = images(64, 64, dtype=torch.float32)

        def step():
            model.zero_grad()
            model(x).square().mean().backward()

        return saved_bytes(lambda: model(x)), peak_bytes(step, before=step)

    shallow, deep = saved(2, True), saved(16, True)
    assert deep[0] <= 1.02 * shallow[0]
    assert deep[1] <= 1.1 * shallow[1]
    assert saved(16, False)[0] > 5 * saved(2, False)[0] > 5 * shallow[0]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))),
        nn.Sequential(*(ConvBNAct(3, 3) for _ in range(3))),
        nn.Sequential(*(nn.PReLU(3) for _ in range(3))),
        nn.Sequential(*(nn.Identity() for _ in range(3))),
        row(NormAfterSum),
        row(Projected),
        row(PreActivation, depth=1),
        nn.Sequential(
            PreActivation(3), nn.Conv2d(3, 3, 1), PreActivation(3), nn.Conv2d(3, 4, 1), PreActivation(4)
        ),
    ],
    ids=["convolutions", "layers", "activations", "identities", "norm", "projected", "single", "apart"],
)
def test_what_is_no_chain_of_residual_blocks_is_refused(model):
    with pytest.raises(
        ValueError, match=r"found no residual blocks .* 2 or more in a row, among the children"
    ):
        reversible(model, images(8, 8, dtype=torch.float32))


def test_blocks_called_otherwise_than_by_their_row_are_left():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.used_as_list, self.also_alone = row(PreActivation, channels=3), row(PreActivation)
            self.shared = nn.Sequential(*[PreActivation(8)] * 2, PreActivation(8))
            self.right = nn.Sequential(PreActivation(8), PreActivation(8))

        def forward(self, x):
            for block in self.used_as_list[1:]:
                x = block(x)
            x = self.also_alone(x)
            x = self.also_alone[1](self.also_alone[2](self.also_alone[3](x)))
            return self.right(self.shared(x))

    _, chains = reversible(Picks(), images(8, 8, dtype=torch.float32))
    assert chains == [["shared.0", "shared.1", "shared.2"], ["right.0", "right.1"]]


def test_a_row_called_twice_is_converted():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = row(PreActivation, depth=2)

        def forward(self, x):
            return self.body(x) + self.body(x.flip(3))

    model, chains = reversible(Siamese().double(), images(8, 8))
    assert chains == [["body.1", "body.2"]]
    assert_same_step(model, plain_twin(model), images(7, 9))


def test_the_outer_chain_is_taken():
    class Nested(PreActivation):
        def __init__(self, channels):
            super().__init__(channels)
            self.conv = nn.Sequential(
                nn.Conv2d(channels, channels, 1), PreActivation(channels), PreActivation(channels)
            )

    model, chains = reversible(row(Nested, depth=2).double(), images(8, 8))
    assert chains == [["1", "2"]]
    assert_same_step(model, plain_twin(model), images(7, 9))


def test_a_stack_is_a_row_too():
    model = Stack(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), PreActivation(4), PreActivation(4))
    model, chains = reversible(model.double(), images(8, 8))
    assert chains == [["3", "4"]]
    assert_same_step(model, plain_twin(model), images(7, 9))


@pytest.mark.parametrize("is_block", [NormAfterSum, (NormAfterSum,), lambda m: hasattr(m, "gamma")])
def test_the_user_chooses_the_blocks(is_block):
    model, chains = reversible(row(NormAfterSum).double(), images(8, 8), is_block=is_block)
    assert chains == [["1", "2", "3"]]
    assert_same_step(model, plain_twin(model), images(7, 9))


def test_is_block_sees_the_modules_of_the_model_with_their_weights():
    model = row(PreActivation, depth=4)
    chosen = [model[2], model[3]]
    _, chains = reversible(model, images(8, 8, dtype=torch.float32), is_block=lambda m: m in chosen)
    assert chains == [["2", "3"]]


def test_at_least():
    model = ResNet()
    x = images(32, 32, dtype=torch.float32)
    assert reversible(model, x, at_least=3)[1] == [["layer2.1", "layer2.2", "layer2.3"]]
    with pytest.raises(ValueError, match=r"found no residual blocks that keep .* 4 or more in a row"):
        reversible(model, x, at_least=4)
    with pytest.raises(ValueError, match="expected at_least to be 1 or more, got 0"):
        reversible(model, x, at_least=0)
    with pytest.raises(ValueError, match="found no blocks that is_block accepts that keep"):
        reversible(model, x, is_block=nn.Linear)


def test_modes_of_the_blocks_are_kept():
    model = ResNet()
    model.layer2[2].bn1.eval()  # frozen
    converted, _ = reversible(model, images(32, 32, dtype=torch.float32))
    frozen = [name for name, module in converted.named_modules() if not module.training]
    assert frozen == ["layer2.1.sequence.blocks.1.f.block.bn1"]
    assert not any(
        m.training for m in reversible(model.eval(), images(32, 32, dtype=torch.float32))[0].modules()
    )


def test_options_reach_the_sequences():
    model, _ = reversible(row(PreActivation), images(8, 8, dtype=torch.float32), exact=True, check=None)
    sequence = next(m for m in model.modules() if isinstance(m, ReversibleSequence))
    assert sequence.exact is True
    assert sequence.check is None
    with pytest.raises(ValueError, match="expected keep to be a number of updates"):
        reversible(row(PreActivation), images(8, 8, dtype=torch.float32), keep=-1)


@pytest.mark.parametrize("kind", [nn.Sequential, Stack])
def test_a_converted_row_is_an_ordinary_sequential(kind):
    """Names had gaps, so that `append` wrote over a layer."""
    blocks = [PreActivation(4) for _ in range(5)]
    model = kind(nn.Conv2d(3, 4, 1), *blocks[:3], nn.Conv2d(4, 4, 1), *blocks[3:], nn.Conv2d(4, 8, 1))
    model, chains = reversible(model, images(8, 8, dtype=torch.float32))
    assert chains == [["1", "2", "3"], ["5", "6"]]
    assert list(model._modules) == [str(i) for i in range(5)]
    x, plain = images(8, 8, dtype=torch.float32), list(model)
    model.append(head := nn.Conv2d(8, 2, 1))
    model.insert(1, first := nn.PReLU())
    model.extend([last := nn.ReLU()])
    wanted = [plain[0], first, *plain[1:], head, last]
    assert all(a is b for a, b in zip(model, wanted, strict=True))
    torch.testing.assert_close(model(x), nn.Sequential(*wanted)(x))


def test_rows_inside_of_rows_are_numbered_too():
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), PreActivation(4), PreActivation(4), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 4, 1), PreActivation(4), PreActivation(4), inner)
    model, chains = reversible(model, images(8, 8, dtype=torch.float32))
    assert chains == [["1", "2"], ["3.1", "3.2"]]
    assert (len(model), list(model[2]._modules)) == (3, ["0", "1", "2"])
