"""Updates, gradients and counters of the manual optimisation, compared with a hand-written loop in plain torch."""

import copy

import jaxtyping
import lightning
import pytest
import torch

from derain import PLNLINGANModule
from derain.callbacks import EMA
from derain.errors import DerainError
from derain.methods.plnlingan.loss import ADVERSARIAL, HIERARCHICAL, pyramid
from derain.methods.plnlingan.network import Restored
from derain.nn.ssim import structural_similarity
from tests.methods.plnlingan.references import adversarial

TINY = {
    "channels": 4,
    "stages": (1, 1, 1, 1),
    "hierarchy": 1,
    "heads": 1,
    "discriminator_channels": 4,
    "discriminator_stages": 1,
    "learning_rate": 1e-3,
}


def module(**options):
    torch.manual_seed(0)
    return PLNLINGANModule(**(TINY | options))


class OneWeightGenerator(torch.nn.Module):
    """Stands for the generator where only the optimisation is tested."""

    multiple = 1
    joins = ()

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.9))

    def forward(self, rainy, hierarchy=False):
        return Restored(rainy * self.weight, [], [])


class OneWeightDiscriminator(torch.nn.Module):
    """Stands for the discriminator where only the optimisation is tested."""

    joins = ()

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, image, features):
        return [image.mean(1, keepdim=True) * self.weight]


def module_of_one_weight(**options):
    method = module(alpha=0.0, content=False, **options)
    method.network = OneWeightGenerator()
    method.discriminator = None if method.discriminator is None else OneWeightDiscriminator()
    return method


