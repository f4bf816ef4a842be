"""Similarity of images to prompts compared with transformers; the cache on disk."""

import shutil

import pytest
import torch
from PIL import Image

from derain.data.pairs import find_pairs
from derain.errors import DerainError
from derain.images import read_rgb
from derain.methods.clip import FrozenCLIP
from derain.methods.cliprpn.perception import RainPerception, scores
from derain.methods.cliprpn.prompts import PROMPTS
from tests.factories import add_rain, clean_image, clip_view

TEXTS = PROMPTS["intensity"].texts


@pytest.fixture
def images():
    return [add_rain(clean_image(i, (40 + i, 52)), i, share=0.03 * i) for i in range(9)]


@pytest.fixture
def calls(monkeypatch):
    """Number of images of each call of CLIP."""
    calls = []
    original = FrozenCLIP.image_features

    def images(self, images, device=None):
        calls.append(len(images))
        return original(self, images)

    monkeypatch.setattr(FrozenCLIP, "image_features", images)
    return calls


@pytest.fixture
def forbid_clip(monkeypatch):
    """Function after which running CLIP is an error."""

    def refuse(*_):
        raise AssertionError("CLIP ran again")

    def forbid():
        monkeypatch.setattr(FrozenCLIP, "image_features", refuse)
        monkeypatch.setattr(FrozenCLIP, "text_features", refuse)

    return forbid


def test_cosine_similarity_equals_transformers(clip_folder, images):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    prepare = CLIPProcessor(*(part.from_pretrained(clip_folder) for part in (CLIPImageProcessorPil, CLIPTokenizer)))
    views = [clip_view(Image.fromarray(image)) for image in images]
    inputs = prepare(text=list(TEXTS), images=views, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    similarities = RainPerception(str(clip_folder), TEXTS).all_similarities(images)
    torch.testing.assert_close(similarities, logits / model.logit_scale.exp(), atol=1e-5, rtol=0)
    assert torch.equal(similarities.argmax(1), logits.argmax(1))
    assert similarities.std(0).min() > 1e-4


def test_dot_similarity_keeps_the_length_of_features(clip_folder, images):
    clip = FrozenCLIP(str(clip_folder))
    image, text = clip.image_features(images), clip.text_features(TEXTS)
    cosine, dot = (RainPerception(str(clip_folder), TEXTS, kind).all_similarities(images) for kind in ("cosine", "dot"))
    torch.testing.assert_close(dot, torch.einsum("id,td->it", image, text), atol=1e-5, rtol=1e-5)
    lengths = text.norm(dim=1)
    assert lengths.max() / lengths.min() > 1.05
    torch.testing.assert_close(dot / cosine, image.norm(dim=1)[:, None] * lengths, atol=1e-4, rtol=1e-4)


def test_scores_are_eqs_1_and_2():
    similarities = torch.tensor([[0.2, 0.3, -0.1], [5.0, 5.0, 5.0]])
    softmax = scores(similarities)
    expected = similarities.double().exp() / similarities.double().exp().sum(1, keepdim=True)
    torch.testing.assert_close(softmax.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(softmax[:1].argmax(1), similarities[:1].argmax(1))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_similarities_are_cached_on_disk(clip_folder, images, forbid_clip, similarity):
    first = RainPerception(str(clip_folder), TEXTS, similarity).all_similarities(images)
    forbid_clip()
    again = RainPerception(str(clip_folder), TEXTS, similarity)
    assert torch.equal(again.all_similarities(images), first)
    assert torch.equal(again.similarities([images[3], images[0], images[3]]), first[[3, 0, 3]])


def test_clip_processes_only_new_images_in_batches_of_eight(clip_folder, images, calls):
    perception = RainPerception(str(clip_folder), TEXTS)
    perception.similarities([images[0], images[1], images[0]])
    assert calls == [2]
    perception.all_similarities(iter(images))
    assert calls == [2, 6, 1]
    assert perception.all_similarities([]).shape == (0, 3)


def test_cache_distinguishes_shapes(clip_folder, images, calls):
    image = images[0]
    reshaped = image.reshape(image.shape[1], image.shape[0], 3)
    similarities = RainPerception(str(clip_folder), TEXTS).similarities([image, reshaped])
    assert calls == [2]
    assert not torch.equal(similarities[0], similarities[1])


def file_of(perception):
    (file,) = perception._file.parent.iterdir()
    return file


def test_incomplete_line_of_the_cache_is_recomputed(clip_folder, images, calls):
    first = RainPerception(str(clip_folder), TEXTS)
    whole = first.similarities(images[:3])
    file = file_of(first)
    file.write_text(file.read_text()[:-20])
    second = RainPerception(str(clip_folder), TEXTS).similarities(images[:4])
    torch.testing.assert_close(second[:3], whole)
    assert calls == [3, 2]
    third = RainPerception(str(clip_folder), TEXTS).similarities(images[:4])
    torch.testing.assert_close(third, second)
    assert calls == [3, 2], "similarities after the broken line were not cached"


def test_cache_depends_on_prompts_similarity_and_weights(clip_folder, images, tmp_path):
    other = shutil.copytree(clip_folder, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 64
    (other / "model.safetensors").write_bytes(weights)
    perceptions = [
        RainPerception(str(clip_folder), TEXTS),
        RainPerception(str(clip_folder), TEXTS[:2]),
        RainPerception(str(clip_folder), TEXTS[::-1]),
        RainPerception(str(clip_folder), TEXTS, "dot"),
        RainPerception(str(other), TEXTS),
    ]
    similarities = [perception.similarities(images[:1]) for perception in perceptions]
    assert len(list(perceptions[0]._file.parent.iterdir())) == len(perceptions)
    torch.testing.assert_close(similarities[2], similarities[0].flip(1))
    assert similarities[1].shape == (1, 2)
    moved = shutil.copytree(clip_folder, tmp_path / "moved")
    assert RainPerception(str(moved), TEXTS)._file == perceptions[0]._file


def test_cache_depends_on_the_preprocessing(clip_folder, images, calls, monkeypatch):
    RainPerception(str(clip_folder), TEXTS).similarities(images[:1])
    monkeypatch.setattr("derain.methods.cliprpn.perception.PREPROCESSING_VERSION", 1)
    RainPerception(str(clip_folder), TEXTS).similarities(images[:1])
    assert calls == [1, 1]


# Counts of the paper.

CLIP = "openai/clip-vit-base-patch32"
TRAINING = {"Rain800": "Rain800", "Rain100H": "RainTrainH-full", "Rain100L": "RainTrainL"}


@pytest.fixture(scope="module")
def authors_clip():
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(CLIP, local_files_only=True)
    except LocalEntryNotFoundError:
        pytest.skip(f"{CLIP} is not in the local cache of the Hugging Face hub")
    return CLIP


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_route_counts_of_training_images_equal_the_paper(real_data, authors_clip, name):
    try:
        pairs = find_pairs(TRAINING[name], "train", data_root=real_data).pairs
    except DerainError as error:
        pytest.skip(f"{TRAINING[name]} is not in DERAIN_DATA ({error})")
    files = [pair.read()[0] if pair.clean_side else read_rgb(pair.rainy) for pair in pairs]
    for prompts in ("3-distortion", "1", "2-long", "intensity", "rain"):
        texts, counts, _ = PROMPTS[prompts]
        routes = RainPerception(authors_clip, texts).all_similarities(files).argmax(1)
        route_counts = torch.bincount(routes, minlength=len(texts)).tolist()
        assert route_counts == pytest.approx(counts[name], abs=2), prompts
