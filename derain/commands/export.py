"""Write a method as ONNX or by torch.export, and check the file against the method at five odd sizes."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from derain.errors import DerainError
from derain.export import Format, export
from derain.methods import DerainModule
from derain.methods.catalog import load
from derain.restoration import take_route


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("output", type=Path, help="the file: NAME.onnx or NAME.pt2")
    parser.add_argument("--weights", default="default", help="name or file as of derain restore (default: %(default)s)")
    parser.add_argument("--format", choices=get_args(Format), default="onnx", help="default onnx")
    parser.add_argument("--route", type=int, help="the route of all images (CLIP-RPN; CLIP stays outside)")


def run(args: argparse.Namespace) -> int:
    """Export, compare, and keep the file if it computes what the method does."""
    method, note = load(args.weights)
    if not isinstance(method, DerainModule):
        raise DerainError(f"{args.weights}: {note} does not restore images; use weights of a method")
    if args.route is not None:
        take_route(method, args.route)
    print(f"{args.weights}: {note}; exporting takes up to minutes", file=sys.stderr)
    show(export(method, args.output, args.format))
    print(f"wrote {args.output}", file=sys.stderr)
    return 0


def show(differences: dict[tuple[int, int], float]) -> None:
    """Print a table of the differences by image size."""
    table = Table("size", title="file against method")
    table.add_column("largest difference", justify="right")
    for (height, width), difference in differences.items():
        table.add_row(f"{width}×{height}", f"{difference:.1e}")
    Console().print(table)
