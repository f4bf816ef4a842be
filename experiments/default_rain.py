"""Many kinds of rain on crops of clean photos, for the training of the bundled models by ``default_model.py``.

Gamma, contrast, colour of the light, mist that stays and lamps at night act before the rain. Tone, blur, sharpening,
noise and JPEG act on the rainy crop and its target alike, so that the network removes rain and nothing else.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from derain.data.rain import Rain, streaks
from derain.errors import DerainError

Crop = NDArray[np.float32]
"""Crop of a photo, ``(h, w, 3)`` in [0, 1]."""

Map = NDArray[np.float32]
"""One value per pixel, ``(h, w)``, such as the opacity of streaks: at least 0, and possibly above 1."""

Rng = np.random.Generator

AT_NIGHT = 0.2
"""Probability that a crop is darkened and lit by lamps."""

WITHOUT_RAIN = 0.1
"""Probability that no rain is added to a crop, by default."""


def log_uniform(rng: Rng, low: float, high: float) -> float:
    """Return a number whose logarithm is distributed uniformly."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


class RainPairs:
    """Makes pairs of a rainy and a clean crop.

    Args:
        measured: Files of grey images of streaks on black, such as those of Garg and Nayar (2006).
        shares: Relative share of each kind of streaks, by the name of the method that makes it: ``measured``,
            ``noise``, ``drawn``, ``fine``, ``hard``.
        without_rain: Probability that no rain is added to a crop.

    Raises:
        DerainError: If ``measured`` is empty, or one of the images cannot be read.
    """

    def __init__(self, measured: Sequence[Path], shares: dict[str, float], without_rain: float = WITHOUT_RAIN) -> None:
        if not measured:
            raise DerainError("no images of measured streaks; expected .png files in the folder Streaks of the data")
        self.shares, self.without_rain = shares, without_rain
        self.images = [cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) for file in measured]
        for file, image in zip(measured, self.images, strict=True):
            if image is None:
                raise DerainError(f"{file}: cannot be read; expected an image of streaks on black")

    def pair(self, clean: Crop, rng: Rng, side: int) -> tuple[Crop, Crop]:
        """Return a rainy crop and its target, both ``side`` pixels wide and high.

        Args:
            clean: Square crop, at least ``side`` pixels wide; larger ones are reduced after the rain.
            rng: Random number generator.
            side: Side of the results in pixels.
        """
        clean, lamps = change_light(clean, rng), None
        if rng.random() < AT_NIGHT:
            lamps = lamplight(clean.shape[:2], rng)
            clean = np.clip(clean * lamps, 0, 1)
        elif rng.random() < 0.15:  # mist that stays
            clean = add_mist(clean, rng, rng.uniform(0.05, 0.35))
        rainy = clean if rng.random() < self.without_rain else self.add_rain(clean, rng, lamps=lamps)
        if len(clean) != side:
            rainy, clean = (cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA) for crop in (rainy, clean))
        return take_photo(rainy, clean, rng)

    def add_rain(self, clean: Crop, rng: Rng, kind: str | None = None, lamps: Crop | None = None) -> Crop:
        """Return the crop with rain of a kind, by default a random one.

        A mean opacity above a random limit of 0.3 to 0.45 is reduced to this limit.

        Args:
            clean: The crop.
            rng: Random number generator.
            kind: Kind of rain.
            lamps: Light at night, from `lamplight`, ``(h, w, 3)``, which streaks reflect; in half of the crops, they
                also reflect light from outside the crop. None: rain by day.
        """
        if kind is None:
            shares = np.array(list(self.shares.values()))
            kind = list(self.shares)[rng.choice(len(shares), p=shares / shares.sum())]
        opacity = getattr(self, kind)(clean.shape[:2], rng)
        if rng.random() < 0.25:
            opacity = opacity * smooth_noise(opacity.shape, rng, 0.2, 1.2)
        mean_opacity = float(np.minimum(opacity, 1).mean())
        opacity = opacity * min(1.0, rng.uniform(0.3, 0.45) / max(1e-6, mean_opacity))
        if lamps is not None:
            light = lamps * rng.uniform(0.6, 1.2) + (rng.uniform(0.05, 0.5) if rng.random() < 0.5 else 0)
            return np.clip(clean + opacity[..., None] * light, 0, 1).astype(np.float32)
        density = float(min(1.0, 4 * opacity.mean()))
        if rng.random() < 0.35:  # mist of distant rain, which is removed with it
            clean = add_mist(clean, rng, rng.uniform(0, 0.3) * (0.3 + 0.7 * density))
        return blend(clean, opacity[..., None], rng)

    def measured(self, shape: tuple[int, int], rng: Rng) -> Map:
        """Return the sum of parts of one or two measured images: resized, rotated, mirrored, with another contrast."""
        height, width = shape
        total = np.zeros(shape, np.float32)
        for _ in range(2 if rng.random() < 0.35 else 1):
            image = self.images[rng.integers(len(self.images))]
            scale, angle = log_uniform(rng, 0.5, 1.8), rng.uniform(-25, 25)
            centre = (rng.uniform(0, image.shape[1]), rng.uniform(0, image.shape[0]))
            matrix = cv2.getRotationMatrix2D((0, 0), angle, 1 / scale)
            matrix[:, 0] *= -1 if rng.random() < 0.5 else 1
            matrix[:, 2] = centre - matrix[:, :2] @ (width / 2, height / 2)
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            part = cv2.warpAffine(image, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
            total += part.astype(np.float32) / 255 * rng.uniform(0.6, 2.2)
        if rng.random() < 0.3:
            total = cv2.GaussianBlur(total, (0, 0), rng.uniform(0.3, 1.5))
        return np.minimum(total, 1.3)

    def noise(self, shape: tuple[int, int], rng: Rng) -> Map:
        """Return layers of sparse noise, smeared along lines, as rain is drawn with photo editors."""
        layers = int(rng.integers(1, 4)) if rng.random() < 0.75 else int(rng.integers(3, 7))
        main_angle = rng.uniform(-45, 45) if rng.random() < 0.8 else rng.uniform(-75, 75)
        spread = rng.choice([1.0, 4.0, 25.0], p=[0.5, 0.3, 0.2])
        total = np.zeros(shape, np.float32)
        max_density = 0.06 if rng.random() < 0.3 else 0.02
        for _ in range(layers):
            length, density = log_uniform(rng, 5, 70), log_uniform(rng, 0.001, max_density)
            kernel = line(length, rng.normal(main_angle, spread), rng.uniform(0.25, 0.6))
            layer = smeared_points(shape, density, kernel, rng)
            sigma = rng.uniform(0.3, 1.6) if rng.random() < 0.85 else rng.uniform(1.6, 4.0)
            if sigma > 0.45:
                layer = cv2.GaussianBlur(layer, (0, 0), sigma) * (1 + 1.2 * sigma)  # wide streaks are not fainter
            if rng.random() < 0.2:
                layer = np.clip((layer - 0.15) * 2.5, 0, 1)  # hard edges
            total += layer * rng.uniform(0.25, 1.3)
        return np.minimum(total, 1.3)

    def fine(self, shape: tuple[int, int], rng: Rng) -> Map:
        """Return short, soft, half-transparent streaks and drops, as in photos with exposures of 1/100 s or less."""
        angle, spread = rng.normal(0, 15), rng.choice([1.0, 4.0, 10.0])
        total = np.zeros(shape, np.float32)
        for _ in range(int(rng.integers(1, 4))):
            is_drops = rng.random() < 0.15
            length = log_uniform(rng, 1, 5) if is_drops else log_uniform(rng, 4, 28)
            thickness = rng.uniform(0.5, 1.6) if is_drops else log_uniform(rng, 0.3, 1.4)
            kernel = line(length, rng.normal(angle, spread), thickness)
            covered = log_uniform(rng, 0.02, 0.5)  # share of the pixels that have a streak
            layer = smeared_points(shape, min(0.06, covered / float(kernel.sum())), kernel, rng)
            if thickness > 0.8 or rng.random() < 0.5:  # streaks fade out towards their ends
                layer = cv2.GaussianBlur(layer, (0, 0), rng.uniform(0.4, 1.2))
            total += np.minimum(layer, 1) * log_uniform(rng, 0.08, 0.9)
        return np.minimum(total, 1.3)

    def hard(self, shape: tuple[int, int], rng: Rng) -> Map:
        """Return lines of one opacity, length and thickness, with hard edges, as simple programs draw rain."""
        height, width = shape
        lines = np.zeros(shape, np.uint8)
        length, angle, spread = log_uniform(rng, 6, 90), rng.uniform(-40, 40), rng.choice([0.0, 3.0])
        thickness = int(rng.integers(1, 4))
        line_type = cv2.LINE_AA if rng.random() < 0.4 else cv2.LINE_8
        for _ in range(int(log_uniform(rng, 0.02, 0.4) * height * width / (length * thickness)) + 1):
            direction = math.radians(rng.normal(angle, spread))
            x, y = rng.uniform(-length, width), rng.uniform(-length, height)
            end = (int(x + length * math.sin(direction)), int(y + length * math.cos(direction)))
            cv2.line(lines, (int(x), int(y)), end, 255, thickness, line_type)
        return lines.astype(np.float32) / 255 * np.float32(rng.uniform(0.3, 1.2))

    def drawn(self, shape: tuple[int, int], rng: Rng) -> Map:
        """Return streaks of `derain data synthesize`, in wider ranges than its presets."""
        rain = Rain(
            density=log_uniform(rng, 0.04, 2.2 if rng.random() < 0.35 else 0.6),
            length=log_uniform(rng, 8, 160),
            width=log_uniform(rng, 0.7, 5.0),
            angle=rng.uniform(-45, 45),
            spread=rng.choice([0.5, 3.0, 12.0, 30.0], p=[0.35, 0.35, 0.2, 0.1]),
            layers=int(rng.integers(1, 7)),
            brightness=rng.uniform(0.2, 1.0),
        )
        return streaks(shape, rain, rng)


def blend(clean: Crop, opacity: NDArray[np.float32], rng: Rng) -> Crop:
    """Return a crop with streaks by day: added (40 %), screened (20 %), or showing the light of the sky (40 %).

    Args:
        clean: The crop.
        opacity: Opacity of the streaks, ``(h, w, 1)``.
        rng: Random number generator.
    """
    tint = 1 + rng.normal(0, 0.03, 3).astype(np.float32) if rng.random() < 0.5 else np.float32(1)
    blend_mode = rng.random()
    if blend_mode < 0.4:
        rainy = clean + opacity * tint * rng.uniform(0.7, 1.0)
    elif blend_mode < 0.6:
        rainy = clean + np.minimum(opacity, 1) * (1 - clean) * tint
    else:
        sky = np.clip(rng.uniform(0.9, 1.6) * np.percentile(clean, 92), 0.35, 1.0) * tint
        opacity = np.minimum(opacity, 0.95)
        rainy = clean * (1 - opacity) + sky * opacity
    return np.clip(rainy, 0, 1).astype(np.float32)


def smeared_points(shape: tuple[int, int], density: float, kernel: Map, rng: Rng) -> Map:
    """Return random points of random brightness, convolved with a kernel; ``density`` is their number per pixel."""
    height, width = shape
    margin = len(kernel) // 2
    values = rng.random((height + 2 * margin, width + 2 * margin), np.float32)
    points = np.where(values < density, rng.uniform(0.3, 1.0, values.shape), 0).astype(np.float32)
    smeared = cv2.filter2D(points, -1, kernel, borderType=cv2.BORDER_REFLECT)
    return smeared[margin : margin + height, margin : margin + width]


def line(length: float, angle: float, thickness: float) -> Map:
    """Return the kernel of a soft line through the middle, with values up to 1.

    Args:
        length: Length in pixels.
        angle: Degrees from the vertical.
        thickness: Standard deviation of the profile across the line, in pixels.
    """
    half = math.ceil(length / 2) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    sin, cos = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    profile = np.exp(-0.5 * ((x * cos - y * sin) / thickness) ** 2)
    ends = np.clip(length / 2 + 0.5 - np.abs(x * sin + y * cos), 0, 1)
    return (profile * ends).astype(np.float32)


def smooth_noise(shape: tuple[int, ...], rng: Rng, low: float, high: float) -> Map:
    """Return a smooth map ``(h, w)`` through ``4 × 4`` random values from ``low`` to ``high``; at least 0."""
    grid = rng.uniform(low, high, (4, 4)).astype(np.float32)
    return cv2.resize(grid, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC).clip(0, None)


def add_mist(image: Crop, rng: Rng, opacity: float) -> Crop:
    """Return an image blended with the light of the sky, unevenly: about 0.6 to 1.1 times ``opacity``."""
    light = np.clip(rng.uniform(0.9, 1.4) * np.percentile(image, 90), 0.4, 0.97)
    share = np.clip(smooth_noise(image.shape, rng, 0.6, 1.1) * opacity, 0, 1)[..., None]
    return (image * (1 - share) + light * share).astype(np.float32)


def lamplight(shape: tuple[int, int], rng: Rng) -> Crop:
    """Return factors of the light at night, ``(h, w, 3)``: low everywhere, and higher around up to three lamps."""
    y, x = np.mgrid[0:1:16j, 0:1:16j].astype(np.float32)
    light = rng.uniform(0.08, 0.45) * rng.uniform(0.85, 1.15, 3) * np.ones((16, 16, 1))
    for _ in range(int(rng.integers(4))):
        colour = (1.0, rng.uniform(0.7, 1.0), rng.uniform(0.4, 1.0)) if rng.random() < 0.7 else rng.uniform(0.4, 1.0, 3)
        distance = np.hypot(x - rng.uniform(-0.2, 1.2), y - rng.uniform(-0.2, 1.2))
        near = np.exp(-0.5 * (distance / log_uniform(rng, 0.1, 0.6)) ** 2)
        light += near[..., None] * colour * rng.uniform(0.2, 1.0)
    return cv2.resize(light.astype(np.float32), (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def change_light(image: Crop, rng: Rng) -> Crop:
    """Return an image with changed gamma, colour of the light, and contrast; each is changed with some probability."""
    if rng.random() < 0.4:
        image = image ** np.float32(log_uniform(rng, 0.6, 1.9))
    if rng.random() < 0.3:
        image = np.clip(image * rng.uniform(0.9, 1.1, 3).astype(np.float32), 0, 1)
    if rng.random() < 0.2:
        image = np.clip((image - 0.5) * rng.uniform(0.7, 1.2) + 0.5 + rng.uniform(-0.08, 0.08), 0, 1)
    return image.astype(np.float32)


def take_photo(rainy: Crop, clean: Crop, rng: Rng) -> tuple[Crop, Crop]:
    """Return both crops rounded to 8 bits; some pairs are toned, blurred, sharpened, noisy or compressed."""
    crops = [rainy, clean]
    if rng.random() < 0.25:
        crops = change_tone(crops, rng)
    if rng.random() < 0.1:
        sigma = rng.uniform(0.4, 1.0)
        crops = [cv2.GaussianBlur(crop, (0, 0), sigma) for crop in crops]
    elif rng.random() < 0.25:
        crops = sharpen(crops, rng.uniform(0.5, 1.2), rng.uniform(0.2, 1.0))
    if rng.random() < 0.25:
        grain = rng.normal(0, rng.uniform(0.5, 6) / 255, clean.shape).astype(np.float32)
        crops = [crop + grain for crop in crops]
    pixels = [np.rint(np.clip(crop, 0, 1) * 255).astype(np.uint8) for crop in crops]
    if rng.random() < 0.5:
        quality = int(log_uniform(rng, 30, 98))
        rows_outside, columns_outside = rng.integers(8, size=2)
        pixels = [compress(crop, quality, rows_outside, columns_outside) for crop in pixels]
    rainy, clean = (crop.astype(np.float32) / 255 for crop in pixels)
    return rainy, clean


def change_tone(crops: list[Crop], rng: Rng) -> list[Crop]:
    """Return a pair of crops with equally changed gamma, contrast and saturation; a tenth of the pairs is grey."""
    gamma, contrast = np.float32(log_uniform(rng, 0.7, 1.5)), rng.uniform(0.8, 1.4)
    saturation = rng.uniform(0.5, 1.6) if rng.random() < 0.9 else 0.0
    toned = [np.clip(crop, 0, 1) ** gamma for crop in crops]
    middle = float(toned[1].mean())
    toned = [np.clip((crop - middle) * contrast + middle, 0, 1) for crop in toned]
    grey = [crop.mean(2, keepdims=True) for crop in toned]
    return [(mean + (crop - mean) * saturation).astype(np.float32) for crop, mean in zip(toned, grey, strict=True)]


def sharpen(crops: list[Crop], sigma: float, amount: float) -> list[Crop]:
    """Return crops sharpened by an unsharp mask, as programs that reduce photos do."""
    return [crop + amount * (crop - cv2.GaussianBlur(crop, (0, 0), sigma)) for crop in crops]


def compress(image: NDArray[np.uint8], quality: int, rows_outside: int, columns_outside: int) -> NDArray[np.uint8]:
    """Return an image compressed as JPEG, with blocks that start anywhere, as in a crop of a compressed photo.

    Args:
        image: ``(h, w, 3)`` uint8.
        quality: JPEG quality, 1 to 100.
        rows_outside: Number of rows of the first block that are outside the image, 0 to 7.
        columns_outside: The same for columns.
    """
    padded = cv2.copyMakeBorder(image, rows_outside, 0, columns_outside, 0, cv2.BORDER_REFLECT_101)
    encoded = cv2.imencode(".jpg", padded[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]  # OpenCV expects BGR
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[rows_outside:, columns_outside:, ::-1]
