"""Image files of all kinds with reproducible damage.

To check more files than the tests do::

    python -m tests.mutated_images 1000 --seed 7
"""

import argparse
import io
import resource
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import tifffile
from PIL import Image

from derain.errors import DerainError
from derain.image_metadata import has_location
from derain.images import Photo, image_size, read_photo, read_rgb

Rng = np.random.Generator
Files = dict[str, bytes]

WRONG_CONTENT = {
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run showpage\n%%EOF\n",
    "ICNS": b"icns" + struct.pack(">I", 40) + b"ic07" + struct.pack(">I", 16) + bytes(24),
    "QOI": b"qoif" + struct.pack(">IIBB", 9, 9, 3, 0) + b"\xfe\1\2\3\xfd" * 20 + bytes(7) + b"\1",
    "GIF": b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + bytes(6) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
    "PPM": b"P6 2 2 255\n" + bytes(12),
    "text": b"no image",
    "empty": b"",
}
"""Contents that are not images, or images of a format that derain does not read."""


def undamaged_files(rng: Rng) -> Files:
    """Return small undamaged files of all kinds by name."""
    rgb = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (40, 30))
    rgba = np.dstack([rgb, rgb[..., 0]])
    exif = camera_exif()
    profile = bytes(16) + b"RGB " + bytes(108)
    files = {}
    for name, pixels, options in [
        ("a.jpg", rgb, {"exif": exif, "icc_profile": profile, "quality": 90}),
        ("progressive.jpg", rgb, {"progressive": True}),
        ("grey.jpg", rgb[..., 0], {}),
        ("a.png", rgb, {"exif": exif, "icc_profile": profile}),
        ("alpha.png", rgba, {}),
        ("grey.png", rgb[..., 0], {"transparency": 3}),
        ("a.webp", rgb, {"exif": exif, "quality": 80}),
        ("lossless.webp", rgba, {"lossless": True}),
        ("a.bmp", rgb, {}),
        ("a.avif", rgb, {"exif": exif, "speed": 10}),
        ("alpha.avif", rgba, {"speed": 10}),
        ("lzw.tif", rgb, {"compression": "tiff_lzw"}),
        ("jpeg.tif", rgb, {"compression": "jpeg"}),
        ("bits.tif", rgb[..., 0] > 99, {"compression": "group4"}),
    ]:
        files[name] = saved(name, Image.fromarray(pixels), **options)
    palette = Image.fromarray(rgb).quantize(16)
    files |= {"palette.png": saved("a.png", palette), "palette.tif": saved("a.tif", palette)}
    files["cmyk.jpg"] = saved("a.jpg", Image.fromarray(rgb).convert("CMYK"))
    files["lab.tif"] = saved("a.tif", Image.fromarray(rgb, "LAB"))
    deep = rgb.astype(np.uint16) * 257
    for suffix in (".png", ".tif"):
        for name, pixels in (
            ("deep", deep),
            ("deep-grey", deep[..., 0]),
            ("deep-alpha", np.dstack([deep, deep[..., 0]])),
        ):
            files[name + suffix] = cv2.imencode(suffix, pixels)[1].tobytes()
    unit = (rgb / 255).astype(np.float32)
    for name, pixels, options in [
        ("float.tif", unit, {"photometric": "rgb"}),
        ("float-grey.tif", unit[..., 0], {"photometric": "minisblack", "compression": "zlib"}),
        ("double.tif", unit.astype(np.float64), {"photometric": "rgb"}),
        ("big.tif", deep, {"photometric": "rgb", "bigtiff": True}),
        ("big-endian.tif", deep, {"photometric": "rgb", "byteorder": ">"}),
        ("tiles.tif", deep, {"photometric": "rgb", "tile": (16, 16), "compression": "zlib", "predictor": True}),
        ("inverted.tif", deep[..., 0], {"photometric": "miniswhite", "rowsperstrip": 4}),
        ("planes.tif", rgb.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
        ("shallow-tiles.tif", rgb, {"photometric": "rgb", "tile": (16, 16), "compression": "zlib"}),
    ]:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, pixels, **options)
        files[name] = buffer.getvalue()
    return files


def camera_exif() -> bytes:
    """Return EXIF with the tags of a camera: text, rationals, bytes, and directories of exposure and location."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x010F], exif[0x0110], exif[0x0132] = 6, "rain", "Maker", "Model", "2020:01:01"
    exif[0x011A], exif[0x011B], exif[0x8298] = 72.0, 72.0, "nobody"
    exif[0x8769] = {0x9003: "2020:01:01 00:00:00", 0x829A: 0.1, 0x8827: 100, 0x9286: b"ASCII\0\0\0wet", 0x920A: 35.0}
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0), 3: "E", 4: (4.0, 5.0, 6.0), 5: b"\0", 6: 7.5, 29: "2020:01:01"}
    return exif.tobytes()


def saved(name: str, image: Image.Image, **options: object) -> bytes:
    """Return an image in the format of the name's suffix."""
    buffer = io.BytesIO()
    image.save(buffer, format=Image.registered_extensions()[Path(name).suffix], **options)
    return buffer.getvalue()


