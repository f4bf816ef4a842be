"""Losses of CLIP-RPN compared with sums in float64."""

import numpy as np
import pytest
import torch

from derain.methods.cliprpn.loss import exponent, mask_loss, rain_mask, reconstruction_loss, scheduled_loss

POWERS = (0.8, 1.0, 2.0, 3.1)


@pytest.fixture
def pair(rng):
    """Derained and clean images, ``(2, 3, 5, 7)`` in float64; the derained ones are far outside [0, 1]."""
    return rng.normal(0.5, 1.0, (2, 3, 5, 7)), rng.random((2, 3, 5, 7))


def test_exponent_grows_from_0_8_to_3_1():
    assert exponent(0.0) == 0.8
    assert exponent(1.0) == pytest.approx(3.1)
    assert exponent(0.0869565) == pytest.approx(1.0, abs=1e-6)
    assert exponent(0.5, beta=1.0, eta=1.0) == 1.5


@pytest.mark.parametrize("power", POWERS)
def test_scheduled_loss_is_eq_14_smoothed(pair, power):
    derained, clean = pair
    tensors = [torch.from_numpy(x) for x in pair]
    error = np.abs(derained - clean)
    shift, root = (float(scheduled_loss(*tensors, power, smoothing)) for smoothing in ("shift", "root"))
    assert shift == pytest.approx(np.mean([(e + 1e-6) ** power for e in error.flat]), rel=1e-12)
    assert root == pytest.approx(np.mean([(e * e + 1e-6) ** (power / 2) for e in error.flat]), rel=1e-12)
    assert float(scheduled_loss(*tensors, power)) == shift


@pytest.mark.parametrize("power", POWERS)
def test_shift_is_accurate_for_pixel_errors(power):
    for error in (1 / 255, 3 / 255, 0.1, 1.0):
        pixel = torch.tensor([error], dtype=torch.float64)
        loss = float(scheduled_loss(pixel, torch.zeros_like(pixel), power))
        assert loss == pytest.approx(error**power, rel=1e-3)
    assert float(scheduled_loss(pixel * 1e-4, torch.zeros_like(pixel), 0.8)) == pytest.approx(1e-4**0.8, rel=0.01)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("smoothing", ["shift", "root"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_is_zero_at_zero_error_and_bounded(power, smoothing, dtype, autocast):
    clean = torch.linspace(0, 1, 101).to(dtype)
    clean = torch.cat((clean, torch.zeros(3, dtype=dtype)))
    derained = clean.clone()
    derained[-3:] = torch.tensor([1e-7, 1e-6, 1e-5])
    derained.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = scheduled_loss(derained, clean, power, smoothing)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert (derained.grad[:-3] == 0).all()
    steepest = power * 1e-6 ** (power - 1) if power < 1 else power
    assert (derained.grad[-3:] >= 0).all()
    assert derained.grad[-3:].max() <= 1.01 * steepest / len(clean)


def test_small_errors_in_half_precision():
    clean = torch.zeros(4, dtype=torch.float16)
    derained = torch.full((4,), 0.02, dtype=torch.float16)
    error = float(derained[0])
    assert float(scheduled_loss(derained, clean, 3.1)) == pytest.approx(error**3.1, rel=1e-3)


def test_losses_of_table_11(pair):
    derained, clean = pair
    tensors = [torch.from_numpy(x) for x in pair]
    error = (derained - clean).ravel()
    assert np.abs(error).max() > 1
    expected = {
        "l1": np.mean(np.abs(error)),
        "l2": np.mean(error**2),
        "huber": np.mean([e * e / 2 if abs(e) <= 1 else abs(e) - 0.5 for e in error]),
        "dls": np.mean((error**2 + 1e-6) ** 0.7),
    }
    for kind, value in expected.items():
        assert float(reconstruction_loss(*tensors, kind, 1.4, "root")) == pytest.approx(value, rel=1e-12), kind
        halves = [x.half() for x in tensors]
        assert reconstruction_loss(*halves, kind, 1.4, "root").dtype == torch.float32


def test_rain_mask_is_eq_4(rng):
    rainy, clean = rng.integers(0, 32, (2, 2, 3, 6, 5)) / 32
    for threshold in (0.1, 0.25):
        mask = rain_mask(torch.from_numpy(rainy), torch.from_numpy(clean), threshold)
        assert mask.shape == (2, 1, 6, 5)
        for b, _, y, x in np.ndindex(mask.shape):
            differs = any(abs(rainy[b, c, y, x] - clean[b, c, y, x]) > threshold for c in range(3))
            assert float(mask[b, 0, y, x]) == differs
    pixel = torch.zeros(1, 3, 1, 1)
    pixel[0, 2] = -0.11
    assert rain_mask(pixel, torch.zeros_like(pixel)) == 1
    assert rain_mask(pixel * 0.9, torch.zeros_like(pixel)) == 0
    assert rain_mask(torch.full_like(pixel, 0.5), torch.zeros_like(pixel), 0.5) == 0


SIZES = [(37, 31), (16, 24), (5, 1)]


def scaled(mask, factor, scaling):
    """Pad the mask and downscale it to the size of a level, ``(b, 1, h, w)``."""
    below, right = (-side % 8 for side in mask.shape[2:])
    mode = "reflect" if min(mask.shape[2:]) >= 8 else "edge"
    mask = np.pad(mask, ((0, 0), (0, 0), (0, below), (0, right)), mode=mode)
    out = np.zeros((len(mask), 1, mask.shape[2] // factor, mask.shape[3] // factor))
    for b, _, y, x in np.ndindex(out.shape):
        cell = mask[b, 0, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        out[b, 0, y, x] = {"nearest": cell[0, 0], "area": cell.mean(), "max": cell.max()}[scaling]
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scaling", ["nearest", "area", "max"])
def test_mask_loss_is_eq_5(rng, size, scaling):
    mask = (rng.random((2, 1, *size)) > 0.7).astype(np.float64)
    factors = (8, 4, 2)
    targets = [scaled(mask, factor, scaling) for factor in factors]
    logits = [rng.normal(0, 3, target.shape) for target in targets]
    losses = mask_loss([torch.from_numpy(x) for x in logits], torch.from_numpy(mask), scaling)
    for loss, logit, target in zip(losses, logits, targets, strict=True):
        share = 1 / (1 + np.exp(-logit))
        expected = -(target * np.log(share) + (1 - target) * np.log(1 - share)).mean()
        assert float(loss) == pytest.approx(expected, rel=1e-10)
    if size == (37, 31):
        assert len({float(t.sum()) for t in targets}) == 3
    reversed_losses = mask_loss([torch.from_numpy(x) for x in logits[::-1]], torch.from_numpy(mask), scaling)
    assert [float(loss) for loss in reversed_losses] == [float(loss) for loss in losses[::-1]]


def test_nearest_is_the_default(rng):
    mask = torch.from_numpy((rng.random((1, 1, 16, 16)) > 0.5).astype(np.float64))
    logits = [torch.from_numpy(rng.normal(0, 3, (1, 1, 8, 8)))]
    assert mask_loss(logits, mask) == mask_loss(logits, mask, "nearest") != mask_loss(logits, mask, "max")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mask_loss_of_extreme_logits(dtype):
    logits = torch.tensor([3e4, -3e4, 3e4, -3e4], dtype=dtype).reshape(1, 1, 2, 2).requires_grad_()
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        (loss,) = mask_loss([logits], mask)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(logits[0, 0, 0, 0].item() / 2, rel=1e-6)
    torch.testing.assert_close(logits.grad.flatten().double(), torch.tensor([0, 0, 0.25, -0.25], dtype=torch.float64))
