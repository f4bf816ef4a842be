"""Training step of CLIP-RPN: growth of the exponent and weights of the losses."""

from types import SimpleNamespace

import pytest
import torch

from derain.methods import CLIPRPNModule

NETWORK = {"perception": "none", "dim": 8, "blocks": (1, 1, 1, 1), "refinement": 1}


def train_one_step(monkeypatch, step, **options):
    """Return loss, gradient of the output convolution, logged values and absolute error at a step of 100."""
    torch.manual_seed(0)
    method = CLIPRPNModule(**NETWORK, **options)
    monkeypatch.setattr(CLIPRPNModule, "steps", 100)
    method._trainer = SimpleNamespace(global_step=step)
    logged = {}
    method.log = lambda name, value, **_: logged.update({name: float(value)})
    method.log_dict = lambda parts, **_: logged.update({name: float(value) for name, value in parts.items()})
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(2, 3, 16, 16, generator=generator)
    rainy = (clean + 0.3 * (torch.rand(2, 1, 16, 16, generator=generator) > 0.7)).clamp(0, 1)
    loss = method.training_step({"rainy": rainy, "clean": clean, "name": ["0", "1"], "index": torch.arange(2)}, 0)
    loss.backward()
    derained = method(rainy)
    return loss.item(), method.network.backbone.output.weight.grad, logged, (derained - clean).abs().detach()


@pytest.mark.parametrize(("step", "power"), [(0, 0.8), (50, 1.95), (100, 3.1)])
def test_the_parts_of_the_loss(monkeypatch, step, power):
    loss, _, logged, error = train_one_step(monkeypatch, step)
    assert logged["train/exponent"] == pytest.approx(power)
    assert logged["train/reconstruction"] == pytest.approx(float((error.double() + 1e-6).pow(power).mean()), rel=1e-5)
    masks = sum(logged[f"train/mask_{level}"] for level in (1, 2, 3))
    assert loss == pytest.approx(logged["train/reconstruction"] + 0.1 * masks, rel=1e-6)


def test_rescale_scales_loss_and_gradient_to_the_mean_error(monkeypatch):
    _, plain, logged, error = train_one_step(monkeypatch, 90, mask_weight=0.0)
    loss, scaled, _, _ = train_one_step(monkeypatch, 90, mask_weight=0.0, rescale=True)
    assert loss == pytest.approx(float(error.mean()), rel=1e-5)
    torch.testing.assert_close(
        scaled, plain * float(error.mean()) / logged["train/reconstruction"], rtol=1e-4, atol=1e-9
    )


def test_no_mask_loss_without_masks(monkeypatch):
    loss, _, logged, _ = train_one_step(monkeypatch, 0, mgca=False)
    assert loss == pytest.approx(logged["train/reconstruction"])
    assert not [name for name in logged if "mask" in name]
