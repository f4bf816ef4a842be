"""Losses compared with their formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from derain.methods.daclipsde.loss import contrastive_loss, matching_loss
from derain.methods.daclipsde.sde import MeanRevertingSDE


def test_matching_loss_is_a_weighted_error_of_the_noise():
    sde = MeanRevertingSDE(10.0)
    generator = torch.Generator().manual_seed(0)
    clean, rainy, noise, estimated = (torch.rand(3, 3, 8, 8, generator=generator) for _ in range(4))
    for t, weight in ((1, 7.4e-4), (50, 4.4e-3), (100, 8.2e-3)):
        times = torch.full((3,), t)
        state = sde.diffuse(clean, rainy, times, noise)
        loss = matching_loss(sde, estimated, state, clean, rainy, times)
        theta, sbar = float(sde.speed[t]), float(sde.marginal_std[t])
        exact = 2 * sde.scale**2 * theta * sde.dt / sbar
        assert exact == pytest.approx(weight, rel=0.02)
        # The true noise has no loss, up to the second order of a step.
        least = matching_loss(sde, noise, state, clean, rainy, times)
        assert float(least) < 0.15 * exact
        difference = float((estimated - noise).abs().mean()) * exact
        assert float(loss) == pytest.approx(difference, abs=float(least) + 1e-6)


def test_matching_loss_equals_the_formula():
    sde = MeanRevertingSDE(50.0)
    generator = torch.Generator().manual_seed(1)
    clean, rainy, noise, estimated = (
        torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    t = 30
    theta, dt = float(sde.speed[t]), sde.dt
    cum, before = float(sde.speed[1 : t + 1].sum()), float(sde.speed[1:t].sum())
    a, b, c = math.exp(-theta * dt), math.exp(-cum * dt), math.exp(-before * dt)
    sbar = sde.scale * math.sqrt(1 - b * b)
    x = rainy + (clean - rainy) * b + sbar * noise
    euler = x - (theta * (rainy - x) - 2 * sde.scale**2 * theta * (-estimated / sbar)) * dt
    best = rainy + a * (1 - c * c) / (1 - b * b) * (x - rainy) + c * (1 - a * a) / (1 - b * b) * (clean - rainy)
    loss = matching_loss(sde, estimated.float(), x.float(), clean.float(), rainy.float(), torch.tensor([t, t]))
    assert float(loss) == pytest.approx(float((euler - best).abs().mean()), rel=1e-4)


def test_contrastive_loss_is_the_symmetric_cross_entropy():
    generator = torch.Generator().manual_seed(2)
    images, texts = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = 14.3
    x, y = (features / features.norm(dim=1, keepdim=True) for features in (images, texts))
    total = 0.0
    for i in range(5):
        row = [math.exp(scale * float(x[i] @ y[j])) for j in range(5)]
        column = [math.exp(scale * float(x[j] @ y[i])) for j in range(5)]
        total -= math.log(row[i] / sum(row)) + math.log(column[i] / sum(column))
    loss = contrastive_loss(images.float(), texts.float(), torch.tensor(scale))
    assert float(loss) == pytest.approx(total / 10, rel=1e-5)
    labels = torch.arange(5)
    logits = scale * x @ y.T
    symmetric = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert float(loss) == pytest.approx(float(symmetric), rel=1e-5)
    alone = contrastive_loss(images.float(), texts.float(), torch.tensor(scale), torch.eye(5, dtype=torch.bool))
    assert float(alone) == float(loss)


def test_equal_texts_are_all_correct():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 6, generator=generator)
    words = torch.randn(2, 6, generator=generator)[[0, 1, 0, 1]]
    same = (words[:, None] == words[None]).all(-1)
    loss = contrastive_loss(images, words, torch.tensor(5.0), same)
    p = (5 * F.normalize(images.double(), dim=1) @ F.normalize(words.double(), dim=1).T).exp()
    expected = 0.0
    for i in range(4):
        equal = [j for j in range(4) if j % 2 == i % 2]
        expected -= math.log(float(p[i, equal].sum() / p[i].sum()))
        expected -= math.log(float(p[equal, i].sum() / p[:, i].sum()))
    assert float(loss) == pytest.approx(expected / 8, rel=1e-5)


def test_equal_texts_have_no_gradient():
    images = torch.randn(6, 5, generator=torch.Generator().manual_seed(4), requires_grad=True)
    texts = torch.ones(6, 5)
    contrastive_loss(images, texts, torch.tensor(9.0), torch.ones(6, 6, dtype=torch.bool)).backward()
    assert images.grad.abs().max() < 1e-6
    images.grad = None
    loss = contrastive_loss(images, texts, torch.tensor(9.0))  # as the authors'
    loss.backward()
    assert float(loss) > math.log(6) - 1e-5
    assert images.grad.abs().max() > 1e-3


def test_contrastive_loss_is_float32_under_autocast():
    images = torch.randn(8, 4).bfloat16()
    assert contrastive_loss(images, images, torch.tensor(100.0)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(images.float(), images.float().flip(0), torch.tensor(100.0))
    expected = contrastive_loss(images.float(), images.float().flip(0), torch.tensor(100.0))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
