"""Perceptual loss: against its definition in NumPy, frozen, outside of modules, and announced downloads."""

import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from derain.backbones import BACKBONES
from derain.errors import DerainError
from derain.methods.regression.module import RegressionModule
from derain.nn import losses
from derain.nn.losses import LOSSES, load_vgg
from derain.testing import make_batch
from tests.methods.regression.test_module import fit

CONVOLUTIONS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
"""Channels of the first convolutions of VGG16, by their indices in torchvision's network."""
SMALL = {"network": "RESCAN", "network_options": {"channels": 4, "layers": 2, "iterations": 1, "squeeze": 2}}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = (load_vgg, losses._vgg_on)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def vgg(cache):
    """Random weights in the file of VGG16; return them."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (inputs, outputs) in CONVOLUTIONS.items():
        state[f"features.{index}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) / (3 * inputs**0.5)
        state[f"features.{index}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    write(state | {"features.17.bias": torch.zeros(512), "classifier.6.bias": torch.zeros(1000)})
    return state


def write(content):
    BACKBONES["vgg"].file.parent.mkdir(parents=True)
    torch.save(content, BACKBONES["vgg"].file)


def outputs_of_three_layers(image, state):
    """Return what ReLUs 1_2, 2_2 and 3_3 of VGG16 output for an image ``(3, h, w)``."""
    x, kept = image, []
    for index in CONVOLUTIONS:
        if index in {5, 10}:
            height, width = (side // 2 for side in x.shape[1:])
            x = x[:, : 2 * height, : 2 * width].reshape(-1, height, 2, width, 2).max((2, 4))
        weight, bias = (state[f"features.{index}.{name}"].double().numpy() for name in ("weight", "bias"))
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), (1, 2))
        x = np.maximum(np.einsum("chwij,ocij->ohw", windows, weight) + bias[:, None, None], 0)
        if index in {2, 7, 14}:
            kept.append(x)
    return kept


def test_perceptual_loss_equals_its_definition(vgg):
    derained, clean = np.random.default_rng(0).random((2, 2, 3, 13, 9))
    terms = [[], [], []]
    for image, other in zip(derained, clean, strict=True):
        pairs = zip(outputs_of_three_layers(image, vgg), outputs_of_three_layers(other, vgg), strict=True)
        for term, (first, second) in zip(terms, pairs, strict=True):
            term.append(((first - second) ** 2).mean())
    loss = LOSSES["perceptual"](torch.from_numpy(derained), torch.from_numpy(clean))
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-12)
    single = LOSSES["perceptual"](torch.from_numpy(derained).float(), torch.from_numpy(clean).float())
    assert float(single) == pytest.approx(np.mean(terms), rel=1e-5)


def test_gradient_reaches_the_output_alone(vgg):
    torch.manual_seed(0)
    derained = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    clean = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    torch.autograd.gradcheck(lambda image: LOSSES["perceptual"](image, clean), derained, fast_mode=True)
    for layers in (load_vgg(), losses._vgg_on(derained.device, derained.dtype)):
        assert not any(parameter.requires_grad for parameter in layers.parameters())
        assert not any(module.training for module in layers.modules())


def test_it_is_in_float32_under_autocast(vgg):
    derained, clean = torch.rand(2, 1, 3, 16, 16)
    expected = LOSSES["perceptual"](derained, clean)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LOSSES["perceptual"](derained, clean), expected)
        assert LOSSES["perceptual"](derained.bfloat16(), clean).dtype == torch.float32


def test_layers_are_on_the_device_of_the_images(vgg, monkeypatch):
    on_meta = losses._vgg_on(torch.device("meta"), torch.float32)
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in load_vgg().parameters()} == {"cpu"}
    places, layers_on = [], losses._vgg_on
    monkeypatch.setattr(losses, "_vgg_on", lambda *place: places.append(place) or layers_on(*place))
    assert LOSSES["perceptual"](*torch.rand(2, 1, 3, 8, 8)).isfinite()
    assert places == [(torch.device("cpu"), torch.float32)]


def test_training_by_it_keeps_it_out_of_the_method(vgg):
    torch.manual_seed(0)
    module = RegressionModule(**SMALL, loss={"derained": {"smooth_l1": 1.0, "perceptual": 0.04}})
    names = set(module.state_dict())
    batch = make_batch()
    with torch.no_grad():
        derained, clean = module(batch["rainy"]).double(), batch["clean"].double()
        distance = (derained - clean).abs()
        smooth = torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
        expected = smooth + 0.04 * LOSSES["perceptual"](derained, clean)
    logged = []
    module.log = lambda name, value, **options: logged.append(float(value.detach())) if name == "train/loss" else None
    weights = [parameter.detach().clone() for parameter in module.network.parameters()]
    fit(module, 1)
    assert logged == [pytest.approx(float(expected), rel=1e-5)]
    assert any(not torch.equal(old, new) for old, new in zip(weights, module.network.parameters(), strict=True))
    assert set(module.state_dict()) == names
    assert sum(parameter.numel() for parameter in module.parameters()) < 10_000


def test_small_images_are_refused(vgg):
    assert LOSSES["perceptual"](*torch.rand(2, 1, 3, 4, 4)).isfinite()
    with pytest.raises(DerainError, match=r"\(3, 9\)"):
        LOSSES["perceptual"](*torch.rand(2, 1, 3, 3, 9))


def test_a_download_is_announced_before_the_training(cache, monkeypatch, capsys):
    messages = []

    def no_network(url, *args, **kwargs):
        messages.append(capsys.readouterr().err)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    module = RegressionModule(**SMALL, loss="perceptual")  # weights files build it too: nothing is fetched yet
    assert messages == []
    module.training_step = lambda *arguments: pytest.fail("trained")
    with pytest.raises(DerainError, match=r"VGG16.*no network") as caught:
        fit(module, 1)
    assert "\n" not in str(caught.value)
    assert str(BACKBONES["vgg"].file) in str(caught.value)
    (message,) = messages
    assert all(part in message for part in ("528 MB", BACKBONES["vgg"].url, str(BACKBONES["vgg"].file)))


def test_only_this_loss_fetches_weights(cache, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: pytest.fail("downloaded"))
    fit(RegressionModule(**SMALL, loss="l1"), 1)


@pytest.mark.parametrize("content", [{"features.0.weight": torch.zeros(2)}, [1, 2]])
def test_damaged_weights_are_refused(cache, content):
    write(content)
    with pytest.raises(DerainError, match="damaged") as caught:
        load_vgg()
    assert str(BACKBONES["vgg"].file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["transweather", "syn2real", "syn2real-gp"])
def test_recipes_weigh_it_as_the_authors(name):
    recipes = Path(__file__).parents[2] / "experiments/methods"
    loss, tiny = (
        yaml.safe_load((recipes / f"{stem}.yaml").read_text())["model"]["init_args"]["loss"]["derained"]
        for stem in (name, f"{name}-tiny")
    )
    assert loss == {"smooth_l1": 1.0, "perceptual": 0.04}
    assert "perceptual" not in tiny  # runs offline
