"""What everything that derain trains has in common: files that say what they are."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

from huggingface_hub import ModelHubMixin
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

import derain
from derain import loops
from derain.errors import DerainError
from derain.methods.divergence import FiniteCheck, require_finite
from derain.methods.hyper_parameters import check_hyper_parameters
from derain.methods.metadata import Metadata
from derain.methods.resuming import use_configured

log = logging.getLogger("derain")


class DescribedModule(LightningModule, ModelHubMixin, library_name="derain", tags=["image-deraining"]):
    """A LightningModule with one ``network``, whose checkpoints and files of weights describe themselves.

    ``from_pretrained`` takes a hub's id or a directory; ``save_pretrained`` and ``push_to_hub`` write what it takes.

    A subclass declares its hyper-parameters as typed ``__init__`` arguments with the paper's values as defaults and
    calls ``self.save_hyperparameters()``.

    Attributes:
        network: What is trained, averaged, saved as weights and compiled.
        trained_on: Names of the training sets, told by the data when training starts.
        metadata_schema: TypedDict of the metadata, with every key that a subclass adds to ``describe``.
        judged_by: The logged validation metric, higher is better, that names the best checkpoint.
        may_change: Hyper-parameters that may be set otherwise when a run goes on: they change how a network is trained,
            not what it computes, or are compared in another way.
    """

    network: nn.Module
    trained_on: tuple[str, ...] = ()
    metadata_schema: ClassVar[Any] = Metadata
    _resumed: Mapping[str, Any] | None = None  # of the checkpoint that is resumed, until training starts
    _changed: tuple[str, ...] = ()  # options that differ from it
    judged_by: ClassVar[str]
    may_change: ClassVar[frozenset[str]] = frozenset(
        {"learning_rate", "weight_decay", "warm_up", "milestones", "decay"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.finite = FiniteCheck()

    def describe(self) -> dict[str, Any]:
        """What a file says of itself: method, hyper-parameters, training sets, version of derain."""
        told = {
            "method": type(self).__name__,
            "hyper_parameters": {k: v for k, v in self.hparams.items() if not k.startswith("_")},
            "trained_on": self.trained_on,
            "version": derain.__version__,
        }
        return cast(dict[str, Any], json.loads(json.dumps(told)))  # lists for tuples, as files give them back

    def recall(self, description: Mapping[str, Any]) -> None:
        """Takes back what ``describe`` said of what is no hyper-parameter."""
        self.trained_on = tuple(description.get("trained_on", ()))

    def begin_from(self, loaded: "DescribedModule") -> None:
        """Take over what the metadata of weights records of their training, when training starts from them."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the description, so that any derain command knows what the file holds, and the position."""
        checkpoint["derain"] = self.describe()
        if not self.resuming:
            return
        checkpoint["position"] = loops.describe(self.trainer)
        gradients = self._added_gradients()
        if gradients:
            checkpoint["gradients"] = gradients
        average = checkpoint.get("ema", {"network": {}})["network"]
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # its gradients may overflow
        added = () if scaled else gradients.values()
        require_finite(self, [*self.parameters(), *average.values(), *added], "weights are")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back the description; a run goes on with its average or not at all, all else takes the average.

        Raises:
            DerainError: If training would go on with another method, or without the average that the checkpoint holds.
        """
        if self.resuming:
            self._refuse_another(checkpoint.get("derain", {}))
            position = loops.settle(checkpoint["loops"])
            data: Any = getattr(self.trainer, "datamodule", None)
            if hasattr(data, "resume_at"):
                data.resume_at(position)
            for schedule in checkpoint["lr_schedulers"]:
                schedule.setdefault("lr_lambdas", [None] * len(schedule["base_lrs"]))  # of derain's earlier MultiStepLR
            self._resumed = {name: checkpoint[name] for name in ("position", "gradients") if name in checkpoint}
        self.recall(checkpoint.get("derain", {}))
        if "ema" not in checkpoint:
            return
        if not self.resuming:
            averaged = {f"network.{name}": value for name, value in checkpoint["ema"]["network"].items()}
            checkpoint["state_dict"] |= averaged
        elif not any(hasattr(callback, "average") for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise DerainError(
                "the checkpoint holds averaged weights (EMA), but no EMA callback is configured; configure it as in "
                "the run that is resumed"
            )

    def _refuse_another(self, description: Mapping[str, Any]) -> None:
        """Refuses to go on with a run of another method or network; tells what else was set otherwise."""
        now = self.describe()
        if (method := description.get("method", now["method"])) != now["method"]:
            raise DerainError(f"--model {now['method']}: this run began with {method}; give that one to go on")
        began, own = description.get("hyper_parameters", {}), now["hyper_parameters"]
        others = [name for name, value in own.items() if began.get(name, value) != value]
        self._changed = tuple(others)
        for name in others:
            if name not in self.may_change:
                told = f"--model.{name} {own[name]}: this run began with {began[name]}"
                raise DerainError(f"{told}; give that one to go on")
        if others:
            told = ", ".join(f"{name} {began[name]} → {own[name]}" for name in others)
            log.info("settings that differ from those that the run began with: %s", told)

    @property
    def resuming(self) -> bool:
        """Whether a checkpoint that is loaded now is trained on."""
        return self._trainer is not None and self._trainer.state.fn == "fit"

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training, whatever accumulation and devices.

        Raises:
            DerainError: If the training has no end to count to.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise DerainError(f"{type(self).__name__} schedules by its end: set --trainer.max_epochs or max_steps")
        return int(steps)

    @property
    def parameter_count(self) -> int:
        """Number of the network's trainable parameters."""
        return sum(p.numel() for p in self.network.parameters() if p.requires_grad)

    def _added_gradients(self) -> dict[str, Tensor]:
        """Gradients that are being added up over several batches."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        adding = not self.automatic_optimization or progress.processed % self.trainer.accumulate_grad_batches
        named = self.named_parameters() if adding else ()
        return {name: parameter.grad for name, parameter in named if parameter.grad is not None}

    def on_train_start(self) -> None:
        """Continue from the position of the checkpoint that is resumed, with the options of this run."""
        if self._resumed is None:
            return
        use_configured(self.trainer, self._changed)
        for name, gradient in self._resumed.get("gradients", {}).items():
            self.get_parameter(name).grad = gradient.to(self.device)
        if "position" in self._resumed:
            loops.begin(self.trainer, self._resumed["position"])
        self._resumed = None

    def setup(self, stage: str) -> None:
        """Refuse hyper-parameters that cannot be trained with or recorded, before the optimiser is built."""
        if stage == "fit":
            check_hyper_parameters(type(self), {k: v for k, v in self.hparams.items() if not k.startswith("_")})

    # What is not finite stops the training.

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; a NaN that ``detect_anomaly`` finds is refused as without it."""
        try:
            super().backward(loss, *args, **kwargs)
        except RuntimeError as error:
            self.finite.refuse_anomaly(self, error)
            raise

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note the images of a batch."""
        self.finite.see_batch(batch)

    def on_before_backward(self, loss: Tensor) -> None:
        """Note a loss."""
        self.finite.see_loss(loss)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Refuse losses and gradients that are not finite, before they reach the weights."""
        self.finite.require(self, optimizer)

    def on_fit_start(self) -> None:
        """Notes the names of the training sets for the files of weights."""
        self.trained_on = tuple(getattr(getattr(self.trainer, "datamodule", None), "train_sets", ()))

    def refuse_plain_ddp(self, why: str) -> None:
        """Refuses a strategy of several devices that waits for the gradients of all parameters.

        Args:
            why: They do not come.

        Raises:
            DerainError: If the trainer's is one.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise DerainError(f"--trainer.strategy ddp: {why}; use --trainer.strategy ddp_find_unused_parameters_true")

    def _save_pretrained(self, save_directory: Path) -> None:
        """Writes what the hub shall have; called by ``save_pretrained`` and ``push_to_hub``."""
        from derain.methods import hub, weights

        weights.save(self, save_directory / hub.METHOD)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, *, revision: str | None = None, cache_dir: str | None = None, token: str | None = None
    ) -> "DescribedModule":
        """Builds a method by what its file says of itself, in eval mode.

        Args:
            name: Id on the Hugging Face hub (``OWNER/NAME``) or a directory that ``save_pretrained`` wrote.
            revision: Branch, tag or commit on the hub.
            cache_dir: Where the hub's files are kept.
            token: For what is private there.

        Raises:
            DerainError: If it is of another method, cannot be had or is damaged.
        """
        from derain.methods import hub, weights

        if Path(name).is_dir():
            file = Path(name) / hub.METHOD
        else:
            file = hub.fetch_weights(str(name), revision=revision, cache_dir=cache_dir, token=token)
        module, note = weights.load(file)
        if not isinstance(module, cls):
            raise DerainError(f"{name}: {note}, no {cls.__name__}; use that class, or DerainModule for any method")
        return module
