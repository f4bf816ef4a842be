"""Every method as a network of seconds, on a few images: for what all of them must do in training."""

import os
from pathlib import Path

import yaml

from tests.factories import make_clip, make_set

BLOCKS = {"dim": 8, "blocks": [1, 1, 1, 1], "refinement": 1}
MODELS = {
    "PReNetModule": {"variant": "PReNet", "stages": 2, "milestones": [1, 2]},
    "RestormerModule": {**BLOCKS, "warm_up": 0.2},
    "CLIPRPNModule": BLOCKS,
    "DACLIPSDEModule": {"contexts": "none", "channels": 8, "multipliers": [1, 2], "sde_steps": 4},
    "DACLIPModule": {},
    "PLNLINGANModule": {
        **{"channels": 4, "stages": [1, 1, 1, 1], "hierarchy": 1, "heads": 1, "learning_rate": 1e-3},
        **{"discriminator_channels": 4, "discriminator_stages": 1, "generator_steps": 3, "milestones": [1, 2]},
    },
}
STEPS = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 1, "save_top_k": -1, "filename": "step-{step}", "save_last": False}
    | {"auto_insert_metric_name": False, "save_on_train_epoch_end": False},
}
"""Checkpoint after every optimiser step."""


def write_configs(folder: Path, epochs: int = 2) -> Path:
    """Makes data, a tiny CLIP and ``METHOD.yaml`` of every method: four batches of two crops an epoch."""
    make_set(folder / "data", "Rain800", "train", count=9, size=(64, 64))
    make_set(folder / "data", "Rain800", "test", count=2, seed=50)
    clip = str(make_clip(folder / "clip"))
    os.environ |= {"DERAIN_DATA": str(folder / "data"), "DERAIN_CACHE": str(folder / "cache")}
    for name, options in MODELS.items():
        own = {"clip": clip} if "CLIP" in name else {}
        callbacks = [{"class_path": "EMA", "init_args": {"decay": 0.9}}] * (name != "DACLIPModule")
        config = {
            "model": {"class_path": name, "init_args": options | own},
            "data": {"train": "Rain800", "crop": 56, "batch_size": 2, "workers": 0},
            "trainer": {"max_epochs": epochs, "accelerator": "cpu", "enable_progress_bar": False}
            | {"log_every_n_steps": 1, "callbacks": callbacks},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        steps = config | {"trainer": config["trainer"] | {"callbacks": [*callbacks, STEPS]}}
        (folder / f"{name}-steps.yaml").write_text(yaml.safe_dump(steps))
    return folder
