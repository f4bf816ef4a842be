"""Syn2Real's semi-supervised training: phases, bank of latent vectors, options."""

import lightning
import pytest
import torch

from derain.data.datamodule import RainDataModule
from derain.errors import DerainError
from derain.methods import catalog
from derain.methods.regression.module import RegressionModule
from derain.methods.syn2real.loss import gaussian_process_loss
from derain.methods.syn2real.module import Syn2RealModule
from derain.testing import make_batch
from tests.factories import make_set

NETWORK = {"channels": 2, "base_width": 32, "groups": 1, "parts": 2}


def module(**options):
    torch.manual_seed(0)
    return Syn2RealModule(network_options=NETWORK, **options)


class Steps(lightning.Callback):
    """Records at each step which parts have gradients, and the size of the bank."""

    def __init__(self):
        self.decoder, self.stored, self.gradients = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        network = pl_module.network
        self.decoder.append(network.tail.weight.grad is not None)
        self.stored.append(len(pl_module.labelled))
        self.gradients.append(network.latent.weight.grad.clone())


def fit(model, data, **options):
    steps = Steps()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "use_distributed_sampler": False, "limit_val_batches": 0}
    lightning.Trainer(**quiet, callbacks=[steps], **options).fit(model.train(), data)
    return steps


def loader(count):
    return torch.utils.data.DataLoader([make_batch(seed=index) for index in range(count)], batch_size=None)


def test_phases_alternate():
    steps = fit(module(unlabelled_share=0.4, bank=4, neighbours=2), loader(5), max_epochs=2)
    assert steps.decoder == [True, True, True, False, False] * 2
    assert steps.stored == [2, 4, 4, 4, 4, 4, 4, 4, 4, 4]


def test_joint_steps_train_on_both():
    model = module(phases="joint", gp_weight=0.7)
    batch = make_batch()
    outputs, targets = model.outputs_and_targets(batch["rainy"], batch["clean"])
    latents = model.network.outputs(batch["unlabelled"])["features"]
    supervised = torch.nn.functional.smooth_l1_loss(outputs["derained"], targets["derained"])
    gp = gaussian_process_loss(latents.flatten(1), outputs["features"].detach().flatten(1), 64)
    (expected,) = torch.autograd.grad(supervised + 0.7 * gp, model.network.latent.weight)
    steps = fit(
        module(phases="joint", gp_weight=0.7), torch.utils.data.DataLoader([batch], batch_size=None), max_steps=1
    )
    torch.testing.assert_close(steps.gradients[0], expected)
    assert steps.decoder == [True]


def test_unlabelled_steps_train_on_the_pseudo_ground_truth_alone():
    first, second = make_batch(seed=1), make_batch(seed=2)
    data = torch.utils.data.DataLoader([first, second], batch_size=None)
    model = module(unlabelled_share=0.5, learning_rate=1e-30)  # weights stay, batch statistics are those of the batch
    steps = fit(model, data, max_epochs=1)
    network = model.network.train()
    labelled = network.outputs(first["rainy"])["features"].detach().flatten(1)
    latents = network.outputs(second["unlabelled"])["features"].flatten(1)
    loss = 0.0015 * gaussian_process_loss(latents, labelled, 64)
    (expected,) = torch.autograd.grad(loss, network.latent.weight)
    torch.testing.assert_close(steps.gradients[1], expected)


def test_the_bank_has_the_last_latent_vectors():
    model = module(bank=5, neighbours=1)
    everything = []
    for first in range(0, 12, 3):
        vectors = torch.arange(first, first + 3.0).reshape(3, 1, 1, 1).expand(3, 4, 2, 2)
        vectors = vectors[:, None] if first else vectors  # of three devices
        model._store(vectors)
        everything += range(first, first + 3)
        assert sorted(model.labelled[:, 0, 0, 0].tolist()) == everything[-5:]
    model._store(torch.zeros(2, 4, 3, 3))  # crops of another size
    assert model.labelled.shape == (2, 4, 3, 3)
    assert model._fits_bank(torch.zeros(1, 3, 24, 17))
    assert not model._fits_bank(torch.zeros(1, 3, 25, 24))


def test_crops_of_a_new_size_train_on_pairs_first():
    batches = [make_batch(seed=1), make_batch(2, 24, 24, seed=2), make_batch(2, 24, 24, seed=3)]
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    steps = fit(module(unlabelled_share=0.6), data, max_epochs=1)
    assert steps.decoder == [True, True, False]


def test_a_phase_has_the_share_of_the_unlabelled_images(tmp_path, caplog):
    caplog.set_level("INFO", logger="derain")
    make_set(tmp_path, "Rain800", "train", count=10)
    photos = str(make_set(tmp_path, "images", "predict", count=5))
    options = {"root": str(tmp_path), "workers": 0, "crop": 16, "batch_size": 2, "repeat": 2, "val": "none"}
    steps = fit(module(), RainDataModule(train="Rain800", unlabelled=photos, **options), max_epochs=1)
    assert steps.decoder == [True] * 8 + [False] * 2  # 5 of 25 images
    assert any("2 of 10 batches" in message for message in caplog.messages)


def test_unlabelled_images_are_required(tmp_path):
    make_set(tmp_path, "Rain800", "train", count=4)
    with pytest.raises(DerainError, match=r"--data\.unlabelled.*Syn2Real"):
        fit(module(), RainDataModule(train="Rain800", root=str(tmp_path), workers=0, crop=16), max_epochs=1)


def test_weights_load_into_the_supervised_method_and_back(tmp_path):
    model = module()
    model.save_weights(tmp_path / "w.safetensors")
    loaded = catalog.load(tmp_path / "w.safetensors").module
    assert isinstance(loaded, Syn2RealModule)
    assert loaded.hparams["neighbours"] == 64
    image = make_batch()["rainy"]
    with torch.no_grad():
        assert torch.equal(loaded(image), model.eval()(image))
    supervised = RegressionModule(network="Syn2Real", network_options=NETWORK)
    supervised.network.load_state_dict(loaded.network.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"gp_weight": -1.0},
        {"gp_weight": float("nan")},
        {"unlabelled_share": 1.0},
        {"neighbours": 0},
        {"bank": 63},
        {"bank": 10**9},
    ],
)
def test_options_out_of_range(options):
    (name, value), *_ = options.items()
    with pytest.raises(DerainError, match=f"{name} {value}"):
        module(**options)


def test_other_networks():
    with pytest.raises(DerainError, match="PReNet"):
        Syn2RealModule(network="derain.methods.prenet.network.PReNet")


def test_schedules():
    assert module().schedule_options == {"milestones": [100], "decay": 0.5}
    assert module(schedule="constant").schedule_options == {}
