"""Count parameters and multiply-accumulate operations (MACs) of methods, and optionally time them."""

import logging
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from derain.callbacks.results import device_name
from derain.errors import DerainError
from derain.files.metadata import shorten
from derain.files.weights import BUILD_ERRORS
from derain.methods import DerainModule
from derain.methods.catalog import load, methods, use_method
from derain.methods.onnx_model import OnnxNetwork
from derain.methods.registry import class_path
from derain.nn.normalization import OPERATIONS
from derain.progress import track
from derain.restoration import choose_device
from derain.tables import Column, Format, Row, Table, write_results

CONVENTION = (
    "MACs: convolutions and linear layers, as the package thop counts them in the authors' code; of one route, without "
    "CLIP; of one sampling step of a diffusion. For networks of other systems, MACs include layers whose outputs are "
    "unused, and thop's operations for pooling and normalisation where the published figures include them. "
    "+attention: MACs and what thop misses: the products QKᵀ and AV, gates of experts, and deformable and functional "
    "convolutions"
)
"""Definition of the MACs; printed below the table and saved in the JSON."""

PAPER = (
    "CLIP-RPN: Table 4 of its paper gives 32.72 M parameters, which derain counts for two routes, and 293.53 G at "
    "256×256 pixels, where derain counts 150.73 G."
)
"""Note below the table."""

ROUNDS = 3
"""Number of timed forward passes; the table shows their median."""

log = logging.getLogger("derain")


def bench(
    *,
    size: int = 256,
    weights: Sequence[str] = (),
    method: Sequence[str] = (),
    time: bool = False,
    device: str = "auto",
    format: Format = "table",
    out: Path | None = None,
) -> int:
    """Count parameters and multiply-accumulate operations (MACs) of all methods and their variants; --time times them.

    Methods that cannot be counted are skipped with a warning.

    Args:
        size: Height and width of the image in pixels.
        weights: Names or files of weights to count as well, as for derain restore.
        method: Classes of methods outside derain to count as well, such as my_method.MyModule; also needed to load
            weights of such methods.
        time: Also measure the seconds of a forward pass (median of 3).
        device: Device to time on: auto, cpu, cuda, cuda:N or mps.
        format: Output format.
        out: Output file (default: standard output).

    Raises:
        DerainError: If an option is wrong, or weights cannot be loaded or counted.
    """
    if size < 1:
        raise DerainError(f"--size {size}: expected at least 1 pixel")
    chosen_device = choose_device(device)
    for name in method:
        use_method(name)
    loaded = {name: load_countable(name) for name in weights}  # before counting, so that a wrong file fails early
    variants = find_variants()
    timed_device = chosen_device if time else None
    records: list[dict[str, Any]] = []
    for name, build in track(variants.items(), "Counting", len(variants)):
        try:
            records.append(cost_record(name, build(), size, timed_device))
        except DerainError as error:
            log.warning("%s: skipped: %s", name, error)
    records += [cost_record(name, module, size, timed_device) for name, module in loaded.items()]
    content: dict[str, Any] = {"size": size, "convention": CONVENTION, "methods": records}
    if time:
        content["hardware"] = (
            f"{device_name(chosen_device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32"
        )
    write_results(format, cost_table(content), records, content, out)
    return 0


def find_variants() -> dict[str, Callable[[], DerainModule]]:
    """Return functions that build the variants of all known methods that restore images, by the name of the variant.

    A class that does not define ``variants`` itself has one variant, named after the class. If two classes have
    variants of the same name, the second name is followed by the name of its class; if that is in use too, by the path
    of its class.
    """
    builds: dict[str, Callable[[], DerainModule]] = {}
    for method_class in methods():
        if issubclass(method_class, DerainModule):
            variants = vars(method_class).get("variants", {method_class.__name__: {}})
            for name, hyper_parameters in variants.items():
                names = (name, f"{name} ({method_class.__name__})", f"{name} ({class_path(method_class)})")
                unique = next((unused for unused in names if unused not in builds), names[-1])
                builds[unique] = partial(build_method, method_class, **hyper_parameters)
    return builds


def build_method(method_class: type[DerainModule], /, **hyper_parameters: Any) -> DerainModule:
    """Build a method from its class and hyper-parameters.

    Raises:
        DerainError: If the class cannot be built with these hyper-parameters.
    """
    try:
        return method_class(**hyper_parameters)
    except BUILD_ERRORS as error:
        raise DerainError(f"{method_class.__name__}: cannot be built ({shorten(error)})") from error


def cost_record(name: str, method: DerainModule, size: int, device: torch.device | None) -> dict[str, Any]:
    """Return the name and cost of a method, and the seconds of a forward pass if a device is given.

    Args:
        name: Name in the table.
        method: Method on the CPU.
        size: Height and width of the image in pixels.
        device: Device to time on; None: not timed.

    Raises:
        DerainError: If the method cannot be counted.
    """
    record: dict[str, Any] = {"method": name, **count_cost(method, size)}
    if device is not None:
        record["seconds"] = measure_seconds(method, size, device)
    return record


