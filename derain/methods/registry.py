"""Registry of methods: those of derain, those of installed packages, and those that the user names.

Methods are registered by class path and imported when needed. A weights file can cause the import only of modules that
derain, an installed package or the user has named.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from derain.errors import ArgumentError, DerainError
from derain.files.metadata import shorten

log = logging.getLogger("derain")

BUILT_IN = (
    "derain.methods.cliprpn.module.CLIPRPNModule",
    "derain.methods.daclipsde.daclip.DACLIPModule",
    "derain.methods.daclipsde.module.DACLIPSDEModule",
    "derain.methods.plnlingan.module.PLNLINGANModule",
    "derain.methods.restormer.module.RestormerModule",
    "derain.methods.prenet.module.PReNetModule",
    "derain.methods.regression.module.RegressionModule",
    "derain.methods.airnet.module.AirNetModule",
    "derain.methods.syn2real.module.Syn2RealModule",
    "derain.methods.ssidkd.module.SSIDKDModule",
)
"""Class paths of derain's own methods; add a line for a new one."""

ENTRY_POINTS = "derain.methods"
"""Entry-point group in which installed packages register their methods."""

IMPORT_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""Exceptions that are caught when code from outside derain is imported."""

_named: dict[str, type] = {}
"""Classes that the user named, by class path and by the path that the user gave."""

_reported: set[str] = set()
"""Entry points that were already reported as broken."""


def class_path(method: type) -> str:
    """Return the import path of a class, such as ``my_method.MyModule``."""
    return f"{method.__module__}.{method.__qualname__}"


def is_importable(path: str) -> bool:
    """Return whether another process can import a class path; false for classes of a script, notebook or function."""
    return not path.startswith("__main__.") and "<locals>" not in path


def must_be_named(method: type) -> bool:
    """Return whether the user must name a class to load its weights: neither derain nor a package registers it."""
    return class_path(method) not in BUILT_IN and method not in _installed(method.__name__)


def use_method(name: str | type, argument: str = "method") -> Any:
    """Register a class, so that its weights files can be loaded.

    Args:
        name: The class, or its path, such as ``my_method.MyModule``, which is imported from the installed packages or
            the current folder.
        argument: Argument or option that contains the name, for messages.

    Returns:
        The class.

    Raises:
        ArgumentError: If the class cannot be imported, or is neither a `TrainableModule` nor a network
            (``torch.nn.Module``).
        DerainError: If the definition of the class raises it.
    """
    if not isinstance(name, str | type):
        raise ArgumentError(
            f"{argument}: is a {type(name).__name__}; expected a class or its path; pass a module as the first "
            "argument of Restorer instead"
        )
    method = _import(name, argument) if isinstance(name, str) else name
    if not _is_method(method) and not _is_network(method):
        raise ArgumentError(
            f"{argument} {name}: not a method; expected a class that derives from DerainModule or TrainableModule "
            "(derain.methods), or a network (torch.nn.Module) for RegressionModule; name such a class"
        )
    _named[class_path(method)] = method
    if isinstance(name, str):
        _named[name] = method  # a package may re-export a class under a shorter path
    return method


def is_named(path: str) -> bool:
    """Return whether the user has named a class by this path."""
    return path in _named


def import_class(path: str, option: str, base: type) -> Any:
    """Import a class that a configuration names.

    Args:
        path: Path of the class, such as ``torch.optim.AdamW``.
        option: Option that contains the path, for messages.
        base: Required base class.

    Raises:
        ArgumentError: If the class cannot be imported, or does not derive from ``base``.
        DerainError: If the definition of the class raises it.
    """
    found = _import(path, option)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ArgumentError(f"{option} {path}: expected a subclass of {base.__module__}.{base.__qualname__}; name one")
    return found


def add_current_folder(path: str) -> None:
    """Add the current folder to ``sys.path``, unless the package of a class can be imported without it.

    Args:
        path: Path of the class, such as ``my_method.MyModule``.
    """
    package = path.partition(".")[0]
    importlib.invalidate_caches()  # the file may be new
    if not package or package in sys.modules or importlib.util.find_spec(package) is not None:
        return
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def find(file: Path, metadata: Mapping[str, Any]) -> Any:
    """Return the known class that wrote a file: that of the recorded path, otherwise that of the recorded name.

    Args:
        file: The weights file, for messages.
        metadata: Metadata of the file, with ``method`` and, unless it was written before 0.1, ``class_path``.

    Raises:
        DerainError: If no known class has this path or name, or if several have the name and none the path.
    """
    name = metadata["method"]
    origin = metadata.get("class_path") or f"derain.{name}"
    if origin in _named:
        return _named[origin]
    if origin.partition(".")[0] == "derain" and name in _built_in_paths():
        return built_in(name)
    installed = _installed(name)
    for method in installed:
        if class_path(method) == origin:
            return method
    for classes in (dict.fromkeys(_named.values()), installed):  # the class may have moved since the file was written
        same_name = [method for method in classes if method.__name__ == name]
        if len(same_name) > 1:
            paths = " and ".join(map(class_path, same_name))
            raise DerainError(
                f"{file}: was written by {shorten(origin, 100)}; {paths} have this name; choose one by --method"
            )
        if same_name:
            return same_name[0]
    raise _unknown(file, name, metadata.get("class_path"))


def _unknown(file: Path, name: str, origin: str | None) -> DerainError:
    """Return the error for a file of a class that is not known.

    Args:
        file: The weights file, for the message.
        name: Name of the class.
        origin: Class path; None for files written before 0.1.
    """
    written_by = f"{file}: was written by the method {shorten(origin or name, 100)}"
    if origin is not None and not is_importable(origin):
        short = shorten(name, 60)
        return DerainError(
            f"{written_by}, which a script, notebook or function defines; in Python, use "
            f"Restorer(file, method={short}); for commands, move the class to a module and add --method MODULE.{short}"
        )
    known = ", ".join(method.__name__ for method in methods())
    module = shorten(origin, 100) if origin else f"MODULE.{shorten(name, 60)}"
    return DerainError(
        f"{written_by}; expected one of {known}; if you trust its code, add --method {module} (fit, validate, "
        "test and predict: --model; in Python: derain.methods.registry.use_method)"
    )


def methods() -> list[Any]:
    """Return all known methods: those of derain, of installed packages, and those that the user named."""
    classes = [built_in(name) for name in _built_in_paths()]
    return list(dict.fromkeys((*classes, *_installed(), *filter(_is_method, _named.values()))))


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


def _installed(name: str | None = None) -> list[Any]:
    """Return the methods that installed packages register.

    Args:
        name: Name of the class; None: all methods.
    """
    classes = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if name not in {None, entry.attr.rpartition(".")[2]}:
            continue
        try:
            method = entry.load()
        except IMPORT_ERRORS as error:  # a broken package must not stop commands that do not use it
            _report_broken(entry, f"cannot be imported ({type(error).__name__}: {shorten(error)})")
            continue
        if _is_method(method):
            classes.append(method)
        else:
            _report_broken(entry, "not a TrainableModule")
    return classes


def _report_broken(entry: importlib.metadata.EntryPoint, reason: str) -> None:
    if entry.value in _reported:
        return
    _reported.add(entry.value)
    package = entry.dist.name if entry.dist is not None else "an installed package"
    log.warning("method %s of %s is ignored: %s", entry.value, package, reason)


def _is_method(method: object) -> bool:
    return isinstance(method, type) and hasattr(method, "metadata_schema")


def _is_network(found: object) -> bool:
    """Return whether a class derives from ``torch.nn.Module``; compared by name to avoid an import of torch."""
    return isinstance(found, type) and any(class_path(base) == "torch.nn.modules.module.Module" for base in found.mro())


def _import(name: str, argument: str) -> Any:
    """Import a class, which may be nested in another class, by its path.

    Raises:
        ArgumentError: If there is no such class, or its module cannot be imported.
        DerainError: If the module raises it.
    """
    parts = name.split(".")
    expected = "expected MODULE.CLASS, such as my_method.MyModule for a class in the file my_method.py here"
    if len(parts) < 2 or not all(parts):
        raise ArgumentError(f"{argument} {name}: {expected}")
    add_current_folder(name)
    for count in range(len(parts) - 1, 0, -1):
        module = _import_module(".".join(parts[:count]), f"{argument} {name}")
        if module is not None:
            return _attribute(module, parts[count:], f"{argument} {name}")
    raise ArgumentError(
        f"{argument} {name}: no module {parts[0]} in the current folder or the installed packages; {expected}"
    )


def _import_module(name: str, given: str) -> Any:
    """Import a module; return None if there is none of this name.

    Args:
        name: Path of the module.
        given: Argument or option with its value, for messages.

    Raises:
        ArgumentError: If the module exists, but its import fails.
        DerainError: If the module raises it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            return None
        raise ArgumentError(f"{given}: {_position(error)}: cannot be imported: {shorten(error)}; install it") from error
    except DerainError:
        raise
    except IMPORT_ERRORS as error:
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise ArgumentError(f"{given}: {_position(error)}: cannot be imported: {reason}; correct the file") from error


def _position(error: BaseException) -> str:
    """Return file and line where an import failed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    return f"{frames[-1].filename}, line {frames[-1].lineno}"


def _attribute(module: Any, names: Iterable[str], given: str) -> Any:
    found = module
    for name in names:
        if not hasattr(found, name):
            file = getattr(module, "__file__", None) or module.__name__
            raise ArgumentError(f"{given}: {file} has no {name}; expected the name of a class in this file")
        found = getattr(found, name)
    return found
