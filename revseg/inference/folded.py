"""Batch norm folded into the convolution before it, for evaluation alone.

In evaluation batch norm is a factor and a shift a channel, both constant: they become part of the weights.
"""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from revseg.engine.tracing import has_hooks

Network = TypeVar("Network", bound=nn.Module)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def folded(network: Network) -> Network:
    """A copy in evaluation mode; wherever batch norm follows a convolution in a row, the convolution does both.

    Batch norm that stands elsewhere, that has no running statistics, or on which a hook waits, stays as it is.

    Args:
        network: Any module; left as it is.
    """
    network = copy.deepcopy(network).eval()
    for module in list(network.modules()):
        if not isinstance(module, nn.Sequential):
            continue
        names = list(module._modules)
        for name, following in itertools.pairwise(names):
            conv, bn = module._modules[name], module._modules[following]
            if (
                type(conv) in _CONVOLUTIONS
                and isinstance(bn, nn.modules.batchnorm._BatchNorm)
                and not has_hooks(conv, bn)
            ):
                if bn.running_mean is None or type(bn).forward is not nn.modules.batchnorm._BatchNorm.forward:
                    continue
                transpose = isinstance(conv, nn.ConvTranspose2d)
                module._modules[name] = fuse_conv_bn_eval(conv, bn, transpose)  # type: ignore[type-var]
                module._modules[following] = nn.Identity()
    return network
