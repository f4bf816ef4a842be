"""Write a method's network as ONNX or by torch.export, and check the file against torch at five odd sizes."""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from derain.errors import DerainError
from derain.images import write_whole
from derain.methods import METHODS, exported
from derain.methods import weights as weights_files
from derain.progress import track

SIZES = ((37, 31), (63, 65), (101, 77), (1, 1), (131, 97))
"""Heights and widths at which file and network are compared."""

ALLOWED = 1e-4
"""Largest difference of any value, where images are in [0, 1] and noise has unit variance."""


def export(out: Path, *, weights: str = "default", format: exported.Format = "onnx", route: int | None = None) -> int:
    """Write a method as ONNX or with torch.export, and compare the file with the method at five image sizes.

    Args:
        out: The file: NAME.onnx or NAME.pt2.
        weights: Name or file of weights, as for derain restore.
        format: onnx, or torch for a program of torch.export.
        route: Route of all images (CLIP-RPN; CLIP is not part of the file).

    Raises:
        DerainError: If the method cannot be exported, or the file differs from it.
    """
    suffix = exported.SUFFIXES[format]
    if out.suffix.lower() != suffix:
        raise DerainError(f"{out}: a file of --format {format} must end in {suffix}")
    method, note = weights_files.load(weights)
    if not isinstance(method, METHODS) or isinstance(method.network, exported.OnnxNetwork):
        raise DerainError(f"{weights}: {note} cannot be exported; give weights of a method of derain")
    if route is not None:
        method.take_route(route)
    graph = exported.graph_of(method)
    print(f"{weights}: {note}; exporting takes up to minutes", file=sys.stderr)
    with write_whole(out) as temporary:
        run_file = exported.write(graph, method.describe(), temporary, format)
        differences = compare(graph, run_file)
        show(differences)
        if not max(differences.values()) <= ALLOWED:  # also if one is no number
            raise DerainError(
                f"{out}: not written, as it differs from torch by more than {ALLOWED:g} (see above); "
                "use the weights themselves"
            )
    print(f"wrote {out}", file=sys.stderr)
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
