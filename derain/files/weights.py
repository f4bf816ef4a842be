"""Read and write weights files (tensors with metadata), and read the weights of checkpoints."""

import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from derain.errors import DerainError
from derain.files.metadata import Metadata, check, parse, shorten
from derain.images import write_whole

EXPECTED = (
    "expected a derain checkpoint (.ckpt), derain weights (.safetensors), an ONNX file of derain export (.onnx), or "
    "the authors' weights of a method of derain"
)

Kind = Literal["checkpoint", "weights", "published", "safetensors"]
"""Kind of a weights file: ``checkpoint`` or ``weights`` of derain, ``published`` (a pickled state dict), or
``safetensors`` without metadata of derain."""

STATE_KEYS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net")
"""Keys of the state dict in files of BasicSR (used by Restormer's authors), open_clip (by DA-CLIP's) and others."""

PREFIXES = ("module.", "net.")
"""Prefixes that `torch.nn.DataParallel`, and modules with one attribute ``net``, add to all names of a state dict."""

BUILD_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""Exceptions raised when a network is built with unexpected arguments or tensors."""

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
"""Exceptions that libraries raise when they read damaged files."""


class Content(NamedTuple):
    """Content of a weights file.

    Attributes:
        state: State dict of the network, on the CPU.
        metadata: Metadata of derain; empty for files that derain did not write.
        kind: Kind of file.
        label: Description of the file for messages; ``{}``, if it occurs, is a placeholder for the name of the method.
    """

    state: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
    kind: Kind
    label: str


def save(state: Mapping[str, Tensor], metadata: Mapping[str, Any], path: Path) -> None:
    """Write a state dict with metadata as a safetensors file; if writing fails, an existing file is unchanged.

    Args:
        state: State dict of a network.
        metadata: Metadata that JSON can represent, see `Metadata`.
        path: The file, usually with the suffix ``.safetensors``.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with write_whole(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, {"derain": json.dumps(metadata)})


def read(path: Path) -> Content:
    """Read the tensors and metadata of a weights file; no network is built, and code in the file is never executed.

    The averaged weights (EMA) of a checkpoint are preferred to its raw weights. ONNX files are not read.

    Raises:
        DerainError: If the file is absent, damaged, compressed or without tensors, or its metadata does not fit
            `Metadata`.
    """
    if not path.is_file():
        raise DerainError(f"{path}: no such file; {EXPECTED}")
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
        raise DerainError(f"{path}: damaged, or not a weights file ({reason}); {EXPECTED}") from error
    if isinstance(content, Mapping) and "derain" in content and "state_dict" in content:
        return _from_checkpoint(path, content)
    for key in STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values()):
        return Content(_without_prefix(_tensors(path, content)), {}, "published", "authors' weights of {}")
    found = first_keys(content) if isinstance(content, Mapping) else type(content).__name__
    raise DerainError(f"{path}: contains no known method (found {found}); {EXPECTED}")


def first_keys(content: Mapping[Any, Any]) -> str:
    """Return the first four keys of a mapping for a message.

    Example:
        >>> first_keys({"a": 1, "b": 2}), first_keys(dict.fromkeys("abcdef")), first_keys({})
        ('a, b', 'a, b, c, d, …', 'nothing')
    """
    keys = ", ".join(map(str, list(content)[:4]))
    return shorten(f"{keys}, …" if len(content) > 4 else keys) or "nothing"


def check_network(path: Path, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Check that floating-point weights of a network were floating-point numbers in the file, and are finite.

    Args:
        path: The file, for messages.
        network: The network with its weights loaded.
        state: The tensors as read from the file.

    Raises:
        DerainError: If a tensor has NaN or infinity, or integers instead of floating-point numbers.
    """
    for name, parameter in network.state_dict().items():
        if not parameter.is_floating_point():
            continue
        tensor = state.get(name, parameter)
        if not tensor.is_floating_point():
            raise DerainError(
                f"{path}: {shorten(name)} is of type {tensor.dtype}; expected real numbers; use another file"
            )
        if not parameter.isfinite().all():
            raise DerainError(
                f"{path}: {shorten(name)} contains NaN or infinity, as after a diverged training; use another file"
            )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> Content:
    with safetensors.safe_open(path, framework="pt") as file:
        entry = (file.metadata() or {}).get("derain", "null")
    metadata = parse(path, entry)
    if not metadata:
        return Content(safetensors.torch.load_file(path), {}, "safetensors", "safetensors without metadata of derain")
    check(path, metadata, Metadata)
    return Content(safetensors.torch.load_file(path), metadata, "weights", "derain weights of {}")


def _refuse_compressed(path: Path) -> None:
    """Refuse archives that are larger when unpacked; PyTorch does not compress its files.

    Raises:
        ValueError: If the archive is compressed.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"compressed; unpacks to {unpacked:,} bytes")


def _from_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> Content:
    metadata, average = checkpoint["derain"], checkpoint.get("ema")
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise DerainError(f"{path}: damaged, its metadata is {type(metadata).__name__}; {EXPECTED}")
    check(path, metadata, Metadata)
    prefix = "network."
    tensors = _tensors(path, checkpoint["state_dict"])
    state: Mapping[str, Tensor] = {
        name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }
    label = "derain checkpoint"
    if average is not None:
        state = _tensors(path, average.get("network") if isinstance(average, Mapping) else average)
        label = "averaged weights of a derain checkpoint"
    epoch = checkpoint.get("epoch")
    label += f" of {{}}, epoch {epoch if isinstance(epoch, int) else 'unknown'}"
    return Content(state, metadata, "checkpoint", label)


def _without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Remove each of `PREFIXES` that all names of a state dict have."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _tensors(path: Path, state: object) -> Mapping[str, Tensor]:
    """Return a state dict after checking it.

    Raises:
        DerainError: If the state is not a mapping; or if a value is not a dense tensor on the CPU, or has more elements
            than its memory.
    """
    if not isinstance(state, Mapping):
        raise DerainError(f"{path}: damaged, its weights are {type(state).__name__}; {EXPECTED}")
    for name, tensor in state.items():
        dense = isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not dense or tensor.is_quantized or tensor.device.type != "cpu":
            kind = tensor.type() if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DerainError(f"{path}: {shorten(name)} is {kind}; expected a dense tensor; {EXPECTED}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise DerainError(f"{path}: damaged, {shorten(name)} has more elements than its memory; {EXPECTED}")
    return state
