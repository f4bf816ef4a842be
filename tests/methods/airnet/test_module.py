"""AirNet's training: momentum contrast against its definition, two phases, learning rates."""

import lightning
import pytest
import torch
import torch.nn.functional as F

from derain.errors import DerainError
from derain.methods.airnet.module import AirNetModule, PhasesLR
from derain.methods.regression import module as regression
from derain.testing import check_method, make_batch

NETWORK = {"channels": 4, "groups": 1, "blocks": 1}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(regression, "NETWORKS", ("derain.networks.airnet.AirNet",))


def module(**options):
    torch.manual_seed(0)
    return AirNetModule(network_options=NETWORK, **options)


def test_contract():
    check_method(AirNetModule, can_export=False, network_options=NETWORK, encoder_epochs=0)


def test_contrast_is_that_of_moco():
    model = module(queue=5, momentum=0.75, temperature=0.5).train()
    queued = model.queued.clone()
    averages = {name: value.clone() for name, value in model.key_encoder.named_parameters()}
    with torch.no_grad():
        for parameter in model.network.encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    query, key = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)
    embedding = model.network.encoder(query)
    loss = model.contrast(embedding, key)
    parameters = dict(model.network.encoder.named_parameters())
    for name, value in model.key_encoder.named_parameters():
        torch.testing.assert_close(value, 0.75 * averages[name] + 0.25 * parameters[name])
    keys = F.normalize(model.key_encoder(key), dim=1)
    terms = []
    for index, q in enumerate(F.normalize(embedding, dim=1)):
        similarities = torch.stack([q @ keys[index], *(q @ k for k in queued)]) / 0.5
        terms.append(similarities.exp().sum().log() - similarities[0])
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    torch.testing.assert_close(model.queued, torch.cat((keys, queued[3:])).detach())


def test_the_oldest_keys_are_replaced():
    model = module(queue=5)
    model.queued.zero_()
    for first in (1, 4, 7):
        keys = torch.arange(first, first + 3.0)[:, None].expand(3, 16)
        model._enqueue(keys)
    assert model.queued[:, 0].tolist() == [6, 7, 8, 9, 5]
    assert model.position == 4


def test_query_and_target_are_the_same_part():
    model = module(crop=0.5)
    image = torch.arange(2 * 3 * 10 * 14.0).reshape(2, 3, 10, 14)
    first, second = model._crop(image, image + 1)
    assert first.shape == (2, 3, 5, 7)
    assert torch.equal(second, first + 1)
    corners = {float(model._crop(image)[0][0, 0, 0, 0]) for _ in range(200)}
    assert min(corners) == 0
    assert max(corners) == 5 * 14 + 7


def test_phases():
    model = module(encoder_epochs=1, queue=4)
    gradients = []

    class Gradients(lightning.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            network = pl_module.network
            gradients.append((network.tail.weight.grad is not None, network.encoder.head[0].weight.grad is not None))

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[Gradients()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader([make_batch()], batch_size=None))
    assert gradients == [(False, True), (True, True)]
    assert model.position == 0  # two batches of two images in a queue of four


def test_keys_start_from_loaded_weights():
    model = module()
    with torch.no_grad():
        model.network.encoder.head[0].weight.fill_(0.5)
    model.on_train_start()
    assert torch.equal(model.key_encoder.head[0].weight, model.network.encoder.head[0].weight)


def test_learning_rates():
    optimizer = torch.optim.Adam([torch.zeros(1)], 1e-3)
    schedule, rates = PhasesLR(optimizer, encoder_epochs=4, decay_epochs=2, halving_epochs=3), []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    first, second = [1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5], [1e-4, 1e-4, 5e-5, 5e-5, 5e-5, 2.5e-5]
    assert rates == pytest.approx(first + second)


@pytest.mark.parametrize(("option", "value"), [("encoder_epochs", -1), ("decay_epochs", 0), ("halving_epochs", 0)])
def test_intervals_out_of_range(option, value):
    with pytest.raises(DerainError, match=f"{option} {value}"):
        PhasesLR(torch.optim.Adam([torch.zeros(1)]), **{option: value})


def test_hyper_parameters_rebuild_it():
    model = module(encoder_epochs=3)
    again = AirNetModule(**model.hparams)
    assert again.schedule_options == {"encoder_epochs": 3}
    assert again.loss == model.loss


@pytest.mark.parametrize(
    "options", [{"crop": 1.0}, {"momentum": 1.0}, {"temperature": 0.0}, {"queue": 0}, {"encoder_epochs": -1}]
)
def test_options_out_of_range(options):
    with pytest.raises(DerainError, match=next(iter(options))):
        module(**options)


def test_other_networks_and_outputs():
    with pytest.raises(DerainError, match="PReNet"):
        AirNetModule(network="derain.methods.prenet.network.PReNet")
    model = module(loss={"first": {"l1": 1.0}})
    batch = make_batch()
    with pytest.raises(DerainError, match="first"):
        model.outputs_and_targets(batch["rainy"], batch["clean"])
