"""Compare the methods' sizes: parameters, multiplications for an image, and on request time."""

import argparse
import csv
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from derain.callbacks.results import cpu_name
from derain.errors import DerainError
from derain.memory import keep_freed_memory
from derain.methods import (
    CLIPRPNModule,
    DACLIPSDEModule,
    DerainModule,
    PLNLINGANModule,
    PReNetModule,
    RestormerModule,
    catalog,
)
from derain.methods.daclipsde.network import HEAD, CrossAttention, LinearAttention, Upsample
from derain.methods.onnx_model import OnnxNetwork
from derain.methods.plnlingan.shifted_windows import shift_mask
from derain.methods.prenet.network import VARIANTS, PReNet
from derain.nn.restormer import Attention
from derain.progress import track
from derain.restoration import choose_device

TINY: dict[str, Any] = {"dim": 16, "blocks": (1, 1, 1, 1), "refinement": 1}
"""The network of ``experiments/methods/cliprpn-tiny.yaml``."""

TINY_SDE: dict[str, Any] = {"channels": 16, "attention": "none"}
"""The network of ``experiments/methods/daclipsde-tiny.yaml``."""

TINY_GAN: dict[str, Any] = {"channels": 16, "stages": (1, 1, 1, 1), "hierarchy": 1, "heads": 1}
"""The network of ``experiments/methods/plnlingan-tiny.yaml``."""

BUILDS: dict[str, Callable[[], DerainModule]] = {
    **{variant: partial(PReNetModule, variant) for variant in VARIANTS},
    "Restormer": RestormerModule,
    "CLIP-RPN, 1 route": partial(CLIPRPNModule, "none"),
    "CLIP-RPN, 2 routes": partial(CLIPRPNModule, "fixed"),
    "CLIP-RPN, 3 routes": partial(CLIPRPNModule, "fixed", prompts="1"),
    "CLIP-RPN without MGCA": partial(CLIPRPNModule, "fixed", mgca=False),
    "CLIP-RPN, tiny": partial(CLIPRPNModule, "fixed", **TINY),
    "IR-SDE, one step": partial(DACLIPSDEModule, "none", multipliers=(2, 4, 8, 16)),
    "DA-CLIP + IR-SDE, one step": DACLIPSDEModule,
    "IR-SDE, tiny, one step": partial(DACLIPSDEModule, "none", **TINY_SDE),
    "PLNLIN": PLNLINGANModule,
    "PLNLIN, tiny": partial(PLNLINGANModule, **TINY_GAN),
}
"""Every method and variant; none of them needs CLIP to be built."""

CONVENTION = (
    "MACs: counted by derain as thop counts the authors' code, convolutions and linear layers alone, one route "
    "executed, CLIP itself left out, of a diffusion one of its steps; +attention: also the products QKᵀ and AV"
)
PAPER = "CLIP-RPN's paper has the parameters of two routes, and 293.53 G at 256×256 (Table 4) where we count 150.73."
ROUNDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--size", type=int, default=256, help="side of the image in pixels (default 256)")
    parser.add_argument(
        "--weights",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="also, as of restore",
    )
    parser.add_argument("--time", action="store_true", help=f"also seconds a forward, median of {ROUNDS}")
    parser.add_argument("--device", default="auto", help="of --time: auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--format", choices=list(FORMATS), default="table")


def run(args: argparse.Namespace) -> int:
    """Counts, and prints the result."""
    if args.size < 1:
        raise DerainError(f"--size {args.size}: must be at least 1 pixel")
    device = choose_device(args.device)
    keep_freed_memory()
    builds = BUILDS | {str(file): partial(getattr, catalog.load(file), "module") for file in args.weights}
    rows = []
    for name, build in track(builds.items(), "Counting", len(builds)):
        method = build()
        if not isinstance(method, DerainModule):
            raise DerainError(
                f"--weights {name}: holds {type(method).__name__}, which restores no images; leave it out"
            )
        if isinstance(method.network, OnnxNetwork):
            raise DerainError(f"--weights {name}: is ONNX, which is not counted; give what it was exported from")
        row = {"method": name, **cost(method, args.size)}
        rows.append(row | ({"seconds": seconds(method, args.size, device)} if args.time else {}))
    result: dict[str, Any] = {"size": args.size, "convention": CONVENTION, "methods": rows}
    if args.time:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        result["hardware"] = f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32"
    print(FORMATS[args.format](result), end="")
    return 0


# Numbers.


