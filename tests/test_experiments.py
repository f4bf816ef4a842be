"""Every experiment is understood and built as its file says; every method trains and restores by a recipe."""

import argparse
import importlib.util
import inspect
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from PIL import Image

import derain
from derain import PLNLINGANModule
from derain.cli import main
from derain.errors import DerainError
from derain.images import write_image
from derain.methods import DerainModule, catalog
from tests.factories import make_clip, make_set

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FILES = sorted(path for path in EXPERIMENTS.rglob("*.yaml") if path.parent.name != "sweeps")
SWEEPS = sorted(EXPERIMENTS.glob("sweeps/*.yaml"))
DATA = [path for path in FILES if path.parent == EXPERIMENTS]
APPENDED = [path for path in FILES if path not in DATA]
"""Files that are given behind the file of a data set: methods, ablations, loggers."""
CONFIGS = {path: yaml.safe_load(path.read_text()) for path in FILES}
TRANSFORMER = ["--model.dim", "8", "--model.blocks", "[0,1,0,0]", "--model.refinement", "0"]
UNET = ["--model.channels", "32", "--model.multipliers", "[1,2]", "--model.attention", "none", "--model.context", "8"]
GAN = ["--model.channels", "8", "--model.stages", "[1,1,1,1]", "--model.hierarchy", "1", "--model.heads", "2"]
GAN += ["--model.discriminator_channels", "8", "--model.discriminator_stages", "1"]
SMALL = {
    "AirNetModule": ["--model.network_options", '{"channels": 4, "groups": 1, "blocks": 1}'],
    "PReNetModule": ["--model.stages", "1"],
    "RestormerModule": TRANSFORMER,
    "CLIPRPNModule": TRANSFORMER,
    "DACLIPSDEModule": UNET,
    "PLNLINGANModule": GAN,
}
"""Options that make methods small enough for tests; a method without an entry keeps its size."""
SETS = [
    ("RainTrainL", "train"),
    ("RainTrainH", "train"),
    ("Rain100L", "test"),
    ("Rain100H", "test"),
    *(
        (name, split)
        for name in (
            "Rain800",
            "Rain200L",
            "Rain200H",
            "Rain1200",
            "Rain1400",
            "SPA-Data",
            "RealRain-1k-L",
            "RealRain-1k-H",
        )
        for split in ("train", "test")
    ),
    ("Rain12", "test"),
    ("Rain13K", "train"),
    *((name, "test") for name in ("Test100", "Test1200", "Test2800")),
]
PLNLIN = sorted([*EXPERIMENTS.glob("ablations/plnlin-*.yaml"), *EXPERIMENTS.glob("ablations/mcddl-*.yaml")])


def method_of(*paths):
    """Return the method that files configure together: the last one wins."""
    return [CONFIGS[path]["model"]["class_path"] for path in paths if "model" in CONFIGS[path]][-1]


def arguments_of(*paths):
    """Return the hyper-parameters of the method that files configure together."""
    return {
        name: value for path in paths for name, value in CONFIGS[path].get("model", {}).get("init_args", {}).items()
    }


def network_of(*paths):
    """Return the name of what files configure together: the method, or the network of a ``RegressionModule``."""
    method = method_of(*paths)
    return arguments_of(*paths)["network"] if method == "RegressionModule" else method


TINY = {
    arguments_of(path)["network"]: arguments_of(path)["network_options"]
    for path in FILES
    if path.stem.endswith("-tiny") and "network" in arguments_of(path)
}
"""Options of small networks, by network."""
TINY["Restormer"] = {"dim": 8, "blocks": [0, 1, 0, 0], "refinement": 0, "bias": True, "bias_free_norm": True}


def small_options(*paths, clip):
    """Return options that make what these files configure small enough for tests."""
    method = method_of(*paths)
    options = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.precision", "32"]
    if any("schedule" in CONFIGS[path].get("data", {}) for path in paths):
        stages = [{"steps": 1, "crop": 16, "batch_size": 2}, {"steps": 1, "crop": 24, "batch_size": 1}]
        options += ["--data.schedule", json.dumps(stages)]
    options += ["--data.workers", "0", "--data.crop", "16", "--data.batch_size", "2"]
    if getattr(derain.methods, method).needs_unlabelled:
        options += ["--data.unlabelled", "Rain100L"]
    options += SMALL.get(method, [])
    if "network" in arguments_of(*paths):
        options += ["--model.network_options", json.dumps(TINY[network_of(*paths)])]
    clip_option = inspect.signature(getattr(derain.methods, method)).parameters.get("clip")
    if clip_option is not None and isinstance(clip_option.default, str):  # a number clips gradients
        options += ["--model.clip", str(clip)]
    return options


