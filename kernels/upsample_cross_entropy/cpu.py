"""Passes over all pixels of an upsampled map in plain PyTorch, a band of rows at a time.

A band is upsampled, its losses and the gradient of its scores are computed at once, and this gradient is
summed back to low resolution before the next band. The path of the CPU, and of every device without a kernel.

Letters: N images, C classes, h w size of the logits, H W size of the labels; z scores of a band.
"""

import torch
from torch import Tensor

from revseg.kernels.cpu.bilinear import Upsampling
from revseg.kernels.precision import widest
from revseg.kernels.upsample_cross_entropy.cpu_band import cross_entropy
from revseg.kernels.upsample_cross_entropy.inputs import check_labels
from revseg.kernels.upsample_cross_entropy.targets import Targets


def sums(
    logits: Tensor, targets: Targets, align_corners: bool, dloss: float | None
) -> tuple[Tensor, Tensor | None]:
    """Sums over all pixels, and the gradient of that of the losses.

    Args:
        logits: Scores [N, C, h, w].
        targets: With labels [N, H, W].
        align_corners: As in `F.interpolate`.
        dloss: Factor of the gradient; None if none is wanted.

    Returns:
        The sums of the losses and of their weights [2], float64 where the device has it, and the gradient [N, C, h, w], float32 at least.

    Raises:
        ValueError: If a label is out of range.
    """
    check_labels(targets.labels, targets.ignore_index, logits.shape[1])
    upsampling = Upsampling(logits, targets.labels.shape[-2:], align_corners)
    dlogits = dlosses = None
    if dloss is not None:
        dlogits = torch.zeros_like(logits, dtype=upsampling.dtype)
        dlosses = torch.full((), dloss, dtype=upsampling.dtype, device=logits.device)
    wide = widest(logits.device)
    found = [torch.zeros(2, dtype=wide, device=logits.device)]
    for band in upsampling.bands():
        z = upsampling.forward(band)
        losses, weights = cross_entropy(z, targets.at(band.images, band.rows), dlosses)
        found.append(torch.stack([x.sum(dtype=wide) for x in (losses, weights)]))
        if dlogits is not None:
            upsampling.add_gradient(band, z, dlogits)
    return torch.stack(found).sum(dim=0), dlogits


def losses(logits: Tensor, targets: Targets, align_corners: bool) -> Tensor:
    """The loss of every pixel [N, H, W], float32 at least; arguments and errors as of `sums`."""
    check_labels(targets.labels, targets.ignore_index, logits.shape[1])
    upsampling = Upsampling(logits, targets.labels.shape[-2:], align_corners)
    result = torch.empty(targets.labels.shape, dtype=upsampling.dtype, device=logits.device)
    for band in upsampling.bands():
        z = upsampling.forward(band)
        result[band.images, band.rows], _ = cross_entropy(z, targets.at(band.images, band.rows), None)
    return result


def gradient(logits: Tensor, targets: Targets, align_corners: bool, dlosses: Tensor) -> Tensor:
    """The gradient of the logits [N, C, h, w], float32 at least, from that of the losses [N, H, W]."""
    upsampling = Upsampling(logits, targets.labels.shape[-2:], align_corners)
    dlogits = torch.zeros_like(logits, dtype=upsampling.dtype)
    for band in upsampling.bands():
        z = upsampling.forward(band)
        cross_entropy(z, targets.at(band.images, band.rows), dlosses[band.images, band.rows])
        upsampling.add_gradient(band, z, dlogits)
    return dlogits
