"""DA-CLIP + IR-SDE through the command: controller, restoration, sampling, several processes, resuming."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from derain.cli import main
from derain.files.weights import sha256
from derain.images import read_rgb
from tests.factories import make_clip, make_set
from tests.runs import differing, finish, last, rows, whole_and_resumed

NETWORK = {"channels": 32, "multipliers": [1, 2], "attention": "none", "max_sigma": 10, "context": 8}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with data, a tiny CLIP, ``daclip.yaml`` for the controller and ``sde.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    for name in ("LOCAL_RANK", "DERAIN_CLIP", "DERAIN_CONTROLLER"):
        monkeypatch.delenv(name, raising=False)
    make_set(tmp_path / "data", "Rain800", "train", count=8)
    make_set(tmp_path / "data", "Rain800", "test", count=3, seed=50)
    clip = str(make_clip(tmp_path / "clip"))
    data = {"train": "Rain800", "test": "Rain800", "crop": 16, "batch_size": 2, "workers": 0}
    trainer = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
    ema = {"callbacks": [{"class_path": "EMA", "init_args": {"decay": 0.9}}]}
    configs = {
        "daclip": {"model": {"class_path": "DACLIPModule", "init_args": {"clip": clip}}, "trainer": trainer},
        "sde": {
            "model": {"class_path": "DACLIPSDEModule", "init_args": {**NETWORK, "clip": clip}},
            "trainer": trainer | ema,
        },
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config | {"data": data}))
    return tmp_path


@pytest.mark.slow
def test_from_captions_to_a_restored_photo(place, capsys):
    for split in ("train", "test"):
        assert main(["caption", "Rain800", f"{split}.tsv", "--captioner", "template", "--split", split]) == 0
    captioned = ["--data.val", "Rain800", "--data.captions", "[train.tsv, test.tsv]"]
    assert main(["fit", "--config", "daclip.yaml", *captioned]) == 0
    controller = str(place / "runs/daclip/fit-1/weights.safetensors")
    accuracies = [row["val/accuracy"] for row in rows(place / "runs/daclip/fit-1/metrics.csv") if row["val/accuracy"]]
    assert len(accuracies) == 2
    assert main(["validate", "--config", "daclip.yaml", "--weights", controller]) == 0
    assert main(["fit", "--config", "sde.yaml", "--model.controller", controller]) == 0
    file = str(place / "runs/sde/fit-1/weights.safetensors")
    content = last(place / "runs/sde/fit-1")
    assert all(name.startswith("network.") for name in content["state_dict"])
    assert content["derain"]["controller_sha256"] == sha256(Path(controller))
    assert len(content["derain"]["sde"]["speed"]) == 101
    capsys.readouterr()
    for steps in ("3", "100"):
        chosen = ["--sampling.solver", "posterior", "--sampling.steps", steps, "--sampling.seed", "4"]
        assert main(["test", "--config", "sde.yaml", "--weights", file, *chosen]) == 0
    summary = json.loads((place / "runs/sde/test-2/summary.json").read_text())
    assert summary["sampling"] == {"solver": "posterior", "steps": 100, "seed": 4}
    assert summary["lpips_net"] is None
    predict = ["predict", "--config", "sde.yaml", "--weights", file, "--data.predict", "Rain800", "--explain", "true"]
    assert main([*predict, "--sampling.steps", "2"]) == 2  # Rain800's own real photos are not here
    make_set(place, "images", "predict", count=1)
    predict[6] = "images"
    assert main([*predict, "--sampling.steps", "2"]) == 0
    told = next((place / "runs/sde").rglob("*-explain.json"))
    assert set(json.loads(told.read_text())["degradation"]) == {"rainy", "clean"}
    restore = ["restore", "images", "--weights", file]
    assert main([restore[0], restore[1], "one", *restore[2:], "--steps", "2", "--explain"]) == 0
    assert main([restore[0], restore[1], "two", *restore[2:], "--steps", "2", "--seed", "1"]) == 0
    one, two = (read_rgb(min(Path(folder).rglob("*.png"), key=str)) for folder in ("one", "two"))
    assert not np.array_equal(one, two)


@pytest.mark.slow
def test_a_controller_learns_to_tell_rainy_from_clean(place):
    """From about chance to four of five at least, on images that it was not trained on."""
    make_set(place / "more", "Rain800", "train", count=40, size=(64, 64))
    make_set(place / "more", "Rain800", "test", count=20, size=(64, 64), seed=500)
    vision = {"patch_size": 16, "hidden_size": 64, "intermediate_size": 128}
    clip = str(make_clip(place / "larger", size=32, **vision))
    data = {"root": str(place / "more"), "val": "Rain800", "crop": 64, "batch_size": 8, "repeat": 4, "workers": 0}
    options = [f"--data.{name}={value}" for name, value in data.items()]
    options += ["--model.clip", clip, "--model.learning_rate", "1e-3", "--model.smallest", "0.3"]
    assert main(["fit", "--config", "daclip.yaml", *options, "--trainer.max_epochs", "7"]) == 0
    found = rows(place / "runs/daclip/fit-1/metrics.csv")
    accuracies = [float(row["val/accuracy"]) for row in found if row["val/accuracy"]]
    assert accuracies[0] < 0.75
    assert max(accuracies) >= 0.8  # 0.875 to 0.95, depending on the processor


def test_what_is_refused_in_one_line(place, capsys, monkeypatch):
    one = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    assert main(["fit", "--config", "daclip.yaml", *one]) == 0
    assert main(["fit", "--config", "sde.yaml", *one]) == 0
    controller, file = (str(place / f"runs/{name}/fit-1/weights.safetensors") for name in ("daclip", "sde"))
    make_set(place, "images", "predict", count=1)
    restore = ["restore", "images", "out", "--weights"]
    again = ["--trainer.max_epochs", "2", "--ckpt_path", "last"]
    for arguments, told in (
        (["test", "--config", "sde.yaml", "--weights", controller], "DACLIPModule restores no images"),
        ([*restore, controller], "restores no images; give weights of a method"),
        ([*restore, file, "--solver", "euler"], "--solver euler: unknown; choose from posterior"),
        ([*restore, file, "--steps", "101"], "the schedule of these weights has 100 times"),
        ([*restore, file, "--route", "1"], "DACLIPSDEModule has no routes"),
        (["fit", "--config", "sde.yaml", "--model.context", "9"], "set --model.context 8"),
        (["fit", "--config", "sde.yaml", "--model.max_sigma", "0"], "--model.max_sigma 0"),
        (["fit", "--config", "sde.yaml", "--model.controller", "no.pt"], "no.pt: no such file"),
        (["fit", "--config", "daclip.yaml", "--data.captions", "no.tsv"], "no.tsv: no such file"),
        (
            ["fit", "--config", "sde.yaml", *again, "--model.controller", controller],
            "different one (None)",
        ),
        (["fit", "--config", "daclip.yaml", *again, "--model.order", "aligned"], "this run began with reversed"),
        (["fit", "--config", "daclip.yaml", "--weights", controller, "--model.controller", controller], "give one"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2, arguments
        assert told in capsys.readouterr().err.strip().splitlines()[-1], arguments
    monkeypatch.setenv("DERAIN_CLIP", str(make_clip(place / "wider", size=16)))
    for command in ("test", "validate", "predict"):  # what restores checks first, as fit and restore do
        arguments = [command, "--config", "sde.yaml", "--weights", file, "--data.predict", "images"]
        assert main(arguments) == 2
        assert "set --model.context 16" in capsys.readouterr().err.strip().splitlines()[-1], command


@pytest.mark.parametrize("path", ["last", "runs/sde/fit-1/checkpoints/last.ckpt"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model.channels", "64"], "--model.channels 64: this run began with 32; give that one to go on"),
        (["--model.attention", "linear"], "--model.attention linear: this run began with none"),
        (["--model", "PReNetModule"], "--model PReNetModule: this run began with DACLIPSDEModule"),
        (["--model.max_sigma", "20"], "--model.max_sigma 20.0: this run began with 10"),
        (["--model.residual", "0.1"], "--model.residual 0.1: this run began with None"),
    ],
)
def test_a_run_does_not_go_on_with_another_network(place, capsys, options, told, path):
    fit = ["fit", "--config", "sde.yaml", "--model.contexts", "none", "--trainer.limit_train_batches", "1"]
    assert main([*fit, "--trainer.max_epochs", "1"]) == 0
    assert main([*fit, "--ckpt_path", path, *options]) == 2
    assert told in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_tells_how_it_is_trained_otherwise(place, caplog):
    fit = ["fit", "--config", "sde.yaml", "--model.contexts", "none", "--trainer.limit_train_batches", "1"]
    assert main([*fit, "--trainer.max_epochs", "1"]) == 0
    again = ["--trainer.max_epochs", "2", "--ckpt_path", "last", "--model.learning_rate", "1e-5"]
    assert main([*fit, *again]) == 0
    assert "differ from those that the run began with: learning_rate 0.0002 → 1e-05" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "judged"), [("sde", "val/psnr"), ("daclip", "val/accuracy")])
def test_a_killed_run_goes_on_and_ends_where_an_uninterrupted_one_ends(place, name, judged):
    fit = ["fit", "--config", f"{name}.yaml", "--trainer.max_epochs", "4"]
    whole, _, resumed = whole_and_resumed(fit, "train/loss", judged, "lr-AdamW")
    for state in ("state_dict", "ema") if name == "sde" else ("state_dict",):
        assert differing(whole[state], resumed[state]) == []


def test_a_table_that_was_cut_off_does_not_keep_a_run_from_going_on(place, caplog):
    fit = ["fit", "--config", "sde.yaml", "--trainer.default_root_dir", "cut"]
    assert main([*fit, "--trainer.max_epochs", "1"]) == 0
    table = place / "cut/fit-1/metrics.csv"
    whole = table.read_text()
    table.write_text(whole + "1,7")
    assert main([*fit, "--trainer.max_epochs", "2", "--ckpt_path", "last"]) == 0
    assert table.read_text().startswith(whole.partition("\n")[0])
    assert len(rows(table)) > whole.count("\n")
    table.write_text("")
    assert main([*fit, "--trainer.max_epochs", "3", "--ckpt_path", "last"]) == 0
    assert "metrics.csv" in caplog.text
    assert rows(table)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sde", "daclip"])
def test_two_processes(place, name):
    both = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]
    finish("fit", "--config", f"{name}.yaml", *both)
    found = rows(place / f"runs/{name}/fit-1/metrics.csv")
    assert all(float(row["train/loss"]) >= 0 for row in found if row["train/loss"])
    key = "val/accuracy" if name == "daclip" else "val/psnr"
    assert [row[key] for row in found if row[key]]


@pytest.mark.slow
def test_two_processes_judge_as_one(place):
    assert main(["fit", "--config", "sde.yaml", "--trainer.max_epochs", "1"]) == 0
    test = ["test", "--config", "sde.yaml", "--weights", "runs/sde/fit-1/weights.safetensors", "--sampling.steps", "3"]
    assert main([*test, "--trainer.default_root_dir", "one"]) == 0
    two = ["--trainer.default_root_dir", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    finish(*test, *two)
    tables = [(place / f"{root}/test-1/images.csv").read_text() for root in ("one", "two")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_the_contrast_of_two_processes_is_that_of_one_large_batch(place):
    """Gathered over ranks, two batches of one pair contrast as one of two; so do their gradients."""
    script = place / "ranks.py"
    script.write_text(
        "import sys, torch, lightning\n"
        "from derain.methods import DACLIPModule\n"
        "from derain.methods.daclipsde.loss import contrastive_loss\n"
        "class Probe(DACLIPModule):\n"
        "    def training_step(self, batch, index):\n"
        "        g = torch.Generator().manual_seed(7)\n"
        "        whole = torch.randn(4, 8, generator=g)\n"
        "        texts = ['a', 'b', 'c', 'b']\n"
        "        mine = slice(2 * self.global_rank, 2 * self.global_rank + 2)\n"
        "        images = whole[mine].clone().requires_grad_()\n"
        "        loss = self._contrast(images, texts[mine], torch.tensor(5.0), 'captions')\n"
        "        grad, = torch.autograd.grad(loss, images)\n"
        "        f = self._features(texts)\n"
        "        full = whole.clone().requires_grad_()\n"
        "        same = torch.tensor([[x == y for y in texts] for x in texts])\n"
        "        one = contrastive_loss(full, f, torch.tensor(5.0), same)\n"
        "        want, = torch.autograd.grad(one, full)\n"
        "        assert torch.allclose(loss, one, atol=1e-6), (loss, one)\n"
        "        # all ranks hold the whole loss, so a rank's own gradient comes once from each of the two\n"
        "        assert torch.allclose(grad, 2 * want[mine], atol=1e-5), (grad, want[mine])\n"
        "        return sum(p.sum() for p in self.parameters()) * 0\n"
        "    def on_validation_epoch_start(self): pass\n"
        "m = Probe(sys.argv[1])\n"
        "lightning.Trainer(accelerator='cpu', devices=2, strategy='ddp', max_steps=1, logger=False,\n"
        "    enable_checkpointing=False, enable_progress_bar=False).fit(m, torch.utils.data.DataLoader([0, 1]))\n"
    )
    finish(str(place / "clip"), program=(str(script),))
