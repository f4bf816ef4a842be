"""Pictures that people look at: labelled comparisons and contact sheets."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from derain.errors import DerainError
from derain.images import Pixels, write_image, write_whole

PAPER, INK = (255, 255, 255), (32, 32, 32)


def compare(images: Mapping[str, Pixels]) -> Image.Image:
    """Puts images side by side, each under its name; no pixel of them is changed.

    Args:
        images: Name to pixels, from left to right, as in ``{"rainy": …, "derained": …, "clean": …}``. Sizes
            may differ. A name may have several lines.

    Raises:
        DerainError: If there are no images.

    Example:
        >>> import numpy as np
        >>> photo = np.zeros((200, 300, 3), np.uint8)
        >>> compare({"rainy": photo, "derained": photo, "clean": photo}).width > 3 * 300
        True
    """
    pictures = [Image.fromarray(pixels) for pixels in images.values()]
    longest = max((max(picture.size) for picture in pictures), default=0)
    return _sheet([pictures], list(images), [], text=min(max(13, longest // 32), 96))


def write_explanation(path: Path, images: Mapping[str, Pixels], told: Mapping[str, Any]) -> None:
    """Writes how a restoration came about.

    Args:
        path: Without suffix: ``.png`` is the picture of all images side by side, ``.json`` says what was perceived.
        images: Rainy, derained, and the maps of the method, by name.
        told: What ``DerainModule.describe_image`` says; ``route`` and ``scores`` stand in the picture too.
    """
    labels = dict(zip(images, images, strict=True))
    if "route" in told:
        shares = ", ".join(f"{share:.4f}" for share in told.get("scores", {}).values())
        labels["derained"] = f"derained by route {told['route']}" + (f"\nscores {shares}" if shares else "")
    write_image(path.with_name(f"{path.name}.png"), compare({labels[name]: one for name, one in images.items()}))
    with write_whole(path.with_name(f"{path.name}.json")) as temporary:
        temporary.write_text(json.dumps(told, indent=2) + "\n")


def contact_sheet(
    rows: Sequence[Sequence[Pixels]],
    *,
    columns: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    cell: int = 256,
) -> Image.Image:
    """Puts many images on one sheet, each shrunk to fit a cell; nothing is enlarged or distorted.

    Args:
        rows: Images from top to bottom and left to right; rows may have different lengths.
        columns: A label above each column.
        row_labels: A label left of each row.
        cell: Longest side of an image on the sheet, in pixels.

    Raises:
        DerainError: If there are no images, or labels that do not match them.
    """
    small = [[Image.fromarray(pixels) for pixels in row] for row in rows]
    for picture in (picture for row in small for picture in row):
        picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return _sheet(small, columns, row_labels, text=min(max(13, cell // 16), 96))


def _sheet(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], row_labels: Sequence[str], *, text: int
) -> Image.Image:
    """Lays out images of any sizes: a column is as wide as its widest image or label, a row as high."""
    count = max((len(row) for row in rows), default=0)
    if count == 0:
        raise DerainError("no images to put on the sheet; give at least one")
    for what, labels, expected in (("column", columns, count), ("row", row_labels, len(rows))):
        if labels and len(labels) != expected:
            raise DerainError(f"{len(labels)} {what} labels for {expected} {what}s of images; give one each")

    font = ImageFont.load_default(size=text)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    gap, pad = max(4, text // 3), text // 2
    line = int(sum(font.getmetrics()))  # type: ignore[union-attr]

    def extent(label: str) -> tuple[int, int]:
        left, _, right, _ = ruler.multiline_textbbox((0, 0), label, font=font)
        return int(right - left) + pad, line * (label.count("\n") + 1)

    names = [extent(label) for label in columns] or [(0, 0)] * count
    margin = max((extent(label)[0] + 2 * pad for label in row_labels), default=0)
    head = max(height for _, height in names) + (pad if columns else 0)
    widths = [max([names[i][0], *(row[i].width for row in rows if i < len(row))]) for i in range(count)]
    heights = [
        max([extent(label)[1], *(picture.height for picture in row)])
        for row, label in zip(rows, row_labels or [""] * len(rows), strict=True)
    ]
    lefts = [margin + gap + sum(widths[:i]) + gap * i for i in range(count)]
    tops = [head + gap + sum(heights[:i]) + gap * i for i in range(len(rows))]

    sheet = Image.new("RGB", (lefts[-1] + widths[-1] + gap, tops[-1] + heights[-1] + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for label, left, width in zip(columns, lefts, widths, strict=False):
        draw.multiline_text(
            (left + width / 2, (head + gap) / 2), label, INK, font, anchor="mm", align="center", spacing=0
        )
    for label, top, height in zip(row_labels, tops, heights, strict=False):
        draw.multiline_text((margin - pad, top + height / 2), label, INK, font, anchor="rm", align="right")
    for row, top, height in zip(rows, tops, heights, strict=True):
        for picture, left, width in zip(row, lefts, widths, strict=False):
            sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
    return sheet
