"""Working directories for tests of the training commands."""

import shutil

import pytest
import yaml

from derain.cli import main
from derain.methods import PReNetModule
from tests.factories import make_set
from tests.runs import EXPERIMENT, TINY_GAN
from tests.tiny import write_configs


@pytest.fixture(scope="session")
def tiny_configs(tmp_path_factory):
    """A folder with data and a configuration ``METHOD.yaml`` of every method; no test changes it."""
    return write_configs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def all_methods(tiny_configs, tmp_path, monkeypatch):
    """A working directory with the configurations of ``tiny_configs``, which refer to its data."""
    for path in tiny_configs.glob("*.yaml"):
        shutil.copy(path, tmp_path)
    _enter(tmp_path, monkeypatch)
    monkeypatch.setenv("DERAIN_DATA", str(tiny_configs / "data"))
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A folder with data, ``exp.yaml``, ``bf16.yaml``, ``gan.yaml``, ``w.safetensors`` and a run ``runs/exp/fit-1``."""
    folder = tmp_path_factory.mktemp("finished")
    make_set(folder / "data", "Rain800", "train", count=9, size=(64, 64))
    for split, seed in (("test", 50), ("predict", 70)):
        make_set(folder / "data", "Rain800", split, count=5, seed=seed)
    bf16 = EXPERIMENT | {"trainer": EXPERIMENT["trainer"] | {"precision": "bf16-mixed"}}
    gan_data = EXPERIMENT["data"] | {"crop": 56, "batch_size": 1}
    gan = EXPERIMENT | {"model": {"class_path": "PLNLINGANModule", "init_args": TINY_GAN}, "data": gan_data}
    for name, config in (("exp", EXPERIMENT), ("bf16", bf16), ("gan", gan)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    PReNetModule(stages=1).save_weights(folder / "w.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        _enter(folder, patch)
        assert main(["fit", "--config", "exp.yaml"]) == 0
    return folder


@pytest.fixture
def trained(finished_run, tmp_path, monkeypatch):
    """A working directory with the files of ``finished_run``."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    _enter(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def workdir(trained):
    """A working directory with the files of ``finished_run``, but no run yet."""
    shutil.rmtree(trained / "runs")
    return trained


def _enter(folder, patch):
    patch.chdir(folder)
    patch.setenv("DERAIN_DATA", str(folder / "data"))
    for name in ("LOCAL_RANK", "DERAIN_RUN"):
        patch.delenv(name, raising=False)
