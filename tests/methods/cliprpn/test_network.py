"""Network of CLIP-RPN compared with its equations as sums; effects of routing on images and gradients."""

import copy
import re

import pytest
import torch

from derain.methods.cliprpn.network import (
    CLIPRPN,
    MaskGuidedCrossAttention,
    MaskHead,
    PlainCrossAttention,
    mask_maps,
)
from tests.nn.references import SMALL, Published, convolve, cross_attention, with_random_parameters


def equal(ours, theirs, atol=1e-10):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(state, name):
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}


BACKBONE = 26_126_644
MASKS = 9 * (384**2 + 192**2 + 96**2) + 384 + 192 + 96
MGCA = 1_837_562 + 467_246 + 120_776
PLAIN = sum(4 * c * c + 3 * 9 * c + heads for c, heads in ((384, 8), (192, 4), (96, 2)))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 32_720_308),
        ({"route_count": 1}, 30_294_724),
        ({"route_count": 3}, 35_145_892),
        ({"spatial_kernel": 1}, 32_720_308 - 6 * (98 - 2)),
        ({"spatial_kernel": 0}, 32_720_308 - 6 * 98),
        ({"interaction": "swapped", "residual": False}, 32_720_308),
        ({"mgca": False}, BACKBONE + 2 * PLAIN),
        ({"mgca": False, "route_count": 3}, BACKBONE + 3 * PLAIN),
        ({"route_count": 0, "mgca": False}, BACKBONE),
        ({"route_count": 0}, BACKBONE),
    ],
)
def test_parameters(options, count):
    assert BACKBONE + MASKS + 2 * MGCA == 32_720_308
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIPRPN(**options).parameters()) == count


# Equations.


def mgca(state, x, mask, interaction, residual):
    """Eqs. 7 to 13, computed pixel by pixel and channel by channel."""
    rainy = cross_attention(part(state, "rainy"), x * mask, x, x)
    clear = cross_attention(part(state, "clear"), x * (1 - mask), x, x)

    def channels(features):
        b, h, w, c = features.shape
        weights = torch.zeros(b, 1, 1, c, dtype=features.dtype)
        for image in range(b):
            pixels = features[image].reshape(h * w, c)
            for name, pooled in (("from_mean", pixels.sum(0) / (h * w)), ("from_max", pixels.max(0).values)):
                hidden = (state[f"{name}.0.weight"] * pooled).sum(1)
                hidden = torch.where(hidden > 0, hidden, 0)
                weights[image, 0, 0] += (state[f"{name}.2.weight"] * hidden).sum(1)
        return 1 / (1 + torch.exp(-weights))

    def pixels(features):
        pooled = torch.stack((features.sum(-1) / features.shape[-1], features.max(-1).values), dim=-1)
        kernel = state.get("weigh_pixels.weight")
        logits = pooled.sum(-1, keepdim=True) / 2 if kernel is None else convolve(pooled, kernel)
        return 1 / (1 + torch.exp(-logits))

    if interaction == "prose":
        fused = rainy * channels(clear) + clear * pixels(rainy)
    else:
        fused = clear * channels(rainy) + rainy * pixels(clear)
    out = cross_attention(part(state, "fusion"), x, fused, fused)
    return x + out if residual else out


