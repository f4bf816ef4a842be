"""Checks of the contract of `derain.DerainModule`, for tests of methods in and outside derain.

Example:
    In ``test_my_method.py``::

        from derain.testing import check_method
        from my_method import MyModule

        def test_my_method():
            check_method(MyModule, channels=4)
"""

import importlib.util
import inspect
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.export import export
from derain.files.weights import read
from derain.methods.base import DerainModule
from derain.restoration import Restorer

log = logging.getLogger("derain")

SIZES = ((1, 1), (1, 5), (37, 31), (64, 48))
"""Image sizes (height, width) with which `check_forward` calls a method."""

TOLERANCE = 1e-5
"""Largest difference between results that count as equal, absolute and relative: ``t + t · max |expected|``."""


class ContractError(AssertionError):
    """Raised if a method breaks the contract of `derain.DerainModule`."""


def make_batch(count: int = 2, height: int = 16, width: int = 16, seed: int = 1) -> PairBatch:
    """Return a batch of random pairs, with bright spots as rain, and of random unlabelled images.

    Rainy, clean and unlabelled images are ``(count, 3, height, width)`` each, in [0, 1].

    Args:
        count: Number of pairs, and of unlabelled images.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        seed: Seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(count, 3, height, width, generator=generator)
    spots = torch.rand(count, 1, height, width, generator=generator) > 0.8
    batch = {
        "rainy": (clean + 0.3 * spots).clamp(0, 1),
        "clean": clean,
        "name": [f"{index}.png" for index in range(count)],
        "index": torch.arange(count),
        "unlabelled": torch.rand(count, 3, height, width, generator=generator),
        "unlabelled_name": [f"photo{index}.png" for index in range(count)],
    }
    return cast(PairBatch, batch)


def check_method(method: type[DerainModule], *, can_export: bool = True, **hyper_parameters: Any) -> None:
    """Check that a method keeps the contract of `derain.DerainModule`.

    The checks build the method several times, and train it with six batches, each of 2 pairs and 2 unlabelled images
    of 16×16 pixels. Choose hyper-parameters of a small network.

    Args:
        method: Class of the method.
        can_export: Whether to check the export as ONNX too. This check is skipped with a warning if onnx or onnxruntime
            is not installed.
        **hyper_parameters: Arguments of ``method``; omitted ones have their defaults.

    Raises:
        ContractError: If the method breaks the contract.
    """

    def build() -> DerainModule:
        torch.manual_seed(0)
        return method(**hyper_parameters).eval()

    check_hyper_parameters(method, hyper_parameters)
    check_forward(build())
    check_restoring(build())
    check_files(build())
    check_training(build())
    if not can_export:
        return
    missing = [package for package in ("onnx", "onnxruntime") if importlib.util.find_spec(package) is None]
    if missing:
        log.warning("%s: export as ONNX not checked: %s not installed", method.__name__, " and ".join(missing))
    else:
        check_export(build())


def check_hyper_parameters(method: type[DerainModule], hyper_parameters: dict[str, Any]) -> None:
    """Check the network and the hyper-parameters of a method.

    ``network`` must be a module. Each hyper-parameter must have a type and a default; its value must be recorded by
    ``save_hyperparameters`` and be representable as JSON.

    Args:
        method: Class of the method.
        hyper_parameters: Arguments of ``method``.

    Raises:
        ContractError: If a check fails.
    """
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(method.__init__).parameters.items()
        if name != "self" and parameter.kind not in variadic
    }
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty:
            raise ContractError(f"{method.__name__}.{name}: has no default; add one for weights files that lack it")
        if parameter.annotation is inspect.Parameter.empty:
            raise ContractError(f"{method.__name__}.{name}: has no type; add an annotation, to parse the option")
    module = method(**hyper_parameters)
    if not isinstance(getattr(module, "network", None), torch.nn.Module):
        raise ContractError(f"{method.__name__}.network: is not a torch.nn.Module; expected one with all weights")
    for name in dict.fromkeys((*parameters, *hyper_parameters)):
        if name not in module.hparams:
            raise ContractError(f"{method.__name__}.{name}: is not recorded; call self.save_hyperparameters()")
    for name, value in hyper_parameters.items():
        if module.hparams[name] != value:
            raise ContractError(f"{method.__name__}.{name}: is recorded as {module.hparams[name]}; expected {value}")
    try:
        module.metadata()
    except TypeError as error:
        raise ContractError(
            f"{method.__name__}: hyper-parameters cannot be stored as JSON ({error}); use scalars, strings, lists and "
            "dictionaries"
        ) from error


@torch.no_grad()
def check_forward(module: DerainModule) -> None:
    """Check ``forward``: shape, finite values, determinism, independence of the images in a batch.

    With the conditions that ``encode`` returns, ``forward`` must return the same result as without them.

    Args:
        module: The method, in eval mode.

    Raises:
        ContractError: If ``forward`` breaks the contract.
    """
    name = type(module).__name__
    for height, width in SIZES:
        rainy = make_batch(1, height, width)["rainy"]
        derained = module(rainy)
        if derained.shape != rainy.shape:
            raise ContractError(f"{name}.forward: returns shape {tuple(derained.shape)}; expected {tuple(rainy.shape)}")
        if not derained.isfinite().all():
            raise ContractError(f"{name}.forward: returns NaN or infinity for an image of {width}×{height} pixels")
    rainy = make_batch(3)["rainy"]
    derained = module(rainy)
    if not torch.equal(derained, module(rainy)):
        raise ContractError(f"{name}.forward: is not deterministic in eval mode; use a fixed seed")
    alone = torch.cat([module(image[None]) for image in rainy])
    _compare(alone, derained, f"{name}.forward: the images of a batch influence each other")
    conditions = module.encode(rainy)
    _compare(module(rainy, **conditions), derained, f"{name}.forward: the result differs with conditions from encode")


def check_restoring(module: DerainModule) -> None:
    """Check that `derain.Restorer` returns the same results for images one by one, in a batch, and on threads.

    Raises:
        ContractError: If a result differs.
    """
    rainy = make_batch(3, 32, 32)["rainy"]
    restorer = Restorer(module, device="cpu")
    alone = torch.stack([restorer(image) for image in rainy])
    restorer.scheduler.threads = 2
    for stacks in (True, False):
        restorer.scheduler.stacks = stacks
        condition = "in a batch" if stacks else "on threads"
        _compare(restorer(rainy), alone, f"{type(module).__name__}: the result of an image differs {condition}")


@torch.no_grad()
def check_files(module: DerainModule) -> None:
    """Check that weights files and checkpoints restore the method.

    Args:
        module: The method; its attribute ``trained_on`` is changed.

    Raises:
        ContractError: If a file cannot be loaded, or the loaded method differs.
    """
    name, rainy = type(module).__name__, make_batch()["rainy"]
    module.trained_on = ("a set",)
    with tempfile.TemporaryDirectory() as folder:
        weights_file, checkpoint_file = Path(folder) / "w.safetensors", Path(folder) / "c.ckpt"
        module.save_weights(weights_file)
        trainer = _trainer(max_steps=0)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(checkpoint_file)
        for path in (weights_file, checkpoint_file):
            try:
                restored = cast(DerainModule, type(module).from_content(path, read(path)))
            except DerainError as error:
                raise ContractError(f"{name}: a {path.suffix} file cannot be loaded ({error})") from error
            if restored.metadata() != module.metadata():
                raise ContractError(f"{name}: metadata differs after loading a {path.suffix} file")
            if not torch.equal(restored(rainy), module(rainy)):
                raise ContractError(
                    f"{name}: forward differs after loading a {path.suffix} file; move all weights to network"
                )


def check_training(module: DerainModule, batches: int = 6) -> None:
    """Check that the losses are finite, and that all trainable parameters and no others receive a gradient.

    Args:
        module: The method; its weights change.
        batches: Number of training batches, enough for at least one step of each optimiser.

    Raises:
        ContractError: If training breaks the contract.
    """
    name = type(module).__name__
    gradients = _Gradients()
    trainer = _trainer(max_epochs=1, limit_val_batches=0, callbacks=[gradients])
    data = torch.utils.data.DataLoader(cast(Any, [make_batch()] * batches), batch_size=None)
    try:
        trainer.fit(module.train(), data, val_dataloaders=[])
    except DerainError as error:
        raise ContractError(f"{name}: cannot be trained ({error})") from error
    parameters = dict(module.named_parameters())
    missing = [key for key, value in parameters.items() if value.requires_grad and key not in gradients.names]
    frozen = [key for key, value in parameters.items() if not value.requires_grad and key in gradients.names]
    if missing:
        raise ContractError(f"{name}: no gradient for {_listed(missing)}; use or freeze these parameters")
    if frozen:
        raise ContractError(f"{name}: frozen parameters receive a gradient: {_listed(frozen)}")
    if not gradients.names:
        raise ContractError(f"{name}: no parameter was trained; check training_step and configure_optimizers")
    module.eval()


def check_export(module: DerainModule) -> None:
    """Check that the method can be exported as ONNX, and that the file gives the same results.

    Raises:
        ContractError: If the export fails, or the results differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            export(module, Path(folder) / "m.onnx")
        except DerainError as error:
            raise ContractError(f"{type(module).__name__}: cannot be exported ({error})") from error


class _Gradients(lightning.Callback):
    """Callback that collects the names of parameters that have a gradient at any optimiser step."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.names |= {name for name, value in pl_module.named_parameters() if value.grad is not None}


def _trainer(**options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def _compare(actual: Float[Tensor, "b 3 h w"], expected: Float[Tensor, "b 3 h w"], message: str) -> None:
    difference = float((actual - expected).abs().max())
    if not difference <= TOLERANCE * (1 + float(expected.abs().max())):
        raise ContractError(f"{message} (by {difference:.2g})")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
