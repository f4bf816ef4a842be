"""Networks as graphs that run without derain's code: written as ONNX or by torch.export, and ONNX run again.

A graph is one pass of a network, of images of any size. What surrounds it stays outside: CLIP, which chooses routes and
embeds images, and the solver of a diffusion, whose schedule the file tells.
"""

import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain import methods
from derain.errors import DerainError
from derain.methods.base import DerainModule
from derain.methods.cliprpn.module import CLIPRPNModule
from derain.methods.daclipsde.module import DACLIPSDEModule
from derain.methods.limits import built_within
from derain.methods.metadata import check, shorten
from derain.methods.onnx_graphs import read_graph

log = logging.getLogger("derain")

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
    if isinstance(method, CLIPRPNModule):
        method.routing.warn_untrained([method.routing.route])
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
        return OnnxNetwork(path)
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

    Attributes:
        description: Metadata of the file.
        inputs: Names of its inputs in order.

    Raises:
        DerainError: If onnxruntime is not installed, or `read_graph` refuses the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        _demand("onnxruntime", "onnx")
        self.path = path
        self.description, self.costs = read_graph(path)
        self.inputs: list[str] = list(self.description["graph"]["inputs"])
        self.session, self.on_gpu = self._open("CPUExecutionProvider"), False

    def _open(self, *providers: str) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised, and reported by derain
        try:
            return onnxruntime.InferenceSession(self.path, options, providers=list(providers))
        except runtime_errors() as error:
            raise DerainError(
                f"{self.path}: damaged, or no ONNX file ({shorten(error, 120)}); export it again"
            ) from error

    @property
    def contexts(self) -> tuple[bool, bool]:
        """Whether content and degradation embeddings are needed."""
        return "content" in self.inputs, "degradation" in self.inputs

    def forward(self, *given: Tensor, **contexts: Tensor | None) -> Tensor:
        """Runs the graph, image by image; inputs by their order, embeddings by their names.

        Raises:
            DerainError: If the graph cannot be run, needs too much at this size (`Costs`), or returns something else
                than an image of the same size.
            MemoryError: If memory does not suffice.
        """
        if given[0].is_cuda and not self.on_gpu:
            self.session, self.on_gpu = self._open(*_gpu_first()), True
            if "CUDAExecutionProvider" not in self.session.get_providers():
                raise DerainError(
                    f"{self.path}: this onnxruntime has no CUDA; add --device cpu, or: pip install onnxruntime-gpu"
                )
        self.costs.check(*given[0].shape[2:])
        named = {**dict(zip(self.inputs, given, strict=False)), **contexts}
        arrays = {name: one.float().cpu().contiguous() for name, one in named.items() if one is not None}
        done = []
        for place in range(len(given[0])):
            feed = {name: array[place : place + 1].numpy() for name, array in arrays.items()}
            try:
                output = torch.from_numpy(self.session.run(None, feed)[0])
            except runtime_errors() as error:
                if OUT_OF_MEMORY.search(str(error)):
                    raise MemoryError(str(error)) from error
                raise DerainError(f"{self.path}: cannot be run ({shorten(error)}); export it again") from error
            if output.shape != given[0][:1].shape:
                raise DerainError(
                    f"{self.path}: returns shape {tuple(output.shape)} for an image of {tuple(given[0][:1].shape)}; "
                    "export it again"
                )
            done.append(output)
        return torch.cat(done).to(given[0].device)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: onnxruntime has optimised the graph.

        Raises:
            DerainError: Always.
        """
        raise DerainError(f"--compile: {self.path} is ONNX, which is optimised when it is read; leave it out")


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of onnxruntime, which have no common base but ``Exception``."""
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    return (
        errors.EPFail,
        errors.EngineError,
        errors.Fail,
        errors.InvalidArgument,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
        errors.ModelLoaded,
        errors.NoModel,
        errors.NoSuchFile,
        errors.NotImplemented,
        errors.RuntimeException,
    )


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
    """Load an ONNX file that `write` wrote: the method, and one line about it.

    Raises:
        DerainError: If it cannot be read, is not one of derain's, or does not fit its metadata.
    """
    network = OnnxNetwork(path)
    metadata = network.description
    graph, name = metadata["graph"], metadata["method"]
    method = {kind.__name__: kind for kind in methods.METHODS}.get(name)
    if method is not None:
        check(path, metadata, method.metadata_schema, method)
    module: DerainModule = ExportedModule(network)
    if graph["inputs"] != ["rainy"]:
        try:
            if method is not DACLIPSDEModule:
                raise ValueError("only DACLIPSDEModule has a state")
            with built_within(0, path.stat().st_size):
                module = DACLIPSDEModule(**metadata["hyper_parameters"])
            if cast(Any, module).network.contexts != network.contexts:
                raise ValueError(f"contexts {module.hparams['contexts']} and inputs {', '.join(graph['inputs'])}")
        except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            raise DerainError(
                f"{path}: does not fit this derain ({shorten(error)}); it was written by derain "
                f"{shorten(metadata.get('version'), 40)}"
            ) from error
        module.recall(metadata)
        cast(Any, module).network = network
    counts = metadata.get("route_counts") or ()
    for number in graph.get("routes", ()):
        if 0 <= number < len(counts) and counts[number] == 0:
            log.warning("%s: no image took route %d in training: expect a poor result", path, number)
    route = "".join(f", route {number}" for number in graph.get("routes", ()))
    return module.eval(), f"{shorten(name, 60)} as ONNX ({graph['parameters']:,} parameters{route})"
