"""Methods whose network is an ONNX file of `derain export`, which onnxruntime runs."""

import importlib.util
import logging
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.files.metadata import check, shorten
from derain.files.weights import BUILD_ERRORS
from derain.memory import is_out_of_memory
from derain.methods.base import DerainModule
from derain.methods.graph import Graph
from derain.methods.interfaces import RunsGraph
from derain.methods.onnx_graphs import read_graph
from derain.methods.registry import find

log = logging.getLogger("derain")


def require_packages(*packages: str) -> None:
    """Check that packages are installed.

    Raises:
        DerainError: If a package is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise DerainError(f"ONNX needs {package}; install it with: pip install 'derain[export]'")


class OnnxNetwork(nn.Module):
    """Graph of an ONNX file, run by onnxruntime: on the CPU at first, and on a GPU as soon as images are on one.

    Args:
        path: The file.

    Attributes:
        metadata: Metadata of the file.
        costs: Memory and operations of the graph, which are checked at every new image size.
        inputs: Names of the inputs of the graph, in order.

    Raises:
        DerainError: If onnx or onnxruntime is not installed, or `read_graph` or onnxruntime refuses the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        require_packages("onnxruntime", "onnx")
        self.path = path
        self.metadata, self.costs = read_graph(path)
        self.inputs: list[str] = list(self.metadata["graph"]["inputs"])
        self.session = self._open("CPUExecutionProvider")
        self.gpu: torch.device | None = None

    def _open(self, *providers: str | tuple[str, dict[str, Any]]) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # fatal errors only; all others are raised
        try:
            return onnxruntime.InferenceSession(self.path, options, providers=list(providers))
        except runtime_errors() as error:
            raise DerainError(
                f"{self.path}: damaged, or not an ONNX file ({shorten(error, 120)}); export it again"
            ) from error

    def forward(self, *inputs: Tensor, **named: Tensor | None) -> Tensor:
        """Run the graph on each image of a batch.

        Args:
            *inputs: The first inputs of the graph, in order: tensors with the batch as first axis. The first one is
                ``rainy`` or ``state``, ``(b, 3, h, w)``.
            **named: The other inputs, by name; None is ignored.

        Returns:
            Results of the graph, ``(b, 3, h, w)``, on the device of the first tensor.

        Raises:
            DerainError: If the graph cannot be run, exceeds the limits of `Costs` at this image size, or its result
                does not have the shape of the images; or if the tensors are on a GPU and onnxruntime is installed
                without CUDA.
            MemoryError: If memory is insufficient.
        """
        images = inputs[0]
        self._use(images.device)
        self.costs.check(*images.shape[2:])
        arrays = {}
        for name, tensor in [*zip(self.inputs, inputs, strict=False), *named.items()]:
            if tensor is not None:
                arrays[name] = tensor.float().cpu().contiguous().numpy()
        outputs = []
        for index in range(len(images)):
            output = self._run({name: array[index : index + 1] for name, array in arrays.items()})
            if output.shape != images[:1].shape:
                raise DerainError(
                    f"{self.path}: returns shape {tuple(output.shape)} for an image of {tuple(images[:1].shape)}; "
                    "export it again"
                )
            outputs.append(output)
        return torch.cat(outputs).to(images.device)

    def _run(self, arrays: dict[str, Any]) -> Tensor:
        try:
            return torch.from_numpy(self.session.run(None, arrays)[0])
        except runtime_errors() as error:
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise DerainError(f"{self.path}: cannot be run ({shorten(error)}); export it again") from error

    def _use(self, device: torch.device) -> None:
        """If the device is a GPU other than that of the session, run the graph there from now on."""
        if device.type != "cuda" or self.gpu == device:
            return
        session = self._open(*_gpu_first(device.index))
        if "CUDAExecutionProvider" not in session.get_providers():
            raise DerainError(
                f"{self.path}: onnxruntime is installed without CUDA; add --device cpu, or pip install onnxruntime-gpu"
            )
        self.session, self.gpu = session, device

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refuse compilation: onnxruntime has optimised the graph already.

        Raises:
            DerainError: Always.
        """
        raise DerainError(
            f"--compile: {self.path} is an ONNX file, which onnxruntime has optimised already; omit the option"
        )


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of onnxruntime; their only common base class is ``Exception``."""
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


def _gpu_first(index: int) -> list[str | tuple[str, dict[str, Any]]]:
    """Return the providers of a session on the GPU with this index; on the CPU if onnxruntime has no CUDA."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"device_id": index}), "CPUExecutionProvider"]


class OnnxModule(DerainModule):
    """Method whose ``forward`` runs an ONNX graph that has only the input ``rainy``.

    Args:
        network: Network that runs the graph.
    """

    bytes_per_pixel: int = 8000  # 6,400 were measured for Restormer

    def __init__(self, network: OnnxNetwork) -> None:
        super().__init__()
        self.network = network
        self.restore_metadata(network.metadata)

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restore images in [0, 1] of any size."""
        return cast(Tensor, self.network(rainy))

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the file."""
        return cast(OnnxNetwork, self.network).metadata

    def export_graph(self) -> Graph:
        """Refuse the export.

        Raises:
            DerainError: Always.
        """
        path = cast(OnnxNetwork, self.network).path
        raise DerainError(f"{path}: is exported already; use the weights that it was exported from")


def load(path: Path) -> tuple[DerainModule, str]:
    """Load an ONNX file of `derain export`.

    Returns:
        The method in eval mode, and its description for messages.

    Raises:
        DerainError: If `OnnxNetwork` refuses the file; or, for a network of a diffusion, if the method is not known or
            does not fit the metadata.
    """
    network = OnnxNetwork(path)
    metadata = network.metadata
    graph_metadata = metadata["graph"]
    if graph_metadata["inputs"] == ["rainy"]:  # the graph computes ``forward``; the class of the method is not needed
        module: DerainModule = OnnxModule(network)
    else:
        module = _with_graph(path, network)
    routes = list(graph_metadata.get("routes", ()))
    counts = metadata.get("route_counts") or ()
    for route in routes:
        if isinstance(counts, list) and 0 <= route < len(counts) and counts[route] == 0:
            log.warning("%s: route %d was not trained; expect a poor result", path, route)
    suffix = "".join(f", route {route}" for route in routes)
    parameters = f"{graph_metadata['parameters']:,} parameters{suffix}"
    return module.eval(), f"{shorten(metadata['method'], 60)} as ONNX ({parameters})"


def _with_graph(path: Path, network: OnnxNetwork) -> DerainModule:
    """Build the method that runs the graph in place of its network.

    Raises:
        DerainError: If the class that wrote the file is not known, is not a `RunsGraph`, or does not fit the metadata.
    """
    metadata = network.metadata
    method = find(path, metadata)
    check(path, metadata, method.metadata_schema, method)
    try:
        if not issubclass(method, RunsGraph):
            raise ValueError(f"{method.__name__} cannot run a graph with inputs {', '.join(network.inputs)}")
        with method.limits(0, path.stat().st_size):
            module = method.from_graph(metadata, network, network.inputs)
    except BUILD_ERRORS as error:
        raise DerainError(
            f"{path}: written by derain {shorten(metadata.get('version'), 40)}, does not fit the installed version "
            f"({shorten(error)}); export the weights again"
        ) from error
    return cast(DerainModule, module)