class Built(Exception):
    """Raised instead of training, when model, data and trainer are built."""


@pytest.fixture
def build(data_root, monkeypatch):
    """Build what ``derain fit`` with some options would train, and return the command with model, data and trainer."""

    def stop(cli):
        raise Built(cli)

    monkeypatch.setattr(LightningCLI, "before_fit", stop, raising=False)

    def build(*arguments):
        with pytest.raises(Built) as built:
            main(["fit", *arguments])
        return built.value.args[0]

    return build


def load_script(name):
    """Return a script of the experiments as a module."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All data sets of the experiments, small."""
    root = tmp_path_factory.mktemp("data")
    for name, split in SETS:
        make_set(root, name, split, count=4, seed=len(name) * 10 + 1000 * (split == "train"))
    return root


@pytest.fixture
def data_root(data, tmp_path, monkeypatch):
    """Run in an empty folder, with all data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(data))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return data


def assert_restores(model):
    """Check that a method restores an image; modules that restore none have no such check."""
    if isinstance(model, DerainModule):
        with torch.no_grad():
            assert model.eval()(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)


def repeated_keys(node):
    """Return the keys that occur twice in a mapping of a YAML document; the loader would ignore the first."""
    repeated = []
    for child in getattr(node, "value", ()):
        for part in child if isinstance(child, tuple) else (child,):
            repeated += repeated_keys(part) if isinstance(part, yaml.Node) else []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        repeated += [key for key in set(keys) if keys.count(key) > 1]
    return repeated


@pytest.mark.parametrize("path", [*FILES, *SWEEPS], ids=lambda path: path.stem)
def test_keys_are_not_repeated(path):
    assert repeated_keys(yaml.compose(path.read_text())) == []


def test_repeated_keys_are_found():
    assert repeated_keys(yaml.compose("model: text\nmodel: {dim: 1, list: [{a: 1, a: 2}]}")) == ["a", "model"]


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_data_sets_are_loaded(path, build, clip):
    cli = build("--config", str(path), *small_options(path, clip=clip))
    assert_restores(cli.model)
    cli.datamodule.setup("fit")
    batch = next(iter(cli.datamodule.train_dataloader()))
    assert batch["rainy"].shape == batch["clean"].shape == (2, 3, 16, 16)
    cli.datamodule.setup("test")
    names = CONFIGS[path]["data"]["test"]
    assert len(cli.datamodule.pairs["test"]) >= (4 * len(names) if isinstance(names, list) else 2)


@pytest.mark.parametrize("path", APPENDED, ids=lambda path: path.stem)
def test_appended_files_are_built(path, build, clip):
    first = EXPERIMENTS / "rain800.yaml"
    cli = build("--config", str(first), "--config", str(path), *small_options(first, path, clip=clip))
    assert type(cli.model).__name__ == method_of(first, path)
    given = CONFIGS[path].get("model", {}).get("init_args", {})
    overridden = {option.removeprefix("--model.") for option in SMALL.get(method_of(first, path), [])[::2]}
    overridden.add("network_options")
    for name in given.keys() - overridden:
        expected = given[name] if isinstance(given[name], dict) else pytest.approx(given[name])
        assert cli.model.hparams[name] == expected, name
    assert_restores(cli.model)
    if path in PLNLIN:
        assert (cli.model.discriminator is None) == (path.stem == "mcddl-none")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_name_options_that_exist(path, build, clip):
    sweep = yaml.safe_load(path.read_text())
    files = [EXPERIMENTS.parent / part for part in sweep["command"] if part.endswith(".yaml") and "loggers" not in part]
    arguments = [part for file in files for part in ("--config", str(file))]
    chosen = {name: choice["values"][-1] for name, choice in sweep["parameters"].items()}
    arguments += [f"--{name}={value}" for name, value in chosen.items()]
    cli = build(*arguments, *small_options(*files, clip=clip))
    for name, value in chosen.items():
        assert cli.model.hparams[name.removeprefix("model.init_args.")] == pytest.approx(value)


def one_recipe_each():
    """Return files for every method that the experiments have: a data set's own method, or with one appended."""
    recipes = {}
    for path in DATA:
        recipes.setdefault(network_of(path), [path])
    for path in sorted(APPENDED, key=lambda path: "-tiny" not in path.stem):  # whose losses fit small networks
        recipes.setdefault(network_of(EXPERIMENTS / "rain800.yaml", path), [EXPERIMENTS / "rain800.yaml", path])
    return recipes


