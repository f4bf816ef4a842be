"""Which prompt an image is likest to, against transformers; what is remembered on disk."""

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
def seen(monkeypatch):
    """How many images each call of CLIP was given."""
    calls = []
    original = FrozenCLIP.images
    monkeypatch.setattr(
        FrozenCLIP, "images", lambda self, images, device=None: calls.append(len(images)) or original(self, images)
    )
    return calls


@pytest.fixture
def blind(monkeypatch):
    """CLIP that must not be asked."""

    def refuse(*_):
        raise AssertionError("CLIP ran again")

    return lambda: [monkeypatch.setattr(FrozenCLIP, name, refuse) for name in ("images", "texts")]


def test_cosine_is_what_transformers_compares_by(clip_folder, images):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    prepare = CLIPProcessor(*(part.from_pretrained(clip_folder) for part in (CLIPImageProcessorPil, CLIPTokenizer)))
    views = [clip_view(Image.fromarray(image)) for image in images]
    inputs = prepare(text=list(TEXTS), images=views, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    found = RainPerception(str(clip_folder), TEXTS).all_similarities(images)
    torch.testing.assert_close(found, logits / model.logit_scale.exp(), atol=1e-5, rtol=0)
    assert torch.equal(found.argmax(1), logits.argmax(1))
    assert found.std(0).min() > 1e-4


def test_dot_leaves_the_length_of_features_in(clip_folder, images):
    clip = FrozenCLIP(str(clip_folder))
    image, text = clip.images(images), clip.texts(TEXTS)
    cosine, dot = (RainPerception(str(clip_folder), TEXTS, kind).all_similarities(images) for kind in ("cosine", "dot"))
    torch.testing.assert_close(dot, torch.einsum("id,td->it", image, text), atol=1e-5, rtol=1e-5)
    lengths = text.norm(dim=1)
    assert lengths.max() / lengths.min() > 1.05
    torch.testing.assert_close(dot / cosine, image.norm(dim=1)[:, None] * lengths, atol=1e-4, rtol=1e-4)


def test_scores_are_eqs_1_and_2():
    similarities = torch.tensor([[0.2, 0.3, -0.1], [5.0, 5.0, 5.0]])
    found = scores(similarities)
    expected = similarities.double().exp() / similarities.double().exp().sum(1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(found[:1].argmax(1), similarities[:1].argmax(1))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_what_was_seen_is_remembered_on_disk(clip_folder, images, blind, similarity):
    first = RainPerception(str(clip_folder), TEXTS, similarity).all_similarities(images)
    blind()
    again = RainPerception(str(clip_folder), TEXTS, similarity)
    assert torch.equal(again.all_similarities(images), first)
    assert torch.equal(again.similarities([images[3], images[0], images[3]]), first[[3, 0, 3]])


def test_clip_is_asked_for_new_images_alone_and_eight_at_a_time(clip_folder, images, seen):
    perception = RainPerception(str(clip_folder), TEXTS)
    perception.similarities([images[0], images[1], images[0]])
    assert seen == [2]
    perception.all_similarities(iter(images))
    assert seen == [2, 6, 1]
    assert perception.all_similarities([]).shape == (0, 3)


def test_images_of_equal_bytes_and_other_shape_are_two(clip_folder, images, seen):
    image = images[0]
    turned = image.reshape(image.shape[1], image.shape[0], 3)
    found = RainPerception(str(clip_folder), TEXTS).similarities([image, turned])
    assert seen == [2]
    assert not torch.equal(found[0], found[1])


def file_of(perception):
    (file,) = perception._file.parent.iterdir()
    return file


def test_a_line_that_a_dying_process_left_is_made_again(clip_folder, images, seen):
    first = RainPerception(str(clip_folder), TEXTS)
    whole = first.similarities(images[:3])
    file = file_of(first)
    file.write_text(file.read_text()[:-20])
    second = RainPerception(str(clip_folder), TEXTS).similarities(images[:4])
    torch.testing.assert_close(second[:3], whole)
    assert seen == [3, 2]
    third = RainPerception(str(clip_folder), TEXTS).similarities(images[:4])
    torch.testing.assert_close(third, second)
    assert seen == [3, 2], "what was perceived after the broken line was not remembered"


def test_other_prompts_similarities_or_weights_use_another_file(clip_folder, images, tmp_path):
    other = shutil.copytree(clip_folder, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 64
    (other / "model.safetensors").write_bytes(weights)
    kinds = [
        RainPerception(str(clip_folder), TEXTS),
        RainPerception(str(clip_folder), TEXTS[:2]),
        RainPerception(str(clip_folder), TEXTS[::-1]),
        RainPerception(str(clip_folder), TEXTS, "dot"),
        RainPerception(str(other), TEXTS),
    ]
    found = [kind.similarities(images[:1]) for kind in kinds]
    assert len(list(kinds[0]._file.parent.iterdir())) == len(kinds)
    torch.testing.assert_close(found[2], found[0].flip(1))
    assert found[1].shape == (1, 2)
    moved = shutil.copytree(clip_folder, tmp_path / "moved")
    assert RainPerception(str(moved), TEXTS)._file == kinds[0]._file


def test_scores_of_another_preparation_are_not_used(clip_folder, images, seen, monkeypatch):
    RainPerception(str(clip_folder), TEXTS).similarities(images[:1])
    monkeypatch.setattr("derain.methods.cliprpn.perception.PREPARATION", 1)
    RainPerception(str(clip_folder), TEXTS).similarities(images[:1])
    assert seen == [1, 1]


# The paper's counts.

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
def test_training_images_take_the_routes_that_the_paper_counts(real_data, authors_clip, name):
    try:
        pairs = find_pairs(TRAINING[name], "train", data_root=real_data).pairs
    except DerainError as error:
        pytest.skip(f"{TRAINING[name]} is not in DERAIN_DATA ({error})")
    files = [pair.read()[0] if pair.clean_side else read_rgb(pair.rainy) for pair in pairs]
    for prompts in ("3-distortion", "1", "2-long", "intensity", "rain"):
        texts, counts, _ = PROMPTS[prompts]
        routes = RainPerception(authors_clip, texts).all_similarities(files).argmax(1)
        found = torch.bincount(routes, minlength=len(texts)).tolist()
        assert found == pytest.approx(counts[name], abs=2), prompts
