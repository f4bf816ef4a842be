"""The house's gates, each shown to close on a case that breaks its rule."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from derain.methods import METHODS

ROOT = Path(__file__).parents[1]
LONGEST = 500
"""Lines above which a file is asked whether it still does one thing."""


def too_long(package: Path) -> list[str]:
    """Return the files that have more than ``LONGEST`` lines."""
    lengths = {path: len(path.read_text().splitlines()) for path in package.rglob("*.py")}
    return sorted(f"{path.name}: {n}" for path, n in lengths.items() if n > LONGEST)


def misnamed(methods) -> list[str]:
    """Methods whose package is not their class's name without ``Module``, in lower case."""
    named = {method.__name__: method.__module__.split(".")[-2] for method in methods}
    return [name for name, package in named.items() if name.removesuffix("Module").lower() != package]


def test_files_are_at_most_500_lines_long(tmp_path):
    assert too_long(ROOT / "derain") == []
    (tmp_path / "cli.py").write_text("\n" * 501)
    assert too_long(tmp_path) == ["cli.py: 501"]


def test_packages_are_named_after_their_methods():
    assert misnamed(METHODS) == []
    assert misnamed([type("OtherModule", (), {"__module__": "derain.methods.prenet.module"})]) == ["OtherModule"]


def lint_imports(root: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=root, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "line"),
    [
        (None, None),
        ("methods/prenet/network.py", "import lightning"),
        ("methods/plnlingan/loss.py", "import derain.data.pairs"),
        ("data/verify.py", "import torch"),
        ("images.py", "import derain.metrics"),
    ],
)
def test_import_contracts(tmp_path, file, line):
    for path in [*(ROOT / "derain").rglob("*.py"), ROOT / "pyproject.toml"]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    if file is not None:
        target = tmp_path / "derain" / file
        target.write_text(f"{line}\n{target.read_text()}")
    result = lint_imports(tmp_path)
    assert (result.returncode == 0) == (file is None), result.stdout


def test_docstrings_are_demanded(tmp_path):
    (tmp_path / "bad.py").write_text("def public():\n    return 1\n")
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert "D103" in result.stdout


def test_published_results_say_where_they_come_from():
    results = (ROOT / "README.md").read_text().partition("## Results")[2].partition("\n## ")[0]
    assert re.search(r"\d+ CPU cores.* torch \d+\.\d+ and derain \d+\.\d+\.\d+", results)


def test_every_dependency_says_why():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    project = tomllib.loads("\n".join(lines))["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for dependency in wanted:
        line = next(line for line in lines if f'"{dependency}"' in line)
        assert "#" in line.partition(dependency)[2], dependency


def test_every_dependency_is_pinned():
    pins = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in [project["dependencies"], *project["optional-dependencies"].values()]:
        for dependency in extra:
            name = dependency.split(">")[0].split("[")[0].split("=")[0].lower()
            assert name in pins or name == "pyiqa", dependency
