"""Checks of an ONNX file before onnxruntime loads it: operators, inputs and outputs, weights, costs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from derain.errors import DerainError
from derain.files.metadata import Metadata, check, parse, shorten
from derain.methods.onnx_costs import LOADING_SIZES, Costs

_OPERATOR_NAMES = """
Abs Add And AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos
DepthToSpace Div Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gemm
GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid HardSwish Identity InstanceNormalization
LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Min Mod Mul Neg Not Or PRelu
Pad Pow Range Reciprocal ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax Softplus
SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
OPERATORS = frozenset(_OPERATOR_NAMES.split())
"""Supported operators: they compute tensors from tensors, without loops, branches, random numbers or files.

These are more than derain's methods need by default, since the exported operators depend on options and weights.
"""

CONTEXTS = ("content", "degradation")
"""Names of the inputs that are embeddings, ``(1, context)``."""

INPUT_NAMES = (
    ["rainy"],
    ["state", "rainy", "times"],
    ["state", "rainy", "times", "content"],
    ["state", "rainy", "times", "degradation"],
    ["state", "rainy", "times", "content", "degradation"],
)
"""Supported inputs of a graph, in order. ``rainy`` alone: restoration in one pass; others: network of a diffusion."""


class GraphMetadata(TypedDict):
    """Metadata of a graph.

    Attributes:
        inputs: Names of the inputs in order.
        parameters: Number of parameters of the network.
        routes: List with the index of the route that the graph computes; missing for methods without routes.
    """

    inputs: Sequence[str]
    parameters: int
    routes: NotRequired[Sequence[int]]


class OnnxMetadata(Metadata):
    """Metadata of an ONNX file."""

    graph: GraphMetadata


def read_graph(path: Path) -> tuple[dict[str, Any], Costs]:
    """Return metadata and costs of an ONNX file that `derain export` wrote, after checking the file.

    Raises:
        DerainError: If file, metadata or weights are damaged; if there is no metadata of derain; if inputs, outputs or
            operators are not supported; if the graph exceeds the limits of `Costs` at one of `LOADING_SIZES`; or if
            weights are in other files, are not real numbers, or contain NaN or infinity.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise DerainError(f"{path}: damaged, or not an ONNX file ({shorten(error, 120)}); export it again") from error
    entries = {entry.key: entry.value for entry in model.metadata_props}
    metadata = parse(path, entries.get("derain", "null"))
    if not metadata:
        raise DerainError(f"{path}: ONNX file without metadata of derain; use a file of derain export")
    check(path, metadata, OnnxMetadata)
    _check_operators(path, model)
    _check_interface(path, model.graph, metadata)
    _check_weights(path, model.graph)
    costs = Costs(path, model)
    for size in LOADING_SIZES:
        costs.check(*size)
    return metadata, costs


def _error(path: Path, reason: str) -> DerainError:
    return DerainError(f"{path}: {reason}; use a file of derain export")


def _check_operators(path: Path, model: Any) -> None:
    graph = model.graph
    domains = {entry.domain for entry in model.opset_import} | {node.domain for node in graph.node}
    if domains - {"", "ai.onnx"}:
        raise _error(
            path, f"operators of {shorten(', '.join(sorted(domains)))}; expected only standard operators of ONNX"
        )
    unsupported = {node.op_type for node in graph.node} - OPERATORS
    if unsupported:
        raise _error(path, f"operators that derain does not support ({shorten(', '.join(sorted(unsupported)))})")
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    nested = any(attribute.HasField("g") or attribute.graphs for attribute in attributes)
    if model.functions or graph.sparse_initializer or nested:
        raise _error(path, "functions, nested graphs or sparse weights, which derain does not support")


def _check_interface(path: Path, graph: Any, metadata: Mapping[str, Any]) -> None:
    """Check names and shapes of the inputs, and that the only output has the shape of an image."""
    from onnx import TensorProto

    weight_names = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in weight_names}
    expected = list(metadata["graph"]["inputs"])
    if expected not in INPUT_NAMES or list(inputs) != expected:
        found, recorded = (shorten(", ".join(names)) for names in (inputs, expected))
        raise _error(
            path, f"graph with inputs {found}, metadata with {recorded}; expected the same in both, as derain exports"
        )
    if len(graph.output) != 1:
        raise _error(path, f"{len(graph.output)} outputs; expected one image")
    for value in (*inputs.values(), *graph.output):
        tensor_type = value.type.tensor_type
        shape = [dimension.dim_value or None for dimension in tensor_type.shape.dim]  # None: any size
        accepted: list[list[Any]]
        if value.name == "times":
            accepted = [[1]]
        elif value.name in CONTEXTS:
            accepted = [[1, metadata["hyper_parameters"].get("context")]]
        else:
            accepted = [[1, 3, None, None], [None, 3, None, None]]
        if tensor_type.elem_type != TensorProto.FLOAT or shape not in accepted:
            name = shorten(value.name)
            raise _error(path, f"{name} of shape {shape}; expected float32 of shape {shorten(accepted[0])} (None: any)")


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield the weights and the constants of a graph."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_weights(path: Path, graph: Any) -> None:
    from onnx import TensorProto, numpy_helper

    for tensor in _tensors(graph):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise _error(path, f"{shorten(tensor.name)} is stored in another file; expected weights inside the file")
        try:
            values = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
            raise _error(path, f"{shorten(tensor.name)} is damaged ({shorten(error, 80)})") from error
        if values.dtype.kind not in "biuf":
            raise _error(path, f"{shorten(tensor.name)} is of type {values.dtype}; expected real numbers")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise _error(path, f"{shorten(tensor.name)} contains NaN or infinity")
