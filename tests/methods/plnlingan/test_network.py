"""Generator and discriminator compared with a plain reference in float64; sizes and ablations."""

import pytest
import torch

from derain.errors import DerainError
from derain.methods.plnlingan.network import MCDDL, PLNLIM, PLNLIN, SFT, ConcatLinear, UnitConfig
from tests.methods.plnlingan.references import Textbook

SMALL = UnitConfig(channels=8, heads=2)
STAGES = (3, 1, 2, 1)


def with_large_weights(module):
    """Set weights large enough that every part affects the output."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        gain = 2.0 if "table" in name else 0.25 / max(1, parameter[0].numel()) ** 0.5
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = offset + gain * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module.double()


def images(*size, batch=2):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts():
    assert count(PLNLIN(UnitConfig())) == 2_251_423
    assert count(PLNLIN(UnitConfig(), hierarchy=0)) == 1_690_851
    assert count(MCDDL(UnitConfig())) == 679_968
    assert count(PLNLIN(UnitConfig(last_interaction=False))) == 2_150_047
    assert [count(PLNLIN(UnitConfig(heads=heads))) for heads in (1, 2, 8)] == [2_225_059, 2_233_847, 2_286_575]


@pytest.mark.parametrize("size", [(112, 56), pytest.param((56, 168), marks=pytest.mark.slow)])
def test_generator_and_its_gradients_equal_the_reference(size):
    generator = with_large_weights(PLNLIN(SMALL, STAGES))
    state = {name: value.detach().clone().requires_grad_() for name, value in generator.state_dict().items()}
    reference = Textbook(state, STAGES, heads=2)
    x = images(*size)
    restored = generator(x, hierarchy=True)
    derained, images_by_scale, features = reference.generator(x, hierarchy=2)
    pairs = [(restored.derained, derained), *zip(restored.images, images_by_scale, strict=True)]
    pairs += [(ours, theirs.permute(0, 2, 3, 1)) for ours, theirs in zip(restored.features, features, strict=True)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    sum(ours.square().mean() for ours, _ in pairs).backward()
    sum(theirs.square().mean() for _, theirs in pairs).backward()
    for name, parameter in generator.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-8, atol=1e-10, msg=name)


def test_discriminator_equals_the_reference():
    discriminator = with_large_weights(MCDDL(SMALL, content_channels=6))
    reference = Textbook(discriminator.state_dict(), heads=2)
    x = images(56, 112)
    features = [torch.randn(2, 6, 56 >> k, 112 >> k, dtype=torch.float64) for k in range(4)]
    logits = discriminator(x, [content.permute(0, 2, 3, 1) for content in features])
    for ours, theirs in zip(logits, reference.discriminator(x, features), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert [tuple(scale.shape[2:]) for scale in logits] == [(56, 112), (28, 56), (14, 28), (7, 14)]


def test_discriminator_uses_all_generator_features():
    discriminator = with_large_weights(MCDDL(SMALL, content_channels=6))
    features = [torch.randn(1, 56 >> k, 56 >> k, 6, dtype=torch.float64, requires_grad=True) for k in range(4)]
    logits = discriminator(images(56, 56, batch=1), features)
    sum(scale.square().sum() for scale in logits).backward()
    assert all(content.grad.abs().sum() > 0 for content in features)


@pytest.mark.parametrize("size", [(1, 1), (37, 31), (57, 20), (112, 56)])
def test_any_size(size):
    generator = PLNLIN(SMALL, (1, 1, 1, 1)).eval()
    with torch.no_grad():
        assert generator(torch.rand(1, 3, *size)).derained.shape == (1, 3, *size)


def test_hierarchy_is_computed_only_on_request():
    generator = with_large_weights(PLNLIN(SMALL, (1, 1, 1, 1)))
    x = images(40, 60)
    calls = []
    for module in generator.supervised:
        module.register_forward_hook(lambda module, *_: calls.append(module))
    plain = generator(x)
    supervised = generator(x, hierarchy=True)
    assert len(calls) == 4
    assert plain.features == plain.images == []
    assert torch.equal(plain.derained, supervised.derained)


def test_ablations_of_tables_3_and_4():
    kinds = {
        name: [type(module).__name__ for module in PLNLIM(2, UnitConfig(channels=8, heads=2, branches=name)).modules()]
        for name in ("both", "local", "non-local")
    }
    assert [kinds[name].count("ResidualBlock") for name in kinds] == [3, 6, 0]
    assert [kinds[name].count("WindowBlock") for name in kinds] == [3, 0, 6]
    assert len(PLNLIM(2, UnitConfig(channels=8, fusion=False)).fusions) == 0
    assert len(PLNLIM(2, UnitConfig(channels=8, interaction="none")).interactions) == 0
    for interaction, kind in (("concatenation", ConcatLinear), ("sft", SFT)):
        pairs = PLNLIM(2, UnitConfig(channels=8, interaction=interaction)).interactions
        assert {type(module) for pair in pairs for module in pair} == {kind}
    for unit, kind in (("local", "ResidualBlock"), ("non-local", "WindowBlock")):
        names = [type(module).__name__ for module in PLNLIN(UnitConfig(channels=8, unit=unit)).modules()]
        assert "PLNLIM" not in names
        assert names.count(kind) == 2 * (9 + 5 + 3 + 3) + 4 * 3


def test_branches_without_interaction_are_independent():
    torch.manual_seed(0)
    for interaction, informed in (("none", False), ("sft", True), ("concatenation", True)):
        module = with_large_weights(PLNLIM(2, UnitConfig(channels=8, heads=2, interaction=interaction)))
        inputs = []
        module.local[2].register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        module(torch.randn(1, 14, 14, 8, dtype=torch.float64))
        gradient = torch.autograd.grad(inputs[0].sum(), module.non_local[0].attn.proj.weight, allow_unused=True)[0]
        assert (gradient is not None) == informed


def test_concat_linear_equals_a_convolution_of_the_concatenation():
    linear = with_large_weights(ConcatLinear(20, 5))
    maps = [torch.randn(2, 3, 4, width, dtype=torch.float64) for width in (8, 8, 4)]
    expected = torch.cat(maps, -1) @ linear.weight.T + linear.bias
    torch.testing.assert_close(linear(*maps), expected, rtol=1e-12, atol=1e-12)


def test_invalid_networks_are_refused():
    with pytest.raises(DerainError, match="30 channels"):
        PLNLIN(UnitConfig(channels=30))
    with pytest.raises(DerainError, match=r"stages \[1, 1, 1\]"):
        PLNLIN(SMALL, (1, 1, 1))
