"""A training that is resumed from any checkpoint equals an uninterrupted one to the last bit."""

import os
import signal
import time
from contextlib import contextmanager
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
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true", "--data.batch_size", "1"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Return a function that trains without interruption and returns the run's folder.

    The run is the same for all tests that train with the same options; they do not change it.
    """
    runs = {}

    def train(config, *options, command=lambda *arguments: main(list(arguments))):
        key = (config, options)
        if key not in runs:
            root = tmp_path_factory.mktemp("whole")
            runs[key] = root / "fit-1"
            command("fit", "--config", config, *options, "--trainer.default_root_dir", str(root))
        assert (runs[key] / "weights.safetensors").exists()
        return runs[key]

    return train


@contextmanager
def renamed(path, name):
    """Give a file or folder another name for a while; yield its new path."""
    new = path.rename(path.with_name(name))
    try:
        yield new
    finally:
        new.rename(path)


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
    "DACLIPSDEModule": ["--model.learning_rate", "0.01", "--model.decay", "halving"],
    "PLNLINGANModule": ["--model.learning_rate", "0.01", "--model.milestones", "[1]"],
    "Syn2RealModule": [
        *("--model.learning_rate", "0.01", "--model.optimizer_options", "{weight_decay: 0.3}"),
        *("--model.schedule_options", "{milestones: [1], decay: 0.1}"),
    ],
}
"""Options that are changed when a run is resumed; methods without an entry have the optimiser and schedule of one."""


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
def test_any_method_resumes_from_any_step(all_methods, whole_run, method):
    config = f"{method}-steps.yaml"
    whole = whole_run(config)
    for step in (WITHIN, AT_THE_END, IN_THE_NEXT) if method == "PReNetModule" else (WITHIN,):
        again = resumed(config, whole / f"checkpoints/step-{step}.ckpt")
        assert_equal_runs(whole, again)
        assert logged(again)[0]["step"] == str(step - 1)  # logged after the checkpoint was saved


@pytest.mark.slow
@pytest.mark.parametrize("method", CHANGED)
def test_changed_options_apply_to_every_step_after_a_resume(all_methods, whole_run, used, method):
    """They apply as if the run had started with them."""
    config = f"{method}-steps.yaml"
    checkpoint = whole_run(config) / f"checkpoints/step-{IN_THE_NEXT}.ckpt"
    states = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    unchanged = [(group["lr"], group["weight_decay"]) for state in states for group in state["param_groups"]]
    used.clear()
    assert main(["fit", "--config", config, *CHANGED[method], "--trainer.default_root_dir", "expected"]) == 0
    expected = list(used)
    used.clear()
    resumed(config, checkpoint, *CHANGED[method])
    assert used
    for step, groups in zip(used, expected[-len(used) :], strict=True):
        assert step == [pytest.approx(group) for group in groups]
        assert not set(step) & set(unchanged)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (
            [
                *("--trainer.max_steps", "7", "--trainer.max_epochs", "-1", "--trainer.limit_train_batches", "3"),
                *("--trainer.check_val_every_n_epoch", "2", "--data.workers", "2"),
            ],
            (2, 3, 5),
        ),
        (["--trainer.accumulate_grad_batches", "3", "--trainer.val_check_interval", "2"], (1, 2, 3)),
    ],
)
def test_any_option_of_the_trainer_resumes(all_methods, whole_run, options, steps):
    config = "PReNetModule-steps.yaml"
    whole = whole_run(config, *options)
    for step in steps:
        assert_equal_runs(whole, resumed(config, whole / f"checkpoints/step-{step}.ckpt", *options))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
@pytest.mark.parametrize(("interval", "steps"), [("step", (IN_THE_NEXT,)), ("epoch", (WITHIN, AT_THE_END))])
def test_schedules_that_change_more_than_the_rate_resume(all_methods, capsys, interval, steps):
    """OneCycleLR also changes the betas of Adam."""
    config = yaml.safe_load(Path("PReNetModule-steps.yaml").read_text())
    options = {"network": "RESCAN", "network_options": {"channels": 4, "layers": 2, "iterations": 1, "squeeze": 2}}
    options |= {"schedule": "OneCycleLR", "schedule_options": {"max_lr": 0.01, "interval": interval}}
    config["model"] = {"class_path": "RegressionModule", "init_args": options}
    Path("cycle.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "cycle.yaml"]) == 0
    whole = all_methods / "runs/cycle/fit-1"
    groups = [group for state in last(whole)["optimizer_states"] for group in state["param_groups"]]
    for step in steps:
        again = resumed("cycle.yaml", whole / f"checkpoints/step-{step}.ckpt")
        assert_equal_runs(whole, again)
        assert [group for state in last(again)["optimizer_states"] for group in state["param_groups"]] == groups
    checkpoint = ["--ckpt_path", str(whole / "checkpoints/step-3.ckpt")]
    assert main(["fit", "--config", "cycle.yaml", "--trainer.max_epochs", "3", *checkpoint]) == 2
    assert "total_steps" in capsys.readouterr().err


@pytest.mark.slow
def test_from_the_best_checkpoint_too(all_methods, whole_run):
    config = "PReNetModule-steps.yaml"
    whole = whole_run(config, *WORSE)
    best = torch.load(whole / "checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == 4
    again = resumed(config, whole / "checkpoints/best.ckpt", *WORSE)
    assert_equal_runs(whole, again)


def run_weights(run):
    """Load the weights of a run, and the average of its last checkpoint."""
    return load_file(run / "weights.safetensors"), last(run)["ema"]["network"]


@pytest.mark.slow
def test_the_best_checkpoint_is_copied_to_a_new_folder(all_methods, whole_run):
    config = "PReNetModule-steps.yaml"
    whole = whole_run(config, *WORSE)
    weights, after = run_weights(whole)
    assert differing(weights, after)
    checkpoint = f"checkpoints/step-{IN_THE_NEXT}.ckpt"
    again = resumed(config, whole / checkpoint, *WORSE)
    assert differing(weights, run_weights(again)[0]) == []
    with renamed(whole, "moved") as moved:
        resumed(config, moved / checkpoint, *WORSE, "--trainer.default_root_dir", "moved-on")
    assert differing(weights, run_weights(all_methods / "moved-on/fit-1")[0]) == []


@pytest.mark.slow
def test_the_best_score_is_discarded_if_scores_cannot_be_compared(all_methods, whole_run, caplog):
    config = "PReNetModule-steps.yaml"
    whole = whole_run(config, *WORSE)

    def assert_discarded(root, change, note):
        caplog.clear()
        again = [*WORSE, "--trainer.max_epochs", "3", *change, "--trainer.default_root_dir", root]
        resumed(config, whole / "checkpoints/last.ckpt", *again)
        weights, after = run_weights(all_methods / root / "fit-1")
        assert differing(weights, after) == []
        assert [note in record.message for record in caplog.records if "best.ckpt" in record.message] == [True]
        assert "0 of" not in caplog.text

    for root, change, note in [
        ("protocol", ["--protocol", "[rgb]"], "--protocol ['rgb']"),
        ("images", ["--data.val", "Rain800"], "validation images"),
        ("none", ["--data.val", "none"], "no images"),
        ("limit", ["--trainer.limit_val_batches", "0"], "no images"),
    ]:
        assert_discarded(root, change, note)
    best = whole / "checkpoints/best.ckpt"
    with renamed(best, "hidden"):
        assert_discarded("gone", [], str(best))


@pytest.mark.slow
def test_another_order_of_batches_is_an_error(all_methods, whole_run, capsys):
    config = "PReNetModule-steps.yaml"
    files = whole_run(config) / "checkpoints"
    again = ["fit", "--config", config, "--trainer.max_epochs", "3", "--data.batch_size", "3", "--ckpt_path"]
    assert main([*again, str(files / "step-2.ckpt")]) == 2
    assert "--data.batch_size 3" in capsys.readouterr().err
    assert main([*again, str(files / "last.ckpt")]) == 0


@pytest.mark.parametrize(
    "changed", ["--trainer.accumulate_grad_batches 2", "--trainer.limit_train_batches 3", "--seed_everything 5"]
)
def test_other_steps_of_an_epoch_are_errors(all_methods, whole_run, capsys, changed):
    checkpoint = str(whole_run("PReNetModule-steps.yaml") / "checkpoints/step-1.ckpt")
    assert main(["fit", "--config", "PReNetModule-steps.yaml", "--ckpt_path", checkpoint, *changed.split()]) == 2
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
def test_a_signal_saves_the_step_where_it_stops(all_methods, whole_run, sent):
    """SIGTERM, and what SLURM sends before time is up: it wants the job in the queue again."""
    scontrol = all_methods / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\ncp ended/fit-7/checkpoints/last.ckpt requeued.ckpt\n")
    scontrol.chmod(0o755)
    variables = SLURM | {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"} if sent == signal.SIGUSR1 else {}
    options = ["--trainer.max_epochs", "8", "--trainer.accumulate_grad_batches", "2"]
    config = ["fit", "--config", "PReNetModule.yaml", *options]
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
    assert_equal_runs(whole_run("PReNetModule.yaml", *options), run)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(all_methods, whole_run):
    script = all_methods / "ranks.py"
    script.write_text(
        "import signal, sys\n"
        "from derain.cli import main\n"
        "from derain.methods import PReNetModule\n"
        "kept = PReNetModule.training_step\n"
        "def stopping(self, batch, index):\n"
        "    if self.global_rank == 0 and self.global_step == 5:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    return kept(self, batch, index)\n"
        "PReNetModule.training_step = stopping\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    config = ["fit", "--config", "PReNetModule-steps.yaml", *TWO, *VARIED_RAIN]
    process = start(*config, program=(str(script),))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    run = all_methods / "runs/PReNetModule-steps/fit-1"
    assert last(run)["global_step"] == 6
    finish(*config, "--ckpt_path", "last")
    assert_equal_runs(whole_run("PReNetModule-steps.yaml", *TWO, *VARIED_RAIN, command=finish), run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"), [("PReNetModule", VARIED_RAIN), ("PLNLINGANModule", []), ("Syn2RealModule", [])]
)
def test_two_processes_resume_within_an_epoch(all_methods, whole_run, method, options):
    config = f"{method}-steps.yaml"
    whole = whole_run(config, *TWO, *options, command=finish)
    resume = ["--ckpt_path", str(whole / "checkpoints/step-2.ckpt"), "--trainer.default_root_dir", "again"]
    finish("fit", "--config", config, *TWO, *options, *resume)
    assert_equal_runs(whole, Path("again/fit-1"))


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "kills", "options"), [(False, 1, []), (True, 2, VARIED_RAIN)])
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
