"""Prompts of CLIP-RPN, verbatim, and the numbers of training images of each route, from the paper's percentages."""

from collections.abc import Sequence
from typing import NamedTuple

from derain.errors import DerainError


class PromptSet(NamedTuple):
    """Set of prompts, one per route.

    Attributes:
        texts: The prompts.
        counts: Number of training images of each route, by data set: the paper's percentages of 700 images (Rain800),
            1800 (Rain100H) and 200 (Rain100L).
        source: Tables of the paper with the prompts and the percentages.
    """

    texts: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    source: str


def _counts(rain800: Sequence[int], rain100h: Sequence[int], rain100l: Sequence[int]) -> dict[str, tuple[int, ...]]:
    return {"Rain800": tuple(rain800), "Rain100H": tuple(rain100h), "Rain100L": tuple(rain100l)}


PROMPTS = {
    "1": PromptSet(
        (
            "Image showing a gentle drizzle with minimal water accumulation. The raindrops may be small and sparse.",
            "Image depicting a steady rainfall with more noticeable raindrops. Puddles may start to form, and "
            "visibility might be slightly reduced.",
            "Image characterized by intense rainfall, with large raindrops and significant water accumulation. "
            "Visibility is often low, and streets may appear flooded.",
        ),
        _counts((233, 6, 461), (376, 0, 1424), (65, 0, 135)),
        "Tables 5 and 7",
    ),
    "2": PromptSet(
        (
            "This image has very sparse raindrops",
            "This is an image with moderately dense raindrops",
            "This is an image with dense raindrops",
        ),
        _counts((152, 34, 514), (125, 151, 1524), (48, 17, 135)),
        "Table 5; percentages of Table 8, whose prompts are longer",
    ),
    "2-long": PromptSet(
        (
            "This image has very sparse raindrops, indicating light rain conditions with minimal impact on visibility.",
            "This is an image with moderately dense raindrops, showing noticeable rain intensity and some visibility "
            "reduction.",
            "This is an image with dense raindrops, representing heavy rain conditions with significant visibility "
            "impairment.",
        ),
        _counts((152, 34, 514), (125, 151, 1524), (48, 17, 135)),
        "Table 8",
    ),
    "3": PromptSet(
        (
            "This image has almost no rain effect or raindrops or any distoration.",
            "Rain effect: the rain looks like it was unnatural and of poor quality, adding to the image distortion.",
        ),
        _counts((126, 574), (110, 1690), (59, 141)),
        "Table 5, with its spelling; percentages of Table 9",
    ),
    "3-distortion": PromptSet(
        (
            "This image has almost no rain effect or raindrops or any distortion.",
            "Rain effect: the rain looks like it was unnatural and of poor quality, adding to the image distortion.",
        ),
        _counts((126, 574), (110, 1690), (59, 141)),
        "Table 9",
    ),
    "rain": PromptSet(
        (
            "The Image is Unnatural with Rain Effect and of Poor Quality, Adding to the Image Distortion.",
            "Almost No Rain Effect or Raindrops or Any Distortion.",
        ),
        _counts((664, 36), (1791, 9), (185, 15)),
        "Table 1",
    ),
    "intensity": PromptSet(
        (
            "A Light Drizzle with Fine Raindrops, Causing Minimal Disruption to Visibility and Surface Accumulation.",
            "A Steady Rainfall with Moderately Sized Raindrops, Leading to Consistent Water Accumulation and "
            "Noticeable Reduction in Visibility.",
            "A Heavy Downpour with Large, Dense Raindrops, Resulting in Significant Water Accumulation and Severely "
            "Reduced Visibility.",
        ),
        _counts((293, 145, 262), (683, 107, 1010), (92, 25, 83)),
        "Table 2",
    ),
}
"""Prompt sets by name.

``1``, ``2`` and ``3`` are numbered as in Table 5. ``2-long`` and ``3-distortion`` are variants of ``2`` and ``3``
in Tables 8 and 9. ``rain`` and ``intensity`` are the sets of Tables 1 and 2.
"""


def texts_of(prompts: str | Sequence[str]) -> tuple[str, ...]:
    """Return the prompts of a named set, or check and return those of a list.

    Args:
        prompts: Name of a set in `PROMPTS`, or at least two different texts.

    Raises:
        DerainError: If the set does not exist, or the list has fewer than two prompts or a prompt twice.

    Example:
        >>> len(texts_of("3")), texts_of(["light rain", "heavy rain"])
        (2, ('light rain', 'heavy rain'))
    """
    if isinstance(prompts, str):
        if prompts not in PROMPTS:
            raise DerainError(
                f"prompts {prompts!r}: unknown set; expected one of {', '.join(PROMPTS)}, or a list of texts"
            )
        return PROMPTS[prompts].texts
    if len(prompts) < 2 or len(set(prompts)) < len(prompts):
        raise DerainError(f"prompts {list(prompts)}: expected at least two different texts, one per route")
    return tuple(prompts)
