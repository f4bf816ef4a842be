import json

import numpy as np
import pytest
import torch
import yaml

from derain.cli import main
from derain.files.weights import sha256
from derain.images import image_files, read_rgb
from derain.methods import PReNetModule, catalog
from derain.metrics import psnr_ssim, resolve
from tests.factories import make_set
from tests.runs import differing, finish, rows, whole_and_resumed

CONFIG = {
    "model": {"class_path": "PReNetModule", "init_args": {"variant": "PRN_r", "stages": 1}},
    "data": {"train": "Rain800", "test": "Rain800", "crop": 16, "batch_size": 4, "workers": 0},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with data and ``exp.yaml``."""
    make_set(tmp_path / "data", "Rain800", "train", count=9)
    make_set(tmp_path / "data", "Rain800", "test", count=5, seed=50)
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


def test_fit_leaves_all_that_is_promised(place):
    assert main(["fit", "--config", "exp.yaml"]) == 0
    run = place / "runs/exp/fit-1"
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


def test_another_seed_gives_another_order(place):
    for seed in ("1", "2"):
        main(["fit", "--config", "exp.yaml", "--trainer.max_epochs", "1", "--seed_everything", seed])
    one, two = (yaml.safe_load((place / f"runs/exp/fit-{n}/config.yaml").read_text())["data"] for n in (1, 2))
    assert (one["seed"], two["seed"]) == (1, 2)
    assert one["split_seed"] == two["split_seed"]


def test_runs_never_share_a_folder(place):
    for _ in range(2):
        main(["fit", "--config", "exp.yaml", "--trainer.max_epochs", "1"])
    assert {path.name for path in (place / "runs/exp").iterdir()} == {"fit-1", "fit-2"}


def test_test_scores_every_image_and_says_of_what(place, capsys):
    torch.manual_seed(0)
    method = PReNetModule(stages=1)
    method.save_weights(place / "w.safetensors")
    arguments = ["test", "--config", "exp.yaml", "--weights", "w.safetensors", "--protocol", "[prenet, rgb]"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "prenet" in told
    assert "Rain800, 5 images" in told
    run = place / "runs/exp/test-1"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"]["hyper_parameters"]["variant"] == "PReNet"  # from the file, not the YAML
    assert summary["weights"]["sha256"] == sha256(place / "w.safetensors")
    assert [r["protocol"] for r in summary["results"]] == ["prenet", "rgb"]
    table = rows(run / "images.csv")
    assert len(table) == 10
    assert len(list((run / "panels").iterdir())) == 4
    file = place / "data/Rain800/test_syn/3.jpg"
    both = read_rgb(file)
    clean, rainy = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
    with torch.no_grad():
        derained = method.eval()(torch.from_numpy(rainy / np.float32(255)).permute(2, 0, 1)[None])
    derained = derained[0].permute(1, 2, 0).clamp(0, 1).numpy()
    row = next(r for r in table if r["name"] == "3" and r["protocol"] == "prenet")
    expected = psnr_ssim(derained, clean, resolve(["prenet"])[0])
    assert (float(row["psnr"]), float(row["ssim"])) == pytest.approx(expected, abs=1e-6)
    assert float(row["rainy_psnr"]) == pytest.approx(psnr_ssim(rainy, clean, resolve(["prenet"])[0])[0], abs=1e-6)
    mean = np.mean([float(r["psnr"]) for r in table if r["protocol"] == "prenet"])
    assert summary["results"][0]["psnr"] == pytest.approx(mean, abs=1e-9)


@pytest.mark.parametrize("average", [(), ("--trainer.callbacks+=derain.callbacks.EMA",)])
def test_a_checkpoint_is_tested_too(place, average):
    main(["fit", "--config", "exp.yaml", *average])
    best = "runs/exp/fit-1/checkpoints/best.ckpt"
    for option in ("--ckpt_path", "--weights"):
        assert main(["test", "--config", "exp.yaml", option, best]) == 0
    one, two = (json.loads((place / f"runs/exp/test-{n}/summary.json").read_text()) for n in (1, 2))
    assert one["results"] == two["results"]
    assert one["weights"]["sha256"] == two["weights"]["sha256"]
    assert one["method"] == two["method"]
    assert one["method"]["trained_on"] == ["Rain800"]


def test_what_is_loaded_is_told_apart(place, capsys, caplog):
    assert main(["fit", "--config", "exp.yaml"]) == 0
    PReNetModule(stages=1).save_weights(place / "w.safetensors")
    last = place / "runs/exp/fit-1/checkpoints/last.ckpt"
    for arguments, told in (
        (["test", "--weights", "w.safetensors", "--ckpt_path", str(last)], f"--ckpt_path {last}"),
        (["test", "--ckpt_path", "w.safetensors"], "--ckpt_path w.safetensors"),
    ):
        capsys.readouterr()
        assert main([arguments[0], "--config", "exp.yaml", *arguments[1:]]) == 2
        assert told in capsys.readouterr().err
    again = ["fit", "--config", "exp.yaml", "--weights", "w.safetensors", "--ckpt_path", "last"]
    assert main([*again, "--trainer.max_epochs", "3"]) == 0
    assert "--weights w.safetensors: ignored" in caplog.text
    last.write_bytes(last.read_bytes()[:900])
    capsys.readouterr()
    assert main(again) == 2
    assert "last.ckpt: damaged" in capsys.readouterr().err


def test_validate(place, capsys):
    PReNetModule(stages=1).save_weights(place / "w.safetensors")
    assert main(["validate", "--config", "exp.yaml", "--weights", "w.safetensors"]) == 0
    assert "val/psnr" in capsys.readouterr().out


def test_predict_restores_a_folder(place):
    make_set(place, "images", "predict", count=3)
    PReNetModule(stages=1).save_weights(place / "w.safetensors")
    assert main(["predict", "--config", "exp.yaml", "--data.predict", "images", "--weights", "w.safetensors"]) == 0
    assert len(image_files(place / "runs/exp/predict-1/images")) == 3


def test_fit_starts_from_weights_that_fit_only(place, capsys, caplog):
    method = PReNetModule(variant="PRN_r", stages=1)
    method.save_weights(place / "w.safetensors")
    arguments = ["fit", "--config", "exp.yaml", "--weights", "w.safetensors"]
    assert main([*arguments, "--trainer.max_epochs", "1", "--model.learning_rate", "1e-30"]) == 0
    assert "differ from those of the weights: learning_rate 0.001 → 1e-30" in caplog.text
    for name, value in catalog.load(place / "runs/exp/fit-1/weights.safetensors").module.network.state_dict().items():
        assert torch.equal(value, method.network.state_dict()[name])
    assert main([*arguments, "--model.variant", "PRN"]) == 2
    assert "does not fit the configured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fit", "--data.train", "Rain200H"], ("Rain200H", "https://")),
        (["test", "--protocol", "[matlab]"], ("matlab", "prenet")),
        (["fit", "--ckpt_path", "last"], ("--ckpt_path last",)),
        (["fit", "--data.crop", "0"], ("--data.crop 0",)),
        (["test"], ("no weights given", "--weights FILE")),
        (["test", "--ckpt_path", "exp.yaml"], ("exp.yaml", "expected a derain checkpoint")),
        (["fit", "--trainer.default_root_dir", "exp.yaml"], ("exp.yaml",)),
    ],
)
def test_refusals_take_one_line(place, capsys, arguments, told):
    command, *options = arguments
    assert main([command, "--config", "exp.yaml", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("derain: error:")
    for part in told:
        assert part in error


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_where_an_uninterrupted_one_ends(place):
    fit = ["fit", "--config", "exp.yaml", "--trainer.max_epochs", "12", "--model.milestones", "[1, 3]"]
    fit += ["--data.workers", "1", "--trainer.callbacks+=derain.callbacks.EMA"]
    whole, _, resumed = whole_and_resumed(fit, "val/psnr", "val/ssim", "lr-Adam")
    assert whole["ema"]["updates"] == resumed["ema"]["updates"] > 4
    for state in ("state_dict", "ema"):
        assert differing(whole[state], resumed[state]) == []


@pytest.mark.slow
def test_two_processes_train_and_test_exactly(place):
    make_set(place / "data", "Rain100L", "test", count=11, seed=300)
    both = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    finish("fit", "--config", "exp.yaml", "--trainer.max_epochs", "1", *both)
    file = "runs/exp/fit-1/weights.safetensors"
    test = ["test", "--config", "exp.yaml", "--weights", file, "--data.test", "Rain100L"]
    finish(*test, *both)
    assert main(test) == 0
    two, one = (place / f"runs/exp/test-{n}" for n in (1, 2))
    assert (one / "images.csv").read_text() == (two / "images.csv").read_text()
    results = [json.loads((run / "summary.json").read_text())["results"] for run in (one, two)]
    assert results[0] == results[1]
    assert results[0][0]["count"] == 11


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_file_takes_one_line(place, capsys, workers):
    make_set(place, "images", "predict", count=2)
    PReNetModule(stages=1).save_weights(place / "w.safetensors")
    broken = image_files(place / "images", recursive=True)[0]
    broken.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    arguments = ["predict", "--config", "exp.yaml", "--data.predict", "images", "--weights", "w.safetensors"]
    assert main([*arguments, "--data.workers", workers]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("derain: error: ")
    assert broken.name in last
