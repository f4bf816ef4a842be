"""Write a method's network as ONNX or by torch.export, and check the file against torch at five odd sizes."""

import argparse
import sys
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from derain.errors import DerainError
from derain.images import write_whole
from derain.methods import METHODS, exported, weights
from derain.progress import track

SIZES = ((37, 31), (63, 65), (101, 77), (1, 1), (131, 97))
"""Heights and widths at which file and network are compared."""

ALLOWED = 1e-4
"""Largest difference of any value, where images are in [0, 1] and noise has unit variance."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("output", type=Path, help="the file: NAME.onnx or NAME.pt2")
    parser.add_argument("--weights", default="default", help="name or file as of derain restore (default: %(default)s)")
    parser.add_argument("--format", choices=get_args(exported.Format), default="onnx", help="default onnx")
    parser.add_argument("--route", type=int, help="the route of all images (CLIP-RPN; CLIP stays outside)")


def run(args: argparse.Namespace) -> int:
    """Exports, compares, and keeps the file if it does what the network does."""
    suffix = exported.SUFFIXES[args.format]
    if args.output.suffix.lower() != suffix:
        raise DerainError(f"{args.output}: a file of --format {args.format} must end in {suffix}")
    method, note = weights.load(args.weights)
    if not isinstance(method, METHODS) or isinstance(method.network, exported.OnnxNetwork):
        raise DerainError(f"{args.weights}: {note} cannot be exported; give weights of a method of derain")
    if args.route is not None:
        method.take_route(args.route)
    graph = exported.graph_of(method)
    print(f"{args.weights}: {note}; recording its network, which takes up to minutes", file=sys.stderr)
    with write_whole(args.output) as temporary:
        run_file = exported.write(graph, method.describe(), temporary, args.format)
        differences = compare(graph, run_file)
        show(differences)
        if not max(differences.values()) <= ALLOWED:  # also if one is no number
            raise DerainError(
                f"{args.output}: not written, as it differs from torch by more than {ALLOWED:g} (see above); "
                "use the weights themselves"
            )
    print(f"wrote {args.output}", file=sys.stderr)
    return 0


@torch.inference_mode()
def compare(graph: exported.Graph, run_file: exported.Run) -> dict[tuple[int, int], float]:
    """The largest difference between a network and its file, by size of the image."""
    differences = {}
    for size in track(SIZES, "Comparing", len(SIZES)):
        inputs = graph.example(*size)
        apart = (graph(*inputs) - run_file(*inputs)).abs()
        differences[size] = float(apart.max())
    return differences


def show(differences: dict[tuple[int, int], float]) -> None:
    """Prints a table."""
    table = Table("size", title="file against torch")
    table.add_column("largest difference", justify="right")
    for (height, width), difference in differences.items():
        table.add_row(f"{width}×{height}", f"{difference:.1e}")
    Console().print(table)
