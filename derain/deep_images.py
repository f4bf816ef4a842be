"""PNG and TIFF files of more than 8 bits a channel, which Pillow has no colour mode for: read and written by OpenCV."""

import struct
import zlib
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from derain.errors import DerainError

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # decoders write to stderr without a file name

WIDTH, HEIGHT, BITS, PHOTOMETRIC = 256, 257, 258, 262
CHANNELS, PLANES, EXTRA, SAMPLE_FORMAT, PROFILE = 277, 284, 338, 339, 34675
"""Tags of TIFF."""

FLOATS = 3
"""Value of the tag SAMPLE_FORMAT."""

INVERTED, GREY, RGB = 0, 1, 2
"""Values of the tag PHOTOMETRIC."""

CHANNELS_OF_PNG = {0: 1, 2: 3, 4: 2, 6: 4}
"""Channels by the colour type of a PNG."""

ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
"""Passes of an interlaced PNG: first column and row, steps between columns and rows."""

PREMULTIPLIED = 1
"""Value of the tag EXTRA: colours are multiplied by alpha."""

WRITABLE = frozenset({".png", ".tif", ".tiff"})
"""Endings of files that can hold 16 bits a channel."""


def is_deep_png(head: bytes) -> bool:
    """Return whether a file that begins like this is a PNG of 16 bits a channel."""
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:25] == b"\x10"


def deep_tiff_tags(file: BinaryIO) -> ImageFileDirectory_v2 | None:
    """Return the tags of a TIFF of more than 8 bits a channel, and None for any other file.

    Raises:
        Exception: What Pillow raises for damaged tags (SyntaxError, struct.error, ...).
    """
    file.seek(0)
    head = file.read(8)
    if head[:4] not in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}:
        return None
    if head[:4] == b"MM\0+":  # Pillow takes it for ordinary TIFF
        raise ValueError("BigTIFF of big-endian byte order is not supported")
    if head[:4] == b"II+\0":  # BigTIFF has a longer head
        head += file.read(8)
    tags = ImageFileDirectory_v2(head)
    file.seek(tags.next)
    tags.load(file)
    return tags if max(numbers(tags, BITS, 1)) > 8 else None


def numbers(tags: ImageFileDirectory_v2, tag: int, default: int) -> tuple[int, ...]:
    """Return the values of a tag.

    Raises:
        ValueError: If they are no numbers, such as text.
    """
    value: Any = tags.get(tag, default)
    values = value if isinstance(value, tuple) else (value,)
    if not values or not all(isinstance(number, int) for number in values):
        raise ValueError(f"TIFF tag {tag} is {str(value)[:40]!r}, expected numbers")
    return values


def decode(file: BinaryIO, size: tuple[int, int], tags: ImageFileDirectory_v2 | None) -> NDArray[Any]:
    """Decode a file, 16-bit integers to [0, 1] and floats as they are.

    Args:
        file: PNG or TIFF.
        size: Height and width that its head has.
        tags: Of a TIFF.

    Returns:
        ``(h, w, c)`` float32: grey, grey and alpha, RGB, or RGB and alpha.

    Raises:
        ValueError: If the file is damaged, or of a pixel format that OpenCV does not read rightly.
    """
    if tags is not None:
        _check_layout(tags)
    file.seek(0)
    data = file.read() if tags is not None else _plain_png(file.read())
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(f"pixels cannot be decoded ({error.err})") from error
    if array is None:
        raise ValueError("pixels cannot be decoded: the file is damaged or truncated")
    if array.shape[:2] != size or array.dtype not in (np.uint16, np.float32, np.float64):
        raise ValueError(f"pixels decode to {array.dtype} of shape {array.shape}, expected 16 bits or floats of {size}")
    with np.errstate(over="ignore"):  # infinity is refused as any other value out of range
        values = np.atleast_3d(array).astype(np.float32)
    if array.dtype == np.uint16:
        values /= np.float32(65535)
    if values.shape[2] >= 3:  # OpenCV has BGR
        values = values[..., [2, 1, 0, *range(3, values.shape[2])]]
    if tags is not None and numbers(tags, PHOTOMETRIC, GREY)[0] == INVERTED:
        values = 1 - values
    if tags is not None and PREMULTIPLIED in numbers(tags, EXTRA, 0):
        values[..., :3] /= np.maximum(values[..., 3:], np.float32(1e-6))
    return values


