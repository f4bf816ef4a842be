"""Restormer against its authors' modules, and its attention against sums over channels and pixels."""

import pytest
import torch

from derain.nn import restormer
from derain.nn.restormer import Attention, CrossAttention, GatedFeedForward, Restormer, SelfAttention, strips
from tests.nn.references import (
    SMALL,
    Published,
    attention,
    convolve,
    cross_attention,
    depthwise,
    with_random_parameters,
)


@pytest.fixture
def low_strips(monkeypatch):
    """Set strips to the minimum of four rows."""
    monkeypatch.setattr(restormer, "STRIP_BYTES", {"cpu": 1, "gpu": 1})


@pytest.fixture(scope="module")
def networks():
    """Return our and the published network with the same weights, in float64."""
    published = with_random_parameters(Published(**SMALL))
    ours = Restormer(**SMALL).double()
    ours.load_state_dict(published.state_dict(), strict=True)
    return ours, published


def images(*size, count=2):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [(37, 31), (8, 17)])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("gradient", [False, True])
def test_it_equals_the_published_network(networks, size, count, gradient):
    ours, published = networks
    with torch.set_grad_enabled(gradient):
        rainy = images(*size, count=count)
        restored = ours(rainy)
        assert (restored - rainy).abs().max() > 0.1
        equal(restored, published(rainy))


def test_strips_do_not_change_the_result(networks, low_strips):
    ours, published = networks
    with torch.no_grad():
        padded = torch.zeros(2, 40, 32, 8, dtype=torch.float64)
        assert len(list(strips(padded, 24))) == 10
        equal(ours(images(37, 31)), published(images(37, 31)))
        equal(ours(images(41, 9)), published(images(41, 9)))


def test_strips_cover_every_row_once_with_its_neighbours(low_strips):
    x = torch.arange(10.0)[None, :, None, None].expand(1, 10, 2, 1)
    with torch.no_grad():
        results = [(x[0, rows, 0, 0].tolist(), strip[0, :, 0, 0].tolist(), own) for rows, strip, own in strips(x, 1)]
    assert [row for rows, _, _ in results for row in rows] == list(range(10))
    for rows, strip, own in results:
        assert strip[own] == rows
        assert strip == [row for row in range(int(rows[0]) - 1, int(rows[-1]) + 2) if 0 <= row < 10]


def test_gradients_equal_those_of_the_published_network(networks):
    ours, published = networks
    rainy = images(13, 10)
    output_gradient = torch.randn(rainy.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = [rainy.clone().requires_grad_() for _ in networks]
    for network, x in zip(networks, inputs, strict=True):
        network.zero_grad()
        (network(x) * output_gradient).sum().backward()
    theirs = dict(published.named_parameters())
    for name, parameter in ours.named_parameters():
        assert theirs[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-9, rtol=1e-9, msg=name)
    equal(inputs[0].grad, inputs[1].grad)


def test_interact_changes_features_before_each_upsampling(networks):
    ours, published = networks
    seen = {}

    def interact(level, x):
        seen[level] = x
        return x * (1 + level)

    hooks = [
        getattr(published, name).register_forward_hook(lambda _, __, out, level=level: out * (1 + level))
        for level, name in ((3, "latent"), (2, "decoder_level3"), (1, "decoder_level2"))
    ]
    with torch.no_grad():
        restored = ours(images(19, 31), interact)
        equal(restored, published(images(19, 31)))
        for hook in hooks:
            hook.remove()
        assert (restored - published(images(19, 31))).abs().max() > 1e-3
    assert {level: tuple(x.shape) for level, x in seen.items()} == {
        3: (2, 3, 4, 64),
        2: (2, 6, 8, 32),
        1: (2, 12, 16, 16),
    }
    assert list(seen) == [3, 2, 1]


def test_the_number_of_parameters_is_the_published_one():
    with torch.device("meta"):
        ours, published = Restormer().state_dict(), Published().state_dict()
    assert sum(value.numel() for value in ours.values()) == 26_126_644
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in published.items()}


