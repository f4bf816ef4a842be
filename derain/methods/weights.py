"""Files of weights: written with a description of themselves, recognised by their content when read."""

import hashlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import derain
from derain import methods
from derain.errors import DerainError
from derain.images import write_whole
from derain.methods import exported, others
from derain.methods.base import DerainModule
from derain.methods.described import DescribedModule
from derain.methods.hub import fetch_weights
from derain.methods.limits import built_within
from derain.methods.metadata import Metadata, check, parse, shorten
from derain.models import in_the_box

EXPECTED = (
    "expected a derain checkpoint (.ckpt), derain weights (.safetensors), a file of derain export (.onnx), or the "
    "authors' weights of PReNet, Restormer, IR-SDE or DA-CLIP"
)

UNSAID = "safetensors that do not say their method (no 'derain' entry)"
"""What they are that derain did not write."""

WRAPPED = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net")
"""Where files of weights keep the tensors: BasicSR (so Restormer's authors), open_clip (so DA-CLIP's) and others."""

BUILD_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""Exceptions of networks that are built with arguments of other values than they expect."""

READ_ERRORS = (
    *BUILD_ERRORS,
    AssertionError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
    struct.error,
    zipfile.BadZipFile,
)
"""Exceptions of libraries that read damaged files."""


OPTIONS = re.compile(r"(?P<file>.+?):(?P<options>[a-z_]+=[^:/\\\\=,]+(,[a-z_]+=[^:/\\\\=,]+)*)")
"""A file and options that it does not record: ``FILE:stages=5,variant=PReNet_LSTM``."""


def split_options(name: Path | str) -> tuple[str, dict[str, Any]]:
    """Split ``FILE:option=value,…`` into the file and the options, unless a file has this very name.

    Example:
        >>> split_options("net.pth:stages=5,variant=PReNet_LSTM"), split_options("hub:someone/prenet")
        (('net.pth', {'stages': 5, 'variant': 'PReNet_LSTM'}), ('hub:someone/prenet', {}))
    """
    found = OPTIONS.fullmatch(str(name))
    if found is None or Path(name).exists():
        return str(name), {}
    options = dict(option.split("=") for option in found["options"].split(","))
    values = {key: int(value) if value.isdecimal() else value for key, value in options.items()}
    return found["file"], values


def locate(name: Path | str) -> Path:
    """Return the file of weights by name, without options behind it.

    Args:
        name: Name of bundled weights (``default``); or ``hub:OWNER/NAME`` on the Hugging Face hub, fetched on first
            use; or a file.

    Raises:
        DerainError: If the hub's weights can be neither found nor fetched.
    """
    file, _ = split_options(name)
    kind, _, rest = file.partition(":")
    return fetch_weights(rest) if kind == "hub" and rest else in_the_box().get(file, Path(file))


class Weights(NamedTuple):
    """A method ready to restore, and what its file was recognised as.

    Attributes:
        module: The method, in eval mode.
        note: One line for people: kind of file, method, parameters.
    """

    module: DescribedModule
    note: str


def save(module: DescribedModule, path: Path) -> None:
    """Writes the network's weights as safetensors that describe themselves, whole or not at all.

    Args:
        module: Any method.
        path: The file, by custom ending in ``.safetensors``.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.network.state_dict().items()}
    with write_whole(path) as temporary:
        safetensors.torch.save_file(state, temporary, {"derain": json.dumps(module.describe())})


class Content(NamedTuple):
    """What a file of weights holds.

    Attributes:
        state: Tensors of the network by name.
        description: What the file says of itself; empty for authors' weights.
        kind: For people, with a place for the method's name.
    """

    state: Mapping[str, Tensor]
    description: Mapping[str, Any]
    kind: str


