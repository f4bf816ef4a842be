"""Files of weights: written with a description of themselves, recognised by their content when read."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import derain
from derain import methods
from derain.errors import DerainError
from derain.images import replacing
from derain.methods import exported, others
from derain.methods.described import DescribedModule
from derain.methods.hub import fetch_weights
from derain.models import in_the_box

EXPECTED = (
    "expected a derain checkpoint (.ckpt), derain weights (.safetensors), a file of derain export (.onnx), or the "
    "authors' weights of PReNet, Restormer, IR-SDE or DA-CLIP"
)

UNSAID = "safetensors that do not say their method (no 'derain' entry)"
"""What they are that derain did not write."""

WRAPPED = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net")
"""Where files of weights keep the tensors: BasicSR (so Restormer's authors), open_clip (so DA-CLIP's) and others."""


def locate(name: Path | str) -> Path:
    """File of weights by name.

    Args:
        name: Of weights that derain ships (``default``); or ``hub:OWNER/NAME``, on the Hugging Face hub, which are
            fetched where they are not here yet; or else a file.

    Raises:
        DerainError: If what is on the hub can be neither found nor fetched.
    """
    kind, _, rest = str(name).partition(":")
    return fetch_weights(rest) if kind == "hub" and rest else in_the_box().get(str(name), Path(name))


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
    with replacing(path) as temporary:
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


def load(path: Path, own: type[DescribedModule] | None = None) -> Weights:
    """Recognises what a file of weights holds and builds the method with it; never executes code from it.

    Of a checkpoint with averaged (EMA) weights, the average is taken. What is neither ours nor our authors', spandrel
    may know.

    Args:
        path: The file.
        own: A method that is not derain's, whose files are recognised too.

    Raises:
        DerainError: If the file is absent, damaged, unknown, or does not fit the method it names.
    """
    if path.suffix.lower() == ".onnx" and path.is_file():
        return Weights(*exported.load(path))
    if path.suffix.lower() == ".pt2":
        raise DerainError(f"{path}: a program of torch.export, for use without derain; give weights, or export ONNX")
    content = read(path)
    if content.description:
        module = _build(path, content.description, content.state, own)
        return Weights(module, content.kind.format(_told(module)))
    for method in methods.METHODS if content.kind != UNSAID else ():
        published = method.from_published(content.state)
        if published is not None:
            return Weights(published.eval(), content.kind.format(_told(published)))
    if any("visual_control." in name for name in content.state):
        raise DerainError(
            f"{path}: is the authors' controller of DA-CLIP, which restores no images by itself; give it by "
            "--model.controller or DERAIN_CONTROLLER"
        )
    other = others.recognised(path, content.state)
    if other is not None:
        name = other.descriptor.architecture.name
        return Weights(other, f"{name} by spandrel ({other.parameter_count:,} parameters)")
    found = f"holds no method known here (found {', '.join(list(content.state)[:4]) or 'nothing'} …)"
    told = content.kind if content.kind == UNSAID else found
    raise DerainError(f"{path}: {told}; {EXPECTED}{others.missing()}")


def read(path: Path) -> Content:
    """Reads tensors and description of a file of weights, without building anything.

    Raises:
        DerainError: If the file is absent, damaged, or holds no tensors.
    """
    if not path.is_file():
        raise DerainError(f"{path}: no such file of weights; {EXPECTED}")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise DerainError(f"{path}: damaged, or no file of weights ({reason}); {EXPECTED}") from error
    if isinstance(content, Mapping) and "derain" in content and "state_dict" in content:
        return _from_checkpoint(content)
    for wrapped in WRAPPED:
        if isinstance(content, Mapping) and isinstance(content.get(wrapped), Mapping):
            content = content[wrapped]
    if isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        return Content(content, {}, "authors' weights of {}")
    found = ", ".join(map(str, list(content)[:4])) if isinstance(content, Mapping) else type(content).__name__
    raise DerainError(f"{path}: holds no method known here (found {found or 'nothing'} …); {EXPECTED}")


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> Content:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        state = safetensors.torch.load_file(path)
        description = json.loads(metadata.get("derain", "null"))
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
        raise DerainError(f"{path}: damaged safetensors ({error}); {EXPECTED}") from error
    if not isinstance(description, dict):
        return Content(state, {}, UNSAID)
    return Content(state, description, "derain weights of {}")


def _from_checkpoint(content: Mapping[str, Any]) -> Content:
    prefix = "network."
    state = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    average = content.get("ema")
    if average is not None:
        state = average["network"]
    kind = "averaged weights of a derain checkpoint" if average is not None else "derain checkpoint"
    return Content(state, content["derain"], f"{kind} of {{}}, epoch {content.get('epoch')}")


def _build(
    path: Path, description: Mapping[str, Any], state: Mapping[str, Tensor], own: type[DescribedModule] | None
) -> DescribedModule:
    name = description.get("method")
    classes = (*methods.METHODS, methods.DACLIPModule, *([] if own is None else [own]))
    known: dict[Any, type[DescribedModule]] = {one.__name__: one for one in classes}
    if name not in known:
        raise DerainError(f"{path}: made by the method {name!r}; known here are {', '.join(known)}")
    try:
        module = known[name](**description["hyper_parameters"])
        module.network.load_state_dict(state, strict=True)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DerainError(
            f"{path}: does not fit {name} of derain {derain.__version__} ({reason}); "
            f"it was written by derain {description.get('version')}"
        ) from error
    module.recall(description)
    return module.eval()


def _told(module: DescribedModule) -> str:
    return f"{type(module).__name__} ({module.parameter_count:,} parameters)"
