"""CLIP-RPN through the command: routes, several processes, resuming."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from derain.cli import main
from derain.images import read_rgb
from derain.methods import catalog
from derain.methods.clip import FrozenCLIP
from derain.methods.cliprpn.perception import RainPerception
from derain.methods.cliprpn.prompts import texts_of
from tests.factories import make_clip, make_set
from tests.runs import differing, finish, last, rows, start, whole_and_resumed

NETWORK = {"dim": 8, "blocks": [1, 1, 1, 1], "refinement": 1}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with data, a tiny CLIP and ``exp.yaml``; half of the images take each route."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    make_set(tmp_path / "data", "Rain800", "train", count=9)
    make_set(tmp_path / "data", "Rain800", "test", count=3, seed=50)
    make_clip(tmp_path / "clip")
    files = sorted((tmp_path / "data").rglob("*.jpg"))
    halves = [image[:, image.shape[1] // 2 :] for image in map(read_rgb, files)]
    perception = RainPerception(str(tmp_path / "clip"), texts_of("3"))
    perception.similarities(halves)
    file = next((tmp_path / "cache/routes").iterdir())
    kept = [json.loads(line)[0] for line in file.read_text().splitlines() if line]
    file.write_text("".join(json.dumps([key, [1.0, 0.0][:: 1 - 2 * (i % 2)]]) + "\n" for i, key in enumerate(kept)))
    config = {
        "model": {"class_path": "CLIPRPNModule", "init_args": {**NETWORK, "clip": str(tmp_path / "clip")}},
        "data": {"train": "Rain800", "test": "Rain800", "crop": 16, "batch_size": 1, "workers": 0},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
    }
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def logged(path, key):
    return [float(row[key]) for row in rows(path) if row.get(key)]


def test_training_runs_no_clip_once_images_were_seen(place, monkeypatch, caplog):
    monkeypatch.setattr(FrozenCLIP, "images", lambda *args: pytest.fail("CLIP ran"))
    monkeypatch.setattr(FrozenCLIP, "texts", lambda *args: pytest.fail("CLIP ran"))
    assert main(["fit", "--config", "exp.yaml"]) == 0
    metrics = place / "runs/exp/fit-1/metrics.csv"
    shares = logged(metrics, "train/route_1")
    assert set(shares) == {0.0, 1.0}
    assert logged(metrics, "train/mask_1")
    steps = len(shares)
    expected = [0.8 + 2.3 * step / steps for step in range(steps)]
    assert logged(metrics, "train/exponent") == pytest.approx(expected, abs=1e-6)


def test_files_hold_no_clip_but_say_which(place):
    assert main(["fit", "--config", "exp.yaml", "--trainer.max_epochs", "1"]) == 0
    content = last(place / "runs/exp/fit-1")
    assert all(name.startswith("network.") for name in content["state_dict"])
    hashed = FrozenCLIP(str(place / "clip")).sha256
    assert content["derain"]["clip_sha256"] == hashed
    loaded = catalog.load(place / "runs/exp/fit-1/weights.safetensors").module
    assert loaded.routing.clip_sha256 == hashed
    optimised = sum(len(group["params"]) for group in content["optimizer_states"][0]["param_groups"])
    assert optimised == len(list(loaded.network.parameters()))


def test_another_clip_than_in_training_is_told(place, caplog):
    assert main(["fit", "--config", "exp.yaml", "--trainer.max_epochs", "1"]) == 0
    module = catalog.load(place / "runs/exp/fit-1/weights.safetensors").module
    make_clip(place / "clip", seed=5)
    module.encode(torch.rand(1, 3, 20, 20))
    assert "CLIP" in caplog.text


def test_accumulation_counts_optimiser_steps(place):
    assert main(["fit", "--config", "exp.yaml", "--trainer.accumulate_grad_batches", "4"]) == 0
    metrics = place / "runs/exp/fit-1/metrics.csv"
    exponents = sorted(set(logged(metrics, "train/exponent")))
    assert len(exponents) == 2 * -(-8 // 4)
    assert exponents[-1] == pytest.approx(0.8 + 2.3 * 3 / 4)


def test_plain_ddp_is_refused(place, capsys):
    process = start("fit", "--config", "exp.yaml", "--trainer.devices", "1", "--trainer.strategy", "ddp")
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "ddp_find_unused_parameters_true" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model.clip", "nowhere/clip"], ("nowhere/clip", "--model.perception none", "hf download")),
        (["--model.prompts", "7"], ("7", "3-distortion")),
        (["--model.perception", "fixed", "--model.route", "2"], ("route 2", "0 to 1")),
        (["--model.warm_up", "1"], ("--model.warm_up 1",)),
        (["--model.heads", "[1, 2, 4, 3]"], ("3 heads do not divide 64 channels",)),
        (["--model.blocks", "[1, 1]"], ("blocks [1, 1]", "four numbers")),
        (["--model.spatial_kernel", "4"], ("spatial_kernel 4", "odd")),
    ],
)
def test_refusals_take_one_line(place, capsys, monkeypatch, options, told):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["fit", "--config", "exp.yaml", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("derain: error:")
    for part in told:
        assert part in error


@pytest.mark.slow
def test_two_processes_train_with_a_route_empty_on_one(place):
    both = ["--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true"]
    finish("fit", "--config", "exp.yaml", *both, "--trainer.max_epochs", "3")
    metrics = place / "runs/exp/fit-1/metrics.csv"
    assert {0.0, 1.0} <= set(logged(metrics, "train/route_1"))  # of rank 0, whose batch is one image
    assert logged(metrics, "train/exponent")[-1] == pytest.approx(0.8 + 2.3 * 11 / 12)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_where_an_uninterrupted_one_ends(place):
    fit = ["fit", "--config", "exp.yaml", "--trainer.max_epochs", "4"]
    columns = ("train/loss", "train/exponent", "train/route_0", "val/psnr", "lr-AdamW")
    whole, _, resumed = whole_and_resumed(fit, *columns)
    assert differing(whole["state_dict"], resumed["state_dict"]) == []


@pytest.mark.slow
def test_predict_and_restore_explain(place):
    make_set(place, "images", "predict", count=2)
    assert main(["fit", "--config", "exp.yaml", "--trainer.max_epochs", "1"]) == 0
    file = str(place / "runs/exp/fit-1/weights.safetensors")
    predict = ["predict", "--config", "exp.yaml", "--weights", file, "--data.predict", "images", "--explain", "true"]
    assert main(predict) == 0
    folder = place / "runs/exp/predict-1/images"
    names = {path.stem for path in folder.glob("*.png") if not path.stem.endswith("-explain")}
    assert len(names) == 2
    for name in names:
        told = json.loads((folder / f"{name}-explain.json").read_text())
        assert told["prompt"] == texts_of("3")[told["route"]]
        assert sum(told["scores"].values()) == pytest.approx(1)
        width = read_rgb(folder / f"{name}.png").shape[1]
        sheet = read_rgb(folder / f"{name}-explain.png")
        assert sheet.shape[1] > 5 * width
    assert main(["restore", str(place / "images"), "out", "--weights", file, "--explain", "--tile", "64"]) == 0
    explained = sorted(Path("out").rglob("*-explain.json"))
    assert [json.loads(path.read_text()) for path in explained] == [
        json.loads((folder / f"{Path(path.name.removesuffix('-explain.json')).stem}-explain.json").read_text())
        for path in explained
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model.prompts", "[light rain, heavy rain]"], "prompts"),
        (["--model.similarity", "dot"], "similarity"),
        (["--model.clip", "other"], "CLIP other"),
    ],
)
def test_a_run_does_not_go_on_with_other_routes(place, capsys, options, told):
    make_clip(place / "other", seed=3)
    assert main(["fit", "--config", "exp.yaml", "--trainer.max_epochs", "1"]) == 0
    assert main(["fit", "--config", "exp.yaml", "--ckpt_path", "last", *options]) == 2
    assert told in capsys.readouterr().err.strip().splitlines()[-1]


def test_patches_are_perceived_but_not_remembered(place):
    files = place / "cache/routes"
    before = {path: path.read_text() for path in files.iterdir()}
    options = ["--model.route_by", "patch", "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", "exp.yaml", *options]) == 0
    assert {path: path.read_text() for path in files.iterdir()} == before
    module = catalog.load(place / "runs/exp/fit-1/weights.safetensors").module
    assert module.encode(torch.rand(1, 3, 9, 9)) == {}


def test_restore_by_a_given_route_needs_no_clip(place, capsys):
    assert main(["fit", "--config", "exp.yaml", "--trainer.max_epochs", "1"]) == 0
    file = str(place / "runs/exp/fit-1/weights.safetensors")
    make_set(place, "images", "predict", count=2)
    (place / "clip").rename(place / "gone")
    restore = ["restore", "images", "out", "--weights", file, "--explain"]
    assert main(restore) == 2
    assert capsys.readouterr().err.count("derain: error:") == 1
    assert main([*restore, "--route", "2"]) == 2
    assert "a route from 0 to 1" in capsys.readouterr().err
    assert main([*restore, "--route", "1"]) == 0
    told = sorted(Path("out").rglob("*-explain.json"))
    assert [json.loads(path.read_text()) for path in told] == [{"route": 1}] * 2
    told[0].with_name(told[0].name.removesuffix("-explain.json")).unlink()
    assert main([*restore, "--route", "0"]) == 0
    assert [json.loads(path.read_text()) for path in told] == [{"route": 0}, {"route": 1}], "of their images"
