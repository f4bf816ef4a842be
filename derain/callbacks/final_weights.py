"""The file that a training run hands on."""

import logging
from pathlib import Path
from typing import cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from derain.methods import DerainModule, DescribedModule, weights

log = logging.getLogger("derain")


class FinalWeights(Callback):
    """Writes ``weights.safetensors``, the best checkpoint's network, when training ends, and tells its score."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file on rank 0."""
        checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        best = next((c for c in checkpoints if c.monitor and c.best_model_path), None)
        if not trainer.is_global_zero or best is None:
            return
        for unjudged in (c for c in checkpoints if not c.monitor):  # loggers, which end later, would call it best
            unjudged.last_model_path, unjudged.best_model_path = unjudged.best_model_path, ""
        target = Path(trainer.default_root_dir) / "weights.safetensors"
        own = cast(DescribedModule, pl_module)
        weights.save(weights.load(Path(best.best_model_path), type(own)).module, target)
        score = float("nan") if best.best_model_score is None else float(best.best_model_score)
        if not isinstance(pl_module, DerainModule):
            log.info("validation: %s %.4f at best", own.judged_by, score)
            log.info("train with it by: --model.controller %s", target)
            return
        rainy = float(trainer.callback_metrics.get("val/rainy_psnr", float("nan")))
        log.info("validation: rainy %.2f dB, derained %.2f dB at best (%s)", rainy, score, pl_module.protocols[0])
        log.info("restore photos by: derain restore IN OUT --weights %s", target)
