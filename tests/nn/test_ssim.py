"""SSIM against NumPy/SciPy in float64."""

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d

from derain.nn.ssim import structural_similarity


def ssim(x, y):
    """Return the mean SSIM of one channel with an 11×11 window at every pixel and zero padding."""
    grid = np.arange(-5, 6)
    window = np.exp(-(grid[:, None] ** 2 + grid[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(image):
        return convolve2d(image, window, mode="same", boundary="fill", fillvalue=0)

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2
    cov = mean(x * y) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    return np.mean((2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2)))


def pair(size, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(3)
    clean = torch.rand(batch, 3, *size, generator=generator, dtype=torch.float64)
    derained = (clean + 0.2 * torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)).clamp(-0.1, 1.1)
    return derained.to(dtype), clean.to(dtype)


@pytest.mark.parametrize("size", [(31, 24), (11, 11), (3, 40), (1, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_equals_the_formula(size, dtype, tolerance):
    derained, clean = pair(size, dtype)
    channels = zip(derained.flatten(0, 1).double().numpy(), clean.flatten(0, 1).double().numpy(), strict=True)
    expected = np.mean([ssim(x, y) for x, y in channels])
    assert structural_similarity(derained, clean).item() == pytest.approx(expected, abs=tolerance)


def test_the_gradient_equals_finite_differences():
    derained, clean = pair((3, 4), batch=1)
    assert torch.autograd.gradcheck(lambda x: structural_similarity(x, clean), derained.requires_grad_())


def test_ssim_of_equal_images_is_1():
    derained, clean = pair((20, 20))
    assert structural_similarity(clean, clean).item() == pytest.approx(1, abs=1e-12)
    assert structural_similarity(derained, clean) < 1
    flat = torch.zeros(1, 3, 16, 16, requires_grad=True)
    structural_similarity(flat, torch.zeros(1, 3, 16, 16)).backward()
    assert torch.isfinite(flat.grad).all()


def gradient_functions(tensor):
    """Return the names of the functions that compute the gradient of a tensor."""
    names, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and id(node) not in names:
            names |= {id(node), node.name()}
            nodes += [function for function, _ in node.next_functions]
    return {name for name in names if isinstance(name, str)}


def test_the_gradient_has_no_padding_that_is_not_deterministic_on_a_gpu():
    derained, clean = pair((20, 20))
    names = gradient_functions(structural_similarity(derained.requires_grad_(), clean))
    assert any("Convolution" in name for name in names)
    assert not [name for name in names if "ReflectionPad" in name or "ReplicationPad" in name]


def test_ssim_is_computed_in_float32_under_autocast():
    derained, clean = pair((24, 24), torch.float32)
    expected = structural_similarity(derained, clean)
    with torch.autocast("cpu", torch.bfloat16):
        assert structural_similarity(derained, clean) == expected
        loss = structural_similarity(derained.bfloat16(), clean)
    assert loss.dtype == torch.float32
    assert loss == structural_similarity(derained.bfloat16().float(), clean)
