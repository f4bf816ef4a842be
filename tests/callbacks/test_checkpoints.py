"""Best and last checkpoint, final weights, and counts of evaluated images, by training for three epochs."""

import json

import pytest
import torch
import yaml

from derain.cli import main
from derain.methods import DerainModule, catalog
from tests.factories import make_set
from tests.runs import last

CONFIG = {
    "model": {"class_path": "PReNetModule", "init_args": {"variant": "PRN_r", "stages": 1, "learning_rate": 0.01}},
    "data": {"train": "Rain800", "val": "Rain800", "test": "Rain800", "crop": 16, "batch_size": 2, "workers": 0},
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_set(tmp_path / "data", "Rain800", "train", count=2)
    make_set(tmp_path / "data", "Rain800", "test", count=3, seed=50)
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


def networks(run):
    """Return the parameters of the best checkpoint, of the last one, and of the final weights."""
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    final = catalog.load(run / "weights.safetensors").module.network.state_dict()
    return best, last(run)["state_dict"], {f"network.{name}": value for name, value in final.items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize(("scores", "epoch"), [((20.0, 30.0, 25.0), 1), ((20.0, 25.0, 30.0), 2)])
def test_final_weights_are_those_of_the_epoch_with_the_highest_score(folder, monkeypatch, scores, epoch):
    def log_score(module):
        module.log("val/psnr", scores[module.current_epoch])

    monkeypatch.setattr(DerainModule, "on_validation_epoch_end", log_score)
    assert main(["fit", "--config", "exp.yaml"]) == 0
    run = folder / "runs/exp/fit-1"
    assert torch.load(run / "checkpoints/best.ckpt", weights_only=True)["epoch"] == epoch
    best, newest, final = networks(run)
    assert equal(best, final)
    assert equal(newest, final) == (epoch == 2)


def test_without_validation_final_weights_are_the_last(folder):
    assert main(["fit", "--config", "exp.yaml", "--data.val", "none"]) == 0
    run = folder / "runs/exp/fit-1"
    final = catalog.load(run / "weights.safetensors").module.network.state_dict()
    newest = last(run)["state_dict"]
    assert all(torch.equal(newest[f"network.{name}"], value) for name, value in final.items())


@pytest.mark.parametrize(("limit", "images"), [("2", 2), ("0.34", 1), ("1.0", 3)])
def test_a_limited_test_counts_the_images_that_it_scored(folder, limit, images):
    arguments = ["test", "--config", "exp.yaml", "--weights", "default", "--trainer.limit_test_batches", limit]
    assert main(arguments) == 0
    run = folder / "runs/exp/test-1"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["data"]["images"], summary["data"]["images_in_sets"]) == (images, 3)
    assert [row["count"] for row in summary["results"]] == [images]
    assert len((run / "images.csv").read_text().splitlines()) == 1 + images
