"""Functions that infer the arguments of networks with Restormer's blocks from names and shapes of their tensors."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from derain.networks.base import count_numbered

DECIMALS = 4
"""Maximum number of decimals of an expansion."""

LEVELS = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
"""Names of the levels of Restormer's encoder."""


def restormer_options(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return ``dim``, ``blocks``, ``refinement``, ``heads`` and ``expansion`` of a network with Restormer's levels.

    Args:
        state: Tensors by Restormer's names.

    Returns:
        The arguments; None if no expansion fits.

    Raises:
        KeyError: If a tensor is missing, for example because a level has no block.
    """
    if (expansion := expansion_of(state)) is None:
        return None
    return {
        "dim": state["patch_embed.proj.weight"].shape[0],
        "blocks": [count_numbered(state, rf"{level}\.(\d+)\.") for level in LEVELS],
        "refinement": count_numbered(state, r"refinement\.(\d+)\."),
        "heads": heads_of(state, *(f"{level}.0" for level in LEVELS)),
        "expansion": expansion,
    }


def heads_of(state: Mapping[str, Tensor], *blocks: str) -> list[int]:
    """Return the number of attention heads of each block, from the shapes of their temperatures.

    Args:
        state: Tensors by name.
        blocks: Names of the blocks, such as ``latent.0``.

    Example:
        >>> import torch
        >>> heads_of({"latent.0.attn.temperature": torch.ones(8, 1, 1)}, "latent.0")
        [8]
    """
    return [state[f"{block}.attn.temperature"].shape[0] for block in blocks]


def expansion_of(state: Mapping[str, Tensor], layer: str = r"\.ffn\.project_in") -> float | None:
    """Return the expansion of all feed-forward networks: the decimal with the fewest digits that fits their widths.

    Args:
        state: Tensors by name.
        layer: Regular expression of the names of the layers that map ``channels`` to twice the hidden channels.

    Returns:
        A number whose product with ``channels``, rounded down, is the number of hidden channels; None if none fits.

    Example:
        >>> import torch
        >>> expansion_of({"0.ffn.project_in.weight": torch.zeros(254, 48, 1, 1)})
        2.65
        >>> expansion_of({f"{c}.ffn.project_in.weight": torch.zeros(2 * h, c) for c, h in [(48, 127), (384, 1021)]})
        2.66
    """
    weights = [tensor for name, tensor in state.items() if re.search(layer + r"\.weight$", name)]
    widths = [(weight.shape[1], weight.shape[0] // 2) for weight in weights]
    if not widths or min(map(min, widths)) < 1:
        return None
    smallest = max(hidden / channels for channels, hidden in widths)
    for decimals in range(DECIMALS + 1):
        expansion: float = math.ceil(smallest * 10.0**decimals) / 10.0**decimals
        if all(int(expansion * channels) == hidden for channels, hidden in widths):
            return expansion
    return None
