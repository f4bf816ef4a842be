"""Numbers of evaluated images, and a warning if only a part of a set is evaluated."""

import logging
from typing import Any

from lightning import Callback, LightningModule, Trainer

from derain.evaluation import is_limited

log = logging.getLogger("derain")


def image_count(evaluated: int, total: int) -> str:
    """Return the number of evaluated images as text, marked "partial" if it is less than the total.

    Example:
        >>> image_count(3, 100), image_count(100, 100), image_count(1, 1)
        ('3 of 100 images (partial)', '100 images', '1 image')
    """
    images = "1 image" if total == 1 else f"{total} images"
    return images if evaluated == total else f"{evaluated} of {images} (partial)"


def validation_counts(trainer: Trainer) -> tuple[int, int]:
    """Return the number of images that a validation evaluates, and the number of images in the validation set.

    The first number is computed from the options, since Lightning counts batches only when a validation starts.
    ``val_limit`` of the data module reduces the first number, but not the second.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    count = len(data.pairs.get("val", ()))
    batches = _limited(-(-count // trainer.world_size), trainer)
    return min(batches * trainer.world_size, count), data.count("val")


def common_batches(trainer: Trainer) -> int:
    """Return the number of validation batches that every rank has; some ranks may have one more."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return _limited(max(1, len(data.pairs["val"]) // trainer.world_size), trainer)


def _limited(batches: int, trainer: Trainer) -> int:
    """Return a number of validation batches, limited by ``limit_val_batches``: a number (int) or a share (float)."""
    limit = trainer.limit_val_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


class PartialEvaluationWarning(Callback):
    """Warn if ``derain validate`` or ``derain predict`` restores only a part of the images."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn after ``derain validate`` if images were skipped."""
        self._warn(*validation_counts(trainer))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn after ``derain predict`` if images were skipped."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        total = data.count("predict")
        if not is_limited("predict", trainer):
            return
        batches = sum(int(count) for count in trainer.num_predict_batches)  # with a limit, batches have one image each
        self._warn(min(batches * trainer.world_size, total), total)

    def _warn(self, evaluated: int, total: int) -> None:
        if evaluated < total:
            log.warning("%s: not comparable with results on the whole set", image_count(evaluated, total))
