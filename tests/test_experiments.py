"""Every experiment runs as its file says, on generated data of its layout."""

from pathlib import Path

import pytest
import yaml

from derain.cli import main
from tests.factories import make_set

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FILES = sorted(EXPERIMENTS.rglob("*.yaml"))
DATA = [path for path in FILES if "data" in yaml.safe_load(path.read_text()) and path.parent == EXPERIMENTS]
APPENDED = [path for path in FILES if path not in DATA]
SMALL = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.workers", "0"]
SMALL += ["--model.stages", "1", "--data.crop", "16", "--data.batch_size", "2", "--data.repeat", "1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for name, split in (
        ("RainTrainL", "train"),
        ("RainTrainH", "train"),
        ("Rain100L", "test"),
        ("Rain100H", "test"),
        ("Rain800", "train"),
        ("Rain800", "test"),
    ):
        make_set(data, name, split, count=4, seed=len(name) * 10 + 1000 * (split == "train"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(data))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_data_sets(path, place):
    config = ["--config", str(path), *SMALL]
    assert main(["fit", *config, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]) == 0
    run = place / "runs" / path.stem / "fit-1"
    with_weights = [*config, "--weights", str(run / "weights.safetensors")]
    assert main(["validate", *with_weights]) == 0
    assert main(["test", *with_weights]) == 0
    assert main(["predict", *with_weights, "--data.predict", str(next((place / "data").glob("Rain100L/rainy")))]) == 0
    assert len(list((place / "runs" / path.stem / "predict-1" / "images").iterdir())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("path", APPENDED, ids=lambda path: path.stem)
def test_appended_files(path, place, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = ["--config", str(EXPERIMENTS / "rain800.yaml"), "--config", str(path), *SMALL]
    assert main(["fit", *config, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]) == 0
    assert (place / "runs/rain800/fit-1/weights.safetensors").is_file()
    if path.stem == "tensorboard":
        assert list(place.rglob("events.out.tfevents.*"))
    if path.stem == "wandb":
        assert list((place / "runs/rain800/fit-1").rglob("*.wandb"))
