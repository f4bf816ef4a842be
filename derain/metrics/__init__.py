"""Metrics of derained images: PSNR and SSIM by named protocols, LPIPS, no-reference quality.

Importing this package does not import torch or torchmetrics, which takes seconds; the first use of `ImageQuality` does.
"""

from typing import TYPE_CHECKING, Any

from .flicker import flicker
from .full_reference import Scores, bootstrap_interval, psnr_ssim
from .protocols import PROTOCOLS, Protocol, resolve

if TYPE_CHECKING:
    from .image_quality import ImageQuality

__all__ = ["PROTOCOLS", "ImageQuality", "Protocol", "Scores", "bootstrap_interval", "flicker", "psnr_ssim", "resolve"]


def __getattr__(name: str) -> Any:
    if name == "ImageQuality":
        from .image_quality import ImageQuality

        return ImageQuality
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
