"""Panels that compare rainy, derained and clean images."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from derain.images import ESCAPED, Pixels, to_bytes, write_image
from derain.pictures import compare


def to_pixels(image: Tensor, name: str) -> Pixels:
    """Convert a ``(3, h, w)`` tensor in [0, 1] to ``(h, w, 3)`` pixels in 0 to 255, rounded.

    Raises:
        DerainError: If a value is not finite; the message contains ``name``.
    """
    return to_bytes(image.float().permute(1, 2, 0).cpu().numpy(), name)


def draw_panel(batch: Any, outputs: Any) -> tuple[Image.Image, str]:
    """Return the panel and the name of the first image of a batch.

    Args:
        batch: Batch of a `RainDataModule`.
        outputs: Result of ``validation_step`` or ``test_step`` for the batch.

    Raises:
        DerainError: If a value is not finite.
    """
    images = {"rainy": batch["rainy"], "derained": outputs["derained"], "clean": batch["clean"]}
    name = batch["name"][0]
    panel = compare({label: to_pixels(image[0], f"{name}: {label} image") for label, image in images.items()})
    return panel, name


class ImagePanels(Callback):
    """Save panels (rainy | derained | clean) of the first images of the validation and test sets.

    Panels of validation images are saved in every validation to ``panels/NAME/epoch-0000.png``, with the number of the
    epoch from 0, and logged to W&B and TensorBoard. Panels of test images are saved to ``panels/NAME.png``.

    Args:
        count: Number of images per set.
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
        """Save and log the panel of an image if it is one of the first; each rank saves those of its own images."""
        if trainer.sanity_checking or int(batch["index"][0]) >= self.count or outputs is None:
            return
        panel, name = draw_panel(batch, outputs)
        write_image(Path(trainer.default_root_dir) / "panels" / name / f"epoch-{trainer.current_epoch:04d}.png", panel)
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
        """Save the panel of a test image if it is one of the first."""
        if int(batch["index"][0]) < self.count and outputs is not None:
            panel, name = draw_panel(batch, outputs)
            write_image(Path(trainer.default_root_dir) / "panels" / f"{name}.png", panel)
