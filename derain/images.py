"""Image files and pixels: reading any photo, writing without ever leaving half a file."""

import functools
import logging
import os
import re
import uuid
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from derain import deep_images
from derain.errors import DerainError
from derain.image_metadata import JPEG, Info, exif_to_write, has_location, writable
from derain.image_sources import ImageSource, opened, upright
from derain.ranges import OVERSHOOT, check_finite, extremes, span

Pixels = NDArray[np.uint8]
"""RGB pixels, ``(h, w, 3)``, 0 to 255."""

SUFFIXES = JPEG | {".png", ".webp", ".avif", ".tif", ".tiff", ".bmp"}
"""File names that count as images, in lower case."""

UNREAD_SUFFIXES = frozenset(
    {".gif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".exr", ".hdr", ".tga"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"}
)
"""Image files that derain does not read; folders that hold some are reported."""

ESCAPED = "backslashreplace"
"""How texts are written that contain file names: bytes that are not UTF-8 as ``\\udcXX``, as in JSON."""

WITH_ALPHA = frozenset({".png", ".webp", ".tif", ".tiff", ".avif"})
"""Endings of formats with transparency."""

DARK = 0.02
"""Share of white that a photo exceeds somewhere; a floating-point file that does not was probably scaled otherwise."""

log = logging.getLogger("derain")


def natural_key(path: Path | str) -> list[tuple[int, int, str]]:
    """Sorts ``2.png`` before ``10.png``.

    Example:
        >>> sorted(["b/10.png", "b/2.png"], key=natural_key)
        ['b/2.png', 'b/10.png']
    """
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]


class Listing(NamedTuple):
    """Image files of a folder.

    Attributes:
        files: Those that are read, in natural order.
        skipped: Those that are not, by reason: an ending such as ``.gif``, ``broken link``; and folders:
            ``unreadable folder``, ``repeated folder`` (a link to a folder that is listed by another path).
    """

    files: list[Path]
    skipped: dict[str, list[Path]]

    def note(self) -> str:
        """Say in one line what was skipped; empty if nothing was.

        Example:
            >>> Listing([], {".gif": [Path("a.gif"), Path("b.gif")]}).note()
            'skipped 2 .gif (a.gif, b.gif)'
        """
        parts = []
        for reason, paths in self.skipped.items():
            names = ", ".join(path.name for path in paths[:3]) + (", …" if len(paths) > 3 else "")
            parts.append(f"{len(paths)} {reason} ({names})")
        return f"skipped {', '.join(parts)}" if parts else ""


def image_files(folder: Path, *, recursive: bool = False, suffixes: frozenset[str] = SUFFIXES) -> list[Path]:
    """List the image files of a folder in natural order, without hidden ones; warn of those that are skipped.

    Links to files and folders are followed, but each folder is listed once, by its own path where it has one.

    Args:
        folder: Where to look.
        recursive: Also look in the folders below.
        suffixes: Endings of names that count.
    """
    listing = list_images(folder, recursive=recursive, suffixes=suffixes)
    if listing.skipped:
        convert = any(reason in UNREAD_SUFFIXES for reason in listing.skipped)
        advice = "; convert them to PNG or JPEG if they belong to the images" if convert else ""
        warn_once(f"{folder}: {listing.note()}{advice}")
    return listing.files


def list_images(folder: Path, *, recursive: bool = False, suffixes: frozenset[str] = SUFFIXES) -> Listing:
    """List the image files of a folder, and those that `image_files` skips."""
    skipped: dict[str, list[Path]] = defaultdict(list)
    listing = select_images(_walk(folder, recursive, skipped), suffixes)
    listing.skipped.update({reason: sorted(skipped[reason], key=natural_key) for reason in sorted(skipped)})
    return listing


def select_images(paths: Iterable[Path], suffixes: frozenset[str] = SUFFIXES) -> Listing:
    """Sort paths into image files that are read and image files that are not; other files are dropped."""
    files, skipped = [], defaultdict(list)
    for path in paths:
        suffix = path.suffix.lower()
        if suffix in suffixes and path.is_file():
            files.append(path)
        elif suffix in suffixes and not path.is_dir():
            skipped["broken link" if path.is_symlink() else "special file"].append(path)
        elif suffix in UNREAD_SUFFIXES and path.is_file():
            skipped[suffix].append(path)
    ordered = {reason: sorted(skipped[reason], key=natural_key) for reason in sorted(skipped)}
    return Listing(sorted(files, key=natural_key), ordered)


