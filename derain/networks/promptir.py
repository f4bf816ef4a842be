"""PromptIR: Restormer with prompts, weighted sums of learned maps, in its decoder.

Potlapalli et al., PromptIR: Prompting for All-in-One Blind Image Restoration, NeurIPS 2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.networks.base import Names, Network
from derain.networks.shapes import heads_of, restormer_options
from derain.nn.restormer import Downsample, PatchEmbedding, TransformerBlock, Upsample, pointwise, spatial

LEVELS = (3, 2, 1)
"""Levels of the decoder in the order in which they are computed; 1 is the finest."""


class Prompt(nn.Module):
    """Prompt that depends on the image: a weighted sum of learned maps ("PGM").

    Args:
        features: Number of channels of the features that determine the weights.
        maps: Number of learned maps.
        channels: Number of channels of the prompt.
        size: Height and width of the learned maps.

    Shape:
        ``(b, h, w, features)`` → ``(b, h, w, channels)``.

    References:
        PromptIR, section 3.1.
    """

    def __init__(self, features: int, maps: int, channels: int, size: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.rand(1, maps, channels, size, size))
        self.weights = nn.Linear(features, maps)
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w p"]:
        """Return the prompt for these features, with their height and width."""
        weights = self.weights(x.mean((1, 2))).softmax(-1)
        prompt = (weights @ self.maps.flatten(2)[0]).reshape(-1, *self.maps.shape[2:])
        resized = F.interpolate(prompt, size=x.shape[1:3], mode="bilinear", align_corners=False)
        return spatial(resized.permute(0, 2, 3, 1), self.convolution)


class DecoderLevel(nn.Module):
    """Level of the decoder: prompt, upsampling, skip connection and transformer blocks.

    Args:
        features: Number of channels of the coarser level.
        reduced: Number of channels before upsampling, which halves it.
        skip: Number of channels of the skip connection.
        channels: Number of channels of this level. If it differs from ``reduced // 2 + skip``, a 1×1 convolution
            follows the skip connection.
        prompt: Prompt for the features of the coarser level.
        blocks: Transformer blocks of this level.
        heads: Number of heads of the transformer block that mixes features and prompt ("PIM").
        expansion: Hidden channels of that block's feed-forward network divided by its channels.
    """

    def __init__(
        self,
        features: int,
        reduced: int,
        skip: int,
        channels: int,
        prompt: Prompt,
        blocks: nn.Sequential,
        heads: int,
        expansion: float,
    ) -> None:
        super().__init__()
        prompted = features + prompt.maps.shape[2]
        self.prompt = prompt
        self.interaction = TransformerBlock(prompted, heads, expansion)
        self.reduce = nn.Conv2d(prompted, reduced, 1, bias=False)
        self.upsample = Upsample(reduced)
        joined = reduced // 2 + skip
        self.fuse = nn.Conv2d(joined, channels, 1, bias=False) if joined != channels else None
        self.blocks = blocks

    def forward(self, x: Float[Tensor, "b h w c"], skip: Float[Tensor, "b h2 w2 s"]) -> Float[Tensor, "b h2 w2 d"]:
        """Decode features of the coarser level, given the encoder's features of this level."""
        x = self.interaction(torch.cat((x, self.prompt(x)), dim=-1))
        x = torch.cat((self.upsample(pointwise(x, self.reduce.weight)), skip), dim=-1)
        if self.fuse is not None:
            x = pointwise(x, self.fuse.weight)
        features: Tensor = self.blocks(x)
        return features


