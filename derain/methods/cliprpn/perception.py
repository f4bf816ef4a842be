"""Rain perception: similarities of images to prompts, computed by CLIP and cached on disk."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from derain.folders import cache_folder
from derain.images import Pixels
from derain.methods.clip import PREPROCESSING_VERSION, FrozenCLIP

Similarity = Literal["cosine", "dot"]

BATCH = 8
"""Maximum number of images that CLIP processes at a time in `RainPerception.all_similarities`."""

ALTERNATIVE = "train without CLIP by --model.perception none, restore without it by --route N"
"""Advice for error messages about a CLIP that is not available."""


class RainPerception:
    """Similarities of images to prompts, computed by CLIP.

    Similarities are cached in a file in derain's cache folder. The name of the file depends on the prompts, the kind of
    similarity, the hash of CLIP and the version of its preprocessing. In the file, the key of an image is a hash of its
    pixels.

    Args:
        clip: Id on the Hugging Face hub or a local directory; ``$DERAIN_CLIP`` takes precedence.
        texts: Prompts, one per route.
        similarity: ``cosine``; or ``dot``, as eq. 1 of CLIP-RPN is printed, which also depends on the norms of the
            embeddings.

    Raises:
        DerainError: When CLIP is first needed, if it is not available.
    """

    def __init__(self, clip: str, texts: Sequence[str], similarity: Similarity = "cosine") -> None:
        self.clip, self.texts, self.similarity = FrozenCLIP(clip, ALTERNATIVE), tuple(texts), similarity

    @cached_property
    def _file(self) -> Path:
        settings = json.dumps([self.clip.sha256, self.texts, self.similarity, PREPROCESSING_VERSION])
        return cache_folder() / "routes" / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.jsonl"

    @cached_property
    def _cached(self) -> dict[str, list[float]]:
        cached: dict[str, list[float]] = {}
        if not self._file.is_file():
            return cached
        for line in self._file.read_text(errors="replace").splitlines():
            try:
                key, similarities = json.loads(line)
            except ValueError:  # a process was killed while it wrote this line
                continue
            cached[key] = similarities
        return cached

    @cached_property
    def _text_features(self) -> Float[Tensor, "n d"]:
        features = self.clip.text_features(self.texts)
        return torch.nn.functional.normalize(features, dim=1) if self.similarity == "cosine" else features

    def similarities(
        self, images: Sequence[Pixels], device: torch.device | None = None, cache: bool = True
    ) -> Float[Tensor, "b n"]:
        """Return the similarity of each image to each prompt, on the CPU.

        CLIP processes the images that are not in the cache as a single batch.

        Args:
            images: Images ``(h, w, 3)`` in uint8, of any sizes.
            device: Device of CLIP; the CPU by default.
            cache: Whether to add new similarities to the cache; known ones are read from it in any case.

        Raises:
            DerainError: If CLIP is not available, or a prompt is too long for it.
        """
        keys = [hashlib.sha256(str(image.shape).encode() + image.tobytes()).hexdigest()[:32] for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._cached}
        computed: dict[str, list[float]] = {}
        if new:
            features = self.clip.image_features(list(new.values()), device)
            if self.similarity == "cosine":
                features = torch.nn.functional.normalize(features, dim=1)
            similarities = features @ self._text_features.T
            computed = dict(zip(new, similarities.tolist(), strict=True))
        if computed and cache:
            self._add_to_cache(computed)
        return torch.tensor([computed[key] if key in computed else self._cached[key] for key in keys])

    def _add_to_cache(self, similarities: dict[str, list[float]]) -> None:
        self._cached.update(similarities)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"\n{json.dumps(item)}" for item in similarities.items())
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, text.encode())  # a single write, so that lines of several processes do not mix
        finally:
            os.close(descriptor)

    def all_similarities(
        self, images: Iterable[Pixels], device: torch.device | None = None, cache: bool = True
    ) -> Float[Tensor, "n m"]:
        """Return the similarity of any number of images to each prompt, on the CPU; images are processed in batches.

        Arguments and exceptions are those of `similarities`.
        """
        batches = [torch.empty(0, len(self.texts))]
        remaining = iter(images)
        while batch := list(itertools.islice(remaining, BATCH)):
            batches.append(self.similarities(batch, device, cache))
        return torch.cat(batches)


def scores(similarities: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Return the scores of the prompts: the softmax of the similarities over the prompts.

    As in the paper, similarities are not multiplied by CLIP's logit scale.

    References:
        CLIP-RPN, eq. 1.
    """
    return similarities.softmax(-1)
