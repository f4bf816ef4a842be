"""Rain perception: which of several prompts an image is most similar to, by CLIP, remembered on disk."""

import hashlib
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
from derain.methods.clip import PREPARATION, FrozenCLIP

Similarity = Literal["cosine", "dot"]


WITHOUT = "train without CLIP by --model.perception none, restore without it by --route N"
"""What is said where there is no CLIP."""


class RainPerception:
    """Scores of whole images for each prompt.

    Scores are kept in a file by the image's content, the prompts, the similarity, CLIP's hash and the version of its
    preparation, so that of an image seen once CLIP runs no more.

    Args:
        clip: Id on the hub or a local directory.
        texts: Prompts, one a route.
        similarity: ``cosine``, or ``dot`` as eq. 1 of CLIP-RPN is printed: the length of the texts' features counts
            then (the image's does not change which is the largest).

    Raises:
        DerainError: When CLIP is needed and cannot be had.
    """

    def __init__(self, clip: str, texts: Sequence[str], similarity: Similarity = "cosine") -> None:
        self.clip, self.texts, self.similarity = FrozenCLIP(clip, WITHOUT), tuple(texts), similarity

    @cached_property
    def _file(self) -> Path:
        key = json.dumps([self.clip.sha256, self.texts, self.similarity, PREPARATION])
        return cache_folder() / "routes" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"

    @cached_property
    def _known(self) -> dict[str, list[float]]:
        known = {}
        lines = self._file.read_text(errors="replace").splitlines() if self._file.is_file() else ()
        for line in lines:
            try:
                image, scores = json.loads(line)
            except ValueError:  # a process died in the middle of this line
                continue
            known[image] = scores
        return known

    @cached_property
    def _text_features(self) -> Float[Tensor, "n d"]:
        features = self.clip.texts(self.texts)
        return torch.nn.functional.normalize(features, dim=1) if self.similarity == "cosine" else features

    def similarities(
        self, images: Sequence[Pixels], device: torch.device | None = None, remember: bool = True
    ) -> Float[Tensor, "b n"]:
        """Similarity of images, ``(h, w, 3)`` each, to every prompt.

        Those that were never seen go through CLIP together, on ``device``, and are remembered if wanted.
        """
        keys = [hashlib.sha256(str(image.shape).encode() + image.tobytes()).hexdigest()[:32] for image in images]
        found: dict[str, list[float]] = {}
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._known}
        if new:
            features = self.clip.images(list(new.values()), device)
            if self.similarity == "cosine":
                features = torch.nn.functional.normalize(features, dim=1)
            found = dict(zip(new, (features @ self._text_features.T).tolist(), strict=True))
            if remember:
                self._remember(found)
        return torch.tensor([self._known[key] if key in self._known else found[key] for key in keys])

    def _remember(self, scores: dict[str, list[float]]) -> None:
        self._known.update(scores)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"\n{json.dumps(item)}" for item in scores.items())
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, text.encode())  # one write: lines of several processes do not mix
        finally:
            os.close(descriptor)

    def all_similarities(
        self, images: Iterable[Pixels], device: torch.device | None = None, remember: bool = True
    ) -> Float[Tensor, "n m"]:
        """The same for many images, eight at a time."""
        batch: list[Pixels] = []
        found = [torch.empty(0, len(self.texts))]
        for image in images:
            batch.append(image)
            if len(batch) == 8:
                found.append(self.similarities(batch, device, remember))
                batch = []
        if batch:
            found.append(self.similarities(batch, device, remember))
        return torch.cat(found)


def scores(similarities: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Softmax over the prompts; the route is the largest.

    References:
        CLIP-RPN, eqs. 1 and 2.
    """
    return similarities.softmax(-1)
