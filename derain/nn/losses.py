"""Losses between a network's output and its target, by name."""

import copy
from collections.abc import Callable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.backbones import BACKBONES
from derain.errors import DerainError
from derain.nn.ssim import structural_similarity

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function of output and target that returns the loss ``()``."""

CHARBONNIER_EPSILON = 1e-3
"""ε of the Charbonnier loss, for images in [0, 1]."""

VGG_LAYERS = {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15}
"""Layers of VGG16 whose outputs the perceptual loss compares, and their indices in torchvision's ``features``."""


def charbonnier(output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the mean of ``sqrt((output - target)² + ε²)`` with ε = 0.001.

    References:
        Zamir et al., MPRNet, CVPR 2021, as computed by their code: the mean over values, not the norm of an image.
    """
    return ((output - target).square() + CHARBONNIER_EPSILON**2).sqrt().mean()


def edge(output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the Charbonnier loss of the Laplacians of output and target, see `laplacian`.

    References:
        Zamir et al., MPRNet, CVPR 2021, as computed by their code.
    """
    return charbonnier(laplacian(output), laplacian(target))


def laplacian(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return the finest level of the Laplacian pyramid: images minus their low-pass version, in float32 or wider.

    For the low-pass version, images are blurred, set to zero except in every second row and column, multiplied by 4,
    and blurred again. The 5×5 blur has weights (0.05, 0.25, 0.4, 0.25, 0.05) along each axis; borders are replicated.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    blurred = _blur(images)
    sampled = torch.zeros_like(blurred)
    sampled[..., ::2, ::2] = 4 * blurred[..., ::2, ::2]
    return images - _blur(sampled)


def _blur(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    channels = images.shape[1]
    window = images.new_tensor([0.05, 0.25, 0.4, 0.25, 0.05])
    kernel = torch.outer(window, window).expand(channels, 1, 5, 5)
    with torch.autocast(images.device.type, enabled=False):
        return F.conv2d(F.pad(images, (2, 2, 2, 2), "replicate"), kernel, groups=channels)


def fft(output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the mean modulus of the difference of the two-dimensional discrete Fourier transforms.

    References:
        Chen et al., NeRD-Rain, CVPR 2024, section 3.4, as computed by their code: transforms are not normalised.
    """
    with torch.autocast(output.device.type, enabled=False):
        dtype = torch.promote_types(output.dtype, torch.float32)
        difference = torch.fft.fft2(output.to(dtype)) - torch.fft.fft2(target.to(dtype))
    modulus: Tensor = difference.abs()
    return modulus.mean()


def negative_ssim(output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the negative SSIM, see `structural_similarity`."""
    return -structural_similarity(output, target)


def perceptual(output: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
    """Return the mean squared difference of VGG16's features of output and target, averaged over three layers.

    VGG16 is torchvision's, trained on ImageNet, frozen, and in float32 or wider. As in the authors' code, its input is
    not normalised, unlike in its training.

    Args:
        output: Images in about [0, 1], RGB, of at least 4×4 pixels.
        target: As ``output``.

    Raises:
        DerainError: If the images are smaller, or VGG16's weights cannot be loaded, see `load_vgg`.

    References:
        Valanarasu et al., TransWeather, CVPR 2022, and Yasarla et al., Syn2Real, CVPR 2020, by their code: ReLUs 1_2,
        2_2 and 3_3; Johnson et al., Perceptual Losses for Real-Time Style Transfer and Super-Resolution, ECCV 2016.
    """
    if min(output.shape[2:]) < 4:
        size = tuple(output.shape[2:])
        raise DerainError(f"perceptual loss: images of {size}; expected at least 4×4 pixels; use larger crops")
    dtype = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    layers = _vgg_on(output.device, dtype)
    x, y = output.to(dtype), target.to(dtype)
    terms = []
    with torch.autocast(output.device.type, enabled=False):
        for index, layer in enumerate(layers):
            x, y = layer(x), layer(y)
            if index in VGG_LAYERS.values():
                terms.append(F.mse_loss(x, y))
    return torch.stack(terms).mean()


@cache
def load_vgg() -> nn.Sequential:
    """Return the first layers of torchvision's VGG16, pretrained and frozen; download the weights if necessary.

    The network is loaded once in a process. It is not a submodule of a method, so checkpoints and optimizers do not
    contain it.

    Raises:
        DerainError: If torchvision is not installed, or the weights are damaged or cannot be downloaded.
    """
    with BACKBONES["vgg"].loading("perceptual loss"):
        from torchvision.models import VGG16_Weights, vgg16

        with torch.device("meta"):
            layers: nn.Sequential = vgg16(init_weights=False).features[: max(VGG_LAYERS.values()) + 1]
        prefix = "features."
        state = VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
        needed_names = {f"{prefix}{name}" for name in layers.state_dict()}
        layers.load_state_dict(
            {n.removeprefix(prefix): w.clone() for n, w in state.items() if n in needed_names}, assign=True
        )
    return layers.eval().requires_grad_(False)


@cache
def _vgg_on(device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    """Return a copy of the layers on a device, in the given type; cached."""
    return copy.deepcopy(load_vgg()).to(device, dtype)


def mean(output: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """Return the mean of the output, for outputs of a network that are themselves losses; the target is not used."""
    return output.mean()


LOSSES: Mapping[str, Loss] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
    "charbonnier": charbonnier,
    "edge": edge,
    "fft": fft,
    "ssim": negative_ssim,
    "perceptual": perceptual,
    "mean": mean,
}
"""Losses by name, as in ``--model.loss``."""
