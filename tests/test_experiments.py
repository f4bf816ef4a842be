"""Every experiment runs as its file says, on generated data of its layout."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from derain import PLNLINGANModule
from derain.cli import main
from derain.errors import DerainError
from derain.images import read_rgb, write_image
from derain.methods import PReNetModule, catalog
from tests.factories import make_clip, make_set
from tests.runs import metrics

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FILES = sorted(path for path in EXPERIMENTS.rglob("*.yaml") if path.parent.name != "sweeps")
SWEEPS = sorted(EXPERIMENTS.glob("sweeps/*.yaml"))
DATA = [path for path in FILES if "data" in yaml.safe_load(path.read_text()) and path.parent == EXPERIMENTS]
APPENDED = [path for path in FILES if path not in DATA]
TRANSFORMER = ["--model.dim", "8", "--model.blocks", "[1,1,1,1]", "--model.refinement", "1"]
UNET = ["--model.channels", "32", "--model.multipliers", "[1,2]", "--model.attention", "none", "--model.context", "8"]
GAN = ["--model.channels", "8", "--model.stages", "[1,1,1,1]", "--model.hierarchy", "1", "--model.heads", "2"]
GAN += ["--model.discriminator_channels", "8", "--model.discriminator_stages", "1"]
SMALL = {
    "PReNetModule": ["--model.stages", "1"],
    "RestormerModule": TRANSFORMER,
    "CLIPRPNModule": TRANSFORMER,
    "DACLIPModule": [],
    "DACLIPSDEModule": UNET,
    "PLNLINGANModule": GAN,
}
PLNLIN = sorted([*EXPERIMENTS.glob("ablations/plnlin-*.yaml"), *EXPERIMENTS.glob("ablations/mcddl-*.yaml")])


def small(*paths, clip):
    """Options that make what these files configure small enough for tests."""
    found = [yaml.safe_load(path.read_text()) for path in paths]
    method = [config["model"]["class_path"] for config in found if "model" in config][-1]
    options = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.precision", "32"]
    told = {name: value for config in found for name, value in config.get("model", {}).get("init_args", {}).items()}
    a_round = max(told.get("generator_steps", 5), told.get("discriminator_steps", 1))  # in which both networks step
    gan = method == "PLNLINGANModule"
    if any("schedule" in config.get("data", {}) for config in found):
        stages = [{"steps": 1, "crop": 16, "batch_size": 2}, {"steps": 1, "crop": 24, "batch_size": 1}]
        options += ["--data.schedule", json.dumps(stages)]
    options += ["--data.workers", "0", "--data.crop", "16", "--data.batch_size", "2"]
    options += ["--data.repeat", "8" if gan else "1", "--trainer.limit_train_batches", str(a_round if gan else 2)]
    options += ["--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps", "1"]
    return options + SMALL[method] + (["--model.clip", str(clip)] if "CLIP" in method else [])


def the_script(name):
    """A script of the experiments as a module."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


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
        *((name, split) for name in ("Rain200L", "Rain200H", "Rain1200", "Rain1400") for split in ("train", "test")),
        ("Rain12", "test"),
        ("Rain13K", "train"),
        *((name, "test") for name in ("Test100", "Test1200", "Test2800")),
    ):
        make_set(data, name, split, count=4, seed=len(name) * 10 + 1000 * (split == "train"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(data))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_data_sets(path, place, clip):
    config = ["--config", str(path), *small(path, clip=clip)]
    assert main(["fit", *config, "--trainer.max_epochs", "1"]) == 0
    run = place / "runs" / path.stem / "fit-1"
    if "PLNLIN" in path.read_text():
        header = (run / "metrics.csv").read_text().partition("\n")[0].split(",")
        assert {f"train/{one}_{k}" for one in ("generator", "discriminator") for k in "1234"} <= set(header)
    with_weights = [*config, "--weights", str(run / "weights.safetensors")]
    held_out = [] if path.stem == "quickstart" else ["--data.val", "null"]
    assert main(["validate", *with_weights, *held_out]) == 0
    assert main(["test", *with_weights]) == 0
    assert main(["predict", *with_weights, "--data.predict", str(next((place / "data").glob("Rain100L/rainy")))]) == 0
    assert len(list((place / "runs" / path.stem / "predict-1" / "images").iterdir())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("path", APPENDED, ids=lambda path: path.stem)
def test_appended_files(path, place, clip, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = EXPERIMENTS / "rain800.yaml"
    config = ["--config", str(first), "--config", str(path), *small(first, path, clip=clip)]
    assert main(["fit", *config, "--trainer.max_epochs", "1"]) == 0
    assert (place / "runs/rain800/fit-1/weights.safetensors").is_file()
    if path in PLNLIN:
        judged = metrics(place / "runs/rain800/fit-1", "train/discriminator_4")
        assert bool(judged) == (path.stem != "mcddl-none")
    if path.stem == "tensorboard":
        assert list(place.rglob("events.out.tfevents.*"))
    if path.stem == "wandb":
        assert list((place / "runs/rain800/fit-1").rglob("*.wandb"))


@pytest.mark.parametrize("path", PLNLIN, ids=lambda path: path.stem)
def test_ablations_tell_how_many_parameters_their_networks_have(path):
    options = yaml.safe_load(path.read_text())["model"]["init_args"]
    method = PLNLINGANModule(
        **{name: float(one) if name in {"alpha", "beta"} else one for name, one in options.items()}
    )
    networks = [network for network in (method.network, method.discriminator) if network is not None]
    built = [f"{sum(one.numel() for one in network.parameters()):,}" for network in networks]
    *_, told = re.findall(
        r"([\d,]+) parameters and ([\d,]+) of the discriminator", path.read_text()
    )  # the default's first
    assert list(told)[: len(built)] == built


EQUAL_IN_SIZE = [path for path in PLNLIN if re.search(r"Table [346]\b", path.read_text())]
"""Ablations whose networks the paper makes almost equal in parameters, by the number of channels."""


@pytest.mark.parametrize("path", EQUAL_IN_SIZE, ids=lambda path: path.stem)
def test_ablations_have_almost_as_many_parameters(path):
    method = PLNLINGANModule(**yaml.safe_load(path.read_text())["model"]["init_args"])
    changed = method.discriminator if "Table 6" in path.read_text() else method.network
    whole = 679_968 if "Table 6" in path.read_text() else 2_251_423
    assert sum(one.numel() for one in changed.parameters()) == pytest.approx(whole, rel=0.025)


def test_nine_ablations_are_equal_in_size():
    assert len(EQUAL_IN_SIZE) == 9


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_name_options_that_exist(path, place, clip):
    sweep = yaml.safe_load(path.read_text())
    command = [part for part in sweep["command"] if part not in {"${env}", "derain", "${args}"}]
    files = [EXPERIMENTS.parent / part for part in command if part.endswith(".yaml") and "loggers" not in part]
    arguments = ["fit", *(part for file in files for part in ("--config", str(file)))]
    arguments += [f"--{name}={choice['values'][0]}" for name, choice in sweep["parameters"].items()]
    one_step = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    assert main([*arguments, *small(*files, clip=clip), *one_step]) == 0


RECIPES = [path for path in DATA if path.stem != "quickstart"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_papers_train_on_all_pairs(path):
    assert yaml.safe_load(path.read_text())["data"]["val"] == "none"
    assert "data.val none" in path.read_text()


def test_restormers_recipe_is_its_authors():
    """Options/Deraining_Restormer.yml of the authors' code."""
    config = yaml.safe_load((EXPERIMENTS / "rain13k.yaml").read_text())
    stages = config["data"]["schedule"]
    assert [stage["steps"] for stage in stages] == [92_000, 64_000, 48_000, 36_000, 36_000, 24_000]
    assert [stage["crop"] for stage in stages] == [128, 160, 192, 256, 320, 384]
    assert [stage["batch_size"] * 8 for stage in stages] == [64, 40, 32, 16, 8, 8]
    assert sum(stage["steps"] for stage in stages) == config["trainer"]["max_steps"] == 300_000
    assert round(config["model"]["init_args"]["hold"] * 300_000) == 92_000
    assert config["model"]["init_args"]["mixup"] == 1.2  # mixing_augs: mixup_beta; use_identity: half of the batches
    assert config["trainer"]["gradient_clip_val"] == 0.01


def test_means_of_weights(tmp_path, capsys):
    script = the_script("mean_of_weights")
    modules = [PReNetModule("PRN_r", stages=1) for _ in range(2)]
    for name, module in zip("ab", modules, strict=True):
        module.save_weights(tmp_path / name)
    script.main(tmp_path / "a", tmp_path / "b", tmp_path / "mean", 0.7)
    mean = catalog.load(tmp_path / "mean").module.network.state_dict()
    for name, value in mean.items():
        one, other = (module.network.state_dict()[name] for module in modules)
        torch.testing.assert_close(value, 0.7 * one + 0.3 * other)
    PReNetModule("PRN", stages=1).save_weights(tmp_path / "c")
    for file, share, told in (("c", 0.5, "its network is not that of"), ("b", 1.5, "must be in")):
        with pytest.raises(DerainError, match=told):
            script.main(tmp_path / "a", tmp_path / file, tmp_path / "out", share)
    assert not (tmp_path / "out").exists()


def test_data_of_the_model_in_the_box_has_no_leak(tmp_path, monkeypatch, capsys):
    script = the_script("default_data")
    monkeypatch.setattr(script, "VALIDATE", 1)
    make_set(tmp_path / "data", "Rain800", "train", count=5, seed=1, size=(96, 128))
    make_set(tmp_path / "data", "Rain100L", "test", count=2, seed=1, size=(96, 128))  # of the same backgrounds
    dark = tmp_path / "data/Rain800/training/5.jpg"
    both = read_rgb(dark).copy()  # clean and rainy
    both[:, 128:] //= 2
    write_image(dark, both)
    script.main(tmp_path / "data", tmp_path / "box")
    assert "3 of 5 pairs, 1 of them to validate" in capsys.readouterr().out
    parts = {part: tmp_path / "box" / part / "rain800/target" for part in script.RAINS}
    names = {part: {file.stem for file in folder.iterdir()} for part, folder in parts.items()}
    assert len(names["train"]) == 2
    assert not names["train"] & names["val"]
    assert {file.stem for file in (tmp_path / "box/train/dark/input").iterdir()} == {dark.stem}
    light = tmp_path / "box/train/light"
    assert {file.stem for file in (light / "target").iterdir()} == names["train"]
    assert len(list((light / "input").iterdir())) == 4
    with pytest.raises(DerainError, match="exists already"):
        script.main(tmp_path / "data", tmp_path / "box")
