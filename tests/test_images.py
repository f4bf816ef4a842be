import re
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import EpsImagePlugin, Image

from derain.errors import DerainError
from derain.images import Photo, image_size, read_photo, read_rgb, to_bytes, write_image, write_whole
from derain.listing import image_files

ORIENTATION = 0x0112
RNG = np.random.default_rng(0)
PROFILE = bytes(16) + b"RGB " + bytes(100)


def noise(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff"])
def test_lossless_formats_round_trip(tmp_path, suffix):
    pixels = noise(5, 7, 3)
    write_image(tmp_path / f"a{suffix}", pixels)
    assert (read_rgb(tmp_path / f"a{suffix}") == pixels).all()


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".JPG"])
def test_lossy_formats_keep_size_and_colours(tmp_path, suffix):
    pixels = np.full((20, 30, 3), (200, 100, 50), np.uint8)
    write_image(tmp_path / f"a{suffix}", pixels)
    assert np.abs(read_rgb(tmp_path / f"a{suffix}").astype(int) - pixels).max() <= 6


def test_grey_is_repeated_and_written_as_grey(tmp_path):
    grey = noise(4, 6)
    Image.fromarray(grey).save(tmp_path / "g.png")
    photo = read_photo(tmp_path / "g.png")
    assert photo.grey
    assert (read_rgb(tmp_path / "g.png") == grey[..., None]).all()
    photo.write(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "L"
        assert (np.asarray(image) == grey).all()


def test_alpha_is_kept(tmp_path):
    rgba = noise(4, 6, 4)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    photo = read_photo(tmp_path / "a.png")
    photo.write(tmp_path / "out.png", photo.rgb)
    with Image.open(tmp_path / "out.png") as image:
        assert (np.asarray(image) == rgba).all()
    photo.write(tmp_path / "out.jpg")  # a format without alpha gets the colours
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.mode == "RGB"


def test_grey_with_alpha(tmp_path):
    la = noise(4, 6, 2)
    Image.fromarray(la, "LA").save(tmp_path / "a.png")
    read_photo(tmp_path / "a.png").write(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "LA"
        assert (np.asarray(image) == la).all()


def test_palette_and_transparent_palette(tmp_path):
    image = Image.fromarray(noise(8, 8, 3)).quantize(16)
    image.save(tmp_path / "p.png")
    assert (read_rgb(tmp_path / "p.png") == np.asarray(image.convert("RGB"))).all()
    image.save(tmp_path / "t.png", transparency=3)
    assert read_photo(tmp_path / "t.png").alpha is not None


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_round_trips(tmp_path, suffix, channels):
    deep = noise(5, 7, channels, dtype=np.uint16)
    cv2.imwrite(str(tmp_path / f"d{suffix}"), deep)
    photo = read_photo(tmp_path / f"d{suffix}")
    assert photo.bits == 16
    assert photo.grey == (channels == 1)
    expected = deep[..., 2::-1] if channels >= 3 else np.repeat(deep, 3, 2)
    np.testing.assert_allclose(photo.rgb, expected / 65535, atol=1e-6)
    photo.write(tmp_path / f"out{suffix}")
    again = cv2.imread(str(tmp_path / f"out{suffix}"), cv2.IMREAD_UNCHANGED)
    assert (np.atleast_3d(again) == deep).all()


def test_a_transparent_grey_level_of_a_16_bit_png_becomes_alpha(tmp_path):
    levels = np.array([[100, 300, 0], [65535, 300, 301]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=300)
    photo = read_photo(tmp_path / "a.png")
    assert photo.alpha is not None
    assert photo.alpha.tolist() == [[1, 0, 1], [1, 0, 1]]
    np.testing.assert_allclose(photo.rgb[..., 0], levels / 65535, atol=1e-6)


def test_rotation_by_exif_is_applied_once(tmp_path):
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a quarter turn clockwise
    Image.fromarray(pixels).save(tmp_path / "r.png", exif=exif)
    assert (read_rgb(tmp_path / "r.png") == np.rot90(pixels, -1)).all()
    assert image_size(tmp_path / "r.png") == (6, 4)
    read_photo(tmp_path / "r.png").write(tmp_path / "out.png")
    assert (read_rgb(tmp_path / "out.png") == np.rot90(pixels, -1)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_photos_are_rotated_like_8_bit_photos(tmp_path, orientation):
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "shallow.png", exif=exif)
    cv2.imwrite(str(tmp_path / "d.png"), pixels[..., ::-1].astype(np.uint16) * 257)
    data, chunk = (tmp_path / "d.png").read_bytes(), exif.tobytes().removeprefix(b"Exif\0\0")
    (tmp_path / "deep.png").write_bytes(data[:33] + png_chunk(b"eXIf", chunk) + data[33:])
    assert (read_rgb(tmp_path / "deep.png") == read_rgb(tmp_path / "shallow.png")).all()
    assert image_size(tmp_path / "deep.png") == read_rgb(tmp_path / "deep.png").shape[:2]


def test_profile_and_exif_are_copied(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "a rainy day"
    Image.fromarray(noise(4, 6, 3)).save(tmp_path / "a.jpg", exif=exif, icc_profile=PROFILE)
    read_photo(tmp_path / "a.jpg").write(tmp_path / "b.jpg")
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.info["icc_profile"] == PROFILE
        assert image.getexif()[0x010E] == "a rainy day"


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("length", [200, 201])
def test_16_bit_photos_keep_their_profile(tmp_path, suffix, channels, length):
    profile = bytes(16) + (b"GRAY" if channels == 1 else b"RGB ") + RNG.bytes(length)
    deep = noise(5, 7, channels, dtype=np.uint16)
    cv2.imwrite(str(tmp_path / f"plain{suffix}"), deep)
    photo = read_photo(tmp_path / f"plain{suffix}")
    replace(photo, info={"icc_profile": profile}).write(tmp_path / f"a{suffix}")
    read_photo(tmp_path / f"a{suffix}").write(tmp_path / f"b{suffix}")
    with Image.open(tmp_path / f"b{suffix}") as image:
        image.load()
        assert image.info["icc_profile"] == profile
    assert (np.atleast_3d(cv2.imread(str(tmp_path / f"b{suffix}"), cv2.IMREAD_UNCHANGED)) == deep).all()


def test_16_bit_photos_too_wide_for_png_can_be_written_as_tiff(tmp_path):
    photo = Photo(np.zeros((1, 1_000_001, 3), np.float32), bits=16)
    with pytest.raises(DerainError, match=r"1000001.*\.tif"):
        photo.write(tmp_path / "a.png")
    photo.write(tmp_path / "a.tif")
    assert image_size(tmp_path / "a.tif") == (1, 1_000_001)


def test_a_grey_profile_is_not_written_to_a_colour_image(tmp_path, caplog):
    grey = bytes(16) + b"GRAY" + bytes(200)
    values = np.full((4, 6), 0.3, np.float32)
    photo = Photo(np.repeat(values[..., None], 3, 2), values, True, 16, {"icc_profile": grey})
    photo.write(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert "icc_profile" not in image.info
    assert len(caplog.messages) == 1
    assert "a.png" in caplog.messages[0]


def test_one_pixel(tmp_path):
    write_image(tmp_path / "a.png", noise(1, 1, 3))
    assert read_rgb(tmp_path / "a.png").shape == (1, 1, 3)


def test_errors_name_the_file(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    write_image(tmp_path / "complete.png", noise(60, 60, 3))
    data = (tmp_path / "complete.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(data[: len(data) // 2])
    for name in ("text.png", "truncated.png", "missing.png"):
        with pytest.raises(DerainError, match=name):
            read_rgb(tmp_path / name)
    with pytest.raises(DerainError, match=r"text\.png"):
        image_size(tmp_path / "text.png")
    with pytest.raises(DerainError, match=r"out\.xyz"):
        read_photo(tmp_path / "complete.png").write(tmp_path / "out.xyz")


def test_files_are_listed_in_natural_order_without_hidden_ones(tmp_path):
    for name in ("10.png", "2.JPG", "b/1.png", ".hidden.png", ".dir/3.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in image_files(tmp_path)] == ["2.JPG", "10.png"]
    recursive = [p.relative_to(tmp_path) for p in image_files(tmp_path, recursive=True)]
    assert recursive == [Path("2.JPG"), Path("10.png"), Path("b/1.png")]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write():
        with write_whole(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def png_header(width, height):
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", body) + png_chunk(b"IDAT", zlib.compress(b""))


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_exif(path, data):
    """Add raw EXIF to a JPEG file."""
    jpeg = path.read_bytes()
    segment = b"Exif\0\0" + data
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        b"qoif" + struct.pack(">IIBB", 2, 2, 3, 0) + bytes(16) + b"\0" * 7 + b"\1",
        b"icns" + struct.pack(">I", 24) + b"ic07" + struct.pack(">I", 16) + bytes(8),
        b"P6 2 2 255\n" + bytes(12),
        b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + bytes(6) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
    ],
    ids=["PostScript", "QOI", "ICNS", "PPM", "GIF"],
)
def test_formats_other_than_the_supported_ones_are_refused(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("Ghostscript was run"))
    (tmp_path / name).write_bytes(content)
    for read in (read_rgb, read_photo, image_size):
        with pytest.raises(DerainError, match=re.escape(name)):
            read(tmp_path / name)


def test_avif_is_read_and_written(tmp_path):
    colours = np.full((20, 30, 3), (200, 100, 50), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colours).save(tmp_path / "a.avif", exif=exif)
    assert image_size(tmp_path / "a.avif") == (30, 20)
    read_photo(tmp_path / "a.avif").write(tmp_path / "b.avif")
    assert np.abs(read_rgb(tmp_path / "b.avif").astype(int) - colours.transpose(1, 0, 2)).max() <= 6
    assert image_files(tmp_path) == [tmp_path / "a.avif", tmp_path / "b.avif"]


SHORT, TEXT, UNKNOWN = 3, 2, 7


def orientation_exif(kind, *values):
    """Return EXIF with one tag, an orientation of any type."""
    data = bytes(values) if kind != SHORT else struct.pack(f"<{len(values)}H", *values)
    return b"II*\0" + struct.pack("<IHHHI", 8, 1, ORIENTATION, kind, len(values)) + data.ljust(4, b"\0") + bytes(4)


ORIENTATION_TAGS = [
    *((SHORT, value) for value in (*range(10), 65535)),
    (SHORT, 6, 6),
    (TEXT, *b"6\0"),
    (TEXT, *b"six"),
    (UNKNOWN, 6),
    (UNKNOWN, 6, 6),
]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("tag", ORIENTATION_TAGS)
def test_size_and_pixels_agree_on_the_orientation(tmp_path, suffix, tag):
    path = tmp_path / f"a{suffix}"
    pixels = np.full((4, 8, 3), 128, np.uint8)
    if suffix == ".tif":
        kind, *values = tag
        value = values[0] if len(values) == 1 else values
        if kind != SHORT:
            value = bytes(values)
        tifffile.imwrite(path, pixels, photometric="rgb", extratags=[(ORIENTATION, kind, len(values), value, True)])
    else:
        Image.fromarray(pixels).save(path, exif=b"Exif\0\0" + orientation_exif(*tag))
    assert image_size(path) == read_rgb(path).shape[:2] == read_photo(path).rgb.shape[:2]
    rotated = tag[0] == SHORT and tag[1] in {5, 6, 7, 8}  # the first of two numbers counts
    assert image_size(path) == ((8, 4) if rotated else (4, 8))


@pytest.mark.parametrize(("tag", "value"), [((SHORT, 0), "0"), ((SHORT, 9), "9"), ((TEXT, *b"6\0"), "6")])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_warning_names_an_invalid_orientation(tmp_path, caplog, suffix, tag, value):
    path = tmp_path / f"a{suffix}"
    write_image(path, noise(4, 8, 3), exif=b"Exif\0\0" + orientation_exif(*tag))
    assert read_photo(path).rgb.shape == (4, 8, 3)
    assert str(path) in caplog.text
    assert repr(value) in caplog.text


@pytest.mark.parametrize("data", [b"", b"nonsense", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + bytes(30)])
def test_images_with_damaged_exif_can_be_read(tmp_path, data):
    write_image(tmp_path / "a.jpg", np.full((4, 8, 3), 99, np.uint8))
    with_exif(tmp_path / "a.jpg", data)
    assert image_size(tmp_path / "a.jpg") == (4, 8)
    photo = read_photo(tmp_path / "a.jpg")
    for suffix in (".jpg", ".png", ".webp", ".tif", ".bmp", ".avif"):
        photo.write(tmp_path / f"b{suffix}")
        assert np.abs(read_rgb(tmp_path / f"b{suffix}").astype(int) - 99).max() <= 3


def test_exif_that_is_too_long_for_jpeg_is_dropped_with_a_warning(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x010E] = "x" * 70_000
    Image.fromarray(noise(4, 6, 3)).save(tmp_path / "a.png", exif=exif)
    photo = read_photo(tmp_path / "a.png")
    photo.write(tmp_path / "b.jpg")
    assert read_rgb(tmp_path / "b.jpg").shape == (4, 6, 3)
    assert str(tmp_path / "b.jpg") in caplog.text
    assert "65533" in caplog.text
    photo.write(tmp_path / "b.png")  # its EXIF may be longer
    with Image.open(tmp_path / "b.png") as image:
        assert len(image.getexif()[0x010E]) == 70_000


@pytest.mark.parametrize("channels", [1, 3])
def test_floating_point_files(tmp_path, caplog, channels):
    values = RNG.random((5, 7, channels)).astype(np.float32)
    values[0, 0], values[0, 1] = 0, 1
    for name, scale in (("unit.tif", 1), ("bytes.tif", 255)):
        cv2.imwrite(str(tmp_path / name), values * scale)
    photo = read_photo(tmp_path / "unit.tif")
    np.testing.assert_allclose(photo.rgb, np.repeat(values, 3, 2) if channels == 1 else values[..., ::-1], atol=1e-6)
    for read in (read_photo, read_rgb):
        with pytest.raises(DerainError, match=r"bytes\.tif.*0 to 255"):
            read(tmp_path / "bytes.tif")
    np.testing.assert_allclose(read_photo(tmp_path / "bytes.tif", white=255).rgb, photo.rgb, atol=1e-6)
    assert image_size(tmp_path / "bytes.tif") == (5, 7)
    cv2.imwrite(str(tmp_path / "bright.tif"), values * 400)
    with pytest.raises(DerainError, match="0 to 400"):  # its white is not 255
        read_photo(tmp_path / "bright.tif", white=255)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1, 2])
def test_floating_point_files_out_of_range_are_refused(tmp_path, value):
    values = np.full((5, 7, 3), 0.5, np.float32)
    values[2, 3, 1] = value
    cv2.imwrite(str(tmp_path / "a.tif"), values)
    for read in (read_photo, read_rgb):
        with pytest.raises(DerainError, match=rf"(?i)a\.tif: .*{value:g}"):
            read(tmp_path / "a.tif")


def test_a_slight_overshoot_is_clipped_with_a_warning(tmp_path, caplog):
    cv2.imwrite(str(tmp_path / "a.tif"), np.full((5, 7, 3), 1.1, np.float32))
    assert (read_rgb(tmp_path / "a.tif") == 255).all()
    assert "1.1" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "shape", "options"),
    [
        ("uint32", (5, 7), {}),
        ("int16", (5, 7), {}),
        ("int32", (5, 7), {}),
        ("float16", (5, 7), {}),
        ("complex64", (5, 7), {}),
        ("uint16", (5, 7, 4), {"photometric": "separated"}),
        ("uint16", (5, 7, 3), {"photometric": "cielab"}),
        ("uint16", (3, 5, 7), {"photometric": "rgb", "planarconfig": "separate"}),
        ("uint16", (5, 7, 5), {"photometric": "rgb", "extrasamples": ["unspecified"] * 2}),
        ("uint16", (5, 7, 2), {"photometric": "minisblack", "planarconfig": "contig"}),
        ("uint16", (5, 7, 3), {"photometric": "rgb", "bigtiff": True, "byteorder": ">"}),
    ],
)
def test_deep_pixels_that_opencv_decodes_wrongly_are_refused(tmp_path, dtype, shape, options):
    tifffile.imwrite(tmp_path / "a.tif", np.ones(shape, dtype), **options)
    for read in (read_photo, read_rgb):
        with pytest.raises(DerainError, match=r"a\.tif: .*(-bit|BigTIFF)"):
            read(tmp_path / "a.tif")


def test_deep_tiffs_are_decoded_by_their_tags(tmp_path):
    grey = noise(5, 7, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "inverted.tif", grey, photometric="miniswhite")
    np.testing.assert_allclose(read_photo(tmp_path / "inverted.tif").rgb[..., 0], 1 - grey / 65535, atol=1e-6)
    premultiplied = np.zeros((5, 7, 4), np.uint16)
    premultiplied[...] = (6553, 13107, 0, 32768)
    tifffile.imwrite(tmp_path / "a.tif", premultiplied, photometric="rgb", extrasamples=["assocalpha"])
    photo = read_photo(tmp_path / "a.tif")
    np.testing.assert_allclose(photo.rgb[0, 0], (0.2, 0.4, 0), atol=1e-3)
    assert photo.alpha == pytest.approx(0.5, abs=1e-3)
    rgb = noise(32, 48, 3, dtype=np.uint16)
    for index, options in enumerate([{"bigtiff": True}, {"byteorder": ">"}, {"tile": (16, 16), "compression": "zlib"}]):
        tifffile.imwrite(tmp_path / f"{index}.tif", rgb, photometric="rgb", **options)
        np.testing.assert_allclose(read_photo(tmp_path / f"{index}.tif").rgb, rgb / 65535, atol=1e-6)


def test_names_that_are_not_utf8(tmp_path):
    code = """
import os, sys
from pathlib import Path
import cv2
from derain.images import image_size, read_photo, read_rgb
folder = os.fsencode(sys.argv[1])
for suffix in (b".png", b".tif"):
    path = Path(os.fsdecode(folder + b"/caf\\xe9" + suffix))
    os.rename(folder + b"/a" + suffix, os.fsencode(path))
    read_photo(path).write(path.with_stem(path.stem + "-out"))
    assert image_size(path) == read_rgb(path.with_stem(path.stem + "-out")).shape[:2] == (5, 7)
"""
    for suffix in (".png", ".tif"):
        cv2.imwrite(str(tmp_path / f"a{suffix}"), noise(5, 7, 3, dtype=np.uint16))
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("read", [read_rgb, read_photo, image_size])
def test_decompression_bombs_are_refused(tmp_path, read):
    (tmp_path / "a.png").write_bytes(png_header(40_000, 40_000))
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4), np.uint16))
    tiff = (tmp_path / "a.tif").read_bytes()
    wide = struct.pack("<HHII", 256, 4, 1, 4), struct.pack("<HHII", 256, 4, 1, 100_000_000)
    assert wide[0] in tiff
    (tmp_path / "a.tif").write_bytes(tiff.replace(*wide))
    for name in ("a.png", "a.tif"):
        with pytest.raises(DerainError, match=rf"{name}.*178 megapixels"):
            read(tmp_path / name)


