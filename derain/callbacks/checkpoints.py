"""Checkpoints of a training run."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from derain.callbacks.parts import validation_counts
from derain.images import write_whole
from derain.methods.weights import READ_ERRORS

log = logging.getLogger("derain")


class Checkpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that works the same for methods with manual optimisation.

    Lightning ignores ``train_time_interval`` there, and warns at length that a checkpoint holds the state after the
    optimiser's step, which is the state that a resumed run needs.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save by steps or time, as Lightning does for automatic optimisation."""
        automatic = SimpleNamespace(automatic_optimization=True)  # all that Lightning reads of the module here
        super().on_train_batch_end(trainer, cast(LightningModule, automatic), outputs, batch, batch_idx)


class BestCheckpoint(Checkpoint):
    """``best.ckpt``: the epoch with the highest validation score.

    A class of its own, so that its state never collides with a ``ModelCheckpoint`` of the configuration. A resumed run
    keeps score and file, in whatever folder it is, as long as it validates the same images by the same protocols.

    Args:
        dirpath: Folder of the checkpoints.
        monitor: The logged metric, higher is better.
    """

    def __init__(self, dirpath: Any, monitor: str) -> None:
        super().__init__(dirpath, "best", monitor=monitor, mode="max", enable_version_counter=False)
        self._scored: dict[str, Any] = {}  # what scores can be compared by
        self._kept = False

    @property
    def file(self) -> Path:
        """``best.ckpt`` of this run."""
        return Path(str(self.dirpath)) / "best.ckpt"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note what is validated, and by which protocols."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        count, _ = validation_counts(trainer)
        protocols = list(getattr(pl_module, "protocols", ()))
        self._scored = {"protocols": protocols, "images": data.fingerprint("val", range(count)) if count else None}

    def state_dict(self) -> dict[str, Any]:
        """Return the score and file, and what other scores can be compared with it."""
        return super().state_dict() | {"scored": self._scored}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copy the best checkpoint of the run that is resumed into this run's folder; rank 0 decides for all."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        kept = False
        if trainer.is_global_zero and state.get("best_model_path"):
            reason = self._not_comparable(state.get("scored", self._scored)) or self._copy(state, trainer.ckpt_path)
            kept = reason is None
            if reason is not None:
                log.warning("best.ckpt: starts anew, since %s", reason)
        self._kept = trainer.strategy.broadcast(kept)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep score and file, or start anew."""
        if self._kept:
            own, score = str(self.file), state_dict["best_model_score"]
            paths = {"best_model_path": own, "kth_best_model_path": own, "best_k_models": {own: score}}
            super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath})

    def _not_comparable(self, saved: dict[str, Any]) -> str | None:
        """Return why scores of the run that is resumed cannot be compared with those of this run."""
        if self._scored["images"] is None:
            return "this run validates no images"
        if saved["protocols"] != self._scored["protocols"]:
            return f"--protocol {self._scored['protocols']} differs from {saved['protocols']} of the checkpoint"
        if saved["images"] != self._scored["images"]:
            return "the validation images differ from those of the checkpoint"
        return None

    def _copy(self, state: dict[str, Any], resumed: Any) -> str | None:
        """Find the best checkpoint, also where its folder was moved; return why it cannot be kept."""
        saved = Path(state["best_model_path"])
        score = float(state["best_model_score"])
        found = [path for path in (saved, Path(str(resumed)).with_name(saved.name), self.file) if path.is_file()]
        for path in found:
            if self._score_of(path) == score:
                if path.resolve() != self.file.resolve():
                    with write_whole(self.file) as temporary:
                        shutil.copyfile(path, temporary)
                return None
        what = "was overwritten by a later epoch" if found else "does not exist any more"
        return f"{saved}, which scored {score:.2f}, {what}"

    def _score_of(self, path: Path) -> float | None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return float(content["callbacks"][self.state_key]["best_model_score"])
        except (*READ_ERRORS, TypeError):
            return None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save by the score, unless nothing is validated: Lightning would warn that there is no score."""
        if trainer.enable_validation:
            super().on_train_epoch_end(trainer, pl_module)
