"""Panels that compare rainy, derained and clean images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from derain.images import ESCAPED, Pixels, to_bytes, write_image
from derain.pictures import compare


def to_pixels(image: Tensor, name: str = "image") -> Pixels:
    """Convert a ``(3, h, w)`` tensor, clipped to [0, 1], to ``(h, w, 3)`` pixels in 0 to 255, rounded.

    Raises:
        DerainError: If a value is not finite; the message contains ``name``.
    """
    return to_bytes(image.float().permute(1, 2, 0).cpu().numpy(), name)


def draw_panels(batch: Any, outputs: Any, count: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield names and panels of the images of a batch that are among the first of their split.

    Args:
        batch: Batch of a `RainDataModule`.
        outputs: Result of ``validation_step`` or ``test_step`` for the batch; None yields nothing.
        count: Number of images of the split that have a panel.

    Raises:
        DerainError: If a value is not finite.
    """
    if outputs is None:
        return
    images = {"rainy": batch["rainy"], "derained": outputs["derained"], "clean": batch["clean"]}
    for row, (index, name) in enumerate(zip(batch["index"].tolist(), batch["name"], strict=True)):
        if index < count:
            pixels = {kind: to_pixels(image[row], f"{name}: {kind} image") for kind, image in images.items()}
            yield name, compare(pixels)


class ImagePanels(Callback):
    """Save panels (rainy | derained | clean) of the first images of the validation and test sets.

    Panels of validation images are saved in every validation to ``panels/NAME/epoch-0000.png``, with the number of the
    epoch from 0, and logged to W&B and TensorBoard if the trainer uses them. Panels of test images are saved to
    ``panels/NAME.png``.

    Args:
        count: Number of validation images and of test images.
    """

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save and log the panels of the first images; each rank saves those of its own images."""
        if trainer.sanity_checking:
            return
        folder = Path(trainer.default_root_dir) / "panels"
        for name, panel in draw_panels(batch, outputs, self.count):
            write_image(folder / name / f"epoch-{trainer.current_epoch:04d}.png", panel)
            tag = f"panels/{name}".encode(errors=ESCAPED).decode()
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image(tag, [panel], step=trainer.global_step)
                elif isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(tag, np.asarray(panel), trainer.global_step, dataformats="HWC")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the panels of the first test images; each rank saves those of its own images."""
        for name, panel in draw_panels(batch, outputs, self.count):
            write_image(Path(trainer.default_root_dir) / "panels" / f"{name}.png", panel)
