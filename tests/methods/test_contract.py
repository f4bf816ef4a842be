"""The contract of every method."""

import lightning
import pytest
import torch

from derain.methods import DerainModule, catalog

TRANSFORMER = {"dim": 8, "blocks": (1, 1, 1, 1), "refinement": 1, "learning_rate": 5e-3}
SMALL = {
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
}
"""Hyper-parameters that make a method small enough for tests; a method without an entry fails here."""
METHODS = [method for method in catalog.methods() if issubclass(method, DerainModule)]
LEARNT = {"PLNLINGANModule": 1.15}
"""By how much an image learnt by heart is nearer, where not 4 times: SSIM at many scales learns noise slowly."""


@pytest.fixture(params=METHODS, ids=lambda method: method.__name__)
def method(request):
    torch.manual_seed(0)
    return request.param(**SMALL[request.param.__name__])


def batch(count=2, size=(16, 16)):
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(count, 3, *size, generator=generator)
    rainy = (clean + 0.3 * (torch.rand(count, 1, *size, generator=generator) > 0.8)).clamp(0, 1)
    return {
        "rainy": rainy,
        "clean": clean,
        "name": [str(i) for i in range(count)],
        "index": torch.arange(count),
    }


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (37, 31), (64, 48)])
def test_any_size_keeps_its_shape(method, size):
    with torch.no_grad():
        assert method.eval()(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_images_of_a_batch_do_not_meet(method):
    rainy = batch(3)["rainy"]
    with torch.no_grad():
        together = method.eval()(rainy)
        alone = torch.cat([method(image[None]) for image in rainy])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_evaluation_is_deterministic(method):
    rainy = batch()["rainy"]
    with torch.no_grad():
        assert torch.equal(method.eval()(rainy), method(rainy))


def test_it_rebuilds_from_defaults(method):
    assert type(method)().parameter_count > 0


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_bring_back_the_same_method(method, suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    method.trained_on = ("RainTrainL",)
    if suffix == ".ckpt":
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True, max_steps=0
        )
        trainer.strategy.connect(method)
        trainer.save_checkpoint(path)
    else:
        method.save_weights(path)
    loaded, note = catalog.load(path)
    assert type(loaded) is type(method)
    assert type(method).__name__ in note
    assert loaded.metadata() == method.metadata()
    rainy = batch()["rainy"]
    with torch.no_grad():
        assert torch.equal(loaded(rainy), method.eval()(rainy))


def test_gradient_reaches_what_is_trained_and_nothing_else(method, monkeypatch):
    monkeypatch.setattr(type(method), "steps", 10)
    trained, frozen = fit_gradients(method)
    assert trained
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    assert not [name for name, parameter in frozen.items() if parameter.grad is not None]


class KeepGradients(lightning.Callback):
    """Gives parameters their gradients back after optimisers have taken them."""

    def __init__(self):
        self.seen = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen |= {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}

    def on_fit_end(self, trainer, pl_module):
        for name, parameter in pl_module.named_parameters():
            parameter.grad = self.seen.get(name)


def fit_gradients(method):
    method.log = method.log_dict = lambda *args, **kwargs: None
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, callbacks=[KeepGradients()], **quiet)
    trainer.fit(method.train(), torch.utils.data.DataLoader([batch()], batch_size=None))
    named = dict(method.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    return trained, {name: p for name, p in named.items() if not p.requires_grad}


@pytest.mark.slow
def test_one_batch_can_be_learnt_by_heart(method):
    data = batch(2, (24, 24))

    class Repeat(torch.utils.data.Dataset):
        def __len__(self):
            return 150

        def __getitem__(self, place):
            return data

    loader = torch.utils.data.DataLoader(Repeat(), batch_size=None)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, enable_progress_bar=False
    )

    def error():
        with torch.no_grad():
            return (method.eval()(data["rainy"]) - data["clean"]).square().mean()

    before = error()
    trainer.fit(method, loader)
    assert error() < before / LEARNT.get(type(method).__name__, 4)
