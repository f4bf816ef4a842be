"""Rules of the repository; each is shown to fail on a case that breaks it."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from derain.methods import DerainModule, registry

ROOT = Path(__file__).parents[1]
FILE_LINES = 500
FUNCTION_LINES = 60
REASONS = {
    "commands/page.py: _add_components": "declares every component of the page, one call each",
    "commands/page.py: _add_events": "declares every event of the page, one call each",
}
"""Why a file (``data/rain.py``) or a function (``data/rain.py: synthesize``) of derain is longer than the limits."""
DIALECT = re.compile(r"\b(told|judged|goes on|at hand|in the box|by custom)\b", re.IGNORECASE)
"""Words that derain once used where its field has plainer ones."""


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function's docstring."""
    if ast.get_docstring(node) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def long_parts(package: Path) -> dict[str, int]:
    """Return the lines of every file and function that exceeds the limits, docstrings of functions not counted."""
    lines = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        text = path.read_text(encoding="utf-8")
        lines[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines[f"{name}: {node.name}"] = node.end_lineno - node.lineno + 1 - docstring_lines(node)
    return {name: count for name, count in lines.items() if count > (FUNCTION_LINES if ": " in name else FILE_LINES)}


def dialect_lines(paths: Iterable[Path]) -> list[str]:
    """Return the lines of text files that contain a word of ``DIALECT``."""
    found = []
    for path in sorted(paths):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if DIALECT.search(line):
                found.append(f"{path}:{number}: {line.strip()}")
    return found


def misnamed(class_paths: Iterable[str]) -> list[str]:
    """Return the classes whose package is not their name without ``Module``, in lower case."""
    names = [path.split(".") for path in class_paths]
    return [name for *_, package, _, name in names if name.removesuffix("Module").lower() != package]


def test_long_files_and_functions_have_a_reason():
    assert {name: lines for name, lines in long_parts(ROOT / "derain").items() if name not in REASONS} == {}


def test_reasons_for_length_are_in_use():
    assert set(REASONS) <= set(long_parts(ROOT / "derain"))


def test_long_files_and_functions_are_found(tmp_path):
    body = "    pass\n" * 60
    (tmp_path / "part.py").write_text(f"def short():\n    pass\n\n\nclass A:\n  def long(self):\n{body}")
    (tmp_path / "long.py").write_text("\n" * 501)
    assert long_parts(tmp_path) == {"long.py": 501, "part.py: long": 61}


def test_texts_are_in_plain_words():
    folders = [ROOT / name for name in ("derain", "docs", "experiments")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".md", ".yaml", ".sh"}]
    lines = dialect_lines([*paths, ROOT / "README.md"])
    assert lines == [], "\n".join(lines)


def test_words_of_the_dialect_are_found(tmp_path):
    (tmp_path / "a.md").write_text("Training goes on.\nA box is at handball.\nThe model In The Box\n")
    assert [line.partition("a.md:")[2][0] for line in dialect_lines(tmp_path.iterdir())] == ["1", "3"]


def test_packages_are_named_after_their_methods():
    restoring = [path for path in registry.BUILT_IN if issubclass(registry.built_in(path.split(".")[-1]), DerainModule)]
    assert misnamed(restoring) == []
    assert misnamed(["derain.methods.prenet.module.OtherModule"]) == ["OtherModule"]


def test_packages_of_methods_are_independent():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (independent,) = [contract["modules"] for contract in contracts if contract["type"] == "independence"]
    assert set(independent) == {path.rsplit(".", 2)[0] for path in registry.BUILT_IN}


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
        ("commands/bench.py", "import derain.methods.prenet.network"),
        ("methods/prenet/network.py", "import derain.methods.plnlingan.loss"),
        ("options.py", "import derain.commands.data"),
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
