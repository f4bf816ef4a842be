"""Bounds of what an ONNX graph allocates and computes, found before it runs, by the shapes of its values.

Every node is passed once with the shapes of its inputs. Values that follow from constants and from the size of the
image alone (they name the shapes of others) are computed by ONNX's reference operators while they are small.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from derain.errors import DerainError
from derain.files.metadata import shorten

SIDES = ((64, 64), (128, 192))
"""Sizes of the images for which a graph is bounded on loading: the second finds what grows faster than the image."""

NUMBERS_PER_PIXEL = 1 << 14
"""Of all values that are needed at one time; Restormer has 2,000 at most."""

OPERATIONS_PER_PIXEL = 1 << 26
"""Multiplications and additions of all nodes; Restormer has 2 million, a PReNet of 100 stages 17 million."""

FOLDED_NUMBERS = 1 << 24
"""Numbers, besides twice those of the file, that onnxruntime may compute from constants when it loads a graph."""

FOLDED_OPERATIONS = 1 << 28

SMALL = 4096
"""Numbers of a value that is computed here."""

NAMES = """
Abs Add And Cast Ceil Concat Constant ConstantOfShape Div Equal Expand Floor Gather Greater GreaterOrEqual Identity Less
LessOrEqual Max Min Mod Mul Neg Not Or Range Reshape ScatterND Shape Slice Split Sqrt Squeeze Sub Transpose Unsqueeze
Where
"""
COMPUTED = frozenset(NAMES.split())
"""Operators of which sizes are computed: each takes about as long as its output is large."""


class Costs:
    """The nodes of a graph and the shapes of its weights, without the weights.

    Args:
        path: Of the file, named by refusals.
        model: ``onnx.ModelProto``, whose operators and weights have been checked.
    """

    def __init__(self, path: Path, model: Any) -> None:
        from onnx import helper, numpy_helper

        self.path = path
        self.checked: set[tuple[int, int]] = set()
        self.types: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.size = (0, 0)
        self.shapes: dict[str, tuple[tuple[int, int], list[int]]] = {}  # with the first size of the image
        self.nodes = list(model.graph.node)
        self.opsets = list(model.opset_import)
        self.version = next((one.version for one in self.opsets if one.domain in {"", "ai.onnx"}), 1)
        self.weights: dict[str, Any] = {}
        self.small: dict[str, Any] = {}
        for tensor in model.graph.initializer:
            self.weights[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            if math.prod(tensor.dims) <= SMALL:
                self.small[tensor.name] = numpy_helper.to_array(tensor)
        self.last = {name: index for index, node in enumerate(self.nodes) for name in (*node.output, *node.input)}
        self.inputs = {one.name: one.type for one in model.graph.input if one.name not in self.weights}
        self.held = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)

    def check(self, height: int, width: int) -> None:
        """Bound the graph for an image of a size.

        Raises:
            DerainError: If the shape of a value does not follow from constants and the image's size, or values or
                operations are beyond the limits above.
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
            raise DerainError(f"{self.path}: {shorten(error, 160)}; give a file of derain export") from error
        self.types, self.values = {}, {}
        self.checked.add((height, width))

    def _bound(self, height: int, width: int) -> None:
        pixels = max(height * width, math.prod(SIDES[0]))
        self.types = self.weights | {name: _sized(kind, height, width) for name, kind in self.inputs.items()}
        self.values, self.size = dict(self.small), (height, width)
        constant = {*self.weights, ""}  # what onnxruntime may compute when it loads the graph
        sizes: dict[str, int] = {}
        live = folded = folded_operations = operations = 0
        for index, node in enumerate(self.nodes):
            shapes = self._pass(node)
            numbers = sum(math.prod(shape) for shape in shapes)
            work = self._work(node, shapes)
            operations += work
            if set(node.input) <= constant or self._is_fixed(node):
                constant.update(node.output)
                folded, folded_operations = folded + numbers, folded_operations + work
            sizes |= dict(zip(filter(None, node.output), map(math.prod, shapes), strict=True))
            live += numbers
            if live > NUMBERS_PER_PIXEL * pixels + 2 * self.held:
                raise ValueError(f"{_name(node)}: {live:,} numbers at one time for an image of {width}×{height} pixels")
            used = [name for name in {*node.input, *node.output} if self.last[name] <= index]
            live -= sum(sizes.pop(name, 0) for name in used)
            if folded > FOLDED_NUMBERS + 2 * self.held or folded_operations > FOLDED_OPERATIONS + 2 * self.held:
                raise ValueError(f"{_name(node)}: {folded:,} numbers are computed from constants")
            if operations > OPERATIONS_PER_PIXEL * pixels:
                raise ValueError(f"more than {operations:,} operations on an image of {width}×{height} pixels")

    def _is_fixed(self, node: Any) -> bool:
        """Return whether a shape was the same for an image of another size; onnxruntime then takes it as a constant."""
        if node.op_type not in {"Shape", "Size"}:
            return False
        shape = self._shape(node.input[0]) if node.op_type == "Size" else self.values[node.output[0]].tolist()
        size, before = self.shapes.setdefault(node.output[0], (self.size, shape))
        return size != self.size and shape == before

    def _pass(self, node: Any) -> Sequence[Sequence[int]]:
        """Note types and, where they are small, values of a node's outputs; return their shapes."""
        from onnx import defs, numpy_helper, shape_inference

        given = {name: self.types[name] for name in node.input if name}
        data = {name: numpy_helper.from_array(self.values[name]) for name in given if name in self.values}
        schema = defs.get_schema(node.op_type, self.version, "")
        found = shape_inference.infer_node_outputs(schema, node, given, data, opset_imports=self.opsets)
        shapes = []
        for name in filter(None, node.output):
            kind = found.get(name)
            if kind is None or not kind.tensor_type.HasField("shape"):
                raise ValueError(f"{_name(node)}: its size does not follow from that of the image")
            dimensions = kind.tensor_type.shape.dim
            if not all(one.HasField("dim_value") and one.dim_value >= 0 for one in dimensions):
                raise ValueError(f"{_name(node)}: its size does not follow from that of the image")
            self.types[name] = kind
            shapes.append([one.dim_value for one in dimensions])
        known = node.op_type == "Shape" or all(name in self.values for name in given)
        if known and node.op_type in COMPUTED and sum(map(math.prod, shapes)) <= SMALL:
            self._compute(node)
        return shapes

    def _compute(self, node: Any) -> None:
        from onnx import helper, numpy_helper, reference

        if node.op_type == "Shape":
            attributes = {one.name: one.i for one in node.attribute}
            shape = self._shape(node.input[0])[attributes.get("start", 0) : attributes.get("end")]
            self.values[node.output[0]] = np.array(shape, np.int64)
            return
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            self.values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            return
        inputs, outputs = (
            [helper.make_value_info(name, self.types[name]) for name in dict.fromkeys(names) if name]
            for names in (node.input, node.output)
        )
        run = reference.ReferenceEvaluator(
            helper.make_graph([node], "node", inputs, outputs), opsets={"": self.version}
        )
        made = run.run(None, {name: self.values[name] for name in node.input if name})
        for name, value in zip(filter(None, node.output), made, strict=True):
            self.values[name] = np.asarray(value)

    def _shape(self, name: str) -> list[int]:
        return [one.dim_value for one in self.types[name].tensor_type.shape.dim]

    def _work(self, node: Any, made: Sequence[Sequence[int]]) -> int:
        """Return about how many multiplications and additions a node takes; never far too few."""
        from onnx import helper

        given = [self._shape(name) for name in node.input if name]
        largest = max((math.prod(shape) for shape in (*given, *made)), default=0)
        out = sum(math.prod(shape) for shape in made)
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        if node.op_type == "Conv":
            return out * math.prod(given[1][1:])
        if node.op_type == "ConvTranspose":
            return math.prod(given[0]) * math.prod(given[1][1:])
        if node.op_type == "MatMul":
            return out * given[0][-1]
        if node.op_type == "Gemm":
            return out * given[0][0 if attributes.get("transA") else 1]
        if node.op_type == "Einsum":
            return _sizes_of_letters(attributes["equation"].decode(), given)
        if node.op_type in {"AveragePool", "MaxPool"}:
            return out * int(math.prod(map(abs, attributes["kernel_shape"])))
        return largest * (16 if node.op_type == "Resize" else 1)


def _sizes_of_letters(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """Return the product of the sizes of an Einsum's letters.

    Example:
        >>> _sizes_of_letters("ab, bc -> ac", [[2, 3], [3, 5]])
        30
    """
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if "." in equation or [len(term) for term in terms] != [len(shape) for shape in shapes]:
        raise ValueError(f"Einsum {equation[:40]}: letters and shapes differ")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        sizes |= dict(zip(term, shape, strict=True))
    return math.prod(sizes.values())


def _sized(kind: Any, height: int, width: int) -> Any:
    """Return the type of an input for an image of a size."""
    from onnx import helper

    tensor = kind.tensor_type
    shape = [one.dim_value or 1 for one in tensor.shape.dim]
    return helper.make_tensor_type_proto(tensor.elem_type, [*shape[:2], height, width] if len(shape) == 4 else shape)


def _name(node: Any) -> str:
    return f"{node.op_type} {node.name or ', '.join(node.output)}"[:80]
