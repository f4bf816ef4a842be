"""Generator and discriminator against the textbook form in float64, sizes, and what the ablations build."""

import pytest
import torch

from derain.errors import DerainError
from derain.methods.plnlingan import network as code
from derain.methods.plnlingan.network import MCDDL, PLNLIM, PLNLIN, SFT, Mix, Style, WindowBlock, shift_mask
from tests.methods.plnlingan.references import Textbook

SMALL = Style(channels=8, heads=2)
STAGES = (3, 1, 2, 1)


def awake(module):
    """With weights large enough for every part to matter."""
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


def test_parameters_are_the_papers():
    assert count(PLNLIN(Style())) == 2_251_423
    assert count(PLNLIN(Style(), hierarchy=0)) == 1_690_851
    assert count(MCDDL(Style())) == 679_968
    assert count(PLNLIN(Style(last_interaction=False))) == 2_150_047
    assert count(PLNLIN(Style(expansion=2.0))) == 2_035_103
    assert [count(PLNLIN(Style(heads=heads))) for heads in (1, 2, 8)] == [2_225_059, 2_233_847, 2_286_575]


@pytest.mark.parametrize("size", [(112, 56), (56, 168)])
def test_the_generator_is_the_textbooks_and_its_gradient_too(size):
    ours = awake(PLNLIN(SMALL, STAGES))
    state = {name: value.detach().clone().requires_grad_() for name, value in ours.state_dict().items()}
    theirs = Textbook(state, STAGES, heads=2)
    x = images(*size)
    restored = ours(x, hierarchy=True)
    derained, smaller, features = theirs.generator(x, hierarchy=2)
    pairs = [(restored.derained, derained), *zip(restored.images, smaller, strict=True)]
    pairs += [(mine, other.permute(0, 2, 3, 1)) for mine, other in zip(restored.features, features, strict=True)]
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
    sum(mine.square().mean() for mine, _ in pairs).backward()
    sum(other.square().mean() for _, other in pairs).backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-8, atol=1e-10, msg=name)


