"""Options of Lightning's Trainer and its callbacks: each works, or is refused in one line."""

import functools
import json
import logging
import os
import shlex
import signal
import time

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from derain.cli import main
from derain.files.weights import read
from derain.methods import DerainModule, PReNetModule
from tests.factories import make_set
from tests.runs import finish, last, rows, start

CONFIG = {
    "model": {"class_path": "PReNetModule", "init_args": {"variant": "PRN_r", "stages": 1}},
    "data": {"train": "Rain800", "test": "Rain800", "predict": "Rain800"},
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "limit_train_batches": 2},
}
CONFIG["data"] |= {"crop": 16, "batch_size": 4, "workers": 0}
GAN = {"channels": 4, "stages": [1, 1, 1, 1], "hierarchy": 1, "heads": 1}
GAN |= {"discriminator_channels": 4, "discriminator_stages": 1}
BF16 = {**CONFIG, "trainer": {**CONFIG["trainer"], "precision": "bf16-mixed"}}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with data, weights, and configurations of PReNet and PLNLIN-MCDDL."""
    make_set(tmp_path / "data", "Rain800", "train", count=9, size=(64, 64))
    for split, seed in (("test", 50), ("predict", 70)):
        make_set(tmp_path / "data", "Rain800", split, count=5, seed=seed)
    gan = {"class_path": "PLNLINGANModule", "init_args": GAN}
    data = CONFIG["data"] | {"crop": 56, "batch_size": 1}
    for name, config in (("exp", CONFIG), ("bf16", BF16), ("gan", CONFIG | {"model": gan, "data": data})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    PReNetModule(stages=1).save_weights(tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    for name in ("LOCAL_RANK", "DERAIN_RUN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def fit(*options, config="exp.yaml"):
    return main(["fit", "--config", config, *options])


def with_callbacks(place, *callbacks, config="exp"):
    """A configuration with callbacks, each a name and its arguments."""
    content = yaml.safe_load((place / f"{config}.yaml").read_text())
    content["trainer"]["callbacks"] = [{"class_path": name, "init_args": given} for name, given in callbacks]
    (place / "callbacks.yaml").write_text(yaml.safe_dump(content))
    return "callbacks.yaml"


def trained_with(place, *callbacks, options=(), config="exp"):
    """Files of checkpoints of a training with callbacks."""
    assert fit(*options, config=with_callbacks(place, *callbacks, config=config)) == 0
    return {file.name for file in (place / "runs/callbacks/fit-1/checkpoints").iterdir()}


def refusal(capsys):
    """The one line of an error."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("derain: error: ")]
    assert errors == lines[-1:]
    return errors[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--trainer.precision", "bf16-true"], ["precision", "bf16-true", "bf16-mixed"]),
        (["--trainer.precision", "64"], ["precision", "64-true"]),
        (["--trainer.precision", "transformer-engine"], ["--trainer"]),
        (["--trainer.accelerator", "tpu"], ["--trainer"]),
        (["--trainer.overfit_batches", "1"], ["overfit_batches 1", "--data.train"]),
        (["--trainer.overfit_batches", "0.5"], ["overfit_batches 0.5"]),
        (["--trainer.barebones", "true"], ["barebones"]),
        (["--trainer.accumulate_grad_batches", "0"], ["accumulate_grad_batches 0"]),
        (["--trainer.check_val_every_n_epoch", "0"], ["check_val_every_n_epoch 0"]),
        (["--trainer.use_distributed_sampler", "true"], ["use_distributed_sampler"]),
        (["--trainer.val_check_interval", "100"], ["val_check_interval"]),
        (["--trainer.limit_train_batches", "0.01"], ["limit_train_batches"]),
        (["--seed_everything", "false"], ["--seed_everything false"]),
        (["--seed_everything", "true"], ["--seed_everything true"]),
        (["--seed_everything", "-1"], ["--seed_everything -1"]),
        (["--seed_everything", str(2**32)], ["--seed_everything 4294967296"]),
        (["--optimizer", "Adam"], ["--optimizer", "--model.learning_rate"]),
        (["--optimizer.lr", "0.1"], ["--optimizer.lr", "--model.learning_rate"]),
        (["--lr_scheduler", "StepLR"], ["--lr_scheduler", "--model.milestones"]),
        (["--weights_only", "false"], ["--weights_only false"]),
        (["--trainer.logger", "MLFlowLogger"], ["mlflow"]),
        (["--trainer.gradient_clip_val", "-1"], ["--trainer.gradient_clip_val -1"]),
        (["--trainer.gradient_clip_val", ".nan"], ["--trainer.gradient_clip_val nan"]),
        (["--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"], ["--trainer.strategy ddp_spawn"]),
        (["--trainer.strategy", "ddp_fork", "--trainer.devices", "2"], ["--trainer.strategy ddp_fork"]),
        (["--trainer.plugins", "AsyncCheckpointIO"], ["--trainer.plugins AsyncCheckpointIO"]),
        (["--data.workers", "-1"], ["--data.workers -1"]),
        (["--model.learning_rate", "0"], ["--model.learning_rate 0"]),
        (["--model.learning_rate", "-1"], ["--model.learning_rate -1"]),
        (["--model.learning_rate", ".nan"], ["--model.learning_rate nan"]),
        (["--model.decay", ".nan"], ["--model.decay nan"]),
        (["--model.decay", "-1"], ["--model.decay -1"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_options_that_cannot_work_are_refused(place, capsys, options, named):
    assert fit(*options) == 2
    error = refusal(capsys)
    for part in named:
        assert part in error


@pytest.mark.parametrize(
    ("name", "given", "config"),
    [
        ("ModelCheckpoint", {"monitor": "nope"}, "exp"),
        ("EarlyStopping", {"monitor": "nope"}, "exp"),
        ("EarlyStopping", {"monitor": "val/psnr", "mode": "nope"}, "exp"),
        ("Timer", {"duration": "nonsense"}, "exp"),
        ("StochasticWeightAveraging", {"swa_lrs": 1e-3}, "exp"),
        ("EMAWeightAveraging", {}, "exp"),
        ("WeightAveraging", {}, "gan"),
        ("ModelPruning", {"pruning_fn": "l1_unstructured"}, "exp"),
        ("BackboneFinetuning", {}, "exp"),
        ("LearningRateFinder", {"num_training_steps": 10}, "gan"),
        ("GradientAccumulationScheduler", {"scheduling": {0: 2}}, "gan"),
    ],
)
def test_callbacks_that_cannot_work_are_refused(place, capsys, name, given, config):
    assert fit(config=with_callbacks(place, (name, given), config=config)) == 2
    assert "--trainer" in refusal(capsys)


def test_a_fault_in_training_is_not_taken_for_a_refusal(place, monkeypatch):
    def fault(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(PReNetModule, "training_step", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        fit()


@pytest.mark.parametrize(
    "given",
    [
        {"monitor": "val/psnr", "mode": "max"},
        {},
        {"monitor": "val/psnr", "mode": "max", "save_top_k": 3, "save_last": True},
        {"every_n_epochs": 1, "save_top_k": -1},
    ],
)
def test_a_second_checkpoint_callback_saves_beside_ours(place, given):
    assert {"best.ckpt", "last.ckpt", "epoch=0-step=2.ckpt"} <= trained_with(place, ("ModelCheckpoint", given))


@pytest.mark.parametrize("config", ["exp", "gan"])
def test_checkpoints_by_time_and_by_steps_with_either_way_of_optimisation(place, config, recwarn):
    by_time = ("ModelCheckpoint", {"train_time_interval": "00:00:00", "save_top_k": -1, "filename": "time-{step}"})
    by_steps = ("ModelCheckpoint", {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"})
    saved = trained_with(place, by_time, by_steps, config=config)
    assert {"time-step=1.ckpt", "time-step=2.ckpt", "step=1.ckpt", "step=2.ckpt"} <= saved
    assert not [warning for warning in recwarn if "manual optimization" in str(warning.message)]


class OwnCheckpoint(ModelCheckpoint):
    """A user's class, whose hook sees the method itself."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert pl_module.network is not None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


@pytest.mark.parametrize("config", ["exp", "gan"])
def test_a_users_checkpoint_class_saves_by_time_with_either_way_of_optimisation(place, config):
    given = {"train_time_interval": "00:00:00", "save_top_k": -1, "filename": "own-{step}"}
    saved = trained_with(place, (f"{__name__}.OwnCheckpoint", given), config=config)
    assert {"own-step=1.ckpt", "own-step=2.ckpt"} <= saved


@pytest.mark.parametrize("given", [{}, {"interval": "step"}])
def test_a_timer_stops_a_training(place, given):
    timer = ("Timer", {"duration": "00:00:00:01", "verbose": False, **given})
    trained_with(place, timer, options=("--trainer.max_epochs", "2000"))
    assert last(place / "runs/callbacks/fit-1")["epoch"] < 1999
    config = yaml.safe_load((place / "runs/callbacks/fit-1/config.yaml").read_text())
    assert config["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_another_progress_bar_stands_for_ours(place, bar):
    config = with_callbacks(place, (bar, {}))
    assert fit("--trainer.enable_progress_bar", "true", config=config) == 0


def test_learning_rates_of_generator_and_discriminator_have_their_names(place):
    assert fit(config="gan.yaml") == 0
    logged = {key for row in rows(place / "runs/gan/fit-1/metrics.csv") for key, value in row.items() if value}
    assert {name for name in logged if name.startswith("lr")} == {"lr-generator", "lr-discriminator"}


def test_a_logger_of_the_users_writes_where_they_say(place):
    assert fit("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "mine") == 0
    assert list((place / "mine").rglob("events.*"))
    assert fit("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", ".") == 0
    assert list((place / "runs/exp/fit-2").rglob("events.*"))


def test_the_configuration_of_a_run_repeats_it_beside_that_run(place):
    assert fit() == 0
    saved = "runs/exp/fit-1/config.yaml"
    assert fit(config=saved) == 0
    old = yaml.safe_load((place / saved).read_text())
    old["trainer"]["default_root_dir"] = "runs/exp/fit-1"  # as earlier versions wrote it
    (place / "old.yaml").write_text(yaml.safe_dump(old))
    assert fit(config="old.yaml") == 0
    assert main(["test", "--config", saved, "--weights", "w.safetensors"]) == 0
    assert {path.name for path in (place / "runs/exp").iterdir()} == {"fit-1", "fit-2", "fit-3", "test-1"}
    assert {path.name for path in (place / "runs").iterdir()} == {"exp"}


def test_a_resumed_run_keeps_a_configuration_that_starts_anew(place):
    assert fit() == 0
    assert fit("--ckpt_path", "last", "--trainer.max_epochs", "2", config="runs/exp/fit-1/config.yaml") == 0
    assert yaml.safe_load((place / "runs/exp/fit-1/config.yaml").read_text())["ckpt_path"] is None
    assert [path.name for path in (place / "runs/exp").iterdir()] == ["fit-1"]


def test_configurations_are_given_as_to_any_lightning_cli(place, capsys):
    (place / "all.yaml").write_text(yaml.safe_dump({"fit": CONFIG, "test": {"data": CONFIG["data"]}}))
    assert main(["--config", "exp.yaml", "fit"]) == 0
    assert main(["-c", "all.yaml", "fit", "--trainer.max_epochs=1"]) == 0
    assert main(["--config=all.yaml", "test", "--weights", "w.safetensors", "--trainer.accelerator=cpu"]) == 0
    saved = yaml.safe_load((place / "runs/all/fit-1/config.yaml").read_text())
    assert saved["model"]["init_args"]["variant"] == "PRN_r"
    assert {path.name for path in (place / "runs").iterdir()} == {"exp", "all"}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["validate", "--config", "all.yaml", "--weights", "w.safetensors"], ["all.yaml", "fit, test", "validate"]),
        (["fit", "--config", "mixed.yaml"], ["mixed.yaml", "data", "fit"]),
        (["--config", "all.yaml"], ["--config all.yaml", "no command"]),
        (["--config"], ["no command"]),
    ],
)
def test_sections_that_do_not_fit_are_refused(place, capsys, line, named):
    (place / "all.yaml").write_text(yaml.safe_dump({"fit": CONFIG, "test": CONFIG}))
    (place / "mixed.yaml").write_text(yaml.safe_dump({"fit": CONFIG, "data": {}}))
    assert main(line) == 2
    error = refusal(capsys)
    for part in named:
        assert part in error


def test_a_group_of_options_in_a_file_of_its_own_is_no_section(place):
    (place / "data.yaml").write_text(yaml.safe_dump(CONFIG["data"]))  # with the keys test and predict
    (place / "rest.yaml").write_text(yaml.safe_dump({k: v for k, v in CONFIG.items() if k != "data"}))
    assert fit("--data", "data.yaml", config="rest.yaml") == 0


def test_what_lightning_says_about_callbacks_is_shown_and_nothing_else(place):
    limits = {"monitor": "val/psnr", "mode": "max", "min_delta": 100, "patience": 1}
    stopping = ("EarlyStopping", limits | {"verbose": True})
    config = with_callbacks(place, stopping, ("BatchSizeFinder", {"max_trials": 1, "steps_per_trial": 1}))
    shown = finish("fit", "--config", config, "--trainer.max_epochs", "5")
    assert "did not improve" in shown
    assert "EarlyStopping: stopped" in shown
    assert "Finished batch size finder" in shown
    for chatter in ("GPU available", "Seed set to", "max_epochs"):
        assert chatter not in shown


# Evaluation.


def summary(place, name="exp/test-1"):
    return json.loads((place / f"runs/{name}/summary.json").read_text())


def test_evaluation_is_in_float32_unless_asked(place, caplog):
    caplog.set_level(logging.INFO, "derain")
    line = ["test", "--config", "bf16.yaml", "--weights", "w.safetensors"]
    assert main(line) == 0
    assert "bf16-mixed" in caplog.text
    assert main([*line, "--trainer.precision", "bf16-mixed"]) == 0
    assert main([*line[:2], "exp.yaml", *line[3:]]) == 0
    found = [summary(place, name) for name in ("bf16/test-1", "bf16/test-2", "exp/test-1")]
    assert [one["hardware"]["precision"] for one in found] == ["32-true", "bf16-mixed", "32-true"]
    assert found[0]["results"] == found[2]["results"] != found[1]["results"]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_weights_and_checkpoints_bring_their_method(place, command):
    assert fit() == 0
    data = {"validate": "--data.train", "test": "--data.test", "predict": "--data.predict"}[command]
    for file in (["--weights", "w.safetensors"], ["--ckpt_path", "runs/exp/fit-1/checkpoints/best.ckpt"]):
        assert main([command, *file, data, "Rain800", "--trainer.accelerator", "cpu"]) == 0
    if command == "test":
        found = [summary(place, f"derain/test-{n}")["method"]["hyper_parameters"]["variant"] for n in (1, 2)]
        assert found == ["PReNet", "PRN_r"]


def test_the_method_of_weights_is_the_only_one_that_is_built(place, monkeypatch):
    config = {**CONFIG, "model": {"class_path": "PReNetModule", "init_args": {"variant": "PRN_r", "stages": 4}}}
    (place / "other.yaml").write_text(yaml.safe_dump(config))
    built, original = [], PReNetModule.__init__

    @functools.wraps(original)
    def build(self, **given):
        built.append(given)
        original(self, **given)

    monkeypatch.setattr(PReNetModule, "__init__", build)
    assert main(["test", "--config", "other.yaml", "--weights", "w.safetensors"]) == 0
    assert [one["stages"] for one in built] == [1]


@pytest.mark.parametrize(
    ("limit", "images"),
    [
        (["--trainer.limit_test_batches", "3"], 3),
        (["--trainer.limit_test_batches", "0.4"], 2),
        (["--trainer.fast_dev_run", "true"], 1),
        ([], 5),
    ],
)
def test_results_are_those_of_what_was_evaluated(place, capsys, limit, images):
    assert main(["test", "--config", "exp.yaml", "--weights", "w.safetensors", *limit]) == 0
    title = capsys.readouterr().out
    assert f"{images} of 5 images (partial)" in title or (images == 5 and "5 images" in title)
    assert ("partial" in title) == (images < 5)
    data = summary(place)["data"]
    assert (data["images"], data["images_in_sets"]) == (images, 5)
    assert summary(place)["results"][0]["count"] == images
    assert len(rows(place / "runs/exp/test-1/images.csv")) == images
    make_set(place / "part", "Rain800", "test", count=images, seed=50)
    alone = ["--data.root", str(place / "part"), "--trainer.default_root_dir", "alone"]
    assert main(["test", "--config", "exp.yaml", "--weights", "w.safetensors", *alone]) == 0
    assert json.loads((place / "alone/test-1/summary.json").read_text())["data"]["fingerprint"] == data["fingerprint"]


def test_no_image_is_no_result(place, capsys):
    line = ["test", "--config", "exp.yaml", "--weights", "w.safetensors", "--trainer.limit_test_batches", "0"]
    assert main(line) == 2
    assert "limit_test_batches 0" in refusal(capsys)


@pytest.mark.parametrize(
    ("command", "options", "partial"),
    [
        ("validate", ["--data.val", "Rain800", "--trainer.limit_val_batches", "3"], "3 of 5 images (partial)"),
        ("validate", ["--data.val", "Rain800", "--data.val_limit", "2"], "2 of 5 images (partial)"),
        ("validate", ["--data.val", "Rain800"], None),
        ("predict", ["--trainer.limit_predict_batches", "2"], "2 of 5 images (partial)"),
        ("predict", ["--trainer.limit_predict_batches", "9"], None),
        ("fit", ["--data.val", "Rain800", "--data.val_limit", "2"], "2 of 5 images (partial)"),
    ],
)
def test_a_part_of_the_images_is_reported_as_one(place, caplog, command, options, partial):
    caplog.set_level(logging.INFO, "derain")
    weighted = [] if command == "fit" else ["--weights", "w.safetensors"]
    assert main([command, "--config", "exp.yaml", *weighted, *options]) == 0
    assert partial in caplog.text if partial else "partial" not in caplog.text


# The best weights.


@pytest.fixture
def scores(monkeypatch):
    """Validation scores of the epochs, whatever the network does: the second one is the best."""
    given = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(DerainModule, "on_validation_epoch_end", lambda self: self.log("val/psnr", next(given)))


@pytest.mark.parametrize(
    "second", [None, {"monitor": "train/loss", "mode": "max"}, {"monitor": "val/psnr", "mode": "min"}]
)
def test_the_best_epoch_is_kept_and_handed_on(place, scores, second):
    callbacks = [("ModelCheckpoint", {**second, "filename": "other"})] if second else []
    config = with_callbacks(place, *callbacks)
    assert fit("--trainer.max_epochs", "3", "--trainer.num_sanity_val_steps", "0", config=config) == 0
    run = place / "runs/callbacks/fit-1"
    best, last = (torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (1, 2)
    final = read(run / "weights.safetensors").state
    for name, value in final.items():
        assert torch.equal(value, best["state_dict"][f"network.{name}"])
    assert any(not torch.equal(value, last["state_dict"][f"network.{name}"]) for name, value in final.items())


@pytest.mark.parametrize("options", [["--trainer.limit_val_batches", "0"], ["--trainer.check_val_every_n_epoch", "5"]])
def test_without_validation_the_last_weights_are_handed_on(place, options, caplog):
    assert fit("--trainer.max_epochs", "2", *options) == 0
    assert "no validation" in caplog.text
    run = place / "runs/exp/fit-1"
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    for name, value in read(run / "weights.safetensors").state.items():
        assert torch.equal(value, last["state_dict"][f"network.{name}"])


@pytest.mark.parametrize(("option", "value"), [("max_epochs", 0), ("limit_train_batches", 0), ("fast_dev_run", 1)])
def test_a_training_without_steps_or_files_says_so(place, option, value, caplog):
    caplog.set_level(logging.INFO, "derain")
    assert fit(f"--trainer.{option}", str(value)) == 0
    assert "no weights" in caplog.text
    assert not (place / "runs/exp/fit-1/weights.safetensors").exists()


# Stopped runs.


@pytest.fixture
def stopped(monkeypatch):
    """Stops a command in its second batch, by Ctrl-C or by SIGTERM."""

    def stop(step, signum):
        original, calls = getattr(PReNetModule, step), []

        def stopping(self, batch, index):
            calls.append(index)
            if len(calls) == 4:
                signal.raise_signal(signum)
            return original(self, batch, index)

        monkeypatch.setattr(PReNetModule, step, stopping)

    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield stop
    for signum, handler in handlers.items():  # Lightning ignores Ctrl-C once it was pressed
        signal.signal(signum, handler)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_training_says_how_to_resume(place, capsys, stopped, signum, code):
    stopped("training_step", signum)
    assert fit("--trainer.max_epochs", "9") == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "derain fit --config exp.yaml --trainer.max_epochs 9 --ckpt_path last" in error
    assert not (place / "runs/exp/fit-1/weights.safetensors").exists()
    assert fit("--ckpt_path", "last") == 0


@pytest.mark.parametrize("resuming", [["--ckpt_path", "last"], ["--ckpt_path=last"]])
def test_the_command_that_resumes_replaces_the_checkpoint_of_the_command_line(place, capsys, stopped, resuming):
    assert fit() == 0
    stopped("training_step", signal.SIGTERM)
    assert fit("--trainer.max_epochs", "9", *resuming) == 143
    command = capsys.readouterr().err.strip().splitlines()[-1].partition("resume by: ")[2]
    assert command == "derain fit --config exp.yaml --trainer.max_epochs 9 --ckpt_path last"


def test_the_command_that_resumes_names_this_run_where_another_is_newer(place, capsys, stopped):
    assert fit() == 0
    assert fit("--ckpt_path", "runs/exp/fit-1/checkpoints/last.ckpt", "--trainer.max_epochs", "2") == 0
    os.utime(place / "runs/exp/fit-2/checkpoints/last.ckpt", (2**32, 2**32))
    stopped("training_step", signal.SIGTERM)
    assert fit("--trainer.max_epochs", "9") == 143
    command = capsys.readouterr().err.strip().splitlines()[-1].partition("resume by: derain ")[2]
    assert main(shlex.split(command)) == 0
    assert [last(place / f"runs/exp/fit-{number}")["epoch"] for number in (1, 2, 3)] == [0, 1, 8]
    assert len(list((place / "runs/exp").iterdir())) == 3


def test_a_stopped_and_resumed_training_reports_nothing_that_is_usual(place):
    process = start("fit", "--config", "exp.yaml", "--trainer.max_epochs", "2000")
    while not (place / "runs/exp/fit-1/checkpoints/last.ckpt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 143, text
    assert "SIGTERMException" not in text
    text = finish("fit", "--config", "exp.yaml", "--ckpt_path", "last")
    assert "is not empty" not in text


def test_a_training_stopped_before_its_first_checkpoint_says_so(place, capsys, stopped):
    stopped("training_step", signal.SIGINT)
    assert fit("--trainer.limit_train_batches", "1.0", "--data.repeat", "9") == 130
    assert "--ckpt_path" not in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_stopped_evaluation_leaves_no_results(place, capsys, stopped, command, signum, code):
    stopped("predict_step" if command == "predict" else f"{command[:4].replace('vali', 'validation')}_step", signum)
    line = [command, "--config", "exp.yaml", "--weights", "w.safetensors", "--data.val", "Rain800"]
    assert main(line) == code
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("derain: ")
    run = place / f"runs/exp/{command}-1"
    assert not (run / "summary.json").exists()
    assert not (run / "images.csv").exists()
    if command == "predict":
        assert 0 < len(list((run / "images").iterdir())) < 5


def test_ctrl_c_in_a_process_of_its_own(place):
    process = start("fit", "--config", "exp.yaml", "--trainer.max_epochs", "2000")
    while not (place / "runs/exp/fit-1/checkpoints/last.ckpt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert text.strip().splitlines()[-1].endswith("--ckpt_path last")
