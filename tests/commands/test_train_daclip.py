"""DA-CLIP + IR-SDE through the command: controller, restoration, sampling, several processes, resuming."""

import json
import shutil
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


ONE_STEP = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
CONTROLLER = "runs/daclip/fit-1/weights.safetensors"
WEIGHTS = "runs/sde/fit-1/weights.safetensors"


def enter(folder, patch):
    """Make a folder the working directory, with its data and cache."""
    patch.chdir(folder)
    patch.setenv("DERAIN_DATA", str(folder / "data"))
    patch.setenv("DERAIN_CACHE", str(folder / "cache"))
    patch.setenv("TORCH_HOME", str(folder / "nothing"))
    for name in ("LOCAL_RANK", "DERAIN_RUN", "DERAIN_CLIP", "DERAIN_CONTROLLER"):
        patch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with data, a tiny CLIP, ``daclip.yaml`` (controller), ``sde.yaml``, and a run of one step of both."""
    folder = tmp_path_factory.mktemp("daclip")
    make_set(folder / "data", "Rain800", "train", count=8)
    make_set(folder / "data", "Rain800", "test", count=3, seed=50)
    make_clip(folder / "clip")
    data = {"train": "Rain800", "test": "Rain800", "crop": 16, "batch_size": 2, "workers": 0}
    trainer = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
    ema = {"callbacks": [{"class_path": "EMA", "init_args": {"decay": 0.9}}]}
    daclip = {"class_path": "DACLIPModule", "init_args": {"clip": "clip"}}
    sde = {"class_path": "DACLIPSDEModule", "init_args": {**NETWORK, "clip": "clip"}}
    configs = {"daclip": {"model": daclip, "trainer": trainer}, "sde": {"model": sde, "trainer": trainer | ema}}
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        for name, config in configs.items():
            Path(f"{name}.yaml").write_text(yaml.safe_dump(config | {"data": data}))
            assert main(["fit", "--config", f"{name}.yaml", *ONE_STEP]) == 0
    return folder


@pytest.fixture
def trained(prepared, tmp_path, monkeypatch):
    """The working directory of a test: a copy of ``prepared``."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    enter(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def workdir(trained):
    """A copy of ``prepared`` without its runs."""
    shutil.rmtree(trained / "runs")
    return trained


@pytest.mark.slow
def test_from_captions_to_a_restored_photo(workdir):
    for split in ("train", "test"):
        assert main(["caption", "Rain800", f"{split}.tsv", "--captioner", "template", "--split", split]) == 0
    captioned = ["--data.val", "Rain800", "--data.captions", "[train.tsv, test.tsv]"]
    assert main(["fit", "--config", "daclip.yaml", *captioned]) == 0
    controller = str(workdir / "runs/daclip/fit-1/weights.safetensors")
    accuracies = [row["val/accuracy"] for row in rows(workdir / "runs/daclip/fit-1/metrics.csv") if row["val/accuracy"]]
    assert len(accuracies) == 2
    assert main(["validate", "--config", "daclip.yaml", "--weights", controller]) == 0
    assert main(["fit", "--config", "sde.yaml", "--model.controller", controller]) == 0
    file = str(workdir / "runs/sde/fit-1/weights.safetensors")
    content = last(workdir / "runs/sde/fit-1")
    assert all(name.startswith("network.") for name in content["state_dict"])
    assert content["derain"]["controller_sha256"] == sha256(Path(controller))
    assert len(content["derain"]["sde"]["speed"]) == 101
    chosen = ["--sampling.solver", "posterior", "--sampling.steps", "3", "--sampling.seed", "4"]
    assert main(["test", "--config", "sde.yaml", "--weights", file, *chosen]) == 0
    summary = json.loads((workdir / "runs/sde/test-1/summary.json").read_text())
    assert summary["sampling"] == {"solver": "posterior", "steps": 3, "seed": 4}
    assert summary["lpips_net"] is None
    predict = ["predict", "--config", "sde.yaml", "--weights", file, "--data.predict", "Rain800", "--explain", "true"]
    assert main([*predict, "--sampling.steps", "2"]) == 2  # Rain800's own real photos are not here
    make_set(workdir, "images", "predict", count=1)
    predict[6] = "images"
    assert main([*predict, "--sampling.steps", "2"]) == 0
    explanation = next((workdir / "runs/sde").rglob("*-explain.json"))
    assert set(json.loads(explanation.read_text())["degradation"]) == {"rainy", "clean"}
    restore = ["restore", "images", "--weights", file]
    assert main([restore[0], restore[1], "one", *restore[2:], "--steps", "2", "--explain"]) == 0
    assert main([restore[0], restore[1], "two", *restore[2:], "--steps", "2", "--seed", "1"]) == 0
    first, second = (read_rgb(min(Path(folder).rglob("*.png"), key=str)) for folder in ("one", "two"))
    assert not np.array_equal(first, second)


