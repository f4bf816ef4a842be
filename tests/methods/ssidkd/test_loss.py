"""The losses of SSID-KD's semi-supervised stage against their definitions in NumPy, in float64."""

import numpy as np
import pytest
import torch

from derain.methods.ssidkd.loss import dark_channel, dark_channel_loss, divergence, total_variation


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(0.4, 0.5, size=(2, 3, 9, 12))  # the network's results may leave [0, 1]


def expected_dark_channel(image, window):
    """Return the minima of windows with their first pixel ``window // 2`` above and left of each position."""
    _, height, width = image.shape
    half, even = window // 2, 1 - window % 2
    result = np.empty((height + even, width + even))
    for row in range(height + even):
        for column in range(width + even):
            rows, columns = (slice(max(0, start - half), start - half + window) for start in (row, column))
            result[row, column] = image[:, rows, columns].min()
    return result


@pytest.mark.parametrize("window", [1, 3, 4, 12, 40])
def test_dark_channel(images, window):
    expected = np.stack([expected_dark_channel(image, window) for image in images])[:, None]
    np.testing.assert_array_equal(dark_channel(torch.tensor(images), window).numpy(), expected)


@pytest.mark.parametrize("window", [5, 8])
def test_dark_channel_loss_equals_the_authors_but_for_a_constant(images, window):
    """Theirs is the negative sum of the brightest inverted values, by a pooling in three dimensions."""
    images = torch.tensor(images, requires_grad=True)
    size, padding = (3, window, window), (0, window // 2, window // 2)
    inverted = 1 - (images + 1) / 2
    pooled = torch.nn.functional.max_pool3d(inverted[:, None], size, stride=1, padding=padding)
    expected, found = -pooled.abs().sum(), dark_channel_loss(images, window)
    torch.testing.assert_close(found - pooled.numel(), expected)
    gradients = [torch.autograd.grad(loss, images)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_total_variation(images):
    expected = 0.0
    for image in images.reshape(-1, *images.shape[2:]):
        for (row, column), value in np.ndenumerate(image):
            expected += abs(value - (image[row - 1, column] if row else 0))
            expected += abs(value - (image[row, column - 1] if column else 0))
    np.testing.assert_allclose(total_variation(torch.tensor(images)).item(), expected, rtol=1e-12)


def test_divergence():
    rng = np.random.default_rng(1)
    synthetic, real = rng.normal(size=(2, 2, 5, 3, 4))
    terms = []
    for batch, row, column in np.ndindex(2, 3, 4):
        p, q = (np.exp(code[batch, :, row, column]) for code in (real, synthetic))
        p, q = p / p.sum(), q / q.sum()
        terms.append((p * np.log(p / q)).sum())
    found = divergence(torch.tensor(synthetic), torch.tensor(real))
    np.testing.assert_allclose(found.item(), np.mean(terms) / 5, rtol=1e-12)
    assert divergence(torch.tensor(real), torch.tensor(real)).item() == pytest.approx(0, abs=1e-15)


def test_divergence_reaches_both():
    synthetic, real = torch.rand(2, 1, 4, 2, 2, dtype=torch.float64).requires_grad_().unbind()
    gradients = torch.autograd.grad(divergence(synthetic, real), (synthetic, real))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
