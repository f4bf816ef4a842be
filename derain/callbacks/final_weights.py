"""The file that a training run hands on."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from derain.methods import weights


class FinalWeights(Callback):
    """Writes ``weights.safetensors``, the best checkpoint's network, when training ends."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file on rank 0."""
        checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        best = next((c.best_model_path for c in checkpoints if c.monitor and c.best_model_path), None)
        if not trainer.is_global_zero or best is None:
            return
        target = Path(trainer.log_dir or trainer.default_root_dir) / "weights.safetensors"
        weights.save(weights.load(Path(best)).module, target)
        rank_zero_info(f"best weights: {target}  (restore photos by: derain restore IN OUT --weights {target})")
