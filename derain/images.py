"""Image files and pixels: reading any photo, writing without ever leaving half a file."""

import logging
import re
import struct
import uuid
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from derain.errors import DerainError

Pixels = NDArray[np.uint8]
"""RGB pixels, ``(h, w, 3)``, 0 to 255."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"})
"""File names that count as images, in lower case."""

GPS = 0x8825
"""EXIF's tag of the location."""

log = logging.getLogger("derain")


def natural_key(path: Path | str) -> list[tuple[int, int, str]]:
    """Sorts ``2.png`` before ``10.png``.

    Example:
        >>> sorted(["b/10.png", "b/2.png"], key=natural_key)
        ['b/2.png', 'b/10.png']
    """
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]


def image_files(folder: Path, *, recursive: bool = False, suffixes: frozenset[str] = SUFFIXES) -> list[Path]:
    """Lists the image files of a folder in natural order, hidden ones left out.

    Args:
        folder: Where to look.
        recursive: Also look in the folders below.
        suffixes: Endings of names that count.
    """
    found = folder.rglob("*") if recursive else folder.iterdir()
    files = [
        path
        for path in found
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return sorted(files, key=natural_key)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image file with all its pixels decoded.

    Raises:
        DerainError: If the file is absent, no image, truncated, or too large to be decoded safely.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
    except FileNotFoundError as error:
        raise DerainError(f"{path}: no such file; check the path") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        # Pillow reports damaged PNG chunks as SyntaxError, truncated data as OSError, odd TIFF sizes as ValueError.
        reason = "not an image that can be read" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DerainError(f"{path}: {reason}; expected a whole JPEG, PNG, WebP, TIFF or BMP file") from error
    with image:
        yield image


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright image, from the file's head alone.

    Raises:
        DerainError: If the file is absent or no image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DerainError(f"{path}: not an image that can be read; expected a whole image file") from error


def read_rgb(path: Path) -> Pixels:
    """Reads a file as upright 8-bit RGB; grey is repeated, transparency dropped, 16 bit scaled down.

    Raises:
        DerainError: If the file cannot be read as an image.
    """
    with opened(path) as image:
        if not _is_deep(image, path):
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    return to_bytes(read_photo(path).rgb)


def to_bytes(rgb: NDArray[np.float32]) -> Pixels:
    """``(h, w, 3)`` in [0, 1] to bytes, rounded and clipped."""
    return np.ascontiguousarray(np.rint(np.clip(rgb, 0, 1) * np.float32(255)).astype(np.uint8))


@dataclass(frozen=True)
class Photo:
    """A photo as a person has it: colours to restore, and all that must be handed back with them.

    Attributes:
        rgb: Upright colours, ``(h, w, 3)`` float32 in [0, 1].
        alpha: Transparency, ``(h, w)`` float32 in [0, 1], if the file has any.
        grey: Whether the file has one colour channel.
        bits: Bits a channel of the file, 8 or 16.
        info: What Pillow needs to write the file again: ICC profile and EXIF, with the rotation undone.
    """

    rgb: NDArray[np.float32]
    alpha: NDArray[np.float32] | None = None
    grey: bool = False
    bits: int = 8
    info: dict[str, Any] | None = None

    def write(self, path: Path, rgb: NDArray[np.float32] | None = None) -> None:
        """Writes colours (by default its own) with the alpha, bit depth and profile of this photo.

        Formats without alpha or 16 bit get 8-bit colours.

        Args:
            path: The file; its ending says the format.
            rgb: ``(h, w, 3)`` in [0, 1].

        Raises:
            DerainError: If the ending names no format that can be written.
        """
        values = np.clip(self.rgb if rgb is None else rgb, 0, 1)
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise DerainError(f"{path}: cannot write '{suffix}'; end it in .png, .jpg, .webp, .tif or .bmp")
        channels = values.mean(axis=2, keepdims=True) if self.grey else values
        if self.alpha is not None and suffix in {".png", ".webp", ".tif", ".tiff"}:
            channels = np.concatenate([channels, self.alpha[..., None]], axis=2)
        info = {key: value for key, value in (self.info or {}).items() if suffix != ".bmp"}
        if self.bits == 16 and suffix in {".png", ".tif", ".tiff"}:
            _write_16_bit(path, channels, info.get("icc_profile"))
            return
        array = np.rint(channels * 255).astype(np.uint8)
        write_image(path, Image.fromarray(array[..., 0] if array.shape[2] == 1 else array), **info)

    @property
    def has_location(self) -> bool:
        """Whether the EXIF that is written again says where the photo was taken."""
        exif = Image.Exif()
        exif.load((self.info or {}).get("exif", b""))
        return GPS in exif

    def without_metadata(self) -> "Photo":
        """Return the photo without EXIF: no time, camera or location; the colour profile stays."""
        return replace(self, info={key: value for key, value in (self.info or {}).items() if key != "exif"})


def read_photo(path: Path) -> Photo:
    """Reads any photo: grey, palette, transparent, 16-bit, rotated by EXIF.

    Raises:
        DerainError: If the file cannot be read as an image.
    """
    with opened(path) as image:
        exif = image.getexif()
        deep = _is_deep(image, path)
        upright = ImageOps.exif_transpose(image)
        turn = exif.pop(0x0112, 1)  # applied here and below
        keep_exif = len(exif) and image.format != "TIFF"  # there it describes how the file is laid out
        profile = image.info.get("icc_profile") if image.mode != "CMYK" else None  # it is not one of RGB
        info = {"icc_profile": profile, "exif": exif.tobytes() if keep_exif else None}
        info = {key: value for key, value in info.items() if value}
        if not deep:
            has_alpha = "A" in upright.getbands() or "transparency" in upright.info
            grey = upright.mode in {"1", "L", "LA"}
            array = np.asarray(upright.convert("RGBA" if has_alpha else "RGB"), np.float32) / np.float32(255)
            alpha = array[..., 3] if has_alpha else None
            return Photo(array[..., :3], alpha, grey, 8, info)
    return _read_16_bit(path, int(turn), info)


def _is_deep(image: Image.Image, path: Path) -> bool:
    """Whether a file holds more than 8 bits a channel, which Pillow has no colour mode for."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24] == 16
    if image.format == "TIFF":
        return int(max(np.atleast_1d(image.getexif().get(258, 8)))) > 8
    return image.mode.startswith("I") or image.mode == "F"


def _read_16_bit(path: Path, turn: int, info: dict[str, Any]) -> Photo:
    """Reads what Pillow has no colour mode for, by OpenCV, and sets it upright by EXIF's number of the turn."""
    array = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if array is None or array.dtype.kind not in "uf":
        raise DerainError(f"{path}: pixel format is not supported; save it as 8-bit or 16-bit PNG or TIFF")
    scale = 1.0 if array.dtype.kind == "f" else 255.0 if array.dtype == np.uint8 else 65535.0
    if turn in {2, 3, 4, 5, 6, 7, 8}:
        mirrored, quarters = {2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 3), 7: (1, 3), 8: (0, 1)}[turn]
        array = np.rot90(array[:, ::-1] if mirrored else array, quarters)
    values = np.clip(np.atleast_3d(array).astype(np.float32) / np.float32(scale), 0, 1)
    channels = values.shape[2]
    alpha = values[..., -1] if channels in {2, 4} else None
    rgb = np.repeat(values[..., :1], 3, axis=2) if channels <= 2 else values[..., 2::-1]
    return Photo(np.ascontiguousarray(rgb), alpha, channels <= 2, 8 if array.dtype == np.uint8 else 16, info)


