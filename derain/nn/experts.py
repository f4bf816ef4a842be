"""Mixture-of-experts feature compensator: convolutions of several kinds, weighted by the image.

Suganuma et al., Attention-based Adaptive Selection of Operations for Image Restoration in the Presence of Unknown
Combined Distortions, CVPR 2019; Chen et al., Learning A Sparse Transformer Network for Effective Image Deraining
(DRSformer), CVPR 2023, Figure 2, as "MEFC". The computation is optimised:

- Tensors are ``(b, h, w, c)``: depth-wise convolutions are several times faster if the channels of a pixel are
  contiguous.
- The last layer of each expert, its weight and the layer that joins the experts are linear in the channels of a pixel.
  They are multiplied first, to one matrix for each image and expert.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.nn.restormer import pointwise, spatial

EXPERTS = 8
"""Number of experts: four separable and three dilated convolutions, and an average."""


class SeparableExpert(nn.Module):
    """Two separable convolutions with a ReLU between, without the 1×1 convolution at the end.

    Args:
        channels: Number of channels.
        kernel: Side of the depth-wise kernels, odd.

    Shape:
        ``(b, h, w, channels)`` → same.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.depthwise2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.pointwise2 = nn.Conv2d(channels, channels, 1, bias=False)
        self.kernel = kernel

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Return what the last layer multiplies by `projection`."""
        if self.kernel == 1:  # factors of channels, which the 1×1 convolutions include
            return rectified(pointwise(x, self.pointwise.weight * self.depthwise.weight.transpose(0, 1)))
        return spatial(rectified(pointwise(spatial(x, self.depthwise), self.pointwise.weight)), self.depthwise2)

    def projection(self) -> Float[Tensor, "c c"]:
        """Return the matrix of the last layer."""
        matrix = self.pointwise2.weight.flatten(1)
        return matrix * self.depthwise2.weight.flatten() if self.kernel == 1 else matrix


class DilatedExpert(nn.Module):
    """Separable convolution of dilation 2, without the 1×1 convolution at the end.

    Args:
        channels: Number of channels.
        kernel: Side of the depth-wise kernel, odd.

    Shape:
        ``(b, h, w, channels)`` → same.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels, channels, kernel, padding=kernel - 1, dilation=2, groups=channels, bias=False
        )
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Return what the last layer multiplies by `projection`."""
        return spatial(x, self.depthwise)

    def projection(self) -> Float[Tensor, "c c"]:
        """Return the matrix of the last layer."""
        return self.pointwise.weight.flatten(1)


class ExpertLayer(nn.Module):
    """Weighted experts, joined by a 1×1 convolution.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        separable = (SeparableExpert(channels, kernel) for kernel in (1, 3, 5, 7))
        dilated = (DilatedExpert(channels, kernel) for kernel in (3, 5, 7))
        self.experts = nn.ModuleList([*separable, *dilated])
        self.join = nn.Conv2d(EXPERTS * channels, channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"], weights: Float[Tensor, "b 8"]) -> Float[Tensor, "b h w c"]:
        """Return the join of the experts' outputs.

        Args:
            x: Features.
            weights: Weights of the experts, the average last.
        """
        b, h, w, c = x.shape
        joins = self.join.weight.flatten(1).chunk(EXPERTS, dim=1)
        factors = weights[:, :, None, None].unbind(1)
        average = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False).permute(0, 2, 3, 1)
        total: Tensor = average.flatten(1, 2) @ (factors[-1] * joins[-1].t())
        for module, join, factor in zip(self.experts, joins, factors, strict=False):
            expert = cast("SeparableExpert | DilatedExpert", module)
            matrix = factor * (join @ expert.projection()).t()
            total.baddbmm_(expert(x).flatten(1, 2), matrix)
        return total.reshape(b, h, w, c)

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return what is not counted: the layers that are multiplied first, and thop's operation per averaged value."""
        channels = output.shape[-1]
        single = 2 * channels  # the 1×1 depth-wise convolutions of the first expert
        merged = (EXPERTS - 1 + EXPERTS) * channels**2
        average = channels
        return (single + merged + average) * (output.numel() // channels), 0


class ExpertCompensator(nn.Module):
    """Mixture-of-experts feature compensator ("MEFC"): layers of experts, whose weights depend on the image.

    Args:
        channels: Number of channels.
        steps: Number of layers of experts.

    Shape:
        ``(b, h, w, channels)`` → same, not negative.

    References:
        DRSformer, Figure 2, "MEFC"; HCT-FFN (Chen et al., AAAI 2023), "DaMoE".
    """

    def __init__(self, channels: int, steps: int = 4) -> None:
        super().__init__()
        count = steps * EXPERTS
        self.gate = nn.Sequential(nn.Linear(channels, 2 * count), nn.ReLU(), nn.Linear(2 * count, count))
        self.preprocess = nn.Conv2d(channels, channels, 1, bias=False)
        self.steps = nn.ModuleList(ExpertLayer(channels) for _ in range(steps))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Return the compensated features."""
        weights = self.gate(x.mean((1, 2))).unflatten(1, (-1, EXPERTS)).softmax(-1)  # (b, steps, 8)
        x = rectified(pointwise(x, self.preprocess.weight))
        for step, factors in zip(self.steps, weights.unbind(1), strict=True):
            x = rectified(x + rectified(step(x, factors)))
        return x

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return thop's operations for the mean of the features: one per value, one per mean."""
        return output.numel() + len(output) * output.shape[-1], 0


def rectified(x: Tensor) -> Tensor:
    """Apply a ReLU, in place without gradients (with them, views would be copied)."""
    return F.relu(x, inplace=not torch.is_grad_enabled())


PUBLISHED_NAMES = (
    (r"\blayers\.0\.ca_fc\.", "gate."),
    (r"\blayers\.1\.preprocess\.op\.0\.", "preprocess."),
    (r"\blayers\.1\._ops\.(\d)\._out\.0\.", r"steps.\1.join."),
    (r"\blayers\.1\._ops\.(\d)\._ops\.(\d)\.op\.0\.", r"steps.\1.experts.\2.depthwise."),
    (r"\blayers\.1\._ops\.(\d)\._ops\.(\d)\.op\.1\.", r"steps.\1.experts.\2.pointwise."),
    (r"\blayers\.1\._ops\.(\d)\._ops\.(\d)\.op\.3\.", r"steps.\1.experts.\2.depthwise2."),
    (r"\blayers\.1\._ops\.(\d)\._ops\.(\d)\.op\.4\.", r"steps.\1.experts.\2.pointwise2."),
)
"""Names of the tensors in the files of DRSformer and HCT-FFN, as `derain.networks.base.Network` translates them."""
