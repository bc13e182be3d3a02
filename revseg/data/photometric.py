"""Changes of light, colour and sharpness; labels stay as they are.

Two strengths: `PhotometricJitter` is what a camera's automatic settings do between two frames, one
table of 256 bytes for each channel. `StrongPhotometric` is another time of day, another camera or
another weather: for networks that must not depend on the light.

Arithmetic is pixel by pixel: sums whose order depends on the number of threads would give other bytes
in a worker process than in the main one.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from revseg.data.base import Pair
from revseg.data.transforms import check_probability, integer, uniform

GREY = (0.299, 0.587, 0.114)  # how bright red, green and blue are


class PhotometricJitter:
    """Changes brightness, contrast and gamma, by one table of 256 bytes for each channel.

    Args:
        brightness: The highest shift, as a share of the full range.
        contrast: The highest change of the factor around the middle grey.
        gamma: The highest change of the exponent.
        colour: The highest change of the factor of each channel on its own.
    """

    def __init__(
        self, brightness: float = 0.1, contrast: float = 0.2, gamma: float = 0.2, colour: float = 0.05
    ):
        for name, value in (("contrast", contrast), ("gamma", gamma), ("colour", colour)):
            if not 0 <= value < 1:
                raise ValueError(f"expected a {name} change in [0, 1), got {value}")
        if brightness < 0:
            raise ValueError(f"expected a brightness change of at least 0, got {brightness}")
        self.brightness, self.contrast, self.gamma, self.colour = brightness, contrast, gamma, colour

    def __call__(self, image: Tensor, label: Tensor, generator: Generator, /) -> Pair:
        shift, contrast, gamma, *colours = (torch.rand(6, generator=generator) * 2 - 1).unbind()
        channels = 1 + torch.stack(colours)[:, None] * self.colour
        levels = torch.linspace(0, 1, 256) ** (1 + gamma * self.gamma)
        levels = 0.5 + (levels - 0.5) * (1 + contrast * self.contrast) + shift * self.brightness
        return looked_up(image, levels * channels), label


class StrongPhotometric:
    """Exposure, colour temperature, saturation, hue, contrast, gamma, then blur and noise, each at random.

    Args:
        exposure: The highest change in stops: 1 doubles or halves the light.
        temperature: The highest change of red against blue, as a share.
        saturation: The highest change of the factor of colours against grey.
        hue: The highest turn of the colour circle, as a share of the whole circle.
        contrast: The highest change of the factor around the mean of the image.
        gamma: The highest change of the exponent.
        noise: The highest deviation of normal noise, as a share of the full range.
        blur: The highest deviation of a Gaussian blur, in pixels.
        p: How often an image is changed at all.
    """

    def __init__(
        self,
        *,
        exposure: float = 1.0,
        temperature: float = 0.25,
        saturation: float = 0.5,
        hue: float = 0.05,
        contrast: float = 0.4,
        gamma: float = 0.4,
        noise: float = 0.04,
        blur: float = 1.5,
        p: float = 0.8,
    ):
        shares = {"temperature": temperature, "saturation": saturation, "contrast": contrast, "gamma": gamma}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise ValueError(f"expected a {name} change in [0, 1), got {value}")
        for name, value in {"exposure": exposure, "noise": noise, "blur": blur}.items():
            if value < 0:
                raise ValueError(f"expected {name} of at least 0, got {value}")
        if not 0 <= hue <= 0.5:
            raise ValueError(f"expected a hue turn in [0, 0.5], got {hue}")
        self.exposure, self.temperature, self.saturation, self.hue = exposure, temperature, saturation, hue
        self.contrast, self.gamma, self.noise, self.blur = contrast, gamma, noise, blur
        self.p = check_probability(p)

    def __call__(self, image: Tensor, label: Tensor, generator: Generator, /) -> Pair:
        if uniform(generator) >= self.p:
            return image, label
        image = looked_up(image, self._light(generator))
        image = mixed(image, self._colours(generator))
        image = looked_up(image, self._tone(image, generator))
        sigma = uniform(generator, 0, self.blur)
        if integer(generator, 0, 1) and sigma > 0.2:
            image = blurred(image, sigma)
        return noisy(image, uniform(generator, 0, self.noise), generator), label

    def _light(self, generator: Generator) -> Tensor:
        """The level of each byte and channel [3, 256] under another light."""
        stops = uniform(generator, -self.exposure, self.exposure)
        warmth = uniform(generator, -self.temperature, self.temperature)
        return torch.linspace(0, 1, 256) * light_factors(stops, warmth)

    def _colours(self, generator: Generator) -> Tensor:
        """A mixture of the channels [3, 3] that turns the colours and makes them paler or stronger."""
        factor = 1 + uniform(generator, -self.saturation, self.saturation)
        angle = torch.tensor(2 * torch.pi * uniform(generator, -self.hue, self.hue))
        grey = torch.tensor(GREY).expand(3, 3)
        turn = torch.eye(3) * torch.cos(angle) + (1 - torch.cos(angle)) / 3
        cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
        turn = turn + cross * torch.sin(angle) / 3**0.5  # about the axis of the greys
        return grey + factor * (turn - grey @ turn)

    def _tone(self, image: Tensor, generator: Generator) -> Tensor:
        """The level of each byte [1, 256] with another contrast and gamma."""
        factor = 1 + uniform(generator, -self.contrast, self.contrast)
        exponent = 1 + uniform(generator, -self.gamma, self.gamma)
        middle = int(image.sum(dtype=torch.int64)) / image.numel() / 255
        return (middle + (torch.linspace(0, 1, 256) - middle) * factor).clamp(0, 1)[None] ** exponent


def light_factors(stops: float, warmth: float) -> Tensor:
    """By how much red, green and blue [3, 1] are stronger.

    Args:
        stops: Of exposure: 1 doubles the light.
        warmth: How much stronger red is, and weaker blue, as a share.
    """
    return torch.tensor([1 + warmth, 1.0, 1 - warmth])[:, None] * 2**stops


def looked_up(image: Tensor, levels: Tensor) -> Tensor:
    """The image [3, H, W] with every byte replaced by a level in [0, 1], rounded.

    Args:
        image: [3, H, W], uint8.
        levels: [3, 256], or [1, 256] for all channels.
    """
    table = (levels * 255).round().clamp(0, 255).to(torch.uint8).expand(3, -1)
    result = torch.empty_like(image)
    for row, channel, changed in zip(table.numpy(), image.numpy(), result.numpy(), strict=True):
        np.take(row, channel, out=changed, mode="clip")  # three times as fast as indexing by a tensor
    return result


def mixed(image: Tensor, matrix: Tensor) -> Tensor:
    """The image [3, H, W] with its channels mixed by a matrix [3, 3], rounded."""
    red, green, blue = image.float()
    rows = [red * row[0] + green * row[1] + blue * row[2] for row in matrix]
    return torch.stack(rows).round().clamp(0, 255).to(torch.uint8)


def blurred(image: Tensor, sigma: float) -> Tensor:
    """The image [3, H, W] under a Gaussian blur, its border repeated."""
    radius = max(1, round(2.5 * sigma))
    weights = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, radius + 1)]
    floats = image.float()
    for dim, pad in ((1, (0, 0, radius, radius)), (2, (radius, radius, 0, 0))):
        size = image.shape[dim]
        padded = F.pad(floats[None], pad, mode="replicate")[0]
        term = torch.empty_like(floats)
        total = torch.zeros_like(floats)
        for start, weight in enumerate(weights):
            total += torch.mul(padded.narrow(dim, start, size), weight / sum(weights), out=term)
        floats = total
    return floats.round().clamp(0, 255).to(torch.uint8)


def noisy(image: Tensor, deviation: float, generator: Generator) -> Tensor:
    """The image [3, H, W] with normal noise; its deviation is a share of the full range."""
    noise = torch.randn(image.shape, generator=generator) * (255 * deviation)
    return (image.float() + noise).round().clamp(0, 255).to(torch.uint8)
