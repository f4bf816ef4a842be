"""Configurations that train a tiny network of every method on a few images in seconds."""

from pathlib import Path

import yaml

from tests.factories import make_clip, make_set

RESTORMER_SIZE = {"dim": 8, "blocks": [0, 1, 0, 0], "refinement": 0}
MODELS = {
    "PReNetModule": {"variant": "PReNet", "stages": 2, "milestones": [1, 2]},
    "RestormerModule": {**RESTORMER_SIZE, "warm_up": 0.2},
    "CLIPRPNModule": RESTORMER_SIZE,
    "DACLIPSDEModule": {"contexts": "none", "channels": 8, "multipliers": [1, 2], "sde_steps": 4},
    "DACLIPModule": {},
    "PLNLINGANModule": {
        "channels": 4,
        "stages": [1, 1, 1, 1],
        "hierarchy": 1,
        "heads": 1,
        "unit": "local",
        "discriminator_unit": "local",
        "learning_rate": 1e-3,
        "discriminator_channels": 4,
        "discriminator_stages": 1,
        "generator_steps": 3,
        "milestones": [1, 2],
    },
    "Syn2RealModule": {
        "network_options": {"channels": 4, "base_width": 16, "groups": 1, "parts": 2},
        "unlabelled_share": 0.5,
        "bank": 3,
        "neighbours": 2,
        "schedule_options": {"milestones": [1], "decay": 0.5},
    },
    "SSIDKDModule": {"network_options": {"channels": [2, 3, 4], "repeats": [1, 1, 1], "convolutions": 1}},
}
"""Options of the tiny networks."""

UNLABELLED = {"Syn2RealModule", "SSIDKDModule"}
"""Methods that train on rainy images without ground truth too."""

CHECKPOINT_EVERY_STEP = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {
        "every_n_train_steps": 1,
        "save_top_k": -1,
        "filename": "step-{step}",
        "save_last": False,
        "auto_insert_metric_name": False,
        "save_on_train_epoch_end": False,
    },
}
"""Callback that saves a checkpoint after every optimiser step."""

EMA = {"class_path": "EMA", "init_args": {"decay": 0.9}}


def write_configs(folder: Path, epochs: int = 2) -> Path:
    """Write data, a tiny CLIP, and configurations of every method with four batches of two crops per epoch.

    Returns:
        The folder, with ``METHOD.yaml`` and, with a checkpoint after every step, ``METHOD-steps.yaml``. The data are in
        its folder ``data``, which ``DERAIN_DATA`` must name.
    """
    make_set(folder / "data", "Rain800", "train", count=9, size=(40, 48))
    make_set(folder / "data", "Rain800", "test", count=2, seed=50)
    photos = make_set(folder / "data", "images", "predict", count=5, size=(40, 48), seed=70)
    clip = str(make_clip(folder / "clip"))
    for name, options in MODELS.items():
        clip_option = {"clip": clip} if "CLIP" in name else {}
        unlabelled = {"unlabelled": str(photos)} if name in UNLABELLED else {}
        callbacks = [] if name == "DACLIPModule" else [EMA]
        config = {
            "model": {"class_path": name, "init_args": options | clip_option},
            "data": {"train": "Rain800", "crop": 16, "batch_size": 2, "workers": 0} | unlabelled,
            "trainer": {
                "max_epochs": epochs,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "log_every_n_steps": 1,
                "callbacks": callbacks,
            },
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        config["trainer"]["callbacks"] = [*callbacks, CHECKPOINT_EVERY_STEP]
        (folder / f"{name}-steps.yaml").write_text(yaml.safe_dump(config))
    return folder