def test_lab_has_no_alpha(tmp_path):
    lab = np.zeros((4, 6, 3), np.uint8)
    lab[..., 0] = 128
    Image.fromarray(lab, "LAB").save(tmp_path / "a.tif")
    photo = read_photo(tmp_path / "a.tif")
    assert photo.alpha is None
    photo.write(tmp_path / "b.tif")
    with Image.open(tmp_path / "b.tif") as image:
        assert image.mode == "RGB"
        assert np.ptp(np.asarray(image)[0, 0].astype(int)) <= 1  # grey stays grey


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_images_with_nan_or_infinity_are_not_written(tmp_path, value, bits, suffix):
    rgb = np.full((4, 6, 3), 0.5, np.float32)
    invalid = rgb.copy()
    invalid[1, 2, 0] = value
    with pytest.raises(DerainError, match=f"b{suffix}"):
        Photo(rgb, bits=bits).write(tmp_path / f"b{suffix}", invalid)
    with pytest.raises(DerainError, match="scene_3"):
        to_bytes(invalid, "scene_3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "size"), [("a.webp", (1, 20_000)), ("a.jpg", (1, 70_000))])
def test_sizes_that_a_format_does_not_support_are_refused(tmp_path, name, size):
    with pytest.raises(DerainError, match=rf"{name}.*{size[1]}x1 "):
        write_image(tmp_path / name, np.zeros((*size, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_names_of_the_greatest_length(tmp_path):
    path = tmp_path / ("ü" * 125 + ".png")
    write_image(path, noise(4, 6, 3))
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_are_rounded_to_the_nearest():
    values = np.array([0.0, 0.4, 0.6, 99.49, 99.51, 254.6, 300.0, -5.0]).reshape(1, 8, 1).repeat(3, axis=2) / 255
    assert to_bytes(values.astype(np.float32))[0, :, 0].tolist() == [0, 0, 1, 99, 100, 255, 255, 0]
