"""Mixture-of-experts feature compensator: several convolutions and a pooling, weighted by a function of the image.

Suganuma et al., Attention-based Adaptive Selection of Operations for Image Restoration in the Presence of Unknown
Combined Distortions, CVPR 2019; Chen et al., Learning A Sparse Transformer Network for Effective Image Deraining
(DRSformer), CVPR 2023, Figure 2, "MEFC". The computation is optimised:

- Tensors are ``(b, h, w, c)``: depth-wise convolutions are faster if the channels of a pixel are contiguous.
- The last 1×1 convolution of an expert, its gate weight and the 1×1 convolution that joins the experts are linear in
  the channels of a pixel. Their product, one matrix per image and expert, is computed first.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.nn.restormer import pointwise, spatial

EXPERTS = 8
"""Number of experts: four separable convolutions, three dilated convolutions and an average pooling."""


class SeparableExpert(nn.Module):
    """Two separable convolutions with a ReLU in between.

    ``forward`` omits the last 1×1 convolution; `projection` returns its matrix. If ``kernel`` is 1, the depth-wise
    convolutions are factors of the channels, and are merged into the weights of the 1×1 convolutions.

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
        """Return the features that are to be multiplied by `projection`."""
        if self.kernel == 1:
            return rectified(pointwise(x, self.pointwise.weight * self.depthwise.weight.transpose(0, 1)))
        return spatial(rectified(pointwise(spatial(x, self.depthwise), self.pointwise.weight)), self.depthwise2)

    def projection(self) -> Float[Tensor, "c c"]:
        """Return the matrix (output, input channels) that completes `forward`: the last 1×1 convolution."""
        matrix = self.pointwise2.weight.flatten(1)
        return matrix * self.depthwise2.weight.flatten() if self.kernel == 1 else matrix


class DilatedExpert(nn.Module):
    """Separable convolution of dilation 2.

    ``forward`` omits the 1×1 convolution; `projection` returns the matrix of that convolution.

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
        """Return the features that are to be multiplied by `projection`."""
        return spatial(x, self.depthwise)

    def projection(self) -> Float[Tensor, "c c"]:
        """Return the matrix (output, input channels) of the 1×1 convolution."""
        return self.pointwise.weight.flatten(1)


class ExpertLayer(nn.Module):
    """Experts, each multiplied by its weight, and a 1×1 convolution of their concatenation.

    Args:
        channels: Number of channels.

    Shape:
        ``(b, h, w, channels)`` and weights ``(b, 8)`` → ``(b, h, w, channels)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        separable = (SeparableExpert(channels, kernel) for kernel in (1, 3, 5, 7))
        dilated = (DilatedExpert(channels, kernel) for kernel in (3, 5, 7))
        self.experts = nn.ModuleList([*separable, *dilated])
        self.join = nn.Conv2d(EXPERTS * channels, channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"], weights: Float[Tensor, "b 8"]) -> Float[Tensor, "b h w c"]:
        """Return the 1×1 convolution of the weighted outputs of the experts.

        Args:
            x: Features.
            weights: Weight of each expert; the last is that of the average pooling.
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
        """Return MACs to add, see `DerainModule.pass_once`: those of merged convolutions and average pooling, and 0."""
        channels = output.shape[-1]
        factors = 2 * channels  # the 1×1 depth-wise convolutions of the first expert
        merged = (EXPERTS - 1 + EXPERTS) * channels**2
        average = channels
        return (factors + merged + average) * (output.numel() // channels), 0


class ExpertCompensator(nn.Module):
    """Mixture-of-experts feature compensator ("MEFC"): layers of experts, weighted by a gate.

    The gate, a multilayer perceptron, computes the weights from the means of the channels over the image.

    Args:
        channels: Number of channels.
        steps: Number of layers of experts.

    Shape:
        ``(b, h, w, channels)`` → same; non-negative.

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
        for step, step_weights in zip(self.steps, weights.unbind(1), strict=True):
            x = rectified(x + rectified(step(x, step_weights)))
        return x

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of means in thop, one per value and mean, and 0."""
        return output.numel() + len(output) * output.shape[-1], 0


def rectified(x: Tensor) -> Tensor:
    """Apply a ReLU, in place if gradients are disabled. The backward pass of in-place changes of views makes copies."""
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
"""Regular expressions of tensor names in the authors' files of DRSformer and HCT-FFN, and their replacements."""
