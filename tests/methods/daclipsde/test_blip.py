"""Frozen BLIP compared with greedy decoding by hand; errors of incomplete models."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from derain.errors import DerainError
from derain.methods.daclipsde.blip import FrozenBLIP
from tests.factories import clean_image, make_blip, make_clip

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def blip(folder):
    return FrozenBLIP(str(folder), max_tokens=12)


@pytest.fixture(scope="module")
def images():
    sizes = [(32, 32), (300, 451), (97, 60), (40, 48), (1, 3)]
    return [clean_image(i, sizes[i % len(sizes)]) for i in range(20)]


def by_hand(folder, image, count):
    """Decode greedily by complete passes of the model; Pillow preprocesses the image."""
    from transformers import BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    resized = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    pixels = ((np.asarray(resized, np.float32) / 255 - MEAN) / DEVIATION).astype(np.float32)
    words = (folder / "vocab.txt").read_text().splitlines()
    tokens = [model.config.text_config.bos_token_id]
    with torch.no_grad():
        features = model.vision_model(torch.from_numpy(pixels).permute(2, 0, 1)[None]).last_hidden_state
        while len(tokens) <= count:
            logits = model.text_decoder(torch.tensor([tokens]), encoder_hidden_states=features).logits[0, -1]
            tokens.append(int(logits.argmax()))
            if tokens[-1] == words.index("[SEP]"):
                break
    text = " ".join(words[token] for token in tokens[1:] if 5 <= token < len(words)).replace(" ##", "")
    for mark in (".", ","):
        text = text.replace(f" {mark}", mark)
    return text.replace(" ' ", "'").replace(" 's", "'s").strip()


def test_captions_equal_greedy_decoding(folder, blip, images):
    assert blip.captions(images[:8]) == [by_hand(folder, image, 12) for image in images[:8]]


def test_captions_differ(blip, images):
    captions = blip.captions(images)
    assert len(set(captions)) > len(images) / 2
    assert not any("[" in caption for caption in captions)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_captions_do_not_depend_on_the_batch(blip, images, size):
    whole = blip.captions(images)
    assert [c for i in range(0, len(images), size) for c in blip.captions(images[i : i + size])] == whole


def test_captions_are_deterministic(folder, blip, images):
    torch.manual_seed(5)
    first = blip.captions(images[:4])
    torch.manual_seed(6)
    assert FrozenBLIP(str(folder), max_tokens=12).captions(images[:4]) == first


def test_max_tokens_limits_captions(folder, images):
    assert max(len(c.split()) for c in FrozenBLIP(str(folder), max_tokens=2).captions(images)) <= 2


def test_either_form_of_the_tokenizer_suffices(folder, blip, images, tmp_path):
    for missing in (("tokenizer.json", "tokenizer_config.json"), ("vocab.txt", "tokenizer_config.json")):
        copy = shutil.copytree(folder, tmp_path / missing[0])
        for name in (*missing, "generation_config.json"):
            (copy / name).unlink()
        assert FrozenBLIP(str(copy), max_tokens=12).captions(images) == blip.captions(images)


def test_hash_depends_on_the_weights(folder, tmp_path):
    same = FrozenBLIP(str(shutil.copytree(folder, tmp_path / "same"))).sha256
    other = FrozenBLIP(str(make_blip(tmp_path / "other", seed=3))).sha256
    assert (same == FrozenBLIP(str(folder)).sha256, same == other) == (True, False)


# Errors.


def refused(name, *parts, max_tokens=5):
    with pytest.raises(DerainError) as caught:
        FrozenBLIP(str(name), max_tokens).captions([clean_image(0)])
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
    name = "nobody/blip-of-no-one"
    refused(name, "BLIP", str(offline), f"hf download {name}", "--captioner template")


def test_missing_directory(offline, tmp_path):
    refused(tmp_path / "absent", "--captioner")


def test_directory_without_blip(folder, tmp_path):
    refused(tmp_path, "config.json", "tokenizer.json or vocab.txt", "model.safetensors")
    shutil.copytree(folder, tmp_path / "blip")
    (tmp_path / "blip/preprocessor_config.json").unlink()
    refused(tmp_path / "blip", "preprocessor_config.json")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"])
def test_damaged_file(folder, tmp_path, file):
    broken = shutil.copytree(folder, tmp_path / "broken")
    content = (broken / file).read_bytes()
    (broken / file).write_bytes(content[: len(content) // 2])
    refused(broken, "BLIP")


def test_incomplete_weights(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "blip")
    file = tmp_path / "blip/model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "crossattention" not in name}
    save_file(kept, file, {"format": "pt"})
    refused(tmp_path / "blip", "crossattention")


def test_weights_of_another_size(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "blip")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["intermediate_size"] = 64
    (tmp_path / "blip/config.json").write_text(json.dumps(settings))
    refused(tmp_path / "blip", "6", "text_decoder.bert.encoder.layer.0.intermediate")


def test_other_models_are_refused(tmp_path):
    refused(make_clip(tmp_path / "clip"), "BLIP")


def test_transformers_logs_nothing(folder, tmp_path):
    """No table of missing or unknown parts, such as those of the authors' file."""
    from safetensors.torch import load_file, save_file

    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    shutil.copytree(folder, tmp_path / "blip")
    file = tmp_path / "blip/model.safetensors"
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"] |= {"max_length": 20, "min_length": 0, "num_beams": 1, "do_sample": False}
    (tmp_path / "blip/config.json").write_text(json.dumps(settings))
    save_file({**load_file(file), "text_decoder.bert.embeddings.position_ids": torch.arange(9)}, file, {"format": "pt"})
    try:
        assert FrozenBLIP(str(tmp_path / "blip")).captions([clean_image(0)])
        refused(make_clip(tmp_path / "clip"), "BLIP")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert records == []


def test_too_many_tokens_are_refused(folder):
    refused(folder, "--max-tokens 600", "511", max_tokens=600)


def test_batch_that_exceeds_memory(blip, monkeypatch):
    def generate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    monkeypatch.setattr(blip._loaded[0], "generate", generate)
    with pytest.raises(DerainError, match="--batch-size 2"):
        blip.captions([clean_image(0)] * 2, torch.device("cpu"))


def test_download_is_logged_before_it_starts(folder, tmp_path, monkeypatch, caplog):
    import huggingface_hub

    fetched = []

    def snapshot(name, local_files_only=False, allow_patterns=None):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        assert "some/blip" in caplog.text
        assert "1879 MB" in caplog.text
        fetched.extend(allow_patterns)
        return str(folder)

    sizes = {
        "model.safetensors": 1_879_000_000,
        "pytorch_model.bin": 5,
        "tf_model.h5": 7,
        "vocab.txt": 9,
        "config.json": 1,
    }

    class Hub:
        def model_info(self, name, files_metadata):
            files = [type("File", (), {"rfilename": name, "size": size}) for name, size in sizes.items()]
            return type("Info", (), {"siblings": files})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with caplog.at_level("INFO", "derain"):
        assert FrozenBLIP("some/blip").folder == folder
    assert fetched == ["model.safetensors", "config.json", "vocab.txt"]
