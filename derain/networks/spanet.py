"""SPANet: residual blocks gated by attention maps, which are computed by recurrent units over rows and columns.

Wang et al., Spatial Attentive Single-Image Deraining with a High Quality Real Rain Dataset, CVPR 2019.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.networks.base import Names, Network, count_numbered
from derain.nn.graphs import exporting

BLOCKS_BEFORE, BLOCKS_PER_GROUP, BLOCKS_AFTER = 3, 3, 2
"""Number of residual blocks before the first group, in each group, and after the last group (Figure 4)."""

GREY_LEVEL = 1 / 255
"""Smallest non-zero difference of 8-bit pixels, scaled to [0, 1]."""

DOUBLINGS = 16
"""Number of rounds of `scan_by_doubling`; exported graphs accept sides of up to ``2**16`` pixels."""

LARGE = 1e18
"""Replaces infinity in exported graphs. It is larger than all values of the network; its square fits into float32."""


class SPANet(Network):
    """Spatial attentive network: 276,704 parameters by default.

    The network has three residual blocks, then groups of three blocks, then two blocks. The blocks of a group share an
    attention map, which is computed from the input of the group. One module computes the maps of all groups. The
    authors also compute an attention over the four directions, but do not use it; its six tensors are not loaded.

    Outputs: ``derained``, and ``mask`` ``(b, 1, h, w)`` in [0, 1], the attention map of the first group. The target of
    ``mask`` is 1 where the rainy and the clean image differ in any channel, else 0 (section 4.3; the authors' code).
    The published loss is the mean absolute error minus the SSIM of ``derained``, plus the MSE of ``mask``.

    Args:
        dim: Number of channels of all features.
        groups: Number of groups of three blocks.

    Raises:
        DerainError: If ``dim`` or ``groups`` is less than 1.

    Example:
        >>> network = SPANet(dim=4, groups=1)
        >>> {name: tuple(output.shape) for name, output in network.outputs(torch.rand(1, 3, 5, 7)).items()}
        {'derained': (1, 3, 5, 7), 'mask': (1, 1, 5, 7)}
    """

    bgr = True
    bytes_per_pixel = 2600
    signature: ClassVar[str] = "SAM1.irnn1.left_weight.weight"
    published_names: ClassVar[Names] = (
        (r"SAM1\.attention_layer\..*", None),
        (r"^conv_in\.0\.", "head."),
        (r"^conv_out\.0\.", "tail."),
        (r"^res_block(\d+)\.group1\.", r"blocks.\1."),
        (r"^SAM1\.irnn(\d)\.(up|right|down|left)_weight\.", r"attention.recurrence\1.\2."),
        (r"^SAM1\.conv_in\.", "attention.conv1."),
        (r"^SAM1\.conv_out\.", "attention.to_map."),
        (r"^SAM1\.", "attention."),
    )

    def __init__(self, dim: int = 32, groups: int = 4) -> None:
        super().__init__()
        if dim < 1 or groups < 1:
            raise DerainError(f"dim {dim}, groups {groups}: both must be at least 1")
        blocks = BLOCKS_BEFORE + BLOCKS_PER_GROUP * groups + BLOCKS_AFTER
        self.head = _conv(3, dim)
        self.attention = SpatialAttention(dim)
        self.blocks = nn.ModuleDict({str(number): Bottleneck(dim) for number in range(1, blocks + 1)})
        self.tail = _conv(dim, 3)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained`` and ``mask``."""
        x = torch.relu(self.head(image))
        mask: Tensor | None = None
        attention: Tensor | None = None
        for index, block in enumerate(self.blocks.values()):
            group, index_in_group = divmod(index - BLOCKS_BEFORE, BLOCKS_PER_GROUP)
            if group < 0 or index >= len(self.blocks) - BLOCKS_AFTER:
                attention = None
            elif index_in_group == 0:
                attention = self.attention(x)
                mask = attention if mask is None else mask
            x = block(x, attention)
        return {"derained": self.tail(x), "mask": cast(Tensor, mask)}

    def targets(
        self, rainy: Float[Tensor, "b 3 h w"], clean: Float[Tensor, "b 3 h w"], outputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the clean image, and a mask of 1 where a channel differs by more than half a grey level, else 0."""
        differs = ((rainy - clean).abs() > GREY_LEVEL / 2).any(dim=1, keepdim=True)
        return {"derained": clean, "mask": differs.to(clean.dtype)}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments of ``__init__``; None for another network."""
        if cls.signature not in state:
            return None
        blocks = count_numbered(state, r"res_block(\d+)\.") - 1  # numbered from 1
        return {
            "dim": state["conv_in.0.weight"].shape[0],
            "groups": (blocks - BLOCKS_BEFORE - BLOCKS_AFTER) // BLOCKS_PER_GROUP,
        }


class Bottleneck(nn.Module):
    """Residual block of three convolutions without bias, the second with dilation 2; attention scales the residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = _conv(dim, dim, 1)
        self.conv2 = _conv(dim, dim, dilation=2)
        self.conv3 = _conv(dim, dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"], attention: Tensor | None) -> Float[Tensor, "b c h w"]:
        """Return ReLU(x + attention · residual); ``attention`` is ``(b, 1, h, w)`` or None for 1 everywhere."""
        residual = self.conv3(torch.relu_(self.conv2(torch.relu_(self.conv1(x)))))
        return torch.relu_(x + residual if attention is None else torch.addcmul(x, residual, attention))


class SpatialAttention(nn.Module):
    """Attention map from two layers of recurrent units, so that each value depends on the whole image ("SAM")."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = _conv(dim, dim)
        self.recurrence1 = Recurrence(dim)
        self.conv2 = _conv(4 * dim, dim)
        self.recurrence2 = Recurrence(dim)
        self.conv3 = _conv(4 * dim, dim)
        self.to_map = _conv(dim, 1, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        """Return the attention map, in [0, 1]."""
        x = self.recurrence1(self.conv1(x))
        x = self.recurrence2(self.conv2(x))
        return torch.sigmoid(self.to_map(torch.relu_(self.conv3(x))))

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of the unused attention over directions, and 0."""
        dim, half = self.conv1.in_channels, self.conv1.in_channels // 2
        return (9 * dim * half + 9 * half * half + half * 4) * output.numel(), 0


class Recurrence(nn.Module):
    """Recurrent ReLU units over rows and columns, in four directions (IRNN; Bell et al., CVPR 2016).

    In each channel, ``h[t] = ReLU(weight · h[t - 1] + bias + x[t])``, with ``h[0] = ReLU(x[0])``: the first row or
    column of a direction has no bias, as in the authors' CUDA kernel. Weights are 0.2 and biases 0 before training.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        for direction in ("up", "right", "down", "left"):
            unit = nn.Conv2d(dim, dim, 1, groups=dim)
            nn.init.constant_(unit.weight, 0.2)
            nn.init.zeros_(cast(Tensor, unit.bias))
            self.add_module(direction, unit)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c4 h w"]:
        """Return the hidden states of the directions up, right, down and left, concatenated in this order."""
        down, up = self._scan_both_ways(x, "down", "up")
        right, left = self._scan_both_ways(x.transpose(2, 3).contiguous(), "right", "left")
        return torch.cat((up, right.transpose(2, 3), down, left.transpose(2, 3)), dim=1)

    def _scan_both_ways(self, x: Float[Tensor, "b c t n"], ahead: str, reverse: str) -> tuple[Tensor, Tensor]:
        """Return the hidden states of two opposite directions along t.

        Args:
            x: Features.
            ahead: Name of the units that run forwards.
            reverse: Name of the units that run backwards.
        """
        units = [cast(nn.Conv2d, self.get_submodule(name)) for name in (ahead, reverse)]
        weight = torch.stack([unit.weight.view(-1, 1) for unit in units])
        bias = torch.stack([cast(Tensor, unit.bias).view(-1, 1) for unit in units])
        steps = torch.stack((x, x.flip(2)), dim=1)
        hidden = (scan_by_doubling if exporting() else scan)(steps, weight, bias)
        return hidden[:, 0], hidden[:, 1].flip(2)


@torch.compiler.disable  # a compiler would unroll the loop
def scan(
    steps: Float[Tensor, "b 2 c t n"], weight: Float[Tensor, "2 c 1"], bias: Float[Tensor, "2 c 1"]
) -> Float[Tensor, "b 2 c t n"]:
    """Return the hidden states of recurrent units along t; without gradients, they overwrite ``steps``.

    Args:
        steps: Inputs of the units in two directions, each in its order.
        weight: Weights of both directions.
        bias: Biases of both directions.
    """
    if torch.is_grad_enabled():
        first, *others = steps.unbind(3)
        hidden = [torch.relu(first)]
        for step in others:
            hidden.append(torch.relu_(torch.addcmul(step + bias, weight, hidden[-1])))
        return torch.stack(hidden, dim=3)
    steps[:, :, :, 1:] += bias[:, :, None]
    previous, *others = steps.unbind(3)
    previous.relu_()
    for step in others:
        previous = step.addcmul_(weight, previous).relu_()
    return steps


def scan_by_doubling(
    steps: Float[Tensor, "b 2 c t n"], weight: Float[Tensor, "2 c 1"], bias: Float[Tensor, "2 c 1"]
) -> Float[Tensor, "b 2 c t n"]:
    """Return the same as `scan`, without a loop over t, for exported graphs; t is at most ``2**16``.

    A step is a function ``clamp(slope · h + offset, low, high)`` of the previous hidden state h, and so is a
    composition of steps. Round k composes the function of 2**k steps with that of the 2**k steps before them (Hillis
    and Steele, Data Parallel Algorithms, 1986). Before the first step, the function is constantly 0.
    """
    index = torch.arange(steps.shape[3] + 1, device=steps.device)
    offset = F.pad(steps, (0, 0, 1, 0)) + bias[:, :, None] * (index > 1)[:, None]
    slope, low = weight[:, :, None], torch.zeros_like(offset)
    high = low + LARGE * (index > 0)[:, None]
    for doubling in range(DOUBLINGS):
        before = (index - 2**doubling).clamp(min=0)
        ends = [(slope * end[:, :, :, before] + offset).clamp(low, high) for end in (low, high)]
        offset = (slope * offset[:, :, :, before] + offset).clamp(-LARGE, LARGE)
        low, high = torch.minimum(*ends), torch.maximum(*ends)
        slope = (slope * slope).clamp(max=LARGE)
    return offset.clamp(low, high)[:, :, :, 1:]


def _conv(inputs: int, outputs: int, size: int = 3, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=dilation * (size // 2), dilation=dilation, bias=False)