class _Products(TorchFunctionMode):
    """Counts the multiplications of convolutions and linear layers, with the weights as the method keeps them.

    What a network executes of a weight may be padded for speed, or a part.
    """

    macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.linear):
            channels = out.shape[1 if func is F.conv2d else -1]
            self.macs += _kept(args[1]).numel() * (out.numel() // channels)
        return out


def _kept(weight: Tensor) -> Tensor:
    """The parameter that a weight was made of."""
    node: Any = weight.grad_fn
    while node is not None and not hasattr(node, "variable"):
        node = node.next_functions[0][0]
    return weight if node is None else cast(Tensor, node.variable)


def cost(method: DerainModule, size: int) -> dict[str, int]:
    """Parameters of a method's network, and its multiplications for an image, by tensors without content.

    Our networks spare products of the authors': attention's projection is multiplied with its matrix rather than with
    pixels, PReNet's first stage has no state to forget, and pixels are not convolved after they were copied. They are
    added.

    Args:
        method: On the CPU.
        size: Side of the image.

    Returns:
        ``parameters``; ``macs`` as the Python package thop counts them; ``macs_with_attention``.
    """
    spared, attention = [], []

    def watch(module: nn.Module, inputs: Any, out: Any) -> None:
        if isinstance(module, Attention):
            weight = module.project_out.weight
            pixels = out.numel() // len(weight)
            spared.append(weight.numel() * pixels)
            attention.append(2 * pixels * weight.numel() // len(module.temperature))
        elif isinstance(module, LinearAttention):
            weight = cast(Tensor, module.to_out[0].weight)
            pixels = out.numel() // len(weight)
            spared.append((weight.numel() - module.to_qkv.weight.numel()) * pixels)  # two parts of it, counted whole
            attention.append(2 * pixels * weight.shape[1] * HEAD)
        elif isinstance(module, Upsample):
            weight = cast(Tensor, module[1].weight)
            spared.append(weight.numel() * (out.numel() // len(weight)))
        elif isinstance(module, CrossAttention):
            attention.append(2 * inputs[0].shape[1] * inputs[1].shape[1] * inputs[0].shape[2])
        elif isinstance(module, WindowAttention):
            attention.append(2 * inputs[0].numel() * module.window_area)
        elif isinstance(module, PReNet) and module.recurrent:
            spared.append(module.get_parameter("conv_f.0.weight").numel() * size**2)

    without_content = FakeTensorMode(allow_non_fake_inputs=True)
    with register_module_forward_hook(watch), torch.enable_grad(), without_content, _Products() as products:
        method.pass_once(torch.empty(1, 3, size, size))
    shift_mask.cache_clear()  # of masks without content
    macs = products.macs + sum(spared)
    return {
        "parameters": sum(parameter.numel() for parameter in method.network.parameters()),
        "macs": macs,
        "macs_with_attention": macs + sum(attention),
    }


@torch.inference_mode()
def seconds(method: DerainModule, size: int, device: torch.device) -> float:
    """Median time of a pass, after one that is not counted."""
    method = method.to(device).eval()
    rainy = torch.rand(1, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        method.pass_once(rainy)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# Forms.


def _cells(result: dict[str, Any]) -> list[list[str]]:
    """Titles, and a row a method."""
    titles = ["method", "parameters", "MACs, G", "+attention, G", *(["seconds"] if "hardware" in result else [])]
    return [
        titles,
        *(
            [
                row["method"],
                f"{row['parameters']:,}",
                f"{row['macs'] / 1e9:.2f}",
                f"{row['macs_with_attention'] / 1e9:.2f}",
                *([f"{row['seconds']:.4f}"] if "seconds" in row else []),
            ]
            for row in result["methods"]
        ),
    ]


def _notes(result: dict[str, Any]) -> list[str]:
    notes = [f"One image of {result['size']}×{result['size']} pixels. {result['convention']}.", PAPER]
    return notes + ([f"Median seconds of {ROUNDS} on {result['hardware']}."] if "hardware" in result else [])


def _table(result: dict[str, Any]) -> str:
    (first, *titles), *rows = _cells(result)
    table = Table(first)
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as captured:
        console.print(table, *map(Text, _notes(result)), sep="\n")
    return captured.get()


def _json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2, ensure_ascii=False) + "\n"


def _csv(result: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(result["methods"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["methods"])
    return text.getvalue()


def _markdown(result: dict[str, Any]) -> str:
    titles, *rows = _cells(result)
    lines: Sequence[Sequence[str]] = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *_notes(result)]) + "\n"


FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {
    "table": _table,
    "json": _json,
    "csv": _csv,
    "markdown": _markdown,
}
