"""Opacity of rain streaks in batches of images, on any device.

The plane is divided into lanes along the direction of the rain, and each lane into cells. A cell contains at most one
streak, of random length and brightness, with tapered ends. The opacity is evaluated in closed form at every pixel along
the lanes, without blurring, and interpolated linearly at the pixels of the image. So the profile across a streak is a
triangle, whose width at half of the maximum is the distance between neighbouring lanes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from derain.errors import DerainError
from derain.images import read_rgb
from derain.listing import image_files

MEAN_FRACTION = 0.75
"""Mean share of a cell's length that its streak covers; shares are uniform in 0.5 to 1."""
TAPER = 0.25
"""Share of a streak's length at each end along which its opacity decreases to 0."""
LENGTH_FACTOR = 61
"""Factor of a streak's random number. The number determines the brightness; the fractional part of its product with
the factor determines the length."""
MAX_PRESENCE = 0.95
"""Upper limit of the probability that a cell contains a streak; the coverage of a layer is therefore at most 0.53."""


class StreakLayers(NamedTuple):
    """Depth layers of streaks, ``(n,)`` each.

    Attributes:
        angle: Angle from the vertical in radians, positive for rain that falls to the right.
        length: Mean length of the streaks in pixels.
        width: Width of the streaks in pixels.
        coverage: Area of the streaks, divided by the image area; values above 0.53 have the same effect as 0.53.
    """

    angle: Float[Tensor, " n"]
    length: Float[Tensor, " n"]
    width: Float[Tensor, " n"]
    coverage: Float[Tensor, " n"]


class Lanes(NamedTuple):
    """Random lanes and cells of streaks.

    Attributes:
        offset: ``(n,)``: shift of the lanes across their direction, 0 to 1, in distances between neighbouring lanes.
        scale: ``(n, lanes)``: number of cells per pixel along the lanes.
        phase: ``(n, lanes)``: position of the first pixel of a lane in the first cell, 0 to 1, in lengths of a cell.
        streak: ``(n, lanes, cells)``: random number in [0, 1) of each cell with a streak; negative without one.
    """

    offset: Float[Tensor, " n"]
    scale: Float[Tensor, "n lanes"]
    phase: Float[Tensor, "n lanes"]
    streak: Float[Tensor, "n lanes cells"]


def lane_distance(width: Tensor) -> Tensor:
    """Return the distance between neighbouring lanes in pixels: the width of the streaks, but at least 1.

    Streaks in narrower lanes could fall between the pixels.
    """
    return width.clamp(min=1)


def draw_lanes(layers: StreakLayers, size: Sequence[int], device: torch.device) -> Lanes:
    """Return random streaks for each layer, drawn by the global random number generator of the device.

    Args:
        layers: Parameters of the layers, on the CPU.
        size: Height and width of the images in pixels.
        device: Device of the result.
    """
    diagonal = math.hypot(*size)
    count = len(layers.angle)
    cell = layers.length / MEAN_FRACTION
    lanes = int(diagonal / float(lane_distance(layers.width).min())) + 3
    cells = int(1.4 * (diagonal + 1) / float(cell.min())) + 3
    presence = (layers.coverage / (MEAN_FRACTION * (1 - TAPER))).clamp(max=MAX_PRESENCE).to(device)
    number = torch.rand(count, lanes, cells, device=device).div_(presence[:, None, None])
    return Lanes(
        offset=torch.rand(count, device=device),
        scale=(0.7 + 0.7 * torch.rand(count, lanes, device=device)) / cell.to(device)[:, None],
        phase=torch.rand(count, lanes, device=device),
        # A number below 1 is uniform in [0, 1). Without streaks, 0 / 0 may occur.
        streak=number.masked_fill_(number.ge(1).logical_or_(number.isnan()), -1),
    )


