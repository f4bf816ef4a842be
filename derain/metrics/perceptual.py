"""Perceptual metrics: LPIPS, and metrics of pyiqa with and without a clean image.

Importing this module does not import torch; creating a metric does.
"""

import importlib.util
import math
import sys
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from derain.backbones import BACKBONES
from derain.errors import DerainError
from derain.images import Pixels, write_image
from derain.ranges import check_range

from .full_reference import check_values

UNCOMPUTABLE = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)
"""Exceptions that pyiqa's metrics raise for images that they cannot score."""


class Lpips:
    """LPIPS distance to the clean image: 0 for equal images, lower is better.

    torchmetrics computes it on whole images in float32, scaled to [-1, 1], on the CPU.

    Args:
        net: ``alex``, with which deraining papers report LPIPS, or ``vgg``.
        fetch: Whether to download weights that are not in the cache of ``torch.hub``, with a message on standard error.

    Raises:
        DerainError: If torchvision is not installed, or the weights are missing, cannot be downloaded, or are damaged.

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
            derained: ``(h, w, 3)``, RGB; uint8, or floating point in [0, 1]. Values may exceed this range by up to 1,
                and are clipped.
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
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
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


class UnknownMetricError(DerainError):
    """pyiqa has no metric of the requested name."""


class PyiqaMetric:
    """Metric of pyiqa (an optional extra) of one image, on the CPU.

    Args:
        name: Name of the metric in pyiqa, such as ``niqe`` or ``musiq`` (no-reference) or ``dists`` (full-reference).
            pyiqa downloads missing weights to ``hub/pyiqa`` in torch's cache, with a line on standard error.
        full_reference: Whether the metric compares with a clean image.

    Attributes:
        lower_better: Whether lower scores are better.

    Raises:
        UnknownMetricError: If pyiqa has no such metric.
        DerainError: If pyiqa is missing, or cannot load the weights.
    """

    def __init__(self, name: str, *, full_reference: bool = False) -> None:
        self.name, self.full_reference = name, full_reference
        self.metric = _create(name, "FR" if full_reference else "NR")
        self.lower_better = bool(getattr(self.metric, "lower_better", False))

    def __call__(self, derained: NDArray[Any], clean: NDArray[Any] | None = None) -> float:
        """Return the score of an image.

        Args:
            derained: ``(h, w, 3)``, RGB; uint8, or floating point in [0, 1]. Values may exceed this range by up to 1,
                and are clipped.
            clean: Same shape and range, for a full-reference metric; no-reference metrics ignore it.

        Raises:
            DerainError: If the metric needs a clean image and there is none, values are out of range, or pyiqa cannot
                score the image, such as one that is too small.
        """
        import torch

        if self.full_reference and clean is None:
            raise DerainError(f"{self.name} needs a clean image")
        images = [derained, clean] if self.full_reference and clean is not None else [derained]
        for image in images:
            if image.dtype.kind == "f":
                check_range(image, "image", 1.0)
        try:
            with torch.inference_mode(), torch.autocast("cpu", enabled=False):
                score = float(self.metric(*(_tensor(image) for image in images)))
        except UNCOMPUTABLE as error:
            raise DerainError(f"pyiqa cannot compute {self.name}: {_first_line(error)}") from error
        if not math.isfinite(score):
            raise DerainError(f"{self.name} of the image is {score}")
        return score


class FrechetDistance:
    """Fréchet distance between the features of all derained and all clean images, computed by pyiqa on the CPU.

    Args:
        name: ``fid`` (Inception features, Heusel et al., NeurIPS 2017, with the resizing of Parmar et al., CVPR 2022),
            ``sfid`` or ``fid_dinov2``.

    Attributes:
        names: Names of the available distances.
        min_images: Number of images below which a warning says that the distance is biased.

    Raises:
        UnknownMetricError: If pyiqa has no such metric.
        DerainError: If pyiqa is missing, or cannot load the weights.
    """

    names: ClassVar[tuple[str, ...]] = ("fid", "sfid", "fid_dinov2")
    min_images: ClassVar[int] = 1000

    def __init__(self, name: str = "fid") -> None:
        self.name = name
        self.metric = _create(name, "NR")  # pyiqa lists these metrics, which compare folders, as no-reference ones

    def __call__(self, pairs: Iterable[tuple[Pixels, Pixels]]) -> float:
        """Return the distance, and warn if there are so few images that it is biased.

        Args:
            pairs: Pairs of a derained and a clean image, ``(h, w, 3)`` in 0 to 255 each; at least two.

        Raises:
            DerainError: If there are fewer than two pairs, the distance is not finite, or pyiqa cannot compute it, for
                example since the square root of a covariance is not real.
        """
        with tempfile.TemporaryDirectory(prefix="derain-") as parent:
            folders = [Path(parent, kind) for kind in ("derained", "clean")]
            for folder in folders:
                folder.mkdir()
            count = 0
            for count, pair in enumerate(pairs, 1):
                for folder, image in zip(folders, pair, strict=True):
                    write_image(folder / f"{count}.png", image)
            if count < 2:
                raise DerainError(f"{self.name}: pairs of images: {count}; expected at least 2")
            if count < self.min_images:
                print(
                    f"{self.name}: {count} images are few: the distance is biased; compare it only with that of other "
                    f"methods on the same images, or use at least {self.min_images}",
                    file=sys.stderr,
                )
            try:
                with redirect_stdout(sys.stderr):
                    distance = float(self.metric(*map(str, folders), num_workers=0, verbose=False))
            except UNCOMPUTABLE as error:
                raise DerainError(f"pyiqa cannot compute {self.name}: {_first_line(error)}") from error
        if not math.isfinite(distance):
            raise DerainError(f"{self.name} is {distance}")
        return distance


def _create(name: str, mode: Literal["FR", "NR"]) -> Any:
    """Return a metric of pyiqa.

    Raises:
        UnknownMetricError: If pyiqa has no such metric.
        DerainError: If pyiqa is missing, or cannot load the weights.
    """
    if importlib.util.find_spec("pyiqa") is None:
        raise DerainError(f"{name} needs pyiqa; install it with: pip install 'derain[iqa]'")
    import pyiqa

    known = pyiqa.list_models(metric_mode=mode)
    if name not in known:
        kind = "full-reference" if mode == "FR" else "no-reference"
        raise UnknownMetricError(f"pyiqa has no {kind} metric '{name}'; choose from {', '.join(known)}")
    try:
        with redirect_stdout(sys.stderr):
            return pyiqa.create_metric(name, device="cpu")
    except (OSError, RuntimeError) as error:
        raise DerainError(f"{name}: pyiqa cannot load its weights: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _tensor(image: NDArray[Any]) -> Any:
    """Return an image as ``(1, 3, h, w)`` tensor, float32, clipped to [0, 1]."""
    import torch

    values = image.astype(np.float32)
    if image.dtype == np.uint8:
        values = values / np.float32(255)
    return torch.from_numpy(np.ascontiguousarray(np.clip(values, 0, 1).transpose(2, 0, 1)))[None]
