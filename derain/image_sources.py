"""Open image files, and read their format, size, orientation and EXIF."""

import ctypes
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from derain import deep_images
from derain.deep_images import OpenFile, tag_values
from derain.errors import DerainError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "AVIF")
"""Formats that Pillow may open, whatever the suffix. Other formats may be unsafe: PostScript runs Ghostscript."""

MEGAPIXELS = 178
"""Millions of pixels above which an image is refused as a decompression bomb: Pillow's limit, rounded down."""

ORIENTATION = 0x0112
"""Number of the orientation tag in EXIF and TIFF."""

ROTATIONS = {1: (0, 0), 2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 3), 7: (1, 3), 8: (0, 1)}
"""Steps that make an image upright, by EXIF orientation: 1 to mirror it left to right, else 0; then the number of
quarter turns counter-clockwise."""

UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, EOFError),
    *(AttributeError, MemoryError, RuntimeError, struct.error, zlib.error),
)
"""Exceptions that decoders raise for damaged files; Pillow raises SyntaxError for damaged PNG chunks, for example."""

# Pillow and libtiff warn about damage without a file name. `open_image` raises an error that names the file instead.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with suppress(AttributeError, OSError):  # the symbol is missing where libtiff is linked statically
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # type: ignore[attr-defined]


@runtime_checkable
class ImageFile(Protocol):
    """An image file: a path, or a file within another file. Messages contain its ``str``."""

    @property
    def stem(self) -> str:
        """Name of the file without folders and suffix."""

    def open(self, mode: Literal["rb"]) -> OpenFile:
        """Open the file for reading."""

    def __hash__(self) -> int:
        """Return a hash; equal files have equal hashes."""


@dataclass(frozen=True)
class ImageSource:
    """An image file whose header has been read.

    Attributes:
        file: The open file.
        height: Height of the stored image in pixels, before it is rotated upright.
        width: Width of the stored image in pixels.
        orientation_tag: Orientation from EXIF or a TIFF tag, valid or not; None if there is none.
        image: The image that Pillow opened; None for a TIFF with more than 8 bits per channel.
        tags: Tags of a TIFF with more than 8 bits per channel, else None.
        deep: Whether the file is a PNG or TIFF with more than 8 bits per channel, see `derain.deep_images`.
        several_frames: Whether the file has several frames or pages, of which only the first is read.
        exif: EXIF, empty if the file has none; None if it is damaged, or if ``tags`` is set.
        exif_error: Why EXIF could not be read; empty if there was no error.
    """

    file: OpenFile
    height: int
    width: int
    orientation_tag: Any
    image: Image.Image | None
    tags: ImageFileDirectory_v2 | None
    deep: bool
    several_frames: bool = False
    exif: Image.Exif | None = None
    exif_error: str = ""

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8; 1 (upright) if the file has no valid one."""
        return valid_orientation(self.orientation_tag)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright image."""
        _, quarter_turns = ROTATIONS[self.orientation]
        return (self.width, self.height) if quarter_turns % 2 else (self.height, self.width)

    @property
    def exif_problem(self) -> str:
        """Message about invalid or damaged EXIF; empty if there is no problem."""
        if self.orientation_tag is not None and self.orientation_tag not in ROTATIONS:
            return f"EXIF orientation {str(self.orientation_tag)[:40]!r} ignored; expected 1 to 8"
        if self.exif_error:
            return f"damaged EXIF ignored ({self.exif_error})"
        return ""

    @property
    def floating(self) -> bool:
        """Whether the pixels are floating-point numbers; such files do not state which value is white."""
        if self.tags is None:
            return False
        return tag_values(self.tags, deep_images.SAMPLE_FORMAT, 1)[0] == deep_images.FLOATS

    @property
    def profile(self) -> bytes | None:
        """ICC profile if it is for RGB or grey, else None: pixels of other colour spaces, such as CMYK, become RGB."""
        if self.image is not None:
            profile = self.image.info.get("icc_profile")
        else:
            assert self.tags is not None
            profile = self.tags.get(deep_images.PROFILE)
        is_supported = isinstance(profile, bytes) and profile[16:20] in {b"RGB ", b"GRAY"}
        return profile if is_supported else None

    def pixels(self, mode: Literal["RGB", "RGBA"]) -> NDArray[np.uint8]:
        """Return the upright image ``(h, w, 3 or 4)``, 0 to 255, in a mode of Pillow; ``image`` must not be None."""
        assert self.image is not None
        self.image.load()
        array = np.asarray(self.image.convert(mode))
        if self.image.format == "TIFF":  # rotated upright by Pillow when it loaded the pixels
            return array
        return upright(array, self.orientation)


