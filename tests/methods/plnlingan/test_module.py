"""Turns, gradients and counters of the manual optimisation, against the same run in plain torch."""

import copy

import lightning
import pytest
import torch

from derain import PLNLINGANModule
from derain.callbacks import EMA
from derain.errors import DerainError
from derain.methods.plnlingan.loss import ADVERSARIAL, HIERARCHICAL, pyramid
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
def test_features_of_the_last_plnlim_are_shown(options, names):
    method = module(**options)
    assert method.maps == names
    last = method.network.decoder[0]
    seen = []
    parts = [last.local[-1], last.non_local[-1], last] if method.hparams["unit"] == "plnlim" else [last]
    rainy = torch.rand(2, 3, 37, 60, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        handles = [part.register_forward_hook(lambda _, __, out: seen.append(out)) for part in parts]
        derained = method(rainy)
        for handle in handles:
            handle.remove()
        found = method.explain(rainy)
    torch.testing.assert_close(found[:, :3], derained)
    assert found.shape == (2, 3 + len(names), 37, 60)
    for shown, features in zip(found[:, 3:].unbind(1), seen, strict=True):
        magnitude = features.abs().mean(-1)[:, :37, :60]
        torch.testing.assert_close(shown, magnitude / (magnitude + magnitude.mean((1, 2), keepdim=True)))
    assert 0 <= found[:, 3:].min() < 0.5 < found[:, 3:].max() < 1


def test_features_that_are_all_zero_are_shown_black():
    method = module()
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.zero_()
        assert method.explain(torch.rand(1, 3, 56, 56))[:, 3:].abs().max() == 0


def test_the_discriminator_may_have_other_heads():
    method = module(channels=6, heads=3, discriminator_channels=4, discriminator_heads=2)
    assert {block.attn.num_heads for block in method.network.decoder[0].non_local} == {3}
    assert {block.attn.num_heads for block in method.discriminator.first.non_local} == {2}
    assert {block.attn.num_heads for block in module(heads=2).discriminator.first.non_local} == {2}
    with pytest.raises(DerainError, match="0 heads"):
        module(discriminator_heads=0)


class Batches(torch.utils.data.Dataset):
    def __init__(self, count, dtype=torch.float32, **changes):
        self.all = [
            {k: v.to(dtype) if k in {"rainy", "clean"} else v for k, v in batch(i).items()} for i in range(count)
        ]
        for place, change in changes.items():
            change(self.all[int(place[1:])])

    def __len__(self):
        return len(self.all)

    def __getitem__(self, place):
        return self.all[place]


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


def prepared(method):
    """A module that runs ``training_step`` outside a trainer, and what it descended."""
    data = Batches(1).all[0]
    rainy, clean = data["rainy"], data["clean"]
    restored = method.network(rainy, hierarchy=True)
    with torch.no_grad():
        real = method.network(clean, hierarchy=True).features
    return restored, clean, real


def graded(parameters):
    return [parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in parameters]


def test_a_generators_step_gives_gradient_to_the_generator_alone():
    method = module()
    parts = method.generator_losses(*prepared(method))
    sum(parts["generator"]).backward()
    given = dict(method.network.named_parameters())
    absent = {name for name, p in given.items() if p.grad is None}
    assert absent == {f"outputs.{k}.{kind}" for k in range(4) for kind in ("weight", "bias")}  # the others' losses
    assert not any(graded(method.discriminator.parameters()))
    assert all(parameter.requires_grad for parameter in method.discriminator.parameters())


def test_a_discriminators_step_gives_gradient_to_the_discriminator_alone():
    method = module()
    sum(method.discriminator_losses(*prepared(method))["discriminator"]).backward()
    assert not any(graded(method.network.parameters()))
    assert sum(graded(method.discriminator.parameters())) > 0.9 * len(list(method.discriminator.parameters()))


def test_nothing_reaches_the_generator_through_real_features(monkeypatch):
    seen = []
    kept = PLNLINGANModule.generator_losses
    monkeypatch.setattr(
        PLNLINGANModule,
        "generator_losses",
        lambda self, restored, clean, real: seen.extend(real) or kept(self, restored, clean, real),
    )
    fit(module(), Batches(1))
    assert len(seen) == 4
    assert not any(one.requires_grad for one in seen)


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
def test_who_takes_a_turn_when(options, expected):
    trainer = fit(module(**options), Batches(20))
    assert tuple(steps(one) for one in trainer.optimizers) == expected
    assert trainer.global_step == max(*expected[0], *expected[1])


def test_turns_go_on_over_epochs():
    method = module()
    trainer = fit(method, Batches(3), epochs=4)
    assert [steps(one) for one in trainer.optimizers] == [{12}, {2}]
    assert method.updates == 12


def test_validation_within_an_accumulation_changes_nothing():
    class Judged(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, place):
            return Batches(1).all[0] | {"rainy": torch.rand(1, 3, 16, 16), "clean": torch.rand(1, 3, 16, 16)}

    trained = []
    for every in (1, 4):
        method = module(accumulate=4)
        method.validation_step = lambda *_: None
        method.on_validation_epoch_end = lambda: None
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, val_check_interval=every
        )
        loaders = [torch.utils.data.DataLoader(one, batch_size=None) for one in (Batches(4), Judged())]
        trainer.fit(method, *loaders)
        trained.append(method.network.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_without_adversary_there_is_no_discriminator():
    method = module(beta=0.0)
    trainer = fit(method, Batches(2))
    assert method.discriminator is None
    assert len(trainer.optimizers) == 1
    assert steps(fit(module(beta=0.0, generator_steps=1, discriminator_steps=5), Batches(2)).optimizers[0]) == {2}
    assert len(module(beta=0.0, alpha=0.0).network.supervised) == 0
    assert len(module(alpha=0.0).network.supervised) == 4


def test_a_run_is_the_same_written_out_by_hand():
    """Three epochs of five batches: turns of 2, accumulation of 2, clipping, schedules, an average."""
    data = Batches(5, torch.float64)
    options = {"generator_steps": 2, "accumulate": 2, "clip": 0.05, "milestones": (1, 2), "learning_rate": 1e-2}
    method = module(**options).double()
    generator, judge = copy.deepcopy(method.network), copy.deepcopy(method.discriminator)
    ema = EMA(decay=0.9)
    fit(method, data, epochs=3, precision="64-true", callbacks=[ema])

    adams = [torch.optim.Adam(one.parameters(), 1e-2, (0.9, 0.999)) for one in (generator, judge)]
    average, window, batches = copy.deepcopy(generator), 0, 0
    for epoch in range(3):
        for group in (adam.param_groups[0] for adam in adams):
            group["lr"] = 1e-2 * 0.1 ** min(epoch, 2)
        for place in range(5):
            rainy, clean = data[place]["rainy"], data[place]["clean"]
            restored = generator(rainy, hierarchy=True)
            real = [one.detach() for one in generator(clean, hierarchy=True).features]
            smaller = zip(HIERARCHICAL, restored.images, pyramid(clean, 4), strict=True)
            loss = 1 - structural_similarity(restored.derained, clean)
            loss = loss + sum(weight * (1 - structural_similarity(x, y)) for weight, x, y in smaller)
            pairs = zip(ADVERSARIAL, judge(clean, real), judge(restored.derained, restored.features), strict=True)
            loss = loss + sum(weight * adversarial(r.detach(), f)[0] for weight, r, f in pairs)
            gradients = torch.autograd.grad(loss / 2, list(generator.parameters()))
            for parameter, gradient in zip(generator.parameters(), gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            turn = (window + 1) % 2 == 0
            if turn:
                fake = judge(restored.derained.detach(), [one.detach() for one in restored.features])
                pairs = zip(ADVERSARIAL, judge(clean, real), fake, strict=True)
                (sum(weight * adversarial(r, f)[1] for weight, r, f in pairs) / 2).backward(
                    inputs=list(judge.parameters())
                )
            if place % 2 == 1 or place == 4:
                for adam in adams if turn else adams[:1]:
                    torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 0.05)
                    adam.step()
                    adam.zero_grad()
                window += 1
            batches += 1
            decay = min(0.9, (1 + batches) / (10 + batches))
            with torch.no_grad():
                for mean, value in zip(average.parameters(), generator.parameters(), strict=True):
                    mean.copy_(decay * mean + (1 - decay) * value)
    for mine, by_hand in ((method.network, generator), (method.discriminator, judge), (ema.average, average)):
        for (name, one), other in zip(mine.named_parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(one.data, other.data, rtol=1e-6, atol=1e-6, msg=name)
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
    method = module()
    seen = []
    method.log_dict = lambda parts, **_: seen.extend(parts.values())
    fit(method, Batches(5), precision="bf16-mixed")
    assert {one.dtype for one in seen} == {torch.float32}
    assert all(one.isfinite() for one in seen)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_images():
    def spoil(one):
        one["rainy"][1, 0, 3, 3] = float("nan")

    method = module()
    before = None

    class Keep(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            nonlocal before
            before = copy.deepcopy(pl_module.network.state_dict())

    with pytest.raises(DerainError, match=r"^loss .* epoch 0, step 2, images 2-0, 2-1;"):
        fit(method, Batches(4, _2=spoil), callbacks=[Keep()])
    assert all(torch.equal(value, before[name]) for name, value in method.network.state_dict().items())


def test_a_gradient_that_is_no_number_stops_the_run():
    method = module()
    method.network.embed.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DerainError, match=r"^gradient .* epoch 0, step 0, images 0-0, 0-1;"):
        fit(method, Batches(1))
    assert all(value.isfinite().all() for value in method.network.parameters())


class SaveAt(lightning.Callback):
    """Writes a checkpoint when validation comes in after so many batches."""

    def __init__(self, batches, file):
        self.batches, self.file = batches, file

    def on_validation_end(self, trainer, module):
        if trainer.fit_loop.epoch_loop.batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.file)


def test_a_run_goes_on_within_an_accumulation(tmp_path):
    """Gradients that are added up when a checkpoint is written are part of it, those of both networks."""
    data = Batches(1)
    data.all *= 8  # alike, since this data set does not know where it was
    loaders = [torch.utils.data.DataLoader(one, batch_size=None) for one in (data, Batches(1))]
    ended = []
    for batches, continued in ((6, None), (4, None), (0, tmp_path / "6.ckpt")):
        method = module(accumulate=4, generator_steps=2)
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
        trainer.fit(method, *loaders, ckpt_path=continued)
        assert method.updates == 2
        ended.append(method.state_dict())
    for name, value in ended[0].items():
        assert torch.equal(value, ended[1][name]), name
        assert torch.equal(value, ended[2][name]), name
    within, between = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True).get("gradients") for n in (6, 4))
    assert {name.partition(".")[0] for name in within} == {"network", "discriminator"}
    assert between is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"generator_steps": 2, "discriminator_steps": 2}, "one of them must be 1"),
        ({"generator_steps": 0}, "one of them must be 1"),
        ({"accumulate": 0}, "accumulate 0 must be at least 1"),
        ({"clip": 0.0}, "clip 0.0 above 0"),
        ({"beta": -1.0}, "beta -1.0 at least 0"),
        ({"hierarchy": 0}, "hierarchy 0: must be"),
        ({"stages": (1, 1, 0, 1)}, "give four stages of at least 1"),
        ({"channels": 0}, "a generator of 0 channels, 1 heads"),
        ({"heads": 0}, "0 heads"),
        ({"discriminator_channels": -8}, "a discriminator of -8 channels"),
        ({"discriminator_stages": 0}, "stages of 0; each must be at least 1"),
        ({"unit": "local", "fusion": False}, "unit local: has no branches, interaction or fusion"),
    ],
)
def test_options_out_of_range(options, told):
    with pytest.raises(DerainError, match=told):
        module(**options)


@pytest.mark.parametrize("options", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_the_trainers_clipping_and_accumulation_are_refused(options):
    with pytest.raises(DerainError, match=r"use --model\.clip, --model\.accumulate"):
        fit(module(), Batches(1), **options)


def test_every_loss_of_every_scale_is_logged():
    trainer = fit(module(), Batches(5))
    names = {f"train/{kind}_{k}" for kind in ("hierarchical", "generator", "discriminator") for k in (1, 2, 3, 4)}
    assert names | {"train/pixel", "train/loss", "train/discriminator"} <= set(trainer.callback_metrics)
    trainer = fit(module(deep=False, content=False), Batches(5))
    assert {name for name in trainer.callback_metrics if "generator_" in name} == {"train/generator_4"}
    assert "train/discriminator_4" in trainer.callback_metrics
