"""VNet: 0.16 M parameters, trained at full resolution.

Three convolutions make 8 channels at 1/2 of the size. Twice, contextual pyramid pooling (CPP)
halves the size and widens the map, and reversible V modules refine it. A 1 x 1 convolution
reads the classes at 1/8. A V module splits its channels into two streams and computes

    Z = X1 + F(X2),  Y1 = Z,  Y2 = X2 + Z

where F is a chain of asymmetric (n x 1, 1 x n) convolutions, so X1 and X2 follow from Y1 and Y2.

Source: Lin, Lu, Gao, Qiao and Li, VNet: A Versatile Network for Efficient Real-Time Semantic
Segmentation; the letter to it is Li et al., Sci. China Inf. Sci. 65(3):139105, 2022.

This is a reconstruction. The text gives the three stages and their sizes, 8 channels in stage 1,
the parts of CPP and of V, the equation, alpha = 1, beta = 2 and 0.16 M parameters. Its Table 1,
with the layers, is lost in the copy that we have. Ours, and chosen so that the count comes out, are:
the widths 32 and 128; three pairs in each F; no bias before batch norm and a PReLU per channel.
(162,272 parameters. With widths 8, 64, 128 they are 177,760: the 0.18 M that the text says once.)
Ours without any such evidence, as they have no parameters: the dilations of the pairs; the pools
of CPP, average pools of 3, 5 and 7 at stride 2; batch norm and PReLU after CPP's concatenation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg.couplings import COUPLINGS
from revseg.engine.steps import HandedOver
from revseg.exact.modes import Exact
from revseg.layers.bands.run import Map
from revseg.layers.blocks import ConvBNAct, ImageConvBNAct, asymmetric_pairs
from revseg.layers.recompute import Recompute
from revseg.layers.stack import Stack
from revseg.models.network import Network
from revseg.models.policy import Memory, MemoryPolicy
from revseg.models.vnet_cpp import CPP, check_choice
from revseg.models.vnet_refinement import CONTEXT, Refinement

Dilations = Sequence[Sequence[int]]  # of one stage: for each module, for each of its pairs

FUNCTIONS = {"one_sided": 1, "additive": 2}  # how many F a coupling takes
LAYOUTS = ("block_per_module", "block_per_pair")
SKIPS = (False, True, 4, 2)  # True is 4
FINEST = 2


class VNet(Network):
    """VNet for `num_classes` classes: images [N, 3, H, W] to logits [N, num_classes, h, w].

    h = ceil(H / 8), w = ceil(W / 8); with `skip` 4 or 2 in place of 8. The V modules of a stage form one `ReversibleSequence`, which
    keeps only its output for the backward pass.

    Args:
        num_classes: C, the number of classes.
        widths: Channels of the three stages, rising, the last two even.
        alpha: Number of V modules in stage 2.
        beta: Number of V modules in stage 3.
        dilations: Of stage 2 and of stage 3: for each module the dilations of its pairs. A stage
            with more modules than listed goes through the list again.
        coupling: "one_sided", the paper's; or "additive", RevNet's, with a G beside each F.
        kernel: n of the n x 1 and 1 x n convolutions, odd.
        layout: "block_per_module": all pairs of a module form one F; "block_per_pair": every pair
            is the F of a reversible block of its own. The count of parameters is the same.
        activation: "prelu", "prelu_shared" or "relu".
        bn_eps: What batch norm adds to the variance.
        bn_momentum: Weight of the newest batch in the running statistics.
        cpp_pool: "avg" or "max".
        cpp_style: "strided" or "bins", see `CPP`.
        cpp_sizes: Kernels or grids of the pyramid.
        cpp_merge: "sum" or "mean" of the pyramid.
        cpp_post_norm: Whether batch norm and activation follow the concatenation.
        classifier_bias: Whether the last convolution has a bias.
        skip: Ours, not the paper's, for things a few pixels wide. True or 4: stage 2 has a classifier of its own (608
            parameters of 19 classes), to whose scores those of stage 3 are added, made larger; logits are at 1/4 then. Stage 2
            is kept beside stage 3, and the logits are four times as large. 2: and they are added to scores at 1/2, of the
            stem's map and stage 2's together (`Refinement`, 2,912 parameters), for things two pixels wide.
        dropout: Probability of dropping a channel at the end of each F.
        in_channels: Of the images.
        memory: "least", "lowest", "balanced" or "fastest", or a policy, see `revseg.models.policy`. The V modules are
            undone at all but the fastest; at "lowest" the stem and CPP run again too, at "least" all goes by bands.
            Peak of a training step, batch 4 at 1024 x 2048 in float32: 232, 385, 768 and 1,280 MiB (4,672 with
            PyTorch's own modules and loss), in 1.43, 0.68, 0.62 and 0.49 of their time on a CPU.
        save_activations: Train with ordinary autograd: same numbers, same state dict, more memory.
        exact: Bit-for-bit inversion of the V modules: True, or "lossless"; see `ReversibleSequence`.

    Raises:
        ValueError: If an argument is unknown or out of its range.
    """

    stride = 8

    def __init__(
        self,
        num_classes: int = 19,
        *,
        widths: Sequence[int] = (8, 32, 128),
        alpha: int = 1,
        beta: int = 2,
        dilations: Sequence[Dilations] = (((1, 2, 4),), ((1, 2, 4), (1, 8, 16))),
        coupling: str = "one_sided",
        kernel: int = 3,
        layout: str = "block_per_module",
        activation: str = "prelu",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.1,
        cpp_pool: str = "avg",
        cpp_style: str = "strided",
        cpp_sizes: Sequence[int] = (3, 5, 7),
        cpp_merge: str = "sum",
        cpp_post_norm: bool = True,
        classifier_bias: bool = False,
        skip: bool | int = False,
        dropout: float = 0.0,
        in_channels: int = 3,
        memory: Memory = "balanced",
        save_activations: bool = False,
        exact: Exact = False,
    ) -> None:
        super().__init__(num_classes, in_channels)
        _check(widths, alpha, beta, dilations, bn_eps, bn_momentum, dropout)
        check_choice("coupling", coupling, tuple(FUNCTIONS))
        check_choice("layout", layout, LAYOUTS)
        if skip not in SKIPS:
            raise ValueError(f"expected skip to be False, True, 4 or 2, got {skip!r}")
        policy = MemoryPolicy.of(memory, save_activations).beside_sequences()
        if exact == "lossless":
            policy = policy.keeping_no_maps()  # residues stand where they would
        conv: Callable[..., nn.Module] = partial(
            ConvBNAct, activation=activation, eps=bn_eps, momentum=bn_momentum
        )
        cpp: Callable[..., nn.Module] = partial(
            CPP,
            pool=cpp_pool,
            style=cpp_style,
            sizes=cpp_sizes,
            merge=cpp_merge,
            post_norm=cpp_post_norm,
            activation=activation,
            eps=bn_eps,
            momentum=bn_momentum,
        )
        pairs: Callable[..., Stack] = partial(
            asymmetric_pairs,
            kernel=kernel,
            dropout=dropout,
            activation=activation,
            eps=bn_eps,
            momentum=bn_momentum,
            wrap=policy.inner,
        )

        def v_modules(channels: int, count: int, stage: Dilations) -> nn.Module:
            blocks = []
            for i in range(count):
                module = stage[i % len(stage)]
                for block in [module] if layout == "block_per_module" else [(d,) for d in module]:
                    functions = [
                        policy.function(pairs(channels // 2, block)) for _ in range(FUNCTIONS[coupling])
                    ]
                    blocks.append(COUPLINGS[coupling](*functions))
            return policy.sequence(blocks, exact)

        w1, w2, w3 = widths
        first = ImageConvBNAct(
            in_channels, w1, stride=2, activation=activation, eps=bn_eps, momentum=bn_momentum
        )
        stem = policy.inner(Stack(first, conv(w1, w1), conv(w1, w1)))  # 1/2
        pyramid = cpp(w1, w2)
        self.stem: Any  # 1/4
        if skip == FINEST:  # the map between is read twice
            self.stem = nn.Sequential(policy.row(stem), policy.row(pyramid, streams=True))
        else:
            self.stem = policy.row(Stack(stem, pyramid), streams=True)
        self.stage2 = v_modules(w2, alpha, dilations[0])
        self.down = policy.row(cpp(w2, w3), streams=True, ends=True)  # 1/8
        self.stage3 = v_modules(w3, beta, dilations[1])
        self.classifier = policy.head(nn.Conv2d(w3, num_classes, 1, bias=classifier_bias))
        self.skip = policy.head(nn.Conv2d(w2, num_classes, 1, bias=False)) if skip else None
        self.refinement: nn.Module | None = None
        if skip == FINEST:
            self.context = policy.head(nn.Conv2d(w2, CONTEXT, 1, bias=False))
            self.refinement = policy.block(Refinement(w1, num_classes, conv))
        self.stride = {0: 8, 1: 4}.get(int(skip), int(skip))
        # whether what stage 3 reads is made of the images once more
        self._all_again = policy.bands is not None

    def logits(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, h, w]
        if self.skip is not None:
            return self._fine_logits(images, self.skip)
        front: nn.Module = _Row(self.stem, self.stage2, self.down)
        if self._all_again:
            # what it ends with is not made again, to be compared; stage 2 checks what it reads and makes
            front = Recompute(front, save_activations=self.stage2.save_activations, check=None)  # type: ignore[arg-type]
        # One expression: a name would hold the map of one stage while the next one runs.
        return self.classifier(self.stage3(_handed(front(images))))  # type: ignore[no-any-return]

    def _fine_logits(self, images: Tensor, skip: nn.Module) -> Tensor:  # [N, 3, H, W] -> [N, C, h, w]
        if self.refinement is None:
            middle = self.stage2(_handed(self.stem(images)))
            return _added(skip(middle), self._coarse(middle))
        first, pyramid = self.stem
        edges = first(images)
        middle = self.stage2(_handed(pyramid(edges)))
        context, scores = self.context(middle), skip(middle)
        return _added(self.refinement(edges, context), _added(scores, self._coarse(middle)))

    def _coarse(self, middle: Map) -> Tensor:
        return self.classifier(self.stage3(_handed(self.down(middle))))  # type: ignore[no-any-return]


class _Row(nn.Sequential):
    """Modules one after the other, of which none holds the streams that it hands on."""

    def forward(self, x: Map) -> Map:
        for module in self:
            x = _handed(x)
            x = module(x)
        return x


def _handed(x: Map) -> Any:
    """Streams so that the next module alone holds them; a map, or what nobody runs by bands, as it is."""
    return HandedOver(x) if isinstance(x, tuple) and not torch.compiler.is_compiling() else x


def _added(fine: Tensor, coarse: Tensor) -> Tensor:
    """Scores and those of a smaller map, made larger."""
    return fine + F.interpolate(coarse, fine.shape[2:], mode="bilinear")


def _check(
    widths: Sequence[int],
    alpha: int,
    beta: int,
    dilations: Sequence[Dilations],
    bn_eps: float,
    bn_momentum: float,
    dropout: float,
) -> None:
    if len(widths) != 3 or not 0 < widths[0] < widths[1] < widths[2] or widths[1] % 2 or widths[2] % 2:
        raise ValueError(f"expected three rising widths, the last two even, got {widths}")
    if alpha < 1 or beta < 1:
        raise ValueError(f"expected alpha and beta of at least 1, got {alpha} and {beta}")
    complete = len(dilations) == 2 and all(stage and all(stage) for stage in dilations)
    if not complete or min(d for stage in dilations for module in stage for d in module) < 1:
        raise ValueError(
            "expected positive dilations for two stages, for each module, for each pair, as in "
            f"(((1, 2, 4),), ((1, 2, 4), (1, 8, 16))), got {dilations}"
        )
    if bn_eps <= 0 or not 0 <= bn_momentum <= 1:
        raise ValueError(f"expected bn_eps > 0 and bn_momentum in [0, 1], got {bn_eps} and {bn_momentum}")
    if not 0 <= dropout < 1:
        raise ValueError(f"expected dropout in [0, 1), got {dropout}")
