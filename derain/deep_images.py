"""Read and write PNG and TIFF files with more than 8 bits per channel, with OpenCV: Pillow's RGB modes have 8 bits."""

import struct
import zlib
from io import BufferedReader, BytesIO
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from derain.errors import DerainError

# OpenCV would log errors without a file name. libpng prints its own messages in any case: see `_minimal_png`.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

OpenFile = BufferedReader | BytesIO
"""File that is open for reading, on a disk or in memory."""

WIDTH, HEIGHT, BITS, PHOTOMETRIC = 256, 257, 258, 262
CHANNELS, PLANES, EXTRA_SAMPLES, SAMPLE_FORMAT, PROFILE = 277, 284, 338, 339, 34675
"""Numbers of TIFF tags."""

FLOATS = 3
"""Value of the tag SAMPLE_FORMAT for floating-point numbers."""

SAMPLE_FORMATS = {1: "unsigned integers", 2: "signed integers", FLOATS: "floats"}

INVERTED, GREY, RGB = 0, 1, 2
"""Values of the tag PHOTOMETRIC; INVERTED is grey with 0 as white."""

PREMULTIPLIED = 1
"""Value of the tag EXTRA_SAMPLES: colours are multiplied by alpha."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

PNG_HEADER_END = 33
"""Length of the signature and the chunk IHDR in bytes."""

PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
"""Number of channels of a PNG by its colour type; palettes (3) have no 16-bit form."""

PNG_TRANSPARENT_COLOUR = {0: 2, 2: 6}
"""Length in bytes of the transparent colour of a PNG with 16 bits per channel, by its colour type."""

ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
"""Passes of an interlaced PNG: first column, first row, step between columns, step between rows."""

WRITABLE = frozenset({".png", ".tif", ".tiff"})
"""Suffixes of the formats that `encode` writes, in lower case."""


def is_deep_png(header: bytes) -> bool:
    """Return whether the first 25 bytes of a file are those of a PNG with 16 bits per channel."""
    return header[:8] == PNG_SIGNATURE and header[24:25] == b"\x10"


def deep_tiff_tags(file: OpenFile) -> ImageFileDirectory_v2 | None:
    """Return the tags of a TIFF with more than 8 bits per channel; None for any other file.

    Raises:
        ValueError: If the file is a big-endian BigTIFF, or its number of bits is not an integer.
        Exception: If the tags are damaged: any exception of Pillow, such as SyntaxError or struct.error.
    """
    file.seek(0)
    header = file.read(8)
    if header[:4] not in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}:
        return None
    if header[:4] == b"MM\0+":  # Pillow mistakes it for ordinary TIFF
        raise ValueError("big-endian BigTIFF is not supported")
    if header[:4] == b"II+\0":  # the header of a BigTIFF is longer
        header += file.read(8)
    tags = ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    return tags if max(tag_values(tags, BITS, 1)) > 8 else None


def tag_values(tags: ImageFileDirectory_v2, tag: int, default: int) -> tuple[int, ...]:
    """Return the integers in a TIFF tag, at least one.

    Args:
        tags: Tags of a TIFF.
        tag: Number of the tag.
        default: Integer if the tag is missing.

    Raises:
        ValueError: If the tag contains anything else, such as text.
    """
    value: Any = tags.get(tag, default)
    values = value if isinstance(value, tuple) else (value,)
    if not values or not all(isinstance(number, int) for number in values):
        raise ValueError(f"TIFF tag {tag} is {str(value)[:40]!r}; expected integers")
    return values


def decode(file: OpenFile, size: tuple[int, int], tags: ImageFileDirectory_v2 | None) -> NDArray[Any]:
    """Decode a file with more than 8 bits per channel; the image is not rotated upright.

    Integers are scaled to [0, 1], floating-point values are not. Premultiplied colours are divided by alpha.

    Args:
        file: A PNG or TIFF.
        size: Height and width from the header of the file, in pixels.
        tags: Tags of a TIFF; None for a PNG.

    Returns:
        ``(h, w, c)`` float32: grey, grey and alpha, RGB, or RGB and alpha. A PNG with grey and an alpha channel is
        returned as RGB and alpha, a grey PNG with a transparent colour as grey and alpha.

    Raises:
        ValueError: If the file is damaged, or OpenCV does not support its pixel format.
        KeyError, struct.error, zlib.error: If a PNG is damaged, see `_minimal_png`.
    """
    file.seek(0)
    transparent = None
    if tags is None:
        data = _minimal_png(file.read())
        transparent = _transparent_grey(data)
    else:
        _check_layout(tags)
        data = file.read()
    array = _decoded_by_opencv(data, size)
    if transparent is not None:
        alpha = np.where(array == transparent, 0, 65535).astype(np.uint16)
        array = np.dstack((array, alpha))
    with np.errstate(over="ignore"):  # float64 may become infinite: `derain.images` refuses it as out of range
        values = np.atleast_3d(array).astype(np.float32)
    if array.dtype == np.uint16:
        values /= np.float32(65535)
    values = _swap_red_and_blue(values)
    if tags is not None and tag_values(tags, PHOTOMETRIC, GREY)[0] == INVERTED:
        values = 1 - values
    if tags is not None and PREMULTIPLIED in tag_values(tags, EXTRA_SAMPLES, 0):
        values[..., :3] /= np.maximum(values[..., 3:], np.float32(1e-6))
    return values


def _decoded_by_opencv(data: bytes, size: tuple[int, int]) -> NDArray[Any]:
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(f"pixels cannot be decoded ({error.err})") from error
    if array is None:
        raise ValueError("pixels cannot be decoded: the file is damaged or truncated")
    if array.shape[:2] != size or array.dtype not in (np.uint16, np.float32, np.float64):
        raise ValueError(f"decodes to {array.dtype} of shape {array.shape}; expected uint16 or floats of shape {size}")
    return array


def _swap_red_and_blue(channels: NDArray[Any]) -> NDArray[Any]:
    """Convert ``(h, w, c)`` from OpenCV's channel order to RGB, or back; grey is not changed."""
    count = channels.shape[2]
    return channels if count < 3 else channels[..., [2, 1, 0, *range(3, count)]]