class PromptIR(Network):
    """PromptIR: encoder with four levels, decoder with three levels and a prompt for each, refinement.

    The only output is ``derained``; the published loss is the mean absolute error.

    Args:
        dim: Number of channels at the finest level; it doubles at each level.
        blocks: Number of transformer blocks at each of the four levels; the decoder has as many as the encoder.
        refinement: Number of refinement blocks.
        heads: Number of attention heads at each of the four levels.
        expansion: Hidden channels of the feed-forward networks divided by their channels.
        maps: Number of learned maps of each prompt.
        prompt_channels: Number of channels of the prompts of decoder levels 1 (the finest), 2 and 3.
        prompt_sizes: Height and width of the learned maps of decoder levels 1, 2 and 3.
        prompt_heads: Number of attention heads of each block that mixes features and a prompt.

    Raises:
        DerainError: If ``blocks`` or ``heads`` does not have four numbers, ``prompt_channels`` or ``prompt_sizes`` not
            three, or ``heads`` or ``prompt_heads`` do not divide the channels of their blocks.

    References:
        PromptIR, section 3 and Figure 2. 35,376,967 parameters by default; the authors' file has 215,296 more, which
        are not used.
    """

    size_multiple: int = 8
    bytes_per_pixel: int = 6000
    signature: ClassVar[str] = "prompt1.prompt_param"
    published_names: ClassVar[Names] = (
        (r"chnl_reduce\d\..*", None),
        (r"reduce_noise_channel_\d\..*", None),
        (r"^patch_embed\.", "embedding."),
        (r"^encoder_level(\d)\.", r"encoder.level\1."),
        (r"^down(\d)_\d\.", r"downsample.level\1."),
        (r"^prompt(\d)\.prompt_param$", r"decoder.level\1.prompt.maps"),
        (r"^prompt(\d)\.linear_layer\.", r"decoder.level\1.prompt.weights."),
        (r"^prompt(\d)\.conv3x3\.", r"decoder.level\1.prompt.convolution."),
        (r"^noise_level(\d)\.", r"decoder.level\1.interaction."),
        (r"^reduce_noise_level(\d)\.", r"decoder.level\1.reduce."),
        (r"^up\d_(\d)\.", r"decoder.level\1.upsample."),
        (r"^reduce_chan_level(\d)\.", r"decoder.level\1.fuse."),
        (r"^decoder_level(\d)\.", r"decoder.level\1.blocks."),
    )

    def __init__(
        self,
        dim: int = 48,
        blocks: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        maps: int = 5,
        prompt_channels: Sequence[int] = (64, 128, 320),
        prompt_sizes: Sequence[int] = (64, 32, 16),
        prompt_heads: int = 4,
    ) -> None:
        super().__init__()
        for name, expected, numbers in (
            ("blocks", 4, blocks),
            ("heads", 4, heads),
            ("prompt_channels", 3, prompt_channels),
            ("prompt_sizes", 3, prompt_sizes),
        ):
            if len(numbers) != expected:
                raise DerainError(f"{name} {list(numbers)}: expected {expected} numbers, one per level")

        def level(channels: int, index: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(TransformerBlock(channels, heads[index], expansion) for _ in range(count)))

        def prompt(number: int, features: int) -> Prompt:
            return Prompt(features, maps, prompt_channels[number - 1], prompt_sizes[number - 1])

        self.embedding = PatchEmbedding(dim)
        self.encoder = nn.ModuleDict({f"level{i + 1}": level(dim << i, i, blocks[i]) for i in range(3)})
        self.downsample = nn.ModuleDict({f"level{i + 1}": Downsample(dim << i) for i in range(3)})
        self.latent = level(8 * dim, 3, blocks[3])
        # Widths as multiples of dim: of the coarser level, before upsampling, of the skip connection, of this level.
        widths = {3: (8, 4, 4, 4), 2: (4, 4, 2, 2), 1: (2, 2, 1, 2)}
        self.decoder = nn.ModuleDict()
        for number in LEVELS:
            features, reduced, skip, channels = (dim * factor for factor in widths[number])
            level_blocks = level(channels, number - 1, blocks[number - 1])
            self.decoder[f"level{number}"] = DecoderLevel(
                features, reduced, skip, channels, prompt(number, features), level_blocks, prompt_heads, expansion
            )
        self.refinement = level(2 * dim, 0, refinement)
        self.output = nn.Conv2d(2 * dim, 3, 3, padding=1, bias=False)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained``."""
        image = image.permute(0, 2, 3, 1).contiguous()
        x = self.embedding(image)
        skips = []
        for blocks, downsample in zip(self.encoder.values(), self.downsample.values(), strict=True):
            skips.append(blocks(x))
            x = downsample(skips[-1])
        x = self.latent(x)
        for decoder_level in self.decoder.values():
            x = decoder_level(x, skips.pop())
        derained = spatial(self.refinement(x), self.output) + image
        return {"derained": derained.permute(0, 3, 1, 2)}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments of ``__init__``; None for another network."""
        if cls.signature not in state or (options := restormer_options(state)) is None:
            return None
        prompts = [state[f"prompt{i}.prompt_param"].shape for i in (1, 2, 3)]
        return options | {
            "maps": prompts[0][1],
            "prompt_channels": [shape[2] for shape in prompts],
            "prompt_sizes": [shape[3] for shape in prompts],
            "prompt_heads": heads_of(state, "noise_level1")[0],
        }
