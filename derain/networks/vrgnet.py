"""VRGNet's deraining network: PReNet whose last iteration returns a distribution of the image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from derain.networks.base import Names, Network, count_numbered
from derain.networks.iterations import check_iterations
from derain.nn.recurrent import STAGE_NAMES, RecurrentStage, State, conv3x3


class VRGNet(Network):
    """Deraining network of VRGNet ("BNet"): PReNet with a Gaussian posterior of the clean image.

    The network is PReNet, except that the last iteration has an output convolution of its own, which returns mean and
    log-variance. The authors train it together with a rain generator, which derain does not have. 170,697 parameters by
    default.

    Args:
        iterations: Number of iterations, 2 to 100; 6 in the paper.
        channels: Number of channels of the features.
        blocks: Number of residual blocks.

    Outputs:
        ``derained``, the mean of the posterior; ``log_variance`` ``(b, 3, h, w)``, the logarithm of its variance, which
        a supervised loss does not use; ``derained1``, ``derained2``, … of the earlier iterations.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same, not clamped; any ``h, w >= 1``.

    Raises:
        DerainError: If ``iterations`` is not an integer from 2 to 100.

    References:
        Wang et al., From Rain Generation to Rain Removal, CVPR 2021. PReNet: Ren et al., CVPR 2019.

    Example:
        >>> network = VRGNet()
        >>> sum(parameter.numel() for parameter in network.parameters())
        170697
        >>> network.outputs(torch.rand(1, 3, 5, 7))["log_variance"].shape
        torch.Size([1, 3, 5, 7])
    """

    bytes_per_pixel: int = 2048
    signature: ClassVar[str] = "derainet.convfinal.0.weight"
    published_options: ClassVar[frozenset[str]] = frozenset({"iterations"})
    published_names: ClassVar[Names] = (
        (r"^derainet\.conv\.0\.", "tail."),
        (r"^derainet\.convfinal\.0\.", "final_tail."),
        (r"^derainet\.", "stage."),
        *STAGE_NAMES,
    )

    def __init__(self, iterations: int = 6, channels: int = 32, blocks: int = 5) -> None:
        super().__init__()
        check_iterations(iterations, minimum=2)
        self.iterations = iterations
        self.stage = RecurrentStage(6, channels, blocks)
        self.tail = conv3x3(channels, 3)
        self.final_tail = conv3x3(channels, 6)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return mean and log-variance from the last iteration, and the images of the earlier iterations."""
        derained = image
        state: State | None = None
        earlier: dict[str, Tensor] = {}
        for iteration in range(1, self.iterations):
            features, state = self.stage(torch.cat((image, derained), dim=1), state)
            derained = self.tail(features) + image
            earlier[f"derained{iteration}"] = derained
        features, _ = self.stage(torch.cat((image, derained), dim=1), state)
        output = self.final_tail(features)
        return {"derained": output[:, :3] + image, "log_variance": output[:, 3:], **earlier}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return ``channels`` and ``blocks``; None for another network."""
        if cls.signature not in state:
            return None
        channels = state[cls.signature].shape[1]
        blocks = count_numbered(state, r"derainet\.res_conv(\d+)\.") - 1  # numbered from 1
        return {"channels": channels, "blocks": blocks}

    @classmethod
    def stated_options(cls, path: Path) -> dict[str, Any]:
        """Return 6 iterations for files with the authors' name, ``DerainNet_state_N.pt``; nothing for others."""
        return {"iterations": 6} if path.name.startswith("DerainNet_state_") else {}
