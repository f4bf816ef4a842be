"""Options of Lightning's Trainer and its callbacks: each works, or is an error of one line."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from derain.cli import main
from derain.methods import PReNetModule
from tests.runs import EXPERIMENT, error_line, finish, fit, last, rows, with_callbacks


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
def test_options_that_cannot_work_are_errors(workdir, capsys, options, named):
    assert fit(*options) == 2
    error = error_line(capsys)
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
def test_callbacks_that_cannot_work_are_errors(workdir, capsys, name, given, config):
    assert fit(config=with_callbacks(workdir, (name, given), config=config)) == 2
    assert "--trainer" in error_line(capsys)


def test_an_error_of_a_method_is_raised_as_it_is(workdir, monkeypatch):
    def fault(*_):
        raise RuntimeError("of the method")

    monkeypatch.setattr(PReNetModule, "training_step", fault)
    with pytest.raises(RuntimeError, match="of the method"):
        fit()


class OwnCheckpoint(ModelCheckpoint):
    """A user's class, whose hook needs the method itself."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert pl_module.network is not None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def checkpoints(run="callbacks"):
    """Names of the checkpoints of a run."""
    return {file.name for file in Path(f"runs/{run}/fit-1/checkpoints").iterdir()}


def test_configured_checkpoint_callbacks_save_beside_best_and_last(workdir):
    config = with_callbacks(
        workdir,
        ("ModelCheckpoint", {"monitor": "val/psnr", "mode": "max", "filename": "scored-{epoch}"}),
        ("ModelCheckpoint", {"filename": "plain-{epoch}"}),
        ("ModelCheckpoint", {"monitor": "val/ssim", "mode": "max", "save_top_k": 3, "filename": "top-{epoch}"}),
        ("ModelCheckpoint", {"monitor": "val/ssim", "save_last": True, "filename": "worst-{epoch}"}),
        (
            "ModelCheckpoint",
            {"monitor": "train/loss", "every_n_epochs": 1, "save_top_k": -1, "filename": "all-{epoch}"},
        ),
    )
    assert fit(config=config) == 0
    names = ("scored", "plain", "top", "worst", "all")
    assert {"best.ckpt", "last.ckpt"} | {f"{name}-epoch=0.ckpt" for name in names} <= checkpoints()


@pytest.mark.parametrize("config", ["exp", pytest.param("gan", marks=pytest.mark.slow)])
def test_checkpoints_by_time_and_by_steps_with_automatic_and_manual_optimisation(workdir, config, recwarn):
    by_time = {"train_time_interval": "00:00:00", "save_top_k": -1}
    by_steps = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    config = with_callbacks(
        workdir,
        ("ModelCheckpoint", by_time | {"filename": "time-{step}"}),
        ("ModelCheckpoint", by_steps),
        (f"{__name__}.OwnCheckpoint", by_time | {"filename": "own-{step}"}),
        config=config,
    )
    assert fit(config=config) == 0
    names = {f"{prefix}step={step}.ckpt" for prefix in ("time-", "", "own-") for step in (1, 2)}
    assert names <= checkpoints()
    assert not [warning for warning in recwarn if "manual optimization" in str(warning.message)]


def test_a_timer_stops_a_training(workdir):
    timer = ("Timer", {"duration": "00:00:00:01", "verbose": False})
    assert fit("--trainer.max_epochs", "2000", config=with_callbacks(workdir, timer)) == 0
    run = workdir / "runs/callbacks/fit-1"
    assert last(run)["epoch"] < 1999
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_a_configured_progress_bar_replaces_the_default(workdir, bar):
    config = with_callbacks(workdir, (bar, {}))
    assert fit("--trainer.enable_progress_bar", "true", config=config) == 0


@pytest.mark.slow
def test_learning_rates_of_generator_and_discriminator_have_their_names(workdir):
    assert fit(config="gan.yaml") == 0
    logged = {key for row in rows(workdir / "runs/gan/fit-1/metrics.csv") for key, value in row.items() if value}
    assert {name for name in logged if name.startswith("lr")} == {"lr-generator", "lr-discriminator"}


