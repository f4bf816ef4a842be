"""A method from outside derain, by commands: from a folder with one file, and from an installed package."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from derain import DerainModule, Restorer
from derain.cli import main
from derain.commands import app, bench
from derain.errors import DerainError
from derain.images import read_rgb
from derain.methods import catalog, registry
from tests.factories import make_set

ROOT = Path(__file__).parents[1]
METHOD = '''
import torch
from torch import nn

from derain import DerainModule


class MyModule(DerainModule):
    """Two convolutions that estimate the rain."""

    def __init__(self, channels: int = 4, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 3, 3, padding=1)
        )

    def forward(self, rainy):
        return rainy - self.network(rainy)

    def training_step(self, batch, batch_idx):
        loss = (self(batch["rainy"]) - batch["clean"]).abs().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.network.parameters(), self.hparams["learning_rate"])
'''
RUN = """
model: {{class_path: {module}.MyModule}}
data: {{train: Rain800, test: Rain800, crop: 32, batch_size: 2, workers: 0}}
trainer: {{max_epochs: 1, accelerator: cpu, enable_progress_bar: false}}
"""
WEIGHTS = "runs/my-run/fit-1/weights.safetensors"
PHOTO = "data/Rain800/test_syn/1.jpg"
PARAMETERS = 4 * 27 + 4 + 3 * 36 + 3
MACS_PER_PIXEL = 4 * 27 + 3 * 36


@pytest.fixture(autouse=True)
def _no_module_is_imported_yet(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_method", None)  # another file's tests may have imported one of this name
    yield
    sys.modules.pop("my_method", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one file, a configuration and data, in which a process has trained the method."""
    folder = tmp_path_factory.mktemp("outside")
    make_set(folder / "data", "Rain800", "train", count=4, size=(64, 64))
    make_set(folder / "data", "Rain800", "test", count=2, seed=50)
    (folder / "my_method.py").write_text(METHOD)
    (folder / "my-run.yaml").write_text(RUN.format(module="my_method"))
    environment = {**os.environ, "DERAIN_DATA": "data", "DERAIN_CACHE": "cache"}
    environment.pop("PYTHONPATH", None)
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from derain.cli import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", start, "fit", "--config", "my-run.yaml"]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "--method my_method.MyModule" in process.stderr  # the command that restores photos
    return folder


@pytest.fixture
def folder(trained, monkeypatch):
    monkeypatch.chdir(trained)
    monkeypatch.setenv("DERAIN_DATA", "data")
    monkeypatch.setenv("DERAIN_CACHE", "cache")
    return trained


def test_weights_alone_import_nothing(folder, capsys):
    assert main(["restore", PHOTO, "out.png", "--weights", WEIGHTS]) == 2
    assert "--method my_method.MyModule" in capsys.readouterr().err
    assert "my_method" not in sys.modules
    with pytest.raises(DerainError, match=r"my_method\.MyModule"):
        DerainModule.from_pretrained(WEIGHTS)
    with pytest.raises(DerainError, match=r"absent\.MyModule"):
        Restorer(WEIGHTS, method="absent.MyModule")
    with pytest.raises(DerainError, match=r"json\.JSONDecoder"):
        Restorer(WEIGHTS, method="json.JSONDecoder")