def _plain_png(data: bytes) -> bytes:
    """Return a PNG with nothing but checked pixels: OpenCV's decoder writes to standard error of all that is damaged.

    Raises:
        ValueError: If a chunk is damaged, or longer than the file (OpenCV would allocate memory for it).
        zlib.error: If the pixels are damaged.
    """
    chunks: dict[bytes, list[bytes]] = {}
    start = 8
    while start < len(data) and b"IEND" not in chunks:
        end = start + 8 + int.from_bytes(data[start : start + 4])
        kind, body = data[start + 4 : start + 8], data[start + 8 : end]
        if data[end : end + 4] != zlib.crc32(kind + body).to_bytes(4):
            raise ValueError(f"PNG chunk {kind!r} is damaged")
        chunks.setdefault(kind, []).append(body)
        start = end + 4
    head, pixels, transparent = chunks[b"IHDR"][0], b"".join(chunks[b"IDAT"]), chunks.get(b"tRNS", [b""])[0]
    width, height, _, colours, compression, filtering, interlaced = struct.unpack(">IIBBBBB", head)
    if colours not in CHANNELS_OF_PNG or compression or filtering or interlaced > 1:
        raise ValueError("the head of the PNG is damaged")
    need = sum(
        len(range(top, height, down)) * (1 + 2 * CHANNELS_OF_PNG[colours] * len(range(left, width, across)))
        for left, top, across, down in (ADAM7 if interlaced else [(0, 0, 1, 1)])
        if left < width
    )
    decoder = zlib.decompressobj()
    raw = decoder.decompress(pixels, need + 1)
    if len(raw) != need or not decoder.eof:
        raise ValueError("PNG pixels are not as many as the head says")
    pixels = pixels[: len(pixels) - len(decoder.unused_data)]
    has_transparent = len(transparent) == {0: 2, 2: 6}.get(colours)
    kept = [(b"IHDR", head), *([(b"tRNS", transparent)] if has_transparent else []), (b"IDAT", pixels), (b"IEND", b"")]
    return data[:8] + b"".join(_chunk(kind, body) for kind, body in kept)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _check_layout(tags: ImageFileDirectory_v2) -> None:
    """Refuse what OpenCV decodes to wrong values, or not at all."""
    bits, (kind, *_), (channels, *_) = (numbers(tags, *tag) for tag in ((BITS, 1), (SAMPLE_FORMAT, 1), (CHANNELS, 1)))
    colours = numbers(tags, PHOTOMETRIC, GREY)[0]
    names = {1: "unsigned integers", 2: "signed integers", 3: "floats"}
    layout = f"{channels} channels of {'/'.join(map(str, sorted(set(bits))))}-bit {names.get(kind, 'unknown numbers')}"
    supported = len(set(bits)) == 1 and (kind, bits[0]) in {(1, 16), (3, 32), (3, 64)}
    supported &= channels in ({1} if colours in (INVERTED, GREY) else {3, 4} if colours == RGB else set())
    supported &= not (colours == INVERTED and kind == FLOATS)
    if not supported:
        raise ValueError(f"{layout} (photometric interpretation {colours}) are not supported")
    if channels > 1 and numbers(tags, PLANES, 1)[0] != 1:
        raise ValueError(f"{layout} in separate planes are not supported")


def encode(
    suffix: str, channels: NDArray[np.float32], icc_profile: bytes | None = None, exif: bytes | None = None
) -> bytes:
    """Encode an image with 16 bits a channel.

    Args:
        suffix: One of ``WRITABLE``.
        channels: ``(h, w, c)`` in [0, 1]: grey, grey and alpha, RGB, or RGB and alpha.
        icc_profile: ICC profile that fits the channels.
        exif: EXIF as Pillow has it; only a PNG holds it.

    Raises:
        DerainError: If the image cannot be encoded.
    """
    array = np.rint(channels * 65535).astype(np.uint16)
    if array.shape[2] == 2:  # OpenCV has no grey with alpha
        array = array[..., [0, 0, 0, 1]]
    elif array.shape[2] >= 3:
        array = array[..., [2, 1, 0, *range(3, array.shape[2])]]
    ok, data = cv2.imencode(suffix, array)
    if not ok:
        raise DerainError(f"'{suffix}': an image of shape {array.shape} cannot be encoded with 16 bits; write 8 bits")
    encoded = data.tobytes()
    if exif is not None and suffix == ".png":
        encoded = encoded[:33] + _chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) + encoded[33:]
    return encoded if icc_profile is None else _with_profile(encoded, icc_profile)


def _with_profile(encoded: bytes, profile: bytes) -> bytes:
    """Add an ICC profile to a PNG or TIFF that OpenCV wrote: a chunk behind the head, or one more tag."""
    if encoded.startswith(b"\x89PNG"):
        return encoded[:33] + _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)) + encoded[33:]
    # The directory of tags is written again at the end, on an even byte; it is in this machine's byte order.
    (start,) = struct.unpack_from("=I", encoded, 4)
    (count,) = struct.unpack_from("=H", encoded, start)
    tags = encoded[start + 2 : start + 2 + 12 * count] + struct.pack("=HHII", PROFILE, 7, len(profile), len(encoded))
    body = encoded[8:] + profile + b"\0" * ((len(encoded) + len(profile)) % 2)
    return encoded[:4] + struct.pack("=I", 8 + len(body)) + body + struct.pack("=H", count + 1) + tags + bytes(4)
