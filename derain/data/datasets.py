"""Datasets of the data module: random crops for training, whole images for evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from derain.data.cache import PixelCache, read_pair
from derain.data.captions import Caption
from derain.data.mixing import Mixture
from derain.data.pairs import Pair
from derain.data.samplers import Sample
from derain.data.transforms import Augmentation
from derain.images import Pixels


def to_tensor(pixels: Pixels) -> torch.Tensor:
    """Convert ``(h, w, 3)`` pixels to a ``(3, h, w)`` uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class UnlabelledCrops:
    """Random crops of rainy images without ground truth, one for each training sample.

    Each crop is from a random image. Image, crop and flips depend only on the seed of the run and on the sample. So a
    resumed run draws the same crops, with any number of workers.

    Args:
        images: Rainy images, without clean ones.
        cache: Decoded pixels of the images; if None, every sample decodes a file.
        augmentations: Augmentations by the side of their crops, for every side that a sample may have.
        seed: Seed of the run.
    """

    def __init__(
        self, images: Sequence[Pair], cache: PixelCache | None, augmentations: Mapping[int, Augmentation], seed: int
    ) -> None:
        self.images, self.cache, self.augmentations, self.seed = images, cache, augmentations, seed

    def __getitem__(self, sample: Sample) -> tuple[Pixels, str]:
        """Return the crop for a sample, ``(crop, crop, 3)`` in 0 to 255, and the name of its image."""
        # The crop of the pair is drawn with this seed. Each draw here appends another number, for independent results.
        seed = (self.seed, sample.epoch, sample.number)
        index = int(np.random.default_rng((*seed, 1)).integers(len(self.images)))
        image = self.cache[index][0] if self.cache is not None else self.images[index].read()[0]
        pixels, _ = self.augmentations[sample.crop](image, image, (*seed, 2))
        return pixels, self.images[index].name


class TrainingPairs(Dataset[dict[str, Any]]):
    """Dataset of random crops of pairs, for training.

    Args:
        pairs: The pairs.
        cache: Decoded pixels of the pairs; if None, every sample decodes the files of its pair.
        augmentations: Augmentations by the side of their crops, for every side that a sample may have.
        seed: Seed of the run.
        captions: Captions in the order of ``pairs``; none by default.
        unlabelled: Crops of rainy images without ground truth, one of which is added to each item; none by default.
        rain_share: Share of the pairs' samples to which the data module adds rain; it always adds rain to photos. Items
            then have ``rain_added`` and ``rain_seed``. By default, no rain is added.
        mixture: Chooses the pair of each sample; by default, all pairs occur equally often.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        cache: PixelCache | None,
        augmentations: Mapping[int, Augmentation],
        seed: int,
        captions: Sequence[Caption] = (),
        unlabelled: UnlabelledCrops | None = None,
        rain_share: float | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        self.pairs, self.cache, self.augmentations, self.seed = pairs, cache, augmentations, seed
        self.captions, self.unlabelled, self.rain_share = captions, unlabelled, rain_share
        self.mixture = mixture

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        """Return the crops of a sample, ``rainy`` and ``clean``, with the ``name`` and ``index`` of the pair.

        Crops are uint8 tensors ``(3, crop, crop)``. Depending on the arguments of the class, the item also has
        ``caption`` and ``degradation``, ``unlabelled`` and ``unlabelled_name``, ``rain_added`` and ``rain_seed``.
        """
        index = sample.number % len(self.pairs) if self.mixture is None else self.mixture.pair(sample)
        rainy, clean = self.cache[index] if self.cache is not None else read_pair(self.pairs[index])
        seed = (self.seed, sample.epoch, sample.number)
        rainy, clean = self.augmentations[sample.crop](rainy, clean, seed)
        item = {"rainy": to_tensor(rainy), "clean": to_tensor(clean), "name": self.pairs[index].name, "index": index}
        if self.unlabelled is not None:
            pixels, name = self.unlabelled[sample]
            item |= {"unlabelled": to_tensor(pixels), "unlabelled_name": name}
        if self.rain_share is not None:
            rng = np.random.default_rng((*seed, 3))
            added = self.pairs[index].is_photo or rng.random() < self.rain_share
            item |= {"rain_added": added, "rain_seed": int(rng.integers(2**63))}
        return item | _caption_fields(self.captions, index)


class TrainingLoader(DataLoader[dict[str, Any]]):
    """Data loader with an empty state, without which Lightning warns when a run resumes within an epoch.

    `RainDataModule.resume_at` sets the position instead.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state."""


class WholePairs(Dataset[dict[str, Any]]):
    """Dataset of whole images, for evaluation and prediction.

    Args:
        pairs: The pairs, with or without clean images.
        cache: Decoded pixels of the pairs; by default, every item decodes the files of its pair.
        captions: Captions in the order of ``pairs``; none by default.
    """

    def __init__(
        self, pairs: Sequence[Pair], cache: PixelCache | None = None, captions: Sequence[Caption] = ()
    ) -> None:
        self.pairs, self.cache, self.captions = pairs, cache, captions

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``rainy`` and, if there is one, ``clean``, uint8 tensors ``(3, h, w)``; also ``name`` and ``index``.

        With captions, the item also has ``caption`` and ``degradation``.
        """
        pair = self.pairs[index]
        rainy, clean = self.cache[index] if self.cache is not None else pair.read()
        item = {"rainy": to_tensor(rainy), "name": pair.name, "index": index}
        if clean is not None:
            item["clean"] = to_tensor(clean)
        return item | _caption_fields(self.captions, index)


def _caption_fields(captions: Sequence[Caption], index: int) -> dict[str, str]:
    if not captions:
        return {}
    return {"caption": captions[index].text, "degradation": captions[index].degradation}
