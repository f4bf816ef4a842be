"""Synthetic rain on clean photos, determined by a seed.

A rainy image shows the clean one through streaks and mist::

    rainy = w · clean + (1 − w) · sky,    w = T · Π_l (1 − S_l)

``w`` in [0, 1] is the share of the scene's light that reaches the camera. ``S_l`` in [0, 1] is the opacity of the
streaks of depth layer ``l``, ``T`` in [0, 1] the transmission of the veil (mist of distant rain), and ``sky`` the grey
light that both scatter: 1.5 times the 95th percentile of the photo's values, limited to `SKY`.

The heavy rain model ``T · (clean + Σ_l S_l) + (1 − T) · A`` with atmospheric light ``A`` (Yang et al., CVPR 2017; Li et
al., CVPR 2019) adds streaks. Here, streaks are translucent, as Garg and Nayar measured (IJCV 2007), and composed
like the screen blend of Luo et al. (ICCV 2015): where they overlap, the image approaches ``sky`` and does not overflow.

The streaks of a layer are random runs of pixels, blurred and rotated. Near layers have longer, wider, softer and
brighter streaks; far layers have shorter, fainter and more streaks. Drops on the lens show the scene inverted, small
and blurred (You et al., TPAMI 2016).

This module does not import torch, since the import takes longer than adding rain to many photos. ``RandomRain`` of
kornia or albumentations is not used: its streaks have a single grey value and length, and no depth.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

import derain
from derain.errors import DerainError
from derain.images import Pixels, read_rgb, write_image
from derain.listing import image_files
from derain.pictures import contact_sheet
from derain.progress import track

SKY = (128, 242)
"""Limits of the light that streaks and veil scatter, in 0 to 255: dusk to a bright overcast sky."""

RECORD = "rain.json"
"""File of a synthetic data set with all parameters that are needed to reproduce it from the clean photos."""

REFERENCE_SIDE = 512
"""Shorter side of a photo, in pixels, above which the sizes of streaks grow in proportion to it."""


def _field(default: float | int, low: float | int, high: float | int) -> Any:
    return field(default=default, metadata={"limits": (low, high)})


@dataclass(frozen=True)
class Rain:
    """Parameters of the rain in one image.

    Attributes:
        density: Expected total area of the streaks of all layers, divided by the image area; overlaps count repeatedly;
            0 to 4.
        length: Mean length of the nearest streaks in pixels; if both sides of a photo exceed 512 pixels, it is scaled
            by the shorter side divided by 512; 1 to 400.
        width: Width of the nearest streaks in pixels, scaled likewise; 0.2 to 40.
        angle: Degrees from the vertical, positive for rain that falls to the right; -90 to 90.
        spread: Standard deviation of the layers' angles around ``angle``, in degrees; 0 to 45.
        layers: Number of depth layers; 1 to 16.
        brightness: Opacity of the brightest streaks; 0 to 1.
        veil: Opacity of the densest mist of distant rain, approximately; 0 to 1.
        drops: Number of drops on the lens; 0 to 200.

    Raises:
        DerainError: If a value is outside its range.
    """

    density: float = _field(0.3, 0, 4)
    length: float = _field(40.0, 1, 400)
    width: float = _field(2.0, 0.2, 40)
    angle: float = _field(0.0, -90, 90)
    spread: float = _field(2.0, 0, 45)
    layers: int = _field(4, 1, 16)
    brightness: float = _field(0.7, 0, 1)
    veil: float = _field(0.0, 0, 1)
    drops: int = _field(0, 0, 200)

    def __post_init__(self) -> None:
        for parameter in dataclasses.fields(self):
            value = getattr(self, parameter.name)
            low, high = parameter.metadata["limits"]
            if not low <= value <= high:
                raise DerainError(f"rain: {parameter.name} {value}: expected {low} to {high}")


PRESETS: dict[str, tuple[Rain, Rain]] = {
    "light": (
        Rain(density=0.08, length=20.0, width=1.2, angle=-25.0, spread=0.5, layers=2, brightness=0.40),
        Rain(density=0.24, length=60.0, width=2.2, angle=25.0, spread=2.0, layers=4, brightness=0.70),
    ),
    "medium": (
        Rain(density=0.25, length=20.0, width=1.4, angle=-25.0, spread=0.5, layers=3, brightness=0.45),
        Rain(density=0.50, length=70.0, width=2.6, angle=25.0, spread=3.0, layers=5, brightness=0.75, veil=0.08),
    ),
    "heavy": (
        Rain(density=0.7, length=40.0, width=1.4, angle=-25.0, spread=1.0, layers=4, brightness=0.60),
        Rain(density=1.2, length=110.0, width=3.0, angle=25.0, spread=6.0, layers=6, brightness=0.95, veil=0.2),
    ),
}
"""Lower and upper limits of the rain of each preset; the rain of an image is sampled between them.

