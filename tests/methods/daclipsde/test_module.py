"""Lightning module of DA-CLIP + IR-SDE: contexts, the schedule for any number of steps, tiles, training."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from derain import Restorer
from derain.errors import DerainError
from derain.methods import DACLIPSDEModule, PReNetModule, catalog
from derain.methods.daclipsde import sde as formulas
from derain.methods.interfaces import Sampling
from derain.tiles import blend_tiles

TINY = {"channels": 32, "multipliers": (1, 2), "attention": "none", "max_sigma": 10.0}


@pytest.fixture
def module():
    torch.manual_seed(0)
    return DACLIPSDEModule("none", **TINY).eval()


def contextual(clip_folder, contexts="both", **options):
    torch.manual_seed(0)
    return DACLIPSDEModule(contexts, str(clip_folder), context=8, **(TINY | options)).eval()


def batch(count=2, size=16):
    generator = torch.Generator().manual_seed(1)
    clean, rainy = (torch.rand(count, 3, size, size, generator=generator) for _ in range(2))
    return {"rainy": rainy, "clean": clean, "name": ["a"] * count, "index": torch.arange(count)}


def visited(module, sampling):
    """Return the times of the network's calls, and the derained image."""
    times_seen = []
    forward = module.network.forward

    def watch(state, rainy, times, **contexts):
        times_seen.append(int(times[0]))
        return forward(state, rainy, times, **contexts)

    module.network.forward = watch
    module.set_sampling(sampling)
    out = module(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
    module.network.forward = forward
    return times_seen, out


def test_ten_steps_use_the_schedule_of_hundred(module):
    before = module.sde
    hundred, _ = visited(module, Sampling("posterior", 100))
    ten, _ = visited(module, Sampling("posterior", 10))
    assert hundred == list(range(100, 0, -1))
    assert ten == hundred[::10]
    assert module.sde is before


def test_schedule_is_restored_from_weights(module, tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    module.save_weights(file)
    tau = module.sde.tau.clone()
    monkeypatch.setattr(formulas, "theta_schedule", lambda schedule, steps: torch.linspace(1, 2, steps + 1).double())
    loaded = catalog.load(file).module
    assert torch.equal(loaded.sde.tau, tau)
    assert not torch.equal(DACLIPSDEModule("none", **TINY).sde.tau, tau)


def test_sampling_is_not_part_of_weights(module, tmp_path):
    module.set_sampling(Sampling("ode", 3, 7))
    module.save_weights(tmp_path / "w.safetensors")
    assert catalog.load(tmp_path / "w.safetensors").module.sampling == Sampling("posterior")
    assert not {"solver", "steps", "seed", "sampling"} & set(module.hparams)


def test_default_steps_of_a_short_schedule():
    short = DACLIPSDEModule("none", **TINY, sde_steps=4).eval()
    assert short.sampling == Sampling("posterior", 4)
    assert visited(short, short.sampling)[0] == [4, 3, 2, 1]


def test_methods_without_sampling_refuse_a_solver():
    with pytest.raises(DerainError, match="PReNetModule"):
        Restorer(PReNetModule(stages=1), device="cpu", sampling=Sampling())


# Contexts.


@pytest.mark.parametrize(
    ("contexts", "names"),
    [
        ("both", {"content", "degradation"}),
        ("content", {"content"}),
        ("degradation", {"degradation"}),
        ("none", set()),
    ],
)
def test_encode_returns_the_required_contexts(clip_folder, contexts, names):
    module = contextual(clip_folder, contexts)
    conditions = module.encode(torch.rand(2, 3, 20, 20))
    assert set(conditions) == names
    assert all(value.shape == (2, 8) for value in conditions.values())


def test_no_contexts_is_ir_sde():
    """No CLIP and no parameters of contexts: the U-Net of IR-SDE, which test_network.py compares with the reference."""
    module = DACLIPSDEModule("none", channels=32, multipliers=(1, 2))
    assert module.daclip is None
    names = {name for name, _ in module.network.named_parameters()}
    assert not any("transformer" in name or "prompt" in name or "text_mlp" in name for name in names)
    assert module.encode(torch.rand(1, 3, 8, 8)) == {}


@pytest.mark.slow
def test_contexts_are_computed_once_per_image(clip_folder, monkeypatch):
    module = contextual(clip_folder)
    calls = []
    pixels = module.daclip.clip.pixels

    def counted(rainy):
        calls.append(rainy)
        return pixels(rainy)

    monkeypatch.setattr(module.daclip.clip, "pixels", counted)
    module.set_sampling(Sampling("posterior", 2))
    module(torch.rand(1, 3, 20, 20))
    assert len(calls) == 1
    Restorer(module, device="cpu", tile=64, ensemble=True)(np.random.default_rng(0).random((70, 80, 3), np.float32))
    assert len(calls) == 2


def test_contexts_affect_the_result_and_frozen_parts_have_no_gradient(clip_folder):
    module = contextual(clip_folder).train()
    module.log = lambda *args, **kwargs: None
    optimizer = torch.optim.SGD(module.network.parameters(), 0.1)
    for _ in range(2):  # the first step changes layers that are initialised to zero
        optimizer.zero_grad()
        module.training_step(batch(), 0).backward()
        optimizer.step()
    without_gradient = [name for name, value in module.network.named_parameters() if value.grad is None]
    assert without_gradient == []
    controller = module.daclip.controller
    assert all(value.grad is None for value in controller.parameters())
    assert all(value.grad is None for value in module.daclip.clip.model.parameters())
    assert not controller.training
    owned = {id(value) for value in module.parameters()}
    assert not owned & {id(value) for value in controller.parameters()}
    rainy = batch(1)["rainy"]
    plain = module.encode(rainy)
    changed = {name: value + 1 for name, value in plain.items()}
    module.eval()
    for name in plain:
        assert not torch.equal(module(rainy, **plain), module(rainy, **(plain | {name: changed[name]}))), name


def test_embeddings_of_wrong_size_are_refused(clip_folder):
    module = DACLIPSDEModule("both", str(clip_folder), context=512, **TINY)
    with pytest.raises(DerainError, match="context 512"):
        module.fetch_requirements()


def test_description_of_the_degradation(clip_folder):
    module = contextual(clip_folder)
    description = module.describe_image(module.encode(torch.rand(2, 3, 20, 20)), 1)
    assert set(description["degradation"]) == {"rainy", "clean"}
    assert sum(description["degradation"].values()) == pytest.approx(1, abs=1e-3)
    assert contextual(clip_folder, "content").describe_image({}, 0) == {}


def test_weights_record_hashes_of_clip_and_controller(clip_folder, tmp_path, caplog):
    module = contextual(clip_folder)
    module.fetch_requirements()
    module.save_weights(tmp_path / "w.safetensors")
    loaded = catalog.load(tmp_path / "w.safetensors").module
    assert loaded.daclip.hashes == module.daclip.hashes
    assert loaded.daclip.hashes["clip_sha256"] == module.daclip.clip.sha256
    loaded.daclip.hashes["clip_sha256"] = "other"
    loaded.fetch_requirements()
    assert "DERAIN_CLIP" in caplog.text


# Tiles.


def test_tiles_share_the_noise_and_have_no_seams(module):
    """With a pixel-wise network, tiles give the same result as the whole image."""
    torch.manual_seed(0)

    class Pixelwise(torch.nn.Module):
        def forward(self, state, rainy, times, **contexts):
            return (state - rainy) * 3 + 0.1 * torch.sin(times.float())[:, None, None, None]

    module.network = Pixelwise()
    rainy = torch.rand(1, 3, 90, 130)
    for solver in ("posterior", "sde", "mrs-ode2", "mrs-sde2"):
        module.set_sampling(Sampling(solver, 7))
        whole = module(rainy)
        tiled = module(rainy, tiled=partial(blend_tiles, tile=64, overlap=16))
        torch.testing.assert_close(tiled, whole, atol=2e-4, rtol=1e-4)


def test_restorer_tiles_every_step_and_shows_progress(module, monkeypatch):
    sizes, shown = [], []
    forward = module.network.forward

    def watch(state, *args, **kwargs):
        sizes.append(tuple(state.shape[2:]))
        return forward(state, *args, **kwargs)

    module.network.forward = watch
    monkeypatch.setattr("derain.batching.track", lambda steps, label, total: shown.append((label, total)) or steps)
    image = np.random.default_rng(1).random((80, 100, 3), np.float32)
    out = Restorer(module, device="cpu", tile=64, sampling=Sampling(steps=4))(image)
    assert out.shape == image.shape
    assert set(sizes) == {(64, 64)}
    assert len(sizes) == 4 * 2 * 3
    assert shown == [("Sampling", 4)]


def test_restorer_seed(module):
    image = np.random.default_rng(1).random((20, 30, 3), np.float32)
    one, again, other = (
        Restorer(module, device="cpu", sampling=Sampling("posterior", 5, seed))(image) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


# Training.


def test_schedules_of_the_learning_rate(monkeypatch):
    monkeypatch.setattr(DACLIPSDEModule, "steps", 700)
    for decay, expected in (("halving", [1, 0.5, 0.25, 0.125]), ("cosine", None)):
        module = DACLIPSDEModule("none", **TINY, learning_rate=1e-4, decay=decay)
        configured = module.configure_optimizers()
        optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        assert optimizer.defaults["betas"] == (0.9, 0.99)
        assert optimizer.defaults["weight_decay"] == 0
        rates = []
        for _ in range(700):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        if expected:
            assert [rates[step] / 1e-4 for step in (0, 200, 400, 600)] == pytest.approx(expected)
            assert rates[199] == rates[0]
        else:
            assert rates[350] == pytest.approx(1e-6 + (1e-4 - 1e-6) / 2)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)


def test_sampling_is_plain_data():
    module = DACLIPSDEModule("none", **TINY)
    module.set_sampling(Sampling())
    assert dataclasses.asdict(module.sampling) == {"solver": "posterior", "steps": 10, "seed": 0}


def test_preconditioned_network_estimates_the_remaining_noise():
    module = DACLIPSDEModule("none", **TINY, residual=0.1).eval()
    state, rainy = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    times = torch.tensor([3, 90])
    scale, slope, error = module.sde.precondition(times, 0.1, rainy)
    with torch.no_grad():
        estimated = module.network(rainy + scale * (state - rainy), rainy, times)
        noise = module.noise(state, rainy, times)
    torch.testing.assert_close(noise, slope * (state - rainy) + error * estimated)
    plain = DACLIPSDEModule("none", **TINY).eval()
    with torch.no_grad():
        assert torch.equal(plain.noise(state, rainy, times), plain.network(state, rainy, times))


def test_images_are_encoded_on_the_device_of_the_network(clip_folder, monkeypatch):
    module = contextual(clip_folder)
    restorer = Restorer(module, device="cpu", sampling=Sampling(steps=1))
    restorer.device = restorer.scheduler.device = torch.device(
        "meta"
    )  # stands for a GPU: what is perceived must be there
    seen = []
    monkeypatch.setattr(module, "encode", lambda rainy: seen.append(rainy.device.type) or {})
    monkeypatch.setattr(restorer.scheduler, "_restore", lambda images, *_: torch.zeros(len(images), 3, 4, 4))
    restorer(np.zeros((4, 4, 3), np.float32))
    restorer.explain(np.zeros((4, 4, 3), np.float32))
    assert seen == ["meta", "meta"]


def test_published_unet_needs_its_controller(clip_folder):
    state = contextual(clip_folder, attention="linear").network.state_dict()
    module = DACLIPSDEModule.from_published(state)
    with pytest.raises(DerainError, match="DERAIN_CONTROLLER"):
        module.fetch_requirements()