def several_frames(path: ImageFile) -> bool:
    """Return whether a file has several frames or pages, of which only the first is read.

    Raises:
        DerainError: If `open_image` cannot open the file.
    """
    with open_image(path) as source:
        return source.several_frames


@contextmanager
def open_image(path: ImageFile) -> Iterator[ImageSource]:
    """Open an image file for a block, and read its header.

    Raises:
        DerainError: If the file is missing, not an image, damaged, or larger than ``MEGAPIXELS``; also if the block
            raises one of ``UNREADABLE``.
    """
    try:
        with path.open("rb") as file:
            tags = deep_images.deep_tiff_tags(file)
            if tags is not None:
                yield _deep_tiff(file, tags)
                return
            file.seek(0)
            deep = deep_images.is_deep_png(file.read(25))
            with Image.open(file, formats=FORMATS) as image:
                yield _opened_by_pillow(file, image, deep)
    except DerainError:
        raise
    except Image.DecompressionBombError as error:
        message = f"{path}: more than {MEGAPIXELS} megapixels; split it into smaller images"
        raise DerainError(message) from error
    except UnidentifiedImageError as error:
        raise _unreadable(path, "not a readable image") from error
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.strerror:
            raise DerainError(f"{path}: {error.strerror.lower()}; check the path") from error
        raise _unreadable(path, first_line(error) or type(error).__name__) from error


def _unreadable(path: ImageFile, reason: str) -> DerainError:
    return DerainError(f"{path}: {reason}; expected an undamaged JPEG, PNG, WebP, TIFF, BMP or AVIF file")


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return str(error).partition("\n")[0]


def _opened_by_pillow(file: OpenFile, image: Image.Image, deep: bool) -> ImageSource:
    """Read size and EXIF before the pixels are decoded, since decoding changes them.

    Only a PNG with metadata after its pixels is decoded first.
    """
    if image.format == "PNG" and _has_late_metadata(file):
        image.load()
    exif, exif_error = None, ""
    try:
        exif = Image.Image.getexif(image)  # PngImageFile.getexif would decode the pixels
    except UNREADABLE as error:
        exif_error = first_line(error)
    width, height = image.size
    if image.format == "TIFF":
        # image.size is meant for the rotated image, but may not match how Pillow rotates the pixels.
        width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
    orientation_tag = None if exif is None else exif.get(ORIENTATION)
    # Further images in a camera's JPEG (MPO) are previews and depth maps, not frames.
    several_frames = image.format != "MPO" and getattr(image, "is_animated", False)
    return ImageSource(file, height, width, orientation_tag, image, None, deep, several_frames, exif, exif_error)


def _has_late_metadata(file: OpenFile) -> bool:
    """Return whether a PNG has metadata after its pixels; reads only the headers of its chunks."""
    position = file.tell()
    try:
        file.seek(8)
        pixels_seen = False
        while len(header := file.read(8)) == 8:
            length, kind = int.from_bytes(header[:4]), header[4:]
            if kind == b"IDAT":
                pixels_seen = True
            elif pixels_seen and kind in {b"eXIf", b"iTXt", b"zTXt", b"tEXt"}:
                return True
            file.seek(length + 4, 1)  # content and checksum
        return False
    finally:
        file.seek(position)


def _deep_tiff(file: OpenFile, tags: ImageFileDirectory_v2) -> ImageSource:
    height = tag_values(tags, deep_images.HEIGHT, 0)[0]
    width = tag_values(tags, deep_images.WIDTH, 0)[0]
    if min(height, width) < 1:
        raise ValueError(f"size {width}×{height} pixels is not valid")
    if height * width > MEGAPIXELS * 1_000_000:
        raise Image.DecompressionBombError
    has_further_pages = bool(tags.next)
    return ImageSource(file, height, width, tags.get(ORIENTATION), None, tags, True, has_further_pages)


def valid_orientation(value: Any) -> int:
    """Return a value if it is a valid EXIF orientation, 1 to 8; 1 for any other value, such as text or a tuple.

    Example:
        >>> [valid_orientation(value) for value in (6, 9, "6", (6, 6), None)]
        [6, 1, 1, 1, 1]
    """
    return int(value) if value in ROTATIONS else 1


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Mirror and rotate ``(h, w, ...)`` pixels upright, by an EXIF orientation from 1 to 8."""
    mirrored, quarter_turns = ROTATIONS[orientation]
    if mirrored:
        pixels = pixels[:, ::-1]
    return np.rot90(pixels, quarter_turns)
