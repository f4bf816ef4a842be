"""Export a method as ONNX or with torch.export."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from derain.errors import DerainError
from derain.export import Format
from derain.export import export as write
from derain.methods import DerainModule
from derain.methods.catalog import load
from derain.restoration import set_route


def export(
    out: Path,
    *,
    weights: str = "default",
    method: str | None = None,
    format: Format = "onnx",
    route: int | None = None,
) -> int:
    """Export a method as ONNX or with torch.export, and compare the results of the file and the method at five sizes.

    Args:
        out: Output file: NAME.onnx, or NAME.pt2 for --format torch.
        weights: Name or file of weights, as for derain restore.
        method: Class of a method outside derain that the weights belong to, such as my_method.MyModule.
        format: onnx, or torch for a program of torch.export.
        route: Route for all images, from 0; required if CLIP selects the routes (CLIP-RPN), since CLIP is not exported.

    Raises:
        DerainError: If an option is wrong, the weights cannot be loaded, the method cannot be exported, or the results
            differ. No file is written then.
    """
    module, note = load(weights, method)
    if not isinstance(module, DerainModule):
        raise DerainError(f"{weights}: {note} does not restore images; use weights of a restoration method")
    if route is not None:
        set_route(module, route)
    print(f"{weights}: {note}; exporting may take minutes", file=sys.stderr)
    print_differences(write(module, out, format))
    print(f"wrote {out}", file=sys.stderr)
    return 0


def print_differences(differences: dict[tuple[int, int], float]) -> None:
    """Print a table of the largest differences between the results of file and method.

    Args:
        differences: Largest absolute difference between restored images in [0, 1], by size (height, width).
    """
    table = Table("width×height", title="difference between file and method, for values in [0, 1]")
    table.add_column("largest difference", justify="right")
    for (height, width), difference in differences.items():
        table.add_row(f"{width}×{height}", f"{difference:.1e}")
    Console().print(table)
