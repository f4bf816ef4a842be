"""Loading of weights: find the file, recognise its content, build the method."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from derain.errors import DerainError
from derain.files.hub import fetch_weights
from derain.files.limits import built_within
from derain.files.metadata import shorten
from derain.files.weights import BUILD_ERRORS, EXPECTED, Content, check_network, first_keys, read
from derain.methods import onnx_model, spandrel_model
from derain.methods.registry import BUILT_IN, class_path, find, methods, use_method
from derain.methods.trainable import TrainableModule
from derain.models import PublicModel, bundled, public

__all__ = ["LoadedMethod", "load", "load_checkpoint", "locate", "methods", "use_method"]

log = logging.getLogger("derain")

OPTIONS = re.compile(r"(?P<file>.+?):(?P<options>[a-z_]+=[^:/\\=,]+(,[a-z_]+=[^:/\\=,]+)*)")
"""Matches a file name followed by options that the file does not record: ``FILE:stages=5,variant=PReNet_LSTM``."""


class LoadedMethod(NamedTuple):
    """Method that was loaded from a weights file.

    Attributes:
        module: The method, in eval mode.
        note: Description for messages: kind of file, method and number of parameters.
    """

    module: TrainableModule
    note: str


def split_options(name: Path | str) -> tuple[str, dict[str, Any]]:
    """Split ``FILE:option=value,…`` into the file and the options.

    If a file with the complete name exists, the name is not split. Integers from 0, such as ``5``, are returned as int,
    integers joined by hyphens, such as ``8-4-2``, as a list of int, all other values as text.

    Example:
        >>> split_options("net.pth:stages=5,variant=PReNet_LSTM"), split_options("hub:someone/prenet")
        (('net.pth', {'stages': 5, 'variant': 'PReNet_LSTM'}), ('hub:someone/prenet', {}))
        >>> split_options("net.pth:grids=8-4-2")
        ('net.pth', {'grids': [8, 4, 2]})
    """
    match = OPTIONS.fullmatch(str(name))
    if match is None or Path(name).exists():
        return str(name), {}
    options: dict[str, Any] = {}
    for option in match["options"].split(","):
        key, value = option.split("=")
        numbers = value.split("-")
        if all(number.isdecimal() for number in numbers):
            options[key] = [int(number) for number in numbers] if len(numbers) > 1 else int(value)
        else:
            options[key] = value
    return match["file"], options


def locate(name: Path | str) -> Path:
    """Return the path of a weights file; files of the Hugging Face hub are downloaded on first use.

    Args:
        name: Name of a bundled model (``default``) or of a public one (``clearview-restormer``), ``hub:OWNER/NAME`` on
            the Hugging Face hub, or a file, which need not exist. Options after the name are ignored.

    Raises:
        DerainError: If a file of the hub is not on disk and cannot be downloaded, or does not have the SHA-256 that
            derain records for it.
    """
    file, _ = split_options(name)
    prefix, _, hub_name = file.partition(":")
    model = public_model(name)
    if model is not None:
        if model.sha256 is None:
            log.warning("%s: file not verified; no SHA-256 is recorded for this model", file)
        return fetch_weights(model.hub, model.file, licence=model.licence, sha256=model.sha256)
    if prefix == "hub" and hub_name:
        return fetch_weights(hub_name)
    return bundled().get(file, Path(file))


def public_model(name: Path | str) -> PublicModel | None:
    """Return the record of a public model, given its name or ``hub:OWNER/NAME``; None for other weights."""
    file, _ = split_options(name)
    if Path(file).exists():
        return None
    by_hub_name = {f"hub:{model.hub}": model for model in public().values()}
    return public().get(file) or by_hub_name.get(file)


def load(name: Path | str, method: str | type | None = None) -> LoadedMethod:
    """Load a method from weights; code in a file is never executed.

    Checkpoints and weights of derain, and weights files of the methods' authors, are recognised by their content; ONNX
    files of `derain export` by their suffix. Other files are loaded by spandrel, if it is installed and recognises the
    network. The averaged weights (EMA) of a checkpoint are preferred to its raw weights.

    Args:
        name: File or name that `locate` accepts. Options that the file does not record follow its name:
            ``FILE:stages=5,variant=PReNet_LSTM``.
        method: Class of a method or network from outside derain that the file may belong to, or its path, such as
            ``my_method.MyModule``. A file of another method is loaded too; if ``method`` is a method, a warning is
            logged.

    Raises:
        DerainError: If the file is absent, damaged, of no known method, or contains NaN or infinity; if it cannot be
            downloaded; if it does not fit its method or the options; or if ``method`` cannot be imported.
    """
    named_method = None if method is None else use_method(method)
    if named_method is not None and not issubclass(named_method, TrainableModule):
        named_method = None  # a network; weights of RegressionModule refer to it by its path
    loaded = _load(name, named_method)
    model = public_model(name)
    if model is not None and not loaded.module.trained_on:
        loaded.module.trained_on = model.trained_on
    if named_method is not None:
        _warn_if_unused(name, loaded.module, named_method)
    return loaded


def load_checkpoint(path: Path, method: type | None = None) -> LoadedMethod:
    """Load a method from a checkpoint of derain, with its averaged weights (EMA) if there are any.

    Args:
        path: The checkpoint.
        method: Class to build if the checkpoint records a class of the same name. Otherwise, the class is looked up
            among the known methods.

    Raises:
        DerainError: If the file is not a checkpoint of derain, is damaged, belongs to no known method, or does not fit
            its method.
    """
    content = read(path)
    if content.kind != "checkpoint":
        label = content.label.format(content.metadata.get("method", "a method"))
        raise DerainError(f"--ckpt_path {path}: {label}, expected a checkpoint; use --weights instead")
    return _from_metadata(path, content, method)


def _warn_if_unused(name: Path | str, module: TrainableModule, named_method: type[TrainableModule]) -> None:
    """Log a warning if the user named a class from outside derain, but the weights belong to another."""
    written_by = module.metadata()["method"]
    same = named_method.__name__ == written_by or issubclass(named_method, type(module))
    if same or class_path(named_method) in BUILT_IN:
        return
    log.warning("method %s: not used: %s has weights of %s", class_path(named_method), name, shorten(written_by, 60))


def _load(name: Path | str, named_method: type[TrainableModule] | None) -> LoadedMethod:
    path, (_, options) = locate(name), split_options(name)
    suffix = path.suffix.lower()
    if suffix == ".pt2":
        raise DerainError(f"{path}: a torch.export program, which derain does not load; use weights or ONNX instead")
    options_error = DerainError(f"{name}: options that this file does not accept; use {path} without them")
    if suffix == ".onnx" and path.is_file():
        if options:
            raise options_error
        return LoadedMethod(*onnx_model.load(path))
    content = read(path)
    if content.metadata:
        if options:
            raise options_error
        return _from_metadata(path, content, named_method)
    if content.kind == "published":
        published = _from_published(path, content, options)
        if published is not None:
            if set(options) - published.published_options:
                raise options_error
            return LoadedMethod(published, _note(content, published))
    if options:
        raise options_error
    return _from_spandrel(path, content)


def _note(content: Content, module: TrainableModule) -> str:
    return content.label.format(f"{module.title} ({module.parameter_count:,} parameters)")


def _from_metadata(path: Path, content: Content, named_method: type[TrainableModule] | None) -> LoadedMethod:
    """Build the class that the metadata records, or ``named_method`` if it has the same name."""
    method: type[TrainableModule]
    if named_method is not None and named_method.__name__ == content.metadata["method"]:
        method = named_method
    else:
        method = find(path, content.metadata)
    module = method.from_content(path, content)
    return LoadedMethod(module, _note(content, module))


def _from_published(path: Path, content: Content, options: Mapping[str, Any]) -> TrainableModule | None:
    """Build the method that recognises the state dict as its authors'; return None if no method does."""
    classes: list[type[TrainableModule]] = methods()
    for method in classes:
        accepted = {name: value for name, value in options.items() if name in method.published_options}
        try:
            with method.limits(len(content.state), path.stat().st_size):
                module = method.from_published(content.state, path, **accepted)
        except DerainError:
            raise
        except BUILD_ERRORS as error:
            reason = shorten(error) or type(error).__name__
            raise DerainError(
                f"{path}: resembles {method.__name__}, but does not fit it ({reason}); {EXPECTED}"
            ) from error
        if module is not None:
            check_network(path, module.network, content.state)
            return module.eval()
    return None


def _from_spandrel(path: Path, content: Content) -> LoadedMethod:
    with built_within(len(content.state), path.stat().st_size):
        module = spandrel_model.recognise(path, content.state)
    if module is None:
        reason = content.label
        if content.kind != "safetensors":
            reason = f"contains no known method (found {first_keys(content.state)})"
        raise DerainError(f"{path}: {reason}; {EXPECTED}{spandrel_model.install_hint()}")
    check_network(path, module.network, content.state)
    architecture = module.descriptor.architecture.name
    return LoadedMethod(module, f"{architecture} by spandrel ({module.parameter_count:,} parameters)")
