"""HCT-FFN: experts, a transformer and experts in three stages, each guided by the residue channel of an image.

Chen et al., Hybrid CNN-Transformer Feature Fusion for Single Image Deraining, AAAI 2023. Convolutional experts remove
most of the rain, a transformer adds a large context, and further experts refine the result. The network computes with
values in [0, 255].

In the transformer, pixels attend to each other within runs: sequences of pixels in row-major order. Without gradients,
runs are computed one after another, which saves memory.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.networks.base import Names, Network, count_numbered
from derain.nn.experts import PUBLISHED_NAMES, ExpertCompensator
from derain.nn.graphs import exporting
from derain.nn.normalization import LayerNorm
from derain.nn.padding import pad_to_minimum

RUNS = 16
"""Number of runs, of ``h * w // 16`` pixels each; the remaining pixels are a further, shorter run."""

MIN_SIDE = RUNS
"""Minimum side of images. Runs then have at least 16 pixels, more than the 15 that can remain for a further run."""

HEADS = 8
"""Number of heads of the attention."""

MAX_REPEATS = 100
"""Maximum of ``repeats``; without it, a small weights file could demand any run time."""


class ReflectConv(nn.Conv2d):
    """3×3 convolution with reflection padding, followed by ReLU.

    Args:
        channels: Number of channels of the input.
        out_channels: Number of channels of the output.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Convolve and apply ReLU."""
        return F.relu(super().forward(F.pad(input, (1, 1, 1, 1), "reflect")), inplace=True)


class ResidualBlock(nn.Module):
    """Residual block: two convolutions with ReLU, then squeeze-and-excitation.

    Args:
        channels: Number of channels.

    Shape:
        ``(b, channels, h, w)`` → same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.squeeze = nn.Linear(channels, channels, bias=False)
        self.excite = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Transform features."""
        y = F.relu(self.conv2(F.relu(self.conv1(x), inplace=True)), inplace=True)
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        return torch.addcmul(x, y, weights[:, :, None, None])

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of means in thop, one per value and mean, and 0."""
        return output.numel() + output.shape[0] * output.shape[1], 0


class PriorEncoder(nn.Module):
    """Encoder of the residue channel of an image. Rain is grey, and so almost invisible in this channel.

    Args:
        channels: Number of channels.
        blocks: Number of residual blocks.

    Shape:
        ``(b, 3, h, w)`` → ``(b, channels, h, w)``.

    References:
        Residue channel, the largest minus the smallest of R, G and B: Li et al., Robust Optical Flow in Rainy Scenes,
        ECCV 2018.
    """

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.shallow = nn.Sequential(ReflectConv(3, channels // 2), ReflectConv(channels // 2, channels))
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Encode the residue channel."""
        residue = image.amax(1, keepdim=True) - image.amin(1, keepdim=True)
        shallow = self.shallow(residue.expand_as(image))
        return F.relu(self.conv(self.blocks(shallow)) + shallow, inplace=True)


class PriorFusion(nn.Module):
    """Fusion of features with features of the prior (the residue channel), gated by their similarity.

    Args:
        channels: Number of channels.

    Shape:
        Features and encoded prior, each ``(b, channels, h, w)`` → ``(b, channels, h, w)``.

    References:
        HCT-FFN, section 3.2, after Yi et al., SPDNet, ICCV 2021.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels, 3, padding=1)
        self.key = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Conv2d(2 * channels, 2, 3, padding=1)
        self.prior_gate = nn.Conv2d(2 * channels, 2, 3, padding=1)
        self.fuse = ReflectConv(2 * channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"], prior: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Fuse features with the prior."""
        attention = torch.sigmoid(self.query(x) * self.key(prior))
        gated = []
        for features, gate in ((x, self.gate), (prior, self.prior_gate)):
            attended = features * attention
            plain_gate, attended_gate = gate(torch.cat((features, attended), dim=1)).split(1, dim=1)
            gated.append(features * plain_gate + attended * attended_gate)
        return cast(Tensor, self.fuse(torch.cat(gated, dim=1)))


