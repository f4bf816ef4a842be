import cv2
import numpy as np
import pytest
import torch

from derain.data.jpeg import jpeg
from tests.factories import clean_image


def libjpeg(image, quality):
    """Encode and decode an RGB image by libjpeg, with chroma of half the resolution."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1]


def mean_difference(first, second):
    return np.abs(first.astype(float) - second.astype(float)).mean()


@pytest.mark.parametrize("shape", [(64, 80), (37, 51)])
def test_it_agrees_with_libjpeg(shape):
    images = [clean_image(seed, shape) for seed in range(4)]
    qualities = [10, 40, 75, 95]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255)
    compressed = jpeg(batch, torch.tensor(qualities).float()).mul(255).round().permute(0, 2, 3, 1).numpy()
    for image, quality, ours in zip(images, qualities, compressed, strict=True):
        expected = libjpeg(image, quality)
        assert mean_difference(ours, expected) < 0.25 * mean_difference(expected, image) + 0.3


def test_images_of_one_colour_stay_as_they_are():
    image = torch.full((1, 3, 16, 16), 128 / 255)
    assert torch.allclose(jpeg(image, torch.tensor([50.0])), image, atol=1e-3)