def _walk(top: Path, recursive: bool, skipped: dict[str, list[Path]]) -> Iterator[Path]:
    """Yield everything but folders that is not hidden, once each.

    A folder is entered once, by a path without links if it has one: links to folders wait until all others are listed.
    ``skipped`` gets the folders that are reached again or cannot be listed.
    """
    entered: set[tuple[int, int]] = set()
    folders, links = [top], deque[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                skipped["repeated folder"].append(folder)
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except PermissionError:
            if folder is top:
                raise
            skipped["unreadable folder"].append(folder)
            continue
        linked = []
        for entry in entries:
            path = folder / entry.name
            if entry.is_symlink() and path.is_dir():  # a link to itself is an error of entry.is_dir()
                linked.append(path)
            elif not entry.is_symlink() and entry.is_dir():
                folders += [path] * recursive
            else:
                yield path
        links += sorted(linked, key=natural_key) * recursive


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning unless this process has logged the same one: the steps of a command list one folder repeatedly."""
    log.warning(message)


@contextmanager
def _opened(path: Path) -> Iterator[ImageSource]:
    """Open an image file, and warn if only its first frame is used."""
    with opened(path) as source:
        if source.several_frames:
            _warn_of_frames(path)
        yield source


@functools.cache
def _warn_of_frames(path: Path) -> None:
    """Log a warning, once for a file; the command line limits how many of them are shown."""
    log.warning("%s: several frames or pages; only the first is used", path)


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of the upright image, from the file's head alone.

    Raises:
        DerainError: If the file is absent, no image, or too large to be decoded safely.
    """
    with _opened(path) as source:
        return source.size


def exif_problem(path: Path) -> str:
    """Return what is wrong with a file's EXIF, such as an orientation that does not exist; empty if nothing is.

    Raises:
        DerainError: If the file is absent or no image.
    """
    with _opened(path) as source:
        return source.exif_problem


def read_rgb(path: Path) -> Pixels:
    """Read a file as upright 8-bit RGB; grey is repeated, transparency dropped, 16 bit scaled down.

    Raises:
        DerainError: If the file cannot be read as an image.
    """
    with _opened(path) as source:
        if source.deep:
            return to_bytes(_read_deep(source, path, None).rgb, str(path))
        return np.ascontiguousarray(source.pixels("RGB"))


def to_bytes(rgb: NDArray[np.floating[Any]], name: str = "image") -> Pixels:
    """Convert ``(h, w, 3)`` in [0, 1] to bytes, rounded and clipped.

    Args:
        rgb: The image.
        name: What a message calls it.

    Raises:
        DerainError: If a value is NaN or infinite.
    """
    check_finite(rgb, name)
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
    info: Info | None = None

    def write(self, path: Path, rgb: NDArray[np.float32] | None = None) -> Info:
        """Write colours (by default its own) with the alpha, bit depth and profile of this photo.

        Formats without alpha or 16 bit get 8-bit colours.

        Args:
            path: The file; its ending says the format.
            rgb: ``(h, w, 3)`` in [0, 1].

        Returns:
            The metadata that was written; a warning names what the format cannot hold.

        Raises:
            DerainError: If a value is NaN or infinite, or the ending names no format that can hold the image.
        """
        values = self.rgb if rgb is None else rgb
        check_finite(values, str(path))
        values = np.clip(values, 0, 1)
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise DerainError(f"{path}: cannot write '{suffix}'; end it in {', '.join(sorted(SUFFIXES))}")
        channels = values.mean(axis=2, keepdims=True) if self.grey else values
        if self.alpha is not None and suffix in WITH_ALPHA:
            channels = np.concatenate([channels, self.alpha[..., None]], axis=2)
        deep = self.bits == 16 and suffix in deep_images.WRITABLE
        grey = channels.shape[2] == 1 or (channels.shape[2] == 2 and not deep)
        info = writable(self.info or {}, path, grey=grey, deep=deep)
        if deep:
            with write_whole(path) as temporary:
                temporary.write_bytes(deep_images.encode(suffix, channels, **info))
            return info
        array = np.rint(channels * 255).astype(np.uint8)
        write_image(path, Image.fromarray(array[..., 0] if array.shape[2] == 1 else array), **info)
        return info

    @property
    def has_location(self) -> bool:
        """Whether the file's EXIF says where the photo was taken; `write` returns what is written of it."""
        return has_location(self.info or {})

    def without_metadata(self) -> "Photo":
        """Return the photo without EXIF: no time, camera or location; the colour profile stays."""
        return replace(self, info={key: value for key, value in (self.info or {}).items() if key != "exif"})


def read_photo(path: Path, white: float | int | None = None) -> Photo:
    """Read any photo: grey, palette, transparent, 16-bit, floating-point, rotated by EXIF.

    Args:
        path: The file.
        white: Value of white in the colours of a floating-point file, 255 for example; 1 unless given.

    Raises:
        DerainError: If the file cannot be read as an image, or floating-point values are not from 0 to ``white``.
    """
    with _opened(path) as source:
        photo = _read_deep(source, path, white) if source.deep else _read_shallow(source)
        if source.exif_problem:
            log.warning("%s: %s", path, source.exif_problem)
        info = {"icc_profile": source.profile, "exif": exif_to_write(source, path)}
        return replace(photo, info={key: value for key, value in info.items() if value})


def _read_shallow(source: ImageSource) -> Photo:
    assert source.image is not None
    source.image.load()
    has_alpha = source.image.has_transparency_data
    grey = source.image.mode in {"1", "L", "LA"}
    array = source.pixels("RGBA" if has_alpha else "RGB").astype(np.float32)
    array /= np.float32(255)
    return Photo(np.ascontiguousarray(array[..., :3]), array[..., 3] if has_alpha else None, grey)


def _read_deep(source: ImageSource, path: Path, white: float | int | None) -> Photo:
    if source.image is not None:
        source.image.load()  # finds damage, which OpenCV's decoder of PNG would write to standard error
    values = deep_images.decode(source.file, (source.height, source.width), source.tags)
    values = upright(values, source.orientation)
    channels = values.shape[2]
    colours, alpha = (values[..., :-1], values[..., -1]) if channels in {2, 4} else (values, None)
    if source.floating:
        colours = _in_range(colours, path, white)
        alpha = None if alpha is None else _in_range(alpha, path, None)
        if 0 < colours.max() < DARK:
            brightest = float(colours.max()) * (white or 1)
            log.warning("%s: nearly black: the highest value is %g, and white is %g", path, brightest, white or 1)
    rgb = np.repeat(colours, 3, axis=2) if channels <= 2 else colours
    return Photo(np.ascontiguousarray(rgb), alpha, channels <= 2, 16)


def _in_range(values: NDArray[np.float32], path: Path, white: float | int | None) -> NDArray[np.float32]:
    """Scale floating-point values by white and clip a slight overshoot.

    Args:
        values: Colours or transparency.
        path: The file, for messages.
        white: Value of white; None: 1, and a message says to scale the file.
    """
    low, high = extremes(values)
    highest = 1 if white is None else white
    limit = highest * OVERSHOOT
    if not (-limit <= low and high <= highest + limit):  # NaN compares false
        step = "scale the values of the file" if white is None else "scale them, or give the value of white by --white"
        raise DerainError(f"{path}: has {span(low, high)}; expected 0 to {highest:g}; {step}")
    if low < -0.001 * highest or high > 1.001 * highest:  # more than rounding
        log.warning("%s: values from %g to %g clipped to 0 and %g", path, low, high, highest)
    return np.asarray(np.clip(values / np.float32(highest), 0, 1), np.float32)


def write_image(path: Path, image: Image.Image | Pixels, **options: Any) -> None:
    """Write an image file whole or not at all; JPEG, WebP and AVIF at quality 95 unless an option says otherwise.

    Args:
        path: The file; folders above it are created.
        image: A Pillow image or ``(h, w, 3)`` pixels.
        **options: Passed to Pillow.

    Raises:
        DerainError: If the format cannot hold the image, for example so many pixels a side.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if path.suffix.lower() in JPEG | {".webp", ".avif"}:
        options = {"quality": 95, **options}
    with write_whole(path) as temporary:
        try:
            picture.save(temporary, **options)
        except OSError as error:
            if error.errno is not None:  # a disk that is full, for example
                raise
            raise _not_encodable(path, picture, error) from error
        except (ValueError, RuntimeError) as error:
            raise _not_encodable(path, picture, error) from error


def _not_encodable(path: Path, picture: Image.Image, error: Exception) -> DerainError:
    reason = str(error).partition("\n")[0]
    return DerainError(
        f"{path}: {picture.width}x{picture.height} pixels of mode {picture.mode} cannot be written ({reason}); "
        "end the name in .png"
    )


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` and renames it to ``path`` when the block succeeds.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "report.txt"
        >>> with write_whole(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name[-50:]}")  # names have at most 255 bytes
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
