"""Training on two nodes of two processes, as torchrun and SLURM start them, equals training in one process."""

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
from derain.images import read_rgb
from derain.listing import image_files
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
ONE_PROCESS = ["--data.batch_size", "8"]
NODES = ["--trainer.num_nodes", "2", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]


class ImageRecorder(Callback):
    """Records the images that each rank received."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with Path(f"rank-{trainer.global_rank}.txt").open("a") as file:
            file.writelines(f"{name}\n" for name in batch["name"])

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


RECORDER = [f"--trainer.callbacks+={__name__}.ImageRecorder"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_set(tmp_path / "data", "Rain800", "train", count=16)
    make_set(tmp_path / "data", "Rain800", "test", count=5, seed=50)
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def torchrun(*arguments, nodes):
    """Run derain on nodes of two processes each and return what the nodes printed.

    The processes are forked, which saves them the imports.
    """
    script = Path("node.py")
    script.write_text(
        "import sys\n"
        "from derain.cli import main\n"
        "from tests.forks import read_rank\n"
        "read_rank()\n"
        "assert main(sys.argv[1:]) == 0\n"
    )
    options = ["--nnodes", str(nodes), "--nproc-per-node", "2", "--start-method", "fork", "--run-path"]
    options += ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    processes = []
    for node in range(nodes):
        node_options = [*options, "--node-rank", str(node), str(script)]
        processes.append(start(*node_options, *arguments, program=("-m", "torch.distributed.run")))
    return finish_all(processes)


def sbatch(*arguments):
    """Run the script in experiments/slurm as four tasks with the variables of srun; return what they printed."""
    job = {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "derain-fit",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "2",
        "MASTER_PORT": free_port(),
    }
    srun = Path("bin/srun")
    srun.parent.mkdir()
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')  # prints its arguments
    srun.chmod(0o755)
    environment = os.environ | job | {"PATH": f"{srun.parent.resolve()}:{os.environ['PATH']}"}
    script = ["bash", str(SCRIPT), *arguments]
    output = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout
    program, *command = output.split()
    assert program == "derain"
    processes = []
    for rank in range(4):
        task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2), "SLURM_NODEID": str(rank // 2)}
        processes.append(start(*command, **job, **task))
    return finish_all(processes)


def files(run):
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def images_by_rank(folder, ranks):
    """Return the images that each rank received, in order."""
    return [(folder / f"rank-{rank}.txt").read_text().split() for rank in range(ranks)]


def validation_scores(run):
    return [float(row["val/psnr"]) for row in metrics(run, "val/psnr")]


def assert_same_run(run, expected):
    """Assert that files, scores and weights of two runs are equal, but for the order of additions."""
    assert files(run) == files(expected)
    assert validation_scores(run) == pytest.approx(validation_scores(expected), abs=1e-3)
    expected_state = last(expected)["state_dict"]
    for name, value in last(run)["state_dict"].items():
        torch.testing.assert_close(value, expected_state[name], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_two_nodes_by_torchrun(folder):
    outputs = torchrun(*FIT, *NODES, *RECORDER, nodes=2)
    images = images_by_rank(folder, 4)
    assert [len(names) for names in images] == [4, 4, 4, 4]
    assert len({name for names in images for name in names}) == 16
    assert main([*FIT, *ONE_PROCESS]) == 0
    assert_same_run(folder / "runs/exp/fit-1", folder / "runs/exp/fit-2")
    assert {path.name for path in (folder / "runs/exp").iterdir()} == {"fit-1", "fit-2"}
    assert sum(text.count("derain restore") for text in outputs) == 1


@pytest.mark.slow
def test_a_job_that_slurm_restarts_resumes_on_two_nodes(folder, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main([*FIT, *ONE_PROCESS, "--trainer.max_epochs", "2", "--trainer.default_root_dir", "whole"]) == 0
    assert main([*FIT, *ONE_PROCESS]) == 0
    run = Path("runs/exp/fit-1").rename("runs/exp/fit-4242")
    sbatch("--config", "exp.yaml", "--data.batch_size", "2", *RECORDER, "--trainer.max_epochs", "2")
    assert [len(names) for names in images_by_rank(folder, 4)] == [4, 4, 4, 4]
    assert_same_run(run, folder / "whole/fit-1")
    assert len(metrics(run, "val/psnr")) == 2
    assert list(Path("runs/exp").iterdir()) == [run]


def test_a_second_run_of_a_job_does_not_resume_the_first(folder, capsys, monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    checkpoint = folder / "runs/exp/fit-7/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"of the first run")
    assert main(FIT) == 2
    assert "fit-7" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_restore_every_image_of_a_folder_once(folder):
    make_set(folder, "images", "predict", count=5)
    PReNetModule(stages=1).save_weights(folder / "w.safetensors")
    predict = ["predict", "--config", "exp.yaml", "--data.predict", "images", "--weights", "w.safetensors"]
    torchrun(*predict, *RECORDER, "--trainer.devices", "2", "--trainer.strategy", "ddp", nodes=1)
    first_rank, second_rank = images_by_rank(folder, 2)
    assert (len(first_rank), len(second_rank)) == (3, 2)
    assert main(predict) == 0
    two_ranks = image_files(folder / "runs/exp/predict-1/images")
    one_process = image_files(folder / "runs/exp/predict-2/images")
    names = sorted([*first_rank, *second_rank])
    assert sorted(path.stem for path in two_ranks) == names == sorted(path.stem for path in one_process)
    for path, expected in zip(two_ranks, one_process, strict=True):
        assert (read_rgb(path) == read_rgb(expected)).all()


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
    """Return a function that returns the folder's name of a run in SLURM's job 7, after a number of restarts."""
    for name in ("LOCAL_RANK", "DERAIN_RUN", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def run_folder(restarts, *arguments, **variables):
        if restarts:
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return shared_folder(tmp_path, "fit", False, ["fit", *arguments]).name

    return run_folder


def test_a_restarted_job_of_one_task_uses_its_folder(job):
    assert [job(restarts, SLURM_NTASKS="1") for restarts in (0, 1, 3)] == ["fit-7"] * 3


def test_runs_of_one_job_are_distinguished_by_their_command_lines(job):
    runs = [("--data.crop", "64"), ("--data.crop", "128"), ("--data.crop", "64")]
    assert [job(0, *run) for run in runs] == ["fit-7", "fit-7.1", "fit-7.2"]
    assert [job(1, *run) for run in runs] == ["fit-7", "fit-7.1", "fit-7.2"]
    assert job(1, "--data.crop", "32") == "fit-7.3"


def test_runs_of_an_interactive_job_have_own_folders(job):
    shell = {"SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "4"}
    assert [job(0, **shell) for _ in range(3)] == ["fit-7", "fit-7.1", "fit-7.2"]


def test_a_restarted_job_of_one_task_is_resumed(folder, job, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert main([*FIT, "--trainer.max_epochs", "2", "--trainer.default_root_dir", "whole"]) == 0
    command = [*FIT, "--config", "epochs.yaml"]  # the same for both attempts, as in a restarted job
    for restarts, epochs in enumerate((1, 2)):
        (folder / "epochs.yaml").write_text(f"trainer: {{max_epochs: {epochs}}}")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        assert main(command) == 0
    assert [path.name for path in (folder / "runs/exp").iterdir()] == ["fit-7"]
    run = folder / "runs/exp/fit-7"
    assert len(metrics(run, "val/psnr")) == 2
    expected = last(folder / "whole/fit-7")["state_dict"]
    for name, value in last(run)["state_dict"].items():
        assert torch.equal(value, expected[name])
