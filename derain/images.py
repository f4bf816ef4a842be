"""Read and write image files; a file is written completely or not at all."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from derain import deep_images
from derain.errors import DerainError
from derain.image_metadata import JPEG, Info, copy_exif, has_location, supported_metadata
from derain.image_sources import ImageFile, ImageSource, first_line, open_image, upright
from derain.listing import SUFFIXES
from derain.ranges import OVERSHOOT, check_finite, extremes, span
from derain.unfinished import locked, temporary_path

Pixels = NDArray[np.uint8]
"""RGB pixels, ``(h, w, 3)``, 0 to 255."""

ESCAPED = "backslashreplace"
"""Error handler of encodings for text with file names: bytes that are not UTF-8 become ``\\udcXX``, as in JSON."""

LOSSY = JPEG | {".webp", ".avif"}
"""Suffixes of formats that are written with lossy compression."""

WITH_ALPHA = frozenset({".png", ".webp", ".tif", ".tiff", ".avif"})
"""Suffixes of formats with an alpha channel."""

DARK = 0.02
"""Fraction of white: a lower maximum of a floating-point photo causes a warning, as the value of white may be wrong."""

log = logging.getLogger("derain")


@contextmanager
def _open(path: ImageFile) -> Iterator[ImageSource]:
    """Open an image file for a block; warn if it has several frames."""
    with open_image(path) as source:
        if source.several_frames:
            _warn_of_frames(path)
        yield source


@functools.cache
def _warn_of_frames(path: ImageFile) -> None:
    """Log a warning, once per file; commands show only the first few (`derain.warning_limit`)."""
    log.warning("%s: several frames or pages; only the first is used", path)


def image_size(path: ImageFile) -> tuple[int, int]:
    """Return height and width of the upright image in pixels; the pixels are decoded only if necessary.

    Raises:
        DerainError: If `open_image` cannot open the file.
    """
    with _open(path) as source:
        return source.size


def exif_problem(path: ImageFile) -> str:
    """Return a message about invalid or damaged EXIF, such as an unknown orientation; empty if there is no problem.

    Raises:
        DerainError: If `open_image` cannot open the file.
    """
    with _open(path) as source:
        return source.exif_problem


def read_rgb(path: ImageFile) -> Pixels:
    """Read an image as upright 8-bit RGB.

    Grey is repeated, the alpha channel is dropped, and 16-bit values are scaled. Floating-point values are clipped to
    [0, 1].

    Args:
        path: The file.

    Returns:
        ``(h, w, 3)``, 0 to 255.

    Raises:
        DerainError: If the file cannot be read as an image, or floating-point values are further than a quarter from
            [0, 1].
    """
    with _open(path) as source:
        if source.deep:
            return to_bytes(_read_deep(source, path, None).rgb, str(path))
        return np.ascontiguousarray(source.pixels("RGB"))


def to_bytes(rgb: NDArray[np.floating[Any]], name: str = "image") -> Pixels:
    """Convert an image to 8 bits, clipped and rounded.

    Args:
        rgb: ``(h, w, 3)``; 1 is white.
        name: Name of the image in messages.

    Returns:
        ``(h, w, 3)``, 0 to 255.

    Raises:
        DerainError: If a value is NaN or infinite.
    """
    check_finite(rgb, name)
    return np.ascontiguousarray(np.rint(np.clip(rgb, 0, 1) * np.float32(255)).astype(np.uint8))


@dataclass(frozen=True)
class Photo:
    """Photo: its colours, and the alpha channel, bit depth and metadata that are written with the restored colours.

    Attributes:
        rgb: Upright colours, ``(h, w, 3)`` float32 in [0, 1].
        alpha: Alpha channel, ``(h, w)`` float32 in [0, 1], where 1 is opaque; None if the file has none.
        grey: Whether the file has one colour channel.
        bits: Bits per channel to write: 8, or 16 if the file has more than 8.
        info: ICC profile, and EXIF without the orientation; None or empty if there are none.
    """

    rgb: NDArray[np.float32]
    alpha: NDArray[np.float32] | None = None
    grey: bool = False
    bits: int = 8
    info: Info | None = None

    def write(self, path: Path, rgb: NDArray[np.float32] | None = None) -> Info:
        """Write an image with the alpha channel, bit depth and metadata of this photo, if the format supports them.

        For metadata that the format does not support, see `supported_metadata`.

        Args:
            path: The file; its suffix selects the format.
            rgb: Colours, ``(h, w, 3)``, clipped to [0, 1]; by default those of the photo.

        Returns:
            The metadata that was written.

        Raises:
            DerainError: If a value is NaN or infinite, or the format is unknown or cannot store the image.
        """
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise DerainError(f"{path}: cannot write '{suffix}'; end the name in {', '.join(sorted(SUFFIXES))}")
        channels = self._channels(self.rgb if rgb is None else rgb, path)
        deep = self.bits == 16 and suffix in deep_images.WRITABLE
        count = channels.shape[2]
        grey = count == 1 or (count == 2 and not deep)
        info = supported_metadata(self.info or {}, path, grey=grey, deep=deep)
        if deep:
            with write_whole(path) as temporary:
                temporary.write_bytes(deep_images.encode(suffix, channels, **info))
        else:
            array = np.rint(channels * 255).astype(np.uint8)
            write_image(path, Image.fromarray(array[..., 0] if count == 1 else array), **info)
        return info

    def _channels(self, rgb: NDArray[np.float32], path: Path) -> NDArray[np.float32]:
        """Return the channels to write, ``(h, w, c)``: grey or RGB, and alpha if the format supports it."""
        check_finite(rgb, str(path))
        channels = np.clip(rgb, 0, 1)
        if self.grey:
            channels = channels.mean(axis=2, keepdims=True)
        if self.alpha is not None and path.suffix.lower() in WITH_ALPHA:
            channels = np.concatenate([channels, self.alpha[..., None]], axis=2)
        return channels

    @property
    def has_location(self) -> bool:
        """Whether EXIF contains the location where the photo was taken."""
        return has_location(self.info or {})

    def without_exif(self) -> "Photo":
        """Return the photo without EXIF (time, camera, location); the ICC profile stays."""
        info = {key: value for key, value in (self.info or {}).items() if key != "exif"}
        return replace(self, info=info)


def read_photo(path: Path, white: float | int | None = None) -> Photo:
    """Read a photo as upright RGB, with its alpha channel, bit depth and metadata.

    Floating-point colours are divided by ``white``. Values outside [0, ``white``] by up to a quarter of ``white`` are
    clipped, with a warning from a thousandth of ``white`` on. For floating-point alpha, white is always 1.

    Args:
        path: The file.
        white: Value of white in floating-point files, for example 255; None means 1. It is ignored for other files.

    Raises:
        DerainError: If the file cannot be read as an image, or floating-point values are further from [0, ``white``].
    """
    with _open(path) as source:
        photo = _read_deep(source, path, white) if source.deep else _read_shallow(source)
        if source.exif_problem:
            log.warning("%s: %s", path, source.exif_problem)
        info = {"icc_profile": source.profile, "exif": copy_exif(source, path)}
        return replace(photo, info={key: value for key, value in info.items() if value})


def _read_shallow(source: ImageSource) -> Photo:
    """Read a photo with at most 8 bits per channel; its metadata is not read."""
    assert source.image is not None
    source.image.load()
    has_alpha = source.image.has_transparency_data
    grey = source.image.mode in {"1", "L", "LA"}
    array = source.pixels("RGBA" if has_alpha else "RGB").astype(np.float32)
    array /= np.float32(255)
    return Photo(np.ascontiguousarray(array[..., :3]), array[..., 3] if has_alpha else None, grey)


def _read_deep(source: ImageSource, path: ImageFile, white: float | int | None) -> Photo:
    """Read a photo with 16-bit integers or floating-point numbers; its metadata is not read."""
    if source.image is not None:
        source.image.load()  # raises if damaged; OpenCV's PNG decoder would only write to standard error
    channels = deep_images.decode(source.file, (source.height, source.width), source.tags)
    channels = upright(channels, source.orientation)
    count = channels.shape[2]
    colors, alpha = channels, None
    if count in {2, 4}:
        colors, alpha = channels[..., :-1], channels[..., -1]
    if source.floating:
        colors = _scaled_by_white(colors, path, white)
        if alpha is not None:
            alpha = _scaled_by_white(alpha, path, None)
        _warn_if_dark(colors, path, white)
    grey = count <= 2
    rgb = np.repeat(colors, 3, axis=2) if grey else colors
    return Photo(np.ascontiguousarray(rgb), alpha, grey, 16)


def _warn_if_dark(colors: NDArray[np.float32], path: ImageFile, white: float | int | None) -> None:
    maximum = float(colors.max())
    if 0 < maximum < DARK:
        white = white or 1
        log.warning("%s: nearly black: maximum %g, white %g; check the scale", path, maximum * white, white)


def _scaled_by_white(values: NDArray[np.float32], path: ImageFile, white: float | int | None) -> NDArray[np.float32]:
    """Divide floating-point values by white, and clip them to [0, 1]; warn if more than rounding errors are clipped.

    Args:
        values: Colours or alpha channel.
        path: Name of the file in messages.
        white: Value of white. None means 1; the message then does not mention ``--white``.

    Raises:
        DerainError: If values are outside 0 to white by more than a quarter of white (``OVERSHOOT``).
    """
    low, high = extremes(values)
    maximum = 1 if white is None else white
    overshoot = maximum * OVERSHOOT
    if not (-overshoot <= low and high <= maximum + overshoot):  # NaN compares false
        remedy = "scale the values of the file" if white is None else "scale them, or set --white"
        raise DerainError(f"{path}: has {span(low, high)}; expected 0 to {maximum:g}; {remedy}")
    rounding = 0.001 * maximum
    if low < -rounding or high > maximum + rounding:
        log.warning("%s: values from %g to %g clipped to 0 and %g", path, low, high, maximum)
    return np.asarray(np.clip(values / np.float32(maximum), 0, 1), np.float32)


def write_image(path: Path, image: Image.Image | Pixels, **options: Any) -> None:
    """Write an image file completely or not at all; the default quality of JPEG, WebP and AVIF is 95.

    Args:
        path: The file, whose suffix selects the format; missing folders are created.
        image: A Pillow image, or ``(h, w, 3)`` uint8 pixels.
        **options: Options of Pillow's ``save``, for example ``quality``.

    Raises:
        DerainError: If the format cannot store the image, for example because of its size.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if path.suffix.lower() in LOSSY:
        options.setdefault("quality", 95)
    with write_whole(path) as temporary:
        try:
            picture.save(temporary, **options)
        except OSError as error:
            if error.errno is not None:  # such as a full disk
                raise
            raise _not_encodable(path, picture, error) from error
        except (ValueError, RuntimeError) as error:
            raise _not_encodable(path, picture, error) from error


def _not_encodable(path: Path, picture: Image.Image, error: Exception) -> DerainError:
    size = f"{picture.width}x{picture.height}"
    return DerainError(
        f"{path}: cannot write {size} pixels of mode {picture.mode} ({first_line(error)}); end the name in .png"
    )


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; when the block succeeds, rename the file there to ``path``.

    Missing folders are created. If the block raises, the temporary file is deleted, and a file at ``path`` stays as it
    was.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "report.txt"
        >>> with write_whole(target) as temporary:
        ...     _ = temporary.write_text("complete")
        >>> target.read_text()
        'complete'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with locked(temporary):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
