"""Controller compared with plain CLIP; the order of its connections; the authors' keys."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.transforms import v2
from transformers import CLIPConfig, CLIPModel

from derain.errors import DerainError
from derain.files.weights import sha256
from derain.methods import DACLIPModule, PReNetModule, catalog
from derain.methods.clip import FrozenCLIP
from derain.methods.daclipsde.controller import Controller, FrozenDACLIP
from derain.methods.daclipsde.published_keys import controller_of
from tests.factories import clip_view, make_clip


@pytest.fixture(scope="module")
def clip(clip_folder):
    return FrozenCLIP(str(clip_folder))


@pytest.fixture
def pixels(clip):
    return clip.pixels(torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0)))


def plain_features(clip, pixels):
    return clip.model.visual_projection(clip.model.vision_model(pixel_values=pixels).pooler_output)


def test_parameters_of_vit_b_32():
    with torch.device("meta"):
        controller = Controller(CLIPModel(CLIPConfig()))
    counts = {name: value.numel() for name, value in controller.named_parameters()}
    assert sum(counts.values()) - counts.pop("logit_scale") == 94_936_320
    assert sum(n for name, n in counts.items() if name.startswith("zero.")) == 7_087_104
    assert sum(n for name, n in counts.items() if not name.startswith("zero.")) == 87_849_216


@pytest.mark.parametrize("order", ["reversed", "aligned"])
def test_untrained_controller_gives_embeddings_of_plain_clip(clip, pixels, order):
    embeddings = Controller(clip.model, order)(clip.model, pixels)
    assert torch.equal(embeddings.content, plain_features(clip, pixels))
    assert torch.equal(embeddings.degradation, plain_features(clip, pixels))


@pytest.mark.parametrize(("order", "connected"), [("reversed", 2), ("aligned", 0)])
def test_order_of_connections(clip, pixels, order, connected):
    controller = Controller(clip.model, order)
    bias = torch.linspace(-1, 1, controller.zero[0].out_features)
    with torch.no_grad():
        controller.zero[0].bias.copy_(bias)
    hook = clip.model.vision_model.encoder.layers[connected].register_forward_hook(
        lambda module, inputs, out: out[0] + bias if isinstance(out, tuple) else out + bias
    )
    expected = plain_features(clip, pixels)
    hook.remove()
    embeddings = controller(clip.model, pixels)
    torch.testing.assert_close(embeddings.content, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(expected, plain_features(clip, pixels))
    assert torch.equal(embeddings.degradation, plain_features(clip, pixels))  # not affected by the layers


def test_only_the_controller_has_gradients(clip, pixels):
    controller = Controller(clip.model)
    for layer in controller.zero:
        nn.init.normal_(layer.weight, std=0.1)
    content, degradation = controller(clip.model, pixels)
    (content.square().sum() + degradation.square().sum()).backward()
    names = [name for name, value in controller.named_parameters() if value.grad is None]
    assert names == ["logit_scale"]  # used by the loss
    assert all(value.grad is None for value in clip.model.parameters())
    assert not any(value.requires_grad for value in clip.model.parameters())


def test_pixels_equal_pillow(clip):
    image = torch.rand(1, 3, 300, 401, generator=torch.Generator().manual_seed(1))
    image = torch.nn.functional.avg_pool2d(image, 3, 1, 1).mul(255).round().div(255)
    photo = v2.functional.to_pil_image(image[0].mul(255).byte())
    view = v2.functional.pil_to_tensor(clip_view(photo))[None] / 255
    processor = clip._loaded[2]
    expected = v2.functional.normalize(view, processor.image_mean, processor.image_std)
    pixels = clip.pixels(image)
    assert pixels.shape == expected.shape
    step = 1 / 255 / 0.26
    assert float((pixels - expected).abs().mean()) < 0.5 * step
    assert float((pixels - expected).abs().max()) < 3 * step


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (224, 224), (37, 31)])
def test_any_size_becomes_the_size_of_clip(clip, size):
    assert clip.pixels(torch.rand(1, 3, *size)).shape == (1, 3, 224, 224)


# Files.


def published_state(controller):
    """State dict as in the authors' files: keys of open_clip, joint input projection, transposed output projection."""
    own = controller.state_dict()
    state = {"logit_scale": own["logit_scale"], "clip.logit_scale": torch.zeros(())}
    prefix = "visual_control."
    state[f"{prefix}conv1.weight"] = own["vision.embeddings.patch_embedding.weight"]
    state[f"{prefix}class_embedding"] = own["vision.embeddings.class_embedding"]
    state[f"{prefix}positional_embedding"] = own["vision.embeddings.position_embedding.weight"]
    state[f"{prefix}proj"] = own["projection.weight"].T
    for kind in ("weight", "bias"):
        state[f"{prefix}ln_pre.{kind}"] = own[f"vision.pre_layrnorm.{kind}"]
        state[f"{prefix}ln_post.{kind}"] = own[f"vision.post_layernorm.{kind}"]
        for i in range(len(controller.zero)):
            block, layer = f"{prefix}transformer.transformer.resblocks.{i}.", f"vision.encoder.layers.{i}."
            state[f"{prefix}transformer.zero_modules.{i}.{kind}"] = own[f"zero.{i}.{kind}"]
            state[f"{block}ln_1.{kind}"] = own[f"{layer}layer_norm1.{kind}"]
            state[f"{block}ln_2.{kind}"] = own[f"{layer}layer_norm2.{kind}"]
            state[f"{block}mlp.c_fc.{kind}"] = own[f"{layer}mlp.fc1.{kind}"]
            state[f"{block}mlp.c_proj.{kind}"] = own[f"{layer}mlp.fc2.{kind}"]
            state[f"{block}attn.out_proj.{kind}"] = own[f"{layer}self_attn.out_proj.{kind}"]
            parts = [own[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
    return state


def test_the_authors_controller_is_recognised(tmp_path):
    with torch.device("meta"):
        names = published_state(Controller(CLIPModel(CLIPConfig())))
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "daclip.pt")
    with pytest.raises(DerainError, match=r"daclip\.pt: .*--model\.controller"):
        catalog.load(tmp_path / "daclip.pt")


def test_authors_keys_fit_vit_b_32():
    with torch.device("meta"):
        controller = Controller(CLIPModel(CLIPConfig()))
        state = published_state(controller)
    assert state["visual_control.transformer.transformer.resblocks.11.attn.in_proj_weight"].shape == (2304, 768)
    assert state["visual_control.proj"].shape == (768, 512)
    assert state["visual_control.conv1.weight"].shape == (768, 3, 32, 32)
    assert state["visual_control.positional_embedding"].shape == (50, 768)
    ours = controller_of(state)
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in controller.state_dict().items()
    }


