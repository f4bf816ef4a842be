"""Export a method as ONNX or with torch.export, and compare the file with the method.

The exported graph is the result of the method's ``export_graph``, by default ``forward``. The file contains neither
CLIP, which chooses routes and encodes images, nor the solver of a diffusion model.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from derain.errors import DerainError
from derain.files.metadata import shorten
from derain.files.weights import BUILD_ERRORS
from derain.images import write_whole
from derain.methods import onnx_model
from derain.methods.base import DerainModule
from derain.methods.graph import IMAGES, Graph
from derain.methods.interfaces import RunsGraph, Sampled
from derain.progress import track

Format = Literal["onnx", "torch"]
"""Format of the file: ONNX, or a program of ``torch.export``."""

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
"""Suffix of the file by format."""

OPSET = 17
"""Version of ONNX's operator set: the first that contains layer normalisation."""

SIZES = ((37, 31), (63, 65), (101, 77), (1, 1), (131, 97))
"""Image sizes (height, width) at which file and method are compared."""

TOLERANCE = 1e-4
"""Largest allowed absolute difference between the results of file and method, for images in [0, 1]."""

EXAMPLE_SIZE = (75, 90)
"""Size (height, width) of the image that the graph is traced with, in pixels."""


def export(method: DerainModule, path: str | Path, format: Format = "onnx") -> dict[tuple[int, int], float]:
    """Export a method; no file is written if its results differ from those of the method by more than ``TOLERANCE``.

    Args:
        method: The method; if CLIP selects its routes, choose a route with `Routed.set_route` first.
        path: Output file, with the suffix of the format; an existing file is replaced.
        format: ``onnx`` (``.onnx``), or ``torch`` for a program of ``torch.export`` (``.pt2``).

    Returns:
        The largest absolute difference between file and method for each image size (height, width) in ``SIZES``.

    Raises:
        DerainError: If the suffix is wrong, the method cannot be exported, the file cannot be run or has other results,
            or a required package is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != SUFFIXES[format]:
        raise DerainError(f"{path}: wrong suffix; a file of format {format} ends in {SUFFIXES[format]}")
    with _in_eval_mode_on_cpu(method):
        graph = method.export_graph().eval()
        with write_whole(path) as temporary:
            write(graph, method, temporary, format)
            try:
                differences = compare(method, temporary, format)
            except DerainError as error:
                if not str(error).startswith(f"{temporary}: "):
                    raise
                # The advice of the message is for users of the file, which is not written.
                reason, _, advice = str(error).removeprefix(f"{temporary}: ").rpartition("; ")
                raise DerainError(
                    f"{path}: not written: derain cannot run it ({reason or advice}); {_alternative(format)}"
                ) from error
            worst = max(differences, key=lambda size: _nan_last(differences[size]))
            if not differences[worst] <= TOLERANCE:  # NaN too
                raise DerainError(
                    f"{path}: not written: results differ from {type(method).__name__} by {differences[worst]:.2g} at "
                    f"{worst[1]}×{worst[0]} pixels; expected at most {TOLERANCE:g}; use the weights without export"
                )
    return differences


@contextmanager
def _in_eval_mode_on_cpu(method: DerainModule) -> Iterator[None]:
    """Move a method to the CPU in eval mode; afterwards, restore its device and the modes of its modules."""
    device = method.device
    modes = [(module, module.training) for module in method.modules()]
    method.eval().cpu()
    try:
        yield
    finally:
        method.to(device)
        for module, mode in modes:
            module.training = mode


def _alternative(format: Format) -> str:
    """Return what to do instead of exporting to a format, for error messages."""
    return f"use --format {'torch' if format == 'onnx' else 'onnx'}, or the weights without export"


def _nan_last(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


@torch.no_grad()
def write(graph: Graph, method: DerainModule, path: Path, format: Format) -> None:
    """Write a graph with the metadata of its method, in the entry ``derain`` (ONNX) or ``derain.json`` (torch.export).

    Raises:
        DerainError: If the format cannot represent the graph, or a required package is not installed.
    """
    parameter_count = sum(parameter.numel() for parameter in method.network.parameters())
    metadata = json.dumps(method.metadata() | {"graph": graph.metadata(parameter_count)})
    with warnings.catch_warnings():
        # PyTorch warns that tracing is deprecated, but its new ONNX exporter is much slower. Tracing is safe here:
        # `export` compares the graph with the method at several sizes.
        warnings.simplefilter("ignore")
        try:
            if format == "onnx":
                _write_onnx(graph, metadata, path)
            else:
                _write_program(graph, metadata, path)
        except DerainError:
            raise
        except (*BUILD_ERRORS, AssertionError) as error:
            form = "ONNX" if format == "onnx" else "a program of torch.export"
            raise DerainError(
                f"{type(method).__name__}: cannot be written as {form} ({shorten(error, 160)}); {_alternative(format)}"
            ) from error


def _write_onnx(graph: Graph, metadata: str, path: Path) -> None:
    onnx_model.require_packages("onnx", "onnxruntime")
    import onnx

    images = [name for name in graph.inputs if name in IMAGES]
    image_axes = {name: {2: "height", 3: "width"} for name in [*images, "out"]}
    torch.onnx.export(
        graph,
        graph.example(*EXAMPLE_SIZE),
        path,
        dynamo=False,
        opset_version=OPSET,
        input_names=graph.inputs,
        output_names=["out"],
        dynamic_axes=image_axes,
    )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"derain": metadata})
    onnx.save(model, path)


def _write_program(graph: Graph, metadata: str, path: Path) -> None:
    height = torch.export.Dim("height", min=1, max=1 << 16)
    width = torch.export.Dim("width", min=1, max=1 << 16)
    axes = tuple({2: height, 3: width} if name in IMAGES else {} for name in graph.inputs)
    program = torch.export.export(
        graph,
        graph.example(*EXAMPLE_SIZE),
        dynamic_shapes=(axes,),  # one entry: forward has the single parameter ``*inputs``
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    torch.export.save(program, path, extra_files={"derain.json": metadata})


class _Program(nn.Module):
    """Network that runs a program of ``torch.export``: inputs are given in order or by name, and others are ignored."""

    def __init__(self, run: Callable[..., Tensor], inputs: list[str]) -> None:
        super().__init__()
        self.run = run
        self.inputs = inputs

    def forward(self, *inputs: Tensor, **named: Tensor | None) -> Tensor:
        remaining = [cast(Tensor, named[name]) for name in self.inputs[len(inputs) :]]
        return self.run(*inputs[: len(self.inputs)], *remaining)


@torch.no_grad()
def compare(method: DerainModule, path: Path, format: Format) -> dict[tuple[int, int], float]:
    """Return the largest absolute difference between the results of a method and its file, by size (height, width).

    Args:
        method: The method, on the CPU and in eval mode.
        path: The file.
        format: Format of the file.

    Raises:
        DerainError: If an ONNX file cannot be read or run.
    """
    graph = method.export_graph()
    restore = _restore_by_file(method, graph, path, format)
    differences = {}
    for size in track(SIZES, "Comparing", len(SIZES)):
        tensors = dict(zip(graph.inputs, graph.example(*size), strict=True))
        rainy = tensors.pop("rainy")
        conditions = {name: tensor for name, tensor in tensors.items() if name not in {"state", "times"}}
        difference = method(rainy, **conditions) - restore(rainy, **conditions)
        differences[size] = float(difference.abs().max())
    return differences


def _restore_by_file(method: DerainModule, graph: Graph, path: Path, format: Format) -> Callable[..., Tensor]:
    """Return a function with the signature of ``method`` that restores images with the file."""
    if format == "onnx":
        network: nn.Module = onnx_model.OnnxNetwork(path)
    else:
        network = _Program(torch.export.load(path).module(), graph.inputs)
    if not isinstance(method, RunsGraph):
        return network
    metadata: Mapping[str, Any] = method.metadata()
    method_with_file = type(method).from_graph(metadata, network, graph.inputs)
    if isinstance(method, Sampled):
        method_with_file.set_sampling(method.sampling)
    return cast(DerainModule, method_with_file)