def batch(seed, count=2, size=56):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(count, 3, size, size, generator=generator, dtype=torch.float64)
    rainy = (clean + 0.3 * (torch.rand(count, 1, size, size, generator=generator) > 0.8)).clamp(0, 1)
    return {"rainy": rainy, "clean": clean, "name": [f"{seed}-{i}" for i in range(count)], "index": torch.arange(count)}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ("local features", "non-local features", "features of both")),
        ({"branches": "local"}, ("local features", "other local features", "features of both")),
        ({"unit": "non-local"}, ("non-local features",)),
        ({"fusion": False}, ("local features", "non-local features", "features of both")),
    ],
)
def test_explanation_shows_features_of_the_last_plnlim(options, names):
    method = module(**options)
    assert method.maps == names
    last = method.network.decoder[0]
    outputs = []
    parts = [last.local[-1], last.non_local[-1], last] if method.hparams["unit"] == "plnlim" else [last]
    rainy = torch.rand(2, 3, 37, 60, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        handles = [part.register_forward_hook(lambda _, __, out: outputs.append(out)) for part in parts]
        derained = method(rainy)
        for handle in handles:
            handle.remove()
        explanation = method.explain(rainy)
    torch.testing.assert_close(explanation[:, :3], derained)
    assert explanation.shape == (2, 3 + len(names), 37, 60)
    for shown, features in zip(explanation[:, 3:].unbind(1), outputs, strict=True):
        magnitude = features.abs().mean(-1)[:, :37, :60]
        torch.testing.assert_close(shown, magnitude / (magnitude + magnitude.mean((1, 2), keepdim=True)))
    assert 0 <= explanation[:, 3:].min() < 0.5 < explanation[:, 3:].max() < 1


def test_zero_features_are_shown_black():
    method = module()
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.zero_()
        assert method.explain(torch.rand(1, 3, 56, 56))[:, 3:].abs().max() == 0


def test_discriminator_heads():
    method = module(channels=6, heads=3, discriminator_channels=4, discriminator_heads=2)
    assert {block.attn.num_heads for block in method.network.decoder[0].non_local} == {3}
    assert {block.attn.num_heads for block in method.discriminator.first.non_local} == {2}
    assert {block.attn.num_heads for block in module(heads=2).discriminator.first.non_local} == {2}
    with pytest.raises(DerainError, match="0 heads"):
        module(discriminator_heads=0)


class Batches(torch.utils.data.Dataset):
    def __init__(self, count, dtype=torch.float32, images=1, size=56):
        self.batches = [batch(seed, images, size) for seed in range(count)]
        for values in self.batches:
            values["rainy"] = values["rainy"].to(dtype)
            values["clean"] = values["clean"].to(dtype)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def fit(method, data, epochs=1, precision="32", callbacks=(), **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=epochs,
        precision=precision,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(method, torch.utils.data.DataLoader(data, batch_size=None))
    return trainer


def steps(optimizer):
    return {int(state["step"]) for state in optimizer.state.values()}


def loss_inputs(method):
    """Arguments of the methods that return losses: generator output, clean images and their features."""
    data = Batches(1)[0]
    rainy, clean = data["rainy"], data["clean"]
    restored = method.network(rainy, hierarchy=True)
    with torch.no_grad():
        real = method.network(clean, hierarchy=True).features
    return restored, clean, real


def with_gradient(parameters):
    return [parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in parameters]


def test_generator_losses_have_no_gradient_in_the_discriminator():
    method = module()
    parts = method.generator_losses(*loss_inputs(method))
    sum(parts["generator"]).backward()
    without_gradient = {name for name, p in method.network.named_parameters() if p.grad is None}
    outputs = {f"outputs.{k}.{kind}" for k in range(4) for kind in ("weight", "bias")}
    assert without_gradient == outputs  # trained by the hierarchical losses
    assert not any(with_gradient(method.discriminator.parameters()))
    assert all(parameter.requires_grad for parameter in method.discriminator.parameters())


def test_discriminator_losses_have_no_gradient_in_the_generator():
    method = module()
    sum(method.discriminator_losses(*loss_inputs(method))["discriminator"]).backward()
    assert not any(with_gradient(method.network.parameters()))
    assert sum(with_gradient(method.discriminator.parameters())) > 0.9 * len(list(method.discriminator.parameters()))


def test_features_of_clean_images_have_no_gradient(monkeypatch):
    clean_features = []
    original = PLNLINGANModule.generator_losses

    def generator_losses(self, restored, clean, real):
        clean_features.extend(real)
        return original(self, restored, clean, real)

    monkeypatch.setattr(PLNLINGANModule, "generator_losses", generator_losses)
    fit(module(), Batches(1))
    assert len(clean_features) == 4
    assert not any(features.requires_grad for features in clean_features)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ({20}, {4})),
        ({"generator_steps": 1}, ({20}, {20})),
        ({"generator_steps": 3}, ({20}, {6})),
        ({"generator_steps": 1, "discriminator_steps": 5}, ({4}, {20})),
        ({"accumulate": 2}, ({10}, {2})),
    ],
)
def test_steps_of_generator_and_discriminator(options, expected):
    trainer = fit(module_of_one_weight(**options), Batches(20, size=16))
    assert tuple(steps(optimizer) for optimizer in trainer.optimizers) == expected
    assert trainer.global_step == max(*expected[0], *expected[1])


def test_updates_are_counted_across_epochs():
    method = module_of_one_weight()
    trainer = fit(method, Batches(3, size=16), epochs=4)
    assert [steps(optimizer) for optimizer in trainer.optimizers] == [{12}, {2}]
    assert method.updates == 12


