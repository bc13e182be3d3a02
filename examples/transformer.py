"""A reversible transformer: attention updates one stream, the MLP the other.

Tokens lie as [N, L, C], where dimension 1 is no channels. So the streams are given as a pair, and a pair comes back.
"""

import torch
from torch import Tensor, nn

from revseg import AdditiveCoupling, ReversibleSequence
from revseg.memory import saved_bytes
from revseg.testing import plain_twin


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


def mlp(width: int, dropout: float) -> nn.Sequential:
    layers = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
    return nn.Sequential(nn.LayerNorm(width), *layers)


class Transformer(nn.Module):
    def __init__(self, words: int, width: int, depth: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.body = ReversibleSequence(
            [AdditiveCoupling(Attention(width, 4, dropout), mlp(width, dropout)) for _ in range(depth)]
        )
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y1, y2 = self.body((x, x))
        return self.head((y1 + y2) / 2)


def main(length: int = 64, width: int = 32, depth: int = 6, steps: int = 5) -> float:
    """Learns to copy; returns how many times less the forward pass saves than its plain twin."""
    torch.manual_seed(0)
    net, loss = Transformer(20, width, depth), nn.CrossEntropyLoss()
    tokens = torch.randint(20, (4, length))
    before, after = (saved_bytes(lambda each=each: each(tokens)) for each in (plain_twin(net), net))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(net(tokens).transpose(1, 2), tokens)
        value.backward()
        optimizer.step()
        print(f"loss {value.item():.3f}")
    return before / after


if __name__ == "__main__":
    print(f"{main():.1f} times less is saved")