The PSNR of photos with light, medium and heavy rain approximates that of Rain100L, Rain800 and Rain100H.
"""


def sample_rain(low: Rain, high: Rain, rng: np.random.Generator) -> Rain:
    """Sample each rain parameter uniformly between its limits.

    Args:
        low: Lower limits.
        high: Upper limits.
        rng: Random number generator.

    Raises:
        DerainError: If a lower limit exceeds the upper one.

    Example:
        >>> rain = sample_rain(*PRESETS["light"], np.random.default_rng(0))
        >>> 0.08 <= rain.density <= 0.24 and rain.layers in (2, 3, 4)
        True
    """
    values: dict[str, float] = {}
    for parameter in dataclasses.fields(Rain):
        minimum, maximum = getattr(low, parameter.name), getattr(high, parameter.name)
        if minimum > maximum:
            raise DerainError(f"rain: {parameter.name} from {minimum} to {maximum}: expected the smaller number first")
        if parameter.type is int:
            values[parameter.name] = int(rng.integers(minimum, maximum + 1))
        else:
            values[parameter.name] = float(rng.uniform(minimum, maximum))
    return Rain(**values)  # type: ignore[arg-type]


def add_rain(clean: Pixels, rain: Rain, rng: np.random.Generator) -> Pixels:
    """Add rain to a photo of any size.

    Args:
        clean: ``(h, w, 3)`` uint8.
        rain: Parameters of the rain.
        rng: Random number generator; equal states yield equal streaks, veil and drops on photos of equal size.

    Returns:
        The rainy photo, ``(h, w, 3)`` uint8.

    Example:
        >>> photo = np.full((32, 48, 3), 90, np.uint8)
        >>> rainy = add_rain(photo, Rain(density=0.2), np.random.default_rng(0))
        >>> rainy.shape, bool(rainy.mean() > photo.mean())
        ((32, 48, 3), True)
    """
    shape = clean.shape[:2]
    scene_weight = (1 - streaks(shape, rain, rng)) * (1 - _veil(shape, rain, rng))  # w
    sky_brightness = np.clip(1.5 * np.percentile(clean[::4, ::4], 95), *SKY)
    sky = np.full_like(clean, round(float(sky_brightness)))
    rainy = cv2.blendLinear(np.ascontiguousarray(clean), sky, scene_weight, 1 - scene_weight)
    return _add_lens_drops(np.asarray(rainy, np.uint8), rain, rng)


def streaks(shape: tuple[int, int], rain: Rain, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the opacity of all streaks, ``1 − Π_l (1 − S_l)``.

    Args:
        shape: ``(h, w)`` in pixels.
        rain: Parameters of the rain; veil and drops are ignored.
        rng: Random number generator.

    Returns:
        ``(h, w)`` in [0, 1]; at most ``rain.brightness`` where streaks of different layers do not overlap.
    """
    transmission = np.ones(shape, np.float32)
    scale = max(1.0, min(shape) / REFERENCE_SIDE)
    for layer in range(rain.layers):
        nearness = 1.0 if rain.layers == 1 else 1 - layer / (rain.layers - 1)  # 1 nearest, 0 farthest
        size = scale * (0.35 + 0.65 * nearness)
        opacity = _layer_opacity(
            shape,
            coverage=rain.density / rain.layers,
            length=rain.length * size,
            width=rain.width * size,
            angle=math.radians(rng.normal(rain.angle, rain.spread)),
            rng=rng,
        )
        transmission *= 1 - rain.brightness * (0.5 + 0.5 * nearness) * opacity
    return 1 - transmission