@pytest.mark.parametrize(("channels", "heads"), [(6, 1), (6, 3), (4, 4)])
def test_self_attention_is_eq_1(channels, heads, low_strips):
    block = with_random_parameters(SelfAttention(channels, heads))
    state = block.state_dict()
    x = torch.randn(2, 9, 5, channels, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        maps = depthwise(convolve(x, state["qkv.weight"]), state["qkv_dwconv.weight"]).split(channels, dim=-1)
        expected = attention(*maps, state["temperature"], state["project_out.weight"])
        equal(block(x), expected)
    equal(block(x).detach(), expected)


@pytest.mark.parametrize("heads", [1, 2])
def test_cross_attention_is_eqs_8_and_9(heads):
    block = with_random_parameters(CrossAttention(4, heads))
    query, key, value = torch.randn(3, 2, 5, 7, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        equal(block(query, key, value), cross_attention(block.state_dict(), query, key, value))
        assert not torch.allclose(block(query, key, value), block(key, query, value))


def test_feed_forward_is_eq_2():
    block = with_random_parameters(GatedFeedForward(6, 2.66))
    state = block.state_dict()
    x = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        hidden = depthwise(convolve(x, state["project_in.weight"]), state["dwconv.weight"])
        assert hidden.shape[-1] == 2 * 15
        gate, gated = hidden[..., :15], hidden[..., 15:]
        opened = gate * (1 + torch.erf(gate / 2**0.5)) / 2
        equal(block(x, block.kernels()), convolve(opened * gated, state["project_out.weight"]))


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match=r"3 heads .* 8 channels"):
        Attention(8, 3)


def test_products_of_float16_do_not_overflow():
    torch.manual_seed(0)
    block = Attention(4, 2)
    maps = [(100 * torch.rand(1, 64, 64, 4)).half() for _ in range(3)]
    assert (maps[0].float().square().sum((1, 2)) > torch.finfo(torch.float16).max).all()
    with torch.no_grad():
        result = block.attend([maps])
        parts = [[m[:, rows] for m in maps] for rows in (slice(0, 20), slice(20, 64))]
        in_strips = block.attend(parts)
        weights = block.temperature.double(), block.project_out.weight.double()
        exact = attention(*(m.double() for m in maps), *weights)
    assert result.dtype == torch.float16
    for mixed in (result, in_strips):
        torch.testing.assert_close(mixed.double(), exact, atol=0.2, rtol=5e-3)


def published_attention(block, query, key, value):
    """Return attention as the authors compute it: F.normalize of queries and keys over the pixels."""
    b, h, w, c = value.shape
    heads = len(block.temperature)
    q, k, v = (t.flatten(1, 2).reshape(b, h * w, heads, -1).permute(0, 2, 3, 1) for t in (query, key, value))
    q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    mixed = ((q @ k.transpose(2, 3) * block.temperature).softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, h, w, c)
    return mixed @ block.project_out.weight[:, :, 0, 0].T


FEATURE_SCALES = [1, 1e-3, 1e-6, 1e-9, 1e-11, 1e-13, 1e-20, 0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scale", FEATURE_SCALES)
def test_small_queries_and_keys_are_normalised_as_published(scale, dtype, tolerance):
    torch.manual_seed(0)
    block = Attention(6, 2).to(dtype)
    query, key, value = torch.randn(3, 2, 1, 1, 6, dtype=dtype)  # one pixel, as for 8×8 images at the coarsest level
    query, key = scale * query, scale * key
    expected = published_attention(block, query, key, value)
    torch.testing.assert_close(block.attend([[query, key, value]]), expected, atol=tolerance, rtol=0)
    two_rows = [torch.cat((x, x), 1) for x in (query, key, value)]
    parts = [[x[:, row : row + 1] for x in two_rows] for row in (0, 1)]
    torch.testing.assert_close(block.attend(parts), published_attention(block, *two_rows), atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((torch.float16, scale) for scale in (1, 1e-2, 1e-3, 0)),  # norms are at least 1e-4
        *((torch.bfloat16, scale) for scale in (1, 1e-2, 1e-4, 1e-6, 0)),
    ],
)
def test_small_queries_and_keys_of_half_precision(dtype, scale):
    torch.manual_seed(0)
    block = Attention(6, 2)
    query, key, value = torch.randn(3, 2, 2, 2, 6)
    query, key, value = (scale * query).to(dtype), (scale * key).to(dtype), value.to(dtype)
    with torch.no_grad():
        result = block.attend([[query, key, value]])
        exact = published_attention(block.double(), query.double(), key.double(), value.double())
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("scale", [1, 1e-6, 1e-9])
def test_gradients_of_small_queries_equal_the_published_ones(scale):
    torch.manual_seed(0)
    block = Attention(6, 2).double()
    maps = [(s * torch.randn(1, 2, 2, 6, dtype=torch.float64)).requires_grad_() for s in (scale, scale, 1)]
    output_gradient = torch.randn(1, 2, 2, 6, dtype=torch.float64)
    ours = torch.autograd.grad((block.attend([maps]) * output_gradient).sum(), maps)
    published = torch.autograd.grad((published_attention(block, *maps) * output_gradient).sum(), maps)
    for gradient, expected in zip(ours, published, strict=True):
        torch.testing.assert_close(gradient * scale, expected * scale, atol=1e-9, rtol=1e-6)


@pytest.mark.slow
def test_images_of_8_pixels_with_the_default_sizes():
    torch.manual_seed(0)
    published, ours = Published(), Restormer()
    ours.load_state_dict(published.state_dict())
    with torch.no_grad():
        rainy = torch.rand(1, 3, 8, 8)
        torch.testing.assert_close(ours(rainy), published(rainy), atol=1e-6, rtol=0)


def test_a_black_image_has_a_finite_gradient():
    torch.manual_seed(0)
    network = Restormer(**SMALL)
    network(torch.zeros(1, 3, 16, 16)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 20)])
def test_small_images_keep_their_size(networks, size):
    with torch.no_grad():
        restored = networks[0](images(*size))
    assert restored.shape == (2, 3, *size)
    assert restored.isfinite().all()


@pytest.mark.parametrize("pixels", [30, 3000])
def test_pointwise_is_a_matrix_product(pixels):
    """Also for maps that are large enough for the convolution of oneDNN."""
    inputs = torch.rand(1, 10, pixels // 10, 8), torch.randn(5, 8, 1, 1), torch.randn(5)
    x, weight, bias = (value.requires_grad_() for value in inputs)
    result = restormer.pointwise(x, weight, bias)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = exact[0] @ exact[1][:, :, 0, 0].T + exact[2]
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(result.square().mean(), inputs)
    expected_gradients = torch.autograd.grad(expected.square().mean(), exact)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
