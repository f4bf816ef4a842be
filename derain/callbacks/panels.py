"""Pictures of training: the same few validation images after every validation."""

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
    """Convert ``(3, h, w)`` in [0, 1] to ``(h, w, 3)`` bytes, rounded.

    Raises:
        DerainError: If a value is not finite; it names the image.
    """
    return to_bytes(image.float().permute(1, 2, 0).cpu().numpy(), name)


def draw(batch: Any, outputs: Any) -> tuple[Image.Image, str]:
    """The panel of the first image of a batch, and a file name for it."""
    images = {"rainy": batch["rainy"], "derained": outputs["derained"], "clean": batch["clean"]}
    name = batch["name"][0]
    panel = compare({label: to_pixels(image[0], f"{name}: {label} image") for label, image in images.items()})
    return panel, name


class ImagePanels(Callback):
    """Writes pictures (rainy | derained | clean) and sends those of validation to W&B or TensorBoard.

    ``panels/NAME/epoch-E.png`` of the same validation images after every validation, ``panels/NAME.png`` of
    test images.

    Args:
        count: How many of the first images.
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
        """Draws the panel of a chosen image; the ranks write their own images."""
        if trainer.sanity_checking or int(batch["index"][0]) >= self.count or outputs is None:
            return
        panel, name = draw(batch, outputs)
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
        """Draws the panel of a chosen test image."""
        if int(batch["index"][0]) < self.count and outputs is not None:
            panel, name = draw(batch, outputs)
            write_image(Path(trainer.default_root_dir) / "panels" / f"{name}.png", panel)
