"""DRSformer: Restormer with sparse attention, feed-forward networks of two scales, and mixtures of experts."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.networks.base import Names, Network
from derain.networks.shapes import restormer_options
from derain.nn.experts import PUBLISHED_NAMES, ExpertCompensator
from derain.nn.restormer import Restormer, SelfAttention, TransformerBlock, pointwise

SHARES = ((1, 2), (2, 3), (3, 4), (4, 5))
"""Fractions, as numerator and denominator, of the scores that the four branches of the attention keep."""


class SparseAttention(SelfAttention):
    """Self-attention between channels that keeps the largest scores of each query ("TKSA").

    The attention weights are the sum of four softmaxes, each with a learned factor. The softmaxes are over the ⌊d/2⌋,
    ⌊2d/3⌋, ⌊3d/4⌋ and ⌊4d/5⌋ largest of d scores, but over at least one.

    Args:
        channels: Number of channels.
        heads: Number of heads; must divide ``channels``.

    Shape:
        ``(b, h, w, channels)`` → same.

    References:
        DRSformer, Figure 2, "TKSA".
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        width = channels // heads
        self.counts = [max(1, width * numerator // denominator) for numerator, denominator in SHARES]
        for index in range(len(SHARES)):
            self.register_parameter(f"factor{index + 1}", nn.Parameter(torch.tensor([0.2])))

    def normalize(self, scores: Float[Tensor, "b heads d d"]) -> Float[Tensor, "b heads d d"]:
        """Return the attention weights from scores; rows are query channels, columns key channels."""
        max_count = max(self.counts)
        largest, keys = scores.topk(max_count, dim=-1)
        weights = torch.zeros_like(largest)
        for index, count in enumerate(self.counts):
            branch = F.pad(largest[..., :count].softmax(-1), (0, max_count - count))
            weights = weights + self.get_parameter(f"factor{index + 1}") * branch
        return torch.zeros_like(scores).scatter(-1, keys, weights)


class MixedScaleFeedForward(nn.Module):
    """Feed-forward network of a 3×3 and a 5×5 branch, which exchange half of their channels ("MSFN").

    The second convolutions have two channels per group. They are computed as depth-wise convolutions whose outputs are
    added in pairs, which is faster.

    Args:
        channels: Number of channels.
        expansion: The network has ``2 * int(expansion * channels)`` hidden channels.

    Shape:
        ``(b, h, w, channels)`` → same.

    References:
        DRSformer, Figure 2, "MSFN".
    """

    halo: ClassVar[int] = 4
    """Distance in rows of the farthest pixel that a result depends on."""

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        half = int(expansion * channels)
        self.project_in = nn.Conv2d(channels, 2 * half, 1, bias=False)
        self.first3 = nn.Conv2d(2 * half, 2 * half, 3, padding=1, groups=2 * half, bias=False)
        self.first5 = nn.Conv2d(2 * half, 2 * half, 5, padding=2, groups=2 * half, bias=False)
        self.second3 = nn.Conv2d(2 * half, half, 3, padding=1, groups=half, bias=False)
        self.second5 = nn.Conv2d(2 * half, half, 5, padding=2, groups=half, bias=False)
        self.project_out = nn.Conv2d(2 * half, channels, 1, bias=False)

    def kernels(self) -> tuple[Tensor, ...]:
        """Return the weights of the convolutions for `forward`."""
        layers = (self.project_in, self.first3, self.first5, self.second3, self.second5, self.project_out)
        return tuple(layer.weight for layer in layers)

    def forward(self, x: Float[Tensor, "b h w c"], kernels: tuple[Tensor, ...]) -> Float[Tensor, "b h w c"]:
        """Apply the network with the weights from `kernels`."""
        project_in, first3, first5, second3, second5, project_out = kernels
        hidden = pointwise(x, project_in).permute(0, 3, 1, 2)
        fine = F.relu(depthwise(hidden, first3), inplace=True).chunk(2, dim=1)
        wide = F.relu(depthwise(hidden, first5), inplace=True).chunk(2, dim=1)
        scales = []
        for parts, weight in zip(zip(fine, wide, strict=True), (second3, second5), strict=True):
            products = depthwise(torch.cat(parts, dim=1), weight.flatten(0, 1)[:, None])
            scales.append(F.relu(products[:, 0::2] + products[:, 1::2], inplace=True))
        return pointwise(torch.cat(scales, dim=1).permute(0, 2, 3, 1), project_out)


def depthwise(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "c 1 k k"]) -> Float[Tensor, "b c h w"]:
    """Convolve each channel with its own kernel."""
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=len(weight))


class DRSformer(Network):
    """DRSformer, and its light variant without experts.

    Restormer's encoder-decoder with other blocks. Mixtures of experts follow the embedding and replace Restormer's
    refinement blocks; the light variant has neither experts nor refinement. The only output is ``derained``.

    Args:
        dim: Number of channels at the finest level; it doubles at each level.
        blocks: Number of transformer blocks at each of the four levels.
        heads: Number of attention heads at each of the four levels.
        expansion: Half the number of hidden channels of the feed-forward networks, divided by their channels.
        experts: Whether the network has experts; the authors' models for Rain200L and SPA-Data have none.

    Raises:
        DerainError: If ``blocks`` or ``heads`` does not have four numbers, or heads do not divide the channels of their
            level.

    References:
        Chen et al., Learning A Sparse Transformer Network for Effective Image Deraining, CVPR 2023, Figure 2.
        33,655,424 parameters by default, 32,610,304 without experts.
    """

    size_multiple = 8
    bytes_per_pixel = 6500
    signature = "encoder_level1.0.attn.attn1"
    published_names: ClassVar[Names] = (
        *PUBLISHED_NAMES,
        (r"^encoder_level0\.", "patch_embed.1."),
        (r"^refinement\.", "refinement.0."),
        (r"^patch_embed\.proj\.", "patch_embed.0.proj."),
        (r"\.attn\.attn(\d)$", r".attn.factor\1"),
        (r"\.ffn\.dwconv(\d)x\d\.", r".ffn.first\1."),
        (r"\.ffn\.dwconv(\d)x\d_1\.", r".ffn.second\1."),
        (r"^", "body."),
    )

    def __init__(
        self,
        dim: int = 48,
        blocks: Sequence[int] = (4, 6, 6, 8),
        heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        experts: bool = True,
    ) -> None:
        super().__init__()
        block = partial(TransformerBlock, attention=SparseAttention, feed_forward=MixedScaleFeedForward)
        self.body = Restormer(dim, blocks, 0, heads, expansion, block)
        first_experts = [ExpertCompensator(dim)] if experts else []
        self.body.patch_embed = nn.Sequential(self.body.patch_embed, *first_experts)
        if experts:
            self.body.refinement = nn.Sequential(ExpertCompensator(2 * dim))

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained``."""
        return {"derained": self.body(image)}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments of ``__init__``; None for another network."""
        if cls.signature not in state or (options := restormer_options(state)) is None:
            return None
        del options["refinement"]
        return options | {"experts": any(name.startswith("encoder_level0.") for name in state)}
