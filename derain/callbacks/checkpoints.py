"""Callbacks that save the checkpoints of a training run."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from derain.callbacks.image_counts import validation_counts
from derain.files.weights import READ_ERRORS
from derain.images import write_whole

log = logging.getLogger("derain")


class Checkpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that treats manual optimisation like automatic optimisation.

    With manual optimisation, Lightning ignores ``train_time_interval``. It also warns that checkpoints contain the
    state after the optimiser step, although a resumed run needs that state.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after the configured steps or time, as with automatic optimisation."""
        automatic = SimpleNamespace(automatic_optimization=True)  # ModelCheckpoint reads no other attribute here
        super().on_train_batch_end(trainer, cast(LightningModule, automatic), outputs, batch, batch_idx)


class BestCheckpoint(Checkpoint):
    """Save ``best.ckpt``, the checkpoint with the highest validation score.

    A resumed run, even in another folder, continues with the best score of the earlier run and a copy of that run's
    ``best.ckpt``. It discards both if it validates other images or by other protocols, or if that file was lost or
    overwritten.

    Args:
        dirpath: Folder of the checkpoints.
        monitor: Logged validation metric; higher is better.
    """

    def __init__(self, dirpath: Any, monitor: str) -> None:
        super().__init__(dirpath, "best", monitor=monitor, mode="max", enable_version_counter=False)
        self._validation: dict[str, Any] = {}  # protocols, and fingerprint of the images
        self._keep_score = False

    @property
    def file(self) -> Path:
        """Path of ``best.ckpt``."""
        return Path(str(self.dirpath)) / "best.ckpt"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the protocols and a fingerprint of the validation images, on rank 0 and for training only."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        count, _ = validation_counts(trainer)
        protocols = list(getattr(pl_module, "protocols", ()))
        images = data.fingerprint("val", range(count)) if count else None
        self._validation = {"protocols": protocols, "images": images}

    def state_dict(self) -> dict[str, Any]:
        """Return the best score and its file, with the protocols and the fingerprint of the validation images."""
        return super().state_dict() | {"scored": self._validation}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copy the best checkpoint of the resumed run if it still exists and scores are comparable; rank 0 decides."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        keep_score = False
        if trainer.is_global_zero and state.get("best_model_path"):
            problem = self._not_comparable(state.get("scored", self._validation))
            problem = problem or self._copy(state, trainer.ckpt_path)
            keep_score = problem is None
            if problem is not None:
                log.warning("best.ckpt: discarding the best score of the resumed run: %s", problem)
        self._keep_score = trainer.strategy.broadcast(keep_score)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, for ``best.ckpt`` of this run, if `on_load_checkpoint` has copied that file."""
        if self._keep_score:
            file, score = str(self.file), state_dict["best_model_score"]
            paths = {"best_model_path": file, "kth_best_model_path": file, "best_k_models": {file: score}}
            super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath})

    def _not_comparable(self, saved: dict[str, Any]) -> str | None:
        """Return why scores of the resumed run are not comparable with those of this run; None if they are.

        Args:
            saved: ``protocols``, and fingerprint ``images``, of the resumed run.
        """
        if self._validation["images"] is None:
            return "this run validates no images"
        if saved["protocols"] != self._validation["protocols"]:
            return f"--protocol {self._validation['protocols']} differs from {saved['protocols']} of the checkpoint"
        if saved["images"] != self._validation["images"]:
            return "the validation images differ from those of the checkpoint"
        return None

    def _copy(self, state: dict[str, Any], resumed_from: Any) -> str | None:
        """Copy the best checkpoint to this run, even from a run whose folder was moved; return the problem, or None.

        Args:
            state: State of this callback in the checkpoint that is resumed.
            resumed_from: Path of that checkpoint.
        """
        saved = Path(state["best_model_path"])
        score = float(state["best_model_score"])
        candidates = (saved, Path(str(resumed_from)).with_name(saved.name), self.file)
        files = [path for path in candidates if path.is_file()]
        for path in files:
            if self._score_of(path) == score:
                if path.resolve() != self.file.resolve():
                    with write_whole(self.file) as temporary:
                        shutil.copyfile(path, temporary)
                return None
        problem = "was overwritten by a later epoch" if files else "no longer exists"
        return f"{saved} (score {score:.2f}) {problem}"

    def _score_of(self, path: Path) -> float | None:
        """Return the best score that a checkpoint records; None if it cannot be read or records none."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return float(content["callbacks"][self.state_key]["best_model_score"])
        except (*READ_ERRORS, TypeError):
            return None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save as ``ModelCheckpoint`` does, unless validation is disabled: without a score, none is the best."""
        if trainer.enable_validation:
            super().on_train_epoch_end(trainer, pl_module)
