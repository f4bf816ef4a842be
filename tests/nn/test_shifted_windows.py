"""Swin blocks for maps of any size: strips, shifts, and masks."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock

from derain.errors import DerainError
from derain.nn import shifted_windows
from derain.nn.shifted_windows import WindowBlock, shift_mask


def build(shifted=True, window=7, **options):
    """Return a block of 8 channels and 2 heads in float64, with weights large enough that every part has an effect."""
    generator = torch.Generator().manual_seed(5)
    block = WindowBlock(8, 2, window, shifted, **options)
    for name, parameter in block.named_parameters():
        gain = 2.0 if "table" in name else 0.25 / max(1, parameter[0].numel()) ** 0.5
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = offset + gain * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return block.double()


@pytest.mark.parametrize("window", [4, 7])
@pytest.mark.parametrize("single", [False, True])
def test_equals_timm_at_its_fixed_size(window, single):
    """The block of timm is built for one size; a map of one window is shifted if it always partitions."""
    torch.manual_seed(0)
    block = build(window=window, shift_single=single, expansion=2.0)
    for size in [(2 * window, 3 * window), (window, window)]:
        theirs = SwinTransformerBlock(
            8, size, 2, window_size=window, shift_size=window // 2, mlp_ratio=2.0, always_partition=single
        ).double()
        theirs.load_state_dict(block.state_dict(), strict=True)
        x = torch.randn(2, *size, 8, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(block(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(35, 28), (14, 7), (7, 7)])
def test_strips_give_the_same_result_as_the_whole_map(size, monkeypatch):
    torch.manual_seed(0)
    block = build()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    whole = block(x)
    monkeypatch.setattr(shifted_windows, "STRIP_BYTES", {"cpu": 1})
    strips = []

    def transform(strip, mask):
        strips.append(strip)
        return WindowBlock._transform(block, strip, mask)

    monkeypatch.setattr(block, "_transform", transform)
    with torch.no_grad():
        torch.testing.assert_close(block(x), whole, rtol=1e-12, atol=1e-12)
    assert len(strips) == size[0] // 7


@pytest.mark.parametrize("single", [False, True])
def test_map_of_one_window(single):
    block, plain = build(shift_single=single), build(shifted=False)
    x = torch.randn(1, 7, 7, 8, dtype=torch.float64)
    assert torch.equal(block(x), plain(x)) is not single
    assert not torch.equal(block(torch.cat((x, x), 1)), plain(torch.cat((x, x), 1)))


def test_training_skips_attention_and_mlp():
    torch.manual_seed(0)
    block = build(drop_path=0.5)
    x = torch.randn(64, 7, 7, 8, dtype=torch.float64)
    assert torch.equal(block.eval()(x), build()(x))
    unchanged = [torch.equal(before, after) for before, after in zip(x, block.train()(x), strict=True)]
    assert 4 < sum(unchanged) < 32  # both are skipped in a quarter of the images


def test_masks_are_cached_by_size():
    block = build()
    shift_mask.cache_clear()
    for _ in range(3):
        block(torch.randn(1, 14, 21, 8, dtype=torch.float64))
        block(torch.randn(1, 14, 14, 8, dtype=torch.float64))
    assert shift_mask.cache_info().misses == 2


def test_masks_built_in_inference_mode_work_in_training():
    block = build()
    block.attn.fused_attn = True  # keeps its mask for the backward pass
    shift_mask.cache_clear()
    x = torch.randn(1, 14, 14, 8, dtype=torch.float64)
    with torch.inference_mode():
        block(x)
    block(x.requires_grad_()).sum().backward()


def test_masked_pixels_do_not_attend_across_the_border():
    block = build()
    x = torch.randn(1, 14, 14, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x)[0, 0, 0].sum(), x)
    assert gradient[0, :4, :4].abs().sum() > 0
    assert gradient[0, 4:].abs().max() < 1e-30
    assert gradient[0, :, 4:].abs().max() < 1e-30


def test_heads_divide_the_channels():
    with pytest.raises(DerainError, match="3 heads do not divide 8 channels"):
        WindowBlock(8, 3, 7, shifted=False)
