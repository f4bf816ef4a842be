"""Compare a training run that is killed at random times and resumed with an uninterrupted run.

``python -m tests.kills METHOD --kills 5 [--steps]`` prints the position of each resumed checkpoint, and checks that the
last checkpoints are equal to the last bit. With ``--steps``, a checkpoint is saved after every optimiser step.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from derain.cli import main as derain
from tests.runs import differing, last, start
from tests.tiny import MODELS, write_configs

EPOCHS = {"PReNetModule": 12, "DACLIPSDEModule": 16, "CLIPRPNModule": 12, "PLNLINGANModule": 8, "RestormerModule": 12}


def newest(root: Path) -> Path | None:
    """Return the newest checkpoint of all runs in a folder, or None."""
    files = [path for path in root.glob("fit-*/checkpoints/*.ckpt") if not path.name.startswith(".")]
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)


def kill_once(fit: list[str], root: Path, delay: float) -> tuple[bool, str]:
    """Resume the newest checkpoint, and kill the process ``delay`` seconds after it has saved another one.

    Returns:
        Whether the process was killed before it ended; a description of the resumed checkpoint.
    """
    resumed = newest(root)
    options = []
    position = "nothing"
    resumed_time = 0
    if resumed is not None:
        content = torch.load(resumed, weights_only=True)
        batch = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
        options = ["--ckpt_path", str(resumed)]
        position = f"{resumed.name} of step {content['global_step']}, batch {batch} of epoch {content['epoch']}"
        resumed_time = resumed.stat().st_mtime_ns
    process = start(*fit, *options, "--trainer.default_root_dir", str(root))
    try:
        while process.poll() is None:
            checkpoint = newest(root)
            if checkpoint is not None and checkpoint.stat().st_mtime_ns > resumed_time:
                time.sleep(delay)
                break
            time.sleep(0.01)
        running = process.poll() is None
    finally:
        process.kill()
    output, _ = process.communicate()
    assert running or process.returncode == 0, output
    return running, position


def killed_equals_whole(
    method: str,
    folder: Path,
    kills: int,
    steps: bool,
    seed: int = 0,
    max_delay: float = 2.0,
    options: Sequence[str] = (),
) -> int:
    """Compare a training run that is killed up to ``kills`` times with an uninterrupted run.

    Args:
        method: Name of the method's class.
        folder: Folder for both runs.
        kills: Maximum number of kills.
        steps: Whether a checkpoint is saved after every optimiser step.
        seed: Seed of the times between a checkpoint and a kill.
        max_delay: Maximum time between a checkpoint and a kill, in seconds.
        options: Further options of both runs.

    Returns:
        Number of kills before the run ended.

    Raises:
        AssertionError: If weights, averages or the state of the optimisers differ.
    """
    config = f"{method}.yaml"
    if steps:
        content = yaml.safe_load(Path(f"{method}-steps.yaml").read_text())
        one_file = {"save_top_k": 1, "filename": "step", "enable_version_counter": False}
        content["trainer"]["callbacks"][-1]["init_args"] |= one_file
        config = f"{method}-newest.yaml"
        Path(config).write_text(yaml.safe_dump(content))
    fit = ["fit", "--config", config, "--trainer.max_epochs", str(EPOCHS[method]), *options]
    whole, killed = folder / f"whole-{steps}", folder / f"killed-{steps}"
    assert derain([*fit, "--trainer.default_root_dir", str(whole)]) == 0
    delays = random.Random(seed)
    count = 0
    for _ in range(kills):
        was_killed, position = kill_once(fit, killed, delays.uniform(0, max_delay))
        print(f"  {method}: resumed {position}, {'killed' if was_killed else 'ended'}", flush=True)
        if not was_killed:
            break
        count += 1
    if was_killed:
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
    return count


def main() -> int:
    """Run the comparison for one method and print its kills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=list(MODELS))
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_configs(Path(folder))
        os.environ |= {"DERAIN_DATA": f"{folder}/data", "DERAIN_CACHE": f"{folder}/cache"}
        count = killed_equals_whole(options.method, Path(folder), options.kills, options.steps, options.seed)
        print(f"{options.method}: {count} kills, last checkpoints equal to the last bit")
        os.chdir("/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
