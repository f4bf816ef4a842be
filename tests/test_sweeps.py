"""Sweeps run as the agent of Weights & Biases runs them; each run's folder has what a server would show."""

import itertools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.factories import make_clip, make_set
from tests.runs import last, metrics

ROOT = Path(__file__).parents[1]
SETS = (("RainTrainL", "train"), ("RainTrainH", "train"), ("Rain800", "train"))
SMALL = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.precision=32"]
SMALL += ["--trainer.max_epochs=2", "--data.val_limit=2", "--data.crop=16", "--data.batch_size=2", "--data.workers=0"]
SMALL += ["--model.dim=8", "--model.blocks=[1,1,1,1]", "--model.refinement=1"]


def grid(sweep):
    """Return every combination of a sweep's values, in the order of the server."""
    choices = {name: choice["values"] for name, choice in sweep["parameters"].items()}
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def agent_command(sweep, values):
    """Return the command line that the agent makes of the sweep's ``command``, by the agent's own functions."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    words = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    words |= {"env": ["/usr/bin/env"], "program": [sweep["program"]]}
    command = []
    for part in utils.create_sweep_command(list(sweep["command"])):
        command += words[part[2:-1]] if part.startswith("${") else [part]
    return command


def offline_records(run, kind):
    """Return the records that ``wandb sync`` would send of an offline run.

    The file has LevelDB's log format after seven bytes: blocks of 32 KiB with records, some in several parts.
    """
    wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    data, position, content, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        remaining = 32768 - position % 32768
        if remaining < 7:  # too short for a header: padding at the end of a block
            position += remaining
            continue
        length, part = struct.unpack_from("<4xHB", data, position)
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part in {1, 4}:  # a whole record, or its last part
            record = wandb_internal_pb2.Record.FromString(content)
            if record.WhichOneof("record_type") == kind:
                records.append(getattr(record, kind))
            content = b""
    return records


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/sweeps/*.yaml")), ids=lambda path: path.stem)
def test_the_agents_command_lines_name_files_and_values(path):
    sweep = yaml.safe_load(path.read_text())
    combinations = grid(sweep)
    assert len(combinations) > 1
    for values in combinations:
        command = agent_command(sweep, values)
        assert command[:3] == ["/usr/bin/env", "derain", "fit"]
        files = [value for option, value in itertools.pairwise(command) if option == "--config"]
        assert all((ROOT / file).is_file() for file in files)
        assert {f"--{name}={value}" for name, value in values.items()} <= set(command)


@pytest.mark.slow
def test_a_run_of_a_sweep_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index, (name, split) in enumerate(SETS):
        make_set(tmp_path / "data", name, split, count=3, seed=100 * index)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    sweep = yaml.safe_load(Path("experiments/sweeps/dls.yaml").read_text())
    values = grid(sweep)[-1]
    command = [*agent_command(sweep, values), *SMALL, f"--model.clip={make_clip(tmp_path / 'clip')}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "sweep-id", "WANDB_RUN_ID": "run-id"}
    environment |= {"WANDB_DATA_DIR": str(tmp_path / "wandb"), "WANDB_CACHE_DIR": str(tmp_path / "wandb")}
    environment |= {"DERAIN_DATA": str(tmp_path / "data")}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    run = Path("runs/mixed/fit-1")
    (start,) = offline_records(run, "run")
    assert (start.run_id, start.sweep_id) == ("run-id", "sweep-id")
    check_config(run, values)
    check_scores_and_panels(run)
    check_artifacts(run)


def check_config(run, values):
    """Check that the run, its configuration and its checkpoint have the values of the sweep."""
    config = {}
    for record in offline_records(run, "config"):
        config |= {item.key: json.loads(item.value_json) for item in record.update}
    for settings in (config, config["config"]["model"]["init_args"], last(run)["hyper_parameters"]):
        assert {f"model.init_args.{name}": settings[name] for name in ("beta", "eta")} == values


def check_scores_and_panels(run):
    """Check that the history has the scores of ``metrics.csv`` and a panel for each."""
    rows = []
    for record in offline_records(run, "history"):
        rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.item})
    scores = [row["val/psnr"] for row in rows if "val/psnr" in row]
    assert scores == pytest.approx([float(row["val/psnr"]) for row in metrics(run, "val/psnr")])
    assert len(scores) == 2
    panels = [name for row in rows for key, names in row.items() if key.endswith("/filenames") for name in names]
    assert len(panels) == 2
    assert all(list(run.glob(f"wandb/offline-run-*/files/{name}")) for name in panels)


def check_artifacts(run):
    """Check that the artifacts are the best and the last checkpoint."""
    artifacts = {
        json.loads(record.metadata)["original_filename"]: record for record in offline_records(run, "artifact")
    }
    aliases = {name: set(artifact.aliases) for name, artifact in artifacts.items()}
    assert aliases == {"best.ckpt": {"best", "latest"}, "last.ckpt": {"latest"}}
    for name, artifact in artifacts.items():
        staged = Path(artifact.manifest.contents[0].local_path).read_bytes()
        assert staged == (run / "checkpoints" / name).read_bytes()