@pytest.fixture
def trained(clip, clip_folder, tmp_path):
    """Changed controller, with its weights in our format and in the authors'."""
    module = DACLIPModule(str(clip_folder))
    torch.manual_seed(0)
    for value in module.network.parameters():
        value.data += 0.05 * torch.randn_like(value)
    ours, authors = tmp_path / "ours.safetensors", tmp_path / "authors.pt"
    module.save_weights(ours)
    state = published_state(module.network) | {"clip.visual.proj": module.clip.model.visual_projection.weight.T}
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": value for name, value in state.items()}}, authors)
    return module, ours, authors


def test_our_file_and_the_authors_give_the_same_controller(clip_folder, trained):
    module, ours, authors = trained
    rainy = torch.rand(2, 3, 40, 30)
    expected = module.network.eval()(module.clip.model, module.clip.pixels(rainy))
    for file in (ours, authors):
        daclip = FrozenDACLIP(str(clip_folder), str(file))
        embeddings = daclip(rainy)
        torch.testing.assert_close(embeddings.content, expected.content, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(embeddings.degradation, expected.degradation, atol=1e-6, rtol=1e-5)
        assert not embeddings.content.requires_grad
        assert daclip.hashes["controller_sha256"] == sha256(file)
    assert not torch.allclose(embeddings.content, FrozenDACLIP(str(clip_folder), None)(rainy).content)


def test_order_is_restored_from_weights(clip_folder, tmp_path):
    module = DACLIPModule(str(clip_folder), order="aligned")
    module.save_weights(tmp_path / "a.safetensors")
    assert FrozenDACLIP(str(clip_folder), str(tmp_path / "a.safetensors")).controller.order == "aligned"


def test_authors_controller_with_a_different_clip_of_the_same_size(trained, tmp_path):
    _, _, authors = trained
    other = make_clip(tmp_path / "other", seed=9, num_hidden_layers=3)
    with pytest.raises(DerainError, match=r"authors\.pt: .*other"):
        _ = FrozenDACLIP(str(other), str(authors)).controller


@pytest.mark.slow
def test_training_starts_from_a_controller(clip_folder, trained):
    module, *files = trained
    for file in files:
        continued = DACLIPModule(str(clip_folder), controller=str(file))
        own = continued.network.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in module.network.state_dict().items())
        assert all(value.requires_grad for value in continued.network.parameters())
        assert "controller" not in continued.metadata()["hyper_parameters"]  # the file may not exist later
    with pytest.raises(DerainError, match="order aligned"):
        DACLIPModule(str(clip_folder), order="aligned", controller=str(files[1]))


