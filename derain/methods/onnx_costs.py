"""Limits on the memory and the operations of an ONNX graph, checked before it runs.

The shapes of all values are inferred node by node for one image size. Small values that depend only on constants and
the image size are computed, since they determine the shapes of large values.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from derain.errors import DerainError
from derain.files.metadata import shorten

LOADING_SIZES = ((64, 64), (128, 192))
"""Image sizes (height, width) that are checked on loading; the second reveals costs that grow faster than the image.

The limits of smaller images are those of the first size.
"""

ELEMENTS_PER_PIXEL = 1 << 14
"""Largest number of elements in memory at one time, per pixel.

Twice the number of elements of the weights is added to the limit.
"""

OPERATIONS_PER_PIXEL = 1 << 26
"""Largest number of multiply-adds per pixel; a PReNet of 100 stages needs 17 million."""

FOLDED_ELEMENTS = 1 << 24
"""Largest number of elements that onnxruntime may compute from constants when it loads a graph (constant folding).

Twice the number of elements of the weights is added to the limit.
"""

FOLDED_OPERATIONS = 1 << 28
"""Largest number of multiply-adds of constant folding.

Twice the number of elements of the weights is added to the limit.
"""

SMALL = 4096
"""Largest number of elements of the values that are computed here, all outputs of a node together."""

_OPERATOR_NAMES = """
Abs Add And Cast Ceil Clip Concat Constant ConstantOfShape Div Equal Expand Floor Gather Greater GreaterOrEqual Identity
Less LessOrEqual Max Min Mod Mul Neg Not Or Range Reshape ScatterND Shape Slice Split Sqrt Squeeze Sub Transpose
Unsqueeze Where
"""
COMPUTED = frozenset(_OPERATOR_NAMES.split())
"""Operators that are computed for small values."""


class Costs:
    """Memory and operations of a graph, computed from its nodes and the shapes of its weights.

    Args:
        path: File of the graph, named in error messages.
        model: ``onnx.ModelProto`` whose operators and weights have been checked.
    """

    def __init__(self, path: Path, model: Any) -> None:
        from onnx import helper, numpy_helper

        self.path = path
        self.checked: set[tuple[int, int]] = set()
        self.types: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.size = (0, 0)
        self.first_shapes: dict[str, tuple[tuple[int, int], list[int]]] = {}
        """Image size and shape at each ``Shape`` and ``Size`` node, from the first check that reached it."""
        self.nodes = list(model.graph.node)
        self.opsets = list(model.opset_import)
        self.version = next((opset.version for opset in self.opsets if opset.domain in {"", "ai.onnx"}), 1)
        self.weight_types: dict[str, Any] = {}
        self.small_weights: dict[str, Any] = {}
        for tensor in model.graph.initializer:
            self.weight_types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            if math.prod(tensor.dims) <= SMALL:
                self.small_weights[tensor.name] = numpy_helper.to_array(tensor)
        self.last_uses: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            self.last_uses |= dict.fromkeys((*node.output, *node.input), index)
        self.input_types = {
            value.name: value.type for value in model.graph.input if value.name not in self.weight_types
        }
        self.weight_elements = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)

    def check(self, height: int, width: int) -> None:
        """Check the costs of the graph for one image size, unless this size was checked before.

        Args:
            height: Height of the image, in pixels.
            width: Width of the image, in pixels.

        Raises:
            DerainError: If the shape of a value cannot be inferred from constants and the image size, or memory or
                operations exceed the limits of this module.
        """
        from onnx.checker import ValidationError
        from onnx.defs import SchemaError
        from onnx.shape_inference import InferenceError

        if (height, width) in self.checked:
            return
        try:
            with np.errstate(all="ignore"):
                self._bound(height, width)
        except (
            InferenceError,
            ValidationError,
            SchemaError,
            ArithmeticError,
            LookupError,
            AttributeError,
            TypeError,
            ValueError,
            RuntimeError,
            MemoryError,
        ) as error:
            raise DerainError(f"{self.path}: {shorten(error, 160)}; use a file of derain export") from error
        self.types, self.values = {}, {}
        self.checked.add((height, width))

    def _bound(self, height: int, width: int) -> None:
        """Infer all shapes for an image size, and compare memory and operations with the limits.

        Raises:
            ValueError: If a shape cannot be inferred, or a limit is exceeded.
        """
        pixels = max(height * width, math.prod(LOADING_SIZES[0]))
        extra = 2 * self.weight_elements
        self.size = (height, width)
        self.types = dict(self.weight_types)
        for name, input_type in self.input_types.items():
            self.types[name] = _sized(input_type, height, width)
        self.values = dict(self.small_weights)
        constant_names = {*self.weight_types, ""}  # values that onnxruntime may compute when it loads the graph
        live_sizes: dict[str, int] = {}
        live = folded = folded_operations = operations = 0
        for index, node in enumerate(self.nodes):
            shapes = self._infer(node)
            sizes = [math.prod(shape) for shape in shapes]
            node_operations = self._operations(node, shapes)
            operations += node_operations
            if set(node.input) <= constant_names or self._is_fixed(node):
                constant_names.update(node.output)
                folded += sum(sizes)
                folded_operations += node_operations
            live_sizes |= dict(zip(filter(None, node.output), sizes, strict=True))
            live += sum(sizes)
            if live > ELEMENTS_PER_PIXEL * pixels + extra:
                raise ValueError(f"{_name(node)}: {live:,} elements in memory for an image of {width}×{height} pixels")
            for name in {*node.input, *node.output}:
                if self.last_uses[name] <= index:
                    live -= live_sizes.pop(name, 0)
            if folded > FOLDED_ELEMENTS + extra:
                raise ValueError(f"{_name(node)}: {folded:,} elements are computed from constants")
            if folded_operations > FOLDED_OPERATIONS + extra:
                raise ValueError(f"{_name(node)}: {folded_operations:,} operations on constants")
            if operations > OPERATIONS_PER_PIXEL * pixels:
                raise ValueError(f"more than {operations:,} operations on an image of {width}×{height} pixels")

    def _is_fixed(self, node: Any) -> bool:
        """Return whether a ``Shape`` or ``Size`` node is constant: whether another image size gave the same shape.

        Compares with the first check that reached the node. False in this check, and for nodes of other types.
        """
        if node.op_type not in {"Shape", "Size"}:
            return False
        shape = self._shape(node.input[0]) if node.op_type == "Size" else self.values[node.output[0]].tolist()
        first_size, first_shape = self.first_shapes.setdefault(node.output[0], (self.size, shape))
        return first_size != self.size and first_shape == shape

    def _infer(self, node: Any) -> Sequence[Sequence[int]]:
        """Infer the types of a node's outputs, compute the values of small outputs, and return all shapes."""
        from onnx import defs, numpy_helper, shape_inference

        types = {name: self.types[name] for name in node.input if name}
        values = {name: numpy_helper.from_array(self.values[name]) for name in types if name in self.values}
        schema = defs.get_schema(node.op_type, self.version, "")
        inferred = shape_inference.infer_node_outputs(schema, node, types, values, opset_imports=self.opsets)
        shapes = []
        for name in filter(None, node.output):
            shape = _known_shape(inferred.get(name))
            if shape is None:
                raise ValueError(f"{_name(node)}: shape cannot be inferred from the image size")
            self.types[name] = inferred[name]
            shapes.append(shape)
        known = node.op_type == "Shape" or all(name in self.values for name in types)
        if known and node.op_type in COMPUTED and sum(map(math.prod, shapes)) <= SMALL:
            self._compute(node)
        return shapes

    def _compute(self, node: Any) -> None:
        """Compute the values of a node's outputs from those of its inputs."""
        from onnx import helper, numpy_helper, reference

        if node.op_type == "Shape":
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            shape = self._shape(node.input[0])[attributes.get("start", 0) : attributes.get("end")]
            self.values[node.output[0]] = np.array(shape, np.int64)
            return
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            self.values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            return
        inputs = {name: self.values[name] for name in node.input if name}
        graph = helper.make_graph(
            [node],
            "node",
            [helper.make_value_info(name, self.types[name]) for name in inputs],
            [helper.make_value_info(name, self.types[name]) for name in dict.fromkeys(node.output) if name],
        )
        results = reference.ReferenceEvaluator(graph, opsets={"": self.version}).run(None, inputs)
        for name, value in zip(filter(None, node.output), results, strict=True):
            self.values[name] = np.asarray(value)

    def _shape(self, name: str) -> list[int]:
        return [dimension.dim_value for dimension in self.types[name].tensor_type.shape.dim]

    def _operations(self, node: Any, output_shapes: Sequence[Sequence[int]]) -> int:
        """Estimate the multiply-adds of a node; an overestimate is preferred.

        Args:
            node: The node.
            output_shapes: Shapes of the node's outputs.
        """
        from onnx import helper

        input_shapes = [self._shape(name) for name in node.input if name]
        largest = max((math.prod(shape) for shape in (*input_shapes, *output_shapes)), default=0)
        elements = sum(math.prod(shape) for shape in output_shapes)
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Conv":
            return elements * math.prod(input_shapes[1][1:])
        if node.op_type == "ConvTranspose":
            return math.prod(input_shapes[0]) * math.prod(input_shapes[1][1:])
        if node.op_type == "MatMul":
            return elements * input_shapes[0][-1]
        if node.op_type == "Gemm":
            return elements * input_shapes[0][0 if attributes.get("transA") else 1]
        if node.op_type == "Einsum":
            return _product_of_indices(attributes["equation"].decode(), input_shapes)
        if node.op_type in {"AveragePool", "MaxPool"}:
            return elements * int(math.prod(map(abs, attributes["kernel_shape"])))
        return largest * (16 if node.op_type == "Resize" else 1)  # bicubic interpolation reads 16 pixels


