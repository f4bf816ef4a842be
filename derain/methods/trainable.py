"""Base class of everything that derain trains: its checkpoints and weights files contain metadata."""

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
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
from derain.files import hub, weights
from derain.files.limits import built_within
from derain.files.metadata import Metadata, check, shorten
from derain.methods.divergence import FiniteCheck, require_finite
from derain.methods.hyper_parameters import check_hyper_parameters
from derain.methods.interfaces import Explains, Routed, Sampled
from derain.methods.registry import class_path, find, is_importable, must_be_named
from derain.methods.resuming import use_configured

log = logging.getLogger("derain")

FORMER_NAMES = {
    "begin_from": "start_from",
    "check": "fetch_requirements",
    "describe": "metadata",
    "check_requirements": "fetch_requirements",
    "judged_by": "monitor",
    "next_step": "usage_hint",
    "perceive": "encode",
    "recall": "restore_metadata",
    "resuming": "is_fitting",
    "sample_by": "set_sampling",
    "samples": "derain.methods.interfaces.Sampled",
    "take_route": "set_route",
}
"""Names of methods and attributes before 0.1, and what to use instead."""

INTERFACES = {
    "describe_image": Explains,
    "explain": Explains,
    "set_route": Routed,
    "set_sampling": Sampled,
}
"""Methods that have an effect only if the class derives from an interface, and that interface."""


