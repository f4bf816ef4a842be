"""``derain fit``, ``validate``, ``test`` and ``predict`` from configuration to results."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from derain.cli import main
from derain.files.weights import sha256
from derain.images import read_rgb
from derain.listing import image_files
from derain.methods import PReNetModule, catalog
from derain.metrics import psnr_ssim, resolve
from tests.factories import make_set
from tests.runs import differing, error_line, finish, rows, whole_and_resumed

CONFIG = {
    "model": {"class_path": "PReNetModule", "init_args": {"variant": "PRN_r", "stages": 1}},
    "data": {"train": "Rain800", "test": "Rain800", "crop": 16, "batch_size": 4, "workers": 0},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "callbacks": "EMA"},
}
CHECKPOINTS = "runs/exp/fit-1/checkpoints"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with data, ``exp.yaml``, untrained weights ``w.safetensors`` and a finished run ``runs/exp/fit-1``."""
    folder = tmp_path_factory.mktemp("prepared")
    make_set(folder / "data", "Rain800", "train", count=9)
    make_set(folder / "data", "Rain800", "test", count=5, seed=50)
    make_set(folder, "images", "predict", count=3)
    (folder / "exp.yaml").write_text(yaml.safe_dump(CONFIG))
    torch.manual_seed(0)
    PReNetModule(stages=1).save_weights(folder / "w.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DERAIN_DATA", str(folder / "data"))
        patch.delenv("LOCAL_RANK", raising=False)
        patch.delenv("DERAIN_RUN", raising=False)
        assert main(["fit", "--config", "exp.yaml"]) == 0
    return folder


