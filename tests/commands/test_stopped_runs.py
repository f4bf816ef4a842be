"""Commands that Ctrl-C or a signal stops."""

import os
import shlex
import signal

import pytest

from derain.cli import main
from derain.methods import PReNetModule
from tests.runs import finish, fit, last, start, wait_for


@pytest.fixture
def stopped(monkeypatch):
    """Stop a command in its fourth batch, by Ctrl-C or by SIGTERM."""

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
def test_a_stopped_training_prints_the_command_that_resumes_it(workdir, capsys, stopped, signum, code):
    stopped("training_step", signum)
    assert fit("--trainer.max_epochs", "9") == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "derain fit --config exp.yaml --trainer.max_epochs 9 --ckpt_path last" in error
    assert not (workdir / "runs/exp/fit-1/weights.safetensors").exists()
    assert fit("--ckpt_path", "last") == 0


@pytest.mark.parametrize("resuming", [["--ckpt_path", "last"], ["--ckpt_path=last"]])
def test_the_command_that_resumes_has_one_checkpoint(trained, capsys, stopped, resuming):
    stopped("training_step", signal.SIGTERM)
    assert fit("--trainer.max_epochs", "9", *resuming) == 143
    command = capsys.readouterr().err.strip().splitlines()[-1].partition("resume with: ")[2]
    assert command == "derain fit --config exp.yaml --trainer.max_epochs 9 --ckpt_path last"


def test_the_command_that_resumes_names_its_run_if_another_is_newer(trained, capsys, stopped):
    assert fit("--ckpt_path", "runs/exp/fit-1/checkpoints/last.ckpt", "--trainer.max_epochs", "2") == 0
    os.utime(trained / "runs/exp/fit-2/checkpoints/last.ckpt", (2**32, 2**32))
    stopped("training_step", signal.SIGTERM)
    assert fit("--trainer.max_epochs", "9") == 143
    command = capsys.readouterr().err.strip().splitlines()[-1].partition("resume with: derain ")[2]
    assert main(shlex.split(command)) == 0
    assert [last(trained / f"runs/exp/fit-{number}")["epoch"] for number in (1, 2, 3)] == [0, 1, 8]
    assert len(list((trained / "runs/exp").iterdir())) == 3


def test_a_training_stopped_before_its_first_checkpoint_cannot_be_resumed(workdir, capsys, stopped):
    stopped("training_step", signal.SIGINT)
    assert fit("--trainer.limit_train_batches", "1.0", "--data.repeat", "9") == 130
    assert "--ckpt_path" not in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_stopped_evaluation_saves_no_results(workdir, capsys, stopped, command, signum, code):
    stopped("predict_step" if command == "predict" else f"{command[:4].replace('vali', 'validation')}_step", signum)
    line = [command, "--config", "exp.yaml", "--weights", "w.safetensors", "--data.val", "Rain800"]
    assert main(line) == code
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("derain: ")
    run = workdir / f"runs/exp/{command}-1"
    assert not (run / "summary.json").exists()
    assert not (run / "images.csv").exists()
    if command == "predict":
        assert 0 < len(list((run / "images").iterdir())) < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code", "fresh"),
    [(signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)],  # fresh: imports may print, too
)
def test_a_stopped_and_resumed_process_prints_no_chatter(workdir, signum, code, fresh):
    process = start("fit", "--config", "exp.yaml", "--trainer.max_epochs", "2000", fresh=fresh)
    wait_for(workdir / "runs/exp/fit-1/checkpoints/last.ckpt", process)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert "SIGTERMException" not in output
    assert output.strip().splitlines()[-1].endswith("--ckpt_path last")
    if signum == signal.SIGTERM:
        assert "is not empty" not in finish("fit", "--config", "exp.yaml", "--ckpt_path", "last")
