"""The door to the kernels: every operation, and the rule that decides whether they are used.

`REVSEG_KERNELS=0` in the environment turns them off: layers then run as ordinary PyTorch modules.
"""

from revseg.kernels.asymmetric_conv.op import (
    asymmetric_conv,
    asymmetric_conv_backward,
    has_asymmetric_conv,
)
from revseg.kernels.bn_act.backward import bn_act_backward, bn_act_sums
from revseg.kernels.bn_act.op import batch_statistics, bn_act, bn_act_add
from revseg.kernels.dispatch import has_kernel, kernels_are_on
from revseg.kernels.norm import Norm
from revseg.kernels.relaid import relaid
from revseg.kernels.running_statistics.op import move_statistics
from revseg.kernels.sum_of_pools.op import sum_of_pools, sum_of_pools_backward
from revseg.kernels.upsample_argmax.op import upsample_argmax
from revseg.kernels.upsample_cross_entropy.op import upsample_cross_entropy

__all__ = [
    "Norm",
    "asymmetric_conv",
    "asymmetric_conv_backward",
    "batch_statistics",
    "bn_act",
    "bn_act_add",
    "bn_act_backward",
    "bn_act_sums",
    "has_asymmetric_conv",
    "has_kernel",
    "kernels_are_on",
    "move_statistics",
    "relaid",
    "sum_of_pools",
    "sum_of_pools_backward",
    "upsample_argmax",
    "upsample_cross_entropy",
]