def _layer_opacity(
    shape: tuple[int, int],
    *,
    coverage: float,
    length: float,
    width: float,
    angle: float,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Return the opacity of the streaks of one layer, in [0, 1].

    Streaks are drawn horizontally, as runs of pixels in the rows of a canvas, each with its own length and brightness.
    Then they are blurred, which tapers their ends and softens their edges, and rotated into the direction of the rain.

    Args:
        shape: ``(h, w)`` in pixels.
        coverage: Expected area of the streaks, divided by the image area, approximately.
        length: Mean length of the streaks in pixels.
        width: Width of the streaks in pixels.
        angle: Angle from the vertical in radians, positive for rain that falls to the right.
        rng: Random number generator.
    """
    sin, cos = math.sin(angle), math.cos(angle)
    h, w = shape
    canvas_length = math.ceil(abs(w * sin) + abs(h * cos)) + 2
    canvas_width = math.ceil(abs(w * cos) + abs(h * sin)) + 2

    count = rng.poisson(coverage * canvas_width * (canvas_length + length) / (length * max(width, 1)))
    start = rng.uniform(-1.5 * length, canvas_length, count)
    end = start + length * rng.uniform(0.5, 1.5, count)
    row = rng.integers(canvas_width, size=count)
    brightness = rng.uniform(0.3, 1, count).astype(np.float32)
    # Difference array: +brightness at the start, −brightness at the end; cumsum fills the run.
    canvas = np.zeros((canvas_width, canvas_length + 1), np.float32)
    np.add.at(canvas, (row, np.clip(np.rint(start).astype(int), 0, canvas_length)), brightness)
    np.subtract.at(canvas, (row, np.clip(np.rint(end).astype(int), 0, canvas_length)), brightness)
    canvas = canvas.cumsum(axis=1, dtype=np.float32)

    cross_profile = cv2.getGaussianKernel(2 * math.ceil(width) + 3, max(0.5, width / 2.35), cv2.CV_32F)
    cross_profile *= min(1.0, width) / cross_profile.max()  # the centre keeps its brightness if the width is at least 1
    tapered = cv2.blur(canvas, (max(1, round(length / 2)), 1))
    softened = np.minimum(cv2.sepFilter2D(tapered, -1, np.ones(1, np.float32), cross_profile), 1)
    rotation = np.array([[sin, cos, 0], [cos, -sin, 0]])  # from pixels to coordinates along and across the streaks
    rotation[:, 2] = (canvas_length / 2, canvas_width / 2) - rotation[:, :2] @ (w / 2, h / 2)
    rotated = cv2.warpAffine(softened, rotation, (w, h), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return np.asarray(rotated, np.float32)


def _veil(shape: tuple[int, int], rain: Rain, rng: np.random.Generator) -> NDArray[np.float32] | float:
    """Return the opacity of the mist in [0, 1]: patchy, and denser at the top, where scenes are farther away."""
    # Sampled even without a veil, so that the veil does not change the drops.
    patches = rng.uniform(0.7, 1.0, (4, 5)).astype(np.float32)
    if rain.veil == 0:
        return 0.0
    patches *= np.linspace(1.1, 0.7, len(patches), dtype=np.float32)[:, None]
    mist = cv2.resize(patches, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(rain.veil * mist, 0, 1), np.float32)


def _add_lens_drops(scene: Pixels, rain: Rain, rng: np.random.Generator) -> Pixels:
    """Add drops on the lens: each is a small fish-eye image of the scene, upside down and out of focus."""
    if rain.drops == 0:
        return scene
    height, width = scene.shape[:2]
    side = min(height, width)
    blurred = cv2.GaussianBlur(scene, (0, 0), max(0.5, side / 100))
    image = scene.copy()
    for _ in range(rain.drops):
        radius = max(1.0, side * rng.uniform(0.015, 0.05))
        tall_radius = radius * rng.uniform(1.0, 1.3)
        centre = (rng.uniform(0, width), rng.uniform(0, height))
        _add_drop(image, blurred, centre, radius, tall_radius)
    return image


def _add_drop(
    image: Pixels, blurred: NDArray[Any], centre: tuple[float, float], radius: float, tall_radius: float
) -> None:
    """Draw one drop into the image.

    Args:
        image: ``(h, w, 3)``, changed in place.
        blurred: The scene out of focus, same shape.
        centre: x and y of the drop in pixels.
        radius: Horizontal radius in pixels.
        tall_radius: Vertical radius in pixels.
    """
    height, width = image.shape[:2]
    centre_x, centre_y = centre
    left, right = max(0, math.floor(centre_x - 1.3 * radius)), min(width, math.ceil(centre_x + 1.3 * radius) + 1)
    top, bottom = max(0, math.floor(centre_y - tall_radius)), min(height, math.ceil(centre_y + tall_radius) + 1)
    x, y = np.meshgrid(  # from the centre, in radii
        np.asarray((np.arange(left, right) - centre_x) / radius, np.float32),
        np.asarray((np.arange(top, bottom) - centre_y) / tall_radius, np.float32),
    )
    rho = np.hypot(x * (1 - 0.2 * y), y)  # 1 at the rim; drops are wider below than above
    reach = 0.175 * min(height, width) * (1 + rho**2)
    refracted = cv2.remap(
        blurred,
        np.asarray(centre_x - x * reach, np.float32),
        np.asarray(centre_y - y * reach, np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    shade = 1 - 0.45 * np.clip(rho, 0, 1) ** 4 + 0.15 * np.clip(-y, 0, 1)
    opacity = np.clip((1 - rho) * 4, 0, 1)[..., None]
    patch = image[top:bottom, left:right]
    mixed = patch * (1 - opacity) + np.clip(refracted * shade[..., None], 0, 255) * opacity
    image[top:bottom, left:right] = np.rint(mixed).astype(np.uint8)


def image_rng(seed: int, name: str) -> np.random.Generator:
    """Return the random number generator of an image, seeded by ``seed`` and the image's name."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def synthesize(
    clean_folder: Path,
    out: Path,
    limits: tuple[Rain, Rain] = PRESETS["medium"],
    *,
    per_image: int = 1,
    seed: int = 0,
    overwrite: bool = False,
) -> list[str]:
    """Generate a data set of pairs from clean photos.

    Writes ``input/NAME.png`` (``input/NAME_rain1.png``, … for several rainy images per photo), ``target/NAME.png``,
    ``rain.json`` (seed, limits, and the rain of each image) and ``contact_sheet.png`` to ``out``, which is created or
    replaced only once all files are complete.

    Args:
        clean_folder: Folder of clean photos; for photos in subfolders, ``NAME`` includes the path of the subfolder.
        out: Folder of the data set.
        limits: Lower and upper limits of the rain (:data:`PRESETS`); the rain of each image is sampled between them.
        per_image: Number of rainy images per photo, 1 to 1000.
        seed: Seed, at least 0. The rain of an image depends on the seed, the limits, the image and its name, not on
            other images.
        overwrite: Replace ``out`` if it contains a data set written by this function.

    Returns:
        A message for each photo that was skipped because it could not be read.

    Raises:
        DerainError: If ``clean_folder`` is not a folder or contains no readable photo, output files of two photos would
            have the same name, a number is out of range, a lower limit exceeds its upper limit, one folder contains the
            other, or ``out`` is a file, or is not empty and may not be overwritten.
    """
    if not 1 <= per_image <= 1000 or seed < 0:
        raise DerainError(
            f"rain: {per_image} images per photo, seed {seed}; expected 1 to 1000 images and a seed of at least 0"
        )
    _check_folders(clean_folder, out, overwrite)
    sample_rain(*limits, np.random.default_rng())  # checks the order of the limits before any work
    photos = _photos_by_stem(clean_folder, per_image)
    folder = out.resolve()
    temporary = folder.with_name(f".{uuid.uuid4().hex[:8]}-{folder.name}")

    def generate(stem: str) -> dict[str, Rain] | str:
        try:
            photo = read_rgb(photos[stem])
        except DerainError as error:
            return str(error)
        rains = {}
        for number in range(1, per_image + 1):
            name = stem if per_image == 1 else f"{stem}_rain{number}"
            rng = image_rng(seed, name)
            rains[name] = sample_rain(*limits, rng)
            rainy = add_rain(photo, rains[name], rng)
            write_image(temporary / "input" / f"{name}.png", rainy, compress_level=3)
        write_image(temporary / "target" / f"{stem}.png", photo, compress_level=3)
        return rains

    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        results = list(track(threads.map(generate, photos), "Adding rain", len(photos)))
        skipped = [result for result in results if isinstance(result, str)]
        if len(skipped) == len(results):
            raise DerainError(f"{clean_folder}: none of {len(results)} images can be read; first: {skipped[0]}")
        rains_by_photo = {
            stem: result for stem, result in zip(photos, results, strict=True) if not isinstance(result, str)
        }
        _write_record(temporary, rains_by_photo, limits, per_image, seed)
        _write_contact_sheet(temporary, {stem: next(iter(rains)) for stem, rains in rains_by_photo.items()})
        old = temporary.with_name(temporary.name + "-old")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        threads.shutdown(cancel_futures=True)
        shutil.rmtree(temporary, ignore_errors=True)
    return skipped