@pytest.mark.parametrize("trained_words", [["clean", "hazy", "light rain"], ["rainy"], None])
def test_probabilities_of_the_trained_words(clip_folder, trained, trained_words):
    """Words of the file, if it names at least two; the authors' file names none."""
    module, ours, authors = trained
    module.words = trained_words or []
    module.save_weights(ours)
    words = trained_words if trained_words and len(trained_words) > 1 else ["rainy", "clean"]
    daclip = FrozenDACLIP(str(clip_folder), str(authors if trained_words is None else ours))
    embeddings = daclip(torch.rand(3, 3, 20, 20))
    probabilities = daclip.probabilities(embeddings.degradation)
    assert list(daclip.words) == words
    texts = daclip.clip.text_features(words).double()
    x = embeddings.degradation.double()
    cosines = (x @ texts.T) / x.norm(dim=1, keepdim=True) / texts.norm(dim=1)
    scale = daclip.controller.logit_scale.double().exp()
    torch.testing.assert_close(probabilities.double(), (scale * cosines).softmax(1), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_invalid_controllers_are_refused(clip_folder, trained, tmp_path, monkeypatch, caplog):
    _, ours, _ = trained
    with pytest.raises(DerainError, match=r"absent\.pt"):
        _ = FrozenDACLIP(str(clip_folder), str(tmp_path / "absent.pt")).controller
    other = tmp_path / "prenet.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, other, {"derain": json.dumps(PReNetModule(stages=1).metadata())})
    with pytest.raises(DerainError, match=r"prenet.safetensors: .*PReNetModule"):
        _ = FrozenDACLIP(str(clip_folder), str(other)).controller
    torch.save({"weight": torch.ones(2)}, tmp_path / "foreign.pt")
    with pytest.raises(DerainError, match="visual_control"):
        _ = FrozenDACLIP(str(clip_folder), str(tmp_path / "foreign.pt")).controller
    wider = make_clip(tmp_path / "wider", size=16)
    with pytest.raises(DerainError, match=r"ours\.safetensors: .*wider"):
        _ = FrozenDACLIP(str(wider), str(ours)).controller
    monkeypatch.setenv("DERAIN_CONTROLLER", str(ours))
    assert FrozenDACLIP(str(clip_folder), "elsewhere.pt").controller.order == "reversed"
    daclip = FrozenDACLIP(str(clip_folder), None)
    metadata = {"controller_sha256": "another", "clip_sha256": daclip.clip.sha256}
    daclip.expect_hashes(metadata, resuming=False)
    _ = daclip.controller
    assert "DERAIN_CONTROLLER" in caplog.text
    assert "DERAIN_CLIP" not in caplog.text
    again = FrozenDACLIP(str(clip_folder), None)
    again.expect_hashes(metadata, resuming=True)
    with pytest.raises(DerainError, match=r"controller .*ours\.safetensors"):
        _ = again.controller
