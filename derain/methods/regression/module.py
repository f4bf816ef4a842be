"""Lightning module that trains a network by losses between its outputs and their targets, with one optimiser."""

import importlib
import inspect
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NotRequired, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.files.metadata import Metadata, shorten
from derain.files.weights import BUILD_ERRORS, Content
from derain.methods import registry
from derain.methods.base import DerainModule
from derain.methods.resuming import LENGTHS
from derain.networks import NETWORKS
from derain.networks.base import Network
from derain.nn.losses import LOSSES, load_vgg
from derain.nn.schedule import multiplied_at, warm_up_then_cosine

log = logging.getLogger("derain")

LossWeights = dict[str, dict[str, float]]
"""Weights of losses, by output and loss: ``{"derained": {"l1": 1.0}}``."""

SCHEDULES = {
    "constant": frozenset[str](),
    "cosine": frozenset({"warm_up", "hold", "minimum"}),
    "milestones": frozenset({"milestones", "decay"}),
}
"""Options of derain's own schedules, by name of the schedule."""


class RegressionMetadata(Metadata):
    """Metadata of a `RegressionModule`.

    Attributes:
        title: Name of the network's class.
    """

    title: NotRequired[str]


class RegressionModule(DerainModule):
    """Network that is trained by losses between its outputs and their targets: the clean image by default.

    Args:
        network: Class of the network: the name of a class in `derain.networks`, such as ``DRSformer``; or the path of
            any ``nn.Module`` that maps rainy images ``(b, 3, h, w)`` in [0, 1] to derained images, such as
            ``my_network.MyNetwork``.
        network_options: Arguments of the class; None: its defaults.
        loss: Name of a loss in `derain.nn.losses` for the derained image; or weights by output and loss, such as
            ``{derained: {charbonnier: 1, edge: 0.05}}``. The docstring of a network names its outputs.
        optimizer: Class of the optimiser: a name in ``torch.optim``, such as ``Adam``, or the path of another class.
        learning_rate: Learning rate of the optimiser.
        optimizer_options: Further arguments of the optimiser.
        schedule: Schedule of the learning rate: ``constant``; ``cosine``, stepped by optimiser step; ``milestones``,
            stepped by epoch; a name in ``torch.optim.lr_scheduler``, such as ``StepLR``, except ``ReduceLROnPlateau``;
            or the path of another class that derives from ``LRScheduler``.
        schedule_options: For ``cosine``: ``warm_up`` and ``hold``, fractions of the training, and ``minimum``, the
            final learning rate; all 0 by default. For ``milestones``: the epochs ``milestones`` and the factor
            ``decay``, both required. For a class: its arguments, and ``interval``, which is ``epoch`` (default) or
            ``step``. The arguments ``T_max``, ``total_steps`` and ``total_iters`` of PyTorch's schedules default to
            the length of the training.

    Raises:
        DerainError: If an option is unknown or out of its range, or there is no such network.
    """

    bounded_by_file: ClassVar[bool] = True
    metadata_schema: ClassVar[Any] = RegressionMetadata
    published_options: ClassVar[frozenset[str]] = frozenset(
        {"iterations", "repeats", "grids", "window", "heads", "intra_heads", "decoder_heads", "selected"}
    )
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        path.rpartition(".")[2]: {"network": path.rpartition(".")[2]} for path in NETWORKS
    }
    may_change = DerainModule.may_change | {"schedule_options", "optimizer_options"}

    def __init__(
        self,
        network: str = "NLEDN",
        network_options: dict[str, Any] | None = None,
        loss: str | LossWeights = "l1",
        optimizer: str = "Adam",
        learning_rate: float = 1e-4,
        optimizer_options: dict[str, Any] | None = None,
        schedule: str = "cosine",
        schedule_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.loss: LossWeights = {"derained": {loss: 1.0}} if isinstance(loss, str) else loss
        _check_losses(self.loss)
        self.optimizer, self.optimizer_options = optimizer, dict(optimizer_options or {})
        if "lr" in self.optimizer_options:
            raise DerainError("--model.optimizer_options lr: use --model.learning_rate")
        self.schedule, self.schedule_options = schedule, dict(schedule_options or {})
        _check_schedule(schedule, self.schedule_options, learning_rate)
        network_class = find_network(network)
        self.network = build_network(network_class, network_options or {})
        if isinstance(self.network, Network):
            self.bytes_per_pixel = self.network.bytes_per_pixel
            self.tile_multiple = self.network.tile_multiple

    @property
    def title(self) -> str:
        """Name of the network's class."""
        return type(self.network).__name__

    def metadata(self) -> dict[str, Any]:
        """Return the metadata with the title."""
        return {**super().metadata(), "title": self.title}

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restore images in [0, 1] of any size."""
        return cast(Tensor, self.network(rainy))

    @classmethod
    def from_content(cls, path: Path, content: Content) -> "RegressionModule":
        """Build the module from a checkpoint or a weights file of derain, in eval mode.

        Raises:
            DerainError: If the content does not fit, if weights are not finite, or if `check_trusted` refuses the file.
        """
        cls.check_trusted(path, content.metadata["hyper_parameters"])
        try:
            return cast("RegressionModule", super().from_content(path, content))
        except DerainError as error:
            if str(path) in str(error):
                raise
            raise DerainError(f"{path}: {error}") from error

    @classmethod
    def check_trusted(cls, path: Path, hyper_parameters: Mapping[str, Any]) -> None:
        """Refuse a file whose network is neither derain's nor named by the user, since loading would import its code.

        Raises:
            DerainError: If the user must name the class of the network first.
        """
        name = hyper_parameters.get("network", "")
        trusted = {"", *network_paths(), *NETWORKS}
        if not isinstance(name, str) or (name not in trusted and not registry.is_named(name)):
            raise DerainError(
                f"{path}: was written with the network {shorten(name, 100)}, which derain does not have; if you trust "
                f"it, add --method {shorten(name, 100)} (fit, validate, test and predict: --model.network)"
            )

    def required_class(self) -> str | None:
        """Return the path of a network from outside derain, which commands require as ``--method``; else None."""
        name = str(self.hparams["network"])
        return None if name in {*network_paths(), *NETWORKS} else name

    @classmethod
    def from_published(
        cls, state: Mapping[str, Tensor], path: Path | None = None, **options: Any
    ) -> "RegressionModule | None":
        """Return the method with a network and its authors' weights, or None for unknown tensors.

        The names of the tensors determine the network.

        Raises:
            DerainError: If the tensors resemble those of a network but do not fit it, or an option is unknown.
        """
        for name in network_paths():
            network_class = cast(type[Network], find_network(name))
            network_options = network_class.options_of(state)
            if network_options is None:
                continue
            unknown = sorted(set(options) - network_class.published_options)
            if unknown:
                expected = ", ".join(sorted(network_class.published_options)) or "none"
                raise DerainError(f"{path}: option {unknown[0]}: unknown for {name}; expected {expected}")
            try:
                module = cls(network=name, network_options=network_options | network_class.assume(path, options))
                module.network.load_state_dict(network_class.translate(state), strict=True)
            except (DerainError, *BUILD_ERRORS) as error:
                raise DerainError(
                    f"{path}: resembles {name}, but does not fit it ({shorten(error, 200)}); use a file of its authors"
                ) from error
            return module
        return None

    def prepare_data(self) -> None:
        """Find or download the weights of the perceptual loss, if training needs them.

        Raises:
            DerainError: If they are not available.
        """
        if self.is_fitting and any("perceptual" in weights for weights in self.loss.values()):
            load_vgg()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the weighted sum of the losses of all outputs, and log it; see `log_terms`."""
        outputs, targets = self.outputs_and_targets(batch["rainy"], batch["clean"])
        return self.log_terms(self.loss_terms(outputs, targets), batch)

    def loss_terms(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted losses of the outputs; their names are ``OUTPUT_LOSS``, such as ``derained_l1``.

        Args:
            outputs: Outputs of the network by name.
            targets: Target of each output.

        Raises:
            DerainError: If an output and its target differ in shape, except for the loss ``mean``.
        """
        terms = {}
        for output, weights in self.loss.items():
            for name, weight in weights.items():
                term = _loss(name, outputs[output], targets[output], f"--model.loss {output}.{name}")
                terms[f"{output}_{name}"] = weight * term
        return terms

    def log_terms(self, terms: Mapping[str, Tensor], batch: PairBatch) -> Tensor:
        """Log weighted losses and return their sum.

        The sum is logged as ``train/loss``; each loss as ``train/NAME``, if there are several.

        Args:
            terms: Weighted losses by name.
            batch: The batch, for its size.
        """
        loss = torch.stack(list(terms.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["name"]))
        if len(terms) > 1:
            self.log_dict({f"train/{name}": term for name, term in terms.items()}, batch_size=len(batch["name"]))
        return loss

    def on_after_backward(self) -> None:
        """After the first batch, report parameters without a gradient.

        Raises:
            DerainError: If a parameter has no gradient, and `refuse_plain_ddp` refuses the strategy.
        """
        if self.trainer.global_step or self.trainer.fit_loop.epoch_loop.total_batch_idx:
            return
        named = self.network.named_parameters()
        idle = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
        if idle:
            self.refuse_plain_ddp(f"the loss does not depend on {idle[0]}")
            log.warning("%s: the loss does not depend on %d parameters, such as %s", self.title, len(idle), idle[0])

    def outputs_and_targets(
        self, rainy: Float[Tensor, "b 3 h w"], clean: Float[Tensor, "b 3 h w"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the outputs of the network and their targets, by name.

        Args:
            rainy: Rainy images in [0, 1].
            clean: Clean images in [0, 1].

        Raises:
            DerainError: If the loss names an output that does not exist or has no target.
        """
        if isinstance(self.network, Network):
            outputs = self.network.outputs(rainy)
            targets = self.network.targets(rainy, clean, outputs)
        else:
            outputs, targets = {"derained": self.network(rainy)}, {"derained": clean}
        expected = [name for name in outputs if name in targets]
        unknown = sorted(set(self.loss) - set(expected))
        if unknown:
            raise DerainError(
                f"--model.loss {unknown[0]}: {self.title} has no such output, or no target for it; expected "
                f"{', '.join(expected)}"
            )
        return outputs, targets

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and the schedule of its learning rate unless that is constant.

        Raises:
            DerainError: If there is no such class, a class does not accept its options, or the schedule needs the
                length of the training, which is not set.
        """
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        options = {"lr": self.learning_rate, **self.optimizer_options}
        optimizer_class = _import(self.optimizer, "torch.optim", torch.optim.Optimizer, "optimizer")
        optimizer = _build_with_options(optimizer_class, trained, options, "optimizer_options")
        if self.schedule == "constant":
            return optimizer
        scheduler, interval = self._scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> tuple[Any, str]:
        """Return the schedule and its interval, ``step`` or ``epoch``."""
        options = dict(self.schedule_options)
        if self.schedule == "cosine":
            minimum = options.get("minimum", 0.0) / self.learning_rate
            curve = warm_up_then_cosine(self.steps, options.get("warm_up", 0.0), minimum, options.get("hold", 0.0))
            return torch.optim.lr_scheduler.LambdaLR(optimizer, curve), "step"
        if self.schedule == "milestones":
            factor = multiplied_at(options["milestones"], options["decay"])
            return torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "epoch"
        interval = options.pop("interval", "epoch")
        schedule_class = _import(self.schedule, "torch.optim.lr_scheduler", torch.optim.lr_scheduler.LRScheduler)
        lengths = LENGTHS if "epochs" not in options else ()  # OneCycleLR accepts epochs instead of total_steps
        for name in lengths:
            if name in inspect.signature(schedule_class).parameters and name not in options:
                length = self.steps if interval == "step" else self.trainer.max_epochs
                if not length or length < 0:
                    raise DerainError(
                        f"--model.schedule {self.schedule}: {name} is unknown without --trainer.max_epochs; set that, "
                        f"or {name} or interval: step in --model.schedule_options"
                    )
                options[name] = length
                log.info("%s: %s = %s, the length of the training", self.schedule, name, length)
        return _build_with_options(schedule_class, optimizer, options, "schedule_options"), interval


def _loss(name: str, output: Tensor, target: Tensor, option: str) -> Tensor:
    """Return a loss, computed in float32 or wider.

    Args:
        name: Name of the loss.
        output: Output of the network.
        target: Target of the output; the loss ``mean`` ignores it.
        option: Option that names the loss, for messages.

    Raises:
        DerainError: If output and target differ in shape, which broadcasting would hide; not for the loss ``mean``.
    """
    if name != "mean" and output.shape != target.shape:
        raise DerainError(
            f"{option}: the output has shape {tuple(output.shape)}, its target {tuple(target.shape)}; expected equal "
            "shapes; use mean for an output that is a loss itself"
        )
    return LOSSES[name](output.to(torch.promote_types(output.dtype, torch.float32)), target)


def network_paths() -> dict[str, str]:
    """Return the paths of derain's network classes by class name."""
    return {path.rpartition(".")[2]: path for path in NETWORKS}


def find_network(name: str) -> type[nn.Module]:
    """Return the class of a network.

    Args:
        name: Name of a class in `derain.networks`, or the path of any class; importing the class runs its code.

    Raises:
        DerainError: If there is no such class.
    """
    paths = network_paths()
    if name in paths:
        module, _, attribute = paths[name].rpartition(".")
        return cast(type[nn.Module], getattr(importlib.import_module(module), attribute))
    if "." not in name:
        raise DerainError(
            f"--model.network {name}: expected {', '.join(paths)}, or a path such as my_network.MyNetwork"
        )
    return cast(type[nn.Module], registry.import_class(name, "--model.network", nn.Module))


def build_network(network_class: type[nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """Build a network.

    Args:
        network_class: Class of the network.
        options: Arguments of the class, as in ``network_options``.

    Raises:
        DerainError: If the class has no such argument, or a class of derain refuses a value.
    """
    known = inspect.signature(network_class).parameters
    unknown = sorted(set(options) - set(known))
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        expected = ", ".join(known) or "none"
        raise DerainError(
            f"--model.network_options {unknown[0]}: unknown for {network_class.__name__}; expected {expected}"
        )
    return network_class(**options)


def _build_with_options(class_: Any, first: Any, options: Mapping[str, Any], option: str) -> Any:
    """Build an optimiser or a schedule.

    Args:
        class_: Class of the optimiser or schedule.
        first: First argument: the parameters, or the optimiser.
        options: Further arguments.
        option: Option that contains the further arguments, for messages.

    Raises:
        DerainError: If the class does not accept the arguments.
    """
    try:
        return class_(first, **options)
    except BUILD_ERRORS as error:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        raise DerainError(f"--model.{option}: {class_.__name__} does not accept {given} ({shorten(error)})") from error


def _import(name: str, package: str, base: Any, option: str = "schedule") -> Any:
    """Return the class of an optimiser or a schedule.

    Args:
        name: Path of the class; without dots, the name of a class in ``package``.
        package: Package of PyTorch, such as ``torch.optim``.
        base: Class that the class must derive from.
        option: Option that contains the name, for messages.

    Raises:
        DerainError: If there is no such class.
    """
    return registry.import_class(name if "." in name else f"{package}.{name}", f"--model.{option}", base)


def _check_losses(loss: LossWeights) -> None:
    if not loss or not all(loss.values()):
        raise DerainError(f"--model.loss {loss}: expected a loss, such as l1, or {{derained: {{l1: 1}}}}")
    for output, weights in loss.items():
        if not isinstance(weights, Mapping):
            raise DerainError(f"--model.loss {output}: {weights}: expected weights by loss, such as {{l1: 1}}")
        for name, weight in weights.items():
            if name not in LOSSES:
                raise DerainError(f"--model.loss {output}.{name}: expected one of {', '.join(LOSSES)}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise DerainError(f"--model.loss {output}.{name} {weight}: expected a number, its weight")


def _check_schedule(name: str, options: Mapping[str, Any], learning_rate: float) -> None:
    if name not in SCHEDULES:
        _check_schedule_class(name, options)
        return
    unknown = sorted(set(options) - SCHEDULES[name])
    if unknown:
        expected = ", ".join(sorted(SCHEDULES[name])) or "no options"
        raise DerainError(f"--model.schedule_options {unknown[0]}: unknown for {name}; expected {expected}")
    numbers = {option: value for option, value in options.items() if option != "milestones"}
    for option, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise DerainError(f"--model.schedule_options {option} {value}: expected a number of at least 0")
    if name == "milestones":
        epochs = options.get("milestones")
        if "decay" not in options or not isinstance(epochs, list | tuple) or not all(type(n) is int for n in epochs):
            raise DerainError(
                f"--model.schedule_options {dict(options)}: expected milestones (a list of epochs) and decay (a factor)"
            )
    if numbers.get("warm_up", 0) + numbers.get("hold", 0) >= 1:
        raise DerainError(f"--model.schedule_options {dict(options)}: expected warm_up and hold with a sum below 1")
    if numbers.get("minimum", 0) > learning_rate:
        raise DerainError(
            f"--model.schedule_options minimum {numbers['minimum']}: expected at most --model.learning_rate "
            f"{learning_rate}"
        )


def _check_schedule_class(name: str, options: Mapping[str, Any]) -> None:
    if "." not in name and not hasattr(torch.optim.lr_scheduler, name):
        raise DerainError(
            f"--model.schedule {name}: expected {', '.join(SCHEDULES)}, a class of torch.optim.lr_scheduler, or the "
            "path of a class"
        )
    if name.endswith("ReduceLROnPlateau"):
        raise DerainError(
            f"--model.schedule {name}: depends on validation scores; expected a schedule that depends on step or epoch"
        )
    if options.get("interval", "epoch") not in {"step", "epoch"}:
        raise DerainError(f"--model.schedule_options interval {options['interval']}: expected step or epoch")
