"""Networks of other projects, which spandrel recognises by their tensors."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from derain.errors import DerainError
from derain.methods.base import DerainModule
from derain.methods.graph import Graph

MIN_SIDE = 16
"""Sides below this number of pixels are padded to it: some networks pad by reflection, which needs enough pixels."""


class SpandrelModule(DerainModule):
    """Network of another project, loaded by spandrel; it can restore images, but cannot be trained or exported.

    Args:
        descriptor: ``ImageModelDescriptor`` of spandrel: the network, its architecture and the sizes that it accepts.
    """

    bytes_per_pixel: int = 12_000  # an assumption; the networks were not measured

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.network = descriptor.model

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restore images in [0, 1] of any size, one at a time: spandrel's descriptors accept single images."""
        height, width = rainy.shape[2:]
        right, below = max(0, MIN_SIDE - width), max(0, MIN_SIDE - height)
        padded = F.pad(rainy, (0, right, 0, below), "replicate") if right or below else rainy
        derained = torch.cat([self.descriptor(image[None]) for image in padded])
        return derained[:, :, :height, :width]

    def pass_once(self, rainy: Float[Tensor, "b 3 h w"]) -> Any:
        """Run the network without the descriptor, on images padded to a size that the network accepts."""
        right, below = self.descriptor.size_requirements.get_padding(rainy.shape[3], rainy.shape[2])
        return self.network(F.pad(rainy, (0, right, 0, below), "replicate"))

    def metadata(self) -> dict[str, Any]:
        """Return the metadata with the name of the architecture."""
        return super().metadata() | {"architecture": self.descriptor.architecture.name}

    def export_graph(self) -> Graph:
        """Refuse the export.

        Raises:
            DerainError: Always.
        """
        name = self.descriptor.architecture.name
        raise DerainError(f"{name}: networks of spandrel cannot be exported; expected weights of a method of derain")


def recognise(path: Path, state: Mapping[str, Tensor]) -> SpandrelModule | None:
    """Build the network that spandrel recognises in a state dict.

    Args:
        path: The file, for messages.
        state: The tensors of the file.

    Returns:
        The network in eval mode; None if spandrel is not installed or does not recognise the tensors.

    Raises:
        DerainError: If the tensors do not fit the network, or the network does not map an RGB image to one of the same
            size.
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
        raise DerainError(
            f"{path}: resembles a network that spandrel knows, but does not fit it ({reason}); use another file"
        ) from error
    name, scale = descriptor.architecture.name, descriptor.scale
    channels = descriptor.input_channels, descriptor.output_channels
    if not isinstance(descriptor, spandrel.ImageModelDescriptor) or scale != 1 or channels != (3, 3):
        purpose = descriptor.purpose.lower() if scale == 1 else f"enlarges {scale} times"
        raise DerainError(
            f"{path}: is {name} ({purpose}, {channels[0]} channels to {channels[1]}); expected a network that maps an "
            "RGB image to one of the same size; use another file"
        )
    return SpandrelModule(descriptor).eval()


def install_hint() -> str:
    """Return a hint to install spandrel that ends an error message; empty if spandrel is installed."""
    if importlib.util.find_spec("spandrel") is not None:
        return ""
    return "; to load networks of other projects: pip install 'derain[others]'"
