"""Rain for clean photos, deterministic by seed.

A rainy image is the clean one seen through streaks and mist::

    rainy = w · clean + (1 − w) · sky,    w = T · Π_l (1 − S_l)

``S_l`` in [0, 1] is the opacity of the streaks of depth layer ``l``, ``T`` in [0, 1] the transmission of the
veil that distant rain makes, ``sky`` the light that both scatter. This is the heavy rain model
``T · (clean + Σ S_l) + (1 − T) · A`` of Yang et al. (CVPR 2017) and Li et al. (CVPR 2019) with
streaks that are seen through, as Garg and Nayar measured (IJCV 2007), and composed like the screen blend of
Luo et al. (ICCV 2015): sums of streaks do not overflow. A layer's streaks are noise smeared along the fall;
near layers have longer, wider, softer and brighter streaks, far ones shorter, fainter and more. Drops on the
lens show the scene inverted, small and blurred (You et al., TPAMI 2016).

``RandomRain`` of albumentations (lines of one grey and length, without depth) and of kornia are not used:
they import torch, which takes longer than many photos' rain.
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
from derain.images import Pixels, image_files, read_rgb, write_image
from derain.pictures import contact_sheet
from derain.progress import track

SKY = (128, 242)
"""Limits of the light that streaks and veil scatter: dusk, and a bright overcast sky."""

RECORD = "rain.json"

FULL_SIZE = 512
"""Shorter side up to which lengths are plain pixels; in larger photos they grow with it."""


def _field(default: float | int, low: float | int, high: float | int, told: str) -> Any:
    return field(default=default, metadata={"limits": (low, high), "help": told})


@dataclass(frozen=True)
class Rain:
    """The rain of one image.

    Attributes:
        density: Share of the image that streaks cover, all layers together, were none to overlap.
        length: Mean length of the nearest streaks in pixels (of a photo with a shorter side up to 512; in a
            larger one lengths and widths grow with it).
        width: Width of the nearest streaks in pixels.
        angle: Degrees from the vertical; positive falls to the right.
        spread: Standard deviation of the angle from layer to layer, in degrees.
        layers: Number of depth layers.
        brightness: Opacity of the brightest streaks.
        veil: Opacity of the mist that distant rain makes.
        drops: Number of drops on the lens.

    Raises:
        DerainError: If a value is outside its limits.
    """

    density: float = _field(0.3, 0, 4, "share of the image under streaks")
    length: float = _field(40.0, 1, 400, "length of the nearest streaks in pixels")
    width: float = _field(2.0, 0.2, 40, "width of the nearest streaks in pixels")
    angle: float = _field(0.0, -90, 90, "degrees from the vertical, positive falls to the right")
    spread: float = _field(2.0, 0, 45, "deviation of the angle in degrees")
    layers: int = _field(4, 1, 16, "depth layers")
    brightness: float = _field(0.7, 0, 1, "opacity of the brightest streaks")
    veil: float = _field(0.0, 0, 1, "opacity of the mist")
    drops: int = _field(0, 0, 200, "drops on the lens")

    def __post_init__(self) -> None:
        for part in dataclasses.fields(self):
            value, (low, high) = getattr(self, part.name), part.metadata["limits"]
            if not low <= value <= high:
                raise DerainError(f"rain: {part.name} is {value}; expected {low} to {high}")


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
"""Lightest and heaviest rain; each image's is drawn between them.

