import copy

import pytest
import torch
from torch import nn

from revseg.couplings import AdditiveCoupling, OneSidedCoupling
from revseg.models.vnet import CPP, VNet
from revseg.ops import upsample_cross_entropy
from revseg.sequence import ReversibleSequence

SMALL = {"num_classes": 5, "widths": (4, 8, 16)}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def images(n=2, size=(33, 49)) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 162_272),
        ({"widths": (8, 64, 128)}, 177_760),
        ({"widths": (8, 16, 128)}, 157_216),
        ({"num_classes": 20}, 162_400),
        ({"classifier_bias": True}, 162_291),
        ({"skip": True}, 162_880),
        ({"skip": 4}, 162_880),
        ({"skip": 2}, 165_792),
        ({"cpp_post_norm": False}, 162_152),
        ({"coupling": "additive"}, 316_928),
        ({"layout": "block_per_pair"}, 162_272),
        ({"cpp_style": "bins", "cpp_sizes": (1, 2, 3, 6)}, 162_272),
    ],
)
def test_parameter_counts(options, parameters):
    assert count(VNet(**options)) == parameters


def test_counts_by_layer():
    model = VNet()
    convolutions, cpp = model.stem
    parts = {"convolutions": count(convolutions), "cpp": count(cpp)}
    parts |= {name: count(part) for name, part in model.named_children() if name != "stem"}
    expected = {
        "convolutions": 1440,
        "cpp": 288,
        "stage2": 4896,
        "down": 3456,
        "stage3": 149_760,
        "classifier": 2432,
    }
    assert parts == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coupling": "additive"},
        {"layout": "block_per_pair"},
        {"alpha": 2, "beta": 3},
        {"kernel": 5, "activation": "relu", "classifier_bias": True},
        {"activation": "prelu_shared", "cpp_pool": "max", "cpp_merge": "mean"},
        {"cpp_style": "bins", "cpp_sizes": (1, 2), "cpp_post_norm": False},
        {"dropout": 0.3},
        {"skip": True},
        {"skip": 2},
        {"dilations": (((1,),), ((2, 3),)), "bn_eps": 1e-5, "bn_momentum": 0.5},
    ],
    ids=str,
)
def test_step_is_that_of_the_plain_twin(options):
    """Loss, every gradient and every running statistic, in every configuration."""
    model = VNet(**SMALL, **options).double()
    twin = VNet(**SMALL, **options, save_activations=True).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 33, 49, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 33, 49))
    losses = []
    for network in (model, twin):
        torch.manual_seed(1)  # the masks of dropout
        loss = upsample_cross_entropy(network(x), labels)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_as_near_to_float64_as_those_of_the_twin():
    model = VNet(**SMALL)
    twin = copy.deepcopy(model)
    exact = copy.deepcopy(model).double()
    for stage in (twin.stage2, twin.stage3, exact.stage2, exact.stage3):
        stage.save_activations = True
    x, labels = torch.randn(2, 3, 33, 49), torch.randint(0, 5, (2, 33, 49))
    for network in (model, twin, exact):
        upsample_cross_entropy(network(x.to(network.classifier.weight)), labels).backward()
    truth = torch.cat([p.grad.flatten() for p in exact.parameters()])

    def error(network: VNet) -> float:
        return float(
            (torch.cat([p.grad.flatten() for p in network.parameters()]) - truth).norm() / truth.norm()
        )

    assert error(model) <= 2 * error(twin)


def test_a_stage_is_one_sequence_with_the_modules_asked_for():
    model = VNet(**SMALL, alpha=2, beta=3)
    assert isinstance(model.stage2, ReversibleSequence)
    assert len(model.stage2.blocks) == 2
    assert len(model.stage3.blocks) == 3
    assert len(VNet(**SMALL, layout="block_per_pair").stage3.blocks) == 6
    assert all(isinstance(block, OneSidedCoupling) for block in model.stage3.blocks)
    additive = VNet(**SMALL, coupling="additive")
    assert all(isinstance(block, AdditiveCoupling) for block in additive.stage3.blocks)
    dilations = [m.dilation[0] for m in model.stage3.modules() if isinstance(m, nn.Conv2d)]
    assert dilations[::2] == [1, 2, 4, 1, 8, 16, 1, 2, 4]


@pytest.mark.parametrize("name", ["stage2", "stage3"])
def test_v_modules_compute_the_equation_of_the_paper(name):
    stage = getattr(VNet(**SMALL, alpha=1, beta=1), name).eval()
    channels = 8 if name == "stage2" else 16
    x = torch.randn(1, channels, 5, 6)
    f = next(m for m in stage.modules() if isinstance(m, nn.Sequential))
    x1, x2 = x.chunk(2, dim=1)
    z = x1 + f(x2)
    torch.testing.assert_close(stage(x), torch.cat((z, x2 + z), dim=1))


def test_average_pools_leave_the_padding_out():
    cpp = CPP(3, 8).eval()
    pooled = [pool(torch.ones(1, 3, 9, 11)) for pool in cpp.pools]
    for p in pooled:
        assert torch.equal(p, torch.ones(1, 3, 5, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 33, 128)}, "three rising widths, the last two even, got"),
        ({"widths": (8, 32)}, "three rising widths"),
        ({"widths": (32, 32, 64)}, "three rising widths"),
        ({"alpha": 0}, "alpha and beta of at least 1, got 0 and 2"),
        ({"dilations": (((1,),),)}, "positive dilations for two stages"),
        ({"dilations": (((1,),), ((),))}, "positive dilations for two stages"),
        ({"dilations": (((1,),), ((0,),))}, "positive dilations for two stages"),
        ({"coupling": "addtive"}, "unknown coupling 'addtive'; choose one of one_sided, additive"),
        ({"kernel": 4}, "odd kernel sizes"),
        ({"layout": "x"}, "unknown layout 'x'; choose one of block_per_module, block_per_pair"),
        ({"activation": "x"}, "unknown activation 'x'"),
        ({"bn_eps": 0.0}, "bn_eps > 0"),
        ({"bn_momentum": 2.0}, r"bn_momentum in \[0, 1\]"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
        ({"skip": 3}, "expected skip to be False, True, 4 or 2, got 3"),
        ({"cpp_pool": "x"}, "unknown pool 'x'; choose one of avg, max"),
        ({"cpp_style": "x"}, "unknown CPP style 'x'; choose one of strided, bins"),
        ({"cpp_merge": "x"}, "unknown CPP merge 'x'; choose one of sum, mean"),
        ({"cpp_sizes": ()}, "one or more CPP sizes"),
        ({"cpp_sizes": (2,)}, "odd if strided"),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VNet(**options)
