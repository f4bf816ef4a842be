"""Routes that no image took in training: recorded in weights, and warned of."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from derain.cli import main
from derain.export import write
from derain.methods import CLIPRPNModule, catalog
from derain.restoration import Restorer
from tests.factories import make_set
from tests.methods.test_contract import SMALL
from tests.runs import last

FIXED = SMALL["CLIPRPNModule"] | {"perception": "fixed"}


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.fixture
def file(tmp_path):
    """Weights whose route 1 is untrained."""
    module = CLIPRPNModule(**FIXED)
    module.route_counts = [7, 0]
    module.save_weights(tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_counts_are_restored_from_weights(file):
    module = catalog.load(file).module
    assert module.metadata()["route_counts"] == [7, 0]
    assert not module.routing.untrained(0)
    assert module.routing.untrained(1)


def test_untrained_route_is_warned_of_once(file, caplog):
    restorer = Restorer(file, device="cpu", route=1)
    image = np.zeros((8, 8, 3), np.float32)
    assert restorer.explain(image).description["untrained"]
    restorer(image)
    (warning,) = warnings(caplog)
    assert "route 1" in warning
    assert "--route 0" in warning
    caplog.clear()
    restorer = Restorer(file, device="cpu", route=0)
    assert "untrained" not in restorer.explain(image).description
    assert warnings(caplog) == []


def test_untrained_route_chosen_by_clip_is_warned_of(file, caplog):
    routing = catalog.load(file).module.routing
    similarities = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    clip = SimpleNamespace(sha256="", name="")
    routing.perception = SimpleNamespace(all_similarities=lambda *_: similarities, clip=clip, texts=("a", "b"))
    assert routing(torch.rand(2, 3, 4, 4))["routes"] == [1, 0]
    (warning,) = warnings(caplog)
    assert "route 1" in warning


@pytest.mark.parametrize("counts", ["absent", None])
def test_no_warning_for_weights_without_counts(counts, file, tmp_path, caplog):
    module = catalog.load(file).module
    metadata = module.metadata() | {"route_counts": None}
    if counts == "absent":
        del metadata["route_counts"]
    module.metadata = lambda: metadata
    module.save_weights(tmp_path / "old.safetensors")
    loaded = Restorer(tmp_path / "old.safetensors", device="cpu", route=1)
    loaded(np.zeros((8, 8, 3), np.float32))
    assert warnings(caplog) == []
    assert loaded.method.metadata()["route_counts"] is None


@pytest.mark.slow
def test_untrained_route_of_an_onnx_file_is_warned_of(file, tmp_path, caplog):
    module = catalog.load(file).module
    module.set_route(1)
    write(module.export_graph(), module, tmp_path / "m.onnx", "onnx")
    assert any("route 1" in warning for warning in warnings(caplog))
    assert json.loads(onnx.load(tmp_path / "m.onnx").metadata_props[0].value)["route_counts"] == [7, 0]
    caplog.clear()
    catalog.load(tmp_path / "m.onnx")
    assert any("m.onnx" in warning and "route 1" in warning for warning in warnings(caplog))


@pytest.mark.slow
@pytest.mark.parametrize("perception", ["fixed", "none"])
def test_training_counts_samples_per_route(perception, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    make_set(tmp_path / "data", "Rain800", "train", count=9)
    make_set(tmp_path / "data", "Rain800", "test", count=2, seed=50)
    network = ["--model.dim", "8", "--model.blocks", "[0,1,0,0]", "--model.refinement", "0"]
    fit = ["fit", "--model", "CLIPRPNModule", "--model.perception", perception, *network, "--data.train", "Rain800"]
    fit += ["--data.crop", "16", "--data.batch_size", "2", "--data.workers", "0", "--trainer.max_epochs", "1"]
    fit += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(fit) == 0
    (run,) = tmp_path.glob("runs/*/fit-1")
    counts = last(run)["derain"]["route_counts"]
    assert counts[0] > 0
    assert counts[1:] == ([0] if perception == "fixed" else [])
    route_warnings = [warning for warning in warnings(caplog) if "route 1" in warning]
    assert len(route_warnings) == (perception == "fixed")
    written = catalog.load(run / "weights.safetensors").module
    assert written.route_counts == counts
    caplog.clear()
    again = [*fit, "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    again[again.index("--trainer.max_epochs") + 1] = "2"
    assert main(again) == 0
    run = max(tmp_path.glob("runs/*/fit-*"))
    assert last(run)["derain"]["route_counts"][0] == 2 * counts[0]
    assert main([*fit, "--weights", str(run / "weights.safetensors")]) == 0
    run = max(tmp_path.glob("runs/*/fit-*"))
    assert last(run)["derain"]["route_counts"][0] == 3 * counts[0]


def test_samples_of_several_devices_are_added():
    module = CLIPRPNModule(**FIXED)
    module._trainer = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(reduce=lambda counts, reduce_op: counts * 2 if reduce_op == "sum" else 0)
    )
    module._new_counts = [3, 1]
    module._sum_counts()
    module._sum_counts()
    assert module.route_counts == [6, 2]
