"""Opening image files by their head: which formats, what size, which way up."""

import ctypes
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from derain import deep_images
from derain.deep_images import numbers
from derain.errors import DerainError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "AVIF")
"""Formats that Pillow may open, whatever a file is named: its plug-in for PostScript runs Ghostscript."""

MEGAPIXELS = 178
"""Size above which an image counts as a decompression bomb."""

ORIENTATION = 0x0112
"""Tag of EXIF and TIFF."""

TURNS = {1: (0, 0), 2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 3), 7: (1, 3), 8: (0, 1)}
"""EXIF orientation to what sets an image upright: whether it is mirrored first, and quarter turns counter-clockwise."""

UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, EOFError),
    *(AttributeError, MemoryError, RuntimeError, struct.error, zlib.error),
)
"""What decoders were seen to raise for damaged files: Pillow reports damaged PNG chunks as SyntaxError, for example."""

# Pillow warns of damaged metadata without the name of the file; what it cannot read is refused below, with the name.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with suppress(
    AttributeError, OSError
):  # nor does its libtiff name the file; where it is linked statically, it stays loud
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ImageSource:
    """An image file whose head was read.

    Attributes:
        file: The file.
        height: As stored, before the image is set upright.
        width: As stored.
        stated: The orientation that EXIF or TIFF states, valid or not; None if it states none.
        image: What Pillow opened; None for a TIFF of more than 8 bits a channel, not all of which Pillow knows.
        tags: Of a TIFF of more than 8 bits a channel.
        deep: Whether the file has more than 8 bits a channel.
        several_frames: Whether it has several frames or pages, of which only the first is read.
        exif: None if there is none, or it is damaged.
        damaged_exif: What is wrong with EXIF, if anything.
    """

    file: BinaryIO
    height: int
    width: int
    stated: Any
    image: Image.Image | None
    tags: ImageFileDirectory_v2 | None
    deep: bool
    several_frames: bool = False
    exif: Image.Exif | None = None
    damaged_exif: str = ""

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8; 1 (upright) where the file states none that is valid."""
        return valid_orientation(self.stated)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright image."""
        turned = TURNS[self.orientation][1] % 2
        return (self.width, self.height) if turned else (self.height, self.width)

    @property
    def exif_problem(self) -> str:
        """What is wrong with EXIF, for people; empty if nothing is."""
        if self.stated is not None and self.stated not in TURNS:
            return f"EXIF orientation {str(self.stated)[:40]!r} ignored; expected 1 to 8"
        return f"EXIF ignored: it is damaged ({self.damaged_exif})" if self.damaged_exif else ""

    @property
    def floating(self) -> bool:
        """Whether pixels are floating-point numbers, whose white the file does not state."""
        return self.tags is not None and numbers(self.tags, deep_images.SAMPLE_FORMAT, 1)[0] == deep_images.FLOATS

    @property
    def profile(self) -> bytes | None:
        """ICC profile, if it is one of RGB or grey, which pixels are converted to."""
        stored = self.tags.get(deep_images.PROFILE) if self.image is None else self.image.info.get("icc_profile")  # type: ignore[union-attr]
        return stored if isinstance(stored, bytes) and stored[16:20] in {b"RGB ", b"GRAY"} else None

    def pixels(self, mode: str) -> NDArray[np.uint8]:
        """Decode upright 8-bit pixels ``(h, w, c)`` in one of Pillow's modes."""
        assert self.image is not None
        self.image.load()
        orientation = 1 if self.image.format == "TIFF" else self.orientation  # Pillow has set a TIFF upright by now
        return upright(np.asarray(self.image.convert(mode)), orientation)


def several_frames(path: Path) -> bool:
    """Return whether a file has several frames or pages, of which only the first is read.

    Raises:
        DerainError: If the file is absent or no image.
    """
    with opened(path) as source:
        return source.several_frames


@contextmanager
def opened(path: Path) -> Iterator[ImageSource]:
    """Open an image file by its head.

    Raises:
        DerainError: If the file is absent, no image, damaged, or too large to be decoded safely; also for what
            decoders raise within the block.
    """
    try:
        with path.open("rb") as file:
            tags = deep_images.deep_tiff_tags(file)
            if tags is not None:
                yield _deep_tiff(file, tags)
                return
            file.seek(0)
            deep = deep_images.is_deep_png(file.read(26))
            with Image.open(file, formats=FORMATS) as image:
                yield _opened_by_pillow(file, image, deep)
    except DerainError:
        raise
    except Image.DecompressionBombError as error:
        raise DerainError(f"{path}: has more than {MEGAPIXELS} megapixels; cut it into smaller images") from error
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.strerror:
            raise DerainError(f"{path}: {error.strerror.lower()}; check the path") from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        reason = "not an image that can be read" if isinstance(error, UnidentifiedImageError) else reason
        raise DerainError(f"{path}: {reason}; expected a whole JPEG, PNG, WebP, TIFF, BMP or AVIF file") from error


def _opened_by_pillow(file: BinaryIO, image: Image.Image, deep: bool) -> ImageSource:
    """Read size and EXIF before pixels are decoded, which changes both."""
    exif, damage = None, ""
    if image.format == "PNG" and _has_late_metadata(file):
        image.load()
    try:
        exif = Image.Image.getexif(image)  # that of PNG would decode the pixels
    except UNREADABLE as error:  # the pixels can be read without it
        damage = str(error).partition("\n")[0]
    # Of a TIFF, `size` is turned already, but not always as the pixels will be.
    width, height = image.size if image.format != "TIFF" else (image.tag_v2[256], image.tag_v2[257])  # type: ignore[attr-defined]
    stated = None if exif is None else exif.get(ORIENTATION)
    # The further images of a camera's JPEG (MPO) are previews and depth maps.
    several = image.format != "MPO" and getattr(image, "is_animated", False)
    return ImageSource(file, height, width, stated, image, None, deep, several, exif, damage)


def _has_late_metadata(file: BinaryIO) -> bool:
    """Whether a PNG has metadata behind its pixels; only the heads of chunks are read."""
    before, seen_pixels = file.tell(), False
    file.seek(8)
    while len(head := file.read(8)) == 8:
        if head[4:] == b"IDAT":
            seen_pixels = True
        elif seen_pixels and head[4:] in {b"eXIf", b"iTXt", b"zTXt", b"tEXt"}:
            break
        file.seek(int.from_bytes(head[:4]) + 4, 1)
    file.seek(before)
    return len(head) == 8


def _deep_tiff(file: BinaryIO, tags: ImageFileDirectory_v2) -> ImageSource:
    height, width = (numbers(tags, tag, 0)[0] for tag in (deep_images.HEIGHT, deep_images.WIDTH))
    if min(height, width) < 1:
        raise ValueError(f"its size is {width}x{height}")
    if height * width > MEGAPIXELS * 1_000_000:
        raise Image.DecompressionBombError
    return ImageSource(file, height, width, tags.get(ORIENTATION), None, tags, True, bool(tags.next))


def valid_orientation(value: Any) -> int:
    """Return an EXIF orientation from 1 to 8; 1 for anything else, such as text and lists of numbers.

    Example:
        >>> [valid_orientation(value) for value in (6, 9, "6", (6, 6), None)]
        [6, 1, 1, 1, 1]
    """
    return int(value) if value in TURNS else 1


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn ``(h, w, ...)`` pixels upright by an EXIF orientation, 1 to 8."""
    mirrored, quarters = TURNS[orientation]
    return np.rot90(pixels[:, ::-1] if mirrored else pixels, quarters)
