"""Configurations may name classes of methods, data and training, but no functions that run commands."""

import sys
from pathlib import Path

import pytest
import yaml

from derain.cli import main
from tests.factories import make_set

LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
CONFIG = {
    "model": {"class_path": "PReNetModule", "init_args": {"stages": 1}},
    "data": {"train": "Rain800", "crop": 16, "batch_size": 4, "workers": 0},
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory with data and ``exp.yaml``."""
    make_set(tmp_path / "data", "Rain800", "train", count=9)
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    return tmp_path


@pytest.mark.parametrize(
    ("module", "callback", "name"),
    [
        ("", {"class_path": LAMBDA, "init_args": {"on_fit_start": "os.system"}}, "os.system"),
        ("", {"class_path": LAMBDA, "init_args": {"on_fit_start": "torch.hub.load"}}, "torch.hub.load"),
        ("", {"class_path": LAMBDA, "init_args": {"on_fit_start": "shutil.os.system"}}, "shutil.os.system"),
        ("from os import system", {"class_path": LAMBDA, "init_args": {"on_fit_start": "my_module.system"}}, "system"),
        ("", {"class_path": "subprocess.Popen", "init_args": {"args": "ls"}}, "subprocess.Popen"),
        ("", {"class_path": "builtins.eval"}, "builtins.eval"),
        *(
            ("", {"class_path": LAMBDA, "init_args": {"on_fit_start": name}}, name)
            for name in ("torch.serialization.load", "torch.jit.load", "lightning.fabric.utilities.cloud_io._load")
        ),
    ],
)
def test_functions_that_run_commands_are_refused(workdir, monkeypatch, capsys, module, callback, name):
    (workdir / "my_module.py").write_text(module)
    monkeypatch.syspath_prepend(workdir)
    (workdir / "evil.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    assert main(["fit", "--config", "exp.yaml", "--config", "evil.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert name in error
    assert not (workdir / "runs").exists()


def test_classes_of_the_working_directory_and_of_lightning_are_used(workdir, monkeypatch):
    (workdir / "my_method.py").write_text(
        "from derain.methods import PReNetModule\n"
        "class MyModule(PReNetModule):\n    '''PReNet of a file in the working directory.'''\n"
        "def record_start(trainer, module):\n    open('started', 'w').close()\n"
    )
    monkeypatch.syspath_prepend(workdir)
    callbacks = [
        {"class_path": LAMBDA, "init_args": {"on_fit_start": "my_method.record_start"}},
        {"class_path": "lightning.pytorch.callbacks.ModelSummary", "init_args": {"max_depth": 1}},
        {"class_path": "derain.callbacks.EMA"},
    ]
    config = {
        "model": {"class_path": "my_method.MyModule"},
        "trainer": {"callbacks": callbacks, "profiler": {"class_path": "lightning.pytorch.profilers.SimpleProfiler"}},
    }
    (workdir / "more.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "exp.yaml", "--config", "more.yaml"]) == 0
    assert (workdir / "started").is_file()
    assert (workdir / "runs/exp/fit-1/weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "searched"),
    [
        ([], False),
        (["--model", "derain.methods.PReNetModule"], False),
        (["--model", "absent_module.MyModule"], True),
        (["--config", "my-run.yaml"], True),
        (["--config", "sections.yaml"], True),
    ],
)
def test_the_current_folder_is_searched_only_for_a_model_that_is_not_installed(workdir, monkeypatch, options, searched):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (workdir / "my-run.yaml").write_text("model: {class_path: absent_module.MyModule}")
    (workdir / "sections.yaml").write_text("fit: {model: absent_module.MyModule}")
    assert main(["fit", "--config", "exp.yaml", *options, "--data.crop", "x"]) == 2
    assert (str(Path.cwd()) in sys.path) == searched
