"""RESCAN: stages of dilated recurrent layers with squeeze-and-excitation.

Li et al., Recurrent Squeeze-and-Excitation Context Aggregation Net for Single Image Deraining, ECCV 2018.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.networks.base import Names, Network, count_numbered
from derain.networks.iterations import check_iterations
from derain.nn.conv_gru import ConvGRU

SLOPE = 0.2
"""Negative slope of the LeakyReLUs."""


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation: channels weighted by a function of their means over the image, then LeakyReLU.

    Args:
        channels: Number of channels.
        hidden: Width of the hidden layer.

    Shape:
        ``(b, channels, h, w)`` → same.

    References:
        RESCAN, section 4.1 and Figure 3; Hu et al., CVPR 2018.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Weight the channels, and apply the LeakyReLU."""
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return F.leaky_relu_(x * weights[..., None, None], SLOPE)

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of means in thop, one per value and mean, and 0."""
        return output.numel() + output.shape[0] * output.shape[1], 0


class RecurrentLayer(nn.Module):
    """Convolutional GRU whose new state is weighted by squeeze-and-excitation.

    Args:
        inputs: Channels of the input.
        channels: Channels of the state.
        dilation: Dilation of the convolutions of the input.
        hidden: Width of the hidden layer of squeeze-and-excitation.

    Shape:
        ``(b, inputs, h, w)`` and, after the first stage, the state ``(b, channels, h, w)`` → ``(b, channels, h, w)``.
    """

    def __init__(self, inputs: int, channels: int, dilation: int, hidden: int) -> None:
        super().__init__()
        self.gru = ConvGRU(inputs, channels, dilation)
        self.excitation = SqueezeExcitation(channels, hidden)

    def forward(self, x: Float[Tensor, "b i h w"], state: Float[Tensor, "b c h w"] | None) -> Float[Tensor, "b c h w"]:
        """Return the new state, which is also the output; ``state`` is None in the first stage."""
        return cast(Tensor, self.excitation(self.gru(x, state)))


class RESCAN(Network):
    """Recurrent squeeze-and-excitation context aggregation network (149,823 parameters by default).

    From the image that the previous stage restored, each stage estimates all rain of the rainy image ("full
    prediction"). The layers are convolutional GRUs with dilations 1, 1, 2, 4, 8, …, whose states pass from stage to
    stage.

    Outputs: ``derained``, the image of the last stage, and ``stage1``, ``stage2``, …, the images of the earlier stages.
    The published loss is the sum over the stages of the mean squared error of the rain, which equals that of the image.

    Args:
        channels: Number of channels of the features.
        layers: Number of recurrent layers: the paper's depth minus 2.
        iterations: Number of stages, 1 to 100.
        squeeze: Width of the hidden layer of squeeze-and-excitation.

    Raises:
        DerainError: If ``iterations`` is not an integer from 1 to 100.

    References:
        RESCAN, sections 4.1 and 4.2: the variant with ConvGRU and full prediction.

    Example:
        >>> sum(parameter.numel() for parameter in RESCAN().parameters())
        149823
    """

    bgr: ClassVar[bool] = True
    bytes_per_pixel: int = 1792
    signature: ClassVar[str] = "rnns.0.conv_xz.weight"
    published_names: ClassVar[Names] = (
        (r"^rnns\.(\d+)\.conv_", r"layers.\1.gru."),
        (r"^rnns\.(\d+)\.se\.", r"layers.\1.excitation."),
        (r"gru\.([xh])z\.", r"gru.update_\1."),
        (r"gru\.([xh])r\.", r"gru.reset_\1."),
        (r"gru\.([xh])n\.", r"gru.candidate_\1."),
        (r"_x\.", "_input."),
        (r"_h\.", "_state."),
        (r"^dec\.0\.", "decoder.features."),
        (r"^dec\.1\.", "decoder.excitation."),
        (r"^dec\.3\.", "decoder.rain."),
        (r"\.fc\.0\.", ".squeeze."),
        (r"\.fc\.2\.", ".excite."),
    )
    published_options: ClassVar[frozenset[str]] = frozenset({"iterations"})

    def __init__(self, channels: int = 24, layers: int = 5, iterations: int = 4, squeeze: int = 6) -> None:
        super().__init__()
        check_iterations(iterations)
        self.iterations = iterations
        first = RecurrentLayer(3, channels, 1, squeeze)
        dilated = (RecurrentLayer(channels, channels, 2**index, squeeze) for index in range(layers - 1))
        self.layers = nn.ModuleList([first, *dilated])
        self.decoder = nn.ModuleDict(
            {
                "features": nn.Conv2d(channels, channels, 3, padding=1),
                "excitation": SqueezeExcitation(channels, squeeze),
                "rain": nn.Conv2d(channels, 3, 1),
            }
        )

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return the images of all stages: first the last one, then the earlier ones in order."""
        states: list[Tensor | None] = [None] * len(self.layers)
        derained, images = image, []
        for _ in range(self.iterations):
            x = derained
            for index, layer in enumerate(self.layers):
                x = states[index] = layer(x, states[index])
            for layer in self.decoder.values():
                x = layer(x)
            derained = image - x
            images.append(derained)
        earlier = {f"stage{number}": earlier_image for number, earlier_image in enumerate(images[:-1], 1)}
        return {"derained": images[-1], **earlier}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments but ``iterations``; None for another network."""
        if cls.signature not in state:
            return None
        return {
            "channels": len(state[cls.signature]),
            "layers": count_numbered(state, r"rnns\.(\d+)\."),
            "squeeze": len(state["dec.1.fc.0.weight"]),
        }
