"""Networks as graphs that run without derain's code: written as ONNX or by torch.export, and ONNX run again.

A graph is one pass of a network, of images of any size. What surrounds it stays outside: CLIP, which chooses routes and
embeds images, and the solver of a diffusion, whose schedule the file tells.
"""

import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.methods.base import DerainModule
from derain.methods.cliprpn.module import CLIPRPNModule
from derain.methods.daclipsde.module import DACLIPSDEModule

Format = Literal["onnx", "torch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
"""How files of a format are called."""

OPSET = 17
"""Of ONNX: the first with layer normalisation; newer ones bring nothing that the networks use."""

TIME = 3.0
"""At which a diffusion's network is recorded; any does."""

IMAGES = frozenset({"rainy", "state"})
"""Inputs of any size."""


class Graph(nn.Module):
    """One pass of a method's network, as it is exported: tensors in, one tensor out.

    Args:
        method: Any of derain's; one with routes takes the one of its routing.

    Attributes:
        inputs: Names of the tensors that it takes, in order.
    """

    def __init__(self, method: DerainModule) -> None:
        super().__init__()
        self.network = method.network
        self.options: dict[str, Any] = {}
        self.inputs = ["rainy"]
        self.context = 0
        if isinstance(method, CLIPRPNModule):
            self.options["routes"] = [method.routing.route]
        if isinstance(method, DACLIPSDEModule):
            self.context = method.hparams["context"]
            wanted = zip(("content", "degradation"), method.network.contexts, strict=True)
            self.inputs = ["state", "rainy", "times", *(name for name, needed in wanted if needed)]

    def forward(self, *inputs: Tensor) -> Tensor:
        """The derained image, or of a diffusion the noise in a state."""
        out = self.network(**dict(zip(self.inputs, inputs, strict=True)), **self.options)
        return cast(Tensor, out if isinstance(out, Tensor) else out[0])

    def example(self, height: int, width: int) -> tuple[Tensor, ...]:
        """Inputs for one image of a size, always the same ones."""
        random = torch.Generator().manual_seed(height * 10_000 + width)
        shapes = {name: (1, 3, height, width) if name in IMAGES else (1, self.context) for name in self.inputs}
        made = {name: torch.rand(shape, generator=random) for name, shape in shapes.items()}
        return tuple(torch.tensor([TIME]) if name == "times" else one for name, one in made.items())

    def describe(self) -> dict[str, Any]:
        """What a file says of the graph, besides what its method says of itself."""
        count = sum(parameter.numel() for parameter in self.network.parameters())
        return {"inputs": self.inputs, "parameters": count, **self.options}


def graph_of(method: DerainModule) -> Graph:
    """The graph of a method in eval mode.

    Raises:
        DerainError: If CLIP would choose between its routes.
    """
    if isinstance(method, CLIPRPNModule) and method.routing.perception is not None:
        raise DerainError(
            f"these weights have {method.routing.count} routes, and a graph takes one; choose it by --route 0 to "
            f"--route {method.routing.count - 1}"
        )
    return Graph(method).eval()


Run = Callable[..., Tensor]
"""Runs a graph: tensors in the order of its inputs."""


@torch.no_grad()
def write(graph: Graph, description: Mapping[str, Any], path: Path, form: Format) -> Run:
    """Writes a graph, and gives what runs the file.

    Args:
        graph: In eval mode, on the CPU.
        description: What the method says of itself; becomes the entry ``derain`` of the file.
        path: The file.
        form: ``onnx``, or ``torch`` for `torch.export`.

    Raises:
        DerainError: If a package for the format is not installed.
    """
    told = json.dumps({**description, "graph": graph.describe()})
    if form == "onnx":
        _write_onnx(graph, told, path)
        return OnnxNetwork(path, graph.inputs)
    _write_program(graph, told, path)
    return cast(Run, torch.export.load(path).module())


def _write_onnx(graph: Graph, told: str, path: Path) -> None:
    _demand("onnx", "onnxruntime")
    import onnx

    axes = {name: {2: "height", 3: "width"} for name in (*graph.inputs, "out") if name in {*IMAGES, "out"}}
    with warnings.catch_warnings():
        # The exporter by tracing is deprecated: the newer one takes minutes for what it does in seconds, as it reasons
        # about sizes; what it gives is compared with the network at many sizes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            graph.example(75, 90),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=graph.inputs,
            output_names=["out"],
            dynamic_axes=axes,
        )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"derain": told})
    onnx.save(model, path)


