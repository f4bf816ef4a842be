"""Frozen CLIP compared with transformers; errors of incomplete models."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from derain.errors import DerainError
from derain.methods.clip import FrozenCLIP
from tests.factories import clean_image, clip_view, make_clip

ALTERNATIVE = "use --model.perception none"
TEXTS = ("almost no rain", "Heavy rain, with large DENSE raindrops; 3 puddles!", "rain " * 60)
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module", autouse=True)
def _no_variable():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DERAIN_CLIP", raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return FrozenCLIP(str(folder))


@pytest.fixture(scope="module")
def images():
    return [clean_image(i, size) for i, size in enumerate([(224, 224), (300, 451), (97, 60), (321, 481), (1, 3)])]


def prepared(image):
    """Preprocess an image as CLIP's authors do: resize the shorter side to 224, crop the centre, normalise."""
    pixels = np.asarray(clip_view(Image.fromarray(image)), np.float32) / 255
    return torch.from_numpy(((pixels - MEAN) / DEVIATION).astype(np.float32)).permute(2, 0, 1)


SIZES = [
    (481, 321),
    (321, 481),
    (224, 224),
    (224, 225),
    (225, 224),
    (224, 226),
    (224, 227),
    (3, 5),
    (500, 333),
    (97, 60),
]


@pytest.mark.parametrize("size", SIZES)
def test_crops_equal_torchvision(clip, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    deviation, mean = (torch.tensor(values)[:, None, None] for values in (DEVIATION, MEAN))
    inputs = []
    handle = clip.model.vision_model.register_forward_pre_hook(
        lambda _, __, kwargs: inputs.append(kwargs["pixel_values"]), with_kwargs=True
    )
    clip.image_features([image])
    handle.remove()
    torch.testing.assert_close(inputs[0][0] * deviation + mean, prepared(image) * deviation + mean, atol=1e-5, rtol=0)
    floats = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    expected = clip_view(floats).clamp(0, 1)
    torch.testing.assert_close(clip.pixels(floats) * deviation + mean, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def expected(folder, images):
    """Output of transformers' complete model for texts and images."""
    from transformers import CLIPModel, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder)(
        list(TEXTS), padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    pixels = torch.stack([prepared(image) for image in images])
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder).eval()(**tokens, pixel_values=pixels)


def unit(features):
    return features / features.norm(dim=1, keepdim=True)


def test_features_equal_transformers(clip, images, expected):
    torch.testing.assert_close(unit(clip.text_features(TEXTS)), expected.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(unit(clip.image_features(images)), expected.image_embeds, atol=1e-5, rtol=0)
    assert (expected.text_embeds[0] - expected.text_embeds[1]).abs().max() > 0.01
    assert (expected.image_embeds[0] - expected.image_embeds[1]).abs().max() > 0.001


def test_features_are_not_normalised(clip):
    assert (clip.text_features(TEXTS).norm(dim=1) - 1).abs().min() > 0.01


def test_vocabulary_is_that_of_clip(folder):
    from transformers import CLIPTokenizer

    # "a photo of a cat" by CLIP's authors
    assert CLIPTokenizer.from_pretrained(folder)("a photo of a cat").input_ids == [
        49406,
        320,
        1125,
        539,
        320,
        2368,
        49407,
    ]


def test_features_ignore_autocast(clip, images):
    with torch.autocast("cpu", torch.bfloat16):
        texts_under_autocast = clip.text_features(TEXTS)
        images_under_autocast = clip.image_features(images)
    assert torch.equal(texts_under_autocast, clip.text_features(TEXTS))
    assert torch.equal(images_under_autocast, clip.image_features(images))


def test_clip_is_frozen(clip, images):
    model = clip._loaded[0]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not clip.image_features(images).requires_grad


def test_hash_depends_on_weights_and_preprocessing(folder, tmp_path):
    same, resized, changed = (shutil.copytree(folder, tmp_path / name) for name in ("same", "resized", "changed"))
    settings = json.loads((resized / "preprocessor_config.json").read_text())
    (resized / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 2}))
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    first = FrozenCLIP(str(folder)).sha256
    assert FrozenCLIP(str(same)).sha256 == first
    assert len({first, FrozenCLIP(str(resized)).sha256, FrozenCLIP(str(changed)).sha256}) == 3


# Errors.


def refused(name, *parts):
    with pytest.raises(DerainError) as caught:
        FrozenCLIP(str(name), ALTERNATIVE).text_features(["rain"])
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(name), *parts):
        assert part in message, message


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Empty cache of the hub without network access, as with HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_model_that_cannot_be_fetched(offline):
    name = "nobody/clip-of-no-one"
    refused(name, str(offline), f"hf download {name}", "--model.clip", "--model.perception none")


def test_missing_directory(offline, tmp_path):
    refused(tmp_path / "absent", "--model.clip", "--model.perception none")


def test_directory_without_clip(folder, tmp_path):
    refused(tmp_path, "config.json", "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    refused(tmp_path, "model.safetensors")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_file(folder, tmp_path, file):
    broken = shutil.copytree(folder, tmp_path / "broken")
    content = (broken / file).read_bytes()
    (broken / file).write_bytes(content[: len(content) // 2])
    refused(broken, "CLIP")


def test_prompt_that_is_too_long(clip):
    many_characters = "photography " * 40
    assert len(many_characters) > len("rain " * 80)
    with pytest.raises(DerainError, match=r"'rain rain .*…': 80 tokens.* 75 tokens"):
        clip.text_features([many_characters, "rain " * 80])


def test_directory_without_tokenizer(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clip")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / "clip" / name).unlink(missing_ok=True)
    refused(tmp_path / "clip", "tokenizer.json")


def test_incomplete_weights(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.startswith("text_model.encoder")}
    save_file(kept, file, {"format": "pt"})
    refused(tmp_path / "clip", "text_model.encoder")


def test_environment_variable_takes_precedence_with_a_message(folder, monkeypatch, caplog):
    monkeypatch.setenv("DERAIN_CLIP", str(folder))
    with caplog.at_level("INFO", "derain"):
        assert FrozenCLIP("openai/clip-vit-base-patch32").folder == folder
    assert "DERAIN_CLIP" in caplog.text


def test_interrupted_download_is_resumed(folder, tmp_path, monkeypatch):
    """The snapshot in the cache has no weights, so the hub is asked again."""
    import huggingface_hub

    incomplete = tmp_path / "incomplete"
    shutil.copytree(folder, incomplete)
    (incomplete / "model.safetensors").unlink()
    calls = []

    def snapshot(name, local_files_only=False, allow_patterns=None):
        calls.append(local_files_only)
        return str(incomplete if local_files_only else folder)

    class Hub:
        def model_info(self, name, files_metadata):
            file = type("File", (), {"rfilename": "model.safetensors", "size": 14_000_000})
            return type("Info", (), {"siblings": [file]})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert FrozenCLIP("some/clip").folder == folder
    assert calls == [True, False]
