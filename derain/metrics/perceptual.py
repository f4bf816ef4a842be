"""Perceptual metrics of one image: LPIPS, and no-reference metrics of pyiqa.

Importing this module does not import torch; creating a metric does.
"""

import importlib.util
import sys
from contextlib import redirect_stdout
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from derain.backbones import BACKBONES
from derain.errors import DerainError
from derain.ranges import check_range

from .full_reference import check_values


class Lpips:
    """LPIPS distance to the clean image: 0 for equal images, lower is better.

    Computed by torchmetrics on whole images in float32, scaled to [-1, 1], on the CPU.

    Args:
        net: ``alex``, which deraining papers report, or ``vgg``.
        fetch: Whether to download weights that are not in the cache of ``torch.hub``, with a message on standard error.

    Raises:
        DerainError: If torchvision or the weights are missing, cannot be downloaded, or are damaged.

    References:
        Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018.
    """

    def __init__(self, net: Literal["alex", "vgg"] = "alex", *, fetch: bool = False) -> None:
        self.net, self.backbone = net, BACKBONES[net]
        with self.backbone.loading("LPIPS", instead="" if fetch else f"--lpips {net}"):
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.network = LearnedPerceptualImagePatchSimilarity(net_type=net, reduction="none").net

    def __call__(self, derained: NDArray[Any], clean: NDArray[Any]) -> float:
        """Return the distance between two images.

        Args:
            derained: ``(h, w, 3)``, RGB; uint8, or floating point in [0, 1], which values may leave by up to 1: they
                are clipped.
            clean: Same shape; uint8, or floating point in [0, 1].

        Raises:
            DerainError: If the images are too small for the network, or values are out of range.
        """
        import torch

        check_values(derained, clean)
        if min(clean.shape[:2]) < self.backbone.min_side:
            raise DerainError(
                f"image of {clean.shape[1]}x{clean.shape[0]} pixels: LPIPS needs at least "
                f"{self.backbone.min_side}x{self.backbone.min_side}; add --lpips none"
            )
        with torch.inference_mode():
            return float(self.network(_tensor(derained) * 2 - 1, _tensor(clean) * 2 - 1))


def available_lpips(choice: str) -> Lpips | None:
    """Return the LPIPS metric that ``--lpips`` selects, or None if it is ``none`` or not available.

    A metric that is not available is reported on standard error.

    Args:
        choice: ``auto`` for AlexNet if its weights are in the cache, ``alex`` or ``vgg`` to download missing weights,
            or ``none``.
    """
    if choice == "none":
        return None
    net: Literal["alex", "vgg"] = "vgg" if choice == "vgg" else "alex"
    backbone = BACKBONES[net]
    if choice == "auto" and not backbone.file.is_file():
        message = f"no {backbone.name} weights in the cache; --lpips alex downloads {backbone.megabytes} MB"
    else:
        try:
            return Lpips(net, fetch=True)
        except DerainError as error:
            message = str(error)
    print(f"LPIPS skipped: {message}", file=sys.stderr)
    return None


class NoReference:
    """No-reference metric of pyiqa (an optional extra), such as niqe or musiq, on the CPU.

    Args:
        name: Name of the metric in pyiqa, which may download its weights.

    Attributes:
        lower_better: Whether lower scores are better.

    Raises:
        DerainError: If pyiqa is missing, has no such metric, or cannot download its weights.
    """

    def __init__(self, name: str) -> None:
        if importlib.util.find_spec("pyiqa") is None:
            raise DerainError(f"{name} needs pyiqa; install it with: pip install 'derain[iqa]'")
        import pyiqa

        known = pyiqa.list_models(metric_mode="NR")
        if name not in known:
            raise DerainError(f"pyiqa has no no-reference metric '{name}'; choose from {', '.join(known)}")
        try:
            with redirect_stdout(sys.stderr):
                self.metric = pyiqa.create_metric(name, device="cpu")
        except (OSError, RuntimeError) as error:
            raise DerainError(
                f"{name}: pyiqa cannot download its weights: {str(error).partition(chr(10))[0]}"
            ) from error
        self.name = name
        self.lower_better = bool(getattr(self.metric, "lower_better", False))

    def __call__(self, image: NDArray[Any]) -> float:
        """Return the score of an image.

        Args:
            image: ``(h, w, 3)``, RGB; uint8, or floating point in [0, 1], which values may leave by up to 1: they are
                clipped.

        Raises:
            DerainError: If values are out of range.
        """
        import torch

        if image.dtype.kind == "f":
            check_range(image, "image", 1.0)
        with torch.inference_mode():
            return float(self.metric(_tensor(image)))


def _tensor(image: NDArray[Any]) -> Any:
    """Return an image as ``(1, 3, h, w)`` tensor, float32, clipped to [0, 1]."""
    import torch

    values = image.astype(np.float32)
    if image.dtype == np.uint8:
        values = values / np.float32(255)
    return torch.from_numpy(np.ascontiguousarray(np.clip(values, 0, 1).transpose(2, 0, 1)))[None]