@pytest.mark.slow
def test_a_controller_learns_to_distinguish_rainy_from_clean(workdir):
    """Its accuracy on validation images rises from chance to at least 80 % within seven epochs."""
    make_set(workdir / "more", "Rain800", "train", count=40, size=(64, 64))
    make_set(workdir / "more", "Rain800", "test", count=20, size=(64, 64), seed=500)
    vision = {"patch_size": 16, "hidden_size": 64, "intermediate_size": 128}
    clip = str(make_clip(workdir / "larger", size=32, **vision))
    data = {"root": str(workdir / "more"), "val": "Rain800", "crop": 64, "batch_size": 8, "repeat": 4, "workers": 0}
    options = [f"--data.{name}={value}" for name, value in data.items()]
    options += ["--model.clip", clip, "--model.learning_rate", "1e-3", "--model.smallest", "0.3"]
    options += ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/accuracy"]
    options += ["--trainer.callbacks.mode=max", "--trainer.callbacks.stopping_threshold=0.79"]
    options += ["--trainer.callbacks.patience=7"]
    assert main(["fit", "--config", "daclip.yaml", *options, "--trainer.max_epochs", "7"]) == 0
    metrics = rows(workdir / "runs/daclip/fit-1/metrics.csv")
    accuracies = [float(row["val/accuracy"]) for row in metrics if row["val/accuracy"]]
    assert accuracies[0] < 0.75
    assert max(accuracies) >= 0.8  # 0.875 to 0.95, depending on the processor


def error_of(arguments, capsys):
    """Run a command that must fail; return its error line."""
    capsys.readouterr()
    assert main(arguments) == 2, arguments
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_errors_take_one_line(trained, capsys, monkeypatch):
    make_set(trained, "images", "predict", count=1)
    restore = ["restore", "images", "out", "--weights"]
    fit_controller, fit_sde = ["fit", "--config", "daclip.yaml"], ["fit", "--config", "sde.yaml"]
    resume = ["--trainer.max_epochs", "2", "--ckpt_path", "last"]
    for arguments, named in (
        (["test", "--config", "sde.yaml", "--weights", CONTROLLER], "DACLIPModule"),
        ([*restore, CONTROLLER], CONTROLLER),
        ([*restore, WEIGHTS, "--solver", "euler"], "--solver euler"),
        ([*restore, WEIGHTS, "--steps", "101"], "101"),
        ([*restore, WEIGHTS, "--route", "1"], "DACLIPSDEModule"),
        ([*fit_sde, "--model.context", "9"], "--model.context 8"),
        ([*fit_sde, "--model.max_sigma", "0"], "--model.max_sigma 0"),
        ([*fit_sde, "--model.controller", "no.pt"], "no.pt"),
        ([*fit_controller, "--data.captions", "no.tsv"], "no.tsv"),
        ([*fit_sde, *resume, "--model.controller", CONTROLLER], "(None)"),
        ([*fit_controller, *resume, "--model.order", "aligned"], "reversed"),
        ([*fit_controller, "--weights", CONTROLLER, "--model.controller", CONTROLLER], "--weights"),
    ):
        assert named in error_of(arguments, capsys), arguments
    monkeypatch.setenv("DERAIN_CLIP", str(make_clip(trained / "wider", size=16)))
    for command in ("test", "validate", "predict"):  # they check the context before they restore an image
        arguments = [command, "--config", "sde.yaml", "--weights", WEIGHTS, "--data.predict", "images"]
        assert "--model.context 16" in error_of(arguments, capsys), command


