from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from derain import batching, restoration
from derain.errors import DerainError
from derain.methods import CLIPRPNModule, PReNetModule
from derain.restoration import Restorer, choose_device
from derain.tiles import blend_tiles, tile_starts


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return PReNetModule(stages=2)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_tensor_that_requires_grad_is_restored(method, strength):
    image = torch.rand(3, 9, 11, requires_grad=True)
    restorer = Restorer(method, device="cpu", strength=strength)
    restored = restorer(image)
    assert not restored.requires_grad
    torch.testing.assert_close(restored, restorer(image.detach()))


def test_a_list_of_modules_is_not_compiled():
    method = PReNetModule(stages=1)
    method.network = torch.nn.ModuleList([method.network])
    with pytest.raises(DerainError, match=r"compile.*ModuleList"):
        Restorer(method, device="cpu", compile=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (37, 31), (64, 64)])
def test_any_size(method, size):
    derained = Restorer(method, device="cpu")(np.random.default_rng(0).random((*size, 3), np.float32))
    assert derained.shape == (*size, 3)
    assert derained.dtype == np.float32
    assert 0 <= derained.min() <= derained.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(100, 150), (65, 64), (64, 200), (33, 129)])
@pytest.mark.parametrize("overlap", [0, 7, 32])
def test_tiles_of_a_pointwise_network_give_the_whole(height, width, overlap):
    image = torch.rand(1, 3, height, width)
    sizes = set()

    def forward(tile, *conditions):
        sizes.add(tuple(tile.shape))
        return tile**2

    torch.testing.assert_close(blend_tiles(image, forward, 64, overlap), image**2, atol=1e-6, rtol=0)
    assert sizes == {(1, 3, min(64, height), min(64, width))}


def test_tiles_leave_no_seam():
    """Tiles that disagree (each returns its own constant) pass into each other in small steps."""
    constants = iter(torch.linspace(0, 1, 2))
    derained = blend_tiles(torch.rand(1, 3, 64, 96), lambda t: torch.full_like(t, next(constants)), 64, 32)
    assert derained[0, 0, 0].diff().abs().max() < 0.06


def test_tile_starts_cover_and_overlap():
    for length in range(1, 300, 7):
        for tile, overlap in ((64, 0), (64, 32), (100, 30)):
            tops = tile_starts(length, tile, overlap)
            assert tops[0] == 0
            assert tops[-1] == max(0, length - tile)
            assert all(following - top <= tile - overlap for top, following in pairwise(tops))


def test_tiled_and_whole_agree_away_from_tile_borders(method):
    image = np.random.default_rng(1).random((160, 160, 3), np.float32)
    whole = Restorer(method, device="cpu", tile=None)(image)
    tiled = Restorer(method, device="cpu", tile=96, overlap=64)(image)
    assert np.abs(whole - tiled).mean() < 1e-3


def test_ensemble_is_the_mean_over_flips_and_rotations(method):
    image = np.random.default_rng(2).random((24, 31, 3), np.float32)
    plain = Restorer(method, device="cpu")
    views = []
    for turns in range(4):
        for mirror in (False, True):
            view = np.rot90(image[:, ::-1] if mirror else image, turns)
            back = np.rot90(plain(np.ascontiguousarray(view)), -turns)
            views.append(back[:, ::-1] if mirror else back)
    expected = np.mean(np.stack(views), 0)
    np.testing.assert_allclose(Restorer(method, device="cpu", ensemble=True)(image), expected, atol=1e-6)


def test_out_of_memory_halves_the_tile(method, monkeypatch):
    restorer = Restorer(method, device="cpu")
    sizes = []

    def forward(tile, *conditions):
        sizes.append(tile.shape[-1])
        if tile.shape[-1] > 128:
            torch.empty(10**15)  # the machine's own message
        return tile

    monkeypatch.setattr(restorer.scheduler, "_forward", forward)
    image = np.random.default_rng(3).random((200, 400, 3), np.float32)
    np.testing.assert_allclose(restorer(image), image, atol=1e-6)
    assert sizes[:3] == [400, 200, 100]
    sizes.clear()
    restorer(image)
    assert set(sizes) == {100}  # the next frame of a video does not try again


