"""Which methods there are: those of derain, of installed packages, and those that the user names.

Classes are known by their paths and imported when they are needed. A weights file never causes the import of a module
that neither derain, nor an installed package, nor the user has named.
"""

import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from derain.errors import DerainError
from derain.files.metadata import shorten

log = logging.getLogger("derain")

BUILT_IN = (
    "derain.methods.cliprpn.module.CLIPRPNModule",
    "derain.methods.daclipsde.daclip.DACLIPModule",
    "derain.methods.daclipsde.module.DACLIPSDEModule",
    "derain.methods.plnlingan.module.PLNLINGANModule",
    "derain.methods.restormer.module.RestormerModule",
    "derain.methods.prenet.module.PReNetModule",
)
"""Methods of derain: a new one adds a line."""

ENTRY_POINTS = "derain.methods"
"""Group of the entry points by which installed packages announce their classes."""

_named: dict[str, type] = {}
"""Classes that the user named, by class path."""


def class_path(method: type) -> str:
    """Return the path that a class is imported by."""
    return f"{method.__module__}.{method.__qualname__}"


def use_method(name: str | type) -> Any:
    """Make a method from outside derain known, so that its weights files can be loaded.

    Args:
        name: The class, or its path, such as ``my_method.MyModule``, which is imported from the installed packages or
            the current folder.

    Returns:
        The class.

    Raises:
        DerainError: If there is no such class, or it does not derive from ``DerainModule``.
    """
    method = name if isinstance(name, type) else _import(name)
    if not _is_method(method):
        raise DerainError(f"--method {name}: is not a class that derives from derain.DerainModule; name one that does")
    _named[class_path(method)] = method
    return method


def add_current_folder() -> None:
    """Let modules of the current folder be imported, after those of installed packages."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def find(path: Path, metadata: Mapping[str, Any]) -> Any:
    """Return the class that the metadata of a file name.

    Args:
        path: The file, for messages.
        metadata: Metadata with ``method`` and, in files of newer versions, ``class_path``.

    Raises:
        DerainError: If no such class is known.
    """
    name = metadata["method"]
    origin = metadata.get("class_path") or f"derain.{name}"
    if origin in _named:
        return _named[origin]
    if origin.partition(".")[0] == "derain" and name in _built_in_paths():
        return built_in(name)
    for method in (*_announced(name), *_named.values()):  # a class may have moved since the file was written
        if method.__name__ == name:
            return method
    known = ", ".join(method.__name__ for method in methods())
    module = shorten(origin, 100) if "class_path" in metadata else f"MODULE.{shorten(name, 60)}"
    raise DerainError(
        f"{path}: was written by the method {shorten(origin if 'class_path' in metadata else name, 100)}; known are "
        f"{known}; if you trust it, add --method {module} (derain fit, validate, test, predict: --model)"
    )


def methods() -> list[Any]:
    """Return all classes that are known here: of derain, of installed packages, and those that the user named."""
    classes = [built_in(name) for name in _built_in_paths()]
    return list(dict.fromkeys((*classes, *_announced(), *_named.values())))


def built_in(name: str) -> Any:
    """Return a method of derain by the name of its class.

    Raises:
        AttributeError: If derain has no such method.
    """
    paths = _built_in_paths()
    if name not in paths:
        raise AttributeError(f"derain has no method {name!r}")
    module, _, name = paths[name].rpartition(".")
    return getattr(importlib.import_module(module), name)


def _built_in_paths() -> dict[str, str]:
    return {path.rpartition(".")[2]: path for path in BUILT_IN}


def _announced(name: str | None = None) -> list[Any]:
    """Return the classes of installed packages, all of them or those of a name."""
    classes = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if name not in {None, entry.attr}:
            continue
        try:
            method = entry.load()
        except (ImportError, AttributeError) as error:
            log.warning("method %s of an installed package is ignored: cannot be imported (%s)", entry.value, error)
            continue
        if _is_method(method):
            classes.append(method)
        else:
            log.warning("method %s of an installed package is ignored: not a DerainModule", entry.value)
    return classes


def _is_method(method: object) -> bool:
    return isinstance(method, type) and hasattr(method, "metadata_schema")


def _import(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    expected = "expected MODULE.CLASS, such as my_method.MyModule for a class in the file my_method.py here"
    if not module:
        raise DerainError(f"--method {name}: {expected}")
    add_current_folder()
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DerainError(f"--method {name}: cannot be imported ({shorten(error)}); {expected}") from error
