"""CLIP-RPN through the command: routes, several processes, resuming."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer

from derain.cli import main
from derain.errors import DerainError
from derain.images import read_rgb
from derain.methods import CLIPRPNModule, catalog
from derain.methods.clip import FrozenCLIP
from derain.methods.cliprpn.perception import RainPerception
from derain.methods.cliprpn.prompts import texts_of
from tests.factories import make_clip, make_set
from tests.runs import differing, finish, last, rows, whole_and_resumed

NETWORK = {"dim": 8, "blocks": [1, 1, 1, 1], "refinement": 1}
WEIGHTS = "runs/exp/fit-1/weights.safetensors"


OPTIONS = {
    "model": {"class_path": "CLIPRPNModule", "init_args": {**NETWORK, "clip": "clip"}},
    "data": {"train": "Rain800", "test": "Rain800", "crop": 16, "batch_size": 1, "workers": 0},
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
}


def enter(folder, patch):
    """Make a folder the working directory, with its data and cache."""
    patch.chdir(folder)
    patch.setenv("DERAIN_DATA", str(folder / "data"))
    patch.setenv("DERAIN_CACHE", str(folder / "cache"))
    for name in ("LOCAL_RANK", "DERAIN_RUN"):
        patch.delenv(name, raising=False)


def fill_route_cache():
    """Write the similarities of all images to the cache, so that the images alternate between two routes."""
    images = [read_rgb(file) for file in sorted(Path("data").rglob("*.jpg"))]
    perception = RainPerception("clip", texts_of("3"))
    perception.similarities([image[:, image.shape[1] // 2 :] for image in images])
    file = next(Path("cache/routes").iterdir())
    keys = [json.loads(line)[0] for line in file.read_text().splitlines() if line]
    similarities = ([1.0, 0.0], [0.0, 1.0])
    lines = [json.dumps([key, similarities[index % 2]]) for index, key in enumerate(keys)]
    file.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with data, a tiny CLIP, routes in the cache, ``exp.yaml``, and a run that needed no CLIP."""
    folder = tmp_path_factory.mktemp("cliprpn")
    make_set(folder / "data", "Rain800", "train", count=9)
    make_set(folder / "data", "Rain800", "test", count=3, seed=50)
    make_clip(folder / "clip")
    (folder / "exp.yaml").write_text(yaml.safe_dump(OPTIONS))
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        fill_route_cache()
        patch.setattr(FrozenCLIP, "image_features", lambda *args: pytest.fail("CLIP ran"))
        patch.setattr(FrozenCLIP, "text_features", lambda *args: pytest.fail("CLIP ran"))
        assert main(["fit", "--config", "exp.yaml"]) == 0
    return folder


