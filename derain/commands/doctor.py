"""Tell versions, devices, caches and weights found here; exit code 1 when something will not work."""

import argparse
import importlib
import importlib.metadata as metadata
import importlib.util
import os
import platform
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import derain
from derain.folders import cache_folder

PACKAGES = (
    "torch",
    "lightning",
    "torchmetrics",
    "jsonargparse",
    "albumentations",
    "safetensors",
    "numpy",
    "pillow",
)
OPTIONAL = (
    "torchvision",
    "scikit-image",
    "wandb",
    "tensorboard",
    "pyiqa",
    "gradio",
    "av",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "spandrel",
)
IMPORTED = ("torch", "torchvision", "torchmetrics", "lightning", "derain.restoration")
"""What restoring imports, each after what it needs: where one is broken, those after it are too."""
BROKEN = (ImportError, OSError, RuntimeError, AttributeError, NameError, TypeError, ValueError, SyntaxError)
"""What importing a package raises whose files are absent, damaged or built for another version."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares nothing: there is nothing to choose."""


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def vision_problem(torch_version: str | None, vision_version: str | None) -> str | None:
    """Says why this torchvision cannot be imported with this torch, or None.

    Builds for the CPU carry ``+cpu``, those of the package index none; torchvision 0.N belongs to torch 2.(N-15).

    Example:
        >>> vision_problem("2.13.0", "0.28.0") is None
        True
        >>> vision_problem("2.13.0", "0.27.0")
        'torchvision 0.27.0 does not belong to torch 2.13.0: install torchvision 0.28'
    """
    if torch_version is None or vision_version is None:
        return None
    (torch_base, _, torch_build), (vision_base, _, vision_build) = (
        v.partition("+") for v in (torch_version, vision_version)
    )
    wanted = int(torch_base.split(".")[1]) + 15
    if int(vision_base.split(".")[1]) != wanted:
        return f"torchvision {vision_version} does not belong to torch {torch_version}: install torchvision 0.{wanted}"
    if (torch_build == "cpu") != (vision_build == "cpu"):
        return (
            f"torch {torch_version} and torchvision {vision_version} are different builds "
            "('operator torchvision::nms does not exist'): install both from one place"
        )
    return None


def import_problem() -> str | None:
    """Says which installed package is the first that cannot be imported, and why, or None."""
    for name in IMPORTED:
        try:
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
        except BROKEN as error:
            return (
                f"{name} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}): "
                "install derain again in a fresh environment, torch and torchvision from one place"
            )
    return None


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    table = Table("what", "found", title=f"derain {derain.__version__}", title_justify="left")
    problems: list[str] = []
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        table.add_row(package, version(package) or "[red]missing[/red]")
        if version(package) is None:
            problems.append(f"{package} is missing: install derain again")
    for package in OPTIONAL:
        table.add_row(package, version(package) or "not installed (optional)")
    problem = vision_problem(version("torch"), version("torchvision"))
    if problem:
        problems.append(problem)
    problem = import_problem()
    if problem:
        problems.append(problem)
        table.add_row("imports", escape(problem))
    elif importlib.util.find_spec("torch") is not None:
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        table.add_row("devices", ", ".join([f"cpu ({torch.get_num_threads()} threads)", *gpus]))
        from derain.restoration import choose_device, computes_bf16

        native = computes_bf16(choose_device("auto"))
        table.add_row("bfloat16 in hardware", "yes" if native else "no: --precision bf16 falls back to float32")
    root = os.environ.get("DERAIN_DATA")
    if root is None:
        table.add_row("DERAIN_DATA", "not set: data sets are looked up in ./data")
    else:
        table.add_row("DERAIN_DATA", root)
        if not Path(root).is_dir():
            problems.append(f"DERAIN_DATA={root} is no folder: point it to the folder that holds the data sets")
    folder = cache_folder()
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
    table.add_row("cache", f"{folder} ({size / 1e9:.2f} GB; may be deleted)")
    found = sorted(Path("runs").glob("**/weights.safetensors")) if Path("runs").is_dir() else []
    table.add_row("weights in ./runs", "\n".join(map(str, found)) or "none")
    console = Console()
    console.print(table)
    for problem in problems:
        console.print(f"[red]problem:[/red] {escape(problem)}", highlight=False, soft_wrap=True)
    console.print("all is well" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0