def test_the_run_is_tested_and_tabled(folder, capsys):
    assert main(["test", "--config", "my-run.yaml", "--weights", WEIGHTS]) == 0
    summary = json.loads(Path("runs/my-run/test-1/summary.json").read_text())
    assert summary["method"]["class_path"] == "my_method.MyModule"
    capsys.readouterr()
    assert main(["table", "runs/my-run/test-1", "--cost", "--method", "my_method.MyModule", "--format", "csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (float(row["parameters"]), float(row["macs"])) == (PARAMETERS, 256 * 256 * MACS_PER_PIXEL)


def test_the_run_is_validated_and_photos_are_predicted(folder):
    (last,) = Path("runs/my-run/fit-1/checkpoints").glob("last.ckpt")
    assert main(["validate", "--config", "my-run.yaml", "--ckpt_path", str(last)]) == 0
    assert main(["predict", "--config", "my-run.yaml", "--weights", WEIGHTS, "--data.predict", "data/Rain800"]) == 0
    assert list(Path("runs/my-run").glob("predict-1/images/**/*.png"))


def test_maps_that_a_method_has_not_are_refused(folder, tmp_path, capsys):
    options = ["--weights", WEIGHTS, "--explain"]
    restore = ["restore", PHOTO, str(tmp_path / "o.png"), "--method", "my_method.MyModule", "--device", "cpu"]
    predict = ["predict", "--config", "my-run.yaml", "--data.predict", "data/Rain800"]
    for command in ([*restore, *options], [*predict, *options, "true"]):
        assert main(command) == 2
        assert "--explain: MyModule" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["method", "class"])
def test_photos_are_restored_and_scored(folder, tmp_path, name):
    out = tmp_path / "derained"
    command = ["restore", PHOTO, str(out / "1.png"), "--weights", WEIGHTS, "--device", "cpu"]
    assert main([*command, "--method", "my_method.MyModule"]) == 0
    derained = read_rgb(out / "1.png")
    method = catalog.use_method("my_method.MyModule")
    restorer = Restorer(WEIGHTS, device="cpu", method=method if name == "class" else "my_method.MyModule")
    assert np.abs(restorer(read_rgb(Path(PHOTO))).astype(int) - derained).max() <= 1
    assert main(["score", str(out), str(out)]) == 0


def test_from_pretrained(folder, tmp_path):
    method = catalog.use_method("my_method.MyModule")
    module = method.from_pretrained(WEIGHTS)
    module.save_pretrained(tmp_path / "saved")
    for kind in (method, DerainModule):
        loaded = kind.from_pretrained(tmp_path / "saved")
        assert type(loaded) is method
        assert loaded.trained_on == ("Rain800",)


def test_what_forward_computes_is_exported(folder, tmp_path):
    command = ["--weights", WEIGHTS, "--method", "my_method.MyModule"]
    assert main(["export", str(tmp_path / "m.onnx"), *command]) == 0
    assert main(["export", str(tmp_path / "m.pt2"), "--format", "torch", *command]) == 0
    module = catalog.load(WEIGHTS, "my_method.MyModule").module
    rainy = torch.rand(1, 3, 37, 31)
    with torch.no_grad():
        expected = module(rainy)
        assert not torch.allclose(expected, module.network(rainy), atol=0.1)
        program = torch.export.load(tmp_path / "m.pt2").module()
        for actual in (catalog.load(tmp_path / "m.onnx").module(rainy), program(rainy)):
            assert float((actual - expected).abs().max()) < 1e-5


def test_the_page_offers_it(folder, monkeypatch):
    offered = []
    monkeypatch.setattr(app, "serve", lambda service, *options: offered.extend(service.restorers))
    assert main(["app", "--weights", WEIGHTS, "--method", "my_method.MyModule", "--device", "cpu"]) == 0
    assert offered == ["weights · My"]


def test_bench_counts_it(folder, monkeypatch, capsys):
    built_in = set(catalog.methods())
    monkeypatch.setattr(bench, "methods", lambda: [method for method in catalog.methods() if method not in built_in])
    command = ["--weights", WEIGHTS, "--method", "my_method.MyModule"]
    assert main(["bench", "--size", "8", "--format", "json", *command]) == 0
    records = json.loads(capsys.readouterr().out)["methods"]
    assert [record["method"] for record in records] == ["MyModule", WEIGHTS]
    for record in records:
        assert (record["parameters"], record["macs"]) == (PARAMETERS, 8 * 8 * MACS_PER_PIXEL)


def install(folder, name):
    """Install a package that announces the method by a name, and return the class path."""
    package = name.lower()
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    (folder / package / "models.py").write_text(METHOD.replace("MyModule", name))
    information = folder / f"{package}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[derain.methods]\nx = {package}.models:{name}\n")
    return f"{package}.models.{name}"


def test_an_installed_package_announces_its_method(folder, tmp_path, monkeypatch):
    path = install(tmp_path, "Installed")
    monkeypatch.syspath_prepend(tmp_path)
    assert "Installed" in [method.__name__ for method in catalog.methods()]
    method = registry.find(Path("w"), {"method": "Installed", "class_path": path})
    weights = str(tmp_path / "w.safetensors")
    method().save_weights(Path(weights))
    assert type(catalog.load(weights).module) is method
    assert main(["restore", PHOTO, str(tmp_path / "out.png"), "--weights", weights, "--device", "cpu"]) == 0
    assert type(DerainModule.from_pretrained(weights)) is method


def test_an_installed_method_is_trained_exported_and_counted(folder, tmp_path, monkeypatch, capsys):
    install(tmp_path, "Packaged")
    monkeypatch.syspath_prepend(tmp_path)
    Path("installed.yaml").write_text(RUN.replace("{module}.MyModule", "Packaged").format())
    assert main(["fit", "--config", "installed.yaml"]) == 0
    assert "--method" not in capsys.readouterr().err
    weights = "runs/installed/fit-1/weights.safetensors"
    assert main(["export", str(tmp_path / "m.onnx"), "--weights", weights]) == 0
    monkeypatch.setattr(bench, "methods", lambda: [m for m in catalog.methods() if m.__name__ == "Packaged"])
    capsys.readouterr()
    assert main(["bench", "--size", "8", "--format", "json", "--weights", weights]) == 0
    first, second = json.loads(capsys.readouterr().out)["methods"]
    assert (first["method"], second["method"]) == ("Packaged", weights)
    assert first["macs"] == second["macs"] == 64 * 2 * 108


def test_a_package_that_cannot_be_imported_is_ignored(tmp_path, monkeypatch, caplog):
    information = tmp_path / "broken-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[derain.methods]\nx = absent_package:Broken\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "PReNetModule" in [method.__name__ for method in catalog.methods()]
    assert "absent_package:Broken" in caplog.text
