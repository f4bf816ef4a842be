"""The Gaussian process against its definition in NumPy, in float64."""

import numpy as np
import pytest
import torch

from derain.methods.syn2real.loss import gaussian_process_loss, posterior


def kernel(first, second):
    return np.array([[u @ v / (np.sqrt(u @ u) * np.sqrt(v @ v)) for v in second] for u in first])


def expected_posterior(latent, examples, noise=1.0):
    """Condition the joint Gaussian of noisy examples and the latent vector, by the inverse of its precision."""
    count = len(examples)
    joint = kernel([*examples, latent], [*examples, latent]) + noise * np.eye(count + 1)
    precision = np.linalg.inv(joint)
    variance = 1 / precision[-1, -1]
    return -variance * precision[-1, :-1] @ examples, variance


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_posterior(rng, noise):
    latents, examples = rng.normal(size=(3, 20)), rng.normal(size=(3, 5, 20)) + 0.5
    found = posterior(torch.tensor(latents), torch.tensor(examples), noise)
    for index in range(3):
        mean, variance = expected_posterior(latents[index], examples[index], noise)
        np.testing.assert_allclose(found.mean[index].numpy(), mean, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.variance[index].item(), variance, rtol=1e-10)


def test_posterior_of_examples_that_equal_the_latent_vector(rng):
    latent = torch.tensor(rng.normal(size=(1, 20)))
    for count in (1, 7):
        found = posterior(latent, latent[:, None].expand(1, count, 20))
        torch.testing.assert_close(found.mean, latent * count / (count + 1))
        torch.testing.assert_close(found.variance, torch.tensor([2 - count / (count + 1)], dtype=torch.float64))


@pytest.mark.parametrize("neighbours", [4, 100])
def test_loss(rng, neighbours):
    latents, labelled = rng.normal(size=(3, 20)), rng.normal(size=(11, 20))
    losses = []
    for latent in latents:
        order = np.argsort(kernel([latent], labelled)[0])
        mean, near = expected_posterior(latent, labelled[order[-neighbours:]])
        _, far = expected_posterior(latent, labelled[order[:neighbours]])
        losses.append(np.mean((latent - mean) ** 2) / near + 0.33 * np.log(near) - 0.33e-6 * np.log(far))
    found = gaussian_process_loss(torch.tensor(latents), torch.tensor(labelled), neighbours)
    np.testing.assert_allclose(found.item(), np.mean(losses), rtol=1e-12)


def test_the_furthest_examples_count(rng):
    """Their weight is too small for float32, and for a tolerance of 1e-6."""
    latents = torch.tensor(rng.normal(size=(2, 20)))
    labelled = torch.tensor(rng.normal(size=(11, 20)))
    kept = gaussian_process_loss(latents, labelled, 4)
    similarity = torch.nn.functional.cosine_similarity(latents[:1], labelled)
    changed = labelled.clone()
    changed[similarity.argmin()] = -latents[0]  # a new furthest example of the first
    assert gaussian_process_loss(latents[:1], changed, 4) != gaussian_process_loss(latents[:1], labelled, 4)
    assert abs(gaussian_process_loss(latents, changed, 4) - kept) < 1e-6


def test_gradients(rng):
    latents = torch.tensor(rng.normal(size=(2, 6)), requires_grad=True)
    labelled = torch.tensor(rng.normal(size=(7, 6)))
    assert torch.autograd.gradcheck(lambda z: gaussian_process_loss(z, labelled, 3), (latents,))


def test_float32_is_close_to_float64(rng):
    """With the sizes of the paper: features are positively correlated and large."""
    latents, labelled = (torch.tensor(rng.normal(size=(n, 4096)) * 3 + 5) for n in (2, 128))
    exact = gaussian_process_loss(latents, labelled, 64)
    torch.testing.assert_close(
        gaussian_process_loss(latents.float(), labelled.float(), 64).double(), exact, rtol=1e-5, atol=0
    )
