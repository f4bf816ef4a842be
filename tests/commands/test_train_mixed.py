"""Training on several data sets with weights, and tests on videos, in one process and in two."""

import copy
import json

import pytest
import yaml

from derain.cli import main
from derain.methods import PReNetModule
from tests.factories import make_set
from tests.runs import EXPERIMENT, differing, finish, kill_when_there_is, last, metrics, rows, whole_and_resumed

SETS = {"Rain800": 9, "Rain1400": 5, "RealRain-1k-L": 7, "NTURain": 3}
COLUMNS = [f"val/{name}/{score}" for name in SETS for score in ("psnr", "ssim", "rainy_psnr")]
COLUMNS += ["val/psnr", "val/ssim", "val/rainy_psnr"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory with four small sets, one of them a video, and ``exp.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DERAIN_DATA", raising=False)
    for seed, (name, count) in enumerate(SETS.items()):
        make_set(tmp_path / "data", name, "train", count=count, seed=100 * seed)
    config = copy.deepcopy(EXPERIMENT)
    config["data"] = {"train": list(SETS), "train_weights": [3, 1, 2, 2], "val_share": 0.3, "val_mean": "sets"}
    config["data"] |= {"crop": 16, "batch_size": 2, "workers": 0}
    config["trainer"] = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.mark.slow
def test_means_of_each_set_are_those_of_one_process(workdir):
    output = finish("fit", "--config", "exp.yaml", *TWO)
    assert "sync_dist" not in output
    trained = metrics(workdir / "runs/exp/fit-1", *COLUMNS)[-1]
    assert all(trained[column] for column in COLUMNS)
    weights = ["--weights", "runs/exp/fit-1/checkpoints/last.ckpt"]
    assert main(["validate", "--config", "exp.yaml", *weights]) == 0
    validated = rows(workdir / "runs/exp/validate-1/metrics.csv")[-1]
    assert {column: validated[column] for column in COLUMNS} == {column: trained[column] for column in COLUMNS}
    means = [float(trained[f"val/{name}/psnr"]) for name in SETS]
    assert float(trained["val/psnr"]) == pytest.approx(sum(means) / len(means))


@pytest.mark.slow
def test_scores_of_videos_are_those_of_one_process(workdir):
    folder = make_set(workdir / "videos", "NTURain", "test", count=5)
    for side in ("Rain", "GT"):  # sequences of different lengths, one with a gap
        (folder / f"Dataset_Testing_Synthetic/a1_{side}/00003.jpg").unlink()
    PReNetModule(variant="PRN_r", stages=1).save_weights(workdir / "w.safetensors")
    test = ["test", "--config", "exp.yaml", "--weights", "w.safetensors", "--data.test", f"NTURain:{folder}"]
    test += ["--protocol", "[matlab-y, temporal]"]
    assert main(test) == 0
    finish(*test, *TWO)
    one, two = (workdir / f"runs/exp/test-{number}" for number in (1, 2))
    for name in ("images.csv", "sequences.csv"):
        assert (one / name).read_text() == (two / name).read_text()
    (result,), others = (json.loads((run / "summary.json").read_text())["results"] for run in (one, two))
    assert [result] == others
    assert (result["count"], result["sequences"]["count"]) == (9, 2)
    assert result["sequences"]["psnr"] != result["psnr"]
    assert [row["flicker"] for row in rows(one / "images.csv")].count("") == 3  # two first frames and the gap


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(workdir, processes):
    fit = ["fit", "--config", "exp.yaml"]
    if processes == 1:
        whole, _, resumed = whole_and_resumed([*fit, "--trainer.max_epochs", "6"], *COLUMNS)
    else:
        fit += TWO
        roots = [["--trainer.default_root_dir", root] for root in ("whole", "killed")]
        finish(*fit, *roots[0])
        kill_when_there_is(workdir / "killed/fit-1/checkpoints/last.ckpt", *fit, *roots[1])
        finish(*fit, *roots[1], "--ckpt_path", "last")
        whole, resumed = last(workdir / "whole/fit-1"), last(workdir / "killed/fit-1")
        assert metrics(workdir / "whole/fit-1", *COLUMNS) == metrics(workdir / "killed/fit-1", *COLUMNS)
    assert whole["global_step"] == resumed["global_step"]
    assert differing(whole["state_dict"], resumed["state_dict"]) == []
