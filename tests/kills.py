"""Compare a training that is killed at random moments and resumed with an uninterrupted one.

``python -m tests.kills METHOD --kills 5 [--steps]`` prints where each kill hit and whether the last checkpoints are
equal to the last bit; with ``--steps``, a checkpoint is saved after every optimiser step.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from derain.cli import main as derain
from tests.runs import differing, last, start
from tests.tiny import MODELS, write_configs

EPOCHS = {"PReNetModule": 24, "DACLIPSDEModule": 16, "CLIPRPNModule": 12, "PLNLINGANModule": 8, "RestormerModule": 12}


def newest(root: Path) -> Path | None:
    """Return the newest checkpoint of all runs in a folder."""
    files = [path for path in root.glob("fit-*/checkpoints/*.ckpt") if not path.name.startswith(".")]
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)


def kill_once(fit: list[str], root: Path, delay: float) -> tuple[bool, str]:
    """Resume the newest checkpoint, and kill the process some seconds after it has saved another one.

    Returns:
        Whether it was killed before it ended; a description of the resumed checkpoint.
    """
    before = newest(root)
    resume = [] if before is None else ["--ckpt_path", str(before)]
    position = "nothing"
    if before is not None:
        content = torch.load(before, weights_only=True)
        batch = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
        position = f"{before.name} of step {content['global_step']}, batch {batch} of epoch {content['epoch']}"
    stamp = 0 if before is None else before.stat().st_mtime_ns
    process = start(*fit, *resume, "--trainer.default_root_dir", str(root))
    try:
        while process.poll() is None:
            checkpoint = newest(root)
            if checkpoint is not None and checkpoint.stat().st_mtime_ns > stamp:
                time.sleep(delay)
                break
            time.sleep(0.01)
        alive = process.poll() is None
    finally:
        process.kill()
    output, _ = process.communicate()
    assert alive or process.returncode == 0, output
    return alive, position


def killed_equals_whole(method: str, folder: Path, kills: int, steps: bool, seed: int = 0, slowest: float = 2.0) -> int:
    """Compare a training that is killed ``kills`` times with an uninterrupted one.

    Returns:
        Number of kills before the training ended.

    Raises:
        AssertionError: If weights, averages or the state of the optimisers differ.
    """
    config = f"{method}.yaml"
    if steps:
        content = yaml.safe_load(Path(f"{method}-steps.yaml").read_text())
        newest_only = {"save_top_k": 1, "filename": "step", "enable_version_counter": False}
        content["trainer"]["callbacks"][-1]["init_args"] |= newest_only
        config = f"{method}-newest.yaml"
        Path(config).write_text(yaml.safe_dump(content))
    fit = ["fit", "--config", config, "--trainer.max_epochs", str(EPOCHS[method])]
    whole, killed = folder / f"whole-{steps}", folder / f"killed-{steps}"
    assert derain([*fit, "--trainer.default_root_dir", str(whole)]) == 0
    moments, hits = random.Random(seed), 0
    for _ in range(kills):
        alive, position = kill_once(fit, killed, moments.uniform(0, slowest))
        print(f"  {method}: resumed {position}, {'killed' if alive else 'ended'}", flush=True)
        hits += alive
        if not alive:
            break
    if alive:
        checkpoint = newest(killed)
        assert derain([*fit, "--ckpt_path", str(checkpoint), "--trainer.default_root_dir", str(killed)]) == 0
    finished = newest(killed)
    assert finished is not None
    expected, actual = last(whole / "fit-1"), torch.load(finished.with_name("last.ckpt"), weights_only=True)
    for state in ("state_dict", "ema"):
        assert differing(expected.get(state, {}), actual.get(state, {})) == []
    for first, second in zip(expected["optimizer_states"], actual["optimizer_states"], strict=True):
        assert differing(first["state"], second["state"]) == []
    assert expected["global_step"] == actual["global_step"]
    return hits


def main() -> int:
    """Print the kills of one method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=list(MODELS))
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_configs(Path(folder))
        hits = killed_equals_whole(options.method, Path(folder), options.kills, options.steps, options.seed)
        print(f"{options.method}: {hits} kills, last checkpoints equal to the last bit")
        os.chdir("/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