def _minimal_png(data: bytes) -> bytes:
    """Check a PNG, and return a copy that contains only its header, transparent colour and pixels.

    Without the check, libpng would print messages about damage to standard error, and allocate as much memory as the
    length of a damaged chunk says.

    Raises:
        ValueError: If the checksum of a chunk, a value in the header or the number of pixels is wrong.
        KeyError, struct.error, zlib.error: If a chunk is missing, the header has the wrong length, or the compressed
            pixels are damaged.
    """
    chunks = _png_chunks(data)
    header = chunks[b"IHDR"][0]
    compressed = b"".join(chunks[b"IDAT"])
    width, height, _, color_type, compression, filtering, interlaced = struct.unpack(">IIBBBBB", header)
    if color_type not in PNG_CHANNELS or compression or filtering or interlaced > 1:
        raise ValueError("the PNG header is damaged")
    expected = _png_bytes(height, width, 2 * PNG_CHANNELS[color_type], interlaced=interlaced == 1)
    decoder = zlib.decompressobj()
    pixels = decoder.decompress(compressed, expected + 1)
    if len(pixels) != expected or not decoder.eof:
        raise ValueError("the PNG has fewer or more pixels than its header says")
    compressed = compressed[: len(compressed) - len(decoder.unused_data)]
    minimal = PNG_SIGNATURE + _chunk(b"IHDR", header)
    transparent = chunks.get(b"tRNS", [b""])[0]
    if len(transparent) == PNG_TRANSPARENT_COLOUR.get(color_type):
        minimal += _chunk(b"tRNS", transparent)
    return minimal + _chunk(b"IDAT", compressed) + _chunk(b"IEND", b"")


def _transparent_grey(png: bytes) -> int | None:
    """Return the transparent grey level of a PNG from `_minimal_png`; None if there is none.

    OpenCV ignores transparent grey levels.
    """
    color_type, chunk = png[25], png[PNG_HEADER_END + 4 :]
    return int.from_bytes(chunk[4:6]) if color_type == 0 and chunk.startswith(b"tRNS") else None


def _png_chunks(data: bytes) -> dict[bytes, list[bytes]]:
    """Return the contents of the chunks of a PNG by type, up to the chunk IEND; raise ValueError if one is damaged."""
    chunks: dict[bytes, list[bytes]] = {}
    start = len(PNG_SIGNATURE)
    while start < len(data) and b"IEND" not in chunks:
        length = int.from_bytes(data[start : start + 4])
        kind = data[start + 4 : start + 8]
        end = start + 8 + length
        body = data[start + 8 : end]
        if data[end : end + 4] != zlib.crc32(kind + body).to_bytes(4):
            raise ValueError(f"PNG chunk {kind!r} is damaged")
        chunks.setdefault(kind, []).append(body)
        start = end + 4
    return chunks


