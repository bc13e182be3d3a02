"""SegFormer-B0: a hierarchical transformer and a head of linear layers.

Source: Xie et al., SegFormer, arXiv:2105.15203. Drop path is left out.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.architectures.layers import conv_norm_act, upsampled


class Attention(nn.Module):
    """Queries of all tokens, keys and values of a reduced map."""

    def __init__(self, c: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(c, c), nn.Linear(c, 2 * c), nn.Linear(c, c)
        self.reduce = nn.Conv2d(c, c, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(c) if reduction > 1 else None

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        n, t, c = x.shape
        q = self.q(x).view(n, t, self.heads, -1).transpose(1, 2)
        if self.reduce is not None and self.norm is not None:
            maps = self.reduce(x.transpose(1, 2).view(n, c, *size))
            x = self.norm(maps.flatten(2).transpose(1, 2))
        k, v = self.kv(x).view(n, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(n, t, c))
        return out


class Mlp(nn.Module):
    """Two linear layers, and between them a depthwise 3 x 3 that knows the places."""

    def __init__(self, c: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(c, ratio * c), nn.GELU(), nn.Linear(ratio * c, c)
        self.dwconv = nn.Conv2d(ratio * c, ratio * c, 3, padding=1, groups=ratio * c)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        maps = self.fc1(x).transpose(1, 2).unflatten(2, size)
        out: Tensor = self.fc2(self.act(self.dwconv(maps).flatten(2).transpose(1, 2)))
        return out


class Block(nn.Module):
    """Attention and an Mlp, each behind a norm."""

    def __init__(self, c: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c), Attention(c, heads, reduction)
        self.norm2, self.mlp = nn.LayerNorm(c), Mlp(c)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), size)
        return x + self.mlp(self.norm2(x), size)


class Stage(nn.Module):
    """Overlapping patches, blocks, a norm."""

    def __init__(
        self, c_in: int, c: int, heads: int, reduction: int, depth: int, patch: int, stride: int
    ) -> None:
        super().__init__()
        self.patches, self.patch_norm = nn.Conv2d(c_in, c, patch, stride, patch // 2), nn.LayerNorm(c)
        self.blocks = nn.ModuleList(Block(c, heads, reduction) for _ in range(depth))
        self.norm = nn.LayerNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.patches(x)
        size = maps.shape[2:]
        x = self.patch_norm(maps.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, size)
        return self.norm(x).transpose(1, 2).reshape(maps.shape)


class SegFormer(nn.Module):
    """Four stages; linear layers, the maps joined at a stride of 4.

    Args:
        classes: C of the logits [N, C, H, W].
        widths: Channels of the stages.
        depths: Blocks of the stages.
        c: Channels of the head.
    """

    def __init__(
        self,
        classes: int = 150,
        widths: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (2, 2, 2, 2),
        c: int = 256,
    ) -> None:
        super().__init__()
        ins, heads, reductions = [3, *widths], (1, 2, 5, 8), (8, 4, 2, 1)
        self.stages = nn.ModuleList(
            Stage(
                ins[i], widths[i], heads[i], reductions[i], depths[i], 7 if i == 0 else 3, 4 if i == 0 else 2
            )
            for i in range(4)
        )
        self.linear = nn.ModuleList(nn.Linear(width, c) for width in widths)
        self.fuse = conv_norm_act(4 * c, c, 1)
        self.dropout, self.head = nn.Dropout(0.1), nn.Conv2d(c, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps, x = [], images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        joined = []
        for linear, y in zip(self.linear, maps, strict=True):
            z = linear(y.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, y.shape[2:])
            joined.append(upsampled(z, maps[0]))
        return upsampled(self.head(self.dropout(self.fuse(torch.cat(joined[::-1], 1)))), images)
