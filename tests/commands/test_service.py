import shutil
import struct
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from derain.commands.service import RestorationService, _archive_names, add_rain_to, load_restorers
from derain.errors import DerainError
from derain.images import read_photo, read_rgb, write_image
from derain.methods import CLIPRPNModule, PReNetModule, catalog
from tests.factories import clean_image, located

MODEL = "w · PReNet"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    PReNetModule(stages=1).save_weights(path)
    return str(path)


@pytest.fixture
def service(file, tmp_path):
    return RestorationService(load_restorers([file], "cpu"), tmp_path / "results", max_megapixels=0.01)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "rainy.png"
    write_image(path, clean_image(1, (20, 30)))
    return path


def test_download_is_restored_at_full_size(service, file, tmp_path, monkeypatch):
    monkeypatch.setattr("derain.commands.service.PREVIEW_SIDE", 15)
    sideways = tmp_path / "from a phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(sideways, clean_image(1, (20, 30)), exif=exif)
    restored = service.restore(sideways, "C:/photos/from a phone.jpg", MODEL)
    rgb = torch.from_numpy(read_photo(sideways).rgb).permute(2, 0, 1)[None]
    assert rgb.shape == (1, 3, 30, 20)
    with torch.no_grad():
        expected = catalog.load(Path(file)).module(rgb).clamp(0, 1)[0].permute(1, 2, 0).mul(255).round().numpy()
    assert np.abs(read_rgb(restored.download) - expected).max() <= 1
    assert restored.download.name == "from-a-phone-derained.png"
    assert read_rgb(restored.before).shape == read_rgb(restored.after).shape == (15, 10, 3)
    assert restored.facts["size"] == "20 × 30 pixels"


def test_download_keeps_16_bits_and_transparency(service, tmp_path):
    path = tmp_path / "deep.png"
    alpha = np.linspace(0, 1, 20 * 30, dtype=np.float32).reshape(20, 30)
    photo = read_photo(_png(path, 30, 20))
    type(photo)(photo.rgb, alpha, bits=16).write(path)
    download = read_photo(service.restore(path, "deep.png", MODEL).download)
    assert download.bits == 16
    np.testing.assert_allclose(download.alpha, alpha, atol=1e-4)


def test_one_pixel(service, tmp_path):
    path = _png(tmp_path / "pixel.png", 1, 1)
    assert read_rgb(service.restore(path, "pixel.png", MODEL).download).shape == (1, 1, 3)


def test_maps_and_facts_of_a_method_with_routes(tmp_path, photo):
    pytest.importorskip("gradio")
    from derain.commands.page import _facts_list

    torch.manual_seed(0)
    small = CLIPRPNModule(dim=8, blocks=(1, 1, 1, 1), refinement=1, perception="none")
    small.save_weights(tmp_path / "rpn.safetensors")
    restorers = load_restorers([str(tmp_path / "rpn.safetensors")], "cpu")
    restored = RestorationService(restorers, tmp_path / "results").restore(photo, "rainy.png", "rpn · CLIPRPN")
    assert list(restored.maps) == ["removed rain", "mask at 1/2", "mask at 1/4", "mask at 1/8"]
    assert all(picture.shape == (20, 30, 3) for picture in restored.maps.values())
    assert restored.facts["route"] == 0
    page = _facts_list({"route": 1, "scores": {"<b>heavy</b> rain": 0.75}})
    assert "<dd>1</dd>" in page
    assert "&lt;b&gt;heavy&lt;/b&gt; rain</span><meter min='0' max='1' value='0.7500'>" in page


def test_synthetic_rain_depends_on_amount_and_seed(service, photo):
    rgb = read_photo(photo).rgb
    np.testing.assert_array_equal(add_rain_to(rgb, 50.0, 3), add_rain_to(rgb, 50.0, 3))
    assert not np.array_equal(add_rain_to(rgb, 50.0, 3), add_rain_to(rgb, 50.0, 4))
    large = read_photo(_png(photo.with_name("large.png"), 96, 96)).rgb
    added = [float(np.square(add_rain_to(large, amount, 0) - large).mean()) for amount in (10.0, 33.0, 67.0, 100.0)]
    assert added == sorted(added)
    assert added[0] > 0
    dry, wet = (service.restore(photo, "rainy.png", MODEL, amount) for amount in (0.0, 100.0))
    np.testing.assert_allclose(read_rgb(dry.before), read_rgb(photo), atol=20)  # a JPEG of small, hard edges
    assert np.abs(read_rgb(wet.before).astype(int) - read_rgb(photo)).mean() > 10
    assert "synthetic rain" not in dry.facts
    assert wet.facts["synthetic rain"] == "100 %, seed 0"


