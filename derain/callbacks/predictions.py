"""Callback that saves the images that ``derain predict`` restores."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from derain.callbacks.panels import to_pixels
from derain.errors import failed_files
from derain.folders import check_outputs
from derain.images import write_image
from derain.methods.interfaces import Explains
from derain.pictures import write_explanation


class SaveImages(Callback):
    """Save every derained image to ``images/NAME.png`` in the folder of the run.

    With ``--explain true``, ``images/NAME-explain.png`` shows the maps of the method, and ``images/NAME-explain.json``
    describes the conditions, such as the route. Derained images with values that are not finite are not saved, but
    reported at the end.
    """

    def __init__(self) -> None:
        self._failures: list[str] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that no output would overwrite another output.

        Raises:
            DerainError: If two outputs collide.
        """
        endings = [".png"]
        if isinstance(pl_module, Explains) and pl_module.explaining:
            endings += ["-explain.png", "-explain.json"]
        pairs = trainer.datamodule.pairs["predict"]  # type: ignore[attr-defined]
        check_outputs((Path(f"images/{pair.name}{ending}"), pair.rainy) for pair in pairs for ending in endings)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the images of a batch; each rank saves its own.

        Raises:
            SIGTERMException: If the process has received SIGTERM.
        """
        folder = Path(trainer.default_root_dir) / "images"
        self._failures += outputs["errors"].values()
        for index, name in enumerate(batch["name"]):
            if index in outputs["errors"]:
                continue
            channels = outputs["derained"][index]
            derained, maps = channels[:3], channels[3:]
            pixels = to_pixels(derained, f"{name}: derained image")
            write_image(folder / f"{name}.png", pixels)
            if isinstance(pl_module, Explains) and pl_module.explaining:
                images = {"rainy": to_pixels(batch["rainy"][index], name), "derained": pixels}
                for kind, values in zip(pl_module.maps, maps, strict=True):
                    images[kind] = to_pixels(values.expand(3, -1, -1), f"{name}: {kind}")
                description = pl_module.describe_image(outputs["conditions"][index], 0)
                write_explanation(folder / f"{name}-explain", images, description)
        if trainer.received_sigterm:  # Lightning's prediction loop ignores the signal
            raise SIGTERMException

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the images that were not saved, once all ranks have saved their other images.

        Raises:
            DerainError: If this rank has such images.
        """
        trainer.strategy.barrier("predictions")
        failures, self._failures = self._failures, []
        if failures:
            raise failed_files(failures)