def _known_shape(value_type: Any) -> list[int] | None:
    """Return the shape of an inferred type; None if a dimension is unknown."""
    if value_type is None or not value_type.tensor_type.HasField("shape"):
        return None
    dimensions = value_type.tensor_type.shape.dim
    if not all(dimension.HasField("dim_value") and dimension.dim_value >= 0 for dimension in dimensions):
        return None
    return [dimension.dim_value for dimension in dimensions]


def _product_of_indices(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """Return the product of the sizes of all indices of an Einsum: its number of multiply-adds.

    Raises:
        ValueError: If the indices do not fit the shapes.

    Example:
        >>> _product_of_indices("ab, bc -> ac", [[2, 3], [3, 5]])
        30
    """
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if "." in equation or [len(term) for term in terms] != [len(shape) for shape in shapes]:
        raise ValueError(f"Einsum {equation[:40]}: indices do not fit the input shapes")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        sizes |= dict(zip(term, shape, strict=True))
    return math.prod(sizes.values())


def _sized(input_type: Any, height: int, width: int) -> Any:
    """Return the type of a graph input for one image size; unknown sizes of other axes become 1."""
    from onnx import helper

    tensor_type = input_type.tensor_type
    shape = [dimension.dim_value or 1 for dimension in tensor_type.shape.dim]
    if len(shape) == 4:
        shape[2:] = height, width
    return helper.make_tensor_type_proto(tensor_type.elem_type, shape)


def _name(node: Any) -> str:
    return f"{node.op_type} {node.name or ', '.join(node.output)}"[:80]
