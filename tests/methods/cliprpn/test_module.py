"""CLIP-RPN as a method: CLIP is beside it and never in it."""

import lightning
import pytest
import torch

from derain.methods import CLIPRPNModule, weights
from derain.methods.clip import FrozenCLIP
from tests.factories import make_clip
from tests.nn.references import SMALL


@pytest.fixture
def method(clip_folder):
    torch.manual_seed(0)
    return CLIPRPNModule(clip=str(clip_folder), **SMALL)


@pytest.fixture
def rainy():
    return torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0))


def saved(method, path):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True, max_steps=0
    )
    trainer.strategy.connect(method)
    trainer.save_checkpoint(path)
    return path


def test_clip_is_in_no_parameters_state_or_file(method, rainy, tmp_path):
    method(rainy)
    clip = method.perception.clip._loaded[0]
    inside = {id(p) for p in clip.parameters()} | {b.data_ptr() for b in clip.buffers()}
    assert not inside & {id(p) for p in method.parameters()}
    own = {f"network.{name}" for name in method.network.state_dict()}
    assert set(method.state_dict()) == own
    assert {name for name, _ in method.named_parameters()} == own
    content = torch.load(saved(method, tmp_path / "a.ckpt"), weights_only=True)
    assert set(content["state_dict"]) == own
    assert content["derain"]["hyper_parameters"]["clip"] == method.perception.clip.name
    assert content["derain"]["clip_sha256"] == method.perception.clip.sha256
    assert not any(p.requires_grad for p in clip.parameters())


def test_building_and_given_routes_need_no_clip(rainy, tmp_path, monkeypatch):
    monkeypatch.setattr(FrozenCLIP, "folder", property(lambda _: pytest.fail("CLIP was looked for")))
    method = CLIPRPNModule(clip=str(tmp_path / "absent"), **SMALL)
    with torch.no_grad():
        derained = method(rainy, [1, 0, 1])
    assert torch.equal(derained, method.network(rainy, [1, 0, 1]).derained.detach())
    for options in ({"perception": "none"}, {"perception": "fixed", "route": 1}):
        other = CLIPRPNModule(clip=str(tmp_path / "absent"), **options, **SMALL)
        assert other.perceive(rainy) == {"routes": [options.get("route", 0)] * 3}
        assert other(rainy).shape == rainy.shape


def test_images_take_the_route_of_their_likest_prompt(method, rainy):
    perceived = method.perceive(rainy)
    pixels = [(image.permute(1, 2, 0) * 255).round().byte().numpy() for image in rainy]
    similarities = method.perception.all_similarities(pixels)
    assert perceived["routes"] == similarities.argmax(1).tolist()
    told = method.describe_image(perceived, 2)
    assert told["prompt"] == method.perception.texts[told["route"]]
    assert sum(told["scores"].values()) == pytest.approx(1, abs=1e-6)
    assert max(told["scores"], key=told["scores"].get) == told["prompt"]


def test_another_clip_than_in_training_is_said(method, rainy, tmp_path, caplog):
    method.perceive(rainy)
    loaded, _ = weights.load(saved(method, tmp_path / "a.ckpt"))
    assert loaded.clip_sha256 == method.clip_sha256
    loaded.perceive(rainy)
    assert "another CLIP" not in caplog.text
    method.hparams["clip"] = str(make_clip(tmp_path / "other", seed=1))
    other, _ = weights.load(saved(method, tmp_path / "b.ckpt"))
    other.perceive(rainy)
    assert "trained with another CLIP" in caplog.text
    assert str(tmp_path / "other") in caplog.text
