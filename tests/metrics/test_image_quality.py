import sys

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

from derain.errors import DerainError
from derain.metrics import ImageQuality, psnr_ssim, resolve

NAMES = ["matlab-y", "prenet", "ir-sde"]


def image(index, clean=False):
    """Return a different image for each index."""
    generator = torch.Generator().manual_seed(index)
    truth = torch.rand(1, 3, 24, 31, generator=generator)
    return truth if clean else truth + 0.02 * (1 + index % 5) * torch.randn(truth.shape, generator=generator)


def evaluated(indices, names=NAMES):
    quality = ImageQuality(names)
    for index in indices:
        quality.update(image(index), image(index, clean=True), torch.tensor([index]))
    return quality


def test_scores_of_images_are_sorted_by_index():
    scores = evaluated([5, 2, 9]).compute()
    assert list(scores) == [protocol.name for protocol in resolve(NAMES)]
    for protocol in resolve(NAMES):
        score = scores[protocol.name]
        pairs = [[image(index, clean)[0].movedim(0, -1).numpy() for clean in (False, True)] for index in (2, 5, 9)]
        expected = np.array([psnr_ssim(*pair, protocol) for pair in pairs])
        assert score.index.tolist() == [2, 5, 9]
        np.testing.assert_array_equal(np.stack([score.psnr, score.ssim], axis=1), expected)


def test_batches_and_single_images_have_equal_scores():
    together = ImageQuality(NAMES)
    indices = [3, 1, 2]
    batch = [torch.cat([image(index, clean) for index in indices]) for clean in (False, True)]
    together.update(*batch, torch.tensor(indices))
    alone = evaluated(indices)
    for name, score in together.compute().items():
        np.testing.assert_array_equal(score.psnr, alone.compute()[name].psnr)
        np.testing.assert_array_equal(score.ssim, alone.compute()[name].ssim)


def test_images_count_once_and_errors_are_not_pooled():
    scores = evaluated([0, 4, 0, 4, 4]).compute()["matlab-y"]
    assert scores.index.tolist() == [0, 4]
    worse, better = sorted(scores.psnr.tolist())
    pooled = -10 * np.log10((10 ** (-worse / 10) + 10 ** (-better / 10)) / 2)
    assert scores.psnr.mean() == (worse + better) / 2
    assert abs(scores.psnr.mean() - pooled) > 1


def test_shapes_for_one_image_and_for_none():
    assert evaluated([7]).compute()["matlab-y"].psnr.shape == (1,)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert ImageQuality(NAMES).compute()["matlab-y"].psnr.shape == (0,)


@pytest.mark.filterwarnings("error")
def test_images_without_scores_are_nan():
    quality = ImageQuality(NAMES)
    quality.update_failed(torch.tensor([4, 2]))
    scores = quality.compute()["prenet"]
    assert scores.index.tolist() == [2, 4]
    assert np.isnan(scores.psnr).all()
    quality.update_failed(torch.tensor([3]))
    assert quality.compute()["prenet"].index.tolist() == [2, 3, 4]


def test_reset_clears_the_scores():
    quality = evaluated([1, 2])
    quality.compute()
    quality.reset()
    quality.update(image(3), image(3, clean=True), torch.tensor([3]))
    assert quality.compute()["prenet"].index.tolist() == [3]


def test_autocast_and_half_modules_do_not_change_scores():
    plain = evaluated([1])
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluated([1])
    module = nn.Module()
    module.quality = ImageQuality(NAMES)
    module.bfloat16()
    module.quality.update(image(1), image(1, clean=True), torch.tensor([1]))
    for quality in (cast, module.quality):
        assert quality.compute()["matlab-y"].ssim.tolist() == plain.compute()["matlab-y"].ssim.tolist()
        assert quality.compute()["matlab-y"].psnr.dtype == np.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rejected(dtype):
    quality = ImageQuality()
    for derained, clean in ((image(1).to(dtype), image(1)), (image(1), image(1).to(dtype))):
        with pytest.raises(DerainError, match=str(dtype)):
            quality.update(derained, clean, torch.tensor([0]))


def test_uint8_images():
    clean = (image(1, clean=True) * 255).byte()
    quality = ImageQuality(["matlab-y"])
    quality.update(clean, clean, torch.tensor([0]))
    assert quality.compute()["matlab-y"].psnr.tolist() == [100]


def test_no_state_and_no_parameters():
    quality = evaluated([1])
    assert not quality.state_dict()
    assert not list(quality.parameters())


SHARES = {
    "51 and 50": [[*range(0, 101, 2)], [*range(1, 101, 2)]],
    "padded": [[*range(0, 101, 2)], [*range(1, 101, 2), 0]],  # as by a padding sampler
    "one without images": [[3, 1, 2], []],
}


def evaluate(rank, folder):
    assert "lightning" not in sys.modules  # metrics do not need it
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    scores = {case: evaluated(shares[rank]).compute() for case, shares in SHARES.items()}
    torch.save(scores, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tmp_path):
    torch.multiprocessing.spawn(evaluate, (tmp_path,), nprocs=2)
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for case, shares in SHARES.items():
            alone = evaluated(sorted({index for indices in shares for index in indices})).compute()
            for name, score in alone.items():
                for column in ("index", "psnr", "ssim"):
                    expected = getattr(score, column)
                    np.testing.assert_array_equal(getattr(together[case][name], column), expected, err_msg=case)
                assert together[case][name].psnr.mean() == score.psnr.mean()


@pytest.mark.parametrize(("names", "label"), [((), "image 7"), (["scene_3"], "scene_3")])
def test_floats_out_of_range_are_rejected(names, label):
    quality = ImageQuality(NAMES)
    clean = torch.rand(1, 3, 24, 31)
    for images in ((clean * 255, clean * 255), (clean * float("nan"), clean), (clean, clean * 2 - 1)):
        with pytest.raises(DerainError, match=label):
            quality.update(*images, torch.tensor([7]), names)
    assert quality.rows == []