def test_no_memory_at_all_is_refused(method, monkeypatch):
    restorer = Restorer(method, device="cpu")

    def forward(tile, *conditions):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(restorer.scheduler, "_forward", forward)
    with pytest.raises(DerainError, match="not enough memory for a tile"):
        restorer(np.zeros((100, 100, 3), np.float32))


def test_other_errors_are_not_taken_for_memory(method, monkeypatch):
    restorer = Restorer(method, device="cpu")

    def forward(tile, *conditions):
        raise RuntimeError("a fault")

    monkeypatch.setattr(restorer.scheduler, "_forward", forward)
    with pytest.raises(RuntimeError, match="a fault"):
        restorer(np.zeros((100, 100, 3), np.float32))


def test_automatic_tiles_follow_memory(method, monkeypatch):
    monkeypatch.setattr(batching, "memory_for", lambda device: 2 * 300 * 300 * method.bytes_per_pixel)
    restorer = Restorer(method, device="cpu")
    assert restorer.scheduler._tile_side(300, 300) == 300
    assert restorer.scheduler._tile_side(300, 301) == 288
    assert restorer.scheduler._tile_side(4000, 10) == 4000


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_close_and_used_only_where_it_is_native(method, native, monkeypatch):
    monkeypatch.setattr(restoration, "computes_bf16", lambda device: native)
    image = np.random.default_rng(4).random((32, 32, 3), np.float32)
    exact, rough = (Restorer(method, device="cpu", precision=p)(image) for p in ("float32", "bf16"))
    assert np.abs(exact - rough).max() < 0.05
    assert (exact != rough).any() == native


def test_refusals(method, tmp_path):
    with pytest.raises(DerainError, match="tile 10"):
        Restorer(method, tile=10)
    with pytest.raises(DerainError, match=r"device cuda:99.*found"):
        choose_device("cuda:99")
    for name in ("gpu", "cpu:", "cpu:x", "cpu:1"):
        with pytest.raises(DerainError, match=f"device {name}"):
            choose_device(name)
    with pytest.raises(DerainError, match="no such file"):
        Restorer(tmp_path / "absent.pth")


@pytest.mark.slow
def test_tiles_and_views_take_the_route_of_the_whole_image(monkeypatch):
    method = CLIPRPNModule(perception="fixed", route=1, dim=8, blocks=(0, 1, 0, 0), refinement=0)
    seen, taken = [], []
    monkeypatch.setattr(method, "encode", lambda image: seen.append(image.shape) or {"routes": [1]})
    run = method.network.forward
    monkeypatch.setattr(method.network, "forward", lambda x, routes: taken.append(routes) or run(x, routes))
    image = np.random.default_rng(3).random((100, 140, 3), np.float32)
    explained = Restorer(method, device="cpu", tile=64, ensemble=True).explain(image)
    assert seen == [(1, 3, 100, 140)]
    assert len(taken) > 8
    assert set(map(tuple, taken)) == {(1,)}
    assert list(explained.maps) == ["mask at 1/2", "mask at 1/4", "mask at 1/8"]
    assert {one.shape for one in explained.maps.values()} == {(100, 140)}
    again = Restorer(method, device="cpu", tile=64, ensemble=True)(image)
    np.testing.assert_allclose(explained.derained, again, atol=1e-6)
    assert explained.description == {"route": 1}


