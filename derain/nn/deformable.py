"""Deformable convolution by bilinear sampling."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from derain.nn.graphs import compiling_or_exporting
from derain.nn.restormer import STRIP_BYTES


def deformable_convolution(
    x: Float[Tensor, "b c h w"],
    offset: Float[Tensor, "b two_taps h w"],
    mask: Float[Tensor, "b taps h w"],
    weight: Float[Tensor, "o c k k"],
) -> Float[Tensor, "b o h w"]:
    """Return the deformable convolution of a map: kernel taps read displaced positions, and a mask scales the values.

    Equal to ``torchvision.ops.deform_conv2d(x, offset, weight, padding=k // 2, mask=mask)``: stride 1, zero padding, no
    bias. Unlike torchvision's function, it can be exported to ONNX.

    Args:
        x: Feature map.
        offset: Displacement of each of the ``k²`` taps from its regular position, in pixels. Taps are in row-major
            order, with two channels each: down, then right.
        mask: Factor of each of the ``k²`` taps.
        weight: Kernel; ``k`` is odd.

    References:
        Zhu et al., Deformable ConvNets v2, CVPR 2019, eq. 1.

    Example:
        >>> x = torch.rand(1, 2, 5, 4)
        >>> weight = torch.rand(3, 2, 3, 3)
        >>> result = deformable_convolution(x, torch.zeros(1, 18, 5, 4), torch.ones(1, 9, 5, 4), weight)
        >>> torch.allclose(result, F.conv2d(x, weight, padding=1), atol=1e-5)
        True
    """
    if torch.is_grad_enabled() or compiling_or_exporting():
        return _convolve_samples(x, sampling_grid(offset, weight.shape[2]), mask, weight)
    grid = sampling_grid(offset, weight.shape[2])
    budget = STRIP_BYTES["cpu" if x.device.type == "cpu" else "gpu"]
    strip_rows = max(1, budget // (mask[:, :, 0].numel() * x.shape[1] * x.element_size()))
    strips = zip(torch.split(grid, strip_rows, 2), torch.split(mask, strip_rows, 2), strict=True)
    return torch.cat([_convolve_samples(x, *strip, weight) for strip in strips], dim=2)


def sampling_grid(offset: Float[Tensor, "b two_taps h w"], side: Any) -> Float[Tensor, "b taps h w 2"]:
    """Return the sampling position (x, y) of each tap for `torch.nn.functional.grid_sample`.

    -1 and 1 are the outer edges of the map (``align_corners=False``). The type is float32 or wider.

    Args:
        offset: Displacement of each tap, as for `deformable_convolution`.
        side: Side ``k`` of the kernel; while a graph is traced, it is a tensor.
    """
    batch, _, height, width = offset.shape
    dtype, device = torch.promote_types(offset.dtype, torch.float32), offset.device
    down, right = offset.to(dtype).reshape(batch, side * side, 2, height, width).unbind(2)
    taps = torch.arange(side, device=device) - side // 2
    rows = torch.arange(height, device=device)[:, None] + taps.repeat_interleave(side)[:, None, None]
    columns = torch.arange(width, device=device) + taps.repeat(side)[:, None, None]
    return torch.stack(((2 * (columns + right) + 1) / width - 1, (2 * (rows + down) + 1) / height - 1), dim=-1)


def _convolve_samples(
    x: Float[Tensor, "b c h w"],
    grid: Float[Tensor, "b taps rows w 2"],
    mask: Float[Tensor, "b taps rows w"],
    weight: Float[Tensor, "o c k k"],
) -> Float[Tensor, "b o rows w"]:
    source, taps = x.to(grid.dtype), grid.shape[1]
    if len(x) == 1:  # taps become the batch, over which PyTorch parallelises on a CPU
        samples = F.grid_sample(source.expand(taps, -1, -1, -1), grid[0], align_corners=False)
        samples, kernel = (samples * mask[0][:, None]).flatten(0, 1)[None], weight.permute(0, 2, 3, 1)
    else:
        samples = F.grid_sample(source, grid.flatten(1, 2), align_corners=False)
        samples, kernel = (samples.reshape(*x.shape[:2], *mask.shape[1:]) * mask[:, None]).flatten(1, 2), weight
    return F.conv2d(samples.to(x.dtype), kernel.flatten(1)[..., None, None])