def options_of(paths, clip):
    """Return the options of a command that reads experiment files, with a small network."""
    return [*(option for path in paths for option in ("--config", str(path))), *small_options(*paths, clip=clip)]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "paths"), one_recipe_each().items(), ids=one_recipe_each())
def test_networks_train_and_restore_by_a_recipe(network, paths, data_root, clip, tmp_path):
    settings = arguments_of(*paths)
    updates = max(settings.get("generator_steps", 5), settings.get("discriminator_steps", 1))
    adversarial = network == "PLNLINGANModule"  # both networks are updated within so many batches
    config = options_of(paths, clip)
    config += ["--data.repeat", "8" if adversarial else "1", "--trainer.log_every_n_steps", "1"]
    config += ["--trainer.limit_train_batches", str(updates if adversarial else 2)]
    one_epoch = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]
    assert main(["fit", *config, *one_epoch]) == 0
    run = tmp_path / "runs" / paths[0].stem / "fit-1"
    if adversarial:
        header = (run / "metrics.csv").read_text().partition("\n")[0].split(",")
        losses = {f"train/{network}_{k}" for network in ("generator", "discriminator") for k in "1234"}
        assert losses <= set(header)
    assert_restores(catalog.load(run / "weights.safetensors").module)


def one_recipe_of_each_method():
    """Return files for every method, with a small data set; networks of a ``RegressionModule`` are evaluated alike."""
    recipes = {}
    for path in sorted(APPENDED, key=lambda path: "-tiny" not in path.stem):
        recipes.setdefault(method_of(EXPERIMENTS / "rain800.yaml", path), [EXPERIMENTS / "rain800.yaml", path])
    return recipes


