"""A GPU restores and trains as the CPU does.

Tests with the parameter ``device`` also run on the CPU, where they are slow or trivial, so that a machine without a GPU
shows that the tests themselves work.
"""

import lightning
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from derain import RainDataModule, Restorer
from derain.methods import DerainModule, RestormerModule, catalog
from derain.testing import make_batch
from tests.factories import clean_image, make_set
from tests.methods.test_contract import SMALL

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=NEEDS_GPU)]
METHODS = {
    method.__name__: method
    for method in catalog.methods()
    if issubclass(method, DerainModule) and method.__name__ in SMALL
}
TINY = {"dim": 8, "blocks": (1, 1, 1, 1), "refinement": 1}


def build(name):
    """Return a small method."""
    torch.manual_seed(0)
    return METHODS[name](**SMALL[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tile", [None, 64])
def test_a_gpu_restores_as_the_cpu_does(tile):
    rainy = clean_image(0, (70, 90))
    on_cpu = Restorer(device="cpu", tile=tile)(rainy).astype(int)
    on_gpu = Restorer(device="cuda", tile=tile)(rainy).astype(int)
    assert np.abs(on_cpu - on_gpu).max() <= 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_restored_as_its_images_are(device, name):
    method = build(name).to(device).eval()
    rainy = make_batch(3, 24, 40)["rainy"].to(device)
    with torch.inference_mode():
        batch, single = method(rainy), torch.cat([method(image[None]) for image in rainy])
    assert batch.device.type == device
    torch.testing.assert_close(batch, single, rtol=0, atol=2e-3)  # TF32


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_is_close_to_float32(device):
    rainy = torch.from_numpy(clean_image(0, (70, 90))).movedim(-1, 0) / 255
    exact = Restorer(device=device)(rainy)
    rounded = Restorer(device=device, precision="bf16")(rainy)
    assert (exact - rounded).abs().mean() < 4e-3


class Devices(TorchDispatchMode):
    """Records the devices of all tensors that operators return; single numbers are not counted."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found |= {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.ndim}
        return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METHODS)
def test_tensors_stay_on_the_device(device, name):
    method = build(name).to(device).eval()
    rainy = make_batch(2, 24, 40)["rainy"].to(device)
    with torch.no_grad(), Devices() as devices:
        method.pass_once(rainy)
    assert devices.found == {device}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_in_mixed_precision(device, name):
    method = build(name)
    before = {key: value.detach().clone() for key, value in method.network.named_parameters()}
    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, DataLoader([make_batch(2, 32, 32)] * 2, batch_size=None))
    after = {key: value.detach().cpu() for key, value in method.network.named_parameters()}
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_network_restores_the_same():
    device = "cuda"  # on a CPU, the checks of types that tests add cannot be compiled
    torch.manual_seed(0)
    method = RestormerModule(**TINY)
    rainy = torch.rand(3, 64, 64)
    expected = Restorer(method, device=device)(rainy)
    compiled = Restorer(method, device=device, compile=True)(rainy)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned(tmp_path, monkeypatch):
    make_set(tmp_path, "Rain800", "train", count=4, size=(32, 32))
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path))
    data = RainDataModule("Rain800", crop=16, batch_size=2)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["rainy"].is_pinned()
    assert batch["clean"].is_pinned()