# Mutations: each returns a damaged copy of a file's content.


def flip_bits(data: bytes, rng: Rng, files: Files) -> bytes:
    return flipped(data, rng, len(data))


def flip_bits_of_the_head(data: bytes, rng: Rng, files: Files) -> bytes:
    return flipped(data, rng, min(len(data), 200))


def flipped(data: bytes, rng: Rng, end: int) -> bytes:
    changed = bytearray(data)
    for position in rng.integers(0, end, rng.integers(1, 12)):
        changed[position] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def truncate(data: bytes, rng: Rng, files: Files) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def cut_out(data: bytes, rng: Rng, files: Files) -> bytes:
    start, end = sorted(int(position) for position in rng.integers(0, len(data), 2))
    return data[:start] + data[end:]


def overwrite(data: bytes, rng: Rng, files: Files) -> bytes:
    """Overwrite two, four or eight bytes with an extreme number."""
    size = int(rng.choice([2, 4, 8]))
    start = int(rng.integers(0, max(1, min(len(data) - size, 400))))
    values = [bytes(size), b"\xff" * size, b"\x7f" + b"\xff" * (size - 1), rng.bytes(size)]
    return data[:start] + values[int(rng.integers(4))] + data[start + size :]


def swap_headers(data: bytes, rng: Rng, files: Files) -> bytes:
    source = list(files.values())[int(rng.integers(len(files)))]
    length = int(rng.choice([4, 8, 16, 64]))
    return source[:length] + data[length:]


def edit_chunk(data: bytes, rng: Rng, files: Files) -> bytes:
    """Change a chunk of a PNG with a valid checksum, or a tag of a TIFF; flip bits of files in other formats."""
    if data.startswith(b"\x89PNG"):
        return edit_png(data, rng)
    if data[:2] in {b"II", b"MM"}:
        return edit_tiff(data, rng)
    return flip_bits_of_the_head(data, rng, files)


def edit_png(data: bytes, rng: Rng) -> bytes:
    chunks = []
    start = 8
    while start < len(data):
        (length,) = struct.unpack_from(">I", data, start)
        chunks.append((data[start + 4 : start + 8], data[start + 8 : start + 8 + length]))
        start += 12 + length
    index = int(rng.integers(len(chunks)))
    kind, body = chunks[index]
    action = int(rng.integers(4))
    if action == 0:
        del chunks[index]
    elif action == 1:
        chunks.insert(int(rng.integers(len(chunks))), (kind, body))
    elif action == 2 and body:
        chunks[index] = (kind, flipped(body, rng, len(body)))
    else:
        kinds = [b"tRNS", b"PLTE", b"eXIf", b"iCCP", b"acTL", b"zTXt", b"gAMA"]
        kind = kinds[int(rng.integers(7))]
        chunks.insert(1, (kind, rng.bytes(int(rng.integers(40)))))
    encoded = data[:8]
    for kind, body in chunks:
        encoded += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return encoded


def edit_tiff(data: bytes, rng: Rng) -> bytes:
    """Change number, type, count or value of a tag."""
    order = "<" if data[:2] == b"II" else ">"
    big = b"+" in data[:4]
    if big:
        (start,) = struct.unpack_from(order + "Q", data, 8)
        (count,) = struct.unpack_from(order + "Q", data, start)
        first_tag, tag_size, value_offset = start + 8, 20, 12
    else:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        first_tag, tag_size, value_offset = start + 2, 12, 8
    tag = first_tag + tag_size * int(rng.integers(count))
    fields = [(0, "H", 65535), (2, "H", 20), (4, "I", 100), (value_offset, "I", 70_000)]
    offset, form, maximum = fields[int(rng.integers(4))]
    changed = bytearray(data)
    struct.pack_into(order + form, changed, tag + offset, int(rng.integers(maximum + 1)))
    return bytes(changed)


def edit_exif(data: bytes, rng: Rng, files: Files) -> bytes:
    """Flip bits of EXIF, or add invalid EXIF to a JPEG."""
    start = max(data.find(b"II*\0", 4), data.find(b"MM\0*", 4))
    if start >= 0:
        exif = data[start : start + 120]
        return data[:start] + flipped(exif, rng, len(exif)) + data[start + 120 :]
    if data.startswith(b"\xff\xd8"):
        header = [b"II*\0", b"MM\0*", b""][int(rng.integers(3))]
        body = b"Exif\0\0" + header + rng.bytes(int(rng.integers(80)))
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    return flip_bits_of_the_head(data, rng, files)


