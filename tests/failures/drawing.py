"""Functions that draw random numbers."""

import torch
from torch import nn

from revseg import AdditiveCoupling, AffineCoupling, OneSidedCoupling, ReversibleSequence


class Drawing(nn.Module):
    """conv, batch norm and something that draws."""

    def __init__(self, draw, out_channels=4):
        super().__init__()
        self.conv = nn.Conv2d(4, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.draw = draw

    def forward(self, x):
        return self.draw(self.norm(self.conv(x)))


def drawing_sequence(draw, **options):
    torch.manual_seed(0)
    blocks = [
        AdditiveCoupling(Drawing(draw), Drawing(draw)),
        OneSidedCoupling(Drawing(draw)),
        AffineCoupling(Drawing(draw, 8), Drawing(draw, 8)),
    ]
    return ReversibleSequence(blocks, **options).double()
