"""A few fixed lights, in which a network that was trained by day can be scored.

Scores under the light of the training drives say little about another hour. These change an image in the same way each time,
so recipes and networks are compared by them: `revseg evaluate WEIGHTS --light dusk`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from revseg.data.photometric import light_factors, looked_up


@dataclass(frozen=True)
class Light:
    """Exposure, warmth and gamma.

    Args:
        stops: Of exposure: -1 halves the light.
        warmth: Red is (1 + warmth) times as strong, blue (1 - warmth) times.
        gamma: The exponent of all levels: above 1 shadows are deeper.
    """

    stops: float = 0.0
    warmth: float = 0.0
    gamma: float = 1.0

    def __call__(self, image: Tensor) -> Tensor:
        """The image [3, H, W], uint8, in this light; as it is, whatever it is, in that of `Light()`.

        Raises:
            ValueError: If it has other channels, or other numbers than bytes.
        """
        if self == Light():
            return image
        if image.dtype != torch.uint8 or image.shape[0] != 3:
            raise ValueError(
                f"expected an image [3, H, W], uint8, to change its light, got {[*image.shape]}, {image.dtype}"
            )
        levels = torch.linspace(0, 1, 256) ** self.gamma
        return looked_up(image, levels * light_factors(self.stops, self.warmth))


LIGHTS = {
    "day": Light(),
    "dusk": Light(-1.0, warmth=0.2, gamma=1.2),
    "shade": Light(-1.0, warmth=-0.2, gamma=1.2),
    "glare": Light(0.7, warmth=0.05, gamma=0.9),
}


def light_of(name: str) -> Light:
    """One of `LIGHTS`.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in LIGHTS:
        raise ValueError(f"unknown light {name!r}; choose one of {', '.join(LIGHTS)}")
    return LIGHTS[name]