@pytest.mark.parametrize("keep", [False, True])
def test_metadata_is_removed_by_default(file, tmp_path, keep):
    service = RestorationService(load_restorers([file], "cpu"), tmp_path / "results", keep_metadata=keep)
    restored = service.restore(located(tmp_path / "located.jpg"), "located.jpg", MODEL)
    assert read_photo(restored.download).has_location is keep
    for shown in (restored.before, restored.after):
        assert not read_photo(shown).has_location


def test_abandoned_restoration_stops_before_the_next_layer(service, photo):
    calls = []
    with pytest.raises(DerainError, match=r"rainy\.png"):
        service.restore(photo, "rainy.png", MODEL, abandoned=lambda: len(calls.append(0) or calls) > 3)
    assert len(calls) == 4
    assert not service.folder.exists()
    assert service.restore(photo, "rainy.png", MODEL).download.is_file()


def _png(path, width, height):
    write_image(path, clean_image(1, (height, width)))
    return path


def _jpeg(path):
    Image.fromarray(clean_image(2, (24, 32))).save(path)
    return path


def _head_of_png(path, width, height):
    """The head of a PNG of any size, without pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


@pytest.mark.parametrize(
    ("damage", "value"),
    [
        (lambda p: p.write_bytes(b""), "0 bytes"),
        (lambda p: p.write_bytes(b"%PDF-1.7\n" * 99), "a b.png: "),
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "a b.png: "),
        (lambda p: p.unlink(), "30 minutes"),
        (lambda p: _png(p, 200, 100), "0.02 megapixels (200 × 100)"),
        (lambda p: _head_of_png(p, 12_000, 9_000), "`derain restore 'a b.png' derained.png`"),
        (lambda p: _head_of_png(p, 40_000, 40_000), "178 megapixels"),
    ],
)
def test_bad_files_are_refused_by_their_name(service, photo, damage, value):
    damage(photo)
    with pytest.raises(DerainError) as error:
        service.restore(photo, "a b.png", MODEL)
    assert value in str(error.value)
    assert str(photo.parent) not in str(error.value)
    assert not service.folder.exists()


def test_several_photos_equal_single_ones_and_a_damaged_one_is_reported(service, tmp_path):
    paths = [_png(tmp_path / str(index) / "a.png", 30 + index, 20) for index in range(3)]
    paths.append(_jpeg(tmp_path / "b.JPG"))
    paths.append(tmp_path / "damaged.png")
    paths[-1].write_bytes(paths[0].read_bytes()[:200])
    paths.append(tmp_path / "absent.png")
    uploads = {path: path.name for path in paths}
    changed = [paths[0].stat().st_ctime_ns]
    done = []

    def progress(count):
        done.append(count)
        changed.append(paths[0].stat().st_ctime_ns)  # files of a running batch must not become old

    restored = service.restore_all(uploads, MODEL, 30.0, 5, strength=0.5, progress=progress)
    assert done == list(range(1, 7))
    assert changed == sorted(set(changed))
    assert [name for name, *_ in restored.pairs] == ["a.png", "a.png", "a.png", "b.JPG"]
    assert [message.split(":")[0].split()[0] for message in restored.errors] == ["damaged.png", "absent.png"]
    assert str(tmp_path) not in "".join(restored.errors)
    assert restored.facts["photos"] == 4
    assert restored.facts["strength"] == "0.5"
    with zipfile.ZipFile(restored.download) as archive:
        assert archive.namelist() == ["a.png", "a-2.png", "a-3.png", "b.JPG"]
        archive.extractall(tmp_path / "archive")
    for path, name, (_, before, after) in zip(paths, archive.namelist(), restored.pairs, strict=False):
        single = service.restore(path, path.name, MODEL, 30.0, 5, strength=0.5)
        tolerance = 1 if path.suffix == ".png" else 40  # a JPEG of small, hard edges
        np.testing.assert_allclose(read_rgb(tmp_path / "archive" / name), read_rgb(single.download), atol=tolerance)
        np.testing.assert_array_equal(read_rgb(before), read_rgb(single.before))
        np.testing.assert_allclose(read_rgb(after), read_rgb(single.after), atol=2)


def test_several_photos_that_all_fail(service, tmp_path):
    restored = service.restore_all({tmp_path / "a.png": "a.png", tmp_path / "b.png": "b.png"}, MODEL)
    assert (restored.pairs, restored.download, len(restored.errors)) == ([], None, 2)


def test_errors_of_several_photos_name_each_once(service, tmp_path):
    paths = [_png(tmp_path / "big.png", 200, 100), tmp_path / "text.png"]
    paths[1].write_bytes(b"text" * 99)
    errors = service.restore_all({path: path.name for path in paths}, MODEL).errors
    assert [error.count(path.name) for error, path in zip(errors, paths, strict=True)] == [2, 1]  # 2: the command line
    assert [error.startswith(path.name) for error, path in zip(errors, paths, strict=True)] == [True, True]


def test_names_in_an_archive_are_valid_on_linux_and_windows(tmp_path):
    clients = ["a" * 300 + ".jpg", "A" * 300 + ".jpg", "\U0001d49c" * 70_000 + ".png", "x." + "y" * 300]
    clients += ["CON.jpg", "com1.tar.png", "nul", "Aux .png", "console.jpg"]
    names = list(map(str, _archive_names({Path(str(index)): name for index, name in enumerate(clients)}).values()))
    assert max(len(name.encode()) for name in names) <= 255
    assert len({name.lower() for name in names}) == len(clients)
    assert names[4:] == ["-CON.jpg", "-com1.tar.png", "-nul.png", "-Aux .png", "console.jpg"]
    for name in names:
        (tmp_path / name).touch()


def test_too_many_photos_are_refused(service, photo, monkeypatch):
    monkeypatch.setattr("derain.commands.service.MAX_PHOTOS", 1)
    with pytest.raises(DerainError, match="2 photos"):
        service.restore_all({photo: "a.png", photo.with_name("b.png"): "b.png"}, MODEL)


def test_abandoned_and_closed_batches_stop(service, photo, tmp_path):
    uploads = {_png(tmp_path / f"{index}.png", 30, 20): f"{index}.png" for index in range(4)}
    calls, done = [], []
    with pytest.raises(DerainError):
        service.restore_all(uploads, MODEL, abandoned=lambda: len(calls.append(0) or calls) > 3, progress=done.append)
    assert len(calls) < 10
    with pytest.raises(DerainError, match="closed"):
        service.restore_all(uploads, MODEL, progress=lambda count: (done.append(count), service._closed.set()))
    assert done == [1]


def test_an_unknown_model_is_refused(service, photo):
    with pytest.raises(DerainError, match=r"'x'.*w · PReNet"):
        service.restore(photo, "rainy.png", "x")


def test_photos_are_restored_one_after_the_other(service, photo, monkeypatch):
    restorer = service.restorers[MODEL]
    running, most = 0, 0
    explain = restorer.explain

    def watched(*arguments):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return explain(*arguments)

    monkeypatch.setattr(restorer, "explain", watched)
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: service.restore(photo, "rainy.png", MODEL), range(4)))
    assert most == 1
    assert len({restored.download for restored in results}) == 4


def test_closing_stops_a_restoration_before_the_next_layer(service, photo):
    with ThreadPoolExecutor(2) as threads:
        layer = next(part for part in service.restorers[MODEL].method.modules() if isinstance(part, torch.nn.Conv2d))
        closing = []
        layer.register_forward_hook(lambda *_: closing.append(threads.submit(service.close)) or time.sleep(0.2))
        running = threads.submit(service.restore, photo, "rainy.png", MODEL)
        with pytest.raises(DerainError, match="closed"):
            running.result()
        closing[0].result()
    with pytest.raises(DerainError, match="closed"):
        service.restore(photo, "rainy.png", MODEL)
    assert not service.folder.exists()


def test_labels_of_weights_with_the_same_name(file, tmp_path):
    copy = tmp_path / "w.safetensors"
    shutil.copy(file, copy)
    assert list(load_restorers([file, file], "cpu")) == [MODEL]
    assert list(load_restorers([file, str(copy)], "cpu")) == [f"{file} · PReNet", f"{copy} · PReNet"]


def test_scale_and_strength_are_those_of_one_photo(service, photo):
    plain, reduced, blended = (
        service.restore(photo, "rainy.png", MODEL, scale=scale, strength=strength)
        for scale, strength in (("full", 1.0), ("2", 1.0), ("auto", 0.0))
    )
    assert "scale" not in plain.facts
    assert reduced.facts["scale"] == 2
    assert (blended.facts["scale"], blended.facts["strength"]) == (1, "0")
    assert (read_rgb(reduced.download) != read_rgb(plain.download)).any()
    np.testing.assert_array_equal(read_rgb(blended.download), read_rgb(photo))
    again = service.restore(photo, "rainy.png", MODEL)
    np.testing.assert_array_equal(read_rgb(again.download), read_rgb(plain.download))
    with pytest.raises(DerainError, match="half"):
        service.restore(photo, "rainy.png", MODEL, scale="half")
