"""Restored images of ``derain predict``."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from derain.callbacks.panels import to_pixels
from derain.folders import check_outputs
from derain.images import write_image
from derain.methods.interfaces import Explains
from derain.pictures import write_explanation


class SaveImages(Callback):
    """Writes every predicted image as ``images/NAME.png`` into the folder of the run.

    With ``--explain true``, ``images/NAME-explain.png`` and ``.json`` show the maps and what was perceived.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse names under which one image would overwrite another."""
        endings = [".png", *(["-explain.png", "-explain.json"] if _explains(pl_module) else [])]
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
        for place, name in enumerate(batch["name"]):
            derained, maps = outputs["derained"][place].split((3, len(outputs["derained"][place]) - 3))
            pixels = to_pixels(derained, f"{name}: derained image")
            write_image(folder / f"{name}.png", pixels)
            if isinstance(pl_module, Explains) and pl_module.explaining:
                write_explanation(
                    folder / f"{name}-explain",
                    {"rainy": to_pixels(batch["rainy"][place], name), "derained": pixels}
                    | {
                        kind: to_pixels(one.expand(3, -1, -1), f"{name}: {kind}")
                        for kind, one in zip(pl_module.maps, maps, strict=True)
                    },
                    pl_module.describe_image(outputs["conditions"], place),
                )
        if trainer.received_sigterm:  # which Lightning's prediction loop does not look at
            raise SIGTERMException


def _explains(module: LightningModule) -> bool:
    return isinstance(module, Explains) and module.explaining