def test_the_discriminator_is_the_textbooks():
    ours = awake(MCDDL(SMALL, content=6))
    theirs = Textbook(ours.state_dict(), heads=2)
    x = images(56, 112)
    features = [torch.randn(2, 6, 56 >> k, 112 >> k, dtype=torch.float64) for k in range(4)]
    mine = ours(x, [one.permute(0, 2, 3, 1) for one in features])
    for one, other in zip(mine, theirs.discriminator(x, features), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert [tuple(one.shape[2:]) for one in mine] == [(56, 112), (28, 56), (14, 28), (7, 14)]


def test_every_feature_of_the_generator_reaches_the_discriminator():
    ours = awake(MCDDL(SMALL, content=6))
    features = [torch.randn(1, 56 >> k, 56 >> k, 6, dtype=torch.float64, requires_grad=True) for k in range(4)]
    sum(one.square().sum() for one in ours(images(56, 56, batch=1), features)).backward()
    assert all(one.grad.abs().sum() > 0 for one in features)


@pytest.mark.parametrize("size", [(35, 28), (14, 7), (7, 7)])
def test_rows_of_windows_one_by_one_give_the_same(size, monkeypatch):
    torch.manual_seed(0)
    block = awake(WindowBlock(SMALL, shifted=True))
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    whole = block(x)
    monkeypatch.setattr(code, "STRIP_BYTES", {"cpu": 1})
    strips = []
    monkeypatch.setattr(block, "_transform", lambda *given: strips.append(1) or WindowBlock._transform(block, *given))
    with torch.no_grad():
        torch.testing.assert_close(block(x), whole, rtol=1e-12, atol=1e-12)
    assert len(strips) == size[0] // 7


def test_a_map_of_one_window_is_not_shifted():
    block, plain = WindowBlock(SMALL, shifted=True), WindowBlock(SMALL, shifted=False)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(1, 7, 7, 8)
    assert torch.equal(block(x), plain(x))
    assert not torch.equal(block(torch.cat((x, x), 1)), plain(torch.cat((x, x), 1)))


def test_masks_are_built_once_a_size():
    block = WindowBlock(SMALL, shifted=True)
    shift_mask.cache_clear()
    for _ in range(3):
        block(torch.randn(1, 14, 21, 8))
        block(torch.randn(1, 14, 14, 8))
    assert shift_mask.cache_info().misses == 2


def test_masks_that_were_built_at_inference_serve_training():
    block = WindowBlock(SMALL, shifted=True)
    block.attn.fused_attn = True  # keeps its mask for the backward pass
    shift_mask.cache_clear()
    with torch.inference_mode():
        block(torch.randn(1, 14, 14, 8))
    block(torch.randn(1, 14, 14, 8, requires_grad=True)).sum().backward()


def test_a_masked_pixel_does_not_see_across_the_border():
    block = awake(WindowBlock(SMALL, shifted=True))
    x = torch.randn(1, 14, 14, 8, dtype=torch.float64, requires_grad=True)
    (seen,) = torch.autograd.grad(block(x)[0, 0, 0].sum(), x)
    assert seen[0, :4, :4].abs().sum() > 0
    assert seen[0, 4:].abs().max() < 1e-30
    assert seen[0, :, 4:].abs().max() < 1e-30


@pytest.mark.parametrize("size", [(1, 1), (37, 31), (57, 20), (112, 56)])
def test_any_size(size):
    ours = PLNLIN(SMALL, (1, 1, 1, 1)).eval()
    with torch.no_grad():
        assert ours(torch.rand(1, 3, *size)).derained.shape == (1, 3, *size)


def test_the_hierarchy_is_left_out_unless_it_is_asked_for():
    ours = awake(PLNLIN(SMALL, (1, 1, 1, 1)))
    x = images(40, 60)
    called = []
    for module in ours.supervised:
        module.register_forward_hook(lambda *_: called.append(1))
    without, whole = ours(x), ours(x, hierarchy=True)
    assert len(called) == 4
    assert without.features == without.images == []
    assert torch.equal(without.derained, whole.derained)


def test_ablations_build_what_tables_3_and_4_say():
    kinds = {
        name: [type(one).__name__ for one in PLNLIM(2, Style(channels=8, heads=2, branches=name)).modules()]
        for name in ("both", "local", "non-local")
    }
    assert [kinds[name].count("ResidualBlock") for name in kinds] == [3, 6, 0]
    assert [kinds[name].count("WindowBlock") for name in kinds] == [3, 0, 6]
    assert len(PLNLIM(2, Style(channels=8, fusion=False)).fusions) == 0
    assert len(PLNLIM(2, Style(channels=8, interaction="none")).interactions) == 0
    joined = PLNLIM(2, Style(channels=8, interaction="concatenation")).interactions
    assert {type(one) for pair in joined for one in pair} == {Mix}
    assert {type(one) for pair in PLNLIM(2, Style(channels=8)).interactions for one in pair} == {SFT}
    for unit, kind in (("local", "ResidualBlock"), ("non-local", "WindowBlock")):
        names = [type(one).__name__ for one in PLNLIN(Style(channels=8, unit=unit)).modules()]
        assert "PLNLIM" not in names
        assert names.count(kind) == 2 * (9 + 5 + 3 + 3) + 4 * 3


def test_independent_branches_do_not_inform_each_other():
    torch.manual_seed(0)
    for interaction, informed in (("none", False), ("sft", True), ("concatenation", True)):
        module = awake(PLNLIM(2, Style(channels=8, heads=2, interaction=interaction)))
        seen = {}
        module.local[2].register_forward_hook(lambda _, given, out, seen=seen: seen.update(x=given[0]))
        module(torch.randn(1, 14, 14, 8, dtype=torch.float64))
        gradient = torch.autograd.grad(seen["x"].sum(), module.non_local[0].attn.proj.weight, allow_unused=True)[0]
        assert (gradient is not None) == informed


def test_mix_is_a_convolution_of_the_concatenation():
    mix = awake(Mix(20, 5))
    maps = [torch.randn(2, 3, 4, width, dtype=torch.float64) for width in (8, 8, 4)]
    expected = torch.cat(maps, -1) @ mix.weight.T + mix.bias
    torch.testing.assert_close(mix(*maps), expected, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(DerainError, match="4 heads do not divide 30 channels"):
        PLNLIN(Style(channels=30))
    with pytest.raises(DerainError, match="give four stages"):
        PLNLIN(SMALL, (1, 1, 1))
