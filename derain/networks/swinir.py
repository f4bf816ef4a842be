"""SwinIR: attention within windows, which are shifted in every second block.

Liang et al., SwinIR: Image Restoration Using Swin Transformer, ICCV Workshops 2021. The default options are those of
the paper's network for colour denoising, which other papers train to remove rain.

Features are ``(b, h, w, c)``; see `derain.nn.shifted_windows`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.networks.base import Names, Network, count_numbered
from derain.nn.padding import pad_by_mirror, pad_to_multiple
from derain.nn.restormer import spatial
from derain.nn.shifted_windows import Features, WindowBlock

MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of DIV2K, which the network subtracts from images."""

BLOCK = r"layers\.\d+\.residual_group\.blocks\.\d+"
TENSOR_NAME = re.compile(
    rf"(conv_first|patch_embed\.norm|norm|conv_after_body|conv_last|layers\.\d+\.conv|{BLOCK}\.(norm[12]|attn\.qkv|attn\."
    rf"proj|mlp\.fc[12]))\.(weight|bias)|{BLOCK}\.(attn_mask|attn\.relative_position_(bias_table|index))"
)
"""Pattern of the authors' tensor names. Variants for super-resolution and derived networks have further tensors."""


class SwinGroup(nn.Module):
    """Swin blocks and a convolution, with a residual connection ("RSTB").

    Args:
        channels: Number of channels.
        heads: Number of attention heads.
        window: Side of the windows in pixels.
        expansion: Hidden channels of the MLPs divided by ``channels``.
        drop_paths: For each block, the probability that training skips its attention, or its MLP, for an image.

    Shape:
        ``(b, h, w, channels)`` → same; height and width must be multiples of the window.

    References:
        SwinIR, section 3.2 and Figure 2(a).
    """

    def __init__(self, channels: int, heads: int, window: int, expansion: float, drop_paths: Sequence[float]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                WindowBlock(
                    channels,
                    heads,
                    window,
                    shifted=index % 2 == 1,
                    expansion=expansion,
                    drop_path=drop_path,
                    shift_single=True,
                )
                for index, drop_path in enumerate(drop_paths)
            )
        )
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Features) -> Features:
        """Transform features."""
        return spatial(self.blocks(x), self.conv).add_(x)


class SwinIR(Network):
    """SwinIR without upsampling: groups of Swin blocks at full resolution, within two residual connections.

    As in the authors' test script, height and width are padded by mirroring to the next greater multiple of the window,
    even if they are multiples already. In training mode, `pad_to_multiple` pads only sides that are not multiples.

    Args:
        channels: Number of channels.
        blocks: Number of blocks of each group.
        heads: Number of attention heads in each group; each must divide ``channels``.
        window: Side of the windows in pixels.
        expansion: Hidden channels of the MLPs divided by ``channels``.
        drop_path: Probability that training skips the attention, or the MLP, of the last block for an image; it
            increases linearly from 0 in the first block.

    Outputs:
        ``derained``: The restored image.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same, not clamped, any ``h, w >= 1``.

    Raises:
        DerainError: If ``blocks`` and ``heads`` differ in length, ``heads`` do not divide ``channels``, or ``window``
            is not from 1 to 32.

    References:
        SwinIR, section 3.1 and Figure 2. 11,504,163 parameters by default.
    """

    bytes_per_pixel: int = 5632
    signature: ClassVar[str] = "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"
    published_names: ClassVar[Names] = (
        (r".*\.(attn_mask|relative_position_index)", None),
        (r"^conv_first\.", "head."),
        (r"^patch_embed\.norm\.", "first_norm."),
        (r"^layers\.(\d+)\.residual_group\.", r"groups.\1."),
        (r"^layers\.", "groups."),
        (r"^norm\.", "last_norm."),
        (r"^conv_after_body\.", "conv."),
        (r"^conv_last\.", "tail."),
    )

    def __init__(
        self,
        channels: int = 180,
        blocks: Sequence[int] = (6, 6, 6, 6, 6, 6),
        heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window: int = 8,
        expansion: float = 2.0,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if len(blocks) != len(heads):
            raise DerainError(f"blocks {list(blocks)}, heads {list(heads)}: expected one number of each per group")
        self.window = window
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.first_norm = nn.LayerNorm(channels)
        drop_paths = torch.split(torch.linspace(0, drop_path, sum(blocks)), list(blocks))  # by group
        self.groups = nn.Sequential(
            *(
                SwinGroup(channels, group_heads, window, expansion, group_drop_paths.tolist())
                for group_heads, group_drop_paths in zip(heads, drop_paths, strict=True)
            )
        )
        self.last_norm = nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def pad(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Return images whose sides are multiples of the window; see the class."""
        return pad_to_multiple(image, self.window) if self.training else pad_by_mirror(image, self.window)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained``."""
        centred = image - cast(Tensor, self.mean)
        shallow = spatial(centred.permute(0, 2, 3, 1).contiguous(), self.head)
        deep: Tensor = self.last_norm(self.groups(self.first_norm(shallow)))
        residual = spatial(spatial(deep, self.conv).add_(shallow), self.tail).permute(0, 3, 1, 2)
        return {"derained": image + residual}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments but ``drop_path``; None for other networks and other variants of SwinIR.

        The other variants have another number of colours, enlarge images, have three convolutions instead of one at
        the end of groups ("3conv"), or have windows of 7 pixels (for images in [0, 255]).
        """
        if cls.signature not in state or not all(map(TENSOR_NAME.fullmatch, state)):
            return None
        channels, colours = state["conv_first.weight"].shape[:2]
        if colours != 3 or len(state["conv_last.weight"]) != 3:
            return None
        tables = [
            state[f"layers.{index}.residual_group.blocks.0.attn.relative_position_bias_table"]
            for index in range(count_numbered(state, r"layers\.(\d+)\."))
        ]
        window = (math.isqrt(len(tables[0])) + 1) // 2
        if window == 7:
            return None
        return {
            "channels": channels,
            "blocks": [
                count_numbered(state, rf"layers\.{index}\.residual_group\.blocks\.(\d+)\.")
                for index in range(len(tables))
            ],
            "heads": [table.shape[1] for table in tables],
            "window": window,
            "expansion": len(state["layers.0.residual_group.blocks.0.mlp.fc1.weight"]) / channels,
        }
