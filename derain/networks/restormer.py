"""Restormer with optional biases and bias-free normalisation, as in ClearView's weights."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain.networks.base import Names, Network
from derain.networks.shapes import restormer_options
from derain.nn import restormer
from derain.nn.graphs import compiling_or_exporting
from derain.nn.restormer import GatedFeedForward, Norm, SelfAttention, TransformerBlock


class BiasFreeNorm(nn.Module):
    """Layer normalisation over the channels that neither subtracts the mean nor adds a bias.

    Shape:
        ``(b, h, w, channels)`` → same.

    References:
        ``BiasFree_LayerNorm`` of Restormer's code, used there for Gaussian denoising.
    """

    eps: ClassVar[float] = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Divide the channels of each pixel by their standard deviation, and scale them."""
        if torch.is_grad_enabled() or compiling_or_exporting():
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            inverse_deviation = (wide.var(-1, correction=0, keepdim=True) + self.eps).rsqrt()
            return x * inverse_deviation.to(x.dtype) * self.weight
        # Faster, but mean and deviation have no gradients.
        out, mean, inverse_deviation = torch.native_layer_norm(x, x.shape[-1:], None, None, self.eps)
        return out.add_(mean * inverse_deviation).mul_(self.weight)


class Restormer(Network):
    """Restormer, with the options of ClearView's variants.

    The only output is ``derained``.

    Args:
        dim: Number of channels at the finest level; it doubles at each level.
        blocks: Number of transformer blocks at each of the four levels; the decoder has as many as the encoder.
        refinement: Number of refinement blocks.
        heads: Number of attention heads at each of the four levels.
        expansion: Hidden channels of the feed-forward networks divided by their channels.
        bias: Whether convolutions have biases; those of downsampling and upsampling never have.
        bias_free_norm: Whether normalisation is `BiasFreeNorm`.

    Raises:
        DerainError: If ``blocks`` or ``heads`` does not have four numbers, or heads do not divide the channels of their
            level.

    References:
        Defaults: Zamir et al., Restormer, CVPR 2022; 26,126,644 parameters.

        ClearView (github.com/dronefreak/clearview) uses ``bias`` and ``bias_free_norm``. Its variants have ``blocks``
        2, 3, 3, 4 (15,263,563 parameters), or ``dim`` 24, ``blocks`` 1, 1, 1, 2 and ``refinement`` 2 (2,278,027).
    """

    bytes_per_pixel: int = 5400
    signature: ClassVar[str] = "encoder_level1.0.norm1.weight"  # ClearView's; the original has ``norm1.body.weight``
    published_names: ClassVar[Names] = (
        (r"^patch_embed\.(?!proj)", "patch_embed.proj."),
        (r"^", "body."),
    )

    def __init__(
        self,
        dim: int = 48,
        blocks: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        bias: bool = False,
        bias_free_norm: bool = False,
    ) -> None:
        super().__init__()
        block = partial(
            TransformerBlock,
            attention=partial(SelfAttention, bias=bias),
            feed_forward=partial(GatedFeedForward, bias=bias),
            norm=BiasFreeNorm if bias_free_norm else Norm,
        )
        self.body = restormer.Restormer(dim, blocks, refinement, heads, expansion, block, bias)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained`` for images of any size: ``body`` pads them to a multiple of 8."""
        return {"derained": self.body(image)}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments for ClearView's tensors; None for other networks, among them the original Restormer."""
        if cls.signature not in state:
            return None
        restormer_state = {name.removeprefix("body."): tensor for name, tensor in cls.translate(state).items()}
        options = restormer_options(restormer_state)
        return None if options is None else {**options, "bias": True, "bias_free_norm": True}