class RunTransformer(nn.Module):
    """Transformer block for runs of tokens.

    Args:
        width: Length of a token.
        heads: Number of heads, a divisor of ``width // 2``, the number of channels of queries, keys and values.
        hidden: Hidden channels of the feed-forward network.

    Shape:
        ``(runs, tokens, width)`` → same.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.reduce = nn.Linear(width, width // 2, bias=False)
        self.qkv = nn.Linear(width // 2, 3 * (width // 2), bias=False)
        self.project = nn.Linear(width // 2, width)
        self.norm2 = LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width))
        self.heads = heads
        self.scale = (width // heads) ** -0.5  # as in the authors' code, by the width before its reduction

    def forward(self, x: Float[Tensor, "n t d"], mask: Tensor | None = None) -> Float[Tensor, "n t d"]:
        """Transform tokens.

        Args:
            x: Runs of tokens.
            mask: Summand of the attention scores, ``(runs, 1, 1, tokens)``; None for no mask.
        """
        qkv = self.qkv(self.reduce(self.norm1(x))).reshape(*x.shape[:2], 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, mask, scale=self.scale)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.feed_forward(self.norm2(x)))

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: 0, and those of attention, which thop misses."""
        return 0, 2 * output[..., : self.reduce.out_features].numel() * output.shape[1]


