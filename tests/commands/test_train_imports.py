"""What a configuration may name: classes of methods, data and training; nothing that runs commands."""

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
    ("module", "option", "named"),
    [
        ("", {"class_path": LAMBDA, "init_args": {"on_fit_start": "os.system"}}, "os.system"),
        ("", {"class_path": LAMBDA, "init_args": {"on_fit_start": "torch.hub.load"}}, "torch.hub.load"),
        ("", {"class_path": LAMBDA, "init_args": {"on_fit_start": "shutil.os.system"}}, "shutil.os.system"),
        ("from os import system", {"class_path": LAMBDA, "init_args": {"on_fit_start": "named.system"}}, "system"),
        ("", {"class_path": "subprocess.Popen", "init_args": {"args": "ls"}}, "subprocess.Popen"),
        ("", {"class_path": "builtins.eval"}, "builtins.eval"),
        *(
            ("", {"class_path": LAMBDA, "init_args": {"on_fit_start": name}}, name)
            for name in ("torch.serialization.load", "torch.jit.load", "lightning.fabric.utilities.cloud_io._load")
        ),
    ],
)
def test_what_runs_commands_is_refused(workdir, monkeypatch, capsys, module, option, named):
    (workdir / "named.py").write_text(module)
    monkeypatch.syspath_prepend(workdir)
    (workdir / "evil.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [option]}}))
    assert main(["fit", "--config", "exp.yaml", "--config", "evil.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert not (workdir / "runs").exists()


def test_classes_of_an_own_file_lightning_and_torch_are_used(workdir, monkeypatch):
    (workdir / "own_method.py").write_text(
        "from derain.methods import PReNetModule\n"
        "class OwnModule(PReNetModule):\n    '''PReNet of an own file.'''\n"
        "def began(trainer, module):\n    open('began', 'w').close()\n"
    )
    monkeypatch.syspath_prepend(workdir)
    callbacks = [
        {"class_path": LAMBDA, "init_args": {"on_fit_start": "own_method.began"}},
        {"class_path": "lightning.pytorch.callbacks.ModelSummary", "init_args": {"max_depth": 1}},
        {"class_path": "derain.callbacks.EMA"},
    ]
    own = {
        "model": {"class_path": "own_method.OwnModule"},
        "trainer": {"callbacks": callbacks, "profiler": {"class_path": "lightning.pytorch.profilers.SimpleProfiler"}},
    }
    (workdir / "own.yaml").write_text(yaml.safe_dump(own))
    assert main(["fit", "--config", "exp.yaml", "--config", "own.yaml"]) == 0
    assert (workdir / "began").is_file()
    assert (workdir / "runs/exp/fit-1/weights.safetensors").is_file()