class TrainableModule(LightningModule, ModelHubMixin, library_name="derain", tags=["image-deraining"]):
    """LightningModule whose checkpoints and weights files record how to rebuild it.

    A subclass declares its hyper-parameters as typed ``__init__`` arguments with the paper's values as defaults and
    calls ``self.save_hyperparameters()``. ``save_pretrained`` and ``push_to_hub`` write what ``from_pretrained`` loads.

    Attributes:
        network: The module that is trained, averaged (EMA), compiled and saved in weights files.
        trained_on: Names of the training sets, set when training starts or a file is loaded.
        monitor: Logged validation metric that selects the best checkpoint; higher is better.
        may_change: Names of hyper-parameters that may differ when a run is resumed: they change how a network is
            trained, not what it computes.
        metadata_schema: TypedDict that the metadata of files must fit; values of keys that it lacks are not checked.
        bounded_by_file: Whether `limits` limits the size of networks that are built from a file, so that a hostile
            file cannot exhaust memory. Must be false if ``__init__`` also builds large networks that are not in weights
            files, such as CLIP.
        published_options: Names of the options that `from_published` accepts.
        needs_unlabelled: Whether training batches must contain ``unlabelled``, rainy images without ground truth: the
            data module then requires ``--data.unlabelled``.
        initial_weights: Files from which ``__init__`` loaded weights, by name of the argument.

    Raises:
        DerainError: When a subclass is defined that uses a name from before 0.1, or a method of an interface without
            deriving from the interface.
    """

    network: nn.Module
    trained_on: tuple[str, ...] = ()
    monitor: ClassVar[str]
    may_change: ClassVar[frozenset[str]] = frozenset(
        {"learning_rate", "weight_decay", "warm_up", "milestones", "decay"}
    )
    metadata_schema: ClassVar[Any] = Metadata
    bounded_by_file: ClassVar[bool] = False
    published_options: ClassVar[frozenset[str]] = frozenset()
    needs_unlabelled: ClassVar[bool] = False
    initial_weights: Mapping[str, str] = {}
    _resumed: Mapping[str, Any] | None = None
    """Entries ``position`` (of the loggers) and ``gradients`` of the resumed checkpoint, until training starts."""
    _changed: tuple[str, ...] = ()
    """Names of hyper-parameters that differ from those of the resumed checkpoint."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for former, name in FORMER_NAMES.items():
            if hasattr(cls, former):
                raise DerainError(f"{cls.__name__}.{former}: has no effect; expected {name}; use that instead")
        for name, interface in INTERFACES.items():
            if hasattr(cls, name) and not issubclass(cls, interface):
                raise DerainError(
                    f"{cls.__name__}.{name}: has no effect without its interface; also derive the class from "
                    f"derain.methods.interfaces.{interface.__name__}"
                )

    def __init__(self) -> None:
        super().__init__()
        self.finite = FiniteCheck()

    @property
    def title(self) -> str:
        """Name of the method in messages and tables; by default the name of the class."""
        return type(self).__name__

    @property
    def is_fitting(self) -> bool:
        """Whether the trainer's current or last call is ``fit``."""
        return self._trainer is not None and self._trainer.state.fn == "fit"

    @property
    def steps(self) -> int:
        """Number of optimiser steps of the whole training.

        Raises:
            DerainError: If the trainer limits neither epochs nor steps.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise DerainError(
                f"{type(self).__name__}: the schedule requires a limited training; set --trainer.max_epochs or "
                "--trainer.max_steps"
            )
        return int(steps)

    @property
    def parameter_count(self) -> int:
        """Number of trainable parameters of the network."""
        return sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)

    # Metadata and weights.

    def metadata(self) -> dict[str, Any]:
        """Return what files record: class, hyper-parameters, training sets and version of derain.

        Raises:
            TypeError: If JSON cannot represent a hyper-parameter.
        """
        hyper_parameters = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        metadata = {
            "method": type(self).__name__,
            "class_path": class_path(type(self)),
            "hyper_parameters": hyper_parameters,
            "trained_on": self.trained_on,
            "version": derain.__version__,
        }
        as_read_from_file = json.loads(json.dumps(metadata))  # lists instead of tuples
        return cast(dict[str, Any], as_read_from_file)

    def restore_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Restore ``trained_on`` from the metadata of a file.

        A subclass that adds entries to `metadata` overrides this method to restore them.
        """
        self.trained_on = tuple(metadata.get("trained_on", ()))

    def start_from(self, loaded: "TrainableModule") -> None:
        """Adopt records of the training that produced the initial weights; by default, do nothing.

        Args:
            loaded: Method whose weights training starts from.
        """

    def usage_hint(self, path: Path, option: str) -> str:
        """Return what to do with the weights of a finished training, in one line.

        Args:
            path: The weights file.
            option: ``--method CLASS_PATH`` if commands need it to load the file, else empty.
        """
        return f"load them: {type(self).__name__}.from_pretrained({str(path)!r})"

    def save_weights(self, path: str | Path) -> None:
        """Write the weights of the network, with metadata, as a safetensors file.

        If another process cannot import the class, log a warning that says how to load the file.
        """
        weights.save(self.network.state_dict(), self.metadata(), Path(path))
        if not is_importable(class_path(type(self))):
            name = type(self).__name__
            log.warning(
                "%s: %s is defined in a script or notebook; load the file by Restorer(file, method=%s), or move the "
                "class to a module to use it in commands",
                path,
                name,
                name,
            )

    @classmethod
    def limits(cls, tensors: int, elements: int) -> AbstractContextManager[None]:
        """Return a context that limits the size of the networks that are built in it, if ``bounded_by_file`` is true.

        A network that is too large raises ValueError, see `built_within`.

        Args:
            tensors: Number of tensors in the file.
            elements: Number of elements in the file, or an upper bound, such as its size in bytes.
        """
        return built_within(tensors, elements) if cls.bounded_by_file else nullcontext()

    @classmethod
    def from_published(
        cls, state: Mapping[str, Tensor], path: Path | None = None, **options: Any
    ) -> "TrainableModule | None":
        """Return the method with the weights of its authors, or None if the state dict is not theirs.

        By default, return None.

        Args:
            state: Tensors by the authors' names.
            path: The file, whose folder may determine options that the tensors do not; None if unknown.
            **options: Values of ``published_options`` that the user specified as ``FILE:name=value``.
        """
        return None

    @classmethod
    def check_trusted(cls, path: Path, hyper_parameters: Mapping[str, Any]) -> None:
        """Check that the hyper-parameters of a file do not cause an import of code that the user has not named.

        This method checks nothing. A subclass whose hyper-parameters name classes overrides it, and calls it in
        `from_content`.

        Args:
            path: The file, for messages.
            hyper_parameters: Hyper-parameters from the file.

        Raises:
            DerainError: If the user must name a class first.
        """

    def required_class(self) -> str | None:
        """Return the class path that commands require as ``--method`` to load the weights; None: not required."""
        return class_path(type(self)) if must_be_named(type(self)) else None

    @classmethod
    def from_content(cls, path: Path, content: weights.Content) -> "TrainableModule":
        """Build the module from a checkpoint or a weights file of derain, in eval mode.

        Args:
            path: The file.
            content: Result of `derain.files.weights.read`, with metadata.

        Raises:
            DerainError: If the content does not fit the class, or has weights that are not finite.
        """
        metadata, state = content.metadata, content.state
        check(path, metadata, cls.metadata_schema, cls)
        try:
            with cls.limits(len(state), path.stat().st_size):
                module = cls(**metadata["hyper_parameters"])
            module.network.load_state_dict(state, strict=True)
            module.restore_metadata(metadata)
        except weights.BUILD_ERRORS as error:
            reason = shorten(error, 300) or type(error).__name__
            raise DerainError(
                f"{path}: does not fit {cls.__name__} of derain {derain.__version__} ({reason}); it was written by "
                f"derain {shorten(metadata.get('version'), 40)}; use that version, or another file"
            ) from error
        weights.check_network(path, module.network, state)
        return module.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights file of a hub repository; called by ``save_pretrained`` and ``push_to_hub``."""
        self.save_weights(save_directory / hub.METHOD_FILE)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, *, revision: str | None = None, cache_dir: str | None = None, token: str | None = None
    ) -> "TrainableModule":
        """Load a module from the Hugging Face hub or from disk, in eval mode.

        ``DerainModule.from_pretrained`` loads any known method that restores images. ``MyModule.from_pretrained`` loads
        ``MyModule``, which need not be known, and its known subclasses.

        Args:
            name: Id on the hub (``OWNER/NAME``), a folder that ``save_pretrained`` wrote, or a checkpoint or weights
                file of derain.
            revision: Branch, tag or commit on the hub; by default the main branch.
            cache_dir: Folder for files of the hub; by default the cache of huggingface_hub.
            token: Access token for private repositories.

        Raises:
            DerainError: If the weights are of another or unknown method, have no metadata of derain, cannot be fetched
                or are damaged.
        """
        file = Path(name)
        if file.is_dir():
            file = file / hub.METHOD_FILE
        elif not file.is_file():
            file = hub.fetch_weights(str(name), revision=revision, cache_dir=cache_dir, token=token)
        content = weights.read(file)
        if not content.metadata:
            raise DerainError(
                f"{name}: has no metadata of derain; load it by Restorer or derain.methods.catalog.load instead"
            )
        written_by = content.metadata["method"]
        method = cls if cls.__name__ == written_by else find(file, content.metadata)
        if not issubclass(method, cls):
            raise DerainError(
                f"{name}: contains {method.__name__}, not {cls.__name__}; use {method.__name__}.from_pretrained"
            )
        return cast(TrainableModule, method.from_content(file, content))

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metadata and, if `is_fitting`, the state of the loggers and accumulated gradients.

        Raises:
            DerainError: If `is_fitting`, and weights, EMA weights or accumulated gradients are not finite. With
                precision ``16-mixed``, which scales the loss, gradients are not checked.
        """
        checkpoint["derain"] = self.metadata()
        if not self.is_fitting:
            return
        checkpoint["position"] = loops.logging_state(self.trainer)
        gradients = self._accumulated_gradients()
        if gradients:
            checkpoint["gradients"] = gradients
        average = checkpoint.get("ema", {"network": {}})["network"]
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # scaled gradients may overflow
        checked_gradients = () if scaled else gradients.values()
        require_finite(self, [*self.parameters(), *average.values(), *checked_gradients], "weights are")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the metadata; ``fit`` resumes with the raw weights, other stages use EMA weights if there are any.

        Raises:
            DerainError: If training cannot resume: the run was started with another method, with another value of a
                hyper-parameter that is not in ``may_change``, or with an EMA callback that is not configured now.
        """
        if self.is_fitting:
            self._resume(checkpoint)
        self.restore_metadata(checkpoint.get("derain", {}))
        if "ema" not in checkpoint:
            return
        if not self.is_fitting:
            averaged = {f"network.{name}": value for name, value in checkpoint["ema"]["network"].items()}
            checkpoint["state_dict"] |= averaged
        elif not any(hasattr(callback, "average") for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise DerainError(
                "cannot resume: the checkpoint has averaged weights (EMA), but no EMA callback is configured; "
                "configure it as in the resumed run"
            )

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        """Compare hyper-parameters, and prepare loops, data and schedules for the position of a checkpoint."""
        self._compare(checkpoint.get("derain", {}))
        position = loops.correct_counters(checkpoint["loops"])
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "resume_at"):
            data.resume_at(position)
        for schedule in checkpoint["lr_schedulers"]:
            # LambdaLR expects this entry, which old checkpoints of a MultiStepLR lack.
            schedule.setdefault("lr_lambdas", [None] * len(schedule["base_lrs"]))
        self._resumed = {name: checkpoint[name] for name in ("position", "gradients") if name in checkpoint}

    def _compare(self, saved: Mapping[str, Any]) -> None:
        """Refuse another method or hyper-parameters that must not change; log those that may, if they differ."""
        configured = self.metadata()
        method = saved.get("method", configured["method"])
        if method != configured["method"]:
            raise DerainError(
                f"--model {configured['method']}: cannot resume; the run was started with {method}; use that method"
            )
        old, new = saved.get("hyper_parameters", {}), configured["hyper_parameters"]
        changed = [name for name, value in new.items() if old.get(name, value) != value]
        self._changed = tuple(changed)
        for name in changed:
            if name not in self.may_change:
                raise DerainError(
                    f"--model.{name} {new[name]}: cannot resume; the run was started with {old[name]}; use that value"
                )
        if changed:
            differences = ", ".join(f"{name} {old[name]} → {new[name]}" for name in changed)
            log.info("options that differ from those of the resumed run: %s", differences)

    def _accumulated_gradients(self) -> dict[str, Tensor]:
        """Return gradients to which further batches are added before the next step; with manual optimisation, all."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        accumulating = progress.processed % self.trainer.accumulate_grad_batches != 0
        if self.automatic_optimization and not accumulating:
            return {}
        return {name: parameter.grad for name, parameter in self.named_parameters() if parameter.grad is not None}

    # Training.

    def setup(self, stage: str) -> None:
        """Check types and ranges of the hyper-parameters before training.

        Raises:
            DerainError: If a hyper-parameter is of a wrong type, not finite or out of range.
        """
        if stage == "fit":
            hyper_parameters = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
            check_hyper_parameters(type(self), hyper_parameters)

    def on_fit_start(self) -> None:
        """Record the names of the training sets for the metadata."""
        data = getattr(self.trainer, "datamodule", None)
        self.trained_on = tuple(getattr(data, "train_sets", ()))

    def on_train_start(self) -> None:
        """If a run is resumed, restore accumulated gradients and loggers, and apply the options of the present run.

        Raises:
            DerainError: If a schedule cannot resume with a changed option or training length.
        """
        if self._resumed is None:
            return
        use_configured(self.trainer, self._changed)
        for name, gradient in self._resumed.get("gradients", {}).items():
            self.get_parameter(name).grad = gradient.to(self.device)
        if "position" in self._resumed:
            loops.restore_position(self.trainer, self._resumed["position"])
        self._resumed = None

    def refuse_plain_ddp(self, reason: str) -> None:
        """Refuse DDP that expects a gradient for every parameter.

        Args:
            reason: Why some parameters have no gradient, for the message.

        Raises:
            DerainError: If the trainer uses DDP without ``find_unused_parameters``.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise DerainError(
                f"--trainer.strategy ddp: {reason}; use --trainer.strategy ddp_find_unused_parameters_true"
            )

    # Losses and gradients that are not finite stop the training.

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Record the names of a batch's images for error messages."""
        self.finite.record_batch(batch)

    def on_before_backward(self, loss: Tensor) -> None:
        """Record a loss, which is checked before the next optimiser step."""
        self.finite.record_loss(loss)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients.

        Raises:
            DerainError: If ``detect_anomaly`` finds NaN in a gradient; the message names the images.
        """
        try:
            super().backward(loss, *args, **kwargs)
        except RuntimeError as error:
            self.finite.refuse_anomaly(self, error)
            raise

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Check losses and gradients before they reach the weights.

        Raises:
            DerainError: If one is not finite, see `FiniteCheck.check`.
        """
        self.finite.check(self, optimizer)
