"""Restoration of uploaded photos for the page of ``derain app``."""

import dataclasses
import itertools
import re
import shlex
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from derain.commands.option_values import scale_factor
from derain.commands.page_files import KEEP_MINUTES, touch
from derain.commands.photo_pipeline import PhotoPipeline
from derain.data.rain import PRESETS, Rain, add_rain, sample_rain
from derain.errors import DerainError
from derain.images import Photo, Pixels, image_size, read_photo, to_bytes, write_image
from derain.listing import SUFFIXES
from derain.memory import release_freed_memory
from derain.restoration import Explanation, Restorer
from derain.scaling import automatic_factor

PREVIEW_SIDE = 2048
"""Maximum side of a photo on the page, in pixels; the download has full size."""

PAIR_SIDE = 1024
"""Maximum side of a photo on the page if several are restored together, in pixels."""

MAP_SIDE = 640
"""Maximum side of a map on the page, in pixels."""

MAX_PHOTOS = 500
"""Maximum number of photos that are restored together."""

STEM_BYTES = 200
"""Maximum number of bytes of a file name in an archive, without number and suffix; file systems accept 255 in all."""

RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)
"""Start of the file names that Windows reserves for devices, with any suffix."""


def load_restorers(names: Sequence[str], device: str) -> dict[str, Restorer]:
    """Load weights, each name once.

    Args:
        names: Names or files of weights.
        device: Device to restore on: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Returns:
        Restorers by the label that the page shows: weights and method.

    Raises:
        DerainError: If weights cannot be loaded, or the device is not available.
    """
    restorers = {name: Restorer(name, device=device) for name in dict.fromkeys(names)}
    stems = {name: Path(name).stem for name in restorers}
    ambiguous = len(set(stems.values())) < len(stems)
    labelled = {}
    for name, restorer in restorers.items():
        method = restorer.method.title.removesuffix("Module")
        labelled[f"{name if ambiguous else stems[name]} · {method}"] = restorer
    return labelled


class RestoredPhoto(NamedTuple):
    """Files and facts of a restored photo.

    Attributes:
        before: JPEG of the rainy photo, with sides of at most ``PREVIEW_SIDE``.
        after: JPEG of the restored photo, of the same size.
        download: PNG of the restored photo at full size, written by `Photo.write`.
        maps: Pictures of the removed rain and of the method's maps, by name, as `map_pictures` returns them.
        facts: Model, size, time, what the method found in the photo, and settings that differ from the defaults (scale,
            strength, synthetic rain), by name.
    """

    before: Path
    after: Path
    download: Path
    maps: dict[str, Pixels]
    facts: dict[str, Any]


class RestoredPhotos(NamedTuple):
    """Files and facts of several photos that were restored together.

    Attributes:
        pairs: Name of each restored photo, and JPEGs of it before and after, with sides of at most ``PAIR_SIDE``.
        errors: A message for each photo that could not be restored.
        download: ZIP archive of the restored photos, with the names that `_archive_names` returns; None if all failed.
        facts: Model, number of restored photos, time, and settings that differ from the defaults, by name.
    """

    pairs: list[tuple[str, Path, Path]]
    errors: list[str]
    download: Path | None
    facts: dict[str, Any]


def _never() -> bool:
    return False


