"""Restored images of ``derain predict``."""

from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from derain.callbacks.panels import to_pixels
from derain.folders import check_outputs
from derain.images import write_image
from derain.methods import DerainModule
from derain.pictures import write_explanation


class SaveImages(Callback):
    """Writes every predicted image as ``images/NAME.png`` into the folder of the run.

    With ``--explain true``, ``images/NAME-explain.png`` and ``.json`` show the maps and what was perceived.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse names under which one image would overwrite another."""
        endings = [".png", *(["-explain.png", "-explain.json"] if cast(DerainModule, pl_module).explaining else [])]
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
        """Writes the images of a batch; each rank writes its own."""
        folder = Path(trainer.default_root_dir) / "images"
        method = cast(DerainModule, pl_module)
        for place, name in enumerate(batch["name"]):
            derained, maps = outputs["derained"][place].split((3, len(outputs["derained"][place]) - 3))
            pixels = to_pixels(derained, f"{name}: derained image")
            write_image(folder / f"{name}.png", pixels)
            if method.explaining:
                write_explanation(
                    folder / f"{name}-explain",
                    {"rainy": to_pixels(batch["rainy"][place], name), "derained": pixels}
                    | {
                        kind: to_pixels(one.expand(3, -1, -1), f"{name}: {kind}")
                        for kind, one in zip(method.maps, maps, strict=True)
                    },
                    method.describe_image(outputs["perceived"], place),
                )
        if trainer.received_sigterm:  # which Lightning's prediction loop does not look at
            raise SIGTERMException
