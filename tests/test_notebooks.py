"""What notebooks import from derain exists, and the first notebook runs; ``make notebooks`` runs all of them."""

import ast
import importlib
import json
import shutil
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def code_of(path: Path) -> list[str]:
    """Return the code of each cell, without IPython's own commands."""
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]).splitlines() for cell in cells if cell["cell_type"] == "code"]
    return ["\n".join(line for line in lines if not line.startswith("%")) for lines in sources]


@pytest.mark.slow
def test_cells_run_in_order(tmp_path, monkeypatch):
    copied = shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    monkeypatch.chdir(copied)
    variables: dict[str, object] = {}
    for code in code_of(copied / "01_restore_a_photo.ipynb"):
        exec(code, variables)
    assert "Restorer" in variables


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_imports_exist(path):
    nodes = [node for code in code_of(path) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    names = [
        (node.module, alias.name) for node in nodes for alias in node.names if str(node.module).startswith("derain")
    ]
    assert names
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
