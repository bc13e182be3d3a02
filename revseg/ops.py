"""The door to the kernels: every operation, and whatever else of them is of use outside.

`REVSEG_KERNELS=0` in the environment turns them off: layers then run as ordinary PyTorch modules. Each name is
loaded when it is first used, so that who takes one does not wait for all.
"""

# ruff: noqa: PLC0414, an import under its own name hands it on

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revseg.kernels.asymmetric_conv.op import asymmetric_conv as asymmetric_conv
    from revseg.kernels.asymmetric_conv.op import asymmetric_conv_backward as asymmetric_conv_backward
    from revseg.kernels.asymmetric_conv.op import has_asymmetric_conv as has_asymmetric_conv
    from revseg.kernels.batch_statistics.op import batch_statistics as batch_statistics
    from revseg.kernels.bn_act.op import bn_act as bn_act
    from revseg.kernels.bn_act.op import bn_act_add as bn_act_add
    from revseg.kernels.bn_act_backward.op import bn_act_backward as bn_act_backward
    from revseg.kernels.bn_act_backward.op import bn_act_gradient as bn_act_gradient
    from revseg.kernels.bn_act_backward.op import bn_act_sums as bn_act_sums
    from revseg.kernels.cpu.compiled import is_large as is_large
    from revseg.kernels.dispatch import DTYPES as DTYPES
    from revseg.kernels.dispatch import forced as forced
    from revseg.kernels.dispatch import kernels_are_on as kernels_are_on
    from revseg.kernels.dispatch import plain as plain
    from revseg.kernels.norm import Norm as Norm
    from revseg.kernels.precision import widest as widest
    from revseg.kernels.registry import KERNELS as KERNELS
    from revseg.kernels.relaid.op import relaid as relaid
    from revseg.kernels.running_statistics.op import move_statistics as move_statistics
    from revseg.kernels.shapes import has_values as has_values
    from revseg.kernels.sum_of_pools.op import sum_of_pools as sum_of_pools
    from revseg.kernels.sum_of_pools.op import sum_of_pools_backward as sum_of_pools_backward
    from revseg.kernels.upsample_argmax.op import upsample_argmax as upsample_argmax
    from revseg.kernels.upsample_cross_entropy.op import upsample_cross_entropy as upsample_cross_entropy
    from revseg.kernels.verify import Kernel as Kernel
    from revseg.kernels.verify import compare as compare
    from revseg.kernels.verify import converted as converted

_HOME = {
    "DTYPES": "dispatch",
    "KERNELS": "registry",
    "Kernel": "verify",
    "Norm": "norm",
    "asymmetric_conv": "asymmetric_conv.op",
    "asymmetric_conv_backward": "asymmetric_conv.op",
    "batch_statistics": "batch_statistics.op",
    "bn_act": "bn_act.op",
    "bn_act_add": "bn_act.op",
    "bn_act_backward": "bn_act_backward.op",
    "bn_act_gradient": "bn_act_backward.op",
    "bn_act_sums": "bn_act_backward.op",
    "compare": "verify",
    "converted": "verify",
    "forced": "dispatch",
    "has_asymmetric_conv": "asymmetric_conv.op",
    "has_values": "shapes",
    "is_large": "cpu.compiled",
    "kernels_are_on": "dispatch",
    "move_statistics": "running_statistics.op",
    "plain": "dispatch",
    "relaid": "relaid.op",
    "sum_of_pools": "sum_of_pools.op",
    "sum_of_pools_backward": "sum_of_pools.op",
    "upsample_argmax": "upsample_argmax.op",
    "upsample_cross_entropy": "upsample_cross_entropy.op",
    "widest": "precision",
}

__all__ = list(_HOME)


if not TYPE_CHECKING:  # to whom every name would be one

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'revseg.ops' has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f"revseg.kernels.{_HOME[name]}"), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
