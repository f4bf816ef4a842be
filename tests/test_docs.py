"""Code, tests, commands, options and files that docs/ and README.md name exist, and their examples run."""

import ast
import importlib
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml

import derain
from derain.cli import COMMANDS, TRAINER_COMMANDS, main
from derain.commands import train
from derain.data.layouts import Files, Layout
from derain.images import write_image
from derain.methods import registry
from derain.metrics import PROTOCOLS
from derain.options import find_parser
from tests.factories import clean_image, make_set

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
NAMES = sorted(
    {name for page in PAGES for name in re.findall(r"`((?:derain|tests)/[\w/]+\.py::[\w.]+)`", page.read_text())}
)


def blocks(page, language="\\w*"):
    """Return a page's code blocks."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def command_lines(page):
    """Return the arguments of every derain command in a page's code blocks."""
    commands = []
    for block in blocks(page):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if not re.search(r"(^|[ /])derain +[a-z]+", line):
                continue
            words = shlex.split(line, comments=True)
            start = next(index for index, word in enumerate(words) if word.endswith("derain")) + 1
            if words[start:] and words[start] != "import":
                commands.append(words[start:])
    return commands


LINES = sorted({tuple(line) for page in PAGES for line in command_lines(page)})


def parse(command, arguments):
    """Parse a command line, except those of LightningCLI and of commands that this version does not have."""
    if command in TRAINER_COMMANDS or importlib.util.find_spec(f"derain.commands.{command}") is None:
        return
    module = importlib.import_module(f"derain.commands.{command}")
    parser, options = find_parser(f"derain {command}", module, arguments)
    parser.parse(options)


@pytest.mark.parametrize("name", NAMES)
def test_names_in_tables_exist(name):
    file, _, attribute = name.partition("::")
    if file.startswith("tests/"):
        tree = ast.parse((ROOT / file).read_text())
        assert attribute in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    else:
        module = importlib.import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        assert reduce(getattr, attribute.split("."), module) is not None


def test_pages_have_names_and_commands():
    assert len(NAMES) > 50
    assert len(LINES) > 30
    assert {line[0] for line in LINES} >= {"fit", "test", "predict", "restore", "score", "data", "route", "caption"}
    assert {path.stem for path in PAGES} >= {"cliprpn", "daclipsde", "plnlingan", "train", "restore"}


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_command_lines_are_valid(line):
    command, *arguments = line
    assert command in TRAINER_COMMANDS | COMMANDS
    for option, value in itertools.pairwise(arguments):
        if option == "--config" and value != "my-run.yaml":
            assert (ROOT / value).is_file(), value
    parse(command, [word for word in arguments if word != "..."])


class Parsed(Exception):
    """Raised when the command line has been parsed."""


@pytest.mark.parametrize("line", [line for line in LINES if line[0] in TRAINER_COMMANDS], ids=" ".join)
def test_training_command_lines_are_valid(line, monkeypatch):
    """Parse configurations and options; build nothing."""

    def stop(self):
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train.DerainCLI, "before_instantiate_classes", stop)
    checkpoint = SimpleNamespace(note="", module=None)  # in place of files that the pages name
    monkeypatch.setattr(train.catalog, "load_checkpoint", lambda *_: checkpoint)
    words = [word for word in line if word != "..."]
    if "my-run.yaml" in words:
        pytest.skip("my-run.yaml is run by another test")
    with pytest.raises(Parsed):
        train.run(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_text_are_known(page):
    commands = re.findall(r"`derain ([a-z]+)[^`]*`", page.read_text())
    assert set(commands) <= set(TRAINER_COMMANDS | COMMANDS)


def test_files_in_the_text_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:experiments|derain|tests|notebooks)/[\w./-]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_all_sweeps_are_listed():
    page = (ROOT / "docs/train.md").read_text()
    for file in (ROOT / "experiments/sweeps").glob("*.yaml"):
        assert f"`{file.name}`" in page


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a folder from which modules are imported for the time of a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_named", {})
    sys.modules.pop("my_method", None)
    yield tmp_path
    sys.modules.pop("my_method", None)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_runs(page, folder):
    write_image(folder / "rainy.jpg", clean_image(0))
    # Pages add entries to this table; patching keeps them from later tests.
    with mock.patch.dict(PROTOCOLS):
        for block in blocks(page, "python"):
            if name := re.match(r"# (\w+\.py)\n", block):
                (folder / name[1]).write_text(block)
            namespace = {"__name__": "__main__", "Files": Files, "Layout": Layout}  # of an excerpt of layouts.py
            exec(compile(block, page.name, "exec"), namespace)
            for function in [value for name, value in namespace.items() if name.startswith("test_")]:
                function()


@pytest.mark.slow
def test_method_of_the_page_can_be_trained_and_tested(folder, monkeypatch):
    page = ROOT / "docs/add-a-method.md"
    (folder / "my_method.py").write_text(blocks(page, "python")[0])
    (folder / "my-run.yaml").write_text(blocks(page, "yaml")[0])
    make_set(folder / "data", "Rain800", "train", count=4)
    make_set(folder / "data", "Rain800", "test", count=2, seed=50)
    monkeypatch.setenv("DERAIN_DATA", "data")
    small = ["--config", "my-run.yaml", "--data.train", "Rain800", "--data.test", "Rain800", "--data.crop", "16"]
    small += ["--data.workers", "0", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *small]) == 0
    run = Path("runs/my-run/fit-1")
    for option, file in (("--weights", "weights.safetensors"), ("--ckpt_path", "checkpoints/best.ckpt")):
        assert main(["test", *small, option, str(run / file)]) == 0
    weights, checkpoint = (json.loads(Path(f"runs/my-run/test-{n}/summary.json").read_text()) for n in (1, 2))
    assert weights["method"]["method"] == "MyModule"
    assert weights["method"]["hyper_parameters"] == {"channels": 8, "learning_rate": 1e-3}
    assert weights["results"] == checkpoint["results"]


@pytest.mark.slow
def test_site_builds_without_warnings_and_remote_resources(tmp_path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    listed = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert len(pages) > len(listed)
    for page in pages:
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:)?//[^"]*"', page.read_text())
        assert loaded == [], page.name
        assert "arithmatex" not in page.read_text(), page.name
    assert "<math" in (tmp_path / "site/methods/cliprpn.html").read_text()


def test_citation_is_valid_and_has_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert all(author.get("name") or author.get("family-names") for author in citation["authors"])
    assert (citation["version"], citation["license"]) == (derain.__version__, "Apache-2.0")


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.stem)
def test_workflows_and_issue_forms_are_yaml(path):
    content = yaml.safe_load(path.read_text())
    # YAML 1.1 reads the key "on" as true
    required = {"workflows": {"name", True, "jobs"}, "ISSUE_TEMPLATE": {"name", "description", "body"}}
    assert path.stem == "config" or required[path.parent.name] <= content.keys()


def test_package_is_typed():
    assert (ROOT / "derain/py.typed").is_file()