def load_countable(name: str) -> DerainModule:
    """Load a method whose parameters and MACs can be counted.

    Args:
        name: Name or file of weights.

    Raises:
        DerainError: If the weights cannot be loaded, are an ONNX graph, or belong to a module that restores no images.
    """
    method = load(name).module
    if not isinstance(method, DerainModule):
        raise DerainError(f"--weights {name}: {type(method).__name__} does not restore images; omit it")
    if isinstance(method.network, OnnxNetwork):
        raise DerainError(f"--weights {name}: an ONNX graph cannot be counted; give the weights it was exported from")
    return method


# Counting.


class _MacCounter(TorchFunctionMode):
    """Counts the MACs of ``F.conv2d`` and ``F.linear``.

    The size of a weight is that of the parameter from which it was computed: a network may pad or slice the parameter.
    """

    macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.linear):
            channels = out.shape[1 if func is F.conv2d else -1]
            self.macs += _parameter(args[1]).numel() * (out.numel() // channels)
        return out


def _parameter(weight: Tensor) -> Tensor:
    """Return the parameter from which a weight was computed; the weight itself if it was computed from none."""
    node: Any = weight.grad_fn
    while node is not None and not hasattr(node, "variable"):
        node = node.next_functions[0][0]
    return weight if node is None else cast(Tensor, node.variable)


def count_cost(method: DerainModule, size: int) -> dict[str, int]:
    """Count parameters and MACs of a method's network in eval mode, on fake tensors: shapes without values.

    Modules correct the count by their method ``extra_macs``, see `DerainModule.pass_once`.

    Args:
        method: Method on the CPU; it is in eval mode afterwards.
        size: Height and width of the image in pixels.

    Returns:
        ``parameters``; ``macs`` as the Python package thop counts them in the authors' code; ``macs_with_attention``,
        which include those that thop misses.

    Raises:
        DerainError: If the method cannot run on fake tensors, for example because it branches on values.
    """
    added, attention = [], []

    def count_layer(module: nn.Module, inputs: Any, out: Any) -> None:
        if isinstance(module, WindowAttention):  # from timm
            attention.append(2 * inputs[0].numel() * module.window_area)
        elif isinstance(module, nn.BatchNorm2d):
            added.append(OPERATIONS * out.numel())
        elif hasattr(module, "extra_macs"):
            layer_macs, attention_macs = cast(Any, module).extra_macs(inputs, out)
            added.append(layer_macs)
            attention.append(attention_macs)

    fake_tensors = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with register_module_forward_hook(count_layer), torch.enable_grad(), fake_tensors, _MacCounter() as counter:
            method.eval().pass_once(torch.empty(1, 3, size, size))
        parameters = sum(parameter.numel() for parameter in method.network.parameters())
    except (*BUILD_ERRORS, AssertionError) as error:
        raise DerainError(
            f"{type(method).__name__}: MACs cannot be counted ({shorten(error)}); override pass_once with a "
            "computation that does not depend on the values of tensors"
        ) from error
    macs = counter.macs + sum(added)
    return {
        "parameters": parameters,
        "macs": macs,
        "macs_with_attention": macs + sum(attention),
    }


@torch.inference_mode()
def measure_seconds(method: DerainModule, size: int, device: torch.device) -> float:
    """Return the median seconds of ``ROUNDS`` calls of ``pass_once`` on a random image, after a warm-up.

    Args:
        method: Method, which is moved to the device and set to eval mode.
        size: Height and width of the image in pixels.
        device: Device to time on.
    """
    method = method.to(device).eval()
    rainy = torch.rand(1, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(1 + ROUNDS):
        start = perf_counter()
        method.pass_once(rainy)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(perf_counter() - start)
    return statistics.median(times[1:])


# The table.


def cost_table(content: dict[str, Any]) -> Table:
    """Return a table with one row per method.

    Args:
        content: Content of the JSON: ``size``, ``convention``, ``methods``, and ``hardware`` if methods were timed.
    """
    columns = [
        Column("method", align="left"),
        Column("parameters", ","),
        Column("MACs (G)", ".2f"),
        Column("+attention (G)", ".2f"),
    ]
    notes = [f"One image of {content['size']}×{content['size']} pixels. {content['convention']}.", PAPER]
    if "hardware" in content:
        columns.append(Column("seconds", ".4f"))
        notes.append(f"Seconds: median of {ROUNDS}; on {content['hardware']}.")
    rows = []
    for record in content["methods"]:
        values = [
            record["method"],
            record["parameters"],
            record["macs"] / 1e9,
            record["macs_with_attention"] / 1e9,
        ]
        if "seconds" in record:
            values.append(record["seconds"])
        rows.append(Row(values))
    return Table(columns, rows, notes)
