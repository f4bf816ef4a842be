import copy
import inspect

import jaxtyping
import lightning
import pytest
import torch
from torch._dynamo.utils import counters

from derain.callbacks import CompileBlocks, GradientCheckpointing, TensorFloat32, training_speed
from derain.errors import DerainError
from derain.methods import PReNetModule, RegressionModule, RestormerModule
from derain.nn.blocks import repeated_blocks

TRAINER = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def method():
    torch.manual_seed(0)
    return RestormerModule(dim=8, blocks=[1, 2, 1, 1], refinement=1)


def shallow_method():
    """Return a method whose blocks take less time to compile: they have two numbers of channels instead of four."""
    torch.manual_seed(0)
    options = {"width": 4, "encoder_blocks": [1], "middle_blocks": 1, "decoder_blocks": [1]}
    return RegressionModule(network="NAFNet", network_options=options)


@pytest.mark.parametrize("callback", [GradientCheckpointing, CompileBlocks])
def test_modules_that_are_no_methods_are_refused(callback):
    with pytest.raises(DerainError, match=f"{callback.__name__}: LightningModule"):
        callback().setup(TRAINER, lightning.LightningModule(), "fit")


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        clean = torch.rand(3, 16, 16, generator=generator, dtype=torch.float64)
        return {
            "rainy": clean + 0.1 * torch.rand(3, 16, 16, generator=generator, dtype=torch.float64),
            "clean": clean,
            "name": str(index),
            "index": index,
        }


class Gradients(lightning.Callback):
    """Copies of the gradients before each step."""

    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append([parameter.grad.clone() for parameter in pl_module.network.parameters()])


def train(build, *callbacks):
    module, gradients = build().double(), Gradients()
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, gradients],
    )
    trainer.fit(module, torch.utils.data.DataLoader(Batches()))
    return module, gradients.found


@pytest.fixture(scope="module")
def plain():
    return {build: train(build) for build in (method, shallow_method)}


@pytest.mark.parametrize(
    ("build", "callbacks"),
    [
        (method, lambda: [GradientCheckpointing()]),
        pytest.param(shallow_method, lambda: [CompileBlocks("aot_eager")], marks=pytest.mark.slow),
        pytest.param(
            shallow_method, lambda: [GradientCheckpointing(), CompileBlocks("aot_eager")], marks=pytest.mark.slow
        ),
    ],
    ids=["checkpointing", "compiled", "both"],
)
def test_gradients_weights_and_names_are_the_same(build, callbacks, plain, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch.compile would trace its checks
    monkeypatch.setattr(training_speed, "_recomputed", inspect.unwrap(training_speed._recomputed))
    torch._dynamo.reset()
    counters.clear()
    used = callbacks()
    module, gradients = train(build, *used)
    assert (counters["stats"]["unique_graphs"] > 0) == any(isinstance(callback, CompileBlocks) for callback in used)
    expected, expected_gradients = plain[build]
    assert list(module.state_dict()) == list(expected.state_dict())
    for step, expected_step in zip(gradients, expected_gradients, strict=True):
        for found, wanted in zip(step, expected_step, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    for name, value in expected.state_dict().items():
        assert torch.allclose(module.state_dict()[name], value, rtol=1e-6, atol=1e-9)
    for block in repeated_blocks(module.network):
        assert "forward" not in vars(block)
        assert block._compiled_call_impl is None


def stored_bytes(module):
    """Bytes that the backward pass needs."""
    total = 0

    def count(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        module.network(torch.rand(1, 3, 32, 32))
    return total


def test_checkpointing_stores_less():
    module, callback = method(), GradientCheckpointing()
    full = stored_bytes(module)
    callback.setup(TRAINER, module, "fit")
    assert stored_bytes(module) < 0.4 * full
    copied = copy.deepcopy(module)  # as the EMA callback does
    assert list(copied.state_dict()) == list(module.state_dict())
    callback.teardown(TRAINER, module, "fit")
    assert stored_bytes(module) == full


@pytest.mark.parametrize("callback", [GradientCheckpointing, CompileBlocks])
def test_networks_without_repeated_blocks_are_refused(callback):
    with pytest.raises(DerainError, match=callback.__name__):
        callback().setup(TRAINER, PReNetModule(stages=1), "fit")


def test_batch_normalisation_is_refused():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x)

    module = method()
    module.network = torch.nn.Sequential(Block(), Block())
    with pytest.raises(DerainError, match="Block"):
        GradientCheckpointing().setup(TRAINER, module, "fit")


@pytest.mark.parametrize(
    ("capability", "stage", "precision"),
    [((8, 0), "fit", "high"), ((12, 0), "fit", "high"), ((7, 5), "fit", "highest"), ((8, 0), "test", "highest")],
)
def test_tf32_while_training(monkeypatch, capability, stage, precision):
    monkeypatch.setattr(type(TRAINER.strategy), "root_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    callback, module = TensorFloat32(), lightning.LightningModule()
    callback.setup(TRAINER, module, stage)
    assert torch.get_float32_matmul_precision() == precision
    callback.teardown(TRAINER, module, stage)
    assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_has_no_effect_on_a_cpu(caplog):
    caplog.set_level("INFO", logger="derain")
    TensorFloat32().setup(TRAINER, lightning.LightningModule(), "fit")
    assert torch.get_float32_matmul_precision() == "highest"
    assert "cpu" in caplog.text
