"""Conditional U-Net compared with a plain reference; its published keys and shapes; effects of the contexts."""

import copy
import itertools

import pytest
import torch

from derain.errors import DerainError
from derain.methods import DACLIPSDEModule
from derain.methods.daclipsde import network as network_file
from derain.methods.daclipsde.network import ConditionalUNet
from tests.methods.daclipsde.references import Textbook

CONTEXTS = {"both": (True, True), "content": (True, False), "degradation": (False, True), "none": (False, False)}
SIZE = 24
"""Size of the embeddings."""


def small(contexts="both", attention="linear", **options):
    torch.manual_seed(0)
    content, degradation = CONTEXTS[contexts]
    options = {"channels": 32, "multipliers": (1, 2), "context": SIZE} | options
    return ConditionalUNet(attention=attention, content=content, degradation=degradation, **options)


def perturbed(network):
    """Convert to float64 and change gains, biases and layers that are initialised to zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.double().named_parameters():
            if parameter.ndim == 1 or name.endswith(".g") or "proj_out" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network


def inputs(count=2, height=20, width=24, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(2, count, 3, height, width, generator=generator, dtype=dtype)
    embeddings = torch.randn(2, count, SIZE, generator=generator, dtype=dtype)
    return *images, torch.randint(1, 101, (count,), generator=generator), *embeddings


def equal(ours, theirs, atol=1e-10):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


# Comparison with the plain reference.


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("attention", ["linear", "none"])
@pytest.mark.parametrize(("count", "height", "width"), [(3, 37, 31), (1, 37, 31), (1, 1, 1), (3, 1, 5)])
def test_network_and_its_gradients_equal_the_reference(contexts, attention, count, height, width, monkeypatch):
    monkeypatch.setattr(network_file, "STRIP", 100)  # several strips, the last one lower
    ours = perturbed(small(contexts, attention))
    textbook = Textbook({name: p.detach().clone().requires_grad_() for name, p in ours.named_parameters()})
    arguments = inputs(count, height, width)
    expected = textbook(*arguments)
    with torch.no_grad():
        equal(ours(*arguments), expected)
    estimated = ours(*arguments)
    assert estimated.shape == (count, 3, height, width)
    equal(estimated, expected)
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (estimated * target).sum().backward()
    (expected * target).sum().backward()
    for name, parameter in ours.named_parameters():
        theirs = textbook.state[name].grad
        torch.testing.assert_close(parameter.grad, theirs, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("attention", ["linear", "none"])
@pytest.mark.parametrize("gradient", [True, False])
def test_network_equals_the_reference_in_float32(attention, gradient):
    ours = perturbed(small(attention=attention)).float()
    arguments = inputs(3, 37, 31, torch.float32)
    with torch.set_grad_enabled(gradient):
        equal(ours(*arguments), Textbook(ours.state_dict())(*arguments), 1e-5)


def test_default_network_equals_the_reference():
    ours = perturbed(ConditionalUNet(context=SIZE))
    with torch.no_grad():
        arguments = inputs(1, 37, 31)
        equal(ours(*arguments), Textbook(ours.state_dict())(*arguments))


@pytest.mark.parametrize("strip", [1, 50, 10_000])
def test_strips_with_large_keys_equal_the_reference(strip, monkeypatch):
    monkeypatch.setattr(network_file, "STRIP", strip)
    ours = perturbed(small("none")).float()
    with torch.no_grad():
        for module in ours.modules():
            if isinstance(module, network_file.LinearAttention):
                module.to_qkv.weight[128:256] *= 300
        arguments = inputs(2, dtype=torch.float32)
        equal(ours(*arguments), Textbook(ours.state_dict())(*arguments), 1e-4)


def test_bfloat16_is_close_to_float32():
    ours = perturbed(small()).float()
    arguments = inputs(2, dtype=torch.float32)
    with torch.no_grad():
        exact = ours(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert (ours(*arguments).float() - exact).abs().max() < 0.03 * exact.abs().max()


# Sizes and keys.


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"multipliers": (2, 4, 8, 16), "content": False, "degradation": False}, 137_147_523),
        ({}, 48_975_747),
        ({"content": False}, 36_499_587),
        ({"content": False, "degradation": False}, 36_236_419),
    ],
)
def test_parameters(options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in ConditionalUNet(**options).parameters()) == count


def published(channels, multipliers, content=False, degradation=False, context=512):
    """Keys and shapes of the authors' checkpoints."""
    time, expected = 4 * channels, {}

    def add(name, *shape, bias=True):
        expected[f"{name}.weight"] = shape
        if bias:
            expected[f"{name}.bias"] = shape[:1]

    def block(name, inputs, outputs):
        add(f"{name}.mlp.1", 2 * outputs, time)
        add(f"{name}.block1.proj", outputs, inputs, 3, 3, bias=False)
        add(f"{name}.block2.proj", outputs, outputs, 3, 3, bias=False)
        if inputs != outputs:
            add(f"{name}.res_conv", outputs, inputs, 1, 1, bias=False)

    def linear_attention(name, width):
        expected[f"{name}.fn.norm.g"] = expected[f"{name}.fn.fn.to_out.1.g"] = (1, width, 1, 1)
        add(f"{name}.fn.fn.to_qkv", 384, width, 1, 1, bias=False)
        add(f"{name}.fn.fn.to_out.0", width, 128, 1, 1)

    def transformer(name, width):
        expected[f"{name}.fn.norm.g"] = (1, width, 1, 1)
        inner = f"{name}.fn.fn.transformer_blocks.0"
        add(f"{name}.fn.fn.norm", width)
        for projection in ("proj_in", "proj_out"):
            add(f"{name}.fn.fn.{projection}", width, width, 1, 1)
        for attention, tokens in (("attn1", width), ("attn2", context)):
            add(f"{inner}.{attention}.to_q", width, width, bias=False)
            add(f"{inner}.{attention}.to_k", width, tokens, bias=False)
            add(f"{inner}.{attention}.to_v", width, tokens, bias=False)
            add(f"{inner}.{attention}.to_out.0", width, width)
        add(f"{inner}.ff.net.0.proj", 8 * width, width)
        add(f"{inner}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            add(f"{inner}.{norm}", width)

    deepest_attention = transformer if content else linear_attention
    widths = [channels, *(channels * factor for factor in multipliers)]
    depth = len(multipliers)
    add("init_conv", channels, 6, 7, 7, bias=False)
    add("time_mlp.1", time, channels)
    add("time_mlp.3", time, time)
    if degradation:
        expected["prompt"] = (1, time)
        add("text_mlp.0", time, context)
        add("text_mlp.2", time, time)
        add("prompt_mlp", time, time)
    for level, (fine, coarse) in enumerate(itertools.pairwise(widths)):
        deepest, up = level == depth - 1, f"ups.{depth - 1 - level}"
        attend = deepest_attention if deepest else linear_attention
        for index in (0, 1):
            block(f"downs.{level}.{index}", fine, fine)
            block(f"{up}.{index}", coarse + fine, coarse)
        attend(f"downs.{level}.2", fine)
        attend(f"{up}.2", coarse)
        if deepest:
            add(f"downs.{level}.3", coarse, fine, 3, 3, bias=False)
        else:
            add(f"downs.{level}.3", coarse, fine, 4, 4)
        if level == 0:
            add(f"{up}.3", fine, coarse, 3, 3, bias=False)
        else:
            add(f"{up}.3.1", fine, coarse, 3, 3)
    block("mid_block1", widths[-1], widths[-1])
    deepest_attention("mid_attn", widths[-1])
    block("mid_block2", widths[-1], widths[-1])
    block("final_res_block", 2 * channels, channels)
    add("final_conv", 3, channels, 3, 3)
    return expected


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize(
    ("multipliers", "contexts", "count"),
    [((2, 4, 8, 16), (False, False), 137_147_523), ((1, 2, 4, 8), (True, True), 48_975_747)],
)
def test_keys_and_shapes_equal_the_published_ones(multipliers, contexts, count):
    with torch.device("meta"):
        ours = ConditionalUNet(64, multipliers, "linear", *contexts).state_dict()
    expected = published(64, multipliers, *contexts)
    assert shapes(ours) == expected
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == count


@pytest.mark.parametrize(
    ("multipliers", "contexts", "max_sigma"),
    [((2, 4, 8, 16), "none", 10.0), ((1, 2, 4, 8), "both", 50.0), ((1, 2), "content", 50.0), ((2, 3), "none", 10.0)],
)
def test_published_weights_load(multipliers, contexts, max_sigma, caplog):
    names = published(32, multipliers, *CONTEXTS[contexts], context=SIZE)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    module = DACLIPSDEModule.from_published(state)
    assert module.hparams["contexts"] == contexts
    assert module.hparams["channels"] == 32
    assert tuple(module.hparams["multipliers"]) == multipliers
    assert module.hparams["max_sigma"] == max_sigma == module.sde.max_sigma
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f":max_sigma={max_sigma:g}" in caplog.text
    assert DACLIPSDEModule.from_published(state, max_sigma=30).sde.max_sigma == 30
    assert len(caplog.records) == 1
    loaded = module.network.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("change", ["foreign", "missing", "shape", "extra"])
def test_other_state_dicts_are_refused(change):
    state = {name: torch.zeros(shape) for name, shape in published(32, (1, 2), True, True, SIZE).items()}
    if change == "foreign":
        state = {"weight": torch.zeros(1)}
    elif change == "missing":
        del state["final_conv.bias"]
    elif change == "shape":
        state["final_conv.bias"] = torch.zeros(4)
    else:
        state["final_conv.gain"] = torch.zeros(1)
    assert DACLIPSDEModule.from_published(state) is None


@pytest.mark.parametrize(
    "options",
    [{"channels": 33, "content": False}, {"channels": 16}, {"channels": 48, "multipliers": (1, 2)}],
)
def test_invalid_channels_are_refused(options):
    with pytest.raises(DerainError, match=f"channels {options['channels']}"):
        ConditionalUNet(**{"multipliers": (1, 1)} | options)


def test_any_even_channels_without_content():
    arguments = inputs(1, dtype=torch.float32)
    for channels in (2, 6):
        assert ConditionalUNet(channels, (1, 2), content=False, degradation=False)(*arguments[:3]).isfinite().all()


# Contexts.


def test_network_without_contexts_is_that_of_ir_sde():
    ours = small("none")
    assert shapes(ours.state_dict()) == published(32, (1, 2))
    arguments = inputs(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(*arguments), ours(*arguments[:3]))  # embeddings are ignored


@pytest.mark.parametrize("contexts", CONTEXTS)
def test_contexts_of_the_network(contexts):
    names = [name for name, _ in small(contexts).named_parameters()]
    needs_content, needs_degradation = CONTEXTS[contexts]
    assert any("transformer_blocks" in name for name in names) == needs_content
    assert ("prompt" in names) == needs_degradation


@pytest.mark.parametrize("gradient", [True, False])
def test_content_affects_the_output_after_the_first_step(gradient):
    ours = small("content")
    *arguments, content, _ = inputs(dtype=torch.float32)

    def difference():
        with torch.set_grad_enabled(gradient):
            return (ours(*arguments, content) - ours(*arguments, -content)).abs().max().item()

    assert difference() == 0
    optimizer = torch.optim.AdamW(ours.parameters(), 1e-2)
    ours(*arguments, content).square().mean().backward()
    optimizer.step()
    assert difference() > 1e-6


@pytest.mark.parametrize("contexts", ["both", "degradation"])
def test_degradation_affects_the_output(contexts):
    ours = small(contexts)
    *arguments, content, degradation = inputs(dtype=torch.float32)
    with torch.no_grad():
        assert (ours(*arguments, content, degradation) - ours(*arguments, content, -degradation)).abs().max() > 1e-6


def test_prompt_is_weighted_by_a_softmax():
    ours = perturbed(small("degradation"))
    degradation = inputs()[4]
    times = torch.tensor([3, 70])
    with torch.no_grad():
        weights = torch.exp(ours.text_mlp(degradation))
        weights /= weights.sum(dim=1, keepdim=True)
        equal(ours.embed(times, degradation), ours.time_mlp(times.double()) + ours.prompt_mlp(weights * ours.prompt))


# Times and batches.


def test_times_are_per_image_and_of_any_type():
    ours = perturbed(small())
    arguments = inputs(3)
    with torch.no_grad():
        together = ours(*arguments)
        for index in range(3):
            state, rainy, times, *embeddings = (argument[index : index + 1] for argument in arguments)
            assert times.dtype == torch.int64
            for time in (times, times.double(), times.float()):
                equal(ours(state, rainy, time, *embeddings), together[index : index + 1])
        later = ours(arguments[0], arguments[1], arguments[2] % 100 + 1, *arguments[3:])
    assert (later - together).abs().amax(dim=(1, 2, 3)).min() > 1e-6


@pytest.mark.parametrize("gradient", [True, False])
def test_images_of_a_batch_are_independent(gradient):
    ours = perturbed(small())
    arguments = inputs(3)
    changed = copy.deepcopy(arguments)
    for argument in changed:
        argument[1] = argument[1] // 2 + 1 if argument.dtype == torch.int64 else 1 - argument[1]
    with torch.set_grad_enabled(gradient):
        before, after = ours(*arguments), ours(*changed)
    equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] - before[1]).abs().max() > 1e-6


def test_inputs_are_not_modified():
    ours = perturbed(small())
    arguments = inputs()
    before = copy.deepcopy(arguments)
    with torch.no_grad():
        first = ours(*arguments)
        assert torch.equal(ours(*arguments), first)
    assert all(torch.equal(argument, copied) for argument, copied in zip(arguments, before, strict=True))