def test_images_come_back_as_they_came(method):
    restorer = Restorer(method, device="cpu")
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (2, 9, 7, 3), np.uint8)
    floats = array / np.float32(255)
    expected = np.stack([restorer(one) for one in floats])
    assert expected.shape == floats.shape
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(restorer(floats), expected)
    in_bytes = np.rint(expected * 255).astype(np.uint8)
    np.testing.assert_array_equal(restorer(array), in_bytes)
    np.testing.assert_array_equal(restorer(array[0]), in_bytes[0])
    tensor = torch.from_numpy(floats).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(restorer(tensor).permute(0, 2, 3, 1).numpy(), expected)
    np.testing.assert_array_equal(restorer(tensor[1]).permute(1, 2, 0).numpy(), expected[1])
    assert restorer(tensor.half()).dtype == torch.float16
    assert restorer(tensor.mul(255).byte()).dtype == torch.uint8
    picture = Image.fromarray(array[0])
    np.testing.assert_array_equal(np.asarray(restorer(picture)), in_bytes[0])
    first, second = restorer([picture, array[1]])
    assert isinstance(first, Image.Image)
    np.testing.assert_array_equal(second, in_bytes[1])
    assert restorer(array[:0]).shape == (0, 9, 7, 3)


def test_a_tensor_may_be_used_where_gradients_are_wanted(method):
    restored = Restorer(method, device="cpu")(torch.rand(3, 9, 8))
    assert not restored.is_inference()
    weight = torch.ones((), requires_grad=True)
    (weight * restored).sum().backward()
    assert torch.equal(weight.grad, restored.sum())


def test_a_picture_keeps_its_alpha(method):
    picture = Image.new("RGBA", (6, 5), (200, 30, 40, 77))
    restored = Restorer(method, device="cpu")(picture)
    assert restored.mode == "RGBA"
    assert restored.getchannel("A").getextrema() == (77, 77)
    assert Restorer(method, device="cpu")(picture.convert("L")).mode == "RGB"


def test_a_phones_picture_is_set_upright_and_keeps_its_profile(method):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8))
    picture.info["icc_profile"] = b"profile"
    picture.getexif()[0x0112] = 6
    restored = Restorer(method, device="cpu")(picture)
    assert restored.size == (4, 6)
    assert restored.info["icc_profile"] == b"profile"
    expected = Restorer(method, device="cpu")(np.asarray(ImageOps.exif_transpose(picture)))
    np.testing.assert_array_equal(np.asarray(restored), expected)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (Image.new("I;16", (4, 4)), "I;16"),
        (Image.new("F", (4, 4)), "mode F"),
        (np.full((4, 4, 3), 255.0, np.float32), "255"),
        (np.linspace(-1, 1, 48, dtype=np.float32).reshape(4, 4, 3), "-1"),
        (torch.full((3, 4, 4), 2.0, dtype=torch.float16), "2"),
        (np.full((4, 4, 3), np.nan, np.float32), "NaN"),
        (np.full((4, 4, 3), np.inf, np.float32), "inf"),
        (np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (torch.zeros(4, 4, 3), r"\(4, 4, 3\)"),
        ("photo.jpg", "str"),
    ],
)
def test_what_is_no_image_is_refused(method, image, found):
    with pytest.raises(DerainError, match=found):
        Restorer(method, device="cpu")(image)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_restored_values_that_are_not_finite_are_refused(method, monkeypatch, value, dtype):
    monkeypatch.setattr(method, "forward", lambda rainy: torch.where(rainy > 0.5, value, rainy))
    restorer = Restorer(method, device="cpu")
    good = np.zeros((4, 4, 3), dtype)
    bad = good.copy()
    bad[1, 2] = 255 if dtype == np.uint8 else 1
    assert not restorer(good).any()
    for images in (bad, [good, bad], torch.from_numpy(np.moveaxis(np.stack([good, bad]), -1, 1))):
        with pytest.raises(DerainError, match=r"scene\.png" + ("" if images is bad else " 1")):
            restorer(images, name="scene.png")
    with pytest.raises(DerainError, match=r"scene\.png"):
        restorer.explain(bad.astype(np.float32) / bad.max(), "scene.png")
