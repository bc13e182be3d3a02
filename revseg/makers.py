"""How a layer makes its raw map, and the gradients of that.

A maker is the linear part of a layer, a convolution or what stands in its place. `forward` is
ordinary differentiable PyTorch. `backward` gives the same gradients, but asks for the input only if
it needs its values: the input may have to be computed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from revseg.observers import has_hooks

Grads = list[Tensor | None]


class Maker(Protocol):
    """How a layer makes its raw map [N, C, h, w] from its input."""

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The raw map; differentiable, and the definition of `backward`."""

    def backward(
        self,
        du: Tensor,
        x: Callable[[], Tensor],
        like: Tensor,
        parameters: Sequence[Tensor],
        wanted: list[bool],
    ) -> Grads:
        """Gradients of the input and the parameters, None for those not wanted.

        Args:
            du: The gradient of the raw map.
            x: Gives the input; it may have to be computed, so call it once and let it go.
            like: A map of the input's shape, dtype and strides, whatever its values.
            parameters: As given to `forward`.
            wanted: Whether the gradient of the input and of each parameter is.
        """


class Convolution:
    """The maker of a 2-d convolution.

    Args:
        conv: Gives stride, padding, dilation and groups.
        prepare: Makes the input out of images that are bytes, of one image at a time; the batch as
            a whole then never exists as floats.
    """

    def __init__(self, conv: nn.Conv2d, prepare: Callable[[Tensor], Tensor] | None = None) -> None:
        self.settings = (conv.stride, conv.padding, conv.dilation)
        self.groups = conv.groups
        self.prepare = prepare

    @classmethod
    def of(cls, conv: nn.Module, prepare: Callable[[Tensor], Tensor] | None = None) -> Convolution | None:
        """The maker of this module; None if it is no ordinary convolution."""
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        return None if has_hooks(conv) else cls(conv, prepare)

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        stride, padding, dilation = self.settings
        weight, bias = parameters[0], parameters[1] if len(parameters) > 1 else None
        conv = partial(
            torch.conv2d,
            weight=weight,
            bias=bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=self.groups,
        )
        if x.is_floating_point() or self.prepare is None:
            return conv(x)
        first = conv(self.prepare(x[:1]).to(weight.dtype))
        if len(x) == 1:
            return first
        made = first.new_empty((len(x), *first.shape[1:]))
        made[:1] = first
        for i in range(1, len(x)):
            made[i : i + 1] = conv(self.prepare(x[i : i + 1]).to(weight.dtype))
        return made

    def backward(
        self,
        du: Tensor,
        x: Callable[[], Tensor],
        like: Tensor,
        parameters: Sequence[Tensor],
        wanted: list[bool],
    ) -> Grads:
        dx: Tensor | None = None
        dparameters: Grads = [None] * len(parameters)
        if any(wanted[1:]):
            dparameters = self._of_parameters(du, x(), parameters, wanted)
        if wanted[0]:
            shape = like if like.dtype == du.dtype else torch.empty_like(like, dtype=du.dtype)
            dx = self._call(du, shape, parameters, (True, False, False))[0]
        return [dx, *dparameters]

    def _of_parameters(
        self, du: Tensor, x: Tensor, parameters: Sequence[Tensor], wanted: list[bool]
    ) -> Grads:
        mask = (False, wanted[1], len(parameters) > 1 and wanted[2])
        total: Grads = [None] * len(parameters)
        for of_map, part in self._parts(du, x):
            found = self._call(of_map, part, parameters, mask)[1 : 1 + len(parameters)]
            total = [
                more if sum_ is None else sum_.add_(more) for sum_, more in zip(total, found, strict=True)
            ]
        return total

    def _parts(self, du: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Gradient and input of the whole batch, or of one image at a time where they are bytes."""
        if x.is_floating_point() or self.prepare is None:
            yield du, x
            return
        for i in range(len(x)):
            yield du[i : i + 1], self.prepare(x[i : i + 1]).to(du.dtype)

    def _call(
        self, du: Tensor, x: Tensor, parameters: Sequence[Tensor], mask: tuple[bool, bool, bool]
    ) -> Any:
        bias = [parameters[1].shape[0]] if len(parameters) > 1 else None
        return torch.ops.aten.convolution_backward(
            du, x, parameters[0], bias, *self.settings, False, [0, 0], self.groups, mask
        )
