"""How many images of a set were evaluated."""

import logging
from typing import Any

from lightning import Callback, LightningModule, Trainer

log = logging.getLogger("derain")


def part(evaluated: int, total: int) -> str:
    """Return how many images were evaluated, marked where it was not all of them.

    Example:
        >>> part(3, 100), part(100, 100), part(1, 1)
        ('3 of 100 images (partial)', '100 images', '1 image')
    """
    images = "1 image" if total == 1 else f"{total} images"
    return images if evaluated == total else f"{evaluated} of {images} (partial)"


def validated(trainer: Trainer) -> tuple[int, int]:
    """Return how many images are validated, and how many the validation set has.

    They follow from the options: Lightning counts batches only once a validation begins.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    count = len(data.pairs.get("val", ()))
    batches = _limited(-(-count // trainer.world_size), trainer)
    return min(batches * trainer.world_size, count), data.count("val")


def validated_by_all(trainer: Trainer) -> int:
    """Return the batches of a validation that every rank has; some ranks have one more."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return _limited(max(1, len(data.pairs["val"]) // trainer.world_size), trainer)


def _limited(batches: int, trainer: Trainer) -> int:
    limit = trainer.limit_val_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


class PartNote(Callback):
    """Warns that ``derain validate`` or ``predict`` looked at a part of the images only."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn after ``derain validate``."""
        self._warn(*validated(trainer))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn after ``derain predict``."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        total = data.count("predict")
        self._warn(min(sum(map(int, trainer.num_predict_batches)) * trainer.world_size, total), total)

    def _warn(self, evaluated: int, total: int) -> None:
        if evaluated < total:
            log.warning("%s: not comparable with results on the whole set", part(evaluated, total))
