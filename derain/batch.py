"""The batch type that the data module produces and the methods consume."""

from typing import NotRequired, TypedDict

from jaxtyping import Float, Int
from torch import Tensor


class PairBatch(TypedDict):
    """Batch of image pairs, all of the same size.

    Keys:
        rainy: ``(b, 3, h, w)`` in [0, 1].
        clean: Same shape and range; missing in prediction.
        name: Name of each pair, or in prediction of each image.
        index: ``(b,)``, index of each pair or image in its split of the data.
        caption: Text that describes each clean image; only in training and validation with ``--data.captions``.
        degradation: Word for the degradation of each rainy image, such as ``rainy``; only with ``caption``.
        unlabelled: Rainy images without ground truth, ``(b, 3, h, w)`` in [0, 1], independent of the pairs; only in
            training with ``--data.unlabelled``, for methods that need them.
        unlabelled_name: Name of each unlabelled image; only with ``unlabelled``.
    """

    rainy: Float[Tensor, "b 3 h w"]
    clean: NotRequired[Float[Tensor, "b 3 h w"]]
    name: list[str]
    index: Int[Tensor, " b"]
    caption: NotRequired[list[str]]
    degradation: NotRequired[list[str]]
    unlabelled: NotRequired[Float[Tensor, "b 3 h w"]]
    unlabelled_name: NotRequired[list[str]]
