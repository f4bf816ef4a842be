"""SSID-KD's semi-supervised stage: its loss, its start, its options."""

import lightning
import pytest
import torch

from derain.data.datamodule import RainDataModule
from derain.errors import DerainError
from derain.methods import catalog
from derain.methods.regression.module import RegressionModule
from derain.methods.ssidkd.loss import dark_channel_loss, divergence, total_variation
from derain.methods.ssidkd.module import SSIDKDModule
from derain.testing import make_batch
from tests.factories import make_set

NETWORK = {"channels": [2, 3, 4], "repeats": [1, 1, 1], "convolutions": 1}
SIZE = 32


def module(**options):
    torch.manual_seed(0)
    return SSIDKDModule(network_options=NETWORK, **options)


def fit(model, data, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "use_distributed_sampler": False, "limit_val_batches": 0}
    trainer = lightning.Trainer(**quiet, **options)
    trainer.fit(model.train(), data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_loss_is_the_sum_of_its_terms():
    batch = make_batch(2, SIZE, SIZE)
    weights = {"dark_channel": 0.2, "variation": 0.3, "divergence": 50.0}
    model = module(**weights, window=8)
    with torch.no_grad():
        synthetic, real = (model.network.outputs(batch[key]) for key in ("rainy", "unlabelled"))
        expected = {"derained_l1": 20 * (synthetic["derained"] - batch["clean"]).abs().mean()}
        for name, outputs in (("synthetic", synthetic), ("real", real)):
            expected[f"dark_channel_{name}"] = 0.2 * dark_channel_loss(outputs["derained"], 8)
            expected[f"variation_{name}"] = 0.3 * total_variation(outputs["derained"])
        expected["divergence"] = 50 * divergence(synthetic["code"], real["code"])
    logged = fit(model, torch.utils.data.DataLoader([batch], batch_size=None), max_steps=1)
    terms = {name.removeprefix("train/"): value for name, value in logged.items()}
    assert terms.pop("loss") == pytest.approx(float(sum(expected.values())), rel=1e-5)
    assert terms == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def test_it_starts_from_weights_of_the_supervised_stage(tmp_path, caplog):
    supervised = RegressionModule(network="SSIDKD", network_options=NETWORK)
    supervised.save_weights(tmp_path / "w.safetensors")
    data = torch.utils.data.DataLoader([make_batch(2, SIZE, SIZE)], batch_size=None)
    fit(module(), data, max_steps=1)
    assert "--weights" in caplog.text
    caplog.clear()
    model = module()
    model.start_from(catalog.load(tmp_path / "w.safetensors", SSIDKDModule).module)
    fit(model, data, max_steps=1)
    assert "--weights" not in caplog.text


def test_unlabelled_images_are_required(tmp_path):
    make_set(tmp_path, "Rain800", "train", count=4)
    with pytest.raises(DerainError, match=r"--data\.unlabelled.*SSIDKD"):
        fit(module(), RainDataModule(train="Rain800", root=str(tmp_path), workers=0, crop=SIZE), max_epochs=1)


def test_an_output_without_a_target_cannot_have_a_loss():
    model = RegressionModule(network="SSIDKD", network_options=NETWORK, loss={"code": {"mean": 1.0}})
    batch = make_batch(1, SIZE, SIZE)
    with pytest.raises(DerainError, match=r"--model\.loss code"):
        model.outputs_and_targets(batch["rainy"], batch["clean"])


def test_weights_rebuild_it(tmp_path):
    model = module(window=64)
    model.save_weights(tmp_path / "w.safetensors")
    loaded = catalog.load(tmp_path / "w.safetensors").module
    assert isinstance(loaded, SSIDKDModule)
    assert loaded.window == 64
    assert loaded.loss == {"derained": {"l1": 20.0}}
    image = make_batch()["rainy"]
    with torch.no_grad():
        assert torch.equal(loaded(image), model.eval()(image))


@pytest.mark.parametrize(
    "options", [{"dark_channel": -1.0}, {"variation": float("inf")}, {"divergence": float("nan")}, {"window": 0}]
)
def test_options_out_of_range(options):
    (name, value), *_ = options.items()
    with pytest.raises(DerainError, match=f"{name} {value}"):
        module(**options)


def test_other_networks():
    with pytest.raises(DerainError, match="PReNet"):
        SSIDKDModule(network="derain.methods.prenet.network.PReNet")