def test_validation_during_gradient_accumulation_changes_nothing():
    class Validation(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return batch(0, count=1, size=17)

    trained = []
    for every in (1, 4):
        method = module_of_one_weight(accumulate=4)
        method.validation_step = lambda *_: None
        method.on_validation_epoch_end = lambda: None
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, val_check_interval=every
        )
        loaders = [torch.utils.data.DataLoader(data, batch_size=None) for data in (Batches(4, size=16), Validation())]
        trainer.fit(method, *loaders)
        trained.append(method.network.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_beta_zero_removes_the_discriminator():
    method = module(beta=0.0)
    trainer = fit(method, Batches(1))
    assert method.discriminator is None
    assert len(trainer.optimizers) == 1
    method = module_of_one_weight(beta=0.0, generator_steps=1, discriminator_steps=5)
    assert steps(fit(method, Batches(2, size=16)).optimizers[0]) == {2}
    assert len(module(beta=0.0, alpha=0.0).network.supervised) == 0
    assert len(module(alpha=0.0).network.supervised) == 4


@pytest.mark.slow
def test_training_equals_a_hand_written_loop():
    """Three epochs of three batches: two generator steps per round, accumulation of 2, clipping, schedules and EMA."""
    data = Batches(3, torch.float64)
    options = {"generator_steps": 2, "accumulate": 2, "clip": 0.05, "milestones": (1, 2), "learning_rate": 1e-2}
    method = module(**options).double()
    generator, discriminator = copy.deepcopy(method.network), copy.deepcopy(method.discriminator)
    ema = EMA(decay=0.9)
    fit(method, data, epochs=3, precision="64-true", callbacks=[ema])

    adams = [torch.optim.Adam(network.parameters(), 1e-2, (0.9, 0.999)) for network in (generator, discriminator)]
    average, updates, batches = copy.deepcopy(generator), 0, 0
    for epoch in range(3):
        for adam in adams:
            adam.param_groups[0]["lr"] = 1e-2 * 0.1 ** min(epoch, 2)
        for index in range(3):
            rainy, clean = data[index]["rainy"], data[index]["clean"]
            restored = generator(rainy, hierarchy=True)
            real = [features.detach() for features in generator(clean, hierarchy=True).features]
            scales = zip(HIERARCHICAL, restored.images, pyramid(clean, 4), strict=True)
            loss = 1 - structural_similarity(restored.derained, clean)
            loss = loss + sum(weight * (1 - structural_similarity(x, y)) for weight, x, y in scales)
            fake = discriminator(restored.derained, restored.features)
            pairs = zip(ADVERSARIAL, discriminator(clean, real), fake, strict=True)
            loss = loss + sum(weight * adversarial(r.detach(), f)[0] for weight, r, f in pairs)
            gradients = torch.autograd.grad(loss / 2, list(generator.parameters()))
            for parameter, gradient in zip(generator.parameters(), gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            updates_discriminator = (updates + 1) % 2 == 0
            if updates_discriminator:
                fake = discriminator(restored.derained.detach(), [features.detach() for features in restored.features])
                pairs = zip(ADVERSARIAL, discriminator(clean, real), fake, strict=True)
                loss = sum(weight * adversarial(r, f)[1] for weight, r, f in pairs) / 2
                loss.backward(inputs=list(discriminator.parameters()))
            if index in {1, 2}:
                for adam in adams if updates_discriminator else adams[:1]:
                    torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 0.05)
                    adam.step()
                    adam.zero_grad()
                updates += 1
            batches += 1
            decay = min(0.9, (1 + batches) / (10 + batches))
            with torch.no_grad():
                for mean, value in zip(average.parameters(), generator.parameters(), strict=True):
                    mean.copy_(decay * mean + (1 - decay) * value)
    for ours, theirs in ((method.network, generator), (method.discriminator, discriminator), (ema.average, average)):
        for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter.data, expected.data, rtol=1e-6, atol=1e-6, msg=name)
    assert not torch.equal(generator.embed.weight, module().double().network.embed.weight)