class BackgroundTransformer(nn.Module):
    """Transformer whose tokens are overlapping 3×3 patches, with attention within runs ("BaViT").

    The resulting patches are summed where they overlap, and convolved.

    Args:
        channels: Number of channels, a multiple of 16.
        hidden: Hidden channels of the feed-forward network.
        repeats: How many times the transformer block is applied, always with the same weights; 1 to 100.

    Shape:
        ``(b, channels, h, w)`` with ``h * w >= 256`` → same.

    Raises:
        DerainError: If ``repeats`` is not from 1 to 100.

    References:
        HCT-FFN, section 3.3; attention within runs: Lu et al., ESRT, CVPR 2022 workshops.
    """

    def __init__(self, channels: int, hidden: int, repeats: int) -> None:
        super().__init__()
        self.block = RunTransformer(9 * channels, HEADS, hidden)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        if not 1 <= repeats <= MAX_REPEATS:
            raise DerainError(f"repeats {repeats}: expected 1 to {MAX_REPEATS}")
        self.repeats = repeats

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Transform features."""
        height, width = x.shape[2:]
        tokens = F.unfold(x, 3, padding=1).transpose(1, 2)  # (b, h · w, 9 · channels)
        patches = self.transform(tokens).transpose(1, 2)
        return cast(Tensor, self.conv(self.fold(patches, height, width)))

    def transform(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Transform tokens: without gradients run by run, else all runs of equal length at once."""
        if exporting():
            return self.transform_padded(tokens)
        b, count, width = tokens.shape
        length = count // RUNS
        if not torch.is_grad_enabled():
            return torch.cat([self.repeat(run) for run in torch.split(tokens, length, dim=1)], dim=1)
        end = RUNS * length
        runs = tokens[:, :end].reshape(b * RUNS, length, width)
        parts = [self.repeat(runs).reshape(b, end, width)]
        if end < count:
            parts.append(self.repeat(tokens[:, end:]))
        return torch.cat(parts, dim=1)

    def transform_padded(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Transform tokens as 17 runs of equal length, the last one padded and masked: a graph then fits any size."""
        b, count, width = tokens.shape
        length = count // RUNS
        index = torch.arange((RUNS + 1) * length, device=tokens.device)
        padded = tokens[:, index.clamp(max=count - 1)].reshape(-1, length, width)
        outside = (index >= count) & (index > RUNS * length)  # a run needs an unmasked token
        mask = torch.zeros_like(index, dtype=tokens.dtype).masked_fill(outside, torch.finfo(tokens.dtype).min)
        mask = mask.reshape(1, RUNS + 1, 1, 1, length).expand(b, -1, -1, -1, -1).flatten(0, 1)
        return self.repeat(padded, mask).reshape(b, -1, width)[:, :count]

    def repeat(self, runs: Float[Tensor, "n t d"], mask: Tensor | None = None) -> Float[Tensor, "n t d"]:
        """Apply the block repeatedly."""
        for _ in range(self.repeats):
            runs = self.block(runs, mask)
        return runs

    def fold(self, patches: Float[Tensor, "b d n"], height: Any, width: Any) -> Float[Tensor, "b c h w"]:
        """Sum patches where they overlap."""
        if not exporting():
            return F.fold(patches, (height, width), 3, padding=1)
        channels = self.conv.in_channels  # ONNX has an operator for fold only since opset 18
        kernel = torch.eye(9, dtype=patches.dtype, device=patches.device).reshape(9, 1, 3, 3).repeat(channels, 1, 1, 1)
        patches = patches.reshape(-1, 9 * channels, height, width)
        return F.conv_transpose2d(patches, kernel, padding=1, groups=channels)


class ExpertStage(nn.Module):
    """Fusion with the prior, then a mixture of experts ("DaMoE")."""

    def __init__(self, channels: int, steps: int) -> None:
        super().__init__()
        self.prior = PriorFusion(channels)
        self.experts = ExpertCompensator(channels, steps)

    def forward(self, x: Float[Tensor, "b c h w"], prior: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Transform features."""
        return cast(Tensor, self.experts(self.prior(x, prior).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class TransformerStage(nn.Module):
    """Fusion with the prior, then a transformer ("BaViT")."""

    def __init__(self, channels: int, hidden: int, repeats: int) -> None:
        super().__init__()
        self.prior = PriorFusion(channels)
        self.transformer = BackgroundTransformer(channels, hidden, repeats)

    def forward(self, x: Float[Tensor, "b c h w"], prior: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Transform features."""
        return cast(Tensor, self.transformer(self.prior(x, prior)))


class HCTFFN(Network):
    """HCT-FFN: three stages, each guided by a prior.

    The prior is the residue channel of an image: in the first stage, of the rainy image; in the others, of the image
    that the previous stage restored.

    Args:
        channels: Number of channels, a multiple of 16.
        blocks: Number of residual blocks in each encoder of a prior.
        steps: Number of layers of experts in the first and in the last stage.
        hidden: Hidden channels of the transformer's feed-forward network.
        repeats: How many times the transformer block is applied, always with the same weights; 1 to 100.

    Outputs:
        ``derained``: The image of the last stage.
        ``stage2``, ``stage1``: The images of the second and the first stage.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same, not clamped. Sides below 16 pixels are padded by repeating the border.

    Raises:
        DerainError: If ``channels`` is not a multiple of 16, or ``repeats`` is not from 1 to 100.

    References:
        HCT-FFN, Figure 2. 873,693 parameters by default.
    """

    bytes_per_pixel: int = 6000
    signature: ClassVar[str] = "sub2.attention.atten.reduce.weight"
    published_options: ClassVar[frozenset[str]] = frozenset({"repeats"})
    published_names: ClassVar[Names] = (
        (r".*\.ins\.(weight|bias)", None),
        (r"^conv_init1\.conv\.", "shallow.0."),
        (r"^conv_init2\.conv\.", "shallow.1."),
        (r"^res_extra(\d)\.conv_init1\.conv\.", r"encoder\1.shallow.0."),
        (r"^res_extra(\d)\.conv_init2\.conv\.", r"encoder\1.shallow.1."),
        (r"^res_extra(\d)\.extra\.module_body\.(\d+)\.module_body\.0\.", r"encoder\1.blocks.\2.conv1."),
        (r"^res_extra(\d)\.extra\.module_body\.(\d+)\.module_body\.2\.", r"encoder\1.blocks.\2.conv2."),
        (r"^res_extra(\d)\.extra\.module_body\.(\d+)\.se\.fc\.0\.", r"encoder\1.blocks.\2.squeeze."),
        (r"^res_extra(\d)\.extra\.module_body\.(\d+)\.se\.fc\.2\.", r"encoder\1.blocks.\2.excite."),
        (r"^res_extra(\d)\.extra\.module_body\.\d+\.(weight|bias)$", r"encoder\1.conv.\2"),
        (r"^sub(\d)\.", r"stage\1."),
        (r"\.prior\.query_conv\.", ".prior.query."),
        (r"\.prior\.key_conv\.", ".prior.key."),
        (r"\.prior\.gamma1\.", ".prior.gate."),
        (r"\.prior\.gamma2\.", ".prior.prior_gate."),
        (r"\.fuse_res\.conv\.", ".prior.fuse."),
        (r"^(stage\d)\.(?=layers\.)", r"\1.experts."),
        *PUBLISHED_NAMES,
        (r"\.c2\.", ".transformer.conv."),
        (r"\.attention\.(norm\d)\.", r".transformer.block.\1."),
        (r"\.attention\.atten\.proj\.", ".transformer.block.project."),
        (r"\.attention\.atten\.", ".transformer.block."),
        (r"\.attention\.mlp\.fc1\.", ".transformer.block.feed_forward.0."),
        (r"\.attention\.mlp\.fc2\.", ".transformer.block.feed_forward.2."),
        (r"^ag1\.conv\.", "join2."),
        (r"^ag2\.conv\.", "join3."),
        (r"^ag2_en\.conv\.", "merge2."),
        (r"^ag_en\.conv\.", "merge3."),
    )

    def __init__(self, channels: int = 32, blocks: int = 3, steps: int = 4, hidden: int = 72, repeats: int = 3) -> None:
        super().__init__()
        if channels < 1 or channels % 16:
            raise DerainError(f"channels {channels}: expected a multiple of 16")
        self.shallow = nn.Sequential(ReflectConv(3, channels // 2), ReflectConv(channels // 2, channels))
        self.encoder1, self.encoder2, self.encoder3 = (PriorEncoder(channels, blocks) for _ in range(3))
        self.stage1 = ExpertStage(channels, steps)
        self.stage2 = TransformerStage(channels, hidden, repeats)
        self.stage3 = ExpertStage(channels, steps)
        self.join2, self.join3 = ReflectConv(2 * channels, channels), ReflectConv(3 * channels, channels)
        self.merge2, self.merge3 = ReflectConv(2 * channels, channels), ReflectConv(3 * channels, channels)
        self.output1, self.output2, self.output3 = (nn.Conv2d(channels, 3, 3, padding=1) for _ in range(3))

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return the images of the three stages, last stage first."""
        height, width = image.shape[2:]
        rainy = 255 * pad_to_minimum(image, MIN_SIDE)
        x = self.shallow(rainy)
        x1 = self.stage1(x, self.encoder1(rainy))
        image1 = self.output1(x1)
        x2 = self.stage2(self.join2(torch.cat((x1, x), dim=1)), self.encoder2(image1))
        image2 = self.output2(self.merge2(torch.cat((x2, x1), dim=1)))
        x3 = self.stage3(self.join3(torch.cat((x2, x1, x), dim=1)), self.encoder3(image2))
        image3 = self.output3(self.merge3(torch.cat((x3, x2, x1), dim=1)))
        images = {"derained": image3, "stage2": image2, "stage1": image1}
        return {name: output[..., :height, :width] / 255 for name, output in images.items()}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments but ``repeats``; None for another network."""
        if cls.signature not in state:
            return None
        return {
            "channels": state["conv_init2.conv.weight"].shape[0],
            "blocks": count_numbered(state, r"res_extra1\.extra\.module_body\.(\d+)\.module_body\."),
            "steps": count_numbered(state, r"sub1\.layers\.1\._ops\.(\d+)\."),
            "hidden": state["sub2.attention.mlp.fc1.weight"].shape[0],
        }