class RestorationService:
    """Restores uploaded photos; one call of `restore` or `restore_all` runs at a time.

    Args:
        restorers: Restorers by label.
        folder: Folder for the results; each call creates a subfolder.
        max_megapixels: Maximum size of a photo in megapixels.
        keep_metadata: Whether restored photos keep their EXIF metadata.
    """

    def __init__(
        self,
        restorers: dict[str, Restorer],
        folder: Path,
        max_megapixels: float = 24.0,
        *,
        keep_metadata: bool = False,
    ) -> None:
        self.restorers = restorers
        self.folder = folder
        self.max_megapixels = max_megapixels
        self.keep_metadata = keep_metadata
        self._lock = threading.Lock()  # one restoration at a time, since each measures the free memory
        self._closed = threading.Event()
        self._is_abandoned: Callable[[], bool] = _never
        for restorer in restorers.values():
            for module in restorer.method.modules():
                module.register_forward_pre_hook(self._stop_if_unwanted)

    def restore(
        self,
        upload: Path,
        name: str,
        model: str,
        amount: float = 0.0,
        seed: int = 0,
        scale: str = "full",
        strength: float = 1.0,
        abandoned: Callable[[], bool] = _never,
    ) -> RestoredPhoto:
        """Restore a photo, optionally after adding synthetic rain to it.

        Args:
            upload: Uploaded file.
            name: Name of the file on the client.
            model: Label of a restorer.
            amount: Amount of synthetic rain, from 0 (none) to 100.
            seed: Seed of the synthetic rain.
            scale: Factor by which the photo is reduced to estimate the rain, ``full`` or ``auto``, as for derain
                restore.
            strength: Share of the rain that is removed, from 0 to 1.
            abandoned: Returns whether the client has left. It is called before each layer of the network; if it
                returns True, the restoration stops.

        Returns:
            Files in a new folder, and facts.

        Raises:
            DerainError: If there is no such model or scale; the file is not a photo, is too large or does not fit into
                memory; or the restoration was stopped. The message is shown on the page.
            OSError: If a result cannot be written.
        """
        name = Path(name).name
        self.check(upload, name)
        restorer, settings = self._settings(model, amount, seed, scale, strength)
        with self._lock:
            start = time.perf_counter()
            restorer.scale, restorer.strength = scale_factor(scale), strength
            self._is_abandoned = abandoned
            try:
                self._stop_if_unwanted()
                photo = self._read(upload, amount, seed)
                derained, maps, description = restorer.explain(photo.rgb, str(upload))
            except DerainError as error:
                raise _renamed(error, name, upload) from error
            seconds = time.perf_counter() - start
            folder = self.folder / uuid.uuid4().hex
            stem = re.sub(r"[^\w.-]+", "-", Path(name).stem)[:50]
            download = folder / f"{stem}-derained.png"
            photo.write(download, derained)
            before, after = folder / "before.jpg", folder / "after.jpg"
            _write_pair(before, after, photo.rgb, derained, PREVIEW_SIDE)
            pictures = map_pictures(photo.rgb, derained, maps)
            release_freed_memory()
        height, width = derained.shape[:2]
        facts = {"model": model, "size": f"{width:,} × {height:,} pixels", "time": f"{seconds:.1f} s", **description}
        if scale == "auto":
            settings["scale"] = automatic_factor(height, width)
        return RestoredPhoto(before, after, download, pictures, facts | settings)

    def restore_all(
        self,
        uploads: Mapping[Path, str],
        model: str,
        amount: float = 0.0,
        seed: int = 0,
        scale: str = "full",
        strength: float = 1.0,
        abandoned: Callable[[], bool] = _never,
        progress: Callable[[int], object] = lambda done: None,
    ) -> RestoredPhotos:
        """Restore several photos by a `PhotoPipeline`, as `derain restore` does.

        Args:
            uploads: Name on the client of each uploaded file, by path.
            model: Label of a restorer.
            amount: Amount of synthetic rain, from 0 (none) to 100.
            seed: Seed of the synthetic rain.
            scale: As for `restore`.
            strength: Share of the rain that is removed, from 0 to 1.
            abandoned: As for `restore`.
            progress: Called after each photo with the number of photos that were restored or have failed.

        Returns:
            Files in a new folder, facts, and an error for each photo that could not be restored.

        Raises:
            DerainError: If there are more than ``MAX_PHOTOS``, there is no such model or scale, or the restoration was
                stopped; the message is shown on the page.
            OSError: If the disk is full or read-only.
        """
        if len(uploads) > MAX_PHOTOS:
            raise DerainError(
                f"{len(uploads)} photos: this page restores up to {MAX_PHOTOS} together. Use the command line: "
                "`derain restore FOLDER derained`"
            )
        restorer, settings = self._settings(model, amount, seed, scale, strength)
        folder = self.folder / uuid.uuid4().hex
        names = _archive_names(uploads)
        targets = {upload: folder / f"{index}{names[upload].suffix}" for index, upload in enumerate(uploads)}
        download = folder / "derained.zip"
        pairs: list[tuple[str, Path, Path]] = []
        errors: list[str] = []

        def read(upload: Path) -> Photo:
            self.check(upload, uploads[upload])
            return self._read(upload, amount, seed)

        def restore(photos: Sequence[Photo], sources: Sequence[Path]) -> list[Explanation | DerainError]:
            results = restorer.restore_each([photo.rgb for photo in photos], list(map(str, sources)))
            return [result if isinstance(result, DerainError) else Explanation(result, {}, {}) for result in results]

        def write(photo: Photo, restored: Explanation, target: Path) -> bool:
            _write_pair(*_pair_of(target), photo.rgb, restored.derained, PAIR_SIDE)
            photo.write(target, restored.derained)
            return False  # the page does not report locations in the metadata

        with self._lock:
            start = time.perf_counter()
            restorer.scale, restorer.strength = scale_factor(scale), strength
            self._is_abandoned = abandoned
            folder.mkdir(parents=True)
            outcomes = PhotoPipeline(restorer, read, restore, write).run(targets)
            with closing(outcomes), zipfile.ZipFile(download, "w") as archive:
                for (upload, target), outcome in zip(targets.items(), outcomes, strict=True):
                    self._stop_if_unwanted()
                    if isinstance(outcome, Exception):
                        errors.append(str(_renamed(outcome, uploads[upload], upload, target)))
                    else:
                        archive.write(target, names[upload])
                        target.unlink()
                        pairs.append((uploads[upload], *_pair_of(target)))
                    touch([*uploads, *folder.iterdir()])
                    progress(len(pairs) + len(errors))
            release_freed_memory()
        seconds = time.perf_counter() - start
        facts = {"model": model, "photos": len(pairs), "time": f"{seconds:.1f} s"}
        return RestoredPhotos(pairs, errors, download if pairs else None, facts | settings)

    def _settings(
        self, model: str, amount: float, seed: int, scale: str, strength: float
    ) -> tuple[Restorer, dict[str, Any]]:
        """Return the restorer of a model, and the settings that differ from the defaults, by the name on the page.

        Raises:
            DerainError: If there is no such model or scale.
        """
        if model not in self.restorers:
            raise DerainError(f"Model {model!r} is not available; choose {' or '.join(self.restorers)}.")
        settings: dict[str, Any] = {}
        factor = scale_factor(scale)
        if factor != 1:
            settings["scale"] = factor
        if strength < 1:
            settings["strength"] = f"{strength:g}"
        if amount > 0:
            settings["synthetic rain"] = f"{amount:g} %, seed {seed}"
        return self.restorers[model], settings

    def _read(self, upload: Path, amount: float, seed: int) -> Photo:
        """Read a photo, remove its EXIF metadata unless ``keep_metadata``, and add synthetic rain if any."""
        photo = read_photo(upload)
        if not self.keep_metadata:
            photo = photo.without_exif()
        return photo if amount <= 0 else replace(photo, rgb=add_rain_to(photo.rgb, amount, seed))

    def close(self) -> None:
        """Stop a running restoration before its next layer, wait until it has ended, and refuse all later ones."""
        self._closed.set()
        with self._lock:  # held by a restoration until it has stopped
            pass

    def _stop_if_unwanted(self, *_: Any) -> None:
        """Stop a restoration if its client has left or the page was closed; called before each layer, too.

        Raises:
            DerainError: If the client has left or the page was closed.
        """
        if self._closed.is_set():
            raise DerainError("the page was closed")
        if self._is_abandoned():
            raise DerainError("the client has left")

    def check(self, upload: Path, name: str) -> None:
        """Check that a file is a photo of an accepted size; only its header is read.

        Args:
            upload: Uploaded file.
            name: Name of the file on the client.

        Raises:
            DerainError: If the file is missing, empty, not a photo, or larger than ``max_megapixels``; the message is
                shown on the page.
        """
        if not upload.is_file():
            raise DerainError(
                f"{name} was deleted: photos are kept for {KEEP_MINUTES} minutes. Please upload it again."
            )
        if upload.stat().st_size == 0:
            raise DerainError(f"{name} is empty (0 bytes). Please try another copy of it.")
        try:
            height, width = image_size(upload)
        except DerainError as error:
            raise _renamed(error, name, upload) from error
        megapixels = width * height / 1e6
        if megapixels > self.max_megapixels:
            raise DerainError(
                f"{name} has {megapixels:.4g} megapixels ({width:,} × {height:,}); this page accepts up to "
                f"{self.max_megapixels:g}. Use the command line: `derain restore {shlex.quote(name)} derained.png`"
            )