@pytest.fixture
def workdir(prepared, tmp_path, monkeypatch):
    """The working directory of a test: a copy of ``prepared``."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    enter(tmp_path, monkeypatch)
    return tmp_path


def logged(path, key):
    return [float(row[key]) for row in rows(path) if row.get(key)]


def test_training_with_cached_routes_runs_no_clip(prepared):
    metrics = prepared / "runs/exp/fit-1/metrics.csv"
    shares = logged(metrics, "train/route_1")
    assert set(shares) == {0.0, 1.0}
    assert logged(metrics, "train/mask_1")
    steps = len(shares)
    expected = [0.8 + 2.3 * step / steps for step in range(steps)]
    assert logged(metrics, "train/exponent") == pytest.approx(expected, abs=1e-6)


def test_files_contain_the_hash_of_clip_but_not_clip(workdir):
    content = last(workdir / "runs/exp/fit-1")
    assert all(name.startswith("network.") for name in content["state_dict"])
    sha256 = FrozenCLIP("clip").sha256
    assert content["derain"]["clip_sha256"] == sha256
    loaded = catalog.load(workdir / WEIGHTS).module
    assert loaded.routing.clip_sha256 == sha256
    optimised = sum(len(group["params"]) for group in content["optimizer_states"][0]["param_groups"])
    assert optimised == len(list(loaded.network.parameters()))


def test_another_clip_than_in_training_is_warned_of(workdir, caplog):
    module = catalog.load(workdir / WEIGHTS).module
    make_clip(workdir / "clip", seed=5)
    module.encode(torch.rand(1, 3, 20, 20))
    assert "CLIP" in caplog.text


@pytest.mark.slow
def test_accumulation_counts_optimiser_steps(workdir):
    options = ["--trainer.accumulate_grad_batches", "4", "--trainer.limit_val_batches", "0"]
    assert main(["fit", "--config", "exp.yaml", *options]) == 0
    exponents = logged(workdir / "runs/exp/fit-2/metrics.csv", "train/exponent")
    assert sorted(set(exponents)) == pytest.approx([0.8, 0.8 + 2.3 / 2])


def test_plain_ddp_is_an_error(workdir):
    module = CLIPRPNModule(**NETWORK, clip="clip")
    module.trainer = Trainer(accelerator="cpu", strategy="ddp", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(DerainError, match="ddp_find_unused_parameters_true"):
        module.on_fit_start()


@pytest.mark.parametrize(
    ("options", "named"),
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
def test_errors_take_one_line(workdir, capsys, monkeypatch, options, named):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["fit", "--config", "exp.yaml", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("derain: error:")
    for text in named:
        assert text in error


@pytest.mark.slow
def test_two_processes_train_with_a_route_empty_on_one(workdir):
    two_processes = ["--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true"]
    finish("fit", "--config", "exp.yaml", *two_processes, "--trainer.max_epochs", "3")
    metrics = workdir / "runs/exp/fit-2/metrics.csv"
    assert {0.0, 1.0} <= set(logged(metrics, "train/route_1"))  # of rank 0, whose batch is one image
    assert logged(metrics, "train/exponent")[-1] == pytest.approx(0.8 + 2.3 * 11 / 12)


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(workdir):
    fit = ["fit", "--config", "exp.yaml", "--trainer.max_epochs", "4"]
    columns = ("train/loss", "train/exponent", "train/route_0", "val/psnr", "lr-AdamW")
    whole, _, resumed = whole_and_resumed(fit, *columns)
    assert differing(whole["state_dict"], resumed["state_dict"]) == []


@pytest.mark.slow
def test_predict_and_restore_explain(workdir):
    make_set(workdir, "images", "predict", count=2)
    predict = ["predict", "--config", "exp.yaml", "--weights", WEIGHTS, "--data.predict", "images", "--explain", "true"]
    assert main(predict) == 0
    folder = workdir / "runs/exp/predict-1/images"
    names = {path.stem for path in folder.glob("*.png") if not path.stem.endswith("-explain")}
    assert len(names) == 2
    for name in names:
        explanation = json.loads((folder / f"{name}-explain.json").read_text())
        assert explanation["prompt"] == texts_of("3")[explanation["route"]]
        assert sum(explanation["scores"].values()) == pytest.approx(1)
        width = read_rgb(folder / f"{name}.png").shape[1]
        sheet = read_rgb(folder / f"{name}-explain.png")
        assert sheet.shape[1] > 5 * width
    assert main(["restore", str(workdir / "images"), "out", "--weights", WEIGHTS, "--explain", "--tile", "64"]) == 0
    for path in Path("out").rglob("*-explain.json"):
        image = Path(path.name.removesuffix("-explain.json"))
        assert json.loads(path.read_text()) == json.loads((folder / f"{image.stem}-explain.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.prompts", "[light rain, heavy rain]"], "prompts"),
        (["--model.similarity", "dot"], "similarity"),
        (["--model.clip", "other"], "CLIP other"),
    ],
)
def test_a_run_cannot_resume_with_other_routes(workdir, capsys, options, named):
    make_clip(workdir / "other", seed=3)
    assert main(["fit", "--config", "exp.yaml", "--ckpt_path", "last", *options]) == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_routes_of_patches_are_not_cached(workdir):
    files = workdir / "cache/routes"
    before = {path: path.read_text() for path in files.iterdir()}
    options = ["--model.route_by", "patch", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
    assert main(["fit", "--config", "exp.yaml", *options]) == 0
    assert {path: path.read_text() for path in files.iterdir()} == before
    module = catalog.load(workdir / "runs/exp/fit-2/weights.safetensors").module
    assert module.encode(torch.rand(1, 3, 9, 9)) == {}


def test_restore_by_a_given_route_needs_no_clip(workdir, capsys):
    make_set(workdir, "images", "predict", count=2)
    (workdir / "clip").rename(workdir / "moved")
    restore = ["restore", "images", "out", "--weights", WEIGHTS, "--explain"]
    assert main(restore) == 2
    assert capsys.readouterr().err.count("derain: error:") == 1
    assert main([*restore, "--route", "2"]) == 2
    assert "a route from 0 to 1" in capsys.readouterr().err
    assert main([*restore, "--route", "1"]) == 0
    files = sorted(Path("out").rglob("*-explain.json"))
    assert [json.loads(path.read_text()) for path in files] == [{"route": 1}] * 2
    files[0].with_name(files[0].name.removesuffix("-explain.json")).unlink()
    assert main([*restore, "--route", "0"]) == 0
    assert [json.loads(path.read_text()) for path in files] == [{"route": 0}, {"route": 1}]  # one image was missing