def streak_opacity(layers: StreakLayers, lanes: Lanes, size: Sequence[int]) -> Float[Tensor, "n h w"]:
    """Return the opacity of the streaks of each layer, in [0, 1].

    Args:
        layers: Parameters of the layers.
        lanes: Random streaks, drawn for images of this size.
        size: Height and width of the images in pixels.
    """
    device = lanes.scale.device
    height, width = size
    opacity = _lane_opacity(lanes, math.ceil(math.hypot(height, width)) + 1)
    rows, columns = opacity.shape[1:]
    x = torch.linspace(-(width - 1) / 2, (width - 1) / 2, width, device=device)
    y = torch.linspace(-(height - 1) / 2, (height - 1) / 2, height, device=device)[:, None]
    sin, cos = (part.to(device)[:, None, None] for part in (layers.angle.sin(), layers.angle.cos()))
    # Normalised coordinates of the pixels along and across the lanes; affine_grid is slower on a CPU.
    to_column = 2 / (columns - 1)
    to_row = 2 / (rows - 1) / lane_distance(layers.width).to(device)[:, None, None]
    along = to_column * sin * x + to_column * cos * y
    across = to_row * cos * x - (to_row * sin * y - lanes.offset[:, None, None] * 2 / (rows - 1))
    grid = torch.stack((along, across), 3)
    peak = layers.width.clamp(max=1).to(device)[:, None, None]  # a streak thinner than a pixel is fainter
    return F.grid_sample(opacity[:, None], grid, align_corners=True)[:, 0].mul_(peak)


def _lane_opacity(lanes: Lanes, length: int) -> Float[Tensor, "n lanes length"]:
    """Return the opacity along the middle of each lane, at each pixel."""
    pixels = torch.arange(length, device=lanes.scale.device)
    position = torch.addcmul(lanes.phase[:, :, None], lanes.scale[:, :, None], pixels)
    cell = position.long()
    from_centre = position.frac_().sub_(0.5).abs_()
    fraction = lanes.streak.mul(LENGTH_FACTOR).frac_().mul_(0.5).add_(0.5)
    brightness = torch.where(lanes.streak < 0, 0, 0.3 + 0.7 * lanes.streak)
    slope = fraction.reciprocal_().div_(TAPER).gather(2, cell)
    ends = slope.mul_(from_centre).neg_().add_(0.5 / TAPER).clamp_(0, 1)
    return ends.mul_(brightness.gather(2, cell))


def read_streak_images(folder: Path) -> UInt8[Tensor, "n 1 h w"]:
    """Return the images of streaks on black in a folder and its subfolders, in grey.

    All are extended by reflection to the largest height and width.

    Raises:
        DerainError: If there are no images, or one cannot be read or has a mean above 127 of 255.
    """
    files = image_files(folder, recursive=True)
    if not files:
        raise DerainError(f"--data.rain: no images in {folder}; expected images of streaks on black")
    images = [cv2.cvtColor(read_rgb(file), cv2.COLOR_RGB2GRAY) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.mean() > 127:
            raise DerainError(f"--data.rain: {file} is not dark (mean {image.mean():.0f}); expected streaks on black")
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    extended = [
        cv2.copyMakeBorder(image, 0, height - image.shape[0], 0, width - image.shape[1], cv2.BORDER_REFLECT)
        for image in images
    ]
    return torch.from_numpy(np.stack(extended)[:, None])


def measured_opacity(images: UInt8[Tensor, "n 1 h w"], count: int, size: Sequence[int]) -> Float[Tensor, "count h2 w2"]:
    """Return random parts of images of streaks, resized, rotated, flipped, and multiplied by a factor, in [0, 1].

    Scales are 0.5 to 1.8, angles -25° to 25°, and factors 0.6 to 2.2.

    Args:
        images: Images of streaks on black.
        count: Number of results.
        size: Height and width of the results in pixels.
    """
    device = images.device
    height, width = images.shape[2:]
    choice = torch.randint(len(images), (count,))
    scale = torch.exp(torch.empty(count).uniform_(float(np.log(0.5)), float(np.log(1.8))))
    angle = torch.deg2rad(torch.empty(count).uniform_(-25, 25))
    flip = 1 - 2.0 * torch.randint(2, (count,))
    factor = torch.empty(count).uniform_(0.6, 2.2)
    centre = 2 * torch.rand(count, 2) - 1
    # Normalised coordinates of the image, as functions of those of the result.
    extent = torch.tensor([size[1] / width, size[0] / height]) / scale[:, None]
    aspect = size[0] / size[1]
    theta = torch.stack(
        [
            torch.stack([flip * angle.cos(), -angle.sin() * aspect], 1) * extent[:, :1],
            torch.stack([flip * angle.sin() / aspect, angle.cos()], 1) * extent[:, 1:],
        ],
        1,
    )
    matrix = torch.cat((theta, centre[:, :, None]), 2).to(device)
    grid = F.affine_grid(matrix, [count, 1, *size], align_corners=False)
    parts = F.grid_sample(
        images[choice.to(device)].float().div_(255), grid, padding_mode="reflection", align_corners=False
    )
    return parts[:, 0].mul_(factor.to(device)[:, None, None]).clamp_(max=1)