def load(name: Path | str, own: type[DescribedModule] | None = None) -> Weights:
    """Load a method from weights; code in a file is never executed.

    Of a checkpoint with averaged (EMA) weights, the average is taken. A network that neither derain nor its authors'
    files know may be known to spandrel. Metadata and tensors are compared before and while the method is built, so that
    a damaged or hostile file costs no more memory than a whole one.

    Args:
        name: A file, or a name as `locate` accepts it; ``FILE:stages=5,variant=PReNet_LSTM`` adds what the file of
            PReNet's authors does not record.
        own: A method that is not derain's, whose files are recognised too.

    Raises:
        DerainError: If the file is absent, damaged, unknown, does not fit the method that it names, or holds NaN or
            infinite numbers.
    """
    path, (_, options) = locate(name), split_options(name)
    if path.suffix.lower() == ".pt2":
        raise DerainError(f"{path}: a program of torch.export, for use without derain; give weights, or export ONNX")
    onnx = path.suffix.lower() == ".onnx" and path.is_file()
    content = None if onnx else read(path)
    unknown = DerainError(f"{name}: options that this file does not accept; give {path} without them")
    if options and (content is None or content.description):
        raise unknown
    if content is None:
        return Weights(*exported.load(path))
    if content.description:
        module = _build(path, content, own)
        return Weights(module, content.kind.format(_summary(module)))
    published = _published(path, content, options) if content.kind != UNSAID else None
    if published is not None:
        if set(options) - published.published_options:
            raise unknown
        return Weights(published, content.kind.format(_summary(published)))
    if options:
        raise unknown
    if any("visual_control." in key for key in content.state):
        raise DerainError(
            f"{path}: is the authors' controller of DA-CLIP, which restores no images by itself; give it by "
            "--model.controller or DERAIN_CONTROLLER"
        )
    with built_within(len(content.state), path.stat().st_size):
        spandrel_model = others.recognised(path, content.state)
    if spandrel_model is not None:
        check_network(path, spandrel_model.network, content.state)
        architecture = spandrel_model.descriptor.architecture.name
        return Weights(spandrel_model, f"{architecture} by spandrel ({spandrel_model.parameter_count:,} parameters)")
    names = shorten(", ".join(list(content.state)[:4]) or "nothing")
    reason = content.kind if content.kind == UNSAID else f"holds no method known here (found {names} …)"
    raise DerainError(f"{path}: {reason}; {EXPECTED}{others.missing()}")


def read(path: Path) -> Content:
    """Read tensors and metadata of a file of weights, without building anything.

    Raises:
        DerainError: If the file is absent, damaged, or holds no tensors, or if its metadata does not fit `Metadata`.
    """
    if not path.is_file():
        raise DerainError(f"{path}: no such file of weights; {EXPECTED}")
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:9] == b"{":
            return _read_safetensors(path)
        if head.startswith(b"PK"):
            _refuse_compressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DerainError:
        raise
    except READ_ERRORS as error:
        reason = shorten(error, 120) or type(error).__name__
        raise DerainError(f"{path}: damaged, or no file of weights ({reason}); {EXPECTED}") from error
    if isinstance(content, Mapping) and "derain" in content and "state_dict" in content:
        return _from_checkpoint(path, content)
    for wrapped in WRAPPED:
        if isinstance(content, Mapping) and isinstance(content.get(wrapped), Mapping):
            content = content[wrapped]
    if isinstance(content, Mapping) and content and any(isinstance(value, Tensor) for value in content.values()):
        return Content(_tensors(path, content), {}, "authors' weights of {}")
    found = ", ".join(map(str, list(content)[:4])) if isinstance(content, Mapping) else type(content).__name__
    raise DerainError(f"{path}: holds no method known here (found {shorten(found) or 'nothing'} …); {EXPECTED}")


