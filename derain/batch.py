"""The batch type that the data module produces and the methods consume."""

from typing import NotRequired, TypedDict

from jaxtyping import Float, Int
from torch import Tensor


class PairBatch(TypedDict):
    """Image pairs of equal size.

    Keys:
        rainy: ``(b, 3, h, w)`` in [0, 1].
        clean: Same shape and range; missing in batches for prediction.
        name: Name of each pair, unique within the data set.
        index: ``(b,)``, index of each pair in the data set.
        caption: Text that describes each clean image; only if the data set has captions.
        degradation: Name of the degradation of each rainy image, such as ``rainy``; only if the data set has captions.
        unlabelled: ``(b, 3, h, w)`` in [0, 1], other rainy images, without ground truth; only in training, for methods
            that need them.
        unlabelled_name: Name of each of them.
    """

    rainy: Float[Tensor, "b 3 h w"]
    clean: Float[Tensor, "b 3 h w"]
    name: list[str]
    index: Int[Tensor, " b"]
    caption: NotRequired[list[str]]
    degradation: NotRequired[list[str]]
    unlabelled: NotRequired[Float[Tensor, "b 3 h w"]]
    unlabelled_name: NotRequired[list[str]]
