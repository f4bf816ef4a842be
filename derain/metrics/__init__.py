"""Metrics of derained images and videos: PSNR, SSIM, LPIPS, metrics of pyiqa, flicker and warping error.

Importing this package imports neither torch nor torchmetrics; using `ImageQuality` does.
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
