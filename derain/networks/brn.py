"""BRN: two recurrent branches, for the rain and for the image, that read each other's hidden state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from derain.networks.base import Names, Network, count_numbered
from derain.networks.iterations import check_iterations
from derain.nn.recurrent import STAGE_NAMES, RecurrentStage, State, conv3x3


class BRN(Network):
    """Bilateral recurrent network: in each iteration, estimate the rain, then the image without it.

    Each of the two branches is a stage of PReNet whose LSTM also reads the hidden state of the other branch. The
    network predicts the image itself, not a residual. All iterations share their weights: 375,526 parameters by
    default. The authors' files have 36,992 more, in two residual blocks of the rain branch that their network does
    not apply.

    Args:
        iterations: Number of iterations, 1 to 100; 8 in the TIP paper, 4 in the ICASSP paper.
        channels: Channels of the features.
        rain_blocks: Residual blocks of the rain branch.
        image_blocks: Residual blocks of the image branch.

    Outputs:
        ``derained`` and ``rain`` of the last iteration; ``derained1``, ``rain1``, ``derained2``, … of the earlier
        ones. The target of the rain is the rainy minus the clean image.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same, not clamped; any ``h, w >= 1``.

    Raises:
        DerainError: If ``iterations`` is not an integer from 1 to 100.

    References:
        Ren et al., Single Image Deraining Using Bilateral Recurrent Network, IEEE TIP 2020, Figure 3. Shang et al.,
        Bilateral Recursive Network for Single Image Deraining, ICASSP 2020: the same network with 4 iterations and
        a loss of all iterations.

    Example:
        >>> network = BRN(iterations=2)
        >>> sum(parameter.numel() for parameter in network.parameters())
        375526
        >>> list(network.outputs(torch.rand(1, 3, 5, 7)))
        ['derained', 'rain', 'derained1', 'rain1']
    """

    bytes_per_pixel: int = 2560
    signature: ClassVar[str] = "conv_i_r.0.weight"
    published_options: ClassVar[frozenset[str]] = frozenset({"iterations"})
    published_names: ClassVar[Names] = (
        (r"^module\.", ""),
        (r"res_conv[45]_r\..*", None),
        (r"^(\w+)_r\.", r"rain_branch.\1."),
        (r"^(?!rain_branch)", "image_branch."),
        (r"_branch\.conv\.0\.", "_tail."),
        *STAGE_NAMES,
    )

    def __init__(self, iterations: int = 8, channels: int = 32, rain_blocks: int = 3, image_blocks: int = 5) -> None:
        super().__init__()
        check_iterations(iterations)
        self.iterations = iterations
        self.rain_branch = RecurrentStage(6, channels, rain_blocks, memories=2)
        self.rain_tail = conv3x3(channels, 3)
        self.image_branch = RecurrentStage(9, channels, image_blocks, memories=2)
        self.image_tail = conv3x3(channels, 3)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return image and rain of all iterations, beginning with those of the last iteration."""
        rain, derained = image, image
        rain_state: State | None = None
        image_state: State | None = None
        earlier: dict[str, Tensor] = {}
        for iteration in range(self.iterations):
            if iteration:
                earlier |= {f"derained{iteration}": derained, f"rain{iteration}": rain}
            image_memory = None if image_state is None else image_state.hidden
            inputs = torch.cat((image, rain), dim=1)
            features, rain_state = self.rain_branch(inputs, rain_state, (image_memory,))
            rain = self.rain_tail(features)
            inputs = torch.cat((image, derained, rain), dim=1)
            features, image_state = self.image_branch(inputs, image_state, (rain_state.hidden,))
            derained = self.image_tail(features)
        return {"derained": derained, "rain": rain, **earlier}

    def targets(
        self, rainy: Float[Tensor, "b 3 h w"], clean: Float[Tensor, "b 3 h w"], outputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the clean image for ``derained…``, and the rainy minus the clean image for ``rain…``."""
        rain = rainy - clean
        return {name: rain if name.startswith("rain") else clean for name in outputs}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return ``channels`` and ``image_blocks``; None for other networks, among them BRN-RX, BRN-XR and CRN.

        The number of used ``rain_blocks`` is unknown, since the authors' files also contain unused blocks.
        """
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        if cls.signature not in state:
            return None
        channels = state[cls.signature].shape[0]
        input_gates = (state.get("conv_i.0.weight"), state.get("conv_i_r.0.weight"))
        if any(weight is None or weight.shape[1] != 3 * channels for weight in input_gates):
            return None  # a variant in which a branch does not read the hidden state of the other branch
        return {"channels": channels, "image_blocks": count_numbered(state, r"res_conv(\d+)\.") - 1}

    @classmethod
    def stated_options(cls, path: Path) -> dict[str, Any]:
        """Return ``iterations`` if the file is in a folder of the authors' repositories, else nothing.

        The folders are ``SET/BRN`` (TIP, 8 iterations), ``BRN/R100H`` and ``BRN/R100L`` (ICASSP, 4).

        Example:
            >>> BRN.stated_options(Path("logs/Rain100L/BRN/net_latest.pth"))
            {'iterations': 8}
            >>> BRN.stated_options(Path("logs/BRN/R100L/net_latest.pth"))
            {'iterations': 4}
        """
        folder = path.resolve().parent
        if folder.name == "BRN":
            return {"iterations": 8}
        if folder.parent.name == "BRN" and folder.name in {"R100H", "R100L"}:
            return {"iterations": 4}
        return {}
