"""Count parameters and multiplications of methods, and time them."""

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
from derain.memory import keep_freed_memory
from derain.methods import DerainModule
from derain.methods.catalog import load, methods, use_method
from derain.methods.onnx_model import OnnxNetwork
from derain.methods.registry import class_path
from derain.nn.normalization import OPERATIONS
from derain.progress import track
from derain.restoration import choose_device
from derain.tables import Column, Format, Row, Table, write_results

CONVENTION = (
    "MACs: counted as thop counts the authors' code: convolutions and linear layers, one route, without CLIP, and for "
    "a diffusion one sampling step; in networks of other systems also layers whose results are not used, and thop's "
    "operations for pooling and normalisation where printed figures have them; +attention: also what thop does not "
    "see: the products QKᵀ and AV, gates of experts, and deformable and functional convolutions"
)
PAPER = "CLIP-RPN's paper: parameters of two routes, and 293.53 G at 256×256 (Table 4), where derain counts 150.73."
ROUNDS = 3

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
    """Count parameters and multiplications of all methods and their variants, and time them.

    Args:
        size: Side of the image in pixels.
        weights: Names or files of weights to add, as for derain restore.
        method: Classes of methods outside derain to count as well, such as my_method.MyModule; also needed to load
            weights of such methods.
        time: Also measure seconds of a forward pass, median of 3.
        device: Device to measure on: auto, cpu, cuda, cuda:N or mps.
        format: Output format.
        out: Write to this file.

    Raises:
        DerainError: If weights cannot be loaded or counted.
    """
    if size < 1:
        raise DerainError(f"--size {size}: expected at least 1 pixel")
    chosen_device = choose_device(device)
    keep_freed_memory()
    for name in method:
        use_method(name)
    loaded = {name: load_countable(name) for name in weights}  # a wrong file is reported before anything is counted
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
    """Return functions that build the variants of all known methods, by name; none of them needs CLIP.

    A class without ``variants`` of its own has one, of its own name: those of its base class are another method. One
    that trains a network of another class has empty ``variants``. A name that another class has already used is
    followed by the class path.
    """
    builds: dict[str, Callable[[], DerainModule]] = {}
    for method in methods():
        if issubclass(method, DerainModule):
            variants = vars(method).get("variants", {method.__name__: {}})
            for name, hyper_parameters in variants.items():
                unique = f"{name} ({class_path(method)})" if name in builds else name
                builds[unique] = partial(build_method, method, **hyper_parameters)
    return builds


def build_method(method: type[DerainModule], /, **hyper_parameters: Any) -> DerainModule:
    """Build a method for counting.

    Raises:
        DerainError: If it cannot be built with these hyper-parameters.
    """
    try:
        return method(**hyper_parameters)
    except BUILD_ERRORS as error:
        raise DerainError(f"{method.__name__}: cannot be built ({shorten(error)})") from error


def cost_record(name: str, method: DerainModule, size: int, device: torch.device | None) -> dict[str, Any]:
    """Return the cost of a method, and its seconds on a device if one is given.

    Raises:
        DerainError: If it cannot be counted.
    """
    record: dict[str, Any] = {"method": name, **count_cost(method, size)}
    if device is not None:
        record["seconds"] = measure_seconds(method, size, device)
    return record


def load_countable(name: str) -> DerainModule:
    """Load a method whose parameters and multiplications can be counted.

    Raises:
        DerainError: If the file has a module that restores no images, or a graph without parameters.
    """
    method = load(name).module
    if not isinstance(method, DerainModule):
        raise DerainError(f"--weights {name}: {type(method).__name__} does not restore images; omit it")
    if isinstance(method.network, OnnxNetwork):
        raise DerainError(f"--weights {name}: ONNX graphs cannot be counted; use the weights that were exported")
    return method


# Counting.


class _Products(TorchFunctionMode):
    """Counts the multiplications of convolutions and linear layers.

    Counts with the parameter that a weight was computed from, since a network may pad a weight or use a part of it.
    """

    macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.linear):
            channels = out.shape[1 if func is F.conv2d else -1]
            self.macs += _parameter(args[1]).numel() * (out.numel() // channels)
        return out


def _parameter(weight: Tensor) -> Tensor:
    """Return the parameter that a weight was computed from."""
    node: Any = weight.grad_fn
    while node is not None and not hasattr(node, "variable"):
        node = node.next_functions[0][0]
    return weight if node is None else cast(Tensor, node.variable)


def count_cost(method: DerainModule, size: int) -> dict[str, int]:
    """Count parameters and multiplications of a method's network, on tensors without content.

    derain's networks save products of the authors' code, which are added here: attention multiplies its projection with
    the attention matrix instead of the pixels, the first stage of PReNet has no state to forget, and pixels are
    convolved before they are repeated. Further differences from thop are methods ``extra_macs`` of the modules.

    Args:
        method: Method on the CPU.
        size: Side of the image in pixels.

    Returns:
        ``parameters``; ``macs`` as the Python package thop counts them; ``macs_with_attention``.

    Raises:
        DerainError: If the method cannot run on tensors without content, such as one that branches by their values.
    """
    saved, attention = [], []

    def count_layer(module: nn.Module, inputs: Any, out: Any) -> None:
        if isinstance(module, WindowAttention):  # of timm
            attention.append(2 * inputs[0].numel() * module.window_area)
        elif isinstance(module, nn.BatchNorm2d):
            saved.append(OPERATIONS * out.numel())
        elif hasattr(module, "extra_macs"):
            plain, of_attention = cast(Any, module).extra_macs(inputs, out)
            saved.append(plain)
            attention.append(of_attention)

    no_content = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with register_module_forward_hook(count_layer), torch.enable_grad(), no_content, _Products() as products:
            method.pass_once(torch.empty(1, 3, size, size))
        parameters = sum(parameter.numel() for parameter in method.network.parameters())
    except (*BUILD_ERRORS, AssertionError) as error:
        raise DerainError(
            f"{type(method).__name__}: multiplications cannot be counted ({shorten(error)}); override pass_once with a "
            "computation that does not depend on values of tensors"
        ) from error
    macs = products.macs + sum(saved)
    return {
        "parameters": parameters,
        "macs": macs,
        "macs_with_attention": macs + sum(attention),
    }


@torch.inference_mode()
def measure_seconds(method: DerainModule, size: int, device: torch.device) -> float:
    """Return the median time of a forward pass after a warm-up."""
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
    """Return a table with one row a method.

    Args:
        content: Content of the JSON.
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
