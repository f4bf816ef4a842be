"""Labelled comparisons and contact sheets of images."""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from derain.errors import DerainError
from derain.images import Pixels, write_image, write_whole

WHITE, INK = (255, 255, 255), (32, 32, 32)


def compare(images: Mapping[str, Pixels]) -> Image.Image:
    """Return a picture of images side by side at their original size, each below its name.

    Args:
        images: Pixels by name, from left to right, for example ``{"rainy": …, "derained": …, "clean": …}``. Sizes may
            differ. A name may have several lines.

    Raises:
        DerainError: If there are no images.

    Example:
        >>> import numpy as np
        >>> photo = np.zeros((200, 300, 3), np.uint8)
        >>> compare({"rainy": photo, "derained": photo, "clean": photo}).width > 3 * 300
        True
    """
    pictures = [Image.fromarray(pixels) for pixels in images.values()]
    longest_side = max((max(picture.size) for picture in pictures), default=0)
    return _sheet([pictures], list(images), [], font_size=_font_size(longest_side // 32))


def write_explanation(path: Path, images: Mapping[str, Pixels], description: Mapping[str, Any]) -> None:
    """Write a picture and a JSON file that explain a restoration.

    Args:
        path: Path of both files without suffix: ``.png`` has all images side by side, ``.json`` the description.
        images: Pixels by name: ``rainy``, ``derained`` and the maps of the method.
        description: Result of `Explains.describe_image`. The label of the derained image shows a ``route``,
            and the ``scores`` of all routes if they are given.
    """
    labelled = dict(images)
    if "route" in description:
        label = f"derained by route {description['route']}"
        scores = [f"{score:.4f}" for score in description.get("scores", {}).values()]
        if scores:
            label += f"\nscores {', '.join(scores)}"
        labelled = {label if name == "derained" else name: pixels for name, pixels in images.items()}
    write_image(path.with_name(f"{path.name}.png"), compare(labelled))
    with write_whole(path.with_name(f"{path.name}.json")) as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n")


def contact_sheet(
    rows: Sequence[Sequence[Pixels]],
    *,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    cell: int = 256,
) -> Image.Image:
    """Return a sheet with rows of images, each reduced to fit a cell; no image is enlarged or distorted.

    Args:
        rows: Images from top to bottom and left to right; rows may differ in length.
        column_labels: Labels above the columns; empty for none.
        row_labels: Labels left of the rows; empty for none.
        cell: Side of a square cell, in pixels.

    Raises:
        DerainError: If there are no images, or the number of labels is not that of the columns or rows.
    """
    thumbnails = []
    for row in rows:
        pictures = [Image.fromarray(pixels) for pixels in row]
        for picture in pictures:
            picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        thumbnails.append(pictures)
    return _sheet(thumbnails, column_labels, row_labels, font_size=_font_size(cell // 16))


def _font_size(size: int) -> int:
    return min(max(13, size), 96)


class _Labels:
    """Font of the labels on a sheet, and their size in pixels."""

    def __init__(self, font_size: int) -> None:
        self.font = ImageFont.load_default(size=font_size)
        self.padding = font_size // 2
        self.line_height = int(sum(self.font.getmetrics()))  # type: ignore[union-attr]
        self._ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def width(self, label: str) -> int:
        """Return the width of a label with padding."""
        left, _, right, _ = self._ruler.multiline_textbbox((0, 0), label, font=self.font)
        return int(right - left) + self.padding

    def height(self, label: str) -> int:
        """Return the height of all lines of a label."""
        return self.line_height * (label.count("\n") + 1)


def _sheet(
    rows: Sequence[Sequence[Image.Image]], column_labels: Sequence[str], row_labels: Sequence[str], *, font_size: int
) -> Image.Image:
    """Return a sheet with rows of images of any size.

    A column is as wide as its widest image or label, a row as high as its highest image or label.
    """
    column_count = max((len(row) for row in rows), default=0)
    if column_count == 0:
        raise DerainError("no images to show; expected at least one")
    _check_label_count("column", column_labels, column_count)
    _check_label_count("row", row_labels, len(rows))
    labels = _Labels(font_size)
    gap = max(4, font_size // 3)

    widths = [labels.width(label) for label in column_labels] or [0] * column_count
    heights = [labels.height(label) for label in row_labels] or [labels.line_height] * len(rows)
    for row_index, row in enumerate(rows):
        for column_index, picture in enumerate(row):
            widths[column_index] = max(widths[column_index], picture.width)
            heights[row_index] = max(heights[row_index], picture.height)
    header = max(labels.height(label) for label in column_labels) + labels.padding if column_labels else 0
    margin = max((labels.width(label) + 2 * labels.padding for label in row_labels), default=0)
    *lefts, sheet_width = accumulate((width + gap for width in widths), initial=margin + gap)
    *tops, sheet_height = accumulate((height + gap for height in heights), initial=header + gap)

    sheet = Image.new("RGB", (sheet_width, sheet_height), WHITE)
    draw = ImageDraw.Draw(sheet)
    for label, left, width in zip(column_labels, lefts, widths, strict=False):
        center = (left + width / 2, (header + gap) / 2)
        draw.multiline_text(center, label, INK, labels.font, anchor="mm", align="center", spacing=0)
    for label, top, height in zip(row_labels, tops, heights, strict=False):
        right_center = (margin - labels.padding, top + height / 2)
        draw.multiline_text(right_center, label, INK, labels.font, anchor="rm", align="right")
    for row, top, height in zip(rows, tops, heights, strict=True):
        for picture, left, width in zip(row, lefts, widths, strict=False):
            sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
    return sheet


def _check_label_count(kind: str, labels: Sequence[str], expected: int) -> None:
    if labels and len(labels) != expected:
        raise DerainError(f"{len(labels)} {kind} labels for {expected} {kind}s; expected one label per {kind}")