@pytest.fixture
def workdir(prepared, tmp_path, monkeypatch):
    """The working directory of a test: a copy of ``prepared``."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


def test_fit_saves_configuration_metrics_checkpoints_panels_and_weights(prepared):
    run = prepared / "runs/exp/fit-1"
    logged = {key for row in rows(run / "metrics.csv") for key, value in row.items() if value}
    assert {"val/psnr", "val/ssim", "train/images_per_second", "train/data_wait", "lr-Adam"} <= logged
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["variant"] == "PRN_r"
    assert config["seed_everything"] == 0
    assert (run / "commit.txt").is_file()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    panels = list((run / "panels").rglob("*.png"))
    assert len(panels) == 2
    assert read_rgb(panels[0]).shape[1] > 3 * 64
    loaded, note = catalog.load(run / "weights.safetensors")
    assert loaded.trained_on == ("Rain800",)
    assert "PReNetModule" in note


def test_a_second_run_has_its_own_folder_and_seed(workdir):
    assert main(["fit", "--config", "exp.yaml", "--trainer.max_epochs", "1", "--seed_everything", "1"]) == 0
    assert {path.name for path in (workdir / "runs/exp").iterdir()} == {"fit-1", "fit-2"}
    first, second = (
        yaml.safe_load((workdir / f"runs/exp/fit-{number}/config.yaml").read_text())["data"] for number in (1, 2)
    )
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["split_seed"] == second["split_seed"]


def test_test_scores_every_image(workdir, capsys):
    method = catalog.load(workdir / "w.safetensors").module
    arguments = ["test", "--config", "exp.yaml", "--weights", "w.safetensors", "--protocol", "[prenet, rgb]"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "prenet" in output
    assert "Rain800, 5 images" in output
    run = workdir / "runs/exp/test-1"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"]["hyper_parameters"]["variant"] == "PReNet"  # from the file, not the YAML
    assert summary["weights"]["sha256"] == sha256(workdir / "w.safetensors")
    assert [result["protocol"] for result in summary["results"]] == ["prenet", "rgb"]
    table = rows(run / "images.csv")
    assert len(table) == 10
    assert len(list((run / "panels").iterdir())) == 4
    pair = read_rgb(workdir / "data/Rain800/test_syn/3.jpg")
    clean, rainy = np.split(pair, 2, axis=1)
    with torch.no_grad():
        derained = method.eval()(torch.from_numpy(rainy / np.float32(255)).permute(2, 0, 1)[None])
    derained = derained[0].permute(1, 2, 0).clamp(0, 1).numpy()
    protocol = resolve(["prenet"])[0]
    row = next(row for row in table if row["name"] == "3" and row["protocol"] == "prenet")
    expected = psnr_ssim(derained, clean, protocol)
    assert (float(row["psnr"]), float(row["ssim"])) == pytest.approx(expected, abs=1e-6)
    assert float(row["rainy_psnr"]) == pytest.approx(psnr_ssim(rainy, clean, protocol)[0], abs=1e-6)
    mean = np.mean([float(row["psnr"]) for row in table if row["protocol"] == "prenet"])
    assert summary["results"][0]["psnr"] == pytest.approx(mean, abs=1e-9)


def test_a_checkpoint_is_tested_by_either_option(workdir):
    best = f"{CHECKPOINTS}/best.ckpt"
    for option in ("--ckpt_path", "--weights"):
        assert main(["test", "--config", "exp.yaml", option, best]) == 0
    first, second = (json.loads((workdir / f"runs/exp/test-{number}/summary.json").read_text()) for number in (1, 2))
    assert first["results"] == second["results"]
    assert first["weights"]["sha256"] == second["weights"]["sha256"]
    assert first["method"] == second["method"]
    assert first["method"]["trained_on"] == ["Rain800"]


def test_weights_and_checkpoints_are_different_options(workdir, capsys, caplog):
    checkpoint = workdir / CHECKPOINTS / "last.ckpt"
    for options in (["--weights", "w.safetensors", "--ckpt_path", str(checkpoint)], ["--ckpt_path", "w.safetensors"]):
        assert main(["test", "--config", "exp.yaml", *options]) == 2
        assert f"--ckpt_path {options[-1]}" in error_line(capsys)
    resume = ["fit", "--config", "exp.yaml", "--weights", "w.safetensors", "--ckpt_path", "last"]
    assert main([*resume, "--trainer.max_epochs", "3"]) == 0
    assert "--weights w.safetensors: ignored" in caplog.text
    checkpoint.write_bytes(checkpoint.read_bytes()[:900])
    assert main(resume) == 2
    assert "last.ckpt: damaged" in error_line(capsys)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("folder", ["runs/exp", "runs/exp/fit-1"])
def test_only_fit_resumes_the_last_checkpoint(workdir, capsys, command, folder):
    files = set(workdir.rglob("*"))
    line = [command, "--config", "exp.yaml", "--ckpt_path", "last", "--trainer.default_root_dir", folder]
    assert main(line) == 2
    error = error_line(capsys)
    assert "--ckpt_path last" in error
    assert f"derain {command}" in error
    assert set(workdir.rglob("*")) == files


def test_validate(workdir, capsys):
    assert main(["validate", "--config", "exp.yaml", "--weights", "w.safetensors"]) == 0
    assert "val/psnr" in capsys.readouterr().out


def test_predict_keeps_the_other_images_if_one_is_not_finite(workdir, capsys, monkeypatch):
    forward, passes = PReNetModule.forward, []

    def spoil_second_image(self, rainy):
        passes.append(len(rainy))
        return forward(self, rainy) * (float("nan") if len(passes) == 2 else 1)

    monkeypatch.setattr(PReNetModule, "forward", spoil_second_image)
    line = ["predict", "--config", "exp.yaml", "--data.predict", "images", "--weights", "w.safetensors"]
    assert main([*line, "--data.eval_batch_size", "3"]) == 2
    saved = image_files(workdir / "runs/exp/predict-1/images")
    assert [path.name for path in saved] == ["1.png", "3.png"]
    assert error_line(capsys).startswith("derain: error: 2: ")


def test_predict_restores_a_folder(workdir):
    assert main(["predict", "--config", "exp.yaml", "--data.predict", "images", "--weights", "w.safetensors"]) == 0
    assert len(image_files(workdir / "runs/exp/predict-1/images")) == 3


def test_fit_starts_from_weights_of_the_same_network_only(workdir, capsys, caplog):
    fit = ["fit", "--config", "exp.yaml", "--weights", "w.safetensors", "--trainer.callbacks", "[]"]
    assert main([*fit, "--trainer.max_epochs", "1", "--model.variant", "PReNet", "--model.learning_rate", "1e-30"]) == 0
    assert "learning_rate 0.001 → 1e-30" in caplog.text
    initial = catalog.load(workdir / "w.safetensors").module.network.state_dict()
    trained = catalog.load(workdir / "runs/exp/fit-2/weights.safetensors").module.network.state_dict()
    assert differing(trained, initial) == []
    assert main([*fit, "--model.variant", "PRN"]) == 2
    assert "--weights w.safetensors" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fit", "--data.train", "Rain200H"], ("Rain200H", "https://")),
        (["test", "--protocol", "[matlab]"], ("matlab", "prenet")),
        (["fit", "--ckpt_path", "last", "--trainer.default_root_dir", "new"], ("--ckpt_path last", "new")),
        (["fit", "--data.crop", "0"], ("--data.crop 0",)),
        (["test"], ("derain test", "--weights FILE")),
        (["test", "--ckpt_path", "exp.yaml"], ("exp.yaml",)),
        (["fit", "--trainer.default_root_dir", "exp.yaml"], ("exp.yaml",)),
    ],
)
def test_errors_take_one_line(workdir, capsys, arguments, named):
    command, *options = arguments
    assert main([command, "--config", "exp.yaml", *options]) == 2
    error = error_line(capsys)
    for text in named:
        assert text in error


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_file_takes_one_line(workdir, capsys, workers):
    damaged = image_files(workdir / "images", recursive=True)[0]
    damaged.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    arguments = ["predict", "--config", "exp.yaml", "--data.predict", "images", "--weights", "w.safetensors"]
    assert main([*arguments, "--data.workers", workers]) == 2
    assert damaged.name in error_line(capsys)


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(workdir):
    fit = ["fit", "--config", "exp.yaml", "--trainer.max_epochs", "12", "--model.milestones", "[1, 3]"]
    whole, _, resumed = whole_and_resumed([*fit, "--data.workers", "1"], "val/psnr", "val/ssim", "lr-Adam")
    assert whole["ema"]["updates"] == resumed["ema"]["updates"] > 4
    for state in ("state_dict", "ema"):
        assert differing(whole[state], resumed[state]) == []


@pytest.mark.slow
def test_two_processes_train_and_test_exactly(workdir):
    make_set(workdir / "data", "Rain100L", "test", count=11, seed=300)
    two_processes = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    finish("fit", "--config", "exp.yaml", "--trainer.max_epochs", "1", *two_processes)
    file = "runs/exp/fit-2/weights.safetensors"
    test = ["test", "--config", "exp.yaml", "--weights", file, "--data.test", "Rain100L"]
    finish(*test, *two_processes)
    assert main(test) == 0
    two, one = (workdir / f"runs/exp/test-{number}" for number in (1, 2))
    assert (one / "images.csv").read_text() == (two / "images.csv").read_text()
    results = [json.loads((run / "summary.json").read_text())["results"] for run in (one, two)]
    assert results[0] == results[1]
    assert results[0][0]["count"] == 11
