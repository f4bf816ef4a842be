"""Export a method as ONNX or by torch.export, and compare the file with the method.

Each method returns the graph to export (``export_graph``); by default it is ``forward``. CLIP, which chooses routes and
encodes images, and the solver of a diffusion are not part of the file.
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
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
"""Suffix of the files by format."""

OPSET = 17
"""Version of ONNX's operator set: the first with layer normalisation."""

SIZES = ((37, 31), (63, 65), (101, 77), (1, 1), (131, 97))
"""Image sizes (height, width) at which file and method are compared."""

TOLERANCE = 1e-4
"""Largest allowed difference between file and method, of images in [0, 1]."""

EXAMPLE_SIZE = (75, 90)
"""Size (height, width) of the image that the graph is traced with."""


def export(method: DerainModule, path: Path, format: Format = "onnx") -> dict[tuple[int, int], float]:
    """Export a method; the file is kept only if its results equal those of the method.

    Args:
        method: The method; call `Routed.set_route` first if it has routes.
        path: Output file.
        format: ``onnx``, or ``torch`` for a program of ``torch.export``.

    Returns:
        The largest difference between file and method at each size (height, width).

    Raises:
        DerainError: If the method cannot be exported, the results of the file differ, or a package is not installed.
    """
    if path.suffix.lower() != SUFFIXES[format]:
        raise DerainError(f"{path}: a file of --format {format} must end in {SUFFIXES[format]}")
    with _in_eval_mode_on_cpu(method):
        graph = method.export_graph().eval()
        with write_whole(path) as temporary:
            write(graph, method, temporary, format)
            try:
                differences = compare(method, temporary, format)
            except DerainError as error:
                if not str(error).startswith(f"{temporary}: "):
                    raise
                # The advice in the message is for users of the file; here the file was not written.
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
    """Move a method to the CPU in eval mode; afterwards, restore its device and the mode of each of its modules."""
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
    """Write a graph with the metadata of its method as the entry ``derain`` of the file.

    Raises:
        DerainError: If the format cannot hold the graph, or a package for it is not installed.
    """
    parameters = sum(parameter.numel() for parameter in method.network.parameters())
    metadata = json.dumps(method.metadata() | {"graph": graph.metadata(parameters)})
    with warnings.catch_warnings():
        # PyTorch warns of its own code, and that tracing is deprecated. The newer exporter takes minutes where tracing
        # takes seconds, and the traced graph is compared with the method at several sizes.
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

    image_axes = {name: {2: "height", 3: "width"} for name in (*graph.inputs, "out") if name in {*IMAGES, "out"}}
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
        dynamic_shapes=(axes,),  # of the tuple ``*inputs``
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    torch.export.save(program, path, extra_files={"derain.json": metadata})


class _Program(nn.Module):
    """Network that runs a program of ``torch.export``."""

    def __init__(self, run: Callable[..., Tensor], inputs: list[str]) -> None:
        super().__init__()
        self.run = run
        self.inputs = inputs

    def forward(self, *inputs: Tensor, **named: Tensor | None) -> Tensor:
        remaining = [cast(Tensor, named[name]) for name in self.inputs[len(inputs) :]]
        return self.run(*inputs[: len(self.inputs)], *remaining)


@torch.no_grad()
def compare(method: DerainModule, path: Path, format: Format) -> dict[tuple[int, int], float]:
    """Return the largest difference between the results of a method and its file, by image size (height, width).

    Raises:
        DerainError: If the file cannot be read.
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
    """Return a function with the signature of ``method`` that restores images by the file."""
    if format == "onnx":
        network: nn.Module = onnx_model.OnnxNetwork(path)
    else:
        network = _Program(torch.export.load(path).module(), graph.inputs)
    if not isinstance(method, RunsGraph):
        return network
    metadata: Mapping[str, Any] = method.metadata()
    restored = type(method).from_graph(metadata, network, graph.inputs)
    if isinstance(method, Sampled):
        restored.set_sampling(method.sampling)
    return cast(DerainModule, restored)