def _renamed(error: Exception, name: str, *paths: Path) -> DerainError:
    """Return an error whose message begins with the client's name of a file, instead of its paths on this machine."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror  # without the path
    for path in paths:
        message = message.removeprefix(f"{path}: ")
    return DerainError(message if message.startswith((f"{name}: ", f"{name} ")) else f"{name}: {message}")


def _archive_names(uploads: Mapping[Path, str]) -> dict[Path, PurePath]:
    """Return the names of files in an archive: those on the client, changed where Linux or Windows forbids them.

    Forbidden characters become ``-``, and ``-`` is put before names that Windows reserves. Long names are cut, repeated
    names are numbered. ``.png`` is appended to names without the suffix of an image format that derain writes.

    Example:
        >>> uploads = {Path("x/1"): "a.jpg", Path("x/2"): "A.JPG", Path("x/3"): "../scan", Path("x/4"): "con.png"}
        >>> [str(name) for name in _archive_names(uploads).values()]
        ['a.jpg', 'A-2.JPG', '..-scan.png', '-con.png']
    """
    names: dict[Path, PurePath] = {}
    taken: set[str] = set()
    for upload, client_name in uploads.items():
        name = PurePath(re.sub(r'[<>:"/\\|?*\x00-\x1f]', "-", client_name))
        stem, suffix = (name.stem, name.suffix) if name.suffix.lower() in SUFFIXES else (name.name, ".png")
        stem = ("-" if RESERVED.match(stem) else "") + stem
        stem = stem.encode()[:STEM_BYTES].decode(errors="ignore")
        unique = f"{stem}{suffix}"
        for number in itertools.count(2):
            if unique.lower() not in taken:
                break
            unique = f"{stem}-{number}{suffix}"
        taken.add(unique.lower())
        names[upload] = PurePath(unique)
    return names


def _pair_of(target: Path) -> tuple[Path, Path]:
    """Return the paths of pictures before and after restoration, given the output file of a photo."""
    return target.with_name(f"{target.stem}-before.jpg"), target.with_name(f"{target.stem}-after.jpg")


def _write_pair(
    before: Path, after: Path, rainy: NDArray[np.float32], derained: NDArray[np.float32], longest: int
) -> None:
    """Write JPEGs of a photo before and after restoration, with sides of at most ``longest`` pixels."""
    write_image(before, shrink(rainy, longest), subsampling=0)
    write_image(after, shrink(derained, longest), subsampling=0)


def map_pictures(
    rainy: NDArray[np.float32], derained: NDArray[np.float32], maps: dict[str, NDArray[np.float32]]
) -> dict[str, Pixels]:
    """Return grey pictures of the removed rain and of the method's maps, at most ``MAP_SIDE`` pixels wide and high.

    The removed rain is the mean absolute difference over the channels, scaled so that strong rain is white.

    Args:
        rainy: ``(h, w, 3)`` in [0, 1].
        derained: ``(h, w, 3)`` in [0, 1].
        maps: Maps ``(h, w)`` in [0, 1], by name.
    """
    removed = np.abs(rainy - derained).mean(2)
    brightest = max(0.1, float(np.percentile(removed, 99.5)))
    pictures = {"removed rain": removed / brightest, **maps}
    return {name: shrink(np.repeat(picture[..., None], 3, 2), MAP_SIDE) for name, picture in pictures.items()}


def add_rain_to(rgb: NDArray[np.float32], amount: float, seed: int) -> NDArray[np.float32]:
    """Add synthetic rain to a photo; amount and seed determine the result.

    Args:
        rgb: ``(h, w, 3)`` in [0, 1]; rounded to 8 bits before rain is added.
        amount: Amount of rain, from above 0 to 100, as for `rain_of_amount`.
        seed: Seed of the rain.

    Returns:
        ``(h, w, 3)`` in [0, 1].
    """
    rainy = add_rain(to_bytes(rgb), rain_of_amount(amount, seed), np.random.default_rng(seed))
    return rainy.astype(np.float32) / np.float32(255)


def rain_of_amount(amount: float, seed: int) -> Rain:
    """Return rain interpolated between none (0) and the presets light (100/3), medium (200/3) and heavy (100).

    Args:
        amount: Amount of rain, from 0 to 100.
        seed: Seed of the rain that is sampled within the limits of each preset.

    Example:
        >>> rain_of_amount(0.0, 7).density
        0.0
        >>> rain_of_amount(100.0, 7) == sample_rain(*PRESETS["heavy"], np.random.default_rng(7))
        True
    """
    presets = [dataclasses.asdict(sample_rain(*limits, np.random.default_rng(seed))) for limits in PRESETS.values()]
    none = presets[0] | {"density": 0.0, "veil": 0.0}
    stops = [none, *presets]
    amounts = np.linspace(0, 100, len(stops))
    parameters: dict[str, Any] = {}
    for name, value in none.items():
        interpolated = float(np.interp(amount, amounts, [stop[name] for stop in stops]))
        parameters[name] = round(interpolated) if isinstance(value, int) else interpolated
    return Rain(**parameters)


def shrink(picture: NDArray[np.float32], longest: int) -> Pixels:
    """Return a picture in 8 bits, shrunk if its longest side exceeds ``longest``.

    Args:
        picture: ``(h, w, 3)`` in [0, 1].
        longest: Maximum of the longest side in pixels.

    Example:
        >>> shrink(np.zeros((10, 40, 3), np.float32), 20).shape
        (5, 20, 3)
    """
    pixels = to_bytes(picture)
    scale = longest / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    height, width = pixels.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
