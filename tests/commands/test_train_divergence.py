"""Losses, gradients, weights and scores that are not finite stop the training of any method."""

import copy

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from derain import methods
from derain.cli import main
from derain.errors import DerainError
from derain.methods import DerainModule
from derain.methods.divergence import FiniteCheck, position, require_finite
from tests.runs import last, start
from tests.tiny import MODELS

METHODS = [
    "PReNetModule",  # hooks of DerainModule
    pytest.param("PLNLINGANModule", marks=pytest.mark.slow),  # optimises manually, and checks before its own steps
    pytest.param("DACLIPModule", marks=pytest.mark.slow),  # a TrainableModule; changes its weights after each step
    pytest.param("Syn2RealModule", marks=pytest.mark.slow),  # changes gradients after backward, as RegressionModule
]
"""One method for each way to reach the optimiser's step."""


def assert_files_finite(run):
    assert not (run / "weights.safetensors").exists()
    for file in (run / "checkpoints").glob("*"):
        content = torch.load(file, weights_only=True)
        tensors = [*content["state_dict"].values(), *content.get("ema", {"network": {}})["network"].values()]
        assert all(value.isfinite().all() for value in tensors)


@pytest.mark.parametrize("method", METHODS)
def test_a_learning_rate_that_is_too_high(all_methods, capsys, method):
    options = ["--model.learning_rate", "1e30"]
    options += ["--model.warm_up", "0"] if "warm_up" in MODELS[method] or method == "DACLIPModule" else []
    assert main(["fit", "--config", f"{method}.yaml", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "epoch 0, step" in error
    assert_files_finite(all_methods / f"runs/{method}/fit-1")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_anomaly_detection(all_methods, capsys, monkeypatch, method):
    backward = LightningModule.backward
    monkeypatch.setattr(LightningModule, "backward", lambda self, loss: backward(self, loss + (loss * 0).sqrt() * 0))
    assert main(["fit", "--config", f"{method}.yaml", "--trainer.detect_anomaly", "true"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "gradient" in error
    assert "epoch 0, step 0" in error
    assert_files_finite(all_methods / f"runs/{method}/fit-1")


@pytest.mark.parametrize(
    ("method", "accumulate"),
    [
        pytest.param(name, accumulate, marks=[pytest.mark.slow] * (name != "PReNetModule"))
        for name in MODELS
        for accumulate in ((1, 2) if name in {"PReNetModule", "PLNLINGANModule"} else (2,))
    ],
)
def test_images_that_are_not_finite_are_named(all_methods, capsys, monkeypatch, method, accumulate):
    cls = getattr(methods, method)
    kept, spoiled = cls.training_step, []

    def spoil(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 2:
            spoiled.extend(batch["name"])
            batch = copy.copy(batch) | {"rainy": torch.full_like(batch["rainy"], float("nan"))}
        return kept(self, batch, batch_idx)

    monkeypatch.setattr(cls, "training_step", spoil)
    manual = method == "PLNLINGANModule"
    option = "--model.accumulate" if manual else "--trainer.accumulate_grad_batches"
    joint = ["--model.phases", "joint"] if method == "Syn2RealModule" else []  # else this batch's pairs are unused
    assert main(["fit", "--config", f"{method}.yaml", option, str(accumulate), *joint]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"epoch 1, step {4 // accumulate + 2 // accumulate}," in error
    assert all(name in error for name in spoiled)
    run = all_methods / f"runs/{method}/fit-1"
    assert last(run)["global_step"] == 4 // accumulate
    assert_files_finite(run)


def test_scores_that_are_not_finite_keep_the_best_checkpoint(all_methods, capsys, monkeypatch):
    kept, spoiled = DerainModule.validation_step, []

    def spoil(self, batch, batch_idx):
        if self.current_epoch == 1:
            spoiled.extend(batch["name"])
            batch = copy.copy(batch) | {"rainy": batch["rainy"] * float("nan")}
        return kept(self, batch, batch_idx)

    monkeypatch.setattr(DerainModule, "validation_step", spoil)
    assert main(["fit", "--config", "PReNetModule.yaml", "--data.val", "Rain800"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert len(spoiled) == 2
    assert f"epoch 1, step 10, images {', '.join(spoiled)};" in error
    run = all_methods / "runs/PReNetModule/fit-1"
    assert {last(run)["epoch"], torch.load(run / "checkpoints/best.ckpt", weights_only=True)["epoch"]} == {0}
    assert_files_finite(run)


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(all_methods, capsys, monkeypatch):
    cls = methods.PReNetModule

    def spoil(self):
        if self.current_epoch == 1:
            next(self.parameters()).data[0] = float("inf")

    monkeypatch.setattr(cls, "on_train_epoch_end", spoil)
    assert main(["fit", "--config", "PReNetModule.yaml"]) == 2
    assert "epoch 1" in capsys.readouterr().err
    run = all_methods / "runs/PReNetModule/fit-1"
    assert last(run)["epoch"] == 0
    assert_files_finite(run)


@pytest.mark.slow
def test_two_processes_stop_together(all_methods):
    """The loss of one rank is not finite, which the other rank cannot see in its gradient."""
    script = all_methods / "ranks.py"
    script.write_text(
        "import sys, torch\n"
        "from derain.cli import main\n"
        "from derain.methods import PReNetModule\n"
        "kept = PReNetModule.training_step\n"
        "def spoil(self, batch, batch_idx):\n"
        "    loss = kept(self, batch, batch_idx)\n"
        "    return loss + float('nan') if self.global_rank == 1 and batch_idx == 2 else loss\n"
        "PReNetModule.training_step = spoil\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "1"]
    process = start("fit", "--config", "PReNetModule.yaml", *two, program=(str(script),))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert "epoch 0, step 2" in output
    assert_files_finite(all_methods / "runs/PReNetModule/fit-1")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_stop_together_after_validation(all_methods, rank):
    """The image of one rank is not finite; the other rank waits for its scores."""
    script = all_methods / "ranks.py"
    script.write_text(
        "import sys\n"
        "from derain.cli import main\n"
        "from derain.methods import PReNetModule\n"
        "kept = PReNetModule.forward\n"
        "def spoil(self, rainy):\n"
        f"    spoiled = not self.training and self.global_rank == {rank} and self.global_step\n"
        "    return kept(self, rainy) * (float('nan') if spoiled else 1)\n"
        "PReNetModule.forward = spoil\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "1", "--data.val", "Rain800"]
    process = start("fit", "--config", "PReNetModule.yaml", *two, program=(str(script),))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert f"epoch 0, step 5, images {rank + 1};" in output
    assert_files_finite(all_methods / "runs/PReNetModule/fit-1")


class Scaled(LightningModule):
    """A weight whose gradient overflows if the loss is scaled by more than ``finite_from``."""

    def __init__(self, finite_from):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.finite, self.finite_from, self.seen = FiniteCheck(), finite_from, []

    def training_step(self, batch, batch_idx):
        loss = self.weight.sum()
        self.weight.register_hook(self._overflow) if not self.seen else None
        self.seen.append(self.trainer.precision_plugin.scaler.get_scale())
        return loss

    def _overflow(self, gradient):
        scale = self.trainer.precision_plugin.scaler.get_scale()
        return gradient if scale <= self.finite_from else gradient * float("inf")

    def on_before_backward(self, loss):
        self.finite.record_loss(loss)

    def on_before_optimizer_step(self, optimizer):
        self.finite.check(self, optimizer)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("finite_from", [2.0, 0.25])
def test_the_scaler_handles_an_infinite_gradient_while_losses_are_scaled(finite_from):
    module = Scaled(finite_from)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000))
    trainer = Trainer(
        **{"accelerator": "cpu", "max_steps": 6, "logger": False, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "plugins": plugin},
    )
    loader = torch.utils.data.DataLoader(torch.zeros(8, 1))
    if finite_from < 1:
        with pytest.raises(DerainError, match="gradient"):
            trainer.fit(module, loader)
        assert torch.equal(module.weight, torch.ones(2))
    else:
        trainer.fit(module, loader)
        assert module.seen[:3] == [8.0, 4.0, 2.0]
        assert module.weight.isfinite().all()
        assert (module.weight < 1).all()


@pytest.mark.parametrize("scaled", [True, False])
def test_half_accumulated_gradients_may_overflow_while_losses_are_scaled(scaled, monkeypatch):
    module = methods.PReNetModule(stages=1)
    plugins = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")) if scaled else None
    module.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", plugins=plugins)
    module.trainer.state.fn = "fit"
    monkeypatch.setattr(module, "_accumulated_gradients", lambda: {"network.x": torch.tensor([float("inf")])})
    checkpoint = {}
    if scaled:
        module.on_save_checkpoint(checkpoint)
        assert "gradients" in checkpoint
    else:
        with pytest.raises(DerainError, match="weights"):
            module.on_save_checkpoint(checkpoint)


def test_large_values_are_finite():
    module = methods.PReNetModule(stages=1)
    with pytest.raises(DerainError):
        require_finite(_attached(module), [torch.tensor([1.0, float("-inf")])], "weights are")
    require_finite(_attached(module), [torch.full((9,), 1e30), torch.ones(2, dtype=torch.int64)], "weights are")
    require_finite(_attached(module), [], "weights are")


def test_a_batch_without_names_is_not_that_of_another_device():
    module = _attached(methods.PReNetModule(stages=1))
    assert "device" not in position(module, [])
    assert "device" in position(module, None)
    assert "a.png" in position(module, ["a.png"])


def _attached(module):
    module.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    return module
