"""ViT-B/16 with a linear head, upsampled.

Sources: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv:2010.11929; the linear decoder of Strudel et al.,
Segmenter, arXiv:2105.05633. Places are learned for 224 x 224 and interpolated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.architectures.layers import upsampled


class Attention(nn.Module):
    """Every token looks at every token."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(n, t, c))
        return out


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and an Mlp, each behind a norm."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c, 1e-6), Attention(c, heads)
        self.norm2, self.mlp = nn.LayerNorm(c, 1e-6), Mlp(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViTLinear(nn.Module):
    """Twelve blocks on patches of 16 x 16.

    Args:
        classes: C of the logits [N, C, H, W].
        c: Channels.
        depth: Blocks.
        heads: Of the attention.
    """

    def __init__(self, classes: int = 150, c: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, c, 16, 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c))
        self.places = nn.Parameter(0.02 * torch.randn(1, 1 + 14 * 14, c))
        self.blocks = nn.ModuleList(Block(c, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(c, 1e-6)
        self.head = nn.Linear(c, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.patches(images)
        size = maps.shape[2:]
        grid = self.places[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
        places = F.interpolate(grid, size, mode="bicubic").flatten(2).transpose(1, 2)
        first = (self.cls_token + self.places[:, :1]).expand(len(images), -1, -1)
        x = torch.cat([first, maps.flatten(2).transpose(1, 2) + places], 1)
        for block in self.blocks:
            x = block(x)
        scores = self.head(self.norm(x[:, 1:]))
        return upsampled(scores.transpose(1, 2).unflatten(2, size), images)