def _write_16_bit(path: Path, channels: NDArray[np.float32], profile: bytes | None) -> None:
    """Writes 16 bits a channel, which Pillow cannot do for colours."""
    array = np.rint(channels * 65535).astype(np.uint16)
    if array.shape[2] == 2:  # OpenCV has no grey with alpha
        array = array[..., [0, 0, 0, 1]]
    elif array.shape[2] >= 3:
        array = array[..., [2, 1, 0, *range(3, array.shape[2])]]
    ok, data = cv2.imencode(path.suffix, array)
    if not ok:
        raise DerainError(f"{path}: could not be encoded with 16 bits; end the name in .png or .tif")
    encoded = data.tobytes()
    if profile and profile[16:20] == b"GRAY" and array.shape[2] > 1:
        log.warning("%s: ICC profile dropped: it is one of grey, and grey with transparency is written as RGB", path)
    elif profile:
        encoded = _with_profile(encoded, profile)
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


def _with_profile(encoded: bytes, profile: bytes) -> bytes:
    """Puts an ICC profile into a PNG or TIFF of OpenCV's: a chunk behind the head, or one more tag."""
    if encoded.startswith(b"\x89PNG"):
        chunk = b"iCCPICC profile\0\0" + zlib.compress(profile)
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return encoded[:33] + chunk + encoded[33:]
    # The directory of tags is written again at the end, on an even byte; it is in this machine's byte order.
    (start,) = struct.unpack_from("=I", encoded, 4)
    (count,) = struct.unpack_from("=H", encoded, start)
    tags = encoded[start + 2 : start + 2 + 12 * count] + struct.pack("=HHII", 34675, 7, len(profile), len(encoded))
    body = encoded[8:] + profile + b"\0" * ((len(encoded) + len(profile)) % 2)
    return encoded[:4] + struct.pack("=I", 8 + len(body)) + body + struct.pack("=H", count + 1) + tags + bytes(4)


def write_image(path: Path, image: Image.Image | Pixels, **options: Any) -> None:
    """Writes an image file whole or not at all; JPEG and WebP at quality 95 unless told otherwise.

    Args:
        path: The file; folders above it are created.
        image: A Pillow image or ``(h, w, 3)`` pixels.
        **options: Passed to Pillow.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if path.suffix.lower() in {".jpg", ".jpeg", ".webp"}:
        options = {"quality": 95, **options}
    with replacing(path) as temporary:
        picture.save(temporary, **options)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` and renames it to ``path`` when the block succeeds.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "report.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
