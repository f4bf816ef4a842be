"""The batch type that the data module produces and the methods consume."""

from typing import NotRequired, TypedDict

from jaxtyping import Float, Int
from torch import Tensor


class PairBatch(TypedDict):
    """Image pairs of equal size.

    Keys:
        rainy: ``(b, 3, h, w)`` in [0, 1].
        clean: Same shape; missing if there is no ground truth.
        name: Name of each pair, unique within the data set.
        index: ``(b,)``, index of each pair in the data set.
        caption: Description of each clean image; only with a caption table.
        degradation: Word for the degradation of each rainy image; only with a caption table.
    """

    rainy: Float[Tensor, "b 3 h w"]
    clean: Float[Tensor, "b 3 h w"]
    name: list[str]
    index: Int[Tensor, " b"]
    caption: NotRequired[list[str]]
    degradation: NotRequired[list[str]]
