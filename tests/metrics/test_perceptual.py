import importlib.util
import re
import sys
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from derain.backbones import BACKBONES
from derain.errors import DerainError
from derain.metrics.perceptual import FrechetDistance, Lpips, PyiqaMetric


def random_alexnet():
    """Return weights of AlexNet: random features, and zeros for the classifier, which LPIPS does not use."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in torchvision.models.alexnet(weights=None).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.05
        if name.startswith("features")
        else torch.zeros(1).expand(shape)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="session")
def alexnet_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(random_alexnet(), file)
    return file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def cached_alexnet(cache, alexnet_file):
    cache.mkdir(parents=True)
    (cache / BACKBONES["alex"].file.name).symlink_to(alexnet_file)


@pytest.fixture
def photos(rng):
    return [rng.integers(0, 256, (48, 64, 3)).astype(np.uint8) for _ in range(2)]


@pytest.mark.parametrize(("net", "weights"), [("alex", "AlexNet_Weights"), ("vgg", "VGG16_Weights")])
def test_backbones_are_those_of_torchvision(net, weights, monkeypatch):
    default = getattr(torchvision.models, weights).DEFAULT
    assert BACKBONES[net].url == default.url
    assert pytest.approx(default.meta["_file_size"], abs=0.5) == BACKBONES[net].megabytes
    for variables in ({"TORCH_HOME": "/a"}, {"XDG_CACHE_HOME": "/b"}, {}):
        for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(BACKBONES[net].file.parent) == f"{torch.hub.get_dir()}/checkpoints"


def test_lpips_is_zero_for_equal_images_and_grows_with_noise(cached_alexnet, photos, rng):
    lpips = Lpips("alex")
    clean = photos[0]
    little, much = (np.clip(clean + rng.normal(0, sigma, clean.shape), 0, 255).astype(np.uint8) for sigma in (5, 60))
    assert lpips(clean, clean) == 0
    assert 0 < lpips(little, clean) < lpips(much, clean)
    assert lpips(little / np.float32(255), clean / np.float32(255)) == pytest.approx(lpips(little, clean))


def test_lpips_equals_that_of_torchmetrics(cached_alexnet, photos):
    x, y = (torch.from_numpy(photo).movedim(-1, 0)[None].float() / 127.5 - 1 for photo in photos)
    expected = learned_perceptual_image_patch_similarity(x, y, net_type="alex").item()
    assert Lpips("alex")(*photos) == pytest.approx(expected, rel=1e-4)


def test_lpips_is_computed_in_float32_under_autocast(cached_alexnet, photos):
    lpips = Lpips("alex")
    with torch.autocast("cpu", torch.bfloat16):
        score = lpips(*photos)
    assert score == lpips(*photos)


def test_lpips_rejects_images_too_small_for_the_network(cached_alexnet):
    lpips = Lpips("alex")
    image = np.zeros((31, 31, 3), np.uint8)
    assert lpips(image, image) == 0
    with pytest.raises(DerainError, match=r"31x30.*31x31"):
        lpips(image[1:], image[1:])


def test_lpips_without_weights_downloads_nothing(cache, capsys):
    with pytest.raises(DerainError, match=r"AlexNet.*233 MB, https://.*--lpips alex"):
        Lpips("alex")
    assert not cache.exists()
    assert capsys.readouterr().err == ""


def test_lpips_announces_a_download(cache, monkeypatch, capsys):
    messages = []

    def no_network(url, *args, **kwargs):
        messages.append(capsys.readouterr().err)
        print("downloading")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(DerainError, match=r"AlexNet.*no network"):
        Lpips("alex", fetch=True)
    assert capsys.readouterr().out == ""  # stdout is for results
    (line,) = messages
    assert all(word in line for word in ("233 MB", BACKBONES["alex"].url, str(cache)))


def test_lpips_rejects_damaged_weights(cache):
    cache.mkdir(parents=True)
    BACKBONES["alex"].file.write_bytes(b"half a download")
    with pytest.raises(DerainError, match=re.escape(str(BACKBONES["alex"].file))) as caught:
        Lpips("alex")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("package", "make"), [("torchvision", lambda: Lpips("alex")), ("pyiqa", lambda: PyiqaMetric("niqe"))]
)
def test_a_missing_package_is_reported(package, make, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(DerainError, match=rf"{package}.*pip install"):
        make()


FAKE_PYIQA = """
from pathlib import Path

