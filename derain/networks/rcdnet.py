"""RCDNet: proximal gradient descent for a convolutional dictionary of rain, unrolled into a network.

Wang et al., A Model-driven Deep Neural Network for Single Image Rain Removal, CVPR 2020, sections 3 and 4.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.networks.base import Names, Network, count_numbered

MAX_VALUE = 255
"""The network computes with pixel values in [0, 255]."""

PARAMETER_FACTOR = 0.1
"""Factor by which the network multiplies its step sizes and kernels, as in the authors' code."""


class RCDNet(Network):
    """Rain convolutional dictionary network: 2,975,186 parameters by default.

    The model is O = B + Σ C_n ⊗ M_n: a rainy image O is the sum of a background B and of rain maps M_n, each convolved
    with a rain kernel C_n. A stage is a step of proximal gradient descent for the maps, then one for the background. In
    each step, a network replaces the proximal operator. All stages share their kernels; the maps before the first stage
    have kernels of their own.

    Outputs: ``derained``; ``background0``, the estimate before the first stage; ``rain1``, ``background1``, …, rain and
    background ``(b, 3, h, w)`` of each stage. The target of rain is the rainy minus the clean image; the target of all
    other outputs is the clean image. The published loss is the sum of the MSE of all outputs, with weight 1 for
    ``derained`` and the last rain, and 0.1 for all others.

    Args:
        stages: Number of stages.
        maps: Number of rain maps and kernels.
        dual: Number of channels, besides RGB, of the networks for the background.
        blocks: Number of residual blocks of each proximal network.
        kernel: Side of the rain kernels in pixels: odd, at most 31.

    Raises:
        DerainError: If a number is less than 1, or ``kernel`` is even or above 31.

    Example:
        >>> network = RCDNet(stages=2, maps=3, dual=2, blocks=1)
        >>> list(network.outputs(torch.rand(1, 3, 5, 7)))
        ['derained', 'background0', 'rain1', 'background1', 'rain2', 'background2']
    """

    bytes_per_pixel = 1280
    signature: ClassVar[str] = "w_z_f"
    published_names: ClassVar[Names] = (
        # The repository RCDNet: step sizes of the background are two tensors, which `translate` joins.
        (r"eta1|mnet\..*", None),
        (r"^w_z_f$", "filter"),
        (r"^weight0$", "first_kernel"),
        (r"^conv$", "kernel"),
        (r"^eta11$", "rain_steps"),
        (r"^eta2$", "background_steps.first"),
        (r"^eta12$", "background_steps.others"),
        (r"^xnet\.", "initial."),
        (r"^fxnet\.", "final."),
        (r"^x_stage\.", "background."),
        (r"^m_stage\.", "rain."),
        *((rf"\.res[mx]{number}\.", f".blocks.{number - 1}.") for number in range(1, 5)),
        # The repository RCDNet_simple.
        (r"^C_z$", "filter"),
        (r"^C0$", "first_kernel"),
        (r"^C$", "kernel"),
        (r"^etaM_S$", "rain_steps"),
        (r"^etaB_S$", "background_steps"),
        (r"^proxNet_B_0\.", "initial."),
        (r"^proxNet_B_last_layer\.", "final."),
        (r"^proxNet_B_S\.", "background."),
        (r"^proxNet_M_S\.", "rain."),
        (r"\.layer\.(\d+)\.", r".blocks.\1."),
        # Both repositories.
        (r"(^|\.)tau$", r"\1threshold"),
        (r"\.0\.(weight|bias)$", r".conv1.\1"),
        (r"\.1\.(weight|bias|running_\w+|num_\w+)$", r".norm1.\1"),
        (r"\.3\.(weight|bias)$", r".conv2.\1"),
        (r"\.4\.(weight|bias|running_\w+|num_\w+)$", r".norm2.\1"),
    )

    def __init__(self, stages: int = 17, maps: int = 32, dual: int = 32, blocks: int = 4, kernel: int = 9) -> None:
        super().__init__()
        if min(stages, maps, dual, blocks, kernel) < 1 or kernel % 2 == 0 or kernel > 31:
            raise DerainError(
                f"stages {stages}, maps {maps}, dual {dual}, blocks {blocks}, kernel {kernel}: each must be at least "
                "1, and kernel odd and at most 31"
            )
        self.threshold = nn.Parameter(torch.ones(1))
        self.filter = nn.Parameter(torch.full((dual, 3, 3, 3), 1 / 9))
        self.first_kernel = nn.Parameter(streaks(maps, kernel))
        self.kernel = nn.Parameter(streaks(maps, kernel))
        self.rain_steps = nn.Parameter(torch.full((stages - 1, 1), 1.0))
        self.background_steps = nn.Parameter(torch.full((stages, 1), 5.0))
        self.initial = ProximalNetwork(3 + dual, blocks)
        self.rain = nn.ModuleList(ProximalNetwork(maps, blocks, threshold=0.5) for _ in range(stages))
        self.background = nn.ModuleList(ProximalNetwork(3 + dual, blocks) for _ in range(stages))
        self.final = ProximalNetwork(3 + dual, blocks)

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restore RGB images in [0, 1] of any size; the result is not clamped, and outputs of stages are not stored."""
        return self._iterate(rainy, None)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained``, ``background0``, and rain and background of every stage."""
        outputs: dict[str, Tensor] = {}
        return {"derained": self._iterate(image, outputs), **outputs}

    def _iterate(self, image: Float[Tensor, "b 3 h w"], outputs: dict[str, Tensor] | None) -> Float[Tensor, "b 3 h w"]:
        """Return the derained image; store the outputs of the stages in ``outputs``, unless it is None."""
        rainy = image * MAX_VALUE
        kernel, first_kernel = PARAMETER_FACTOR * self.kernel, PARAMETER_FACTOR * self.first_kernel
        background_steps, rain_steps = PARAMETER_FACTOR * self.background_steps, PARAMETER_FACTOR * self.rain_steps
        features: Tensor = self.initial(torch.cat((rainy, F.conv2d(rainy, self.filter, padding=1)), dim=1))
        background = self._store(outputs, "background0", features[:, :3])
        maps = transposed_convolution(torch.relu(rainy - background - self.threshold), first_kernel)
        for stage, (rain_network, background_network) in enumerate(zip(self.rain, self.background, strict=True)):
            maps = rain_network(maps)
            rain = self._store(outputs, f"rain{stage + 1}", F.conv2d(maps, kernel, padding=kernel.shape[-1] // 2))
            background = torch.lerp(background, rainy - rain, background_steps[stage])
            features = background_network(torch.cat((background, features[:, 3:]), dim=1))
            background = self._store(outputs, f"background{stage + 1}", features[:, :3])
            if stage < len(self.rain) - 1:
                maps = maps - rain_steps[stage] * transposed_convolution(background + rain - rainy, kernel)
        return cast(Tensor, self.final(features))[:, :3] / MAX_VALUE

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: minus and plus those of functional convolutions.

        ``derain bench`` counts functional convolutions; thop misses them.
        """
        weights = (2 * len(self.rain) - 1) * self.kernel.numel() + self.first_kernel.numel()
        functional_macs = (weights + self.filter.numel()) * (output.numel() // output.shape[1])
        return -functional_macs, functional_macs

    @staticmethod
    def _store(outputs: dict[str, Tensor] | None, name: str, image: Tensor) -> Tensor:
        """Return ``image``, which is in [0, 255]; store it in [0, 1] in ``outputs``, unless that is None."""
        if outputs is not None:
            outputs[name] = image / MAX_VALUE
        return image

    def targets(
        self, rainy: Float[Tensor, "b 3 h w"], clean: Float[Tensor, "b 3 h w"], outputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the rainy minus the clean image for ``rain1``, …, and the clean image for all other outputs."""
        rain = rainy - clean
        return {name: rain if name.startswith("rain") else clean for name in outputs}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments of ``__init__``, for files of RCDNet or RCDNet_simple; None for another network."""
        if cls.signature in state:
            stages, blocks = 1 + state["eta11"].shape[0], count_numbered(state, r"xnet\.resx(\d+)\.") - 1
            kernel, dual_filter = state["weight0"], state[cls.signature]
        elif "C_z" in state:
            stages, blocks = state["etaB_S"].shape[0], count_numbered(state, r"proxNet_B_0\.layer\.(\d+)\.")
            kernel, dual_filter = state["C0"], state["C_z"]
        else:
            return None
        _, maps, _, side = kernel.shape
        return {"stages": stages, "maps": maps, "dual": dual_filter.shape[0], "blocks": blocks, "kernel": side}

    @classmethod
    def translate(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the authors' tensors by derain's names.

        Files of RCDNet have 16 sets of kernels, of which only the second is used. Their two tensors of step sizes of
        the background are joined.
        """
        translated = super().translate(state)
        if "background_steps.first" in translated:
            parts = translated.pop("background_steps.first"), translated.pop("background_steps.others")
            translated["background_steps"] = torch.cat([part.view(-1, 1) for part in parts])
            translated["kernel"] = translated["kernel"][1]
        return translated


class ProximalNetwork(nn.Module):
    """Residual blocks that replace a proximal operator, then an optional thresholding, ``max(x - threshold, 0)``.

    Args:
        channels: Number of channels.
        blocks: Number of residual blocks.
        threshold: Initial value of the learned thresholds of the channels; None for no thresholding.
    """

    def __init__(self, channels: int, blocks: int, threshold: float | None = None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.threshold = None if threshold is None else nn.Parameter(torch.full((1, channels, 1, 1), threshold))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return non-negative features."""
        x = self.blocks(x)
        return x if self.threshold is None else torch.relu_(x - self.threshold)


class ResidualBlock(nn.Module):
    """Residual block of two convolutions with batch normalisation, and a ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Apply the block."""
        residual = self.norm2(self.conv2(torch.relu_(self.norm1(self.conv1(x)))))
        return torch.relu_(x + residual)


def transposed_convolution(
    image: Float[Tensor, "b 3 h w"], kernels: Float[Tensor, "3 n k k"]
) -> Float[Tensor, "b n h w"]:
    """Return the transpose (adjoint) of the convolution of ``n`` rain maps with kernels, applied to an image.

    The transpose is a convolution with the kernels rotated by 180°.
    """
    return F.conv2d(image, kernels.flip(2, 3).transpose(0, 1), padding=kernels.shape[-1] // 2)


def streaks(count: int, side: int) -> Float[Tensor, "3 n k k"]:
    """Return the initial rain kernels: vertical streaks of growing length; each channel of a kernel has the sum 1.

    A kernel is a vertically elongated Gaussian; the last five eighths of the kernels are wider. The formula is that of
    the authors' script ``init_rain_kernel.m`` for 32 kernels of 9×9 pixels.

    Args:
        count: Number of kernels.
        side: Side of the kernels in pixels, odd.

    Example:
        >>> kernels = streaks(32, 9)
        >>> kernels.shape, round(float(kernels[0, 5].sum()), 6), bool((kernels[0] == kernels[2]).all())
        (torch.Size([3, 32, 9, 9]), 1.0, True)
    """
    radius = side // 2
    number = torch.arange(1, count + 1, dtype=torch.float64)[:, None, None] * 32 / count
    thin = number <= 12
    length = number / 4 + torch.where(thin, 2.5, 2.0)
    deviation = torch.where(thin, 0.25, 0.5)
    flat = torch.where(thin, round(0.1 * radius), round(0.2 * radius))
    offset = torch.arange(-radius, radius + 1).abs()
    distance = (offset - flat).clamp(min=0)
    squares = distance.square() + (distance.mT / length).square()
    kernels = torch.exp(squares / (-2 * deviation.square()))
    kernels = kernels / kernels.sum((1, 2), keepdim=True)
    return kernels.float().expand(3, -1, -1, -1).clone()