@pytest.mark.slow
@pytest.mark.parametrize(("method", "paths"), one_recipe_of_each_method().items(), ids=one_recipe_of_each_method())
def test_methods_are_evaluated_by_a_recipe(method, paths, data_root, build, clip, tmp_path):
    config = options_of(paths, clip)
    build(*config).model.save_weights(tmp_path / "w.safetensors")
    with_weights = [*config, "--weights", str(tmp_path / "w.safetensors")]
    assert main(["validate", *with_weights, "--data.val", "null"]) == 0
    if method == "DACLIPModule":  # restores no images
        return
    assert main(["test", *with_weights]) == 0
    assert main(["predict", *with_weights, "--data.predict", str(next(data_root.glob("Rain100L/rainy")))]) == 0
    assert len(list((tmp_path / "runs" / paths[0].stem / "predict-1/images").iterdir())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_loggers_write_into_the_run(logger, data_root, tmp_path, monkeypatch):
    pytest.importorskip(logger)
    monkeypatch.setenv("WANDB_MODE", "offline")
    paths = [EXPERIMENTS / "rain800.yaml", EXPERIMENTS / "methods/prenet.yaml", EXPERIMENTS / f"loggers/{logger}.yaml"]
    config = [option for path in paths for option in ("--config", str(path))]
    config += [*small_options(*paths, clip=None), "--data.repeat", "1"]
    assert main(["fit", *config, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]) == 0
    pattern = {"tensorboard": "events.out.tfevents.*", "wandb": "*.wandb"}[logger]
    assert list((tmp_path / "runs/rain800/fit-1").rglob(pattern))


@pytest.mark.parametrize("path", PLNLIN, ids=lambda path: path.stem)
def test_ablations_state_how_many_parameters_their_networks_have(path):
    options = CONFIGS[path]["model"]["init_args"]
    floats = {"alpha", "beta"}
    with torch.device("meta"):
        method = PLNLINGANModule(**{name: float(v) if name in floats else v for name, v in options.items()})
    networks = [network for network in (method.network, method.discriminator) if network is not None]
    counts = [f"{sum(parameter.numel() for parameter in network.parameters()):,}" for network in networks]
    *_, stated = re.findall(r"([\d,]+) parameters and ([\d,]+) of the discriminator", path.read_text())
    assert list(stated)[: len(counts)] == counts  # the whole method's are stated first


EQUAL_IN_SIZE = [path for path in PLNLIN if re.search(r"Table [346]\b", path.read_text())]
"""Ablations whose networks the paper makes almost equal in parameters, by the number of channels."""


@pytest.mark.parametrize("path", EQUAL_IN_SIZE, ids=lambda path: path.stem)
def test_ablations_have_almost_as_many_parameters(path):
    with torch.device("meta"):
        method = PLNLINGANModule(**CONFIGS[path]["model"]["init_args"])
    changed = method.discriminator if "Table 6" in path.read_text() else method.network
    whole = 679_968 if "Table 6" in path.read_text() else 2_251_423
    assert sum(parameter.numel() for parameter in changed.parameters()) == pytest.approx(whole, rel=0.025)


def test_nine_ablations_are_equal_in_size():
    assert len(EQUAL_IN_SIZE) == 9


RECIPES = [path for path in DATA if path.stem not in {"quickstart", "everything"}]


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


@pytest.mark.slow
def test_a_bundled_model_is_trained_and_resumed(tmp_path, monkeypatch):
    """Backgrounds of test sets are skipped; a resumed training equals an uninterrupted one."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    script = load_script("default_model")
    monkeypatch.setattr(script, "MAX_VALIDATION", 1)
    make_set(tmp_path / "data", "Rain800", "train", count=5, seed=1, size=(96, 128))
    make_set(tmp_path / "data", "Rain100L", "test", count=2, seed=1, size=(96, 128))  # of the same backgrounds
    streaks = np.random.default_rng(0).integers(256, size=(60, 80), dtype=np.uint8)
    for name in ("1-1", "1-2"):
        write_image(tmp_path / f"data/Streaks/{name}.png", np.repeat(streaks[..., None], 3, 2))
    training, validation = script.read_photos(tmp_path / "data")
    assert (len(training), len(validation)) == (2, 1)

    def train(out, **changes):
        options = {"width": 4, "blocks": [1], "middle": 1, "steps": 3, "rate": 1e-3, "without": "drawn"}
        options |= {"weights": None, "bf16": False, "without_rain": 0.2, "refinement": 0} | changes
        script.main(argparse.Namespace(data=tmp_path / "data", out=tmp_path / out, **options))
        module = catalog.load(tmp_path / out / "weights.safetensors").module
        assert module.trained_on == script.TRAINED_ON
        return module.network.state_dict()

    monkeypatch.setattr(script, "SAVE_SECONDS", 0)
    whole = train("whole")
    kept = script.Crops.batch

    def interrupted(crops, step, count, side):
        if step == 2:
            raise KeyboardInterrupt
        return kept(crops, step, count, side)

    monkeypatch.setattr(script.Crops, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("resumed")
    monkeypatch.setattr(script.Crops, "batch", kept)
    resumed = train("resumed")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)

    start = tmp_path / "whole/weights.safetensors"
    continued = train("continued", weights=start, steps=1, rate=1e-9, width=8, refinement=1)
    assert any(name.startswith("refinement.") for name in continued)
    for name, value in whole.items():
        torch.testing.assert_close(continued[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["measured", "noise", "drawn", "fine", "hard"])
def test_rain_of_the_bundled_model(kind, tmp_path, monkeypatch):
    """Rain brightens dark crops, stays in [0, 1], and is determined by the generator."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    script = load_script("default_rain")
    file = tmp_path / "1-1.png"
    write_image(file, np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8))
    rain = script.RainPairs([file], {kind: 1.0})
    clean = np.full((48, 48, 3), 0.2, np.float32)
    for seed in range(8):
        rainy, again = (rain.add_rain(clean, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(rainy, again)
        assert 0 <= rainy.min() <= rainy.max() <= 1
        assert rainy.mean() > clean.mean()
    reduced = rain.pair(clean, np.random.default_rng(0), side=24)
    assert [crop.shape for crop in reduced] == [(24, 24, 3), (24, 24, 3)]
    pairs = [rain.pair(clean, np.random.default_rng(seed), side=48) for seed in range(60)]
    unchanged = sum(np.array_equal(rainy, target) for rainy, target in pairs)
    assert 2 <= unchanged <= 16  # a tenth of the crops stays without rain


def test_measured_streaks_that_are_missing_or_damaged(tmp_path):
    script = load_script("default_rain")
    with pytest.raises(DerainError, match="Streaks"):
        script.RainPairs([], {"noise": 1.0})
    (tmp_path / "1-1.png").write_bytes(b"damaged")
    with pytest.raises(DerainError, match=r"1-1\.png"):
        script.RainPairs([tmp_path / "1-1.png"], {"measured": 1.0})


def test_lines_are_as_long_as_asked():
    """A vertical line of 9 pixels covers 9 rows at its full brightness."""
    script = load_script("default_rain")
    kernel = script.line(9, 0, 0.5)
    column = kernel[:, kernel.shape[1] // 2]
    assert column.sum() == pytest.approx(10, abs=1)
    assert kernel.argmax() % kernel.shape[1] == kernel.shape[1] // 2
    diagonal = script.line(9, 45, 0.5)
    rows, columns = np.nonzero(diagonal > 0.5)
    assert np.corrcoef(rows, columns)[0, 1] > 0.95  # down and to the right, as rain of a positive angle


def test_rain_at_night_has_the_light_of_the_lamps(monkeypatch, tmp_path):
    """Where a lamp is bright, streaks add more light; crops at night are darkened, with their targets."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    script = load_script("default_rain")
    file = tmp_path / "1-1.png"
    write_image(file, np.full((60, 80, 3), 255, np.uint8))
    lamps = np.full((48, 48, 3), 0.1, np.float32)
    lamps[:, 24:] = 0.9
    rain = script.RainPairs([file], {"measured": 1.0})
    added = np.mean([rain.add_rain(lamps * 0, np.random.default_rng(seed), lamps=lamps) for seed in range(20)], axis=0)
    assert added[:, 24:].mean() > 2 * added[:, :24].mean() > 0
    for seed in range(20):
        light = script.lamplight((30, 40), np.random.default_rng(seed))
        assert light.shape == (30, 40, 3)
        assert light.min() > 0.05
    monkeypatch.setattr(script, "AT_NIGHT", 1.0)
    grey = np.full((48, 48, 3), 0.5, np.float32)
    pairs = [rain.pair(grey, np.random.default_rng(seed), side=48) for seed in range(30)]
    assert np.mean([target.mean() for _, target in pairs]) < 0.4
    assert np.mean([rainy.mean() for rainy, _ in pairs]) > np.mean([target.mean() for _, target in pairs])


def test_tones_change_both_crops_alike():
    script = load_script("default_rain")
    clean = np.random.default_rng(0).random((8, 8, 3), np.float32)
    rainy = clean.copy()
    rainy[:4] = 1  # rain changes the mean of one crop only
    grey = 0
    for seed in range(60):
        first, second = script.change_tone([rainy, clean], np.random.default_rng(seed))
        assert np.array_equal(first[4:], second[4:])
        assert not np.array_equal(first[:4], second[:4])
        assert not np.array_equal(second, clean)
        grey += int(np.ptp(second, axis=2).max() < 1e-6)
    assert 1 <= grey <= 20


def test_jpeg_keeps_red_and_blue_apart():
    """Pillow's JPEG of the same quality has the same colours: red is not treated as blue."""
    script = load_script("default_rain")
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, ::3] = (255, 40, 0)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=40)
    expected = np.asarray(Image.open(stream)).astype(float)
    found = script.compress(image, 40, 0, 0).astype(float)
    assert np.abs(found - expected).mean() < 4
    swapped = script.compress(image[..., ::-1].copy(), 40, 0, 0)[..., ::-1].astype(float)
    assert np.abs(swapped - expected).mean() > 8
