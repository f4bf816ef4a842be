"""Restored images of ``derain predict``."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from derain.callbacks.panels import to_pixels
from derain.images import write_image


class SaveImages(Callback):
    """Writes every predicted image as ``images/NAME.png`` into the folder of the run."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the images of a batch; each rank writes its own."""
        folder = Path(trainer.default_root_dir) / "images"
        for name, image in zip(batch["name"], outputs, strict=True):
            write_image(folder / f"{name}.png", to_pixels(image))
