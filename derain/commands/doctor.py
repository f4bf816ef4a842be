"""Report versions, devices, caches and weights of this installation."""

import importlib
import importlib.metadata as metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
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
    "psutil",
)
"""Required packages whose versions are shown."""

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
"""Optional packages whose versions are shown."""

IMPORTED = ("torch", "torchvision", "torchmetrics", "lightning", "derain.restoration")
"""Modules to import, each after those that it imports, so that a failure is reported for the module that causes it."""

IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, NameError, TypeError, ValueError, SyntaxError)
"""Exceptions that an import can raise if files of the package are missing, damaged or built for another version."""


def doctor() -> int:
    """Report versions, devices, caches and weights of this installation.

    The exit code is 1 if there are problems.
    """
    table = Table("item", "found", title=f"derain {derain.__version__}", title_justify="left")
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    problems = [*_add_packages(table), *_add_imports(table), *_add_data_root(table)]
    _add_files(table)
    console = Console()
    console.print(table)
    for problem in problems:
        console.print(f"[red]problem:[/red] {escape(problem)}", highlight=False, soft_wrap=True)
    console.print(f"{len(problems) or 'no'} problem{'' if len(problems) == 1 else 's'}")
    return 1 if problems else 0


def _add_packages(table: Table) -> Iterator[str]:
    """Add the versions of packages to the table; yield problems."""
    for package in PACKAGES:
        version = installed_version(package)
        table.add_row(package, version or "[red]missing[/red]")
        if version is None:
            yield f"{package} is missing: reinstall derain"
    for package in OPTIONAL:
        table.add_row(package, installed_version(package) or "not installed (optional)")
    problem = version_mismatch(installed_version("torch"), installed_version("torchvision"))
    if problem:
        yield problem


def _add_imports(table: Table) -> Iterator[str]:
    """Import the modules that restoration needs; yield why an import fails, or else add the devices to the table."""
    problem = failed_import()
    if problem:
        table.add_row("imports", escape(problem))
        yield problem
        return
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    table.add_row("devices", ", ".join([f"cpu ({torch.get_num_threads()} threads)", *gpus]))
    from derain.restoration import choose_device, computes_bf16

    native = computes_bf16(choose_device("auto"))
    table.add_row("bfloat16 in hardware", "yes" if native else "no: --precision bf16 falls back to float32")


def _add_data_root(table: Table) -> Iterator[str]:
    """Add the folder of the data sets to the table; yield a problem if it does not exist."""
    root = os.environ.get("DERAIN_DATA")
    table.add_row("DERAIN_DATA", root or "not set: give the paths of data sets, or --root")
    if root is not None and not Path(root).is_dir():
        yield f"DERAIN_DATA={root}: no such folder; set it to the folder with your data sets"


def _add_files(table: Table) -> None:
    """Add the cache folder, and the weights of training runs in ``./runs``, to the table."""
    folder = cache_folder()
    files = [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
    size = sum(file.stat().st_size for file in files)
    table.add_row("cache", f"{folder} ({size / 1e9:.2f} GB; may be deleted)")
    weights = sorted(Path("runs").glob("**/weights.safetensors")) if Path("runs").is_dir() else []
    table.add_row("weights in ./runs", "\n".join(map(str, weights)) or "none")


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def version_mismatch(torch_version: str | None, vision_version: str | None) -> str | None:
    """Return why versions of torch and torchvision do not work together; None if they do, or if one is missing.

    torchvision 0.N needs torch 2.(N-15). If one is a CPU build, whose version ends in ``+cpu``, both must be.

    Args:
        torch_version: Version of torch, such as ``2.13.0+cpu``; None if it is not installed.
        vision_version: Version of torchvision, likewise.

    Example:
        >>> version_mismatch("2.13.0", "0.28.0") is None
        True
        >>> "install torchvision 0.28" in version_mismatch("2.13.0", "0.27.0")
        True
    """
    if torch_version is None or vision_version is None:
        return None
    torch_base, _, torch_build = torch_version.partition("+")
    vision_base, _, vision_build = vision_version.partition("+")
    expected = int(torch_base.split(".")[1]) + 15
    if int(vision_base.split(".")[1]) != expected:
        return (
            f"torchvision {vision_version} does not work with torch {torch_version}: install torchvision 0.{expected}"
        )
    if (torch_build == "cpu") != (vision_build == "cpu"):
        return (
            f"torch {torch_version} and torchvision {vision_version} are different builds "
            "('operator torchvision::nms does not exist'): install both from the same index"
        )
    return None


def failed_import() -> str | None:
    """Return which module of ``IMPORTED`` cannot be imported, and why; None if all installed ones can."""
    for name in IMPORTED:
        try:
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
        except IMPORT_ERRORS as error:
            return (
                f"{name} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}): "
                "reinstall derain in a fresh environment, with torch and torchvision from the same index"
            )
    return None
