"""Values that are not finite are refused before they become pictures or scores."""

import pytest
import torch
from lightning import Trainer

from derain.callbacks.panels import ImagePanels
from derain.callbacks.predictions import SaveImages
from derain.errors import DerainError
from derain.methods import PReNetModule

VALUES = [float("nan"), float("inf"), -float("inf")]


def batch(name="scene_3"):
    image = torch.rand(1, 3, 24, 24)
    return {"rainy": image, "clean": image, "index": torch.tensor([0]), "name": [name]}


def broken(value):
    derained = torch.rand(1, 3, 24, 24)
    derained[0, 1, 2, 3] = value
    return derained


def trainer(tmp_path):
    return Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False)


@pytest.mark.parametrize("value", VALUES)
def test_predictions_keep_the_other_images_of_a_batch(tmp_path, monkeypatch, caplog, value):
    method, callback, names = PReNetModule(stages=1), SaveImages(), ["scene_1", "scene_2", "scene_3"]
    monkeypatch.setattr(method, "forward", lambda rainy: torch.cat([rainy[:1], broken(value), rainy[2:]]))
    images = {"rainy": torch.rand(3, 3, 24, 24), "name": names}
    outputs = method.predict_step(images, 0)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["scene_2"]
    callback.on_predict_batch_end(trainer(tmp_path), method, outputs, images, 0)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["scene_1.png", "scene_3.png"]
    with pytest.raises(DerainError, match=r"^scene_2: "):
        callback.on_predict_end(trainer(tmp_path), method)
    callback.on_predict_end(trainer(tmp_path), method)  # nothing failed since


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_test_batch_end"])
def test_panels(tmp_path, value, hook):
    with pytest.raises(DerainError, match="scene_3"):
        getattr(ImagePanels(), hook)(trainer(tmp_path), PReNetModule(stages=1), {"derained": broken(value)}, batch(), 0)
    assert list(tmp_path.iterdir()) == []


def test_every_first_image_of_a_batch_has_a_panel(tmp_path):
    images = torch.rand(3, 3, 24, 24)
    names = ["scene_4", "scene_1", "scene_2"]
    several = {"rainy": images, "clean": images, "index": torch.tensor([4, 1, 2]), "name": names}
    method = PReNetModule(stages=1)
    ImagePanels(count=4).on_test_batch_end(trainer(tmp_path), method, {"derained": images}, several, 0)
    assert sorted(path.name for path in (tmp_path / "panels").iterdir()) == ["scene_1.png", "scene_2.png"]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("stage", ["validation", "test"])
def test_evaluation_is_refused_when_scores_are_gathered(monkeypatch, tmp_path, value, stage):
    """Not in the step of one rank, while the others wait for its scores."""
    method = PReNetModule(stages=1)
    method.trainer = trainer(tmp_path)
    method.on_validation_epoch_start()
    monkeypatch.setattr(method, "forward", lambda rainy: broken(value))
    assert getattr(method, f"{stage}_step")(batch() | {"index": torch.tensor([7])}, 0) is None
    with pytest.raises(DerainError, match=r"^7: "):
        getattr(method, f"on_{stage}_epoch_end")()


def test_a_wild_but_finite_output_is_scored(monkeypatch):
    """An untrained network may leave the range by far: that is a bad score, not a wrong range."""
    method = PReNetModule(stages=1)
    method.on_validation_epoch_start()
    monkeypatch.setattr(method, "forward", lambda rainy: rainy * 300 - 100)
    method.validation_step(batch(), 0)
    scores = method._quality["derained"].compute()["matlab-y"]
    assert 0 < scores.psnr[0] < 15