def check_network(path: Path, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not finite, and integers where the network has real numbers.

    Args:
        path: The file, for messages.
        network: Holds the weights.
        state: The tensors as the file has them.

    Raises:
        DerainError: If there are any.
    """
    for name, parameter in network.state_dict().items():
        given = state.get(name, parameter)
        if parameter.is_floating_point() and not given.is_floating_point():
            raise DerainError(
                f"{path}: {shorten(name)} has {given.dtype} numbers; expected real ones; use another file"
            )
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise DerainError(
                f"{path}: {shorten(name)} has NaN or infinite numbers, as of a training that diverged; use another file"
            )


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> Content:
    with safetensors.safe_open(path, framework="pt") as file:
        entry = (file.metadata() or {}).get("derain", "null")
    metadata = parse(path, entry)
    if not metadata:
        return Content(safetensors.torch.load_file(path), {}, UNSAID)
    check(path, metadata, Metadata)
    return Content(safetensors.torch.load_file(path), metadata, "derain weights of {}")


def _refuse_compressed(path: Path) -> None:
    """Refuse archives that are larger unpacked than packed; PyTorch writes none."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"an archive that unpacks to {unpacked:,} bytes")


def _from_checkpoint(path: Path, content: Mapping[str, Any]) -> Content:
    metadata, state, average = content["derain"], content["state_dict"], content.get("ema")
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise DerainError(f"{path}: damaged, its metadata is {type(metadata).__name__}; {EXPECTED}")
    check(path, metadata, Metadata)
    prefix = "network."
    state = {
        name.removeprefix(prefix): tensor for name, tensor in _tensors(path, state).items() if name.startswith(prefix)
    }
    if average is not None:
        state = _tensors(path, average.get("network") if isinstance(average, Mapping) else average)
    kind = "averaged weights of a derain checkpoint" if average is not None else "derain checkpoint"
    epoch = content.get("epoch")
    return Content(state, metadata, f"{kind} of {{}}, epoch {epoch if isinstance(epoch, int) else 'unknown'}")


def _tensors(path: Path, state: object) -> Mapping[str, Tensor]:
    """Return a state dict from a file if it is one: dense tensors by name, each with memory for all its numbers."""
    if not isinstance(state, Mapping):
        raise DerainError(f"{path}: damaged, its weights are {type(state).__name__}; {EXPECTED}")
    for name, tensor in state.items():
        dense = isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not dense or tensor.is_quantized or tensor.device.type != "cpu":
            kind = tensor.type() if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DerainError(f"{path}: {shorten(name)} is {kind}; expected a dense tensor by name; {EXPECTED}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise DerainError(f"{path}: damaged, {shorten(name)} has more numbers than the file; {EXPECTED}")
    return state


def _build(path: Path, content: Content, own: type[DescribedModule] | None) -> DescribedModule:
    metadata, state = content.description, content.state
    name = metadata["method"]
    classes = (*methods.METHODS, methods.DACLIPModule, *([] if own is None else [own]))
    known: dict[str, type[DescribedModule]] = {method.__name__: method for method in classes}
    if name not in known:
        raise DerainError(f"{path}: made by the method {shorten(name)}; known here are {', '.join(known)}")
    check(path, metadata, known[name].metadata_schema, known[name])
    # Of other classes, only a part may be in the file: CLIP and the like come from elsewhere.
    limits = built_within(len(state), path.stat().st_size) if known[name] in methods.METHODS else nullcontext()
    try:
        with limits:
            module = known[name](**metadata["hyper_parameters"])
        module.network.load_state_dict(state, strict=True)
        module.recall(metadata)
    except BUILD_ERRORS as error:
        reason = shorten(error, 300) or type(error).__name__
        raise DerainError(
            f"{path}: does not fit {name} of derain {derain.__version__} ({reason}); "
            f"it was written by derain {shorten(metadata.get('version'), 40)}"
        ) from error
    check_network(path, module.network, state)
    return module.eval()


def _published(path: Path, content: Content, options: Mapping[str, Any]) -> DerainModule | None:
    """Return the method of its authors' state dict, or None if it is not theirs."""
    for method in methods.METHODS:
        try:
            with built_within(len(content.state), path.stat().st_size):
                accepted = {name: value for name, value in options.items() if name in method.published_options}
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


def _summary(module: DescribedModule) -> str:
    return f"{type(module).__name__} ({module.parameter_count:,} parameters)"
