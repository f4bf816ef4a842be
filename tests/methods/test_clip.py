"""Frozen CLIP against transformers' own use of the model, and what is said when there is none."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from derain.errors import DerainError
from derain.methods.clip import FrozenCLIP
from derain.methods.cliprpn.perception import WITHOUT
from tests.factories import clean_image, clip_view, make_clip

TEXTS = ("almost no rain", "Heavy rain, with large DENSE raindrops; 3 puddles!", "rain " * 60)
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module", autouse=True)
def _no_other_clip():
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
    """As CLIP's authors do: the shorter side to 224 by bicubic interpolation, the middle, one scale for channels."""
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
def test_both_preparations_crop_where_torchvision_does(clip, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    deviation, mean = (torch.tensor(values)[:, None, None] for values in (DEVIATION, MEAN))
    seen = []
    handle = clip.model.vision_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["pixel_values"]), with_kwargs=True
    )
    clip.images([image])
    handle.remove()
    torch.testing.assert_close(seen[0][0] * deviation + mean, prepared(image) * deviation + mean, atol=1e-5, rtol=0)
    floats = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    expected = clip_view(floats).clamp(0, 1)
    torch.testing.assert_close(clip.pixels(floats) * deviation + mean, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def whole(folder, images):
    """What transformers makes of texts and images in one pass of its whole model."""
    from transformers import CLIPModel, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder)(
        list(TEXTS), padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    pixels = torch.stack([prepared(image) for image in images])
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder).eval()(**tokens, pixel_values=pixels)


def unit(features):
    return features / features.norm(dim=1, keepdim=True)


def test_features_equal_those_of_transformers(clip, images, whole):
    torch.testing.assert_close(unit(clip.texts(TEXTS)), whole.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(unit(clip.images(images)), whole.image_embeds, atol=1e-5, rtol=0)
    assert (whole.text_embeds[0] - whole.text_embeds[1]).abs().max() > 0.01
    assert (whole.image_embeds[0] - whole.image_embeds[1]).abs().max() > 0.001


def test_features_keep_their_length(clip):
    assert (clip.texts(TEXTS).norm(dim=1) - 1).abs().min() > 0.01


def test_the_vocabulary_is_clips(folder):
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


def test_autocast_does_not_reach_it(clip, images):
    with torch.autocast("cpu", torch.bfloat16):
        under = clip.texts(TEXTS), clip.images(images)
    assert torch.equal(under[0], clip.texts(TEXTS))
    assert torch.equal(under[1], clip.images(images))


def test_nothing_of_it_is_trained(clip, images):
    model = clip._loaded[0]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not clip.images(images).requires_grad


def test_the_hash_tells_weights_and_preparation_apart(folder, tmp_path):
    same, resized, other = (shutil.copytree(folder, tmp_path / name) for name in ("same", "resized", "other"))
    settings = json.loads((resized / "preprocessor_config.json").read_text())
    (resized / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 2}))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    first = FrozenCLIP(str(folder)).sha256
    assert FrozenCLIP(str(same)).sha256 == first
    assert len({first, FrozenCLIP(str(resized)).sha256, FrozenCLIP(str(other)).sha256}) == 3


# What is said when there is no CLIP.


def refused(name, *parts):
    with pytest.raises(DerainError) as caught:
        FrozenCLIP(str(name), WITHOUT).texts(["rain"])
    told = str(caught.value)
    assert "\n" not in told
    for part in (str(name), *parts):
        assert part in told, told


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache of the hub, as under HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_model_that_cannot_be_fetched(offline):
    name = "nobody/clip-of-no-one"
    refused(name, str(offline), f"hf download {name}", "--model.clip", "--model.perception none")


def test_a_directory_that_is_not_there(offline, tmp_path):
    refused(tmp_path / "absent", "--model.clip", "--model.perception none")


def test_a_directory_that_holds_no_clip(folder, tmp_path):
    refused(tmp_path, "config.json", "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    refused(tmp_path, "model.safetensors")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file(folder, tmp_path, file):
    broken = shutil.copytree(folder, tmp_path / "broken")
    content = (broken / file).read_bytes()
    (broken / file).write_bytes(content[: len(content) // 2])
    refused(broken, "cannot be loaded as CLIP")


def test_a_prompt_longer_than_clip_reads(clip):
    with pytest.raises(DerainError, match="75 tokens at most"):
        clip.texts(["rain", "rain " * 90])


def test_a_directory_without_tokenizer(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clip")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / "clip" / name).unlink(missing_ok=True)
    refused(tmp_path / "clip", "tokenizer.json")


def test_weights_that_lack_a_part(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    kept = {name: one for name, one in load_file(file).items() if not name.startswith("text_model.encoder")}
    save_file(kept, file, {"format": "pt"})
    refused(tmp_path / "clip", "weights lack", "fetch them anew")


def test_the_variable_goes_before_the_name_and_says_so(folder, monkeypatch, caplog):
    monkeypatch.setenv("DERAIN_CLIP", str(folder))
    with caplog.at_level("INFO", "derain"):
        assert FrozenCLIP("openai/clip-vit-base-patch32").folder == folder
    assert "DERAIN_CLIP" in caplog.text


def test_a_download_that_was_interrupted_goes_on(folder, tmp_path, monkeypatch):
    """The snapshot in the cache lacks the weights: the hub is asked again."""
    import huggingface_hub

    half = tmp_path / "half"
    shutil.copytree(folder, half)
    (half / "model.safetensors").unlink()
    asked = []

    def snapshot(name, local_files_only=False, allow_patterns=None):
        asked.append(local_files_only)
        return str(half if local_files_only else folder)

    class Hub:
        def model_info(self, name, files_metadata):
            file = type("File", (), {"rfilename": "model.safetensors", "size": 14_000_000})
            return type("Info", (), {"siblings": [file]})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert FrozenCLIP("some/clip").folder == folder
    assert asked == [True, False]
