"""Ranges of the rain and of the camera's degradations that are added to clean images during training."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from derain.data.rain import PRESETS
from derain.errors import DerainError

Number = float | int
Range = tuple[Number, Number]

LIMITS: Mapping[str, Range] = {
    "density": (0, 4),
    "length": (1, 400),
    "width": (0.2, 40),
    "angle": (-90, 90),
    "spread": (0, 45),
    "layers": (1, 16),
    "brightness": (0, 1),
    "mean_opacity": (0.01, 1),
    "veil": (0, 1),
    "mist": (0, 1),
    "drops": (1, 64),
    "gamma": (0.2, 5),
    "gain": (0.2, 5),
    "defocus": (0.1, 5),
    "noise": (0, 100),
    "resampling": (0.1, 1),
    "jpeg": (1, 100),
}
"""Smallest and largest value that each range of `RainRanges` may contain."""

COUNTS = frozenset({"layers", "drops"})
"""Ranges of integers."""


@dataclass(frozen=True)
class RainRanges:
    """Ranges from which the degradations of each training sample are drawn.

    A range is its lower and its upper limit. ``density``, ``length``, ``width``, ``spread`` and ``gamma`` are drawn
    uniformly in their logarithm, from a lower limit of at least a thousandth of the upper one; the others uniformly. A
    share is the probability that a sample has a property, 0 to 1. The defaults are the preset ``varied``.

    Attributes:
        density: Total area of the streaks of all depth layers, divided by the image area; a layer has at most 0.53.
        length: Mean length of the streaks of the nearest layer in pixels, increased to 5 times their width if it is
            less; the length decreases to 0.35 times this length in the farthest layer.
        width: Width of the streaks of the nearest layer in pixels; it decreases to 0.35 times this width in the
            farthest layer.
        angle: Degrees from the vertical, positive for rain that falls to the right.
        oblique_share: Share whose angle is multiplied by 1.6, and limited to -90° to 90°.
        spread: Standard deviation of the layers' angles around ``angle``, in degrees.
        layers: Number of depth layers, an integer.
        brightness: Opacity of the brightest streaks; half of it in the farthest layer.
        hard_share: Share whose streaks have sharp edges.
        mean_opacity: Upper bound of the mean opacity of the streaks in an image; a higher mean is scaled down to it.
        added_share: Share whose streaks are added to the image, ``clean + S``.
        screened_share: Share whose streaks are blended by ``clean + S (1 - clean)``; the streaks of the others show
            the light of the sky, ``clean (1 - S) + S sky``.
        measured_share: Share with streaks from ``streak_images``; 1 by default in a YAML file with ``streak_images``.
        clear_share: Share without streaks and veil. If such a sample has no drops either, its rainy image equals the
            clean one.
        veil: Opacity of the mist of distant rain in an image of dense streaks, and less in others; it is multiplied by
            about 0.6 to 1.1 in parts of the image.
        veil_share: Share with such a veil, among the samples with rain.
        mist: Opacity of mist that is not to be removed, in the rainy and in the clean image; it is multiplied by about
            0.6 to 1.1 in parts of the image.
        mist_share: Share with such mist.
        drops: Number of drops on the lens, an integer.
        drops_share: Share with drops.
        gamma: Exponent of the exposure, ``image ** gamma``, before the rain is added, so that it changes both images.
        gamma_share: Share with such an exposure.
        gain: Factor of each colour channel before the rain is added, so that it changes both images.
        gain_share: Share with such factors.
        defocus: Standard deviation of the Gaussian blur of both images, in pixels.
        defocus_share: Share with such a blur.
        noise: Standard deviation of the sensor noise of both images, in grey levels of 255.
        noise_share: Share with noise.
        resampling: Scale to which both images are reduced before they are enlarged again; the same for all samples of a
            batch.
        resampling_share: Share with such a loss of resolution.
        jpeg: JPEG quality of both images.
        jpeg_share: Share with JPEG compression.
        streak_images: Folder of images of streaks on black; in a YAML file, relative to the folder of that file. By
            default, all streaks are synthesized.

    Raises:
        DerainError: If a value is outside its limits, ``added_share`` and ``screened_share`` exceed 1 together, or one
            of ``measured_share`` and ``streak_images`` is given without the other.
    """

    density: Range = (0.03, 1.2)
    length: Range = (5, 160)
    width: Range = (0.3, 5)
    angle: Range = (-45, 45)
    oblique_share: Number = 0.1
    spread: Range = (0.5, 20)
    layers: Range = (1, 6)
    brightness: Range = (0.2, 1)
    hard_share: Number = 0.2
    mean_opacity: Range = (0.3, 0.45)
    added_share: Number = 0.4
    screened_share: Number = 0.2
    measured_share: Number = 0
    clear_share: Number = 0.16
    veil: Range = (0, 0.3)
    veil_share: Number = 0.35
    mist: Range = (0.05, 0.35)
    mist_share: Number = 0.08
    drops: Range = (1, 8)
    drops_share: Number = 0.05
    gamma: Range = (0.6, 1.9)
    gamma_share: Number = 0.4
    gain: Range = (0.94, 1.06)
    gain_share: Number = 0.3
    defocus: Range = (0.4, 1)
    defocus_share: Number = 0.1
    noise: Range = (0.5, 6)
    noise_share: Number = 0.25
    resampling: Range = (0.5, 0.9)
    resampling_share: Number = 0.1
    jpeg: Range = (60, 98)
    jpeg_share: Number = 0.5
    streak_images: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check(name, value)
        if self.added_share + self.screened_share > 1:
            raise DerainError(
                f"--data.rain: added_share {self.added_share} and screened_share {self.screened_share}: expected a sum "
                "of at most 1"
            )
        if self.measured_share and self.streak_images is None:
            raise DerainError(
                f"--data.rain: measured_share {self.measured_share} without streak_images; set streak_images"
            )
        if self.streak_images is not None and not self.measured_share:
            raise DerainError(
                f"--data.rain: streak_images {self.streak_images} are not used with measured_share 0; increase it"
            )


def _is_number(value: Any, limits: Range) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and limits[0] <= value <= limits[1]  # NaN compares false


def _check(name: str, value: Any) -> None:
    """Check the value of a field.

    Raises:
        DerainError: If a range is not two numbers within `LIMITS`, the smaller one first; if a range in `COUNTS` is not
            of integers; or if a share is not in 0 to 1.
    """
    if name == "streak_images":
        return
    if name not in LIMITS:
        if not _is_number(value, (0, 1)):
            raise DerainError(f"--data.rain: {name} {value}: expected a share, 0 to 1")
        return
    limits = LIMITS[name]
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(bound, limits) for bound in value)
    if not is_pair or value[0] > value[1]:
        raise DerainError(
            f"--data.rain: {name} {value}: expected two numbers of {limits[0]} to {limits[1]}, the smaller one first"
        )
    if name in COUNTS and not all(float(number).is_integer() for number in value):
        raise DerainError(f"--data.rain: {name} {value}: expected integers")


RAIN_ALONE = {field.name: 0.0 for field in dataclasses.fields(RainRanges) if field.name.endswith("_share")}
"""Zero for all shares: no other degradations, and streaks that show the light of the sky, as in `derain.data.rain`."""


def _preset(name: str) -> RainRanges:
    """Return a preset of `derain.data.rain` as ranges, without other degradations."""
    low, high = PRESETS[name]
    names = ("density", "length", "width", "angle", "spread", "layers", "brightness", "veil")
    ranges = {parameter: (getattr(low, parameter), getattr(high, parameter)) for parameter in names}
    shares = RAIN_ALONE | {"veil_share": float(high.veil > 0)}
    return RainRanges(**ranges, **shares, mean_opacity=(1, 1))  # type: ignore[arg-type]


RAIN_RANGES: Mapping[str, RainRanges] = {**{name: _preset(name) for name in PRESETS}, "varied": RainRanges()}
"""Ranges by preset: ``light``, ``medium`` and ``heavy`` add rain alone; ``varied`` adds all degradations."""


def read_rain(value: str) -> RainRanges:
    """Return the ranges that ``--data.rain`` names.

    Args:
        value: A preset, ``folder:PATH`` with images of streaks, or a YAML file of ranges.

    Raises:
        DerainError: If there is no such preset, folder or file, or the file has unknown or invalid values.

    Example:
        >>> read_rain("light").layers
        (2, 4)
    """
    if value in RAIN_RANGES:
        return RAIN_RANGES[value]
    if value.startswith("folder:"):
        folder = Path(value.removeprefix("folder:")).expanduser()
        if not folder.is_dir():
            raise DerainError(f"--data.rain {value}: no such folder; expected images of streaks on black")
        return RainRanges(measured_share=1, streak_images=str(folder))
    file = Path(value).expanduser()
    if file.suffix not in {".yaml", ".yml"}:
        raise DerainError(
            f"--data.rain {value}: expected off, {', '.join(RAIN_RANGES)}, folder:PATH, or a YAML file of ranges"
        )
    return _read_file(file)


def _read_file(file: Path) -> RainRanges:
    """Return the ranges of a YAML file; omitted values are those of its ``preset``, by default ``varied``.

    Raises:
        DerainError: If the file cannot be read, or has unknown or invalid values.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DerainError(f"--data.rain {file}: cannot be read ({reason}); expected a YAML file of ranges") from error
    if not isinstance(content, dict):
        raise DerainError(f"--data.rain {file}: is not a mapping; expected ranges, such as length: [5, 60]")
    values = dict(content)
    preset = values.pop("preset", "varied")
    if not isinstance(preset, str) or preset not in RAIN_RANGES:
        raise DerainError(f"--data.rain {file}: preset {preset}: expected one of {', '.join(RAIN_RANGES)}")
    names = {field.name for field in dataclasses.fields(RainRanges)}
    unknown = sorted(map(str, set(values) - names))
    if unknown:
        raise DerainError(f"--data.rain {file}: {unknown[0]}: unknown key; expected {', '.join(sorted(names))}")
    streak_images = values.get("streak_images")
    if streak_images is not None:
        folder = file.parent / Path(str(streak_images)).expanduser()
        if not folder.is_dir():
            raise DerainError(
                f"--data.rain {file}: streak_images {streak_images}: no such folder (relative to the file)"
            )
        values["streak_images"] = str(folder)
        values.setdefault("measured_share", 1)
    for name, value in values.items():
        _check(name, value)
    ranges: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return dataclasses.replace(RAIN_RANGES[preset], **ranges)
