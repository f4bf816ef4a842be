"""Count parameters and multiplications of methods, and time them."""

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

from derain.callbacks.results import cpu_name
from derain.errors import DerainError
from derain.files.metadata import shorten
from derain.files.weights import BUILD_ERRORS
from derain.memory import keep_freed_memory
from derain.methods import DerainModule
from derain.methods.catalog import load, methods, use_method
from derain.methods.onnx_model import OnnxNetwork
from derain.nn.restormer import Attention
from derain.progress import track
from derain.restoration import choose_device
from derain.tables import Column, Format, Row, Table, print_or_write, render

CONVENTION = (
    "MACs: counted as thop counts the authors' code: convolutions and linear layers only, one route, without CLIP, and "
    "for a diffusion one sampling step; +attention: also the products QKᵀ and AV"
)
PAPER = "CLIP-RPN's paper: parameters of two routes, and 293.53 G at 256×256 (Table 4), where derain counts 150.73."
ROUNDS = 3


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
    builds = find_variants() | {name: partial(load_countable, name) for name in weights}
    records: list[dict[str, Any]] = []
    for name, build in track(builds.items(), "Counting", len(builds)):
        module = build()
        record: dict[str, Any] = {"method": name, **count_cost(module, size)}
        if time:
            record["seconds"] = measure_seconds(module, size, chosen_device)
        records.append(record)
    content: dict[str, Any] = {"size": size, "convention": CONVENTION, "methods": records}
    if time:
        hardware = cpu_name() if chosen_device.type == "cpu" else torch.cuda.get_device_name(chosen_device)
        content["hardware"] = f"{hardware}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32"
    print_or_write(render(format, cost_table(content), records, content), out)
    return 0


def find_variants() -> dict[str, Callable[[], DerainModule]]:
    """Return functions that build the variants of all known methods, by name; none of them needs CLIP."""
    builds: dict[str, Callable[[], DerainModule]] = {}
    for method in methods():
        if issubclass(method, DerainModule):
            variants = method.variants or {method.__name__: {}}
            for name, hyper_parameters in variants.items():
                builds[name] = partial(method, **hyper_parameters)
    return builds


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
    convolved before they are repeated.

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
        if isinstance(module, Attention):
            weight = module.project_out.weight
            pixels = out.numel() // len(weight)
            saved.append(weight.numel() * pixels)
            attention.append(2 * pixels * weight.numel() // len(module.temperature))
        elif isinstance(module, WindowAttention):
            attention.append(2 * inputs[0].numel() * module.window_area)
        elif hasattr(module, "extra_macs"):
            plain, of_attention = cast(Any, module).extra_macs(inputs, out)
            saved.append(plain)
            attention.append(of_attention)

    no_content = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with register_module_forward_hook(count_layer), torch.enable_grad(), no_content, _Products() as products:
            method.pass_once(torch.empty(1, 3, size, size))
    except (*BUILD_ERRORS, AssertionError) as error:
        raise DerainError(
            f"{type(method).__name__}: multiplications cannot be counted ({shorten(error)}); override pass_once with a "
            "computation that does not depend on values of tensors"
        ) from error
    macs = products.macs + sum(saved)
    return {
        "parameters": sum(parameter.numel() for parameter in method.network.parameters()),
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
