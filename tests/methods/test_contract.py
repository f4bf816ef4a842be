"""The contract, for every method of derain and for methods that break it."""

import importlib.util

import lightning
import pytest
import torch

from derain.methods import DerainModule, catalog
from derain.testing import ContractError, check_method, make_batch

TRANSFORMER = {"dim": 8, "blocks": (0, 1, 0, 0), "refinement": 0, "learning_rate": 5e-3}
SMALL = {
    "AirNetModule": {"network_options": {"channels": 4, "groups": 1, "blocks": 1}, "encoder_epochs": 0},
    "PReNetModule": {"stages": 2},
    "DACLIPSDEModule": {
        "contexts": "none",
        "channels": 16,
        "multipliers": (1, 2),
        "attention": "none",
        "max_sigma": 10.0,
        "learning_rate": 4e-3,
    },
    "PLNLINGANModule": {
        "channels": 8,
        "stages": (1, 1, 1, 1),
        "hierarchy": 1,
        "heads": 1,
        "discriminator_channels": 4,
        "discriminator_stages": 1,
        "generator_steps": 1,
        "learning_rate": 2e-3,
        "clip": 1.0,
    },
    "RestormerModule": TRANSFORMER,
    "CLIPRPNModule": TRANSFORMER | {"perception": "none"},
    "Syn2RealModule": {
        "network_options": {"channels": 8, "base_width": 16, "groups": 2, "parts": 3},
        "schedule": "constant",
        "learning_rate": 5e-3,
    },
    "SSIDKDModule": {
        "network_options": {"channels": [4, 4, 4], "repeats": [1, 1, 1], "convolutions": 1},
        "window": 16,
        "learning_rate": 5e-3,
    },
    "RegressionModule": {
        "network": "RESCAN",
        "network_options": {"channels": 8, "iterations": 2},
        "schedule": "constant",
        "learning_rate": 5e-3,
    },
}
"""Hyper-parameters of small networks; a method without an entry is built with its defaults."""
OVERFITTED = {"PLNLINGANModule": 1.15, "RegressionModule": 1.15, "SSIDKDModule": 1.15, "Syn2RealModule": 2}
"""Factor by which the error of an overfitted batch falls if not 4: SSIM at many scales learns noise slowly."""
STEPS = {"PLNLINGANModule": 100}
"""Largest number of steps that overfit a batch if not 150."""
FASTER = {"PLNLINGANModule": {"unit": "local", "discriminator_unit": "local"}}
"""Further hyper-parameters where a method is trained for many steps."""
LARGE = {"CLIPRPNModule", "PLNLINGANModule"}
"""Methods whose graphs take long to trace, however small their networks."""
METHODS = [method for method in catalog.methods() if issubclass(method, DerainModule)]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=method.__name__, marks=[pytest.mark.slow] if method.__name__ in LARGE else [])
        for method in METHODS
    ],
)
def test_methods_keep_the_contract(method):
    check_method(method, can_export=False, **SMALL.get(method.__name__, {}))  # exports: test_onnx_model.py


class Plain(DerainModule):
    """Keeps the contract."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, rainy):
        return rainy - self.network(rainy)

    def training_step(self, batch, batch_idx):
        return (self(batch["rainy"]) - batch["clean"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class NoDefault(Plain):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)


class NoType(Plain):
    def __init__(self, channels=4) -> None:
        super().__init__(channels)


class NotRecorded(Plain):
    def __init__(self, channels: int = 4) -> None:
        super().__init__(channels)
        self.hparams.pop("channels")


class NeverRecorded(Plain):
    def __init__(self, channels: int = 4, width: int = 3) -> None:
        super().__init__(channels)
        self.hparams.pop("width")


class NoNetwork(Plain):
    def __init__(self, channels: int = 4) -> None:
        super().__init__(channels)
        self.body = self.network
        del self.network


class Crops(Plain):
    def forward(self, rainy):
        return super().forward(rainy)[..., :30]


class Random(Plain):
    def forward(self, rainy):
        return super().forward(rainy) + torch.rand(())


class Mixes(Plain):
    def forward(self, rainy):
        return super().forward(rainy) + rainy.mean()


class Outside(Plain):
    """Has a weight that is not part of the network."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__(channels)
        self.scale = torch.nn.Parameter(torch.rand(()))

    def forward(self, rainy):
        return super().forward(rainy) * self.scale


class Unused(Plain):
    def __init__(self, channels: int = 4) -> None:
        super().__init__(channels)
        self.network.unused = torch.nn.Parameter(torch.zeros(3))


class NaN(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("nan")


class Variadic(Plain):
    def __init__(self, channels: int = 4, **options: int) -> None:
        super().__init__(channels)


@pytest.mark.parametrize("method", [Plain, Variadic])
def test_a_plain_method_keeps_the_contract(method):
    check_method(method)


def test_a_skipped_export_is_reported(monkeypatch, caplog):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    check_method(Plain)
    assert "onnxruntime" in caplog.text


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (NoDefault, "channels"),
        (NoType, "channels"),
        (NotRecorded, "channels"),
        (NeverRecorded, "width"),
        (NoNetwork, "network"),
        (Crops, "30"),
        (Random, "deterministic"),
        (Mixes, "batch"),
        (Outside, "safetensors"),
        (Unused, "network.unused"),
        (NaN, "0.png"),
    ],
)
def test_broken_contracts_are_found(method, message):
    with pytest.raises(ContractError, match=message):
        check_method(method, can_export=False, channels=4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_one_batch_can_be_overfitted(method):
    torch.manual_seed(0)
    module = method(**SMALL.get(method.__name__, {}) | FASTER.get(method.__name__, {}))
    batch = make_batch(2, 24, 24)
    loader = torch.utils.data.DataLoader([batch] * STEPS.get(method.__name__, 150), batch_size=None)

    def error():
        with torch.no_grad():
            return (module.eval()(batch["rainy"]) - batch["clean"]).square().mean()

    overfitted = error() / OVERFITTED.get(method.__name__, 4)

    class Stop(lightning.Callback):
        """Ends the training when the batch is overfitted."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx % 10 == 9:
                trainer.should_stop = bool(error() < overfitted)
                module.train()

    trainer = lightning.Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        **{"max_epochs": 1, "limit_val_batches": 0, "callbacks": [Stop()]},
    )
    trainer.fit(module.train(), loader, val_dataloaders=[])
    assert error() < overfitted
