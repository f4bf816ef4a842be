"""Training of the controller: contrastive losses, validation accuracy and crops."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from derain.errors import DerainError
from derain.methods import DACLIPModule, catalog
from derain.methods.daclipsde.daclip import random_crop, random_resized_crop
from tests.factories import make_clip


@pytest.fixture
def module(clip_folder):
    torch.manual_seed(0)
    module = DACLIPModule(str(clip_folder))
    module.logged = {}
    module.log = lambda name, value, **kwargs: module.logged.__setitem__(name, value)
    module.log_dict = lambda values, **kwargs: module.logged.update(values)

    class Trainer:
        world_size = 1

    module._trainer = Trainer()
    return module


def batch(count=3, **texts):
    generator = torch.Generator().manual_seed(1)
    clean, rainy = (torch.rand(count, 3, 40, 40, generator=generator) for _ in range(2))
    return {"rainy": rainy, "clean": clean, "name": ["a"] * count, "index": torch.arange(count), **texts}


def test_batches_contain_rainy_and_clean_images(module):
    data = batch(2, caption=["a dog", "a cat"], degradation=["rainy", "light rain"])
    images, captions, words = module._examples(data)
    assert images.shape[0] == 4
    assert captions == ["a dog", "a cat", "a dog", "a cat"]
    assert words == ["rainy", "light rain", "clean", "clean"]
    images, captions, words = module._examples(batch(2))
    assert captions == ["a photo"] * 4
    assert words == ["rainy", "rainy", "clean", "clean"]


def test_loss_is_the_sum_of_content_and_degradation(module):
    data = batch(2, caption=["a dog", "a cat"], degradation=["rainy", "rainy"])
    module.hparams["smallest"] = 1.0
    torch.manual_seed(3)
    loss = module.training_step(data, 0)
    torch.manual_seed(3)
    images = torch.cat((data["rainy"], data["clean"]))
    pixels = module.clip.pixels(random_resized_crop(images, 1.0, module.clip.side))
    embeddings = module.network(module.clip.model, pixels)
    scale = module.network.logit_scale.exp().double()
    total = 0.0
    for embedding, texts in zip(embeddings, (["a dog", "a cat"] * 2, ["rainy"] * 2 + ["clean"] * 2), strict=True):
        x = torch.nn.functional.normalize(embedding.double(), dim=1)
        y = torch.nn.functional.normalize(module.clip.text_features(texts).double(), dim=1)
        p = (scale * x @ y.T).exp()
        for i in range(4):
            equal = [j for j in range(4) if texts[j] == texts[i]]
            total -= math.log(float(p[i, equal].sum() / p[i].sum())) + math.log(
                float(p[equal, i].sum() / p[:, i].sum())
            )
    assert float(loss) == pytest.approx(total / 8, rel=1e-4)
    assert float(module.logged["train/content"] + module.logged["train/degradation"]) == pytest.approx(float(loss))


def test_equal_words_are_warned_of_once(clip_folder, module, caplog):
    module.hparams["clean"] = None
    data = batch(3, caption=["a", "b", "c"], degradation=["rainy"] * 3)
    with caplog.at_level(logging.WARNING, "derain"):
        module.training_step(data, 0)
        module.training_step(data, 1)
    assert caplog.text.count("3 degradations") == 1
    assert float(module.logged["train/degradation"]) == 0
    module.hparams["equal_texts"] = False
    module.training_step(data, 2)
    assert float(module.logged["train/degradation"]) >= math.log(3) - 1e-4


def test_texts_are_embedded_once(module, monkeypatch):
    embedded = []
    original = module.clip.text_features

    def texts(new, **options):
        embedded.extend(new)
        return original(new, **options)

    monkeypatch.setattr(module.clip, "text_features", texts)
    for _ in range(3):
        module.training_step(batch(2), 0)
    assert sorted(embedded) == ["a photo", "clean", "rainy"]


def test_training_step_has_gradients_only_in_the_controller(module):
    for layer in module.network.zero:
        torch.nn.init.normal_(layer.weight, std=0.1)
    module.training_step(batch(3, caption=["a", "b", "c"], degradation=["rainy"] * 3), 0).backward()
    assert [name for name, value in module.named_parameters() if value.grad is None] == []
    assert all(value.grad is None for value in module.clip.model.parameters())
    assert all(name.startswith("network.") for name, _ in module.named_parameters())


def test_temperature_is_clamped(module):
    optimizer = torch.optim.SGD([module.network.logit_scale], 0.0)
    with torch.no_grad():
        module.network.logit_scale.fill_(9)
    module.optimizer_step(0, 0, optimizer, lambda: None)
    assert float(module.network.logit_scale.exp()) == pytest.approx(100)
    with torch.no_grad():
        module.network.logit_scale.fill_(-1)
    module.optimizer_step(0, 0, optimizer, lambda: None)
    assert float(module.network.logit_scale) == 0


def test_vectors_have_no_weight_decay(module, monkeypatch):
    monkeypatch.setattr(DACLIPModule, "steps", 1000)
    optimizer = module.configure_optimizers()["optimizer"]
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == 0.05
    assert vectors["weight_decay"] == 0
    assert all(value.ndim >= 2 for value in matrices["params"])
    assert any(value is module.network.logit_scale for value in vectors["params"])
    assert any(value is module.network.vision.embeddings.class_embedding for value in vectors["params"])
    count = sum(len(group["params"]) for group in (matrices, vectors))
    assert count == len(list(module.network.parameters()))
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["eps"] == 1e-6


def test_accuracy_of_nearest_words(module, monkeypatch):
    module.on_validation_epoch_start()
    assert module.words == ["clean", "rainy"]
    rainy = module.clip.text_features(["rainy"])[0]
    clean = module.clip.text_features(["clean"])[0]
    answers = iter([torch.stack((rainy, clean)), torch.stack((clean, clean)), torch.stack((rainy, rainy))])

    class Answers(torch.nn.Module):
        def forward(self, clip, pixels):
            return SimpleNamespace(degradation=next(answers))

    module.network = Answers()
    for index in range(3):
        module.validation_step(batch(1), index)
    module.on_validation_epoch_end()
    assert module.logged["val/accuracy"] == pytest.approx(4 / 6)


def test_words_are_in_the_metadata(module):
    assert set(module.metadata()["words"]) == {"rainy", "clean"}

    class Data:
        degradations = ("hazy", "light rain")

    module._trainer.datamodule = Data()
    module.on_validation_epoch_start()
    assert module.metadata()["words"] == ["clean", "hazy", "light rain"]


@pytest.mark.parametrize("smallest", [0.08, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("size", [(448, 448), (50, 60), (40, 300), (300, 40), (1, 1), (2, 3)])
def test_crops_equal_torchvision(smallest, size):
    """Same random draws, same rejections, same fallback."""
    image = torch.empty(3, *size)
    for seed in range(60):
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(image, [smallest, 1.0], [3 / 4, 4 / 3])
        torch.manual_seed(seed)
        assert random_crop(*size, smallest) == tuple(expected)


@pytest.mark.parametrize("smallest", [0.3, 0.9])
def test_crops_have_the_smallest_area(smallest):
    torch.manual_seed(0)
    boxes = [random_crop(448, 448, smallest) for _ in range(2000)]
    shares = [rows * columns / 448**2 for _, _, rows, columns in boxes]
    assert min(shares) > smallest - 0.003  # whole pixels
    assert len({round(share, 3) for share in shares}) > 50


def test_crops_are_resized():
    torch.manual_seed(0)
    gradient = torch.linspace(0, 1, 60)[None, None, None].expand(4, 3, 50, 60)
    crops = random_resized_crop(gradient, 0.3, 32)
    assert crops.shape == (4, 3, 32, 32)
    spans = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert float(spans.min()) > 0.3
    assert len({round(float(span), 3) for span in spans}) > 1


def test_weights_require_their_clip(module, clip_folder, tmp_path):
    file = tmp_path / "controller.safetensors"
    module._trainer = None
    module.save_weights(file)
    loaded = catalog.load(file).module
    assert isinstance(loaded, DACLIPModule)
    own = loaded.network.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in module.network.state_dict().items())
    other = make_clip(tmp_path / "other", seed=9, num_hidden_layers=3)
    description = module.metadata()
    with pytest.raises(DerainError, match=r"--model\.clip .*other"):
        DACLIPModule(str(other)).restore_metadata(description)


@pytest.mark.parametrize(("options", "value"), [({"smallest": 0.0}, "smallest 0"), ({"warm_up": 1.0}, "warm_up 1")])
def test_options_out_of_range(clip_folder, options, value):
    with pytest.raises(DerainError, match=value):
        DACLIPModule(str(clip_folder), **options)
