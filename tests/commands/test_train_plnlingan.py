"""PLNLIN-MCDDL through the command: killed and resumed within a round, on two processes, and its errors."""

import pytest
import yaml
from lightning import Trainer

from derain.cli import main
from derain.errors import DerainError
from derain.files.weights import read
from derain.images import read_rgb, write_image
from derain.methods import PLNLINGANModule, catalog
from tests.factories import clean_image, make_set
from tests.runs import differing, error_line, finish, last, metrics, whole_and_resumed

NETWORK = {"channels": 4, "stages": [1, 1, 1, 1], "hierarchy": 1, "heads": 1}
NETWORK |= {"discriminator_channels": 4, "discriminator_stages": 1, "learning_rate": 1e-3}
LOSSES = [f"train/{kind}_{k}" for kind in ("hierarchical", "generator", "discriminator") for k in (1, 2, 3, 4)]
UNUSED = "ddp_find_unused_parameters_true"
CONVOLUTIONS = ["--model.unit", "local", "--model.discriminator_unit", "local"]
"""Units that take less time than those of the paper."""


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory with ``gan.yaml``: epochs of three batches, so that rounds of five end within them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    make_set(tmp_path / "data", "Rain800", "train", count=8, size=(64, 64))
    make_set(tmp_path / "data", "Rain800", "test", count=3, seed=50)
    config = {
        "model": {"class_path": "PLNLINGANModule", "init_args": NETWORK},
        "data": {"train": "Rain800", "test": "Rain800", "crop": 56, "batch_size": 2, "workers": 0},
        "trainer": {
            "max_epochs": 2,
            "limit_train_batches": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "callbacks": [{"class_path": "EMA", "init_args": {"decay": 0.9}}],
        },
    }
    (tmp_path / "gan.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.mark.slow
def test_a_run_killed_within_a_round_equals_an_uninterrupted_one(workdir):
    fit = ["fit", "--config", "gan.yaml", "--trainer.max_epochs", "4", *CONVOLUTIONS]
    columns = (*LOSSES, "train/loss", "val/psnr", "lr-generator")
    one, broken_off, two = whole_and_resumed(fit, *columns)
    assert broken_off["updates"] < 12
    assert broken_off["updates"] % 5  # between two steps of the discriminator
    assert one["updates"] == two["updates"] == 12
    assert one["global_step"] == two["global_step"] == 12
    states = [{"weights": c["state_dict"], "average": c["ema"]["network"]} for c in (one, two)]
    assert differing(*states) == []
    assert len(one["optimizer_states"]) == 2
    for first, second in zip(one["optimizer_states"], two["optimizer_states"], strict=True):
        assert differing(first["state"], second["state"]) == []
    table = metrics(workdir / "whole/fit-1", *columns)
    discriminator_losses = {row["train/discriminator_1"] for row in table} - {"", None}
    assert len(discriminator_losses) == 2  # each is logged until the epoch ends
    assert sum(bool(row["train/generator_1"]) for row in table) == 12


@pytest.mark.slow
def test_two_processes_have_the_same_weights_in_four_rounds(workdir):
    """Gathered after every batch; r is 2, so that four rounds are eight batches."""
    script = workdir / "ranks.py"
    script.write_text(
        "import torch, lightning\n"
        "from derain.methods import PLNLINGANModule\n"
        "from tests.methods.plnlingan.test_module import Batches, TINY\n"
        "torch.manual_seed(0)\n"
        "m = PLNLINGANModule(**TINY, generator_steps=2)\n"
        "class Compare(lightning.Callback):\n"
        "    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):\n"
        "        loss = module.all_gather(trainer.callback_metrics['train/loss'])\n"
        "        assert loss.numel() == 2 and loss.isfinite().all()\n"
        "        both = module.all_gather(torch.nn.utils.parameters_to_vector(module.parameters()).detach())\n"
        "        assert torch.equal(both[0], both[1]), batch_idx\n"
        "    def on_train_end(self, trainer, module):\n"
        "        rainy = torch.linspace(0, 1, 3 * 56 * 56).view(1, 3, 56, 56)\n"
        "        losses = module.all_gather((module(rainy) - rainy**2).abs().mean().detach())\n"
        "        assert losses[0] == losses[1], losses\n"
        "        steps = [{int(s['step']) for s in o.state.values()} for o in trainer.optimizers]\n"
        "        assert steps == [{8}, {4}], steps\n"
        f"t = lightning.Trainer(accelerator='cpu', devices=2, strategy='{UNUSED}', max_epochs=1, logger=False,\n"
        "    enable_checkpointing=False, enable_progress_bar=False, callbacks=[Compare()])\n"
        "loader = torch.utils.data.DataLoader(Batches(16), batch_size=None)\n"
        "t.fit(m, loader)\n"
        "if t.is_global_zero:\n"
        "    print(f'four rounds {t.global_step}')\n"
    )
    assert "four rounds 8" in finish(program=(str(script),))


@pytest.mark.slow
def test_two_processes_train_and_test_through_the_command(workdir):
    two = ["--trainer.devices", "2", "--trainer.strategy", UNUSED]
    finish("fit", "--config", "gan.yaml", *two)
    table = metrics(workdir / "runs/gan/fit-1", "train/loss", "val/psnr")
    assert any(row["val/psnr"] for row in table)
    test = ["test", "--config", "gan.yaml", "--weights", "runs/gan/fit-1/weights.safetensors"]
    assert main([*test, "--trainer.default_root_dir", "one"]) == 0
    finish(*test, "--trainer.default_root_dir", "two", *two)
    tables = [(workdir / f"{root}/test-1/images.csv").read_text() for root in ("one", "two")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_weights_contain_the_generator_only(workdir):
    assert main(["fit", "--config", "gan.yaml", "--trainer.max_epochs", "1"]) == 0
    file = workdir / "runs/gan/fit-1/weights.safetensors"
    loaded = catalog.load(file).module
    content = last(workdir / "runs/gan/fit-1")
    assert set(read(file).state) == set(loaded.network.state_dict())
    assert any(name.startswith("discriminator.") for name in content["state_dict"])
    for size in ((121, 77), (1, 1), (37, 31)):
        photo = workdir / f"{size[0]}.png"
        write_image(photo, clean_image(1, size))
        assert main(["restore", str(photo), f"out-{size[0]}.png", "--weights", str(file)]) == 0
        assert read_rgb(workdir / f"out-{size[0]}.png").shape == (*size, 3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--trainer.gradient_clip_val", "1"], "--model.clip"),
        (["--trainer.accumulate_grad_batches", "2"], "--model.accumulate"),
        (["--model.generator_steps", "2", "--model.discriminator_steps", "2"], "discriminator_steps"),
        (["--model.hierarchy", "0"], "--model.hierarchy 0"),
        (["--model.heads", "3"], "3"),
        (["--model.stages", "[1,1]"], "stages"),
    ],
)
def test_errors_take_one_line(workdir, capsys, options, named):
    assert main(["fit", "--config", "gan.yaml", *options]) == 2
    assert named in error_line(capsys)


def test_plain_ddp_is_an_error():
    module = PLNLINGANModule(**NETWORK)
    module.trainer = Trainer(accelerator="cpu", strategy="ddp", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(DerainError, match=UNUSED):
        module.on_fit_start()
