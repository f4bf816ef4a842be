"""Augmentation of training pairs."""

import os
import random
from typing import Literal

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import looks for a newer version online

import albumentations
import cv2
import numpy as np

from derain.images import Pixels

Flips = bool | Literal["horizontal"]


class Augmentation:
    """Random crop, flips and transposition, the same for the rainy and the clean image of a pair.

    Images smaller than the crop are padded by reflection.

    Args:
        crop: Side of the square crop in pixels.
        flips: Flip horizontally and vertically, each with probability 0.5; ``horizontal``: horizontally only; False:
            not at all.
        transpose: Also swap rows and columns, with probability 0.5.

    Example:
        >>> pair = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        >>> rainy, clean = Augmentation(3)(pair, pair, (0, 1, 2))
        >>> rainy.shape, bool((rainy == clean).all())
        ((3, 3, 3), True)
    """

    def __init__(self, crop: int, *, flips: Flips = True, transpose: bool = False) -> None:
        steps: list[albumentations.BasicTransform] = [
            albumentations.RandomCrop(crop, crop, pad_if_needed=True, border_mode=cv2.BORDER_REFLECT_101)
        ]
        if flips:
            steps.append(albumentations.HorizontalFlip(p=0.5))
        if flips is True:
            steps.append(albumentations.VerticalFlip(p=0.5))
        if transpose:
            steps.append(albumentations.Transpose(p=0.5))
        self._compose = albumentations.Compose(steps, additional_targets={"clean": "image"})

    def __call__(self, rainy: Pixels, clean: Pixels, seed: tuple[int, ...]) -> tuple[Pixels, Pixels]:
        """Return an augmented random crop of a pair; equal seeds yield equal crops.

        Args:
            rainy: ``(h, w, 3)`` in 0 to 255.
            clean: Same shape and range.
            seed: Integers that determine crop, flips and transposition: the seed of the run, and epoch and number of
                the sample.

        Returns:
            Rainy and clean crop, ``(crop, crop, 3)`` each.
        """
        # One generator for all steps: set_random_seed would give each step the same seed and correlate the flips.
        rng = np.random.default_rng(seed)
        self._compose.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        result = self._compose(image=rainy, clean=clean)
        return result["image"], result["clean"]
