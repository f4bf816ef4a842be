"""Perceptual quality of one image: LPIPS against the clean one, and no-reference quality through pyiqa.

Importing this module does not import torch; making a metric does.
"""

import importlib.util
import os
import pickle
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from derain.errors import DerainError
from derain.ranges import check_range

from .full_reference import check_values


class Backbone(NamedTuple):
    """A network that LPIPS compares features of, and torchvision's weights of it.

    Attributes:
        name: The network.
        url: Where torchvision gets the weights.
        megabytes: Size of that file.
        least: Shortest side of an image that the network can take, in pixels.
    """

    name: str
    url: str
    megabytes: int
    least: int

    @property
    def file(self) -> Path:
        """The weights in the cache of ``torch.hub``."""
        cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        home = Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser()
        return home / "hub" / "checkpoints" / self.url.rpartition("/")[2]


BACKBONES = {
    "alex": Backbone("AlexNet", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", 233, 31),
    "vgg": Backbone("VGG16", "https://download.pytorch.org/models/vgg16-397923af.pth", 528, 16),
}


class Lpips:
    """LPIPS distance of an image to the clean one; 0 for equal images, lower is better.

    Computed by torchmetrics on whole images in float32 and [-1, 1], on the CPU.

    Args:
        net: ``alex`` (what papers on deraining report) or ``vgg``.
        fetch: Whether weights that are not in ``torch.hub``'s cache are downloaded, after saying so.

    Raises:
        DerainError: If torchvision or the weights are missing, cannot be fetched, or are damaged.

    References:
        Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018.
    """

    def __init__(self, net: Literal["alex", "vgg"] = "alex", *, fetch: bool = False) -> None:
        self.net, self.backbone = net, BACKBONES[net]
        told = f"{self.backbone.name} weights ({self.backbone.megabytes} MB, {self.backbone.url})"
        if importlib.util.find_spec("torchvision") is None:
            raise DerainError("LPIPS needs torchvision; install it with: pip install 'derain[lpips]'")
        if not self.backbone.file.is_file():
            if not fetch:
                raise DerainError(f"LPIPS needs {told}; --lpips {net} fetches them to {self.backbone.file}")
            print(f"LPIPS: fetching {told} to {self.backbone.file}", file=sys.stderr)
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            with redirect_stdout(sys.stderr):  # torch.hub says there what it downloads
                self.network = LearnedPerceptualImagePatchSimilarity(net_type=net, reduction="none").net
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            if self.backbone.file.is_file():
                raise DerainError(f"{self.backbone.file}: damaged ({reason}); delete it and try again") from error
            raise DerainError(f"cannot fetch {told}: {reason}; put them at {self.backbone.file}") from error

    def __call__(self, derained: NDArray[Any], clean: NDArray[Any]) -> float:
        """Compares two images ``(h, w, 3)``, uint8 or floating point in [0, 1].

        Raises:
            DerainError: If the image is too small for the network, or floats are not in [0, 1].
        """
        import torch

        check_values(derained, clean)

        if min(clean.shape[:2]) < self.backbone.least:
            raise DerainError(
                f"LPIPS needs images of at least {self.backbone.least}x{self.backbone.least} pixels, "
                f"got {clean.shape[1]}x{clean.shape[0]}; add --lpips none"
            )
        with torch.inference_mode():
            return float(self.network(_tensor(derained) * 2 - 1, _tensor(clean) * 2 - 1))


def available_lpips(choice: str) -> Lpips | None:
    """Makes LPIPS if its weights are here (``auto``) or can be had; else says why not on standard error."""
    backbone = BACKBONES["vgg" if choice == "vgg" else "alex"]
    if choice == "none":
        return None
    try:
        if choice == "auto" and not backbone.file.is_file():
            raise DerainError(f"{backbone.name}'s weights are not here; --lpips alex fetches {backbone.megabytes} MB")
        return Lpips("vgg" if choice == "vgg" else "alex", fetch=True)
    except DerainError as error:
        print(f"LPIPS left out: {error}", file=sys.stderr)
        return None


class NoReference:
    """Quality of an image on its own, by a metric of pyiqa (an optional extra), such as niqe or musiq.

    Attributes:
        lower_better: Whether lower values are better.

    Args:
        name: What pyiqa calls the metric. pyiqa may fetch weights when it makes one.

    Raises:
        DerainError: If pyiqa is missing, has no such metric, or cannot get its weights.
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
            raise DerainError(f"{name}: pyiqa cannot get its weights: {str(error).partition(chr(10))[0]}") from error
        self.name = name
        self.lower_better = bool(getattr(self.metric, "lower_better", False))

    def __call__(self, image: NDArray[Any]) -> float:
        """Return the score of an image ``(h, w, 3)``, uint8 or floating point in [0, 1]."""
        import torch

        if image.dtype.kind == "f":
            check_range(image, "image", 1.0)

        with torch.inference_mode():
            return float(self.metric(_tensor(image)))


def _tensor(image: NDArray[Any]) -> Any:
    """``(1, 3, h, w)``, float32 in [0, 1]."""
    import torch

    values = image.astype(np.float32) / np.float32(255) if image.dtype == np.uint8 else image.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(np.clip(values, 0, 1).transpose(2, 0, 1)))[None]
