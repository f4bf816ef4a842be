"""Losses compared with the printed formulas in float64, and the pyramid with OpenCV's."""

import cv2
import numpy as np
import pytest
import torch

from derain.methods.plnlingan.loss import (
    ADVERSARIAL,
    HIERARCHICAL,
    hierarchical_losses,
    pyramid,
    relativistic_losses,
    weighted_sum,
)
from derain.nn.ssim import structural_similarity
from tests.methods.plnlingan.references import adversarial


def maps(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(2, 1, 8 >> k, 12 >> k, generator=generator, dtype=torch.float64).to(dtype) for k in (0, 1)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_relativistic_losses_equal_eq_8_and_its_reverse(dtype, tolerance):
    real, fake = maps(0, dtype), maps(1, dtype)
    generator_losses = relativistic_losses(fake, real)
    discriminator_losses = relativistic_losses(real, fake)
    for scale in range(len(real)):
        generator, discriminator = adversarial(real[scale].double(), fake[scale].double())
        assert generator_losses[scale].item() == pytest.approx(generator.item(), rel=tolerance)
        assert discriminator_losses[scale].item() == pytest.approx(discriminator.item(), rel=tolerance)
    assert not torch.isclose(generator_losses[0], discriminator_losses[0])


def test_large_logits_and_bfloat16_stay_finite():
    high, low = [torch.full((1, 1, 2, 2), 500.0)], [torch.full((1, 1, 2, 2), -500.0)]
    assert relativistic_losses(high, low)[0] == 0
    assert relativistic_losses(low, high)[0] == 2000
    with torch.autocast("cpu", torch.bfloat16):
        loss = relativistic_losses([high[0].bfloat16()], [low[0].bfloat16()])[0]
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("size", [(112, 112), (57, 80), (37, 31)])
def test_pyramid_equals_opencv(size):
    image = np.random.default_rng(0).random((*size, 3))
    ours = pyramid(torch.from_numpy(image).permute(2, 0, 1)[None], 4)
    for level in ours:
        np.testing.assert_allclose(level[0].permute(1, 2, 0).numpy(), image, atol=1e-12)
        image = cv2.pyrDown(image)


def test_pyramid_ignores_autocast():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = pyramid(image, 4)
    assert all(torch.equal(level, exact) for level, exact in zip(rounded, pyramid(image, 4), strict=True))


def test_hierarchical_losses_are_ssim_of_each_scale():
    clean = torch.rand(1, 3, 56, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = pyramid(clean, 4)
    assert all(loss.abs() < 1e-12 for loss in hierarchical_losses(targets, clean))
    images = [torch.rand_like(target) for target in targets]
    expected = [1 - structural_similarity(x, y) for x, y in zip(images, targets, strict=True)]
    assert hierarchical_losses(images, clean) == expected


def test_loss_weights_equal_the_paper():
    assert HIERARCHICAL == (0.1, 0.05, 0.02, 0.01)
    assert ADVERSARIAL == (0.0005, 0.001, 0.0025, 0.005)
    one = torch.tensor(1.0, dtype=torch.float64)
    parts = {"pixel": [2 * one], "hierarchical": [one, 2 * one, 3 * one, 4 * one], "generator": [one] * 4}
    expected = 2 + 3 * (0.1 + 0.1 + 0.06 + 0.04) + 5 * 0.009
    assert weighted_sum(parts, 3.0, 5.0).item() == pytest.approx(expected, rel=1e-12)
    assert weighted_sum({"discriminator": [one]}, 1.0, 1.0).item() == pytest.approx(0.005)
