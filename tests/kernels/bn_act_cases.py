"""What the tests of batch norm and activation share: layers with numbers, and the modules of PyTorch as twins."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.kernels.batch_statistics.op import batch_statistics
from revseg.kernels.bn_act.op import bn_act
from revseg.kernels.bn_act_backward.op import bn_act_backward
from revseg.kernels.norm import Norm
from tests.helpers import small_input

SIZES = [(2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 4, 6), (3, 4, 1, 1), (2, 5, 1, 9), (1, 1, 3, 2)]
HALF = (torch.float16, torch.bfloat16)

sizes = pytest.mark.parametrize("size", SIZES, ids=str)
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
slopes = pytest.mark.parametrize("slope", ["prelu", "shared", "negative", 0.0, 0.01, 1.0], ids=str)


def ways(*passes):
    """Runs a test for these ways to go through a map; by default for all."""

    def decorate(test):
        test = pytest.mark.usefixtures("passes")(test)
        return pytest.mark.parametrize("passes", passes or ("whole", "blocks", "compiled"), indirect=True)(
            test
        )

    return decorate


@dataclass
class Case:
    """One layer: its raw map, the gradient of what it gives, and its modules."""

    u: Tensor
    dz: Tensor
    bn: nn.BatchNorm2d
    slope: Tensor | float

    def to(self, dtype: torch.dtype) -> "Case":
        """The numbers of this case, exactly, in another dtype."""
        bn = nn.BatchNorm2d(self.bn.num_features, self.bn.eps, affine=self.bn.affine)
        bn.load_state_dict(self.bn.state_dict())
        bn.train(self.bn.training).to(dtype)
        slope = self.slope.to(dtype) if isinstance(self.slope, Tensor) else self.slope
        return Case(self.u.to(dtype), self.dz.to(dtype), bn, slope)

    def norm(self) -> Norm:
        bn = self.bn
        if bn.training:
            mean, var = batch_statistics(self.u)
        else:
            mean, var = bn.running_mean.double(), bn.running_var.double()
        parameters = (None if p is None else p.detach() for p in (bn.weight, bn.bias))
        return Norm(mean, var, *parameters, self.slope, bn.eps)


def case(
    size=(2, 3, 5, 7), dtype=torch.float64, layout=torch.contiguous_format, slope=0.25, affine=True,
    train=True, mean=0.5, std=2.0, seed=0,
):  # fmt: skip
    """A case whose numbers are those of `dtype`; parameters and running statistics are float32 for half."""
    channels = size[1]
    u = (
        (small_input(*size, seed=seed, requires_grad=False) * std + mean)
        .to(dtype)
        .contiguous(memory_format=layout)
    )
    dz = small_input(*size, dtype=dtype, seed=seed + 1, requires_grad=False).contiguous(memory_format=layout)
    bn = nn.BatchNorm2d(channels, eps=1e-3, affine=affine).train(train)
    v = small_input(5, channels, seed=seed + 2, requires_grad=False)
    bn.running_mean.copy_(mean + 0.3 * v[0])
    bn.running_var.copy_(std**2 * v[1].exp())
    if affine:
        with torch.no_grad():
            bn.weight.copy_(v[2])
            bn.bias.copy_(v[3])
    kinds = {"prelu": 0.25 + 0.2 * v[4], "shared": torch.tensor([0.25]), "negative": -v[4].abs()}
    wide = torch.float32 if dtype in HALF else dtype
    slope = kinds[slope].to(wide) if isinstance(slope, str) else slope
    return Case(u, dz, bn.to(wide), slope)


def stream(given: Case, dtype: torch.dtype) -> Tensor:
    """One of the shape and layout of the map, with values of other sizes than the map's."""
    x = 10 * small_input(*given.u.shape, seed=7, requires_grad=False)
    return torch.empty_like(given.u, dtype=dtype).copy_(x)


def added(x: Tensor, z: Tensor, sign: float) -> Tensor:
    """What `bn_act_add` makes of a stream and a map."""
    return x + z if sign > 0 else x - z


def ours(given: Case) -> dict[str, Tensor]:
    norm = given.norm()
    z = bn_act(given.u, norm)
    du, dweight, dbias, dslope = bn_act_backward(given.u, given.dz, norm, given.bn.training)
    found = {"z": z, "du": du}
    if given.bn.affine:
        found |= {"dweight": dweight, "dbias": dbias}
    if isinstance(given.slope, Tensor):
        found["dslope"] = dslope if given.slope.numel() == len(dslope) else dslope.sum(0, keepdim=True)
    return found


def plain(given: Case) -> dict[str, Tensor]:
    """The same by `nn.BatchNorm2d`, an activation and autograd."""
    bn, u = given.bn, given.u.detach().clone().requires_grad_()
    n = bn(u)
    asked = {"du": u}
    if bn.affine:
        asked |= {"dweight": bn.weight, "dbias": bn.bias}
    if isinstance(given.slope, Tensor):
        asked["dslope"] = slope = given.slope.detach().clone().requires_grad_()
        z = F.prelu(n, slope.to(n.dtype))
    else:
        z = n if given.slope == 1.0 else F.relu(n) if given.slope == 0.0 else F.leaky_relu(n, given.slope)
    gradients = torch.autograd.grad(z, list(asked.values()), given.dz)
    return {"z": z.detach(), **dict(zip(asked, gradients, strict=True))}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1)
        assert error <= tolerance, f"{name}: {error:.2g}"


def ratios(*args, **kwargs) -> dict[str, float]:
    """For each result: the errors made, by those that plain PyTorch makes, both over eight cases."""
    mine, theirs = {}, {}
    for seed in range(0, 80, 10):
        given = case(*args, seed=seed, **kwargs)
        exact, found, other = plain(given.to(torch.float64)), ours(given), plain(given)
        for name, truth in exact.items():
            for errors, values in ((mine, found), (theirs, other)):
                error = (values[name].double() - truth).norm().item()
                errors[name] = errors.get(name, 0.0) + error**2
    return {name: (mine[name] / theirs[name]) ** 0.5 for name in mine}
