"""Callback that writes the weights file of a training run."""

import logging
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from derain.callbacks.checkpoints import BestCheckpoint
from derain.callbacks.image_counts import image_count, validation_counts
from derain.callbacks.last import LastCheckpoint
from derain.methods import DerainModule, TrainableModule
from derain.methods.catalog import load

log = logging.getLogger("derain")


class FinalWeights(Callback):
    """Write ``weights.safetensors`` at the end of training; log the best validation score and the next command.

    The weights are those of the best checkpoint, or of the last checkpoint if no validation ran; with `EMA`, the
    averaged weights of that checkpoint. The trainer needs the callbacks `BestCheckpoint` and `LastCheckpoint`.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file and log the messages, on rank 0."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        best = next((callback for callback in callbacks if isinstance(callback, BestCheckpoint)), None)
        last = next((callback for callback in callbacks if isinstance(callback, LastCheckpoint)), None)
        if not trainer.is_global_zero:
            return
        if best is None or last is None:
            log.warning("FinalWeights: no weights are saved; add the callbacks BestCheckpoint and LastCheckpoint")
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.info("fast_dev_run: no checkpoints and no weights are saved")
            return
        file = best.best_model_path or last.best_model_path  # last has no monitor: its best is its newest
        if not file:
            log.warning("no training step was run: no weights are saved")
            return
        for checkpoint in trainer.checkpoint_callbacks:
            # W&B labels the file of best_model_path as the best; without a monitor, it is only the newest.
            if isinstance(checkpoint, ModelCheckpoint) and not checkpoint.monitor:
                checkpoint.last_model_path, checkpoint.best_model_path = checkpoint.best_model_path, ""
        target = Path(trainer.default_root_dir) / "weights.safetensors"
        load(Path(file), type(pl_module)).module.save_weights(target)
        score = float("nan") if best.best_model_score is None else float(best.best_model_score)
        evaluated = image_count(*validation_counts(trainer))
        data: Any = getattr(trainer, "datamodule", None)
        if getattr(data, "val_mean", "images") == "sets" and (sets := data.data_sets("val")):
            evaluated = f"mean over {len(sets)} sets, {evaluated}"
        rainy = trainer.callback_metrics.get("val/rainy_psnr")  # missing if the resumed run had no epoch left
        if not best.best_model_path:
            log.warning("no validation was run: saved the weights of the last checkpoint")
        elif isinstance(pl_module, DerainModule):
            baseline = "" if rainy is None else f"rainy {float(rainy):.2f} dB, "
            protocol = pl_module.protocols[0]
            log.info("best validation: %sderained %.2f dB (%s, %s)", baseline, score, protocol, evaluated)
        else:
            log.info("best validation: %s %.4f (%s)", cast(TrainableModule, pl_module).monitor, score, evaluated)
        module = cast(TrainableModule, pl_module)
        required = module.required_class()
        option = f"--method {required}" if required else ""
        log.info("%s", module.usage_hint(target, option))
