"""Base class of the networks: outputs, padding, channel order, and translation of the authors' weights."""

import inspect
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.nn.graphs import exporting
from derain.nn.padding import pad_to_multiple

log = logging.getLogger("derain")

Names = Sequence[tuple[str, str | None]]
"""Regular expressions of the authors' tensor names, each with its replacement; None drops an unused tensor."""

COUNTER = "num_batches_tracked"
"""Name of the counter of a batch normalisation layer: the only integer tensor in state dicts of derain's networks."""


class Network(nn.Module, ABC):
    """A network that restores images. It may have further outputs, which its loss can use.

    In a subclass, all arguments of ``__init__`` have defaults, and are scalars, strings, lists or dictionaries. Layers
    may have a method ``extra_macs``; see `derain.methods.base.DerainModule.pass_once`.

    Attributes:
        size_multiple: Height and width are padded to multiples of this number; see `pad`.
        bgr: Whether `restore` expects the channel order blue, green, red.
        bytes_per_pixel: Memory that ``forward`` needs at inference, in bytes per pixel of the image, in float32.
        tile_multiple: Tile sides should be multiples of this number of pixels.
        signature: Name of a tensor by which `options_of` recognises the authors' weights of this network.
        published_names: Replacements that turn the authors' tensor names into derain's, applied in order.
        published_options: Arguments that may differ between the authors' files although neither names nor shapes of
            their tensors show it; see `assume`.
    """

    size_multiple: int = 1
    bgr: ClassVar[bool] = False
    bytes_per_pixel: int = 4096
    tile_multiple: ClassVar[int] = 32
    signature: ClassVar[str]
    published_names: ClassVar[Names] = ()
    published_options: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return the outputs by name, ``derained`` first.

        ``derained`` is an image in [0, 1], not clamped. Outputs ``(b, 3, _, _)`` have the channel order of the network.

        Args:
            image: Rainy images in [0, 1], padded by `pad`, in the channel order of the network.
        """

    def targets(
        self, rainy: Float[Tensor, "b 3 h w"], clean: Float[Tensor, "b 3 h w"], outputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the training targets by output name; by default the clean image for every output.

        Args:
            rainy: Rainy images in [0, 1], RGB.
            clean: Clean images in [0, 1], RGB.
            outputs: Outputs for the rainy images, from the method `outputs`.
        """
        return dict.fromkeys(outputs, clean)

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restore RGB images in [0, 1] of any size; the result is not clamped."""
        return self.outputs(rainy)["derained"]

    def pad(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Return images padded at the bottom and the right to multiples of ``size_multiple``, see `pad_to_multiple`."""
        return pad_to_multiple(image, self.size_multiple) if self.size_multiple > 1 else image

    def outputs(self, rainy: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return all outputs for RGB images in [0, 1] of any size; in an exported graph only ``derained``.

        Outputs of the padded size are cropped to the size of the input. Outputs with three channels are RGB.
        """
        height, width = rainy.shape[2:]
        image = rainy.flip(1) if self.bgr else rainy
        padded = self.pad(image)
        outputs = {}
        for name, output in self.restore(padded).items():
            if name != "derained" and exporting():  # a graph for any image size cannot compare sizes, as done below
                continue
            if name == "derained" or output.shape[2:] == padded.shape[2:]:
                output = output[..., :height, :width]
            outputs[name] = output.flip(1) if self.bgr and output.dim() == 4 and output.shape[1] == 3 else output
        return outputs

    # The authors' weights.

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the arguments of ``__init__`` that names and shapes of the authors' tensors determine.

        Args:
            state: Tensors by the authors' names.

        Returns:
            The arguments; None if the tensors belong to another network.
        """
        return {} if cls.signature in state else None

    @classmethod
    def stated_options(cls, path: Path) -> dict[str, Any]:
        """Return the ``published_options`` that the name or folder of an authors' file determines; none by default."""
        return {}

    @classmethod
    def assume(cls, path: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``published_options`` for an authors' file, and warn of those that are assumed.

        The value of an option is that of ``given``, else that of `stated_options`, else the default of ``__init__``,
        which is an assumption.

        Args:
            path: The file; None if unknown.
            given: Options that the user gave as ``FILE:name=value``.
        """
        stated = {} if path is None else cls.stated_options(path)
        arguments = inspect.signature(cls).parameters
        missing = sorted(cls.published_options - stated.keys() - given.keys())
        assumed = {name: arguments[name].default for name in missing}
        if assumed:
            values = ",".join(f"{name}={option_text(value)}" for name, value in assumed.items())
            log.warning(
                "%s: the file does not record %s; assuming FILE:%s; to use other values, append them in the same form",
                path or "weights",
                ", ".join(missing),
                values,
            )
        return {**assumed, **stated, **given}

    @classmethod
    def translate(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the authors' tensors by derain's names, without unused ones.

        Raises:
            DerainError: If the file has different values for a parameter that is shared here, or a tensor other than a
                `COUNTER` is not of a floating-point type.
        """
        translated: dict[str, Tensor] = {}
        for published, tensor in state.items():
            name = translate_name(published, cls.published_names)
            if name is None:
                continue
            if not (tensor.is_floating_point() or name.endswith(COUNTER)):
                raise DerainError(f"{published}: is of type {tensor.dtype}; expected floating-point numbers")
            if name in translated and not torch.equal(translated[name], tensor):
                raise DerainError(
                    f"{published}: differs from another tensor of the shared parameter {name}; expected equal tensors"
                )
            translated[name] = tensor
        return translated


def translate_name(published: str, names: Names) -> str | None:
    r"""Return derain's name for an authors' tensor, or None if it is unused.

    Args:
        published: The authors' name.
        names: Replacements in order. A pattern with None drops the names that it matches completely.

    Example:
        >>> names = [(r"unused\..*", None), (r"^conv(\d)\.", r"stage\1.conv.")]
        >>> translate_name("conv2.weight", names), translate_name("unused.bias", names)
        ('stage2.conv.weight', None)
    """
    name = published
    for pattern, replacement in names:
        if replacement is None:
            if re.fullmatch(pattern, name):
                return None
        else:
            name = re.sub(pattern, replacement, name)
    return name


def option_text(value: Any) -> str:
    """Return the value of an option as in ``FILE:name=value``.

    Example:
        >>> option_text((8, 4, 2)), option_text(6)
        ('8-4-2', '6')
    """
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def count_numbered(state: Mapping[str, Tensor], pattern: str) -> int:
    r"""Return the length of a numbered list of modules in a state dict: the largest index plus one, or 0 for none.

    Args:
        state: Tensors by name.
        pattern: Regular expression for the start of the names, with the index as its group.

    Example:
        >>> count_numbered({"body.0.weight": torch.zeros(1), "body.1.weight": torch.zeros(1)}, r"body\.(\d+)\.")
        2
    """
    matches = (re.match(pattern, name) for name in state)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)