from PIL import Image

MODELS = {"NR": ["brightness", "unreachable", "failing", "infinite", "fid"], "FR": ["difference"]}

def list_models(metric_mode=None):
    return MODELS[metric_mode]

def create_metric(name, device):
    if name == "unreachable":
        raise OSError("no network\\nsecond line")
    def brightness(image):
        assert image.shape[:2] == (1, 3)
        return image.mean().reshape(1, 1)
    def difference(image, clean):
        return (clean - image).mean()
    def failing(image):
        raise AssertionError("image is too small")
    def infinite(image):
        return image.mean() / 0
    def fid(derained, clean, num_workers, verbose):
        print("computing")
        files = sorted(Path(derained).iterdir())
        assert [file.name for file in files] == [file.name for file in sorted(Path(clean).iterdir())]
        if len(files) == 2:
            raise ValueError("Imaginary component 3.2")
        return sum(Image.open(file, formats=["PNG"]).size[0] for file in files)
    metric = locals()[name]
    metric.lower_better = True
    return metric
"""


@pytest.fixture
def fake_pyiqa(tmp_path, monkeypatch):
    (tmp_path / "fake" / "pyiqa").mkdir(parents=True)
    (tmp_path / "fake" / "pyiqa" / "__init__.py").write_text(FAKE_PYIQA)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    yield
    sys.modules.pop("pyiqa", None)


def test_metrics_are_from_pyiqa(fake_pyiqa, photos):
    derained, clean = photos
    metric = PyiqaMetric("brightness")
    assert metric(derained) == metric(derained, clean) == pytest.approx(derained.mean() / 255, rel=1e-5)
    assert metric.lower_better
    difference = PyiqaMetric("difference", full_reference=True)
    expected = (clean.astype(np.float64) - derained).mean() / 255
    assert difference(derained, clean) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(DerainError, match="difference"):
        difference(derained)


def test_a_frechet_distance_that_cannot_be_computed_is_one_line(fake_pyiqa, photos):
    with pytest.raises(DerainError, match=r"fid.*Imaginary component"):
        FrechetDistance("fid")([tuple(photos)] * 2)


def test_unknown_and_unavailable_metrics_are_rejected(fake_pyiqa):
    with pytest.raises(DerainError, match=r"psnr.*brightness"):
        PyiqaMetric("psnr")
    with pytest.raises(DerainError, match=r"brightness.*difference"):
        PyiqaMetric("brightness", full_reference=True)
    with pytest.raises(DerainError, match=r"unreachable: .*no network$"):
        PyiqaMetric("unreachable")


@pytest.mark.parametrize(("name", "named"), [("failing", "too small"), ("infinite", "inf")])
def test_a_metric_that_fails_is_reported(fake_pyiqa, photos, name, named):
    with pytest.raises(DerainError, match=rf"{name}.*{named}"):
        PyiqaMetric(name)(photos[0])


def test_the_frechet_distance_compares_folders(fake_pyiqa, photos, capsys):
    distance, photos = FrechetDistance("fid"), tuple(photos)
    assert distance([photos, photos, photos]) == 3 * photos[0].shape[1]
    printed = capsys.readouterr()
    assert printed.out == ""  # stdout is for results
    assert "fid: 3 images" in printed.err
    with pytest.raises(DerainError, match=r"\b1;"):
        distance([photos])


def test_floats_out_of_range_are_rejected(cached_alexnet, photos):
    derained, clean = (photo.astype(np.float32) for photo in photos)
    lpips = Lpips()
    assert lpips(derained / 255, clean / 255) > 0
    for images in ((derained, clean), (derained / 255, clean), (derained * np.float32(np.nan), clean / 255)):
        with pytest.raises(DerainError, match=r"255|NaN"):
            lpips(*images)