def test_gradients_are_clipped():
    method = module(clip=1e-3)
    method.trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for parameter in method.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    method.on_before_optimizer_step(torch.optim.Adam(method.network.parameters()))
    norm = torch.stack([p.grad.norm() for p in method.network.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_keeps_losses_in_float32():
    method = module(generator_steps=1)
    losses = []
    method.log = lambda name, value, **_: losses.append(value)
    method.log_dict = lambda parts, **_: losses.extend(parts.values())
    fit(method, Batches(1), precision="bf16-mixed")
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert all(loss.isfinite() for loss in losses)


def test_nan_loss_stops_the_run_and_names_the_images():
    data = Batches(4, images=2, size=16)
    data[2]["rainy"][1, 0, 3, 3] = float("nan")
    method = module_of_one_weight()
    before = None

    class RememberWeights(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            nonlocal before
            before = copy.deepcopy(pl_module.network.state_dict())

    with pytest.raises(DerainError, match="2-0, 2-1"):
        fit(method, data, callbacks=[RememberWeights()])
    assert all(torch.equal(value, before[name]) for name, value in method.network.state_dict().items())


def test_infinite_gradient_stops_the_run():
    method = module()
    method.network.embed.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DerainError, match="0-0, 0-1"):
        fit(method, Batches(1, images=2))
    assert all(value.isfinite().all() for value in method.network.parameters())


def test_checkpoints_with_the_former_name_of_updates_load(tmp_path):
    trainer = fit(module_of_one_weight(), Batches(3, size=16))
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert checkpoint["updates"] == 3
    checkpoint["windows"] = checkpoint.pop("updates")
    method = module_of_one_weight()
    method.on_load_checkpoint(checkpoint)
    assert method.updates == 3


class SaveAt(lightning.Callback):
    """Write a checkpoint at the validation after a number of batches."""

    def __init__(self, batches, file):
        self.batches, self.file = batches, file

    def on_validation_end(self, trainer, module):
        if trainer.fit_loop.epoch_loop.batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.file)


def test_resume_during_gradient_accumulation(tmp_path):
    """A checkpoint holds accumulated gradients of generator and discriminator."""
    data = Batches(1, size=16)
    data.batches *= 8  # equal, since this data set cannot resume at a batch
    loaders = [torch.utils.data.DataLoader(source, batch_size=None) for source in (data, Batches(1, size=16))]
    states = []
    for batches, checkpoint in ((6, None), (4, None), (0, tmp_path / "6.ckpt")):
        method = module_of_one_weight(accumulate=4, generator_steps=2)
        method.validation_step = lambda *_: None
        method.on_validation_epoch_end = lambda: None
        trainer = lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            max_epochs=1,
            val_check_interval=2,
            num_sanity_val_steps=0,
            callbacks=[SaveAt(batches, tmp_path / f"{batches}.ckpt")],
        )
        trainer.fit(method, *loaders, ckpt_path=checkpoint)
        assert method.updates == 2
        states.append(method.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert torch.equal(value, states[2][name]), name
    during, after = (torch.load(tmp_path / f"{count}.ckpt", weights_only=True).get("gradients") for count in (6, 4))
    assert {name.partition(".")[0] for name in during} == {"network", "discriminator"}
    assert after is None


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"generator_steps": 2, "discriminator_steps": 2}, "discriminator_steps 2"),
        ({"generator_steps": 0}, "generator_steps 0"),
        ({"accumulate": 0}, "accumulate 0"),
        ({"clip": 0.0}, "clip 0.0"),
        ({"beta": -1.0}, "beta -1.0"),
        ({"hierarchy": 0}, "hierarchy 0"),
        ({"stages": (1, 1, 0, 1)}, r"stages \[1, 1, 0, 1\]"),
        ({"channels": 0}, "0 channels"),
        ({"heads": 0}, "0 heads"),
        ({"discriminator_channels": -8}, "-8 channels"),
        ({"discriminator_stages": 0}, "stages 0"),
        ({"unit": "local", "fusion": False}, "unit local"),
    ],
)
def test_options_out_of_range(options, value):
    with pytest.raises(DerainError, match=value):
        module(**options)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"unit": "non_local"}, "generator .*'non_local'"),
        ({"discriminator_unit": "non_local"}, "discriminator .*'non_local'"),
        ({"branches": "non_local"}, "'non_local'"),
        ({"interaction": "concat"}, "'concat'"),
    ],
)
def test_unknown_kinds_are_refused(options, value, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # beartype would report them first
    with pytest.raises(DerainError, match=value):
        module(**options)


@pytest.mark.parametrize("options", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_trainer_clipping_and_accumulation_are_refused(options):
    with pytest.raises(DerainError, match=next(iter(options))):
        fit(module(), Batches(1), **options)


def test_every_loss_of_every_scale_is_logged():
    trainer = fit(module(generator_steps=1), Batches(1))
    names = {f"train/{kind}_{k}" for kind in ("hierarchical", "generator", "discriminator") for k in (1, 2, 3, 4)}
    assert names | {"train/pixel", "train/loss", "train/discriminator"} <= set(trainer.callback_metrics)
    trainer = fit(module(deep=False, content=False, generator_steps=1), Batches(1))
    assert {name for name in trainer.callback_metrics if "generator_" in name} == {"train/generator_4"}
    assert "train/discriminator_4" in trainer.callback_metrics
