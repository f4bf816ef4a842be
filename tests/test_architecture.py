"""Files of derain import each other in one direction: no circle, not even through imports inside functions."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "derain"


def module_names(package: Path) -> dict[str, Path]:
    """Return the file of every module below a package's folder, by dotted name."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        names[".".join(parts)] = path
    return names


def is_type_checking(test: ast.expr) -> bool:
    """Return whether a condition is ``TYPE_CHECKING`` or ``typing.TYPE_CHECKING``."""
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


class ImportCollector(ast.NodeVisitor):
    """Collects the modules of one package that a file imports when it runs.

    Args:
        name: Dotted name of the file's module.
        is_package: Whether the file is an ``__init__.py``.
        modules: Names of all modules of the package.
    """

    def __init__(self, name: str, is_package: bool, modules: set[str]) -> None:
        self.name = name
        self.modules = modules
        self.package = name if is_package else name.rpartition(".")[0]
        self.imported: set[str] = set()

    def add(self, module: str) -> None:
        """Record an import of a module that belongs to the package; a module does not import itself."""
        if module in self.modules and module != self.name:
            self.imported.add(module)

    def visit_If(self, node: ast.If) -> None:
        """Skip imports that only type checkers see."""
        if not is_type_checking(node.test):
            self.generic_visit(node)
            return
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        """Record ``import a.b``."""
        for alias in node.names:
            self.add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Record ``from a import b``: the module ``a.b`` if there is one, else ``a``."""
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            kept = parents[: len(parents) - node.level + 1]
            base = ".".join([*kept, base] if base else kept)
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            self.add(submodule if submodule in self.modules else base)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Return, for every module of a package, the modules of the package that it imports."""
    modules = module_names(package)
    graph = {}
    for name, path in modules.items():
        collector = ImportCollector(name, path.name == "__init__.py", set(modules))
        collector.visit(ast.parse(path.read_text(encoding="utf-8")))
        graph[name] = collector.imported
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return the modules that a module imports, directly or through others."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def import_circles(package: Path) -> list[list[str]]:
    """Return the strongly connected components of more than one module in a package's import graph."""
    graph = import_graph(package)
    reached = {name: reachable(graph, name) for name in graph}
    circles = set()
    for name in graph:
        component = {other for other in reached[name] if name in reached[other]}
        if len(component) > 1:
            circles.add(tuple(sorted(component)))
    return [list(circle) for circle in sorted(circles)]


def test_no_import_circles():
    circles = import_circles(PACKAGE)
    assert circles == [], "\n".join(" <-> ".join(circle) for circle in circles)


def test_the_graph_covers_the_package():
    graph = import_graph(PACKAGE)
    assert len(graph) > 100
    assert "derain.images" in graph["derain.data.pairs"]


IN_TYPE_CHECKING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack import a"


@pytest.mark.parametrize(
    ("a", "b", "circles"),
    [
        ("from pack import b", "import pack.a", [["pack.a", "pack.b"]]),
        ("from . import b", "from .a import name", [["pack.a", "pack.b"]]),
        ("from pack.b import name", "def load():\n    from pack import a", [["pack.a", "pack.b"]]),
        ("from pack.sub import c", "from pack import a", [["pack.a", "pack.b", "pack.sub.c"]]),
        ("from pack.sub import c", "", []),
        ("from pack import b", IN_TYPE_CHECKING, []),
        ("from pack import b", "import torch", []),
    ],
)
def test_planted_circles_are_found(tmp_path, a, b, circles):
    files = {"__init__.py": "", "a.py": a, "b.py": b, "sub/__init__.py": "", "sub/c.py": "from .. import b"}
    (tmp_path / "pack/sub").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "pack" / name).write_text(text)
    assert import_circles(tmp_path / "pack") == circles
