"""What happens to the pixels of a training pair: the same crop and flips of rainy and clean."""

import os
import random
from typing import Literal

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for its newest version

import albumentations
import cv2
import numpy as np

from derain.images import Pixels

Flips = bool | Literal["horizontal"]


class Augmentation:
    """Random crop, flips and transpose, the same for rainy and clean, decided by a seed alone.

    Images smaller than the crop are reflect-padded, so that none is dropped.

    Args:
        crop: Side of the square crop in pixels.
        flips: Flip left–right and up–down, each with probability 0.5; ``horizontal``: left–right alone.
        transpose: Also swap rows and columns with probability 0.5.

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
        """Cuts one training pair out of a pair of images; equal seeds give equal crops.

        Args:
            rainy: ``(h, w, 3)``.
            clean: The same shape.
            seed: Numbers that name this draw: seed of the run, epoch, place in the epoch.
        """
        # One stream for all steps: set_random_seed would give each the same number, and so tie the flips together.
        numbers = np.random.default_rng(seed)
        self._compose.set_random_state(numbers, random.Random(int(numbers.integers(2**63))))
        result = self._compose(image=rainy, clean=clean)
        return result["image"], result["clean"]
