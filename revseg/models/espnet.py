"""ESPNet: spatial pyramids of dilated convolutions, and a decoder of a few channels.

The encoder halves the size three times. At 1/4 and 1/8 a strided ESP block is followed by p and q of
the same size (`ESP`); what comes into and goes out of them is concatenated. The image, made small
by average pools, is concatenated too at 1/2 and 1/4. The decoder works on C channels, one for each
class: three times it doubles the size, twice it joins what the encoder has at that size.

Source: Mehta, Rastegari, Caspi, Shapiro and Hajishirzi, ESPNet: Efficient Spatial Pyramid of Dilated
Convolutions for Semantic Segmentation, arXiv:1803.06815, figure 4 (d).

As in the authors' code: no bias anywhere, batch norm eps 1e-3, a PReLU per channel, pools that count
their padding, dilated ESP blocks also where the paper says strided. The paper's tables have p = 2
and q = 8, 363,462 parameters; the code's own default is q = 3. Odd sizes are rounded up on the
way down and cropped on the way up.

The reversible edition is ours, a change of the architecture and not another way to compute it. Every
residual ESP block of C channels becomes two additive couplings of streams of C / 2, with four functions
that are ESP blocks of half the channels, batch norm and PReLU included. A convolution of half the channels
has a quarter of the weights, so widths stay, and operations and parameters almost (a fifth of 64 or of 32
channels is rounded). What changes: nothing follows a sum, and each resolution is four times as deep.

Source of the coupling: Gomez et al., The Reversible Residual Network, arXiv:1707.04585.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from revseg.couplings import AdditiveCoupling
from revseg.exact.modes import Exact
from revseg.layers.blocks import BNAct, ImageConvBNAct
from revseg.layers.images import Normalization, crop, of_each_image
from revseg.layers.stack import Stack
from revseg.models.espnet_decoder import Decoder, Wrap
from revseg.models.espnet_esp import DILATIONS, ESP
from revseg.models.network import Network, check_edition
from revseg.models.official import renamed
from revseg.models.policy import Memory, MemoryPolicy


class ESPNet(Network):
    """ESPNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, H, W].

    Args:
        num_classes: C, the number of classes. The decoder has as many channels, but at least 5.
        widths: Channels at 1/2, 1/4 and 1/8 of the size, rising, the last two at least 5; if reversible
            they are even and at least 10.
        p: Number of ESP blocks at 1/4, beside the one that halves the size.
        q: Number of ESP blocks at 1/8, beside the one that halves the size.
        skip_images: The decoder sees the images at 1/2 beside the map of that size, as in the authors'
            training code; their released network for Cityscapes, in their test code, has that map alone.
        in_channels: Of the images.
        reversible: The blocks of each level form one `ReversibleSequence`, which keeps only its output for
            the backward pass, however deep it is.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`.
        save_activations: Train with ordinary autograd: same numbers, same state dict, more memory.
        exact: Bit-for-bit inversion, if reversible: True, or "lossless"; see `ReversibleSequence`.

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 1
    official_normalizations: ClassVar = {  # of BGR images, divided by 255 once more
        20: Normalization(
            (72.3923111 / 255, 82.90893555 / 255, 73.15840149 / 255),
            (45.3192215, 46.15289307, 44.91483307),
            True,
        ),
        12: Normalization(
            (105.65775 / 255, 103.329834 / 255, 99.625404 / 255), (71.11642, 71.676155, 67.87634), True
        ),
    }
    official_files = (
        "the released files are of num_classes=20, p=2, q=3, 5 or 8, skip_images=False (Cityscapes), and of "
        "num_classes=12, p=2, q=8 (CamVid)"
    )

    def __init__(
        self,
        num_classes: int = 19,
        *,
        widths: Sequence[int] = (16, 64, 128),
        p: int = 2,
        q: int = 8,
        skip_images: bool = True,
        in_channels: int = 3,
        reversible: bool = False,
        memory: Memory = "balanced",
        save_activations: bool = False,
        exact: Exact = False,
    ) -> None:
        super().__init__(num_classes, in_channels)
        self.reversible = reversible
        _check(widths, p, q, reversible)
        check_edition(reversible, exact)
        policy = MemoryPolicy.of(memory, save_activations, full_logits=True)
        policy = policy.beside_sequences() if reversible else policy
        block = policy.block

        def units(channels: int, count: int) -> nn.Module:
            if not reversible:
                row = Stack(*(block(ESP(channels, channels, residual=True)) for _ in range(count)))
                return policy.groups(row)
            halves = ([ESP(channels // 2, channels // 2) for _ in "fg"] for _ in range(2 * count))
            return policy.sequence((AdditiveCoupling(*half) for half in halves), exact)

        w1, w2, w3 = widths
        half, quarter, eighth = w1 + in_channels, 2 * w2 + in_channels, 2 * w3  # with what is concatenated
        self.level1 = block(Level1(in_channels, w1, skip_images))  # 1/2
        level2 = Level(block(ESP(half, w2, stride=2)), units(w2, p), block(Join(quarter)))
        self.level2 = policy.stage(level2)  # 1/4
        level3 = Level(block(ESP(quarter, w3, stride=2)), units(w3, q), block(Join(eighth)))
        self.level3 = policy.stage(level3)  # 1/8
        self.again = policy.again()
        last: Wrap = nn.Identity() if self.again.on else block  # logits that run again would stand twice
        decoder = Decoder((half if skip_images else w1, quarter, eighth), num_classes, block, last)
        self.decoder = decoder if self.again.on else policy.stage(decoder)  # 1

    def logits(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, H, W]
        if self.again.on:
            parts = self.level1, self.level2, self.level3, self.decoder
            decoder: Any = self.decoder
            logits = decoder.classified(self.again(self._features, parts, images))
        else:
            logits = self.decoder(*self._encoded(images))
        return crop(logits, images.shape[-2:])

    def _encoded(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps at 1/2, 1/4 and 1/8 that the decoder reads."""
        half, image, *alone = self.level1(images)
        quarter = self.level2(half, image)
        return (*(alone or [half]), quarter, self.level3(quarter))

    def _features(self, images: Tensor) -> Tensor:
        """What the classes are read from."""
        decoder: Any = self.decoder
        return decoder.features(*self._encoded(images))  # type: ignore[no-any-return]

    @staticmethod
    def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the authors' ESPNet, encoder and decoder, under our names.

        Raises:
            ValueError: If a name is not one of the official network's.
        """
        modules = {
            "encoder.classifier.conv": "decoder.level3.0",
            "br": "decoder.level3.1",
            "up_l3.0": "decoder.level3.2",
            "level3_C.conv": "decoder.level2.project",
            "up_l2.0": "decoder.level2.merge.2",
            "up_l2.1.bn": "decoder.level2.merge.3",
            "up_l2.1.act": "decoder.level2.merge.4",
            "classifier": "decoder.level1.classify.1",
        }
        for theirs, ours in (("encoder.level1", "level1.conv"), ("conv", "decoder.level1.classify.0")):
            modules |= {f"{theirs}.{part}": f"{ours}.{i}" for i, part in enumerate(("conv", "bn", "act"))}
        norms = {
            "encoder.b1": "level1.norm",
            "encoder.b2": "level2.join.norm",
            "encoder.b3": "level3.join.norm",
        }
        norms["combine_l2_l3.0"] = "decoder.level2.merge.0"
        pyramids = {"combine_l2_l3.1": "decoder.level2.merge.1"}
        for level in ("level2", "level3"):  # no more blocks than names
            pyramids[f"encoder.{level}_0"] = f"{level}.down"
            pyramids |= {f"encoder.{level}.{i}": f"{level}.units.{i}" for i in range(len(state))}
        for theirs, ours in pyramids.items():
            modules[f"{theirs}.c1.conv"] = f"{ours}.reduce"
            modules |= {f"{theirs}.d{d}.conv": f"{ours}.dilated.{i}" for i, d in enumerate(DILATIONS)}
            norms[theirs if theirs.endswith("_0") else f"{theirs}.bn"] = f"{ours}.norm"
        for theirs, ours in norms.items():
            modules |= {f"{theirs}.bn": f"{ours}.0", f"{theirs}.act": f"{ours}.1"}
        return renamed(state, modules)


class Level1(nn.Module):
    """A strided convolution of the images, beside the images themselves made as small.

    Args:
        in_channels: Channels of the images.
        channels: Channels that the convolution makes.
        skip_images: Without this the convolution's map comes out a third time, alone.
    """

    def __init__(self, in_channels: int, channels: int, skip_images: bool) -> None:
        super().__init__()
        self.skip_images = skip_images
        self.conv = ImageConvBNAct(in_channels, channels, stride=2)
        self.norm = BNAct(channels + in_channels)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The map at 1/2 [N, channels + 3, h, w] and the images at 1/4 [N, 3, h', w']."""
        x = self.conv(images)
        small = of_each_image(_smaller, images, self.conv.prepare).to(x.dtype)
        joined = self.norm(x, small)
        return (joined, _smaller(small), *(() if self.skip_images else (x,)))


class Level(nn.Module):
    """What is done at one size: down, some blocks, and both their outputs joined.

    Args:
        down: Halves the size.
        units: The blocks.
        join: A `Join` of what comes out.
    """

    def __init__(self, down: nn.Module, units: nn.Module, join: nn.Module) -> None:
        super().__init__()
        self.down, self.units, self.join = down, units, join

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        first = self.down(x)
        last = self.units(first)
        maps = (first, last) if image is None else (last, first, image)  # in the order of the authors' code
        return self.join(*maps)  # type: ignore[no-any-return]


class Join(nn.Module):
    """Maps concatenated, batch norm and PReLU: [N, C, h, w] in all.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = BNAct(channels)

    def forward(self, *maps: Tensor) -> Tensor:
        return self.norm(*maps)  # type: ignore[no-any-return]


def _smaller(x: Tensor) -> Tensor:
    """At half the size; zeros around the map count, as in the authors' code."""
    return F.avg_pool2d(x, 3, stride=2, padding=1)


def _check(widths: Sequence[int], p: int, q: int, reversible: bool) -> None:
    if len(widths) != 3 or not 0 < widths[0] < widths[1] < widths[2]:
        raise ValueError(f"expected three rising widths, got {widths}")
    if reversible and any(width % 2 or width < 10 for width in widths[1:]):
        raise ValueError(f"expected even widths of at least 10 at 1/4 and 1/8, got {widths}")
    if p < 1 or q < 1:
        raise ValueError(f"expected p and q of at least 1, got {p} and {q}")