@pytest.mark.slow
def test_a_run_cannot_resume_with_another_network(trained, capsys):
    resume = ["fit", "--config", "sde.yaml", "--ckpt_path"]
    checkpoint = "runs/sde/fit-1/checkpoints/last.ckpt"
    for options, old in (
        (["--model.channels", "64"], "32"),
        (["--model.attention", "linear"], "none"),
        (["--model.max_sigma", "20"], "10"),
        (["--model.residual", "0.1"], "None"),
        (["--model", "PReNetModule"], "DACLIPSDEModule"),
    ):
        error = error_of([*resume, checkpoint, *options], capsys)
        assert " ".join(options) in error
        assert old in error
    assert "--model.channels 64" in error_of([*resume, "last", "--model.channels", "64"], capsys)


def test_a_resumed_run_logs_changed_options(trained, caplog):
    resume = ["fit", "--config", "sde.yaml", "--trainer.limit_train_batches", "1", "--ckpt_path", "last"]
    assert main([*resume, "--trainer.max_epochs", "2", "--model.learning_rate", "1e-5"]) == 0
    assert "learning_rate 0.0002 → 1e-05" in caplog.text


@pytest.mark.slow
def test_a_run_resumes_with_a_truncated_table_of_metrics(trained, caplog):
    resume = ["fit", "--config", "sde.yaml", "--trainer.limit_train_batches", "1", "--ckpt_path", "last"]
    table = trained / "runs/sde/fit-1/metrics.csv"
    content = table.read_text()
    table.write_text(content + "1,7")
    assert main([*resume, "--trainer.max_epochs", "2"]) == 0
    assert table.read_text().startswith(content.partition("\n")[0])
    assert len(rows(table)) > content.count("\n")
    table.write_text("")
    assert main([*resume, "--trainer.max_epochs", "3"]) == 0
    assert "metrics.csv" in caplog.text
    assert rows(table)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "monitor"), [("sde", "val/psnr"), ("daclip", "val/accuracy")])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(workdir, name, monitor):
    fit = ["fit", "--config", f"{name}.yaml", "--trainer.max_epochs", "4"]
    whole, _, resumed = whole_and_resumed(fit, "train/loss", monitor, "lr-AdamW")
    for state in ("state_dict", "ema") if name == "sde" else ("state_dict",):
        assert differing(whole[state], resumed[state]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sde", "daclip"])
def test_two_processes(workdir, name):
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]
    finish("fit", "--config", f"{name}.yaml", *two)
    metrics = rows(workdir / f"runs/{name}/fit-1/metrics.csv")
    assert all(float(row["train/loss"]) >= 0 for row in metrics if row["train/loss"])
    key = "val/accuracy" if name == "daclip" else "val/psnr"
    assert [row[key] for row in metrics if row[key]]


@pytest.mark.slow
def test_two_processes_test_as_one_does(trained):
    test = ["test", "--config", "sde.yaml", "--weights", WEIGHTS, "--sampling.steps", "3"]
    assert main([*test, "--trainer.default_root_dir", "one"]) == 0
    two = ["--trainer.default_root_dir", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    finish(*test, *two)
    tables = [(trained / f"{root}/test-1/images.csv").read_text() for root in ("one", "two")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_the_contrast_of_two_processes_is_that_of_one_large_batch(workdir):
    """Gathered over ranks, two batches of one pair contrast as one of two; so do their gradients."""
    script = workdir / "ranks.py"
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
        "        f = self._text_embeddings(texts)\n"
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
    finish(str(workdir / "clip"), program=(str(script),))
