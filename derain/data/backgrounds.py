"""Tells whether two images show the same background."""

from collections.abc import Sequence
from dataclasses import dataclass

from derain.images import Pixels


@dataclass(frozen=True)
class Match:
    first: int
    second: int


def same(first: Sequence[Pixels], second: Sequence[Pixels], *, crops: bool = True) -> list[Match]:
    raise NotImplementedError


def describe(pixels):
    return pixels
