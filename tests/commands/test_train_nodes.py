"""Two nodes of two processes each, on this machine, as torchrun and SLURM start them, do what one process does."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback

from derain.cli import main
from derain.commands.train import shared_folder
from derain.images import image_files, read_rgb
from derain.methods import PReNetModule
from tests.factories import make_set
from tests.runs import finish_all, last, metrics, start

SCRIPT = Path(__file__).parents[2] / "experiments/slurm/train.sh"
CONFIG = {
    "model": {"class_path": "PReNetModule", "init_args": {"variant": "PRN_r", "stages": 1}},
    "data": {"train": "Rain800", "val": "Rain800", "crop": 16, "workers": 0, "cache": "off"},
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
}
FIT = ["fit", "--config", "exp.yaml"]
ALONE = ["--data.batch_size", "8"]
NODES = ["--trainer.num_nodes", "2", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]


class Witness(Callback):
    """Writes down which rank saw which images."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with Path(f"rank-{trainer.global_rank}.txt").open("a") as file:
            file.writelines(f"{name}\n" for name in batch["name"])

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


WITNESS = [f"--trainer.callbacks+={__name__}.Witness"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    make_set(tmp_path / "data", "Rain800", "train", count=16)
    make_set(tmp_path / "data", "Rain800", "test", count=5, seed=50)
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def torchrun(*arguments, nodes):
    """What the nodes told; each starts two processes."""
    meeting = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    program = ("-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", "2", *meeting)
    return finish_all(
        [start("-m", "derain", *arguments, program=(*program, "--node-rank", str(node))) for node in range(nodes)]
    )


def sbatch(*arguments):
    """What four processes told that find the variables of SLURM's srun, of the script in experiments/slurm."""
    job = {
        **{"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "derain-fit", "SLURM_NODELIST": "127.0.0.1"},
        **{"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "MASTER_PORT": free_port()},
    }
    stand_in = Path("bin/srun")
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    variables = os.environ | job | {"PATH": f"{stand_in.parent.resolve()}:{os.environ['PATH']}"}
    script = ["bash", str(SCRIPT), *arguments]
    program, *told = subprocess.run(script, env=variables, capture_output=True, text=True, check=True).stdout.split()
    assert program == "derain"
    tasks = [{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n % 2), "SLURM_NODEID": str(n // 2)} for n in range(4)]
    return finish_all([start(*told, **job, **task) for task in tasks])


def files(run):
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def seen(place, ranks):
    """Images that each rank saw, in order."""
    return [(place / f"rank-{rank}.txt").read_text().split() for rank in range(ranks)]


def assert_same_run(run, other):
    assert files(run) == files(other)
    scores = [[float(row["val/psnr"]) for row in metrics(one, "val/psnr")] for one in (run, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    for name, value in last(run)["state_dict"].items():
        torch.testing.assert_close(value, last(other)["state_dict"][name], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_two_nodes_by_torchrun(place):
    """The order of additions differs, and nothing else."""
    told = torchrun(*FIT, *NODES, *WITNESS, nodes=2)
    seen_by = seen(place, 4)
    assert [len(names) for names in seen_by] == [4, 4, 4, 4]
    assert len({name for names in seen_by for name in names}) == 16
    assert main([*FIT, *ALONE]) == 0
    assert_same_run(place / "runs/exp/fit-1", place / "runs/exp/fit-2")
    assert {path.name for path in (place / "runs/exp").iterdir()} == {"fit-1", "fit-2"}
    assert sum(text.count("restore photos by") for text in told) == 1


@pytest.mark.slow
def test_a_job_that_slurm_starts_again_goes_on_on_two_nodes(place, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main([*FIT, *ALONE, "--trainer.max_epochs", "2", "--trainer.default_root_dir", "whole"]) == 0
    assert main([*FIT, *ALONE]) == 0
    run = Path("runs/exp/fit-1").rename("runs/exp/fit-4242")
    sbatch("--config", "exp.yaml", "--data.batch_size", "2", *WITNESS, "--trainer.max_epochs", "2")
    assert [len(names) for names in seen(place, 4)] == [4, 4, 4, 4]
    assert_same_run(run, place / "whole/fit-1")
    assert len(metrics(run, "val/psnr")) == 2
    assert list(Path("runs/exp").iterdir()) == [run]


def test_another_training_of_the_job_does_not_go_on_with_the_first(place, capsys, monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    last = place / "runs/exp/fit-7/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"of another training")
    assert main(FIT) == 2
    assert "fit-7" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_restore_every_image_of_a_folder_once(place):
    make_set(place, "images", "predict", count=5)
    PReNetModule(stages=1).save_weights(place / "w.safetensors")
    predict = ["predict", "--config", "exp.yaml", "--data.predict", "images", "--weights", "w.safetensors"]
    torchrun(*predict, *WITNESS, "--trainer.devices", "2", "--trainer.strategy", "ddp", nodes=1)
    one, two = seen(place, 2)
    assert (len(one), len(two)) == (3, 2)
    assert main(predict) == 0
    both, alone = (image_files(place / f"runs/exp/predict-{n}/images") for n in (1, 2))
    assert sorted(path.stem for path in both) == sorted([*one, *two]) == sorted(path.stem for path in alone)
    for path, other in zip(both, alone, strict=True):
        assert (read_rgb(path) == read_rgb(other)).all()


def test_tasks_of_slurm_share_the_folder_of_their_job_step(tmp_path, monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    folders = []
    for step in ("0", "0", "1"):
        monkeypatch.setenv("SLURM_STEP_ID", step)
        folders.append(shared_folder(tmp_path, "fit", resuming=False))
    assert folders == [tmp_path / name for name in ("fit-7", "fit-7", "fit-7.1")]
    assert all(folder.is_dir() for folder in folders)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Start a run of one task in SLURM's job 7, as its N-th attempt; return the name of its folder."""
    for name in ("LOCAL_RANK", "DERAIN_RUN", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def attempt(number, *arguments, **variables):
        if number:
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return shared_folder(tmp_path, "fit", False, ["fit", *arguments]).name

    return attempt


def test_a_restarted_job_of_one_task_returns_to_its_folder(job):
    assert [job(number, SLURM_NTASKS="1") for number in (0, 1, 3)] == ["fit-7"] * 3


def test_runs_of_one_job_are_told_apart_by_their_command_lines(job):
    runs = [("--data.crop", "64"), ("--data.crop", "128"), ("--data.crop", "64")]
    assert [job(0, *run) for run in runs] == ["fit-7", "fit-7.1", "fit-7.2"]
    assert [job(1, *run) for run in runs] == ["fit-7", "fit-7.1", "fit-7.2"]
    assert job(1, "--data.crop", "32") == "fit-7.3"


def test_runs_in_the_shell_of_an_allocation_are_runs_of_their_own(job):
    shell = {"SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "4"}
    assert [job(0, **shell) for _ in range(3)] == ["fit-7", "fit-7.1", "fit-7.2"]


def test_a_training_in_a_restarted_job_of_one_task_is_resumed(place, job, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert main([*FIT, "--trainer.max_epochs", "2", "--trainer.default_root_dir", "whole"]) == 0
    halves = [*FIT, "--config", "epochs.yaml"]  # the command line stays, as in a job that was interrupted
    for number, epochs in enumerate((1, 2)):
        (place / "epochs.yaml").write_text(f"trainer: {{max_epochs: {epochs}}}")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        assert main(halves) == 0
    assert [path.name for path in (place / "runs/exp").iterdir()] == ["fit-7"]
    run = place / "runs/exp/fit-7"
    assert len(metrics(run, "val/psnr")) == 2
    for name, value in last(run)["state_dict"].items():
        assert torch.equal(value, last(place / "whole/fit-7")["state_dict"][name])