def test_a_logger_writes_to_its_folder(workdir):
    assert fit("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "mine") == 0
    assert list((workdir / "mine").rglob("events.*"))
    assert fit("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", ".") == 0
    assert list((workdir / "runs/exp/fit-2").rglob("events.*"))


def test_the_configuration_of_a_run_repeats_it_beside_that_run(trained):
    saved = "runs/exp/fit-1/config.yaml"
    assert fit(config=saved) == 0
    old = yaml.safe_load((trained / saved).read_text())
    old["trainer"]["default_root_dir"] = "runs/exp/fit-1"  # as earlier versions wrote it
    (trained / "old.yaml").write_text(yaml.safe_dump(old))
    assert fit(config="old.yaml") == 0
    assert main(["test", "--config", saved, "--weights", "w.safetensors"]) == 0
    assert {path.name for path in (trained / "runs/exp").iterdir()} == {"fit-1", "fit-2", "fit-3", "test-1"}
    assert {path.name for path in (trained / "runs").iterdir()} == {"exp"}


def test_the_configuration_of_a_resumed_run_starts_a_new_one(trained):
    assert fit("--ckpt_path", "last", "--trainer.max_epochs", "2", config="runs/exp/fit-1/config.yaml") == 0
    assert yaml.safe_load((trained / "runs/exp/fit-1/config.yaml").read_text())["ckpt_path"] is None
    assert [path.name for path in (trained / "runs/exp").iterdir()] == ["fit-1"]


def test_configurations_are_given_as_to_any_lightning_cli(workdir, capsys):
    (workdir / "all.yaml").write_text(yaml.safe_dump({"fit": EXPERIMENT, "test": {"data": EXPERIMENT["data"]}}))
    assert main(["--config", "exp.yaml", "fit"]) == 0
    assert main(["-c", "all.yaml", "fit", "--trainer.max_epochs=1"]) == 0
    assert main(["--config=all.yaml", "test", "--weights", "w.safetensors", "--trainer.accelerator=cpu"]) == 0
    saved = yaml.safe_load((workdir / "runs/all/fit-1/config.yaml").read_text())
    assert saved["model"]["init_args"]["variant"] == "PRN_r"
    assert {path.name for path in (workdir / "runs").iterdir()} == {"exp", "all"}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["validate", "--config", "all.yaml", "--weights", "w.safetensors"], ["all.yaml", "fit, test", "validate"]),
        (["fit", "--config", "mixed.yaml"], ["mixed.yaml", "data", "fit"]),
        (["--config", "all.yaml"], ["--config all.yaml", "no command"]),
        (["--config"], ["no command"]),
    ],
)
def test_missing_sections_and_keys_beside_them_are_errors(workdir, capsys, line, named):
    (workdir / "all.yaml").write_text(yaml.safe_dump({"fit": EXPERIMENT, "test": EXPERIMENT}))
    (workdir / "mixed.yaml").write_text(yaml.safe_dump({"fit": EXPERIMENT, "data": {}}))
    assert main(line) == 2
    error = error_line(capsys)
    for part in named:
        assert part in error


def test_a_group_of_options_in_a_file_of_its_own_is_no_section(workdir):
    (workdir / "data.yaml").write_text(yaml.safe_dump(EXPERIMENT["data"]))  # with the keys test and predict
    (workdir / "rest.yaml").write_text(yaml.safe_dump({k: v for k, v in EXPERIMENT.items() if k != "data"}))
    assert fit("--data", "data.yaml", config="rest.yaml") == 0


@pytest.mark.slow
def test_messages_of_configured_callbacks_are_shown_and_no_others(workdir):
    limits = {"monitor": "val/psnr", "mode": "max", "min_delta": 100, "patience": 1}
    stopping = ("EarlyStopping", limits | {"verbose": True})
    config = with_callbacks(workdir, stopping, ("BatchSizeFinder", {"max_trials": 1, "steps_per_trial": 1}))
    shown = finish("fit", "--config", config, "--trainer.max_epochs", "5")
    assert "did not improve" in shown
    assert "EarlyStopping: stopped" in shown
    assert "Finished batch size finder" in shown
    for chatter in ("GPU available", "Seed set to", "max_epochs"):
        assert chatter not in shown
