"""RPDNet: recurrent network whose attention finds rain streaks of all sizes in a Gaussian scale space."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.networks.base import Names, Network, count_numbered
from derain.networks.iterations import check_iterations
from derain.nn.padding import pad_to_minimum
from derain.nn.recurrent import ResidualBlock, State, conv3x3

SIGMA = 1.6
"""Standard deviation of the first level of an octave, in pixels (SIFT's value)."""

INPUT_SIGMA = 0.5
"""Blur that an image is assumed to have, in pixels (SIFT's value)."""

INTERVALS = 3
"""Number of levels in which the nominal standard deviation doubles. An octave has six levels and five differences."""


class ScaleSpace(nn.Module):
    """Differences of Gaussians of feature maps, in octaves. Each octave has half the size of the previous one.

    As in the authors' code, all Gaussian kernels are truncated to 3×3 pixels, and maps are padded with zeros.

    Args:
        channels: Number of channels c of the maps.
        octaves: Number of octaves.

    Shape:
        ``(b, c, h, w)`` → for each octave i = 0, 1, … ``(b, 5c, h // 2**i, w // 2**i)``.

    References:
        RPDNet, section 3.2; Lowe, Distinctive Image Features from Scale-Invariant Keypoints, IJCV 2004, section 3.
    """

    def __init__(self, channels: int, octaves: int) -> None:
        super().__init__()
        self.channels, self.octaves = channels, octaves
        step = math.sqrt(2 ** (2 / INTERVALS) - 1)
        sigmas = [SIGMA * 2 ** (level / INTERVALS) * step for level in range(INTERVALS + 2)]
        self.first_kernel: Tensor
        self.kernels: Tensor
        self.register_buffer("first_kernel", _gaussian(math.sqrt(SIGMA**2 - INPUT_SIGMA**2)), persistent=False)
        self.register_buffer("kernels", torch.stack([_gaussian(sigma) for sigma in sigmas]), persistent=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b c5 h2 w2"]]:
        """Return the differences of adjacent levels for each octave, concatenated along the channels."""
        x = self._blur(x, self.first_kernel)
        octaves = []
        for octave in range(self.octaves):
            differences = []
            for level, kernel in enumerate(self.kernels, 1):
                blurred = self._blur(x, kernel)
                differences.append(blurred - x)
                x = blurred
                if level == INTERVALS:
                    start_of_next = x
            octaves.append(torch.cat(differences, dim=1))
            if octave + 1 < self.octaves:
                x = F.max_pool2d(start_of_next, 2)
        return octaves

    def _blur(self, x: Float[Tensor, "b c h w"], kernel: Float[Tensor, "3 3"]) -> Float[Tensor, "b c h w"]:
        return F.conv2d(x, kernel.expand(self.channels, 1, 3, 3), padding=1, groups=self.channels)


def _gaussian(sigma: float) -> Float[Tensor, "3 3"]:
    offsets = torch.arange(-1, 2, dtype=torch.float64)
    kernel = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    return (kernel / kernel.sum()).to(torch.get_default_dtype())


class ScaleAttention(nn.Module):
    """Features of one scale, weighted by attention that is computed from the differences of Gaussians of this scale.

    Args:
        channels: Number of channels c of the features.
        reduction: Factor r by which the features are downsampled.

    Shape:
        Features ``(b, c, h, w)`` and differences ``(b, 5c, h // r, w // r)`` → ``(b, c, h // r, w // r)``.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.reduction = reduction
        self.features = conv3x3(channels, channels)
        self.attention = conv3x3((INTERVALS + 2) * channels, channels)
        self.fusion = conv3x3(channels, channels)

    def forward(
        self, x: Float[Tensor, "b c h w"], differences: Float[Tensor, "b c5 h2 w2"]
    ) -> Float[Tensor, "b c h2 w2"]:
        """Return the attended features: ``relu(fusion(y + y * sigmoid(attention)))``."""
        if self.reduction > 1:
            x = F.avg_pool2d(x, self.reduction)
        y = self.features(x)
        weights = torch.sigmoid_(self.attention(differences))
        return torch.relu_(self.fusion(torch.addcmul(y, y, weights)))


class SummingLSTM(nn.Module):
    """Convolutional LSTM that adds the results of separate convolutions of features and hidden state.

    Args:
        channels: Number of channels c of features and state.

    Shape:
        Features ``(b, c, h, w)`` and the previous state, or None → the next state.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        gates = ("input", "forget", "candidate", "output")
        self.of_features = nn.ModuleDict({name: conv3x3(channels, channels) for name in gates})
        self.of_hidden = nn.ModuleDict(
            {name: nn.Conv2d(channels, channels, 3, padding=1, bias=False) for name in gates}
        )

    def forward(self, x: Float[Tensor, "b c h w"], state: State | None) -> State:
        """Return the next state; a ``state`` of None, in the first iteration, stands for zeros."""
        candidate = torch.tanh_(self._gate("candidate", x, state))
        cell = torch.sigmoid_(self._gate("input", x, state)) * candidate
        if state is not None:
            cell = torch.addcmul(cell, torch.sigmoid_(self._gate("forget", x, state)), state.cell)
        return State(torch.sigmoid_(self._gate("output", x, state)) * torch.tanh(cell), cell)

    def _gate(self, name: str, x: Float[Tensor, "b c h w"], state: State | None) -> Float[Tensor, "b c h w"]:
        gate: Tensor = self.of_features[name](x)
        return gate if state is None else gate + self.of_hidden[name](state.hidden)

    def extra_macs(self, inputs: tuple[Any, ...], output: State) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of omitted convolutions, and 0.

        In the first iteration, the authors convolve a hidden state of zeros, and compute a forget gate without effect.
        """
        if inputs[1] is not None:
            return 0, 0
        hidden_weights = sum(parameter.numel() for parameter in self.of_hidden.parameters())
        forget_weights = self.get_parameter("of_features.forget.weight").numel()
        return (hidden_weights + forget_weights) * output.hidden[:, 0].numel(), 0


def _doubled(coarse: Float[Tensor, "b c h w"], fine: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b c h2 w2"]:
    """Double the size of ``coarse`` bilinearly (``align_corners``), and pad with zeros to the size of ``fine``."""
    doubled = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=True)
    height, width = (fine.shape[axis] - doubled.shape[axis] for axis in (2, 3))
    return F.pad(doubled, (0, width, 0, height))


class RPDNet(Network):
    """Recurrent network with scale-space invariant attention (491,939 parameters by default).

    Each iteration computes features of the rainy image and of the image of the previous iteration at several scales. At
    each scale, attention from differences of Gaussians selects rain streaks of the corresponding size, and an LSTM
    passes its state to the next iteration. From the coarsest to the finest scale, the features are merged into a
    map of the rain, which is subtracted from the rainy image. The authors' files have 18,496 more parameters, which
    are not used.

    Args:
        iterations: Number of iterations, 1 to 100; 6 in the paper.
        channels: Number of channels of the features.
        scales: Number of scales (octaves).

    Outputs:
        ``derained`` of the last iteration; ``derained1``, ``derained2``, … of the earlier ones.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same, not clamped; any ``h, w >= 1``. Sides below ``2**(scales - 1)`` are padded by
        repeating the border.

    Raises:
        DerainError: If ``iterations`` is not an integer from 1 to 100.

    References:
        Pang et al., Single Image Deraining via Scale-space Invariant Attention Neural Network, ACM MM 2020.

    Example:
        >>> network = RPDNet(iterations=2)
        >>> sum(parameter.numel() for parameter in network.parameters())
        491939
        >>> list(network.outputs(torch.rand(1, 3, 5, 2)))
        ['derained', 'derained1']
    """

    bytes_per_pixel: int = 4096
    signature: ClassVar[str] = "body.tran_conv.weight"
    published_options: ClassVar[frozenset[str]] = frozenset({"iterations"})
    published_names: ClassVar[Names] = (
        (r"body\.conv_m\..*", None),
        (r"^body\.tran_conv\.", "head."),
        (r"^body\.scale_conv\.", "attentions."),
        (r"^body\.up_conv\.(\d+)\.conv_m\.0\.", r"merges.\1."),
        (r"^body\.lstm\.", "lstms."),
        (r"\.conv_f\.0\.", ".features."),
        (r"\.conv_m\.0\.", ".attention."),
        (r"\.conv_z\.0\.", ".fusion."),
        (r"\.conv_x([ifoj])\.", r".of_features.\1."),
        (r"\.conv_h([ifoj])\.", r".of_hidden.\1."),
        (r"\.i\.", ".input."),
        (r"\.f\.", ".forget."),
        (r"\.j\.", ".candidate."),
        (r"\.o\.", ".output."),
        (r"^body_end\.", "tail."),
        (r"\.body\.0\.", ".first."),
        (r"\.body\.2\.", ".second."),
    )

    def __init__(self, iterations: int = 6, channels: int = 32, scales: int = 3) -> None:
        super().__init__()
        check_iterations(iterations)
        self.iterations, self.scales = iterations, scales
        self.head = conv3x3(6, channels)
        self.scale_space = ScaleSpace(channels, scales)
        reductions = [2**octave for octave in reversed(range(scales))]  # the coarsest scale is the first
        self.attentions = nn.ModuleList([ScaleAttention(channels, reduction) for reduction in reductions])
        self.lstms = nn.ModuleList([SummingLSTM(channels) for _ in reductions])
        self.merges = nn.ModuleList([conv3x3(2 * channels, channels) for _ in reductions[1:]])
        self.tail = nn.Sequential(ResidualBlock(channels), ResidualBlock(channels), conv3x3(channels, 3))

    def pad(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Return images padded so that their sides have at least one pixel at the coarsest scale."""
        return pad_to_minimum(image, 2 ** (self.scales - 1))

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return the images of all iterations: first the last one, then the earlier ones in order."""
        derained = image
        states: list[State | None] = [None] * self.scales
        earlier: dict[str, Tensor] = {}
        for iteration in range(self.iterations):
            if iteration:
                earlier[f"derained{iteration}"] = derained
            x = self.head(torch.cat((image, derained), dim=1))
            octaves = reversed(self.scale_space(x))  # the coarsest scale is the first
            modules_and_inputs = zip(self.attentions, self.lstms, octaves, states, strict=True)
            next_states = [
                lstm(attention(x, differences), state) for attention, lstm, differences, state in modules_and_inputs
            ]
            merged = next_states[0].hidden
            for merge, state in zip(self.merges, next_states[1:], strict=True):
                merged = torch.relu_(merge(torch.cat((state.hidden, _doubled(merged, state.hidden)), dim=1)))
            states = [*next_states]
            derained = image - self.tail(merged)
        return {"derained": derained, **earlier}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return ``channels`` and ``scales``; None for another network."""
        if cls.signature not in state:
            return None
        return {
            "channels": state[cls.signature].shape[0],
            "scales": count_numbered(state, r"body\.scale_conv\.(\d+)\."),
        }

    @classmethod
    def stated_options(cls, path: Path) -> dict[str, Any]:
        """Return 6 iterations for files with the authors' names, such as ``rain100l.pth``; nothing for others."""
        return {"iterations": 6} if re.fullmatch(r"rain\d+[hl]?\.pth", path.name) else {}