def edit_exif_entry(data: bytes, rng: Rng, files: Files) -> bytes:
    """Change tag, type, count or value of EXIF entries; of ``a.jpg`` if the file has no EXIF."""
    start = data.find(b"MM\0*\0\0\0\x08", 4)  # as `camera_exif` begins
    if start < 0:
        return edit_exif_entry(files["a.jpg"], rng, files)
    changed = bytearray(data)
    (count,) = struct.unpack_from(">H", data, start + 8)
    entries = [start + 10 + 12 * index for index in range(count)]
    for entry in list(entries):
        tag, _, _, value = struct.unpack_from(">HHII", data, entry)
        if tag in {0x8769, 0x8825}:
            (count,) = struct.unpack_from(">H", data, start + value)
            entries += [start + value + 2 + 12 * index for index in range(count)]
    for _ in range(int(rng.integers(1, 4))):
        entry = entries[int(rng.integers(len(entries)))]
        fields = [(2, "H", 14), (2, "H", 14), (2, "H", 14), (0, "H", 65535), (4, "I", 20), (8, "I", 400)]
        offset, form, limit = fields[int(rng.integers(6))]
        struct.pack_into(f">{form}", changed, entry + offset, int(rng.integers(limit)))
    return bytes(fix_checksums(changed))


def fix_checksums(data: bytearray) -> bytearray:
    """Update the checksums of a PNG; files in other formats stay as they are."""
    start = 8
    while data.startswith(b"\x89PNG") and start < len(data):
        end = start + 8 + struct.unpack_from(">I", data, start)[0]
        struct.pack_into(">I", data, end, zlib.crc32(data[start + 4 : end]))
        start = end + 4
    return data


def wrong_content(data: bytes, rng: Rng, files: Files) -> bytes:
    contents = [*WRONG_CONTENT.values(), *files.values()]
    return contents[int(rng.integers(len(contents)))]


MUTATIONS: tuple[Callable[[bytes, Rng, Files], bytes], ...] = (
    edit_exif_entry,
    flip_bits,
    flip_bits_of_the_head,
    truncate,
    cut_out,
    overwrite,
    swap_headers,
    edit_chunk,
    edit_chunk,
    edit_exif,
    wrong_content,
)


def mutated_files(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of damaged files: first each kind of file with each mutation, then random pairs."""
    rng = np.random.default_rng(seed)
    files = undamaged_files(rng)
    for number in range(count):
        kind = list(files)[number % len(files)]
        index = number // len(files)
        mutate = MUTATIONS[index] if index < len(MUTATIONS) else rng.choice(MUTATIONS)
        yield f"{number:04d}-{mutate.__name__}-{kind}", mutate(files[kind], rng, files)


def check(path: Path) -> str:
    """Read a file with all functions, and write the photo in all formats.

    Returns:
        ``read``, or the message of the `DerainError`.

    Raises:
        AssertionError: If sizes differ, an image is invalid, or an error message does not name the file.
        Exception: Any exception but a `DerainError` is a bug.
    """
    results: list[object] = []
    for read in (image_size, read_rgb, read_photo):
        try:
            results.append(read(path))
        except DerainError as error:
            results.append(str(error))
    for result in results:
        if isinstance(result, str):
            assert str(path) in result
            assert "\n" not in result
    size, pixels, photo = results
    for image in (pixels, photo.rgb if isinstance(photo, Photo) else photo):
        if isinstance(image, np.ndarray):
            assert image.shape == (*size, 3), (image.shape, size)
            assert image.dtype == np.uint8 or 0 <= image.min() <= image.max() <= 1
    if not isinstance(photo, Photo):
        return str(photo)
    if photo.rgb.size < 1_000_000:
        check_written(photo, path)
    return "read"


def check_written(photo: Photo, path: Path) -> None:
    """Write a photo in every format, and read the files.

    Raises:
        AssertionError: If size or metadata differ.
    """
    with TemporaryDirectory(dir=path.parent) as folder:
        for suffix in (".jpg", ".png", ".webp", ".tif", ".bmp"):
            target = Path(folder, path.name).with_suffix(suffix)
            written = photo.write(target)
            copy = read_photo(target)
            assert copy.rgb.shape == photo.rgb.shape
            assert bool((copy.info or {}).get("exif")) == ("exif" in written), (suffix, written)
            assert copy.has_location == has_location(written)


def main() -> None:
    """Check damaged files; print counts, times and memory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="name slow files")
    arguments = parser.parse_args()
    start = time.perf_counter()
    results = Counter[str]()
    slowest = 0.0
    initial_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with TemporaryDirectory() as folder:
        for name, data in mutated_files(arguments.count, arguments.seed):
            path = Path(folder, name)
            path.write_bytes(data)
            file_start = time.perf_counter()
            try:
                results["read" if check(path) == "read" else "refused"] += 1
            except Exception as error:  # noqa: BLE001 - all bugs are counted
                results["bug"] += 1
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            seconds = time.perf_counter() - file_start
            slowest = max(slowest, seconds)
            if arguments.verbose and seconds > 0.3:
                print(name, seconds, image_size(path))
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{dict(results)} in {time.perf_counter() - start:.1f} s, slowest {slowest:.2f} s, ", end="")
    print(f"memory {initial_memory / 1024:.0f} to {peak_memory / 1024:.0f} MB")


if __name__ == "__main__":
    main()
