"""Restoration of an image in overlapping tiles that are blended."""

import itertools
from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor


def blend_tiles(
    images: Float[Tensor, "b c h w"],
    forward: Callable[[Tensor], Tensor],
    tile: int,
    overlap: int,
    tiles_per_pass: int = 1,
) -> Float[Tensor, "b n h w"]:
    """Apply a function to images tile by tile, and blend the overlaps of the tiles by a raised cosine.

    All tiles have the same size, ``min(tile, h)`` × ``min(tile, w)``, so that a compiled network compiles once.

    Args:
        images: Images, or other tensors with the same layout, such as states of a sampler.
        forward: Function of tiles, ``(k * b, c, min(tile, h), min(tile, w))``, that returns ``n`` channels of the same
            height and width on the same device. The ``b`` tiles at one position are followed by those at the next.
        tile: Side of a tile in pixels.
        overlap: Minimum overlap of neighbours in pixels, reduced to half a tile if it is larger.
        tiles_per_pass: Maximum of ``k``, the number of positions in one call of ``forward``.

    Returns:
        ``(b, n, h, w)``. If one tile covers the images, it is the result of ``forward``.

    Example:
        >>> images = torch.rand(2, 3, 50, 90)
        >>> torch.allclose(blend_tiles(images, lambda t: t, 32, 8, 3), images)
        True
    """
    count, _, height, width = images.shape
    tile_height, tile_width = min(tile, height), min(tile, width)
    if (tile_height, tile_width) == (height, width):
        return forward(images)
    overlap = min(overlap, tile // 2)
    tops, lefts = tile_starts(height, tile_height, overlap), tile_starts(width, tile_width, overlap)
    positions = list(itertools.product(tops, lefts))
    total: Tensor | None = None
    total_weight = images.new_zeros(1, 1, height, width)
    for start in range(0, len(positions), tiles_per_pass):
        pass_positions = positions[start : start + tiles_per_pass]
        areas = [(..., slice(top, top + tile_height), slice(left, left + tile_width)) for top, left in pass_positions]
        restored = forward(torch.cat([images[area] for area in areas]))
        if total is None:
            total = restored.new_zeros(count, restored.shape[1], height, width)
        for (top, left), area, part in zip(pass_positions, areas, restored.chunk(len(pass_positions)), strict=True):
            fade = torch.outer(
                _fade(tile_height, overlap, top > 0, top + tile_height < height),
                _fade(tile_width, overlap, left > 0, left + tile_width < width),
            ).to(images.device)
            total[area] += part * fade
            total_weight[area] += fade
    return cast(Tensor, total) / total_weight


def tile_count(height: int, width: int, tile: int, overlap: int) -> int:
    """Return the number of tiles of an image in `blend_tiles`; all arguments in pixels.

    Example:
        >>> tile_count(100, 300, 128, 0)
        3
    """
    overlap = min(overlap, tile // 2)
    return len(tile_starts(height, min(tile, height), overlap)) * len(tile_starts(width, min(tile, width), overlap))


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return the start of each of the evenly spaced tiles that cover ``length`` and overlap by at least ``overlap``.

    Example:
        >>> tile_starts(100, 40, 10)
        [0, 30, 60]
        >>> tile_starts(101, 40, 10)
        [0, 20, 41, 61]
    """
    if tile >= length:
        return [0]
    count = -(-(length - tile) // (tile - overlap)) + 1
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def _fade(side: int, overlap: int, before: bool, after: bool) -> Float[Tensor, " side"]:
    """Return the weights along one side of a tile: 1 inside, falling to nearly 0 by a raised cosine towards neighbours.

    Args:
        side: Length of the side in pixels.
        overlap: Length of the ramp in pixels.
        before: Whether the tile has a neighbour before it.
        after: Whether the tile has a neighbour after it.
    """
    ramp = torch.sin((torch.arange(overlap) + 0.5) / max(overlap, 1) * torch.pi / 2) ** 2
    weights = torch.ones(side)
    if before:
        weights[:overlap] *= ramp
    if after:
        weights[side - overlap :] *= ramp.flip(0)
    return weights
