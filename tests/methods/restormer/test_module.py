"""Restormer as a method: the authors' checkpoints, options and training."""

import numpy as np
import pytest
import torch

from derain.errors import DerainError
from derain.methods import RestormerModule, catalog
from derain.methods.restormer.module import mix_pairs
from tests.nn.references import SMALL, Published


class Small(RestormerModule):
    """Restormer with a small published checkpoint."""

    def __init__(self):
        super().__init__(**SMALL)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(catalog, "methods", lambda: [Small])


@pytest.fixture
def published():
    torch.manual_seed(0)
    return Published(**SMALL)


@pytest.mark.parametrize("wrapped", [True, False])
def test_published_checkpoint_loads(small, published, tmp_path, wrapped):
    state = published.state_dict()
    torch.save({"params": state} if wrapped else state, tmp_path / "deraining.pth")
    loaded, note = catalog.load(tmp_path / "deraining.pth")
    assert isinstance(loaded, Small)
    assert "Small" in note
    rainy = torch.rand(1, 3, 21, 18)
    with torch.no_grad():
        torch.testing.assert_close(loaded(rainy), published(rainy), atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
def test_other_state_dicts_are_refused(small, published, tmp_path, change):
    state = published.state_dict()
    if change == "missing":
        del state["output.weight"]
    elif change == "shape":
        state["output.weight"] = torch.zeros(1, 16, 3, 3)
    else:
        state["output.bias"] = torch.zeros(3)
    torch.save({"params": state}, tmp_path / "other.pth")
    with pytest.raises(DerainError, match=r"other\.pth"):
        catalog.load(tmp_path / "other.pth")
    assert RestormerModule.from_published({"weight": torch.zeros(1)}) is None


@pytest.mark.slow
def test_full_size_checkpoint_loads(tmp_path):
    with torch.device("meta"):
        published = Published()
    state = {name: torch.full(value.shape, 0.5) for name, value in published.state_dict().items()}
    torch.save({"params": state}, tmp_path / "deraining.pth")
    loaded, note = catalog.load(tmp_path / "deraining.pth")
    assert "RestormerModule" in note
    assert "26,126,644" in note
    assert all((value == 0.5).all() for value in loaded.network.state_dict().values())


def test_loss_is_the_mean_absolute_error():
    module = Small()
    module.log = lambda *args, **kwargs: None
    rainy, clean = torch.rand(2, 2, 3, 16, 16)
    batch = {"rainy": rainy, "clean": clean, "name": ["a", "b"], "index": torch.arange(2)}
    loss = module.training_step(batch, 0)
    expected = (module(rainy).double() - clean.double()).abs().sum() / clean.numel()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "options", [{"hold": 1.0}, {"hold": -0.1}, {"warm_up": 0.5, "hold": 0.5}, {"min_learning_rate": 1.0}]
)
def test_rates_out_of_range_are_refused(options):
    with pytest.raises(DerainError, match=next(iter(options))):
        RestormerModule(**SMALL, **options)


def test_pairs_are_mixed_with_the_same_share():
    rainy, clean = torch.rand(2, 4, 3, 5, 6)
    torch.manual_seed(3)
    mixed_pair = mix_pairs(rainy, clean, 1.2)
    torch.manual_seed(3)
    share = torch.distributions.Beta(1.2, 1.2).sample().item()
    order = torch.randperm(4).numpy()
    assert 0 < share < 1
    assert (order != np.arange(4)).any()
    for images, original in zip(mixed_pair, (rainy.numpy(), clean.numpy()), strict=True):
        expected = np.stack([share * original[i] + (1 - share) * original[order[i]] for i in range(4)])
        np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)


def test_shares_have_a_beta_distribution():
    torch.manual_seed(0)
    black, white = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    images = torch.cat([black, white])
    shares = np.array([float(mix_pairs(images, images, 1.2)[0][1].max()) for _ in range(2000)])
    shares = shares[shares < 1]  # the images were swapped
    assert abs(shares.mean() - 0.5) < 0.03
    assert shares.var() == pytest.approx(1 / (4 * (2 * 1.2 + 1)), rel=0.15)


@pytest.mark.parametrize(("mixup", "share"), [(None, 0), (1.2, 0.5)])
def test_half_of_the_batches_are_mixed(mixup, share, monkeypatch):
    module = RestormerModule(**SMALL, mixup=mixup)
    module.log = lambda *args, **kwargs: None
    inputs = []

    def forward(self, rainy):
        inputs.append(rainy)
        return rainy

    monkeypatch.setattr(type(module), "forward", forward)
    rainy, clean = torch.rand(2, 4, 3, 2, 2)
    batch = {"rainy": rainy, "clean": clean, "name": list("abcd"), "index": torch.arange(4)}
    losses = []
    for seed in (*range(100), *range(100)):
        torch.manual_seed(seed)
        losses.append(float(module.training_step(batch, 0)))
    changed = [not torch.equal(images, rainy) for images in inputs]
    assert np.mean(changed) == pytest.approx(share, abs=0.15)
    assert losses[:100] == losses[100:]  # a resumed run draws the same, by the seed of the batch


@pytest.mark.parametrize("mixup", [0.0, -1.2, float("inf"), float("nan")])
def test_invalid_mixup_is_refused(mixup):
    with pytest.raises(DerainError, match="mixup"):
        RestormerModule(**SMALL, mixup=mixup)
