"""Scores of VNet at 1/2 of the size, for things that are two pixels wide. Ours, not the paper's."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 8  # channels of what stage 2 says


class Refinement(nn.Module):
    """Scores [N, C, h, w] of the stem's map, which has the edges, and of stage 2, which knows what they belong to.

    Both are joined at the size of the stem's map, where a 3 x 3 convolution with batch norm and activation sees them together:
    a bright bar is a pole in front of a building, and a mark on a road.

    Args:
        channels: Of the stem's map.
        num_classes: C.
        conv: Makes a convolution with its norm and activation, of the channels that come in and go out.
    """

    def __init__(self, channels: int, num_classes: int, conv: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.merge = conv(channels + CONTEXT, 2 * CONTEXT)
        self.classifier = nn.Conv2d(2 * CONTEXT, num_classes, 1, bias=False)

    def forward(self, edges: Tensor, context: Tensor) -> Tensor:
        context = F.interpolate(context, edges.shape[2:], mode="bilinear")
        return self.classifier(self.merge(torch.cat((edges, context), dim=1)))  # type: ignore[no-any-return]
