"""A training that is resumed from any checkpoint equals an uninterrupted one to the last bit."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from derain.cli import main
from derain.methods import DerainModule, PReNetModule
from tests.kills import killed_equals_whole
from tests.runs import differing, finish, last, metrics, start, wait_for
from tests.tiny import MODELS

WITHIN, AT_THE_END, IN_THE_NEXT = 3, 4, 6  # of epochs of four steps
VARIED_RAIN = ["--data.rain", "varied"]
WORSE = ["--model.milestones", "[1]", "--model.decay", "30"]  # the second epoch


def logged(run):
    """Return losses and validation scores by step."""
    return [
        {name: value for name, value in row.items() if value}
        for row in metrics(run, "train/loss", "val/psnr", "val/rainy_psnr")
    ]


def resumed(config, checkpoint, *options):
    """Resume a checkpoint in a new run; return its folder."""
    root = f"resumed-{Path(checkpoint).stem}"
    resume = ["--ckpt_path", str(checkpoint), "--trainer.default_root_dir", root]
    assert main(["fit", "--config", config, *resume, *options]) == 0
    return Path(root) / "fit-1"


def assert_equal_runs(whole, again, rows=True):
    expected, actual = last(whole), last(again)
    for state in ("state_dict", "ema"):
        assert differing(expected.get(state, {}), actual.get(state, {})) == []
    for first, second in zip(expected["optimizer_states"], actual["optimizer_states"], strict=True):
        assert differing(first["state"], second["state"]) == []
    assert (expected["epoch"], expected["global_step"]) == (actual["epoch"], actual["global_step"])
    assert expected["position"]["steps"] == actual["position"]["steps"]
    if rows:
        added = logged(again)
        assert added == logged(whole)[-len(added) :]


CHANGED = {
    "PReNetModule": ["--model.learning_rate", "0.01", "--model.milestones", "[1]", "--model.decay", "0.5"],
    "RestormerModule": ["--model.learning_rate", "0.01", "--model.weight_decay", "0.3", "--model.warm_up", "0.9"],
    "CLIPRPNModule": ["--model.learning_rate", "0.01", "--model.weight_decay", "0.3", "--model.warm_up", "0.9"],
    "DACLIPSDEModule": ["--model.learning_rate", "0.01", "--model.decay", "halving"],
    "DACLIPModule": ["--model.learning_rate", "0.01", "--model.weight_decay", "0.3", "--model.warm_up", "0.9"],
    "PLNLINGANModule": ["--model.learning_rate", "0.01", "--model.milestones", "[1]"],
    "Syn2RealModule": ["--model.learning_rate", "0.01", "--model.schedule_options", "{milestones: [1], decay: 0.1}"],
    "SSIDKDModule": ["--model.learning_rate", "0.01", "--model.optimizer_options", "{weight_decay: 0.3}"],
}
"""Options that are changed when a run is resumed."""


@pytest.fixture
def used(monkeypatch):
    """Rates and weight decay of every step of an optimiser."""
    steps = []

    def spy(function):
        def stepping(self, *args, **kwargs):
            steps.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])
            return function(self, *args, **kwargs)

        return stepping

    for kind in (torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(kind, "step", spy(kind.step))
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("method", MODELS)
def test_any_method_resumes_from_any_step_with_the_same_or_changed_options(all_methods, used, method):
    """Changed options apply to every step after the resume as if the run had started with them."""
    config = f"{method}-steps.yaml"
    assert main(["fit", "--config", config]) == 0
    unchanged = list(used)
    whole = all_methods / f"runs/{method}-steps/fit-1"
    for step in (WITHIN, AT_THE_END, IN_THE_NEXT) if method == "PReNetModule" else (WITHIN,):
        again = resumed(config, whole / f"checkpoints/step-{step}.ckpt")
        assert_equal_runs(whole, again)
        assert logged(again)[0]["step"] == str(step - 1)  # logged after the checkpoint was saved
    used.clear()
    assert main(["fit", "--config", config, *CHANGED[method], "--trainer.default_root_dir", "expected"]) == 0
    expected = list(used)
    assert expected != unchanged
    used.clear()
    resumed(config, whole / f"checkpoints/step-{IN_THE_NEXT}.ckpt", *CHANGED[method])
    assert used
    for step, groups in zip(used, expected[-len(used) :], strict=True):
        assert step == [pytest.approx(group) for group in groups]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.max_steps", "7", "--trainer.max_epochs", "-1"], (WITHIN, AT_THE_END, IN_THE_NEXT)),
        (["--trainer.accumulate_grad_batches", "3", "--trainer.val_check_interval", "2"], (1, 2, 3)),
        (["--trainer.check_val_every_n_epoch", "2"], (WITHIN, AT_THE_END, IN_THE_NEXT)),
        (["--trainer.limit_train_batches", "3"], (2, 3, 5)),
        (["--data.workers", "2"], (WITHIN, AT_THE_END, IN_THE_NEXT)),
    ],
)
def test_any_option_of_the_trainer_resumes(all_methods, options, steps):
    config = "PReNetModule-steps.yaml"
    assert main(["fit", "--config", config, *options]) == 0
    whole = all_methods / "runs/PReNetModule-steps/fit-1"
    for step in steps:
        assert_equal_runs(whole, resumed(config, whole / f"checkpoints/step-{step}.ckpt", *options))


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_schedules_that_change_more_than_the_rate_resume(all_methods, capsys, interval):
    """OneCycleLR also changes the betas of Adam."""
    config = yaml.safe_load(Path("PReNetModule-steps.yaml").read_text())
    options = {"network": "RESCAN", "network_options": {"channels": 4, "layers": 2, "iterations": 1, "squeeze": 2}}
    options |= {"schedule": "OneCycleLR", "schedule_options": {"max_lr": 0.01, "interval": interval}}
    config["model"] = {"class_path": "RegressionModule", "init_args": options}
    Path("cycle.yaml").write_text(yaml.safe_dump(config))
    fit = ["--trainer.max_epochs", "3"]
    assert main(["fit", "--config", "cycle.yaml", *fit]) == 0
    whole = all_methods / "runs/cycle/fit-1"
    groups = [group for state in last(whole)["optimizer_states"] for group in state["param_groups"]]
    for step in (WITHIN, AT_THE_END, IN_THE_NEXT):
        again = resumed("cycle.yaml", whole / f"checkpoints/step-{step}.ckpt", *fit)
        assert_equal_runs(whole, again)
        assert [group for state in last(again)["optimizer_states"] for group in state["param_groups"]] == groups
    checkpoint = ["--ckpt_path", str(whole / "checkpoints/step-3.ckpt")]
    assert main(["fit", "--config", "cycle.yaml", "--trainer.max_epochs", "4", *checkpoint]) == 2
    assert "total_steps" in capsys.readouterr().err


@pytest.mark.slow
def test_from_the_best_checkpoint_too(all_methods):
    config = "PReNetModule.yaml"
    assert main(["fit", "--config", config, *WORSE]) == 0
    whole = all_methods / "runs/PReNetModule/fit-1"
    best = torch.load(whole / "checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == 4
    again = resumed(config, whole / "checkpoints/best.ckpt", *WORSE)
    assert_equal_runs(whole, again)


def run_weights(run):
    """Load the weights of a run, and the average of its last checkpoint."""
    return load_file(run / "weights.safetensors"), last(run)["ema"]["network"]


@pytest.mark.slow
def test_the_best_checkpoint_is_copied_to_a_new_folder(all_methods):
    config = "PReNetModule-steps.yaml"
    assert main(["fit", "--config", config, *WORSE]) == 0
    whole = all_methods / "runs/PReNetModule-steps/fit-1"
    weights, after = run_weights(whole)
    assert differing(weights, after)
    checkpoint = whole / f"checkpoints/step-{IN_THE_NEXT}.ckpt"
    again = resumed(config, checkpoint, *WORSE)
    assert differing(weights, run_weights(again)[0]) == []
    moved = Path(shutil.move(whole, all_methods / "moved"))
    again = resumed(config, moved / "checkpoints" / checkpoint.name, *WORSE, "--trainer.default_root_dir", "moved-on")
    assert differing(weights, run_weights(all_methods / "moved-on/fit-1")[0]) == []


@pytest.mark.slow
def test_the_best_score_is_discarded_if_scores_cannot_be_compared(all_methods, caplog):
    config = "PReNetModule-steps.yaml"
    assert main(["fit", "--config", config, *WORSE]) == 0
    whole = all_methods / "runs/PReNetModule-steps/fit-1"
    again = [*WORSE, "--trainer.max_epochs", "3"]
    for root, change, note in [
        ("protocol", ["--protocol", "[rgb]"], "--protocol ['rgb']"),
        ("images", ["--data.val", "Rain800"], "validation images"),
        ("none", ["--data.val", "none"], "no images"),
        ("limit", ["--trainer.limit_val_batches", "0"], "no images"),
        ("gone", [], str(whole / "checkpoints/best.ckpt")),
    ]:
        if root == "gone":
            (whole / "checkpoints/best.ckpt").unlink()
        caplog.clear()
        resumed(config, whole / "checkpoints/last.ckpt", *again, *change, "--trainer.default_root_dir", root)
        weights, after = run_weights(all_methods / root / "fit-1")
        assert differing(weights, after) == []
        assert [note in record.message for record in caplog.records if "best.ckpt" in record.message] == [True]
        assert "0 of" not in caplog.text


@pytest.mark.slow
def test_another_order_of_batches_is_an_error(all_methods, capsys):
    config = "PReNetModule-steps.yaml"
    assert main(["fit", "--config", config, "--trainer.max_epochs", "1"]) == 0
    files = all_methods / f"runs/{Path(config).stem}/fit-1/checkpoints"
    again = ["fit", "--config", config, "--data.batch_size", "3", "--ckpt_path"]
    assert main([*again, str(files / "step-2.ckpt")]) == 2
    assert "--data.batch_size 3" in capsys.readouterr().err
    assert main([*again, str(files / "last.ckpt")]) == 0


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ("--trainer.accumulate_grad_batches 2", "--trainer.accumulate_grad_batches 1"),
        ("--trainer.limit_train_batches 3", "--trainer.limit_train_batches 4"),
        ("--seed_everything 5", "--seed_everything 0"),
    ],
)
def test_other_steps_of_an_epoch_are_errors(all_methods, capsys, options, changed):
    config = "PReNetModule-steps.yaml"
    assert main(["fit", "--config", config, "--trainer.max_epochs", "1", *options.split()]) == 0
    checkpoint = "runs/PReNetModule-steps/fit-1/checkpoints/step-1.ckpt"
    assert main(["fit", "--config", config, "--ckpt_path", checkpoint, *changed.split()]) == 2
    assert f"{changed}: " in capsys.readouterr().err


def test_another_seed_of_the_data_is_an_error(all_methods, capsys):
    assert main(["fit", "--config", "PReNetModule.yaml", "--data.seed", "5"]) == 2
    assert "--data.seed 5" in capsys.readouterr().err


@pytest.mark.slow
def test_scheduled_accumulation_resumes_within_an_epoch(all_methods):
    config = yaml.safe_load(Path("PReNetModule-steps.yaml").read_text())
    schedule = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    config["trainer"]["callbacks"].append({"class_path": schedule, "init_args": {"scheduling": {0: 1, 1: 2}}})
    Path("scheduled.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "scheduled.yaml"]) == 0
    whole = all_methods / "runs/scheduled/fit-1"
    assert last(whole)["global_step"] == 6
    again = resumed("scheduled.yaml", whole / "checkpoints/step-5.ckpt")
    assert_equal_runs(whole, again)


@pytest.mark.slow
def test_a_signal_stops_within_a_validation(all_methods, monkeypatch):
    config = ["fit", "--config", "PReNetModule.yaml", "--data.val", "Rain800"]
    assert main([*config, "--trainer.default_root_dir", "whole"]) == 0
    kept, scored = DerainModule.validation_step, []

    def signalled(self, batch, batch_idx):
        if self.current_epoch == 1:
            scored.append(batch_idx)
            signal.raise_signal(signal.SIGTERM)
        return kept(self, batch, batch_idx)

    monkeypatch.setattr(DerainModule, "validation_step", signalled)
    assert main([*config, "--trainer.default_root_dir", "ended"]) == 128 + signal.SIGTERM
    assert scored == [0]
    assert last(all_methods / "ended/fit-1")["global_step"] == 10
    monkeypatch.setattr(DerainModule, "validation_step", kept)
    assert main([*config, "--trainer.default_root_dir", "ended", "--ckpt_path", "last"]) == 0
    assert_equal_runs(all_methods / "whole/fit-1", all_methods / "ended/fit-1")


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "fit", "SLURM_NODELIST": "127.0.0.1", "SLURM_NTASKS": "1"}
SLURM |= {f"SLURM_{name}ID": "0" for name in ("PROC", "LOCAL", "NODE")}


def test_a_job_that_cannot_be_requeued_keeps_its_position(all_methods, monkeypatch, caplog):
    for name, value in (SLURM | {"PATH": ""}).items():
        monkeypatch.setenv(name, value)
    kept, calls = PReNetModule.training_step, []

    def stopping(self, batch, index):
        calls.append(index)
        if len(calls) == 6:  # of 4 in an epoch
            signal.raise_signal(signal.SIGUSR1)
        return kept(self, batch, index)

    monkeypatch.setattr(PReNetModule, "training_step", stopping)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    assert main(["fit", "--config", "PReNetModule.yaml"]) == 128 + signal.SIGTERM
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert last(all_methods / "runs/PReNetModule/fit-7")["global_step"] == 6
    assert "job 7 was not requeued" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_where_it_stops(all_methods, sent):
    """SIGTERM, and what SLURM sends before time is up: it wants the job in the queue again."""
    scontrol = all_methods / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\ncp ended/fit-7/checkpoints/last.ckpt requeued.ckpt\n")
    scontrol.chmod(0o755)
    variables = SLURM | {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"} if sent == signal.SIGUSR1 else {}
    config = ["fit", "--config", "PReNetModule.yaml", "--trainer.max_epochs", "8"]
    config += ["--trainer.accumulate_grad_batches", "2"]
    assert main([*config, "--trainer.default_root_dir", "whole"]) == 0
    process = start(*config, "--trainer.default_root_dir", "ended", **variables)
    run = all_methods / ("ended/fit-7" if variables else "ended/fit-1")
    wait_for(run / "checkpoints/last.ckpt", process)
    os.kill(process.pid, sent)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert 2 <= last(run)["global_step"] < 16
    if variables:  # requeued after the position was saved
        assert (all_methods / "requeued.ckpt").read_bytes() == (run / "checkpoints/last.ckpt").read_bytes()
    assert not list(run.glob("hpc_ckpt*"))
    assert main([*config, "--trainer.default_root_dir", "ended", "--ckpt_path", "last"]) == 0
    assert_equal_runs(all_methods / "whole/fit-1", run)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(all_methods):
    config = ["fit", "--config", "PReNetModule.yaml", "--trainer.max_epochs", "8", "--data.batch_size", "1"]
    config += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    process = start(*config)
    run = all_methods / "runs/PReNetModule/fit-1"
    wait_for(run / "checkpoints/last.ckpt", process)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    stopped = last(run)
    assert 4 <= stopped["global_step"] < 32
    finish(*config, "--trainer.default_root_dir", "whole")
    finish(*config, "--ckpt_path", "last")
    assert_equal_runs(all_methods / "whole/fit-1", run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"), [("PReNetModule", VARIED_RAIN), ("PLNLINGANModule", []), ("Syn2RealModule", [])]
)
def test_two_processes_resume_within_an_epoch(all_methods, method, options):
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true", "--data.batch_size", "1"]
    fit = ["fit", "--config", f"{method}-steps.yaml", *two, *options]
    finish(*fit, fresh=method == "PReNetModule")  # Lightning starts the second rank anew, not from `tests.forks`
    whole = all_methods / f"runs/{method}-steps/fit-1"
    finish(*fit, "--ckpt_path", str(whole / "checkpoints/step-2.ckpt"), "--trainer.default_root_dir", "again")
    assert_equal_runs(whole, Path("again/fit-1"))


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "kills", "options"), [(False, 1, []), (True, 2, []), (True, 1, VARIED_RAIN)])
def test_a_run_killed_at_random_moments(all_methods, steps, kills, options):
    assert killed_equals_whole("PReNetModule", all_methods, kills, steps, max_delay=0.5, options=options) == kills


@pytest.mark.slow
def test_unfinished_files_of_killed_runs_are_removed_at_the_next_start(all_methods):
    config = ["fit", "--config", "PReNetModule.yaml", "--trainer.limit_train_batches", "1"]
    assert main(config) == 0
    old, new = (all_methods / f"runs/PReNetModule/fit-1/checkpoints/.0123456{n}-last.ckpt" for n in (0, 1))
    for file in (old, new):
        file.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert main([*config, "--trainer.max_epochs", "1"]) == 0
    assert (old.exists(), new.exists()) == (False, True)  # the young one may be another process's
    os.utime(all_methods / "runs/PReNetModule/fit-1/checkpoints/last.ckpt")
    assert main([*config, "--trainer.max_epochs", "3", "--ckpt_path", "last"]) == 0
    assert not new.exists()