def _photos_by_stem(clean_folder: Path, per_image: int) -> dict[str, Path]:
    """Return the photos below a folder by relative path without suffix.

    Raises:
        DerainError: If there are no photos, or output files would have the same name.
    """
    files = image_files(clean_folder, recursive=True)
    if not files:
        raise DerainError(f"{clean_folder}: contains no images; give a folder of clean photos")
    photos: dict[str, Path] = {}
    for file in files:
        first = photos.setdefault(file.relative_to(clean_folder).with_suffix("").as_posix(), file)
        if first != file:
            raise DerainError(f"{first} and {file}: both would become the same PNG file; rename one of them")
    if per_image > 1:
        for stem, file in photos.items():
            base, _, number = stem.rpartition("_rain")
            if number.isdecimal() and base in photos:
                raise DerainError(
                    f"{file}: has the name of rainy image {number} of {photos[base].name}; rename one of the photos"
                )
    return photos


def _write_record(
    folder: Path, rains_by_photo: dict[str, dict[str, Rain]], limits: tuple[Rain, Rain], per_image: int, seed: int
) -> None:
    images: dict[str, dict[str, Any]] = {}
    for rains in rains_by_photo.values():
        for name, rain in rains.items():
            images[name] = dataclasses.asdict(rain)
    record = {
        "made by": f"derain {derain.__version__}",
        "seed": seed,
        "per_image": per_image,
        "lower_limits": dataclasses.asdict(limits[0]),
        "upper_limits": dataclasses.asdict(limits[1]),
        "images": images,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _check_folders(clean_folder: Path, out: Path, overwrite: bool) -> None:
    """Check the folders of `synthesize`.

    Raises:
        DerainError: If ``clean_folder`` is not a folder, one folder contains the other, ``out`` is a file, or ``out``
            contains files that are not a generated data set, or one that may not be overwritten.
    """
    if not clean_folder.is_dir():
        raise DerainError(f"{clean_folder}: no such folder; give a folder of clean photos")
    out_path, clean_path = out.resolve(), clean_folder.resolve()
    if out_path.is_relative_to(clean_path) or clean_path.is_relative_to(out_path):
        raise DerainError(f"{out}: inside the folder of clean photos, or contains it; choose another folder")
    if out.exists() and not out.is_dir():
        raise DerainError(f"{out}: is a file; choose another folder")
    if out.exists() and any(out.iterdir()):
        if not (out / RECORD).is_file():
            raise DerainError(
                f"{out}: contains files, but no generated data set ({RECORD}); choose a new or empty folder"
            )
        if not overwrite:
            raise DerainError(f"{out}: already contains a data set; add --overwrite to replace it")


def _write_contact_sheet(folder: Path, names: dict[str, str]) -> None:
    """Write a contact sheet of up to ten pairs, spread over the data set.

    Args:
        folder: Folder of the data set.
        names: Name of a rainy image by the name of its clean image.
    """
    pairs = list(names.items())
    if len(pairs) > 10:
        pairs = [pairs[round(number * (len(pairs) - 1) / 9)] for number in range(10)]
    images = []
    for clean_name, rainy_name in pairs:
        images.append(read_rgb(folder / "target" / f"{clean_name}.png"))
        images.append(read_rgb(folder / "input" / f"{rainy_name}.png"))
    rows = [images[start : start + 4] for start in range(0, len(images), 4)]
    columns = ["clean", "rainy"] * (len(rows[0]) // 2)
    write_image(folder / "contact_sheet.png", contact_sheet(rows, column_labels=columns, cell=320))
