"""A sweep runs as the agent of Weights & Biases runs it, and leaves in each run's folder what a server would show."""

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
    """Every combination of a sweep's values, as the server hands them out."""
    choices = {name: choice["values"] for name, choice in sweep["parameters"].items()}
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def agents_command(sweep, chosen):
    """The command line that the agent makes of the sweep's ``command``, by its own functions."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    filled = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    filled |= {"env": ["/usr/bin/env"], "program": [sweep["program"]]}
    parts = utils.create_sweep_command(list(sweep["command"]))
    return [word for part in parts for word in (filled[part[2:-1]] if part.startswith("${") else [part])]


def offline_records(run, kind):
    """What ``wandb sync`` would send of a run that was kept offline: LevelDB's log format behind seven bytes."""
    wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    data, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no header fits into what is left of the block
            at += left
            continue
        length, part = struct.unpack_from("<4xHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in {1, 4}:  # all of a record, or its last part
            record = wandb_internal_pb2.Record.FromString(whole)
            found += [getattr(record, kind)] if record.WhichOneof("record_type") == kind else []
            whole = b""
    return found


@pytest.mark.slow
def test_the_four_runs_of_a_sweep_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, (name, split) in enumerate(SETS):
        make_set(tmp_path / "data", name, split, count=3, seed=100 * place)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    sweep = yaml.safe_load(Path("experiments/sweeps/dls.yaml").read_text())
    told = grid(sweep)
    assert len(told) == 4
    small = [*SMALL, f"--model.clip={make_clip(tmp_path / 'clip')}"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}  # as a service's
    variables = inherited | {
        **{"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        **{"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "asweep", "DERAIN_DATA": str(tmp_path / "data")},
        **{"WANDB_DATA_DIR": str(tmp_path / "wandb"), "WANDB_CACHE_DIR": str(tmp_path / "wandb")},
    }
    for place, chosen in enumerate(told):
        command = [*agents_command(sweep, chosen), *small]
        named = variables | {"WANDB_RUN_ID": f"run{place}"}
        done = subprocess.run(command, env=named, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    for place, chosen in enumerate(told):
        run = Path(f"runs/mixed/fit-{place + 1}")
        (begun,) = offline_records(run, "run")
        assert (begun.run_id, begun.sweep_id) == (f"run{place}", "asweep")
        config = {
            item.key: json.loads(item.value_json) for one in offline_records(run, "config") for item in one.update
        }
        for settings in (config, config["config"]["model"]["init_args"], last(run)["hyper_parameters"]):
            assert {f"model.init_args.{name}": settings[name] for name in ("beta", "eta")} == chosen
        rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.item}
            for one in offline_records(run, "history")
        ]
        scores = [row["val/psnr"] for row in rows if "val/psnr" in row]
        assert scores == pytest.approx([float(row["val/psnr"]) for row in metrics(run, "val/psnr")])
        panels = [name for row in rows for key, names in row.items() if key.endswith("/filenames") for name in names]
        assert len(scores) == 2
        assert len(panels) == 2
        assert all(list(run.glob(f"wandb/offline-run-*/files/{name}")) for name in panels)
        sent = {json.loads(one.metadata)["original_filename"]: one for one in offline_records(run, "artifact")}
        assert {name: set(one.aliases) for name, one in sent.items()} == {
            "best.ckpt": {"best", "latest"},
            "last.ckpt": {"latest"},
        }
        for name, one in sent.items():
            staged = Path(one.manifest.contents[0].local_path).read_bytes()
            assert staged == (run / "checkpoints" / name).read_bytes()