Chosen to lie where the field's sets lie: on photos the rainy input has a luma PSNR of about 28 dB (light, as
Rain100L), 22 dB (medium, as Rain800) and 15 dB (heavy, as Rain100H).
"""


def sample_rain(lightest: Rain, heaviest: Rain, rng: np.random.Generator) -> Rain:
    """Draws a rain, every parameter uniformly between two.

    Example:
        >>> rain = sample_rain(*PRESETS["light"], np.random.default_rng(0))
        >>> 0.08 <= rain.density <= 0.30 and rain.layers in (2, 3, 4)
        True
    """
    drawn: dict[str, float] = {}
    for part in dataclasses.fields(Rain):
        low, high = getattr(lightest, part.name), getattr(heaviest, part.name)
        if low > high:
            raise DerainError(f"rain: {part.name} from {low} to {high}; give the smaller number first")
        whole = part.type is int
        drawn[part.name] = int(rng.integers(low, high + 1)) if whole else float(rng.uniform(low, high))
    return Rain(**drawn)  # type: ignore[arg-type]


def add_rain(clean: Pixels, rain: Rain, rng: np.random.Generator) -> Pixels:
    """Lets it rain on a photo of any size.

    Args:
        clean: ``(h, w, 3)`` uint8.
        rain: What rain.
        rng: Where the streaks fall; the same state gives the same pixels.

    Returns:
        The rainy photo, ``(h, w, 3)`` uint8.

    Example:
        >>> photo = np.full((32, 48, 3), 90, np.uint8)
        >>> rainy = add_rain(photo, Rain(density=0.2), np.random.default_rng(0))
        >>> rainy.shape, bool(rainy.mean() > photo.mean())
        ((32, 48, 3), True)
    """
    shape = clean.shape[:2]
    through = (1 - streaks(shape, rain, rng)) * (1 - _veil(shape, rain, rng))
    sky = np.full_like(clean, round(float(np.clip(1.5 * np.percentile(clean[::4, ::4], 95), *SKY))))
    rainy = cv2.blendLinear(np.ascontiguousarray(clean), sky, through, 1 - through)
    return _lens_drops(np.asarray(rainy, np.uint8), rain, rng)


def streaks(shape: tuple[int, int], rain: Rain, rng: np.random.Generator) -> NDArray[np.float32]:
    """Opacity of all streaks, ``1 − Π_l (1 − S_l)``.

    Args:
        shape: ``(h, w)`` in pixels.
        rain: What rain; veil and drops are left out.
        rng: Where the streaks fall.

    Returns:
        ``(h, w)`` in [0, 1]; up to ``rain.brightness`` where streaks do not cross.
    """
    through = np.ones(shape, np.float32)
    scale = max(1.0, min(shape) / FULL_SIZE)
    for layer in range(rain.layers):
        near = 1.0 if rain.layers == 1 else 1 - layer / (rain.layers - 1)  # 1 nearest, 0 farthest
        size = scale * (0.35 + 0.65 * near)
        opacity = _layer(
            shape,
            coverage=rain.density / rain.layers,
            length=rain.length * size,
            width=rain.width * size,
            angle=math.radians(rng.normal(rain.angle, rain.spread)),
            rng=rng,
        )
        through *= 1 - rain.brightness * (0.5 + 0.5 * near) * opacity
    return 1 - through


def _layer(
    shape: tuple[int, int],
    *,
    coverage: float,
    length: float,
    width: float,
    angle: float,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Opacity of one layer's streaks in [0, 1].

    Streaks are drawn level on a canvas, as runs of pixels in its rows, each with its own length and
    brightness; then blurred (ends taper, flanks soften) and turned into the fall.
    """
    sin, cos = math.sin(angle), math.cos(angle)
    (h, w), centre = shape, (shape[1] / 2, shape[0] / 2)
    along = math.ceil(abs(w * sin) + abs(h * cos)) + 2
    across = math.ceil(abs(w * cos) + abs(h * sin)) + 2

    count = rng.poisson(coverage * across * (along + length) / (length * max(width, 1)))
    start = rng.uniform(-1.5 * length, along, count)
    end = start + length * rng.uniform(0.5, 1.5, count)
    row = rng.integers(across, size=count)
    bright = rng.uniform(0.3, 1, count).astype(np.float32)
    canvas = np.zeros((across, along + 1), np.float32)
    np.add.at(canvas, (row, np.clip(np.rint(start).astype(int), 0, along)), bright)
    np.subtract.at(canvas, (row, np.clip(np.rint(end).astype(int), 0, along)), bright)
    canvas = canvas.cumsum(axis=1, dtype=np.float32)

    flank = cv2.getGaussianKernel(2 * math.ceil(width) + 3, max(0.5, width / 2.35), cv2.CV_32F)
    flank *= min(1.0, width) / flank.max()  # the middle of a streak keeps its brightness
    tapered = cv2.blur(canvas, (max(1, round(length / 2)), 1))
    level = np.minimum(cv2.sepFilter2D(tapered, -1, np.ones(1, np.float32), flank), 1)
    turn = np.array([[sin, cos, 0], [cos, -sin, 0]])  # a pixel's place along and across the fall
    turn[:, 2] = (along / 2, across / 2) - turn[:, :2] @ centre
    turned = cv2.warpAffine(level, turn, (w, h), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return np.asarray(turned, np.float32)


def _veil(shape: tuple[int, int], rain: Rain, rng: np.random.Generator) -> NDArray[np.float32] | float:
    """Opacity of the mist, 0 to 1: patchy, and denser towards the top, where outdoor photos are deeper."""
    patches = rng.uniform(0.7, 1.0, (4, 5)).astype(np.float32)
    if rain.veil == 0:
        return 0.0
    patches *= np.linspace(1.1, 0.7, len(patches), dtype=np.float32)[:, None]
    mist = cv2.resize(patches, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(rain.veil * mist, 0, 1), np.float32)


def _lens_drops(scene: Pixels, rain: Rain, rng: np.random.Generator) -> Pixels:
    """Puts drops on the lens: each a small fish-eye picture of the scene, upside down and out of focus."""
    if rain.drops == 0:
        return scene
    height, width = scene.shape[:2]
    side = min(height, width)
    blurred = cv2.GaussianBlur(scene, (0, 0), max(0.5, side / 100))
    image = scene.copy()
    for _ in range(rain.drops):
        radius, tall = max(1.0, side * rng.uniform(0.015, 0.05)), rng.uniform(1.0, 1.3)
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        left, right = max(0, math.floor(x - 1.3 * radius)), min(width, math.ceil(x + 1.3 * radius) + 1)
        top, bottom = max(0, math.floor(y - radius * tall)), min(height, math.ceil(y + radius * tall) + 1)
        across, down = np.meshgrid(
            np.asarray((np.arange(left, right) - x) / radius, np.float32),
            np.asarray((np.arange(top, bottom) - y) / (radius * tall), np.float32),
        )
        rho = np.hypot(across * (1 - 0.2 * down), down)  # 1 at the rim; drops hang, wider below than above
        reach = 0.175 * side * (1 + rho**2)
        seen = cv2.remap(
            blurred,
            np.asarray(x - across * reach, np.float32),
            np.asarray(y - down * reach, np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        shade = 1 - 0.45 * np.clip(rho, 0, 1) ** 4 + 0.15 * np.clip(-down, 0, 1)
        opacity = np.clip((1 - rho) * 4, 0, 1)[..., None]
        patch = image[top:bottom, left:right]
        mixed = patch * (1 - opacity) + np.clip(seen * shade[..., None], 0, 255) * opacity
        image[top:bottom, left:right] = np.rint(mixed).astype(np.uint8)
    return image


def rain_generator(seed: int, name: str) -> np.random.Generator:
    """Randomness of one image: depends on the seed and the image's name, not on the images around it."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def synthesize(
    clean: Path,
    out: Path,
    rain: tuple[Rain, Rain] = PRESETS["medium"],
    *,
    per_image: int = 1,
    seed: int = 0,
    overwrite: bool = False,
) -> list[str]:
    """Makes a set of pairs from clean photos.

    ``out`` gets ``input/NAME.png`` (``input/NAME_rain1.png``, … for several rains an image),
    ``target/NAME.png``, ``rain.json`` (everything needed to make the set again, and each image's rain) and
    ``contact_sheet.png``. It appears when all is written.

    Args:
        clean: Folder of clean photos; those in folders below keep their place.
        out: Folder of the set.
        rain: Lightest and heaviest rain (:data:`PRESETS`); each image's is drawn between them.
        per_image: Number of rainy images for each clean one.
        seed: Another seed gives other rain. An image's rain depends on the seed and its name alone.
        overwrite: Replace ``out`` if it holds a set that this function made.

    Returns:
        One line for each photo that could not be read, and was left out.

    Raises:
        DerainError: If there are no photos that can be read, two have one name, a number is out of range, or
            ``out`` is not empty.
    """
    if not 1 <= per_image <= 1000 or seed < 0:
        raise DerainError(f"rain: {per_image} images each, seed {seed}; expected 1 to 1000 and at least 0")
    _check_folders(clean, out, overwrite)
    files = image_files(clean, recursive=True)
    if not files:
        raise DerainError(f"{clean}: no images in it; give a folder of clean photos")
    stems: dict[str, Path] = {}
    for file in files:
        first = stems.setdefault(file.relative_to(clean).with_suffix("").as_posix(), file)
        if first != file:
            raise DerainError(f"{first} and {file}: both would become one PNG; rename one of them")
    if per_image > 1:
        for stem, file in stems.items():
            base, _, number = stem.rpartition("_rain")
            if number.isdecimal() and base in stems:
                raise DerainError(
                    f"{file}: would be the clean image of rain {number} on {stems[base].name}; rename one of them"
                )
    sample_rain(*rain, np.random.default_rng())  # refuses limits the wrong way round before any work

    place = out.resolve()
    temporary = place.with_name(f".{uuid.uuid4().hex[:8]}-{place.name}")

    def make(stem: str) -> dict[str, Rain] | str:
        try:
            photo = read_rgb(stems[stem])
        except DerainError as error:
            return str(error)
        drawn = {}
        for index in range(1, per_image + 1):
            name = stem if per_image == 1 else f"{stem}_rain{index}"
            rng = rain_generator(seed, name)
            drawn[name] = sample_rain(*rain, rng)
            rainy = add_rain(photo, drawn[name], rng)
            write_image(temporary / "input" / f"{name}.png", rainy, compress_level=3)
        write_image(temporary / "target" / f"{stem}.png", photo, compress_level=3)
        return drawn

    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        done = list(track(threads.map(make, stems), "Raining", len(stems)))
        broken = [result for result in done if isinstance(result, str)]
        if len(broken) == len(done):
            raise DerainError(f"{clean}: none of {len(done)} images can be read; first: {broken[0]}")
        drawn = {stem: result for stem, result in zip(stems, done, strict=True) if not isinstance(result, str)}
        record = {
            "made by": f"derain {derain.__version__}",
            "seed": seed,
            "per_image": per_image,
            "lightest": dataclasses.asdict(rain[0]),
            "heaviest": dataclasses.asdict(rain[1]),
            "images": {name: dataclasses.asdict(its) for each in drawn.values() for name, its in each.items()},
        }
        (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _write_sheet(temporary, {stem: next(iter(each)) for stem, each in drawn.items()})
        old = temporary.with_name(temporary.name + "-old")
        if place.exists():
            place.rename(old)
        temporary.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        threads.shutdown(cancel_futures=True)
        shutil.rmtree(temporary, ignore_errors=True)
    return broken


def _check_folders(clean: Path, out: Path, overwrite: bool) -> None:
    """Refuses folders that are absent, lie within each other, or whose content would be lost."""
    if not clean.is_dir():
        raise DerainError(f"{clean}: no such folder; give a folder of clean photos")
    ours, theirs = out.resolve(), clean.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise DerainError(f"{out}: lies in the folder of clean photos, or holds it; choose another folder")
    if out.exists() and not out.is_dir():
        raise DerainError(f"{out}: is a file; choose another folder")
    if out.exists() and any(out.iterdir()):
        if not (out / RECORD).is_file():
            raise DerainError(f"{out}: holds files of something else; choose an empty or a new folder")
        if not overwrite:
            raise DerainError(f"{out}: holds a set already; add --overwrite to replace it")


def _write_sheet(folder: Path, rainy: dict[str, str]) -> None:
    """Writes a contact sheet of up to ten pairs, spread over the set.

    Args:
        folder: The set's folder.
        rainy: Name of the clean image to name of the rainy one.
    """
    names = list(rainy.items())
    chosen = [names[round(i * (len(names) - 1) / 9)] for i in range(10)] if len(names) > 10 else names
    images = [
        read_rgb(folder / kind / f"{name}.png")
        for pair in chosen
        for kind, name in zip(("target", "input"), pair, strict=True)
    ]
    rows = [images[start : start + 4] for start in range(0, len(images), 4)]
    columns = ["clean", "rainy"] * (len(rows[0]) // 2)
    write_image(folder / "contact_sheet.png", contact_sheet(rows, columns=columns, cell=320))