def _write_program(graph: Graph, told: str, path: Path) -> None:
    height, width = (torch.export.Dim(name, min=1, max=1 << 16) for name in ("height", "width"))
    sizes = tuple({2: height, 3: width} if name in IMAGES else {} for name in graph.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        program = torch.export.export(
            graph,
            graph.example(75, 90),
            dynamic_shapes=(sizes,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        torch.export.save(program, path, extra_files={"derain.json": told})


def _demand(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise DerainError(f"ONNX needs {package}; install it with: pip install 'derain[export]'")


# Running ONNX.

OUT_OF_MEMORY = re.compile("bad_alloc|[Ff]ailed to allocate|out of memory")
"""How onnxruntime says it."""


class OnnxNetwork(nn.Module):
    """A graph in an ONNX file, run by onnxruntime: on a GPU if the images are there and onnxruntime can.

    Args:
        path: The file.
        inputs: Names of its inputs in order; none: as the file tells.

    Attributes:
        description: What the file says of itself; empty if it is not one of derain's.

    Raises:
        DerainError: If onnxruntime is not installed, or the file is damaged.
    """

    def __init__(self, path: Path, inputs: Sequence[str] | None = None) -> None:
        super().__init__()
        _demand("onnxruntime")
        self.path = path
        self.session, self.on_gpu = self._open("CPUExecutionProvider"), False
        self.description = _description(self.session)
        self.inputs = [one.name for one in self.session.get_inputs()] if inputs is None else list(inputs)

    def _open(self, *providers: str) -> Any:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised, and told by us
        try:
            return onnxruntime.InferenceSession(self.path, options, providers=list(providers))
        except (
            errors.Fail,
            errors.InvalidArgument,
            errors.InvalidGraph,
            errors.InvalidProtobuf,
            errors.NotImplemented,
            errors.RuntimeException,
        ) as error:
            reason = " ".join(str(error).split())[:120]
            raise DerainError(f"{self.path}: damaged, or no ONNX file ({reason}); export it again") from error

    @property
    def contexts(self) -> tuple[bool, bool]:
        """Whether content and degradation embeddings are needed."""
        return "content" in self.inputs, "degradation" in self.inputs

    def forward(self, *given: Tensor, **contexts: Tensor | None) -> Tensor:
        """Runs the graph, image by image; inputs by their order, embeddings by their names.

        Raises:
            MemoryError: If memory does not suffice.
        """
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        if given[0].is_cuda and not self.on_gpu:
            self.session, self.on_gpu = self._open(*_gpu_first()), True
            if "CUDAExecutionProvider" not in self.session.get_providers():
                raise DerainError(
                    f"{self.path}: this onnxruntime has no CUDA; add --device cpu, or: pip install onnxruntime-gpu"
                )
        named = {**dict(zip(self.inputs, given, strict=False)), **contexts}
        arrays = {name: one.float().cpu().contiguous() for name, one in named.items() if one is not None}
        done = []
        for place in range(len(given[0])):
            feed = {name: array[place : place + 1].numpy() for name, array in arrays.items()}
            try:
                done.append(torch.from_numpy(self.session.run(None, feed)[0]))
            except (errors.Fail, errors.RuntimeException) as error:
                if OUT_OF_MEMORY.search(str(error)):
                    raise MemoryError(str(error)) from error
                raise
        return torch.cat(done).to(given[0].device)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: onnxruntime has optimised the graph.

        Raises:
            DerainError: Always.
        """
        raise DerainError(f"--compile: {self.path} is ONNX, which is optimised when it is read; leave it out")


def _description(session: Any) -> dict[str, Any]:
    try:
        told = json.loads(session.get_modelmeta().custom_metadata_map.get("derain", "{}"))
    except json.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}


def _gpu_first() -> list[str]:
    import onnxruntime

    known = onnxruntime.get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in known]


class ExportedModule(DerainModule):
    """A method that restores in one pass, from an ONNX file.

    Args:
        network: What runs the file.
    """

    bytes_per_pixel: ClassVar[int] = 8000  # Restormer takes 6,400 by onnxruntime, the others less

    def __init__(self, network: OnnxNetwork) -> None:
        super().__init__()
        self.network = network
        self.recall(network.description)

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restores images of any size in [0, 1]."""
        return cast(Tensor, self.network(rainy))

    def describe(self) -> dict[str, Any]:
        """What the file says."""
        return cast(OnnxNetwork, self.network).description


def load(path: Path) -> tuple[DerainModule, str]:
    """Opens an ONNX file that `write` wrote: the method, and one line for people.

    Raises:
        DerainError: If it cannot be read, is not one of derain's, or its method is unknown here.
    """
    network = OnnxNetwork(path)
    told = network.description
    if not {"method", "graph", "hyper_parameters"} <= told.keys() or not {"inputs", "parameters"} <= set(told["graph"]):
        raise DerainError(
            f"{path}: ONNX that does not say its method (no 'derain' entry); give a file of derain export"
        )
    module: DerainModule = ExportedModule(network)
    if told["graph"]["inputs"] != ["rainy"]:
        try:
            module = DACLIPSDEModule(**told["hyper_parameters"])
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DerainError(f"{path}: does not fit this derain ({reason}); it is of {told.get('version')}") from error
        module.recall(told)
        cast(Any, module).network = network
    route = "".join(f", route {one}" for one in told["graph"].get("routes", ()))
    return module.eval(), f"{told['method']} as ONNX ({told['graph']['parameters']:,} parameters{route})"