@pytest.mark.parametrize("interaction", ["prose", "swapped"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("spatial_kernel", [7, 1, 0])
def test_mask_guided_cross_attention_is_eqs_7_to_13(interaction, residual, spatial_kernel):
    block = MaskGuidedCrossAttention(4, 2, interaction, residual, spatial_kernel, reduction=2).double()
    with torch.no_grad():
        for seed, parameter in enumerate(block.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed) / 2)
        x, mask = random(2, 5, 6, 4, seed=100), random(2, 5, 6, 1, seed=101).sigmoid()
        equal(block(x, mask), mgca(block.state_dict(), x, mask, interaction, residual))


def test_interactions_differ():
    torch.manual_seed(0)
    block = MaskGuidedCrossAttention(4, 2).double()
    x, mask = random(1, 5, 6, 4), random(1, 5, 6, 1).sigmoid()
    prose = block(x, mask)
    block.interaction = "swapped"
    assert (block(x, mask) - prose).abs().max() > 1e-4


def test_mask_head_is_eq_3_before_the_sigmoid():
    head = with_random_parameters(MaskHead(4))
    x = random(2, 5, 6, 4)
    with torch.no_grad():
        features = convolve(x, head.features.weight)
        activated = features * (1 + torch.erf(features / 2**0.5)) / 2
        equal(head(x), convolve(activated, head.logit.weight))


def test_plain_cross_attention_equals_the_reference():
    block = with_random_parameters(PlainCrossAttention(4, 2))
    x = random(2, 5, 6, 4)
    with torch.no_grad():
        equal(block(x), x + cross_attention(block.state_dict(), x, x, x))


@pytest.mark.parametrize("mgca_on", [True, False])
def test_network_is_restormer_with_routes_before_each_upsampling(mgca_on):
    network = with_random_parameters(CLIPRPN(2, mgca_on, **SMALL))
    state = network.state_dict()
    published = Published(**SMALL).double()
    published.load_state_dict(part(state, "backbone"))
    rainy = random(1, 3, 21, 18).sigmoid()

    def refine(level, features):
        x = features.permute(0, 2, 3, 1)
        own = part(state, f"routes.1.{level}")
        if mgca_on:
            head = part(state, f"masks.{level}")
            logit = convolve(torch.nn.functional.gelu(convolve(x, head["features.weight"])), head["logit.weight"])
            logits.append(logit.permute(0, 3, 1, 2))
            x = mgca(own, x, logit.sigmoid(), "prose", True)
        else:
            x = x + cross_attention(own, x, x, x)
        return x.permute(0, 3, 1, 2)

    logits = []
    for level, name in ((3, "latent"), (2, "decoder_level3"), (1, "decoder_level2")):
        getattr(published, name).register_forward_hook(lambda _, __, out, level=level: refine(level, out))
    with torch.no_grad():
        restored = network(rainy, [1])
        equal(restored.derained, published(rainy))
        for ours, theirs in zip(restored.logits, logits, strict=True):
            equal(ours, theirs)


# Sizes.


@pytest.fixture(scope="module")
def network():
    """Small network with clearly different routes."""
    return with_random_parameters(CLIPRPN(3, **SMALL))


@pytest.mark.parametrize(
    ("size", "padded"), [((1, 1), (8, 8)), ((37, 31), (40, 32)), ((321, 481), (328, 488)), ((16, 8), (16, 8))]
)
def test_any_size(network, size, padded):
    network = copy.deepcopy(network).float()
    rainy = random(1, 3, *size).sigmoid().float()
    with torch.no_grad():
        derained, logits = network(rainy)
    assert derained.shape == rainy.shape
    assert derained.isfinite().all()
    height, width = padded
    assert [tuple(level.shape) for level in logits] == [(1, 1, height // n, width // n) for n in (8, 4, 2)]
    assert mask_maps(logits, *size).shape == (1, 3, *size)


def test_mask_maps_have_the_image_size_and_the_finest_level_first():
    logits = [random(2, 1, 5 * n, 4 * n) for n in (1, 2, 4)]
    maps = mask_maps(logits, 37, 31)
    assert maps.shape == (2, 3, 37, 31)
    for index, factor in enumerate((2, 4, 8)):
        for y, x in ((0, 0), (36, 30), (17, 9), (8, 23)):
            expected = 1 / (1 + torch.exp(-logits[2 - index][:, 0, y // factor, x // factor]))
            torch.testing.assert_close(maps[:, index, y, x].double(), expected, atol=1e-6, rtol=0)


# Routes.


@pytest.mark.parametrize("routes", [(0, 2, 2, 0), (2, 1, 0, 1), (1, 1, 1, 1)])
def test_batch_with_several_routes_equals_single_images(network, routes):
    rainy = random(4, 3, 13, 20).sigmoid()
    with torch.no_grad():
        together = network(rainy, routes)
        alone = [network(image[None], [route]) for image, route in zip(rainy, routes, strict=True)]
        first = network(rainy, [0, 0, 0, 0]).derained
        equal(together.derained, torch.cat([restored.derained for restored in alone]))
        for level in range(3):
            equal(together.logits[level], torch.cat([restored.logits[level] for restored in alone]))
        for index, route in enumerate(routes):
            assert ((together.derained[index] - first[index]).abs().max() > 1e-3) == (route != 0)


def test_single_route_for_all_images_and_default_route(network):
    rainy = random(2, 3, 9, 9).sigmoid()
    with torch.no_grad():
        assert torch.equal(network(rainy, [2]).derained, network(rainy, [2, 2]).derained)
        assert torch.equal(network(rainy).derained, network(rainy, [0, 0]).derained)


@pytest.mark.parametrize("mgca_on", [True, False])
@pytest.mark.parametrize("routes", [(1, 1), (0, 2)])
def test_only_used_routes_have_gradients(mgca_on, routes):
    torch.manual_seed(0)
    network = CLIPRPN(3, mgca_on, **SMALL)
    restored = network(torch.rand(2, 3, 16, 16), routes)
    (restored.derained.square().mean() + sum(level.mean() for level in restored.logits)).backward()
    for name, parameter in network.named_parameters():
        unused = name.startswith("routes.") and int(name.split(".")[1]) not in routes
        assert (parameter.grad is None) == unused, name
        assert unused or parameter.grad.isfinite().all(), name
    tensors = 29 if mgca_on else 8
    assert sum(p.grad is None for p in network.parameters()) == (3 - len(set(routes))) * 3 * tensors


def test_images_of_different_routes_are_independent(network):
    rainy = random(2, 3, 16, 16).sigmoid()
    changed = torch.cat((rainy[:1], 1 - rainy[1:]))
    with torch.no_grad():
        equal(network(rainy, [0, 1]).derained[0], network(changed, [0, 1]).derained[0])


@pytest.mark.parametrize("mgca_on", [True, False])
def test_network_without_routes_is_restormer(mgca_on):
    network = with_random_parameters(CLIPRPN(0, mgca_on, **SMALL))
    rainy = random(2, 3, 17, 12).sigmoid()
    published = Published(**SMALL).double()
    published.load_state_dict(network.backbone.state_dict())
    with torch.no_grad():
        derained, logits = network(rainy)
        equal(derained, published(rainy))
    assert logits == []


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_routes_in_bfloat16(precision):
    torch.manual_seed(0)
    network = CLIPRPN(2, **SMALL)
    rainy = torch.rand(3, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        together = network(rainy, [0, 1, 0]).derained
        alone = torch.cat([network(rainy[i : i + 1], [i % 2]).derained for i in range(3)])
    equal(together, alone, 1e-6 if precision == torch.float32 else 0.02)


@pytest.mark.parametrize("routes", [[0, 1], [0, 1, 0, 1, 1], [0, 1, 0, 2], [0, 0, 0, -1]])
def test_invalid_routes_are_refused(routes):
    network = CLIPRPN(dim=8, blocks=(1, 1, 1, 1), refinement=1)
    with pytest.raises(ValueError, match=re.escape(str(routes))):
        network(torch.rand(4, 3, 16, 16), routes)


@pytest.mark.parametrize("level", [9.0, 30.0, -30.0])
def test_gradients_of_constant_masks_are_finite_in_float16(level):
    torch.manual_seed(0)
    block = MaskGuidedCrossAttention(16, 2)
    x = torch.randn(1, 8, 8, 16, requires_grad=True)
    logit = torch.full((1, 8, 8, 1), level, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss = block(x, logit.sigmoid()).square().mean()
    (loss * 65536).backward()
    for gradient in (x.grad, logit.grad, *(p.grad for p in block.parameters())):
        assert gradient.isfinite().all()
