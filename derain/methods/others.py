"""Other people's networks: what spandrel recognises by its tensors and builds."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from derain.errors import DerainError
from derain.methods.base import DerainModule

SMALLEST = 16
"""Sides are padded to as many pixels: some networks reflect more of an image than a smaller one has."""


class OtherModule(DerainModule):
    """A network of other people, which restores images and cannot be trained here.

    Args:
        descriptor: Spandrel's ``ImageModelDescriptor``: the network, which sizes it wants and how it is called.
    """

    bytes_per_pixel: ClassVar[int] = 12_000  # not measured: there are many

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.network = descriptor.model

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restores images of any size in [0, 1], one after the other, as spandrel's models take them."""
        height, width = rainy.shape[2:]
        more = max(0, SMALLEST - width), max(0, SMALLEST - height)
        padded = F.pad(rainy, (0, more[0], 0, more[1]), "replicate") if any(more) else rainy
        derained = torch.cat([self.descriptor(image[None]) for image in padded])
        return derained[:, :, :height, :width]

    def pass_once(self, rainy: Float[Tensor, "b 3 h w"]) -> Any:
        """One pass of the network, of images as large as it wants them."""
        right, below = self.descriptor.size_requirements.get_padding(rainy.shape[3], rainy.shape[2])
        return self.network(F.pad(rainy, (0, right, 0, below), "replicate"))

    def describe(self) -> dict[str, Any]:
        """Adds whose network it is."""
        return super().describe() | {"architecture": self.descriptor.architecture.name}


def recognised(path: Path, state: Mapping[str, Tensor]) -> OtherModule | None:
    """Builds the network that a state dict is of; None if spandrel is absent or does not know it either.

    Raises:
        DerainError: If the network is none that turns an image into one of its size.
    """
    if importlib.util.find_spec("spandrel") is None:
        return None
    import spandrel

    try:
        descriptor = spandrel.MAIN_REGISTRY.load(dict(state))
    except spandrel.UnsupportedModelError:
        return None
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DerainError(f"{path}: resembles a network that spandrel knows, but does not fit it ({reason})") from error
    name, scale = descriptor.architecture.name, descriptor.scale
    channels = descriptor.input_channels, descriptor.output_channels
    if not isinstance(descriptor, spandrel.ImageModelDescriptor) or scale != 1 or channels != (3, 3):
        kind = descriptor.purpose.lower() if scale == 1 else f"enlarges {scale} times"
        raise DerainError(
            f"{path}: is {name} ({kind}, {channels[0]} channels to {channels[1]}); expected a network that restores "
            "RGB images at their own size"
        )
    return OtherModule(descriptor).eval()


def missing() -> str:
    """What to add to a refusal where spandrel might have known the file."""
    here = importlib.util.find_spec("spandrel") is not None
    return "" if here else "; for other people's networks: pip install 'derain[others]'"