def _png_bytes(height: int, width: int, pixel_bytes: int, *, interlaced: bool) -> int:
    """Return the number of bytes of a PNG's decompressed pixels, with ``pixel_bytes`` each.

    In each row of each pass, a byte for the filter precedes the pixels.
    """
    total = 0
    for left, top, across, down in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        columns = len(range(left, width, across))
        rows = len(range(top, height, down))
        if columns:
            total += rows * (1 + columns * pixel_bytes)
    return total


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _check_layout(tags: ImageFileDirectory_v2) -> None:
    """Raise ValueError if OpenCV decodes the pixel format of a TIFF to wrong values, or not at all."""
    bits = set(tag_values(tags, BITS, 1))
    sample_format = tag_values(tags, SAMPLE_FORMAT, 1)[0]
    channels = tag_values(tags, CHANNELS, 1)[0]
    photometric = tag_values(tags, PHOTOMETRIC, GREY)[0]

    bit_text = "/".join(map(str, sorted(bits)))
    layout = f"{channels} × {bit_text}-bit {SAMPLE_FORMATS.get(sample_format, 'unknown numbers')}"
    numbers_supported = (sample_format, bits) in [(1, {16}), (FLOATS, {32}), (FLOATS, {64})]
    channels_supported = channels in {INVERTED: {1}, GREY: {1}, RGB: {3, 4}}.get(photometric, set())
    inverted_floats = photometric == INVERTED and sample_format == FLOATS
    if not numbers_supported or not channels_supported or inverted_floats:
        raise ValueError(f"pixels of {layout} (photometric interpretation {photometric}) are not supported")
    if channels > 1 and tag_values(tags, PLANES, 1)[0] != 1:
        raise ValueError(f"pixels of {layout} in separate planes are not supported")


def encode(
    suffix: str, channels: NDArray[np.float32], icc_profile: bytes | None = None, exif: bytes | None = None
) -> bytes:
    """Encode an image as PNG or TIFF with 16 bits per channel.

    Args:
        suffix: One of ``WRITABLE``.
        channels: ``(h, w, c)`` in [0, 1]: grey, grey and alpha, RGB, or RGB and alpha.
        icc_profile: ICC profile for these channels.
        exif: EXIF as returned by Pillow's ``Exif.tobytes``; ignored for TIFF.

    Returns:
        Content of the file; grey with alpha is written as RGB with alpha.

    Raises:
        DerainError: If OpenCV cannot encode the image.
    """
    array = np.rint(channels * 65535).astype(np.uint16)
    if array.shape[2] == 2:  # OpenCV cannot encode grey with alpha
        array = array[..., [0, 0, 0, 1]]
    ok, data = cv2.imencode(suffix, _swap_red_and_blue(array))
    if not ok:
        advice = "write .tif instead" if suffix == ".png" else "split the image into smaller ones"
        raise DerainError(f"'{suffix}': cannot encode shape {array.shape} with 16 bits per channel; {advice}")
    encoded: bytes = data.tobytes()
    if suffix != ".png":
        return encoded if icc_profile is None else _tiff_with_profile(encoded, icc_profile)
    metadata = b""
    if icc_profile is not None:
        metadata += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc_profile))
    if exif is not None:
        metadata += _chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    return encoded[:PNG_HEADER_END] + metadata + encoded[PNG_HEADER_END:]


def _tiff_with_profile(encoded: bytes, profile: bytes) -> bytes:
    """Add an ICC profile to a TIFF from OpenCV, which has the byte order of this machine and no profile.

    The profile and a new directory of tags are appended. TIFF requires that the directory starts at an even position.
    """
    (start,) = struct.unpack_from("=I", encoded, 4)
    (count,) = struct.unpack_from("=H", encoded, start)
    undefined_bytes = 7  # type of the tag
    profile_tag = struct.pack("=HHII", PROFILE, undefined_bytes, len(profile), len(encoded))
    tags = encoded[start + 2 : start + 2 + 12 * count] + profile_tag
    body = encoded[8:] + profile
    if len(body) % 2:
        body += b"\0"
    directory = struct.pack("=H", count + 1) + tags + bytes(4)
    return encoded[:4] + struct.pack("=I", 8 + len(body)) + body + directory
