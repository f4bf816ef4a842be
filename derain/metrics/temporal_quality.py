"""Metric of torchmetrics: flicker and warping error of each frame and the one before it."""

import math
from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from .temporal import TEMPORAL_NAMES, temporal_scores, to_8_bit

PREFIXES = ("", "rainy_", "clean_")
COLUMNS = tuple(f"{prefix}{name}" for prefix in PREFIXES for name in TEMPORAL_NAMES)
"""Names of the scores: without prefix for the derained video, ``rainy_…`` and ``clean_…`` for the others."""


class TemporalQuality(Metric):
    """Flicker and warping error of every frame that directly follows another, on one device or several.

    All frames of a sequence must be evaluated on one device, in any order. A frame is kept until it has been compared
    with its neighbours.

    Args:
        consecutive: Indices of the frames that are compared with the frame at the previous index.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    rows: list[Tensor]

    def __init__(self, consecutive: Collection[int]) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        self._unscored = set(consecutive)
        self._waiting: dict[int, dict[str, NDArray[np.uint8]]] = {}
        # Flattened, since torchmetrics gathers a flat empty state from a device without frames.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(
        self,
        derained: Float[Tensor, "b 3 h w"],
        rainy: Float[Tensor, "b 3 h w"],
        clean: Float[Tensor, "b 3 h w"],
        index: Int[Tensor, " b"],
    ) -> None:
        """Compare a batch of frames with their neighbours.

        Args:
            derained: ``(b, 3, h, w)``; clipped to [0, 1] here.
            rainy: Same shape, in [0, 1].
            clean: Same shape, in [0, 1].
            index: ``(b,)``, index of each frame in the data set.

        Raises:
            DerainError: If consecutive frames differ in size, or a side is below 16 pixels.
        """
        videos = dict(zip(PREFIXES, (derained, rainy, clean), strict=True))
        arrays = {prefix: images.detach().cpu().movedim(1, -1).numpy() for prefix, images in videos.items()}
        for row, frame in enumerate(index.tolist()):
            self._waiting[frame] = {prefix: to_8_bit(images[row]) for prefix, images in arrays.items()}
            for later in (frame, frame + 1):
                if later in self._unscored and {later - 1, later} <= self._waiting.keys():
                    self._score(later)
            self._forget()

    def _score(self, frame: int) -> None:
        before, after = self._waiting[frame - 1], self._waiting[frame]
        videos = {prefix: (before[prefix], after[prefix]) for prefix in PREFIXES}
        clean = videos.pop("clean_")
        scores = temporal_scores(clean, videos)
        values = [float("nan") if scores[column] is None else scores[column] for column in COLUMNS]
        device = torch.device("cpu") if self.device.type == "mps" else self.device  # MPS has no float64
        self.rows.append(torch.tensor([float(frame), *values], dtype=torch.float64, device=device))
        self._unscored.remove(frame)

    def _forget(self) -> None:
        """Drop the frames that need no further comparison."""
        for frame in list(self._waiting):
            if not {frame, frame + 1} & self._unscored:
                del self._waiting[frame]

    def compute(self) -> dict[int, dict[str, float | None]]:
        """Return the scores of all devices by the index of the later frame; None for scores that cannot be computed."""
        rows = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        table = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows, np.float64).reshape(-1, 1 + len(COLUMNS))
        scores: dict[int, dict[str, float | None]] = {}
        for frame, *values in table.tolist():
            known = [None if math.isnan(value) else value for value in values]
            scores[int(frame)] = dict(zip(COLUMNS, known, strict=True))
        return scores
