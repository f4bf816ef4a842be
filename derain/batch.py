"""What travels from data to methods."""

from typing import NotRequired, TypedDict

from jaxtyping import Float, Int
from torch import Tensor


class PairBatch(TypedDict):
    """Pairs of one size.

    Keys:
        rainy: ``(b, 3, h, w)`` in [0, 1].
        clean: The same shape; absent where there is no ground truth.
        name: One name a pair, unique in its set.
        index: ``(b,)``, place of each pair in its set.
        caption: What each clean image shows; where there is a table of captions.
        degradation: A word for how each rainy image is degraded; likewise.
    """

    rainy: Float[Tensor, "b 3 h w"]
    clean: Float[Tensor, "b 3 h w"]
    name: list[str]
    index: Int[Tensor, " b"]
    caption: NotRequired[list[str]]
    degradation: NotRequired[list[str]]
